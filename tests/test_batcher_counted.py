"""Batches of exactly so many pairs: against a slow, obvious batcher, byte for byte; packing decides only the rows."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_pairs import SlowBatcher, SlowPair, native_plan, part_of, plan_counted, random_pairs, same
from test_batcher_pairs import LAYOUTS, check_batch, in_layout
from test_batcher_pairs import batcher as filled

from fastpref.data import PairBatcher, _native, hashes, row_counts, state
from fastpref.data.row_shapes import batch_shapes
from fastpref.method.errors import ConfigError, DataError

SEEDED = settings(derandomize=True, deadline=None)


def batcher(pairs: list[SlowPair], **options: Any) -> PairBatcher:
    return filled(pairs, **({"rows": None, "batch_size": 5} | options))


def slow(pairs: list[SlowPair], native: PairBatcher, **options: Any) -> SlowBatcher:
    start = 3 if options.get("layout") == "encoder-decoder" else 0
    batch = options.pop("batch", 5)
    return SlowBatcher(pairs, native.shapes, start=start, batch=batch, **({"most": min(32, batch)} | options))


@SEEDED
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=60),
    encoder=st.booleans(),
    batch=st.integers(1, 70),
    most=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 3) | st.integers(0, 2**62),
)
def test_plan_equals_the_python_version(
    sizes: list[tuple[int, int]], encoder: bool, batch: int, most: int, seed: int, epoch: int
) -> None:
    sizes = [(tokens, prompt * encoder) for tokens, prompt in sizes]
    shapes = [(rows, 31, 13 * encoder) for rows in sorted({max(batch // 4, 1), batch + 1})]
    options = {"batch_pairs": batch, "max_pairs_per_row": most, "window": 1, "seed": seed, "epoch": epoch}
    assert native_plan(sizes, shapes, **options) == plan_counted(sizes, shapes, most, batch, seed, epoch)


def test_a_plan_is_pinned() -> None:
    """A change of these numbers is a change of everyone's order: it needs a new plan version."""
    tokens = np.asarray([3, 9, 4, 4, 7, 1, 6, 2, 5, 5], np.int32)
    arguments: dict[str, Any] = {"max_pairs_per_row": 3, "window": 1, "seed": 42, "epoch": 3}
    members, ends, batches, _ = _native.plan_pairs(
        tokens, np.zeros(0, np.int32), shapes=[(2, 10, 0), (4, 10, 0)], batch_pairs=4, **arguments
    )
    assert (members.tolist(), ends.tolist(), batches.tolist()) == PINNED


PINNED = ([1, 4, 0, 3, 8, 2, 5, 7], [1, 3, 4, 7, 8], [[0, 3, 1], [3, 2, 0]])


@pytest.mark.parametrize("threads", range(1, 5))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_equal_the_python_version(layout: str, threads: int) -> None:
    pairs = random_pairs(23, (9, 9), seed=threads)
    for prefetch in (0, 1, 5):
        batch = 1 + (7 * threads + prefetch) % 9
        with batcher(pairs, batch_size=batch, threads=threads, prefetch=prefetch, **in_layout(layout)) as native:
            expected = slow(pairs, native, batch=batch, layout=layout)
            for epoch in range(3):
                batches = expected.epoch(epoch)
                assert native.batches_in(epoch) == len(batches)
                for made in batches:
                    assert native.epoch == epoch
                    assert same(next(native), made)


@settings(SEEDED, max_examples=40)
@given(
    count=st.integers(1, 40),
    longest=st.tuples(st.integers(1, 14), st.integers(1, 13)),
    batch=st.integers(1, 50),
    multiple=st.integers(1, 3),
    shapes=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_batch_has_its_pairs_and_every_epoch_its_records(
    count: int, longest: tuple[int, int], batch: int, multiple: int, shapes: int, seed: int
) -> None:
    """As `PromptBatcher`: full batches, and after each epoch every record was handed out once more."""
    pairs = random_pairs(count, longest, seed % 1000)
    options: dict[str, Any] = {"batch_size": batch, "multiple": multiple, "max_shapes": shapes, "seed": seed}
    with batcher(pairs, **options) as native:
        assert len([rows for rows, *_ in native.shapes if rows not in row_counts(batch, multiple)]) <= shapes
        assert native.shapes[-1][0] >= batch
        handed = 0
        seen: Counter[int] = Counter()
        for epoch in range(3):
            used = places = 0
            assert native.batches_in(epoch) == -(-(epoch + 1) * count // batch) - -(-epoch * count // batch)
            for made in itertools.islice(native, native.batches_in(epoch)):
                rows = len(made.tokens)
                assert made.where.sum() == batch
                assert rows % multiple == 0
                assert (rows, *made.tokens.shape[1:], made.prompt_tokens.shape[1]) in native.shapes
                check_batch(made)
                seen.update(made.ids[made.where].tolist())
                handed += batch
                used += int((made.pairs >= 0).sum())
                places += made.pairs.size
                assert native.epoch == handed // count
            assert (epoch + 1) * count <= handed < (epoch + 1) * count + batch
            assert set(seen) == {pair.id for pair in pairs}
            assert min(seen.values()) >= epoch + 1
            if places:
                assert native.padding(epoch) == pytest.approx(1 - used / places, abs=1e-12)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_each_batch(hosts: int) -> None:
    pairs = random_pairs(40, (9, 9))
    parts = [batcher(pairs, batch_size=7, multiple=4, host=host, hosts=hosts) for host in range(hosts)]
    expected = slow(pairs, parts[0], batch=7)
    for made in (*expected.epoch(0), *expected.epoch(1)):
        for host, part in enumerate(parts):
            assert same(next(part), part_of(made, host, hosts))
    assert len({part.state() for part in parts}) == 1
    for part in parts:
        part.close()


def test_a_state_continues_exactly_over_the_end_of_epochs() -> None:
    pairs = random_pairs(13, (9, 9))
    with batcher(pairs, prefetch=0) as native:
        states, batches = [], []
        for _ in range(9):
            states.append(native.state())
            batches.append(next(native))
    for at in range(8):
        with batcher(pairs, threads=1 + at % 3, prefetch=at % 4) as other:
            other.restore(states[at])
            assert other.state() == states[at]
            assert same(next(other), batches[at])
            assert same(next(other), batches[at + 1])


def test_more_pairs_than_records_go_on_exactly() -> None:
    """Most epochs have no batch of their own then."""
    pairs = random_pairs(3, (6, 6))
    for prefetch in (0, 2):
        with batcher(pairs, batch_size=10, prefetch=prefetch) as native, batcher(pairs, batch_size=10) as other:
            expected = slow(pairs, native, batch=10)
            for made in itertools.chain.from_iterable(expected.epoch(epoch) for epoch in range(12)):
                other.restore(native.state())
                assert same(next(other), made)
                assert same(next(native), made)
            assert native.epoch == 13


def test_the_state_of_another_batch_is_refused() -> None:
    pairs = random_pairs(30, (9, 9))
    with batcher(pairs) as native, batcher(pairs, batch_size=6) as more, filled(pairs) as rows:
        for other, message in ((more, "batch_size of this batcher, 6, but received 5"), (rows, "None, but received 5")):
            with pytest.raises(DataError, match=rf"state must have the .*{message}\. Restore with what it was"):
                other.restore(native.state())
        # Before there was a number of pairs, a state had none.
        content = hashes.unsealed(native.state())
        del content["identity"]["batch_size"]
        with pytest.raises(DataError, match=r"state must have the batch_size of this batcher, 5, but received None"):
            native.restore(state.encode(content["identity"], content["position"]))


def test_few_numbers_of_rows_are_chosen_from_the_first_epoch_and_later_ones_still_fit() -> None:
    pairs = random_pairs(200, (12, 12), seed=3)
    sizes = np.asarray([pair.size("shared") for pair in pairs], np.int32)
    options: dict[str, Any] = {"row_tokens": 40, "prompt_row_tokens": 0, "max_pairs_per_row": 16, "seed": 0}
    places = []
    for most in (1, 2, 4):
        shapes, total = batch_shapes(sizes, batch_size=16, max_shapes=most, multiple=1, **options)
        places.append(total)
        with batcher(pairs, batch_size=16, max_shapes=most) as native:
            assert native.shapes == shapes
            taken = {len(next(native).tokens) for _ in range(native.batches_in(0))}
            assert taken <= {rows for rows, *_ in shapes[:most]}
            for _ in range(60):
                assert next(native).where.sum() == 16
    assert places == sorted(places, reverse=True)
    assert places[0] > places[-1]


def test_a_number_of_pairs_or_of_rows_is_given() -> None:
    pairs = random_pairs(3, (4, 4))
    for options in ({"batch_size": None}, {"rows": 4}, {"tail": [(2, 80)]}):
        with pytest.raises(ConfigError, match=r"batch_size or rows must be given, one of them, and tail with rows"):
            batcher(pairs, **options)
    for size in (0, 65537):
        with pytest.raises(ConfigError, match=rf"batch_size must be in \[1, 65536\], but received {size}. Choose"):
            batcher(pairs, batch_size=size)
    with pytest.raises(ConfigError, match=r"max_shapes must be in \[1, 32\], but received 0. Choose"):
        batcher(pairs, max_shapes=0)
    with pytest.raises(ValueError, match=r"hosts must divide the rows of every shape, but received 3 hosts"):
        batcher(pairs, hosts=3)
    with pytest.raises(DataError, match=r"a row must hold every pair whole, .*\(overlong='drop'\), or enlarge row_tok"):
        batcher(pairs, row_tokens=3)


WRONG_SHAPES = [[(5, 8, 0), (4, 8, 0)], [(4, 8, 0), (5, 9, 0)], [(4, 8, 0)], [(5 + n, 8, 0) for n in range(65)]]


@pytest.mark.parametrize("shapes", WRONG_SHAPES)
def test_shapes_hold_any_batch(shapes: Any) -> None:
    rule = r"shapes must be 1 to 64 triples .*, rows growing to at least batch_pairs and places alike, .* but received"
    with pytest.raises(ValueError, match=rule):
        _native.plan_pairs(
            np.ones(2, np.int32), np.zeros(0, np.int32), shapes=shapes, batch_pairs=5, max_pairs_per_row=2, window=1,
            seed=0, epoch=0,
        )  # fmt: skip
