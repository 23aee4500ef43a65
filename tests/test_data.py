"""Batchers: conservation, exact resume, refusal of wrong states, memory that JAX takes as it is."""

import gc
import itertools
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import CompletionBatcher, PaddedPairBatcher, PromptBatcher, Ragged
from fastpref.data.batches import CompletionBatch, PromptBatch, token_mask
from fastpref.method.errors import DataError

SEEDED = settings(derandomize=True, deadline=None, max_examples=50)
ROWS = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=30)


def rows_of(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 100, random.integers(1, longest + 1)).tolist() for _ in range(count)]


def prompts(count: int = 23, **options: Any) -> PromptBatcher:
    return PromptBatcher(rows_of(count, 40), **({"batch_size": 5, "max_tokens": 40} | options))


def pairs(count: int = 23, **options: Any) -> PaddedPairBatcher:
    prompt, chosen, rejected = (rows_of(count, longest, seed) for longest, seed in ((40, 0), (20, 1), (20, 2)))
    limits = {"batch_size": 5, "max_prompt_tokens": 40, "max_completion_tokens": 20}
    return PaddedPairBatcher(prompt, chosen, rejected, np.linspace(0, 1, count), **(limits | options))


def same(left: PromptBatch | CompletionBatch, right: PromptBatch | CompletionBatch) -> bool:
    return all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in type(left).__slots__ if name != "mask"
    )


def handed_out(batch: PromptBatch, rows: list[list[int]]) -> None:
    """The batch holds exactly the rows that its ids name, and zeros past them."""
    for tokens, length, name in zip(batch.tokens, batch.lengths, batch.ids, strict=True):
        assert tokens[:length].tolist() == rows[name]
        assert not tokens[length:].any()


@pytest.mark.parametrize("kind", [np.asarray, jax.numpy.asarray])
def test_real_tokens_are_the_first_of_a_row(kind: Any) -> None:
    lengths = np.array([[0, 2], [3, 1]], np.int32)
    mask = token_mask(kind(lengths), 3)
    assert isinstance(mask, type(kind(lengths)))
    np.testing.assert_array_equal(mask[0], [[0, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(token_mask(kind(lengths[1]), 3), [[1, 1, 1], [1, 0, 0]])


@SEEDED
@given(rows=ROWS, batch_size=st.integers(1, 12), seed=st.integers(0, 2**64 - 1), epochs=st.integers(1, 4))
def test_every_epoch_hands_out_every_prompt_once(
    rows: list[list[int]], batch_size: int, seed: int, epochs: int
) -> None:
    batcher = PromptBatcher(rows, batch_size=batch_size, max_tokens=40, seed=seed)
    counts: Counter[int] = Counter()
    while batcher.epoch < epochs:
        batch = next(batcher)
        assert batch.tokens.shape[0] == batch_size
        assert (batch.tokens.shape[1], 0) in batcher.shapes
        handed_out(batch, rows)
        counts.update(batch.ids.tolist())
    # Only places of the next epoch, fewer than a batch, may have been taken ahead; they are missing from it later.
    assert 0 <= counts.total() - epochs * len(rows) < batch_size
    assert min(counts[name] for name in range(len(rows))) >= epochs
    assert batcher.batches_done == sum(batcher.batches_in(epoch) for epoch in range(batcher.epoch))


def test_over_many_epochs_no_record_is_preferred() -> None:
    batcher = prompts(count=23)
    counts = Counter(name for batch in itertools.islice(batcher, 23) for name in batch.ids.tolist())
    assert counts == dict.fromkeys(range(23), 5)
    assert batcher.epoch == 5


@SEEDED
@given(seed=st.integers(0, 5))
def test_pairs_keep_their_sides_together(seed: int) -> None:
    columns = [rows_of(17, longest, part) for part, longest in enumerate((40, 20, 20))]
    limits: dict[str, Any] = {"batch_size": 4, "max_prompt_tokens": 40, "max_completion_tokens": 20}
    batcher = PaddedPairBatcher(columns[0], columns[1], columns[2], np.linspace(0, 1, 17), **limits, seed=seed)
    for batch in itertools.islice(batcher, 9):
        assert (batch.prompt_tokens.shape[1], batch.completion_tokens.shape[2]) in batcher.shapes
        for i, name in enumerate(batch.ids):
            assert batch.prompt_tokens[i, : batch.prompt_lengths[i]].tolist() == columns[0][name]
            for k in (0, 1):
                length = batch.completion_lengths[i, k]
                assert batch.completion_tokens[i, k, :length].tolist() == columns[1 + k][name]
                assert not batch.completion_tokens[i, k, length:].any()
            assert batch.preference[i] == np.float32(name / 16)


def test_supervised_examples_are_pairs_with_one_side() -> None:
    batcher = CompletionBatcher(
        rows_of(10, 8), rows_of(10, 6, 1), batch_size=4, max_prompt_tokens=8, max_completion_tokens=6
    )
    batch = next(batcher)
    assert batch.completion_tokens.shape[:2] == (4, 1)
    assert batch.preference.tolist() == [1.0] * 4


def test_shapes_are_few_and_fit() -> None:
    batcher = prompts(count=200, max_shapes=3)
    assert 1 <= len(batcher.shapes) <= 3
    seen = {batch.tokens.shape[1] for batch in itertools.islice(batcher, 200)}
    assert seen == {width for width, _ in batcher.shapes}
    assert all(width % 8 == 0 for width in seen)


def test_sides_stay_within_the_limit() -> None:
    batcher = PromptBatcher([[1] * 13], batch_size=1, max_tokens=13)
    assert batcher.shapes == ((13, 0),)


def test_given_shapes_are_used() -> None:
    assert {batch.tokens.shape[1] for batch in itertools.islice(prompts(widths=(10, 64)), 23)} == {10, 64}
    assert pairs(shapes=[(40, 20)]).shapes == ((40, 20),)


def test_the_same_arguments_give_the_same_batches_and_others_do_not() -> None:
    first = list(itertools.islice(prompts(seed=3), 12))
    again = list(itertools.islice(prompts(seed=3), 12))
    assert all(map(same, first, again))
    other = list(itertools.islice(prompts(seed=4), 12))
    assert not all(map(same, first, other))
    ids = [np.concatenate([batch.ids for batch in first[at : at + 5]]).tolist() for at in (0, 5)]
    assert ids[0] != ids[1]


def test_any_rows_of_the_same_tokens_will_do() -> None:
    rows = rows_of(9, 12)
    options: dict[str, Any] = {"batch_size": 3, "max_tokens": 12}
    padded = Ragged.from_rows([[7], *rows, [8]])
    kinds = (
        Ragged.from_rows(rows),
        [np.asarray(row) for row in rows],
        tuple(map(tuple, rows)),
        Ragged(padded.values, padded.offsets[1:-1].copy()),
    )
    expected = PromptBatcher(rows, **options)
    state = expected.state()
    batches = list(itertools.islice(expected, 6))
    for kind in kinds:
        batcher = PromptBatcher(kind, **options)
        batcher.restore(state)
        assert all(map(same, batches, batcher))


@pytest.mark.parametrize("make", [prompts, pairs])
@pytest.mark.parametrize("count", [23, 20, 3])
def test_resume_is_exact_at_every_position(make: Any, count: int) -> None:
    batcher = make(count)
    states, epochs, batches = [], [], []
    for _ in range(15):
        states.append(batcher.state())
        assert batcher.state() == states[-1]
        epochs.append(batcher.epoch)
        batches.append(next(batcher))
    used = make(count)
    for at in (*range(15), 7, 0, 14):
        for fresh in (make(count), used):
            fresh.restore(states[at])
            assert (fresh.epoch, fresh.batches_done, fresh.state()) == (epochs[at], at, states[at])
            assert all(map(same, batches[at:], fresh))
            assert fresh.batches_done >= 15
    assert epochs[-1] >= 2


def test_state_is_small_and_far_positions_are_reached_at_once() -> None:
    batcher = prompts()
    assert len(batcher.state()) <= 400
    batcher.batches_done = 10**15
    far = batcher.state()
    batch = next(batcher)
    other = prompts()
    other.restore(far)
    assert same(next(other), batch)
    assert other.epoch == 5 * (10**15 + 1) // 23


WRONG_STATES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 9}, "seed of this batcher, 9, but received 0"),
    ({"batch_size": 6}, "batch_size of this batcher, 6, but received 5"),
    ({"count": 24}, "number of records of this batcher, 24, but received 23"),
    ({"ids": list(range(1, 24))}, "data fingerprint of this batcher"),
    ({"shapes": [(40, 20)]}, r"set of shapes of this batcher, \[\[40, 20\]\], but received"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_STATES)
def test_the_state_of_another_batcher_is_refused(options: dict[str, Any], message: str) -> None:
    batcher = pairs(**options)
    next(batcher)
    before = batcher.state()
    with pytest.raises(DataError, match=f"state must have the {message}"):
        batcher.restore(pairs().state())
    assert batcher.state() == before


def test_one_changed_token_or_label_is_other_data() -> None:
    rows = rows_of(9, 12)
    options: dict[str, Any] = {"batch_size": 3, "max_prompt_tokens": 12, "max_completion_tokens": 12}
    state = PaddedPairBatcher(rows, rows[::-1], rows, [0.5] * 9, **options).state()
    changed = [[*rows[0][:-1], rows[0][-1] ^ 1], *rows[1:]]
    for other in (
        PaddedPairBatcher(changed, rows[::-1], rows, [0.5] * 9, **options),
        PaddedPairBatcher(rows, rows[::-1], changed, [0.5] * 9, **options),
        PaddedPairBatcher(rows, rows, rows[::-1], [0.5] * 9, **options),
        PaddedPairBatcher(rows, rows[::-1], rows, [*[0.5] * 8, 0.75], **options),
    ):
        with pytest.raises(DataError, match="state must have the data fingerprint"):
            other.restore(state)


def test_the_same_tokens_cut_elsewhere_are_other_data() -> None:
    options: dict[str, Any] = {"batch_size": 1, "max_tokens": 8, "widths": (8,)}
    with pytest.raises(DataError, match="state must have the data fingerprint"):
        PromptBatcher([[1, 2], [3]], **options).restore(PromptBatcher([[1], [2, 3]], **options).state())


def test_the_state_of_another_kind_and_damaged_bytes_are_refused() -> None:
    with pytest.raises(DataError, match="state must have the number of completions of this batcher, 2, but received 0"):
        pairs().restore(prompts().state())
    state = prompts().state()
    for damaged in (b"", state[:-1], state[:40], state[:20] + b"\xff" + state[21:]):
        with pytest.raises(DataError, match=r"state must be the bytes of state\(\)"):
            prompts().restore(damaged)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("make", [prompts, pairs])
def test_in_order_hands_out_each_record_once(make: Any, pad: bool) -> None:
    batcher = make(23)
    expected = list(itertools.islice(make(23), 4))
    seen = []
    for at, batch in enumerate(batcher.in_order(pad=pad)):
        seen += batch.ids.tolist()
        if at < 4:
            assert same(next(batcher), expected[at])
    assert seen == [*range(23), *[-1, -1] * pad]
    assert len(batch.ids) == (5 if pad else 3)


def test_in_order_takes_the_smallest_shape_and_pads_with_real_rows() -> None:
    rows = [[1] * 4, [2] * 4, [3] * 16, [4] * 2, [5] * 3]
    batches = list(PromptBatcher(rows, batch_size=2, max_tokens=16, widths=(4, 16)).in_order(pad=True))
    assert [batch.tokens.shape for batch in batches] == [(2, 4), (2, 16), (2, 4)]
    assert batches[-1].tokens.tolist() == [[5, 5, 5, 0]] * 2
    assert batches[-1].ids.tolist() == [4, -1]


def test_ids_name_records_by_the_source() -> None:
    batcher = PromptBatcher([[1], [2], [3]], batch_size=3, max_tokens=4, ids=[10, 20, 30])
    batch = next(batcher)
    assert sorted(batch.ids.tolist()) == [10, 20, 30]
    assert (batch.tokens[:, 0] * 10).tolist() == batch.ids.tolist()
    assert batch.ids.dtype == np.int64


def test_jax_takes_batches_without_a_copy() -> None:
    for batch in (next(prompts(64, batch_size=16)), next(pairs(64, batch_size=16))):
        for name in type(batch).__slots__:
            array = getattr(batch, name)
            assert not array.flags.writeable
            assert array.ctypes.data % 64 == 0
            if array.dtype != np.int64:
                assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_batches_outlive_their_batcher() -> None:
    batcher = pairs(64)
    batch = next(batcher)
    copies = {name: getattr(batch, name).copy() for name in type(batch).__slots__}
    on_device = jax.device_put(batch.completion_tokens)
    batcher.close()
    del batcher
    gc.collect()
    reused = [np.full(copy.size, -7, copy.dtype) for copy in copies.values() for _ in range(50)]
    assert len(reused) == 300
    for name, copy in copies.items():
        np.testing.assert_array_equal(getattr(batch, name), copy)
    del batch
    gc.collect()
    reused = [np.full(copies["completion_tokens"].size, -7, np.int32) for _ in range(50)]
    np.testing.assert_array_equal(np.asarray(on_device), copies["completion_tokens"])


def test_a_closed_batcher_says_so() -> None:
    with prompts() as batcher:
        next(batcher)
        ordered = batcher.in_order()
        next(ordered)
    state = batcher.state()
    for use in (lambda: next(batcher), lambda: next(ordered), lambda: batcher.restore(state)):
        with pytest.raises(ValueError, match="must be open to hand out batches, but received a closed one"):
            use()
    batcher.close()
    assert batcher.batches_done == 1


PAIR_LIMITS: dict[str, Any] = {"batch_size": 1, "max_prompt_tokens": 4, "max_completion_tokens": 3}
WRONG: list[tuple[Any, str]] = [
    (lambda: prompts(0), "there must be at least one record, but received none. The drop report says"),
    (lambda: PromptBatcher([[1], []], batch_size=1, max_tokens=4),
     r"prompts must have 1 to 4 tokens \(max_tokens\), but received 0 at record 1"),
    (lambda: PromptBatcher([[1], [1] * 5], batch_size=1, max_tokens=4),
     r"prompts must have 1 to 4 tokens \(max_tokens\), but received 5 at record 1. Drop or truncate"),
    (lambda: PaddedPairBatcher([[1] * 5], [[1]], [[2]], **PAIR_LIMITS),
     r"prompts must have 1 to 4 tokens .max_prompt_tokens."),
    (lambda: PaddedPairBatcher([[1]], [[1]], [[2] * 4], **PAIR_LIMITS),
     r"rejected must have 1 to 3 tokens \(max_completion_tokens\), but received 4 at record 0"),
    (lambda: PaddedPairBatcher([[1]], [[1]], [[2], [3]], **PAIR_LIMITS),
     r"rejected must have one entry for each of the 1 prompts, but received 2"),
    (lambda: PaddedPairBatcher([[1]], [[1]], [[2]], [1.5], **PAIR_LIMITS),
     r"preference must be in \[0, 1\], but received 1.5 at record 0"),
    (lambda: PaddedPairBatcher([[1]], [[1]], [[2]], [float("nan")], **PAIR_LIMITS), r"preference must be .*nan"),
    (lambda: PaddedPairBatcher([[1]], [[1]], [[2]], [0.5, 0.5], **PAIR_LIMITS),
     r"preference must have one number \(float32\) for each of the 1 prompts, but received float64 of shape \(2,\)"),
    (lambda: PromptBatcher([[1]], batch_size=1, max_tokens=4, ids=[0.5]), r"ids must have one number \(int64\)"),
    (lambda: PromptBatcher([[1], [9]], batch_size=1, max_tokens=4, vocab_size=9),
     r"prompts: token ids must be in \[0, 9\), but received 9 at record 1. Repair the data or use the tokenizer"),
    (lambda: PromptBatcher([[-1]], batch_size=1, max_tokens=4),
     r"prompts: token ids must be in \[0, 2147483648\), but received -1"),
    (lambda: PromptBatcher([[2**31]], batch_size=1, max_tokens=4), r"token ids must fit into 32 bits, but received "
        r"2147483648"),
    (lambda: PromptBatcher(Ragged.from_rows([np.asarray([0.5])]), batch_size=1, max_tokens=4),
     r"token ids must be whole numbers, but received float64. Tokenize text first"),
    (lambda: Ragged.from_rows([np.asarray(["ab"])]), r"token ids must be whole numbers, but received <U2"),
    (lambda: prompts(batch_size=0), r"batch_size must be an integer in \[1, 2147483647\], but received 0"),
    (lambda: prompts(seed=-1), r"seed must be an integer in \[0, 18446744073709551615\], but received -1"),
    (lambda: prompts(max_shapes=0), r"max_shapes must be an integer in \[1, 32\], but received 0"),
    (lambda: prompts(widths=(64, 32)), r"shapes must be 1 to 32 pairs .* none smaller than the one before"),
    (lambda: prompts(widths=(8,)), r"the last of shapes must hold every record, but received \(8, 0\) and record \d+ "
        r"with"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=range(len(WRONG)))
def test_unusable_data_and_settings_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_ragged_rows_are_read_back() -> None:
    rows = [[1, 2], [], [3]]
    ragged = Ragged.from_rows(rows)
    assert [ragged[at].tolist() for at in range(len(ragged))] == rows
    assert ragged[-1].tolist() == [3]
    assert len(Ragged.from_rows([])) == 0
    with pytest.raises(IndexError, match=r"row must be in \[-3, 3\), but received 3"):
        ragged[3]
