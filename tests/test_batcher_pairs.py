"""Packed pairs against a slow, obvious batcher, byte for byte, whatever threads, prefetching and hosts."""

import gc
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_pairs import SlowBatcher, SlowPair, native_plan, pack, part_of, permutation, plan, random_pairs, same, write

from fastpref.data import PackedPairs, PairBatcher, _native, pack_pairs, row_counts
from fastpref.method.errors import DataError

SEEDED = settings(derandomize=True, deadline=None)
LAYOUTS = ["shared", "separate", "encoder-decoder"]
ENCODER: dict[str, Any] = {"layout": "encoder-decoder", "prompt_row_tokens": 20, "decoder_start": 3}


def batcher(pairs: list[SlowPair], **options: Any) -> PairBatcher:
    return PairBatcher(
        [pair.prompt for pair in pairs],
        [pair.completions[0] for pair in pairs],
        [pair.completions[1] for pair in pairs],
        [pair.preference for pair in pairs],
        **(
            {"ids": [pair.id for pair in pairs], "ref_logps": np.asarray([pair.ref_logps for pair in pairs])}
            | {"rows": 4, "row_tokens": 40}
            | options
        ),
    )


def in_layout(layout: str) -> dict[str, Any]:
    return ENCODER if layout == "encoder-decoder" else {"layout": layout}


def slow(pairs: list[SlowPair], layout: str, **options: Any) -> SlowBatcher:
    encoder = layout == "encoder-decoder"
    shapes = options.pop("shapes", ((4, 40, 20 if encoder else 0),))
    return SlowBatcher(pairs, shapes, layout=layout, start=3 if encoder else 0, **options)


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=60)


@SEEDED
@given(
    sizes=sizes,
    encoder=st.booleans(),
    tail=st.booleans(),
    rows=st.integers(1, 5),
    most=st.integers(1, 5),
    window=st.integers(1, 70),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 3) | st.integers(0, 2**62),
)
def test_plan_equals_the_python_version(
    sizes: list[tuple[int, int]], encoder: bool, tail: bool, rows: int, most: int, window: int, seed: int, epoch: int
) -> None:
    sizes = [(tokens, prompt * encoder) for tokens, prompt in sizes]
    shapes = [(rows, 31, 13 * encoder)]
    if tail:
        shapes = [(2 * rows, 9, 6 * encoder), (rows, 16, 6 * encoder), *shapes]
    native = native_plan(sizes, shapes, max_pairs_per_row=most, window=window, seed=seed, epoch=epoch)
    assert native == plan(sizes, shapes, most, window, seed, epoch)
    assert sorted(pair for _, rows in native for row in rows for pair in row) == list(range(len(sizes)))


def test_a_plan_is_pinned() -> None:
    """A change of these numbers is a change of everyone's order: it needs a new plan version."""
    tokens, shapes = np.asarray([3, 9, 4, 4, 7, 1, 6, 2, 5, 5], np.int32), [(2, 10, 0)]
    options: dict[str, Any] = {"max_pairs_per_row": 3, "window": 6, "seed": 42, "epoch": 3}
    members, ends, batches, digest = _native.plan_pairs(tokens, np.zeros(0, np.int32), shapes=shapes, **options)
    sizes = [(n, 0) for n in tokens.tolist()]
    assert native_plan(sizes, shapes, **options) == plan(sizes, shapes, 3, 6, 42, 3)
    assert (members.tolist(), ends.tolist(), batches.tolist(), digest) == PINNED


PINNED = ([4, 0, 6, 3, 1, 8, 2, 5, 9, 7], [2, 4, 5, 8, 9, 10], [[0, 2, 0], [4, 2, 0], [2, 2, 0]], 9240058677757544535)


@pytest.mark.parametrize("threads", range(1, 9))
def test_batches_equal_the_python_version(threads: int) -> None:
    """Every thread count with some depths, every depth with some thread count; more than two epochs each."""
    pairs = random_pairs(30, (9, 9), seed=threads)
    # Three thread counts in a row have the three remainders, and so all depths between them.
    for turn, prefetch in enumerate(range(threads % 3, 17, 3)):
        layout = LAYOUTS[(threads + turn) % 3]
        options: dict[str, Any] = {"window": 8 + turn, "seed": threads * 100 + prefetch}
        expected = slow(pairs, layout, **options)
        with batcher(pairs, threads=threads, prefetch=prefetch, **in_layout(layout), **options) as native:
            for epoch in range(3):
                batches = expected.epoch(epoch)
                assert native.batches_in(epoch) == len(batches)
                for batch in batches:
                    assert native.epoch == epoch
                    assert same(next(native), batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(SEEDED, max_examples=15)
@given(data=st.data())
def test_random_data_equal_the_python_version(layout: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 25), label="count")
    pairs = random_pairs(count, (data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))), seed=count)
    most, window = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30))
    encoder = 20 if layout == "encoder-decoder" else 0
    tail = ((2, 80, encoder),) if data.draw(st.booleans()) or layout == "separate" else ()
    expected = slow(pairs, layout, most=most, window=window, shapes=((4, 40, encoder), *tail))
    options: dict[str, Any] = {"tail": [shape if encoder else shape[:2] for shape in tail]}
    with batcher(pairs, max_pairs_per_row=most, window=window, **in_layout(layout), **options) as native:
        assert native.shapes == expected.shapes
        for batch in itertools.chain(expected.epoch(0), expected.epoch(1)):
            assert same(next(native), batch)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_each_batch(hosts: int) -> None:
    pairs = random_pairs(40, (9, 9))
    expected = slow(pairs, "shared", window=16)
    parts = [batcher(pairs, window=16, host=host, hosts=hosts) for host in range(hosts)]
    for batch in (*expected.epoch(0), *expected.epoch(1)):
        for host, part in enumerate(parts):
            assert same(next(part), part_of(batch, host, hosts))
    assert len({part.state() for part in parts}) == 1
    for part in parts:
        part.close()


@settings(SEEDED, max_examples=25)
@given(
    count=st.integers(1, 60),
    longest=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    window=st.integers(1, 64),
    rows=st.integers(1, 6),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_pair_comes_once_an_epoch_or_is_reported(
    count: int, longest: tuple[int, int], window: int, rows: int, seed: int
) -> None:
    pairs = [*random_pairs(count, longest, seed % 1000), SlowPair([1], [[1], [2]], -5)]
    options: dict[str, Any] = {"rows": rows, "window": window, "seed": seed, "overlong": "drop", "tail": [(rows, 50)]}
    with batcher(pairs, **options) as native:
        too_long = [pair.id for pair in pairs if pair.size("shared")[0] > 50]
        assert native.dropped_ids.tolist() == too_long
        assert native.report.dropped == ({"pair too long for a row": len(too_long)} if too_long else {})
        assert native.report.read == len(pairs) == native.report.delivered + len(too_long)
        for epoch in range(2):
            seen: Counter[int] = Counter()
            used = places = 0
            for batch in itertools.islice(native, native.batches_in(epoch)):
                seen.update(batch.ids[batch.where].tolist())
                used += int((batch.pairs >= 0).sum())
                places += batch.pairs.size
                check_batch(batch)
            assert seen + Counter(too_long) == Counter(pair.id for pair in pairs)
            assert native.padding(epoch) == pytest.approx(1 - used / places, abs=1e-12)


def check_batch(batch: PackedPairs) -> None:
    """What holds of every packed batch, whatever made it."""
    rows, most = batch.tokens.shape[0], len(batch.ids) // batch.tokens.shape[0]
    assert ((batch.ids == -1) == ~batch.where).all()
    assert ((batch.lengths > 0).any(1) == batch.where).all()
    assert (batch.tokens[batch.pairs < 0] == 0).all()
    scored = batch.sequences[batch.sequences >= 0]
    assert (np.bincount(scored, minlength=2 * rows * most) == batch.lengths.ravel()).all()
    r, _ = np.nonzero(batch.sequences >= 0)
    assert (scored // 2 == r * most + batch.pairs[batch.sequences >= 0]).all()
    assert (batch.streams[batch.sequences >= 0] == 1 + scored % 2).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("completions", [1, 2])
@settings(SEEDED, max_examples=25)
@given(data=st.data())
def test_steps_are_packed_as_the_python_version(layout: str, completions: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12), label="count")
    pairs = random_pairs(count, (7, 6), seed=data.draw(st.integers(0, 99), label="seed"))
    pairs = [replace(pair, completions=pair.completions[:completions], scores=(pair.id, -0.5)) for pair in pairs]
    where = np.asarray(data.draw(st.lists(st.booleans(), min_size=count, max_size=count), label="where"))
    arguments = padded(pairs)
    for name in ("prompt_lengths", "completion_lengths"):
        arguments[name][~where] = -9
    arguments["preference"][~where] = np.nan
    most, capacity = data.draw(st.integers(1, 4)), 25 if layout == "separate" else 20
    encoder = in_layout(layout)
    result = pack_pairs(**arguments, where=where, row_tokens=capacity, max_pairs_per_row=most, **encoder)
    kept = [at for at in range(count) if where[at]]
    sizes = [pair.size(layout) for pair in pairs]
    capacities = (capacity, 20 if layout == "encoder-decoder" else 0)
    rows = pack(kept, sizes, capacities, most)
    number = next(n for n in row_counts(count) if n >= len(rows))
    expected = write(
        [[pairs[pair] for pair in row] for row in rows],
        (number, *capacities),
        most,
        layout,
        encoder.get("decoder_start", 0),
    )
    assert same(result.pairs, expected)
    slots = [-1] * count
    for r, row in enumerate(rows):
        for s, pair in enumerate(row):
            slots[pair] = r * most + s
    assert result.slots.tolist() == slots
    assert result.slots.dtype == np.int32
    check_batch(result.pairs)


def padded(pairs: list[SlowPair]) -> dict[str, Any]:
    """Pairs as a sampler hands them over: arrays padded with what is no token."""
    prompts = [pair.prompt for pair in pairs]
    completions = [pair.completions for pair in pairs]
    lengths = np.asarray([[len(part) for part in group] for group in completions], np.int32)
    tokens = np.full((*lengths.shape, lengths.max() + 1), -7, np.int32)
    prompt_tokens = np.full((len(pairs), max(map(len, prompts))), -7, np.int32)
    for at, pair in enumerate(pairs):
        prompt_tokens[at, : len(pair.prompt)] = pair.prompt
        for k, part in enumerate(pair.completions):
            tokens[at, k, : len(part)] = part
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_lengths": np.asarray([*map(len, prompts)], np.int32),
        "completion_tokens": tokens,
        "completion_lengths": lengths,
        "preference": np.asarray([pair.preference for pair in pairs], np.float32),
        "ref_logps": np.asarray([pair.ref_logps for pair in pairs], np.float32),
        "scores": np.asarray([pair.scores for pair in pairs], np.float32),
        "ids": np.asarray([pair.id for pair in pairs]),
    }


def test_a_step_without_pairs_is_empty_rows() -> None:
    arguments = padded(random_pairs(3, (4, 4)))
    result = pack_pairs(**arguments, where=np.zeros(3, bool), row_tokens=16)
    assert result.slots.tolist() == [-1] * 3
    assert result.pairs.tokens.shape == (1, 16)
    assert not result.pairs.where.any()
    nothing = {name: array[:0] for name, array in arguments.items()}
    assert pack_pairs(**nothing, row_tokens=16).pairs.tokens.shape == (1, 16)


def test_defaults_of_a_step() -> None:
    arguments = padded(random_pairs(3, (4, 4)))
    for name in ("preference", "ref_logps", "ids"):
        del arguments[name]
    result = pack_pairs(**arguments, row_tokens=16)
    assert sorted(result.pairs.ids[result.pairs.where].tolist()) == [0, 1, 2]
    assert (result.pairs.preference[result.pairs.where] == 1).all()
    assert not result.pairs.ref_logps.any()
    assert len(result.pairs.ids) == 3 * len(result.pairs.tokens)


@pytest.mark.parametrize("multiple", [1, 4])
def test_row_counts_are_few_and_close(multiple: int) -> None:
    assert row_counts(32) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    assert row_counts(20, 4) == (4, 8, 12, 16, 20)
    for pairs in range(1, 200):
        counts = row_counts(pairs, multiple)
        assert counts[-1] >= pairs
        assert counts[-1] - multiple < pairs
        assert all(count % multiple == 0 for count in counts)
        assert all(a < b <= max(1.5 * a, 2 * multiple) for a, b in itertools.pairwise(counts))


def test_resume_is_exact_at_every_position_whatever_runs_it() -> None:
    pairs = random_pairs(30, (9, 9))
    expected = slow(pairs, "shared", window=8, seed=5)
    batches = [batch for epoch in range(3) for batch in expected.epoch(epoch)]
    with batcher(pairs, window=8, seed=5) as native:
        states = [native.state()]
        for batch in batches:
            assert same(next(native), batch)
            states.append(native.state())
            assert native.state() == states[-1]
    assert len(set(states)) == len(states)
    assert max(map(len, states)) <= 600
    for at in (*range(len(batches)), 3, 0):
        with batcher(pairs, window=8, seed=5, threads=1 + at % 3, prefetch=at % 5) as other:
            other.restore(states[at])
            assert other.state() == states[at]
            for batch in batches[at : at + 3]:
                assert same(next(other), batch)
            # Again, backwards and forwards, in a batcher that has assembled others ahead.
            other.restore(states[-2])
            assert same(next(other), batches[-1])
            other.restore(states[at])
            assert same(next(other), batches[at])


def test_the_state_counts_what_was_handed_over() -> None:
    pairs = random_pairs(30, (9, 9))
    with batcher(pairs, prefetch=16, threads=4) as ahead, batcher(pairs, prefetch=0) as plain:
        assert ahead.state() == plain.state()
        for _ in range(5):
            next(ahead)
            next(plain)
            assert ahead.state() == plain.state()


WRONG_STATES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 9}, "seed of this batcher, 9, but received 0"),
    ({"rows": 2}, r"set of shapes .*, \[\[2, 40, 0\]\], but received \[\[4, 40, 0\]\]"),
    ({"row_tokens": 64}, r"set of shapes .*, \[\[4, 64, 0\]\], but received \[\[4, 40, 0\]\]"),
    ({"tail": [(1, 64)]}, r"set of shapes .*, \[\[4, 40, 0\], \[1, 64, 0\]\], but received \[\[4, 40, 0\]\]"),
    ({"layout": "separate", "row_tokens": 64}, "layout of this batcher, separate, but received shared"),
    ({"max_pairs_per_row": 8}, "max_pairs_per_row of this batcher, 8, but received 32"),
    ({"window": 8}, "window of this batcher, 8, but received 1024"),
    ({"ids": list(range(30))}, "data fingerprint"),
    ({"ref_logps": None}, "data fingerprint"),
    ({"tokenizer_hash": "other"}, "tokenizer hash"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_STATES)
def test_the_state_of_another_batcher_is_refused(options: dict[str, Any], message: str) -> None:
    pairs = random_pairs(30, (9, 9))
    with batcher(pairs) as native, batcher(pairs, **options) as other:
        state, before = native.state(), other.state()
        with pytest.raises(DataError, match=f"state must have the {message}.* Restore with what it was saved with"):
            other.restore(state)
        assert other.state() == before


def test_the_state_of_other_data_is_refused() -> None:
    pairs = random_pairs(30, (9, 9))
    with batcher(pairs) as native:
        state = native.state()
    fewer, changed = pairs[:-1], [*pairs[:-1], SlowPair([1], [[1], [2]], pairs[-1].id)]
    for other, message in (
        (fewer, "number of pairs of this batcher, 29, but received 30"),
        (changed, "data fingerprint"),
    ):
        with batcher(other) as native, pytest.raises(DataError, match=f"state must have the {message}"):
            native.restore(state)


def test_damaged_states_are_refused() -> None:
    with batcher(random_pairs(30, (9, 9))) as native:
        next(native)
        state = native.state()
        for at in range(len(state)):
            for damaged in (state[:at] + bytes([state[at] ^ 1]) + state[at + 1 :], state[:at]):
                with pytest.raises(
                    DataError, match=r"state must be the bytes of state\(\), but received \d+ bytes that are not"
                ):
                    native.restore(damaged)
        assert native.state() == state


def test_jax_takes_batches_without_a_copy() -> None:
    with batcher(random_pairs(30, (9, 9))) as native:
        arguments = padded(random_pairs(5, (9, 9)))
        for batch in (next(native), pack_pairs(**arguments, row_tokens=64).pairs):
            for array in batch:
                assert not array.flags.writeable
                assert array.ctypes.data % 64 == 0
                with pytest.raises(ValueError, match="WRITEABLE"):
                    array.setflags(write=True)
                if array.dtype != np.int64 and array.size:
                    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_batches_trace_as_they_are() -> None:
    with batcher(random_pairs(30, (9, 9))) as native:
        batch = next(native)._replace(ids=np.zeros(0, np.int32))
        assert jax.jit(lambda pairs: (pairs.sequences >= 0).sum())(batch) == batch.lengths.sum()
    gc.collect()


def test_orders_are_uniform() -> None:
    """Each order of four pairs, one a row, comes up as often as chance allows (χ², 23 degrees, p > 0.001)."""
    tokens = np.ones(4, np.int32)
    orders = Counter(
        tuple(
            _native.plan_pairs(
                tokens, np.zeros(0, np.int32), shapes=[(4, 1, 0)], max_pairs_per_row=1, window=1, seed=7, epoch=epoch
            )[0].tolist()
        )
        for epoch in range(4800)
    )
    assert len(orders) == 24
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 49.7
    assert permutation(4, 7, 0, 0) != permutation(4, 7, 1, 0)
