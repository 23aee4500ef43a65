"""The native core against a slow, obvious Python version, byte for byte; its memory; its threads."""

import gc
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_pairs import MASK, permutation

from fastpref.data import _native

NO_LENGTHS = np.zeros(0, np.int32)


def plan(shape_of: list[int], batch_size: int, seed: int, epoch: int) -> tuple[list[list[int]], list[int]]:
    records = len(shape_of)
    first = -(-epoch * records // batch_size) * batch_size
    last = -(-(epoch + 1) * records // batch_size) * batch_size
    stream = [permutation(records, seed, place // records, 0)[place % records] for place in range(first, last)]
    stream.sort(key=lambda row: shape_of[row])
    batches = [stream[at : at + batch_size] for at in range(0, len(stream), batch_size)]
    batches = [batches[at] for at in permutation(len(batches), seed, epoch, 1)]
    return batches, [max(shape_of[row] for row in batch) for batch in batches]


def column(rows: list[list[int]], **options: Any) -> _native.Column:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return _native.Column(np.asarray(list(itertools.chain(*rows)), np.int32), offsets, **options)


shape_lists = st.lists(st.integers(0, 3), min_size=1, max_size=40)
seeds = st.integers(0, MASK)
SEEDED = settings(derandomize=True, deadline=None)


@SEEDED
@given(shape_of=shape_lists, batch_size=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 5) | st.integers(0, 2**50))
def test_plan_equals_the_python_version(shape_of: list[int], batch_size: int, seed: int, epoch: int) -> None:
    rows, shapes = _native.plan_epoch(
        np.asarray(shape_of, np.int32), num_shapes=4, batch_size=batch_size, seed=seed, epoch=epoch
    )
    expected_rows, expected_shapes = plan(shape_of, batch_size, seed, epoch)
    assert rows.tolist() == expected_rows
    assert shapes.tolist() == expected_shapes
    assert rows.shape == (len(expected_rows), batch_size)


@SEEDED
@given(shape_of=shape_lists, batch_size=st.integers(1, 50), seed=seeds, epochs=st.integers(1, 6))
def test_plans_conserve_records(shape_of: list[int], batch_size: int, seed: int, epochs: int) -> None:
    plans = [
        _native.plan_epoch(np.asarray(shape_of, np.int32), num_shapes=4, batch_size=batch_size, seed=seed, epoch=epoch)
        for epoch in range(epochs)
    ]
    handed_out = np.concatenate([rows.ravel() for rows, _ in plans])
    counts = np.bincount(handed_out, minlength=len(shape_of))
    ahead = len(handed_out) - epochs * len(shape_of)
    assert 0 <= ahead < batch_size
    assert counts.min() >= epochs
    if ahead <= len(shape_of):
        assert counts.max() <= epochs + 1


def test_plan_is_pinned() -> None:
    """A change of these numbers is a change of everyone's order: it needs a new plan version."""
    shape_of = np.asarray([0, 1, 2, 0, 1, 2, 0], np.int32)
    rows, shapes = _native.plan_epoch(shape_of, num_shapes=3, batch_size=2, seed=42, epoch=3)
    assert (rows.tolist(), shapes.tolist()) == plan(shape_of.tolist(), 2, 42, 3)
    assert rows.tolist() == [[6, 3], [5, 2], [0, 1]]
    assert shapes.tolist() == [0, 2, 1]


def test_plan_order_is_uniform() -> None:
    """Every one of the 24 orders of four records comes up as often as chance allows (χ², 23 degrees, p > 0.001)."""
    orders = [
        tuple(_native.plan_epoch(np.zeros(4, np.int32), num_shapes=1, batch_size=4, seed=7, epoch=epoch)[0][0])
        for epoch in range(4800)
    ]
    counts = np.unique(np.asarray(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


def padded(lengths: list[tuple[int, int]], shapes: list[tuple[int, int]], completions: int) -> int:
    """Tokens when each record goes to the first shape that holds it."""
    return sum(
        next(s + completions * t for s, t in shapes if prompt <= s and completion <= t)
        for prompt, completion in lengths
    )


@SEEDED
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12)), min_size=1, max_size=12),
    completions=st.integers(0, 2),
    max_shapes=st.integers(1, 3),
    multiple=st.sampled_from([4, 8]),
)
def test_chosen_shapes_have_the_fewest_padded_tokens(
    lengths: list[tuple[int, int]], completions: int, max_shapes: int, multiple: int
) -> None:
    lengths = [(prompt, completion if completions else 0) for prompt, completion in lengths]
    prompts, responses = np.asarray(lengths, np.int32).T.copy()
    chosen = _native.choose_shapes(
        prompts,
        responses if completions else NO_LENGTHS,
        completions=completions,
        max_shapes=max_shapes,
        multiple=multiple,
        max_prompt=20,
        max_completion=12,
    )
    sides = [
        sorted({min(-(-length // multiple) * multiple, limit) for length in side})
        for side, limit in ((prompts.tolist(), 20), (responses.tolist(), 12))
    ]
    grid = list(itertools.product(*sides))
    best: dict[int, int] = {}
    for count in range(1, max_shapes + 1):
        for chain in itertools.combinations(grid, count):
            if chain[-1] == grid[-1] and all(a[1] <= b[1] for a, b in itertools.pairwise(chain)):
                cost = padded(lengths, list(chain), completions)
                best[cost] = min(best.get(cost, count), count)
    assert chosen[-1] == grid[-1]
    assert padded(lengths, chosen, completions) == min(best)
    assert len(chosen) == best[min(best)]


def test_many_lengths_are_tried_at_their_quantiles() -> None:
    lengths = np.arange(1, 101, dtype=np.int32)
    quantiles = {int(lengths[-(-100 * i // 32) - 1]) for i in range(1, 33)}
    expected = min((padded([(n, 0) for n in range(1, 101)], [(q, 0), (100, 0)], 0), q) for q in quantiles if q < 100)[1]
    chosen = _native.choose_shapes(
        lengths, NO_LENGTHS, completions=0, max_shapes=2, multiple=1, max_prompt=100, max_completion=0
    )
    assert chosen == [(expected, 0), (100, 0)]


@SEEDED
@given(lengths=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 9)), min_size=1, max_size=20))
def test_assigned_shape_is_the_first_that_holds_the_record(lengths: list[tuple[int, int]]) -> None:
    shapes = [(4, 2), (8, 2), (8, 6), (16, 9)]
    prompts, responses = np.asarray(lengths, np.int32).T.copy()
    assigned = _native.assign_shapes(prompts, responses, shapes)
    assert assigned.tolist() == [
        next(i for i, (s, t) in enumerate(shapes) if prompt <= s and response <= t) for prompt, response in lengths
    ]


@SEEDED
@given(
    columns=st.integers(1, 5).flatmap(
        lambda records: st.lists(
            st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), min_size=records, max_size=records),
            min_size=1,
            max_size=3,
        )
    ),
    data=st.data(),
)
def test_gather_equals_the_python_version(columns: list[list[list[int]]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(columns[0]) - 1), max_size=12))
    tokens, lengths = _native.gather([column(part) for part in columns], np.asarray(rows, np.int64), 9)
    expected = [[part[row] + [0] * (9 - len(part[row])) for part in columns] for row in rows]
    assert tokens.shape == (len(rows), len(columns), 9)
    assert tokens.tolist() == expected
    assert lengths.tolist() == [[len(part[row]) for part in columns] for row in rows]
    assert tokens.dtype == lengths.dtype == np.int32


def test_columns_may_start_and_end_within_their_values() -> None:
    part = _native.Column(np.asarray([-1, 5, 6, 7, -1], np.int32), np.asarray([1, 3, 4]))
    assert len(part) == 2
    assert part.lengths().tolist() == [2, 1]
    assert _native.gather([part], np.asarray([1, 0]), 2)[0].tolist() == [[[7, 0]], [[5, 6]]]


@pytest.mark.parametrize("count", [1, 3, 16, 1000])
def test_arrays_are_aligned_read_only_and_own_their_memory(count: int) -> None:
    part = column([list(range(7))] * count)
    rows = np.arange(count)
    arrays: list[np.ndarray] = [
        *_native.gather([part, part], rows, 7),
        part.lengths(),
        _native.take(np.linspace(0, 1, count, dtype=np.float32), rows),
        *_native.plan_epoch(np.zeros(count, np.int32), num_shapes=1, batch_size=1, seed=0, epoch=0),
    ]
    for array in arrays:
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)
    before = [array.copy() for array in arrays]
    del part
    gc.collect()
    # Memory freed too early would be handed to these.
    reused = [np.full(array.size, -7, array.dtype) for array in arrays for _ in range(20)]
    assert len(reused) == 20 * len(arrays)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_column_keeps_its_values_alive_and_its_offsets_to_itself() -> None:
    values, offsets = np.arange(1000, dtype=np.int32), np.asarray([0, 1000])
    part = _native.Column(values, offsets)
    offsets[:] = [-(2**62), 2**62]
    del values
    gc.collect()
    reused = [np.full(1000, -7, np.int32) for _ in range(50)]
    assert _native.gather([part], np.asarray([0]), 1000)[0].ravel().tolist() == list(range(1000))
    assert len(reused) == 50


def test_the_interpreter_runs_on_while_the_core_works() -> None:
    """With a switch interval of minutes a thread gets the interpreter only when another gives it up."""
    shape_of = np.zeros(1_000_000, np.int32)

    def interleaved() -> bool:
        events: list[str] = []
        started = threading.Event()

        def work() -> None:
            events.append("before")
            started.set()
            _native.plan_epoch(shape_of, num_shapes=1, batch_size=1, seed=0, epoch=0)
            events.append("after")

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        events.append("meanwhile")
        thread.join()
        return events == ["before", "meanwhile", "after"]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        # A busy machine may not schedule the main thread in time, but a core that kept the lock could never let it in.
        assert any(interleaved() for _ in range(20))
    finally:
        sys.setswitchinterval(interval)


def test_threads_share_columns() -> None:
    part = column([[row] * (row % 50) for row in range(2000)])
    rows = np.random.default_rng(0).permutation(2000)
    expected = _native.gather([part], rows, 50)[0]
    with ThreadPoolExecutor(4) as pool:
        for tokens, _ in pool.map(lambda _: _native.gather([part], rows, 50), range(16)):
            np.testing.assert_array_equal(tokens, expected)
