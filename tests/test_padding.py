"""The plan of padded batches: chosen shapes against all chains, and an order that is seeded, pinned and uniform."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data import padding
from fastpref.method.errors import ConfigError, DataError

Lengths = list[tuple[int, int]]


def padded(lengths: Lengths, shapes: list[tuple[int, int]], group: int) -> int:
    """Tokens when each record goes to the first shape that holds it."""
    return sum(
        next(s + group * t for s, t in shapes if prompt <= s and completion <= t) for prompt, completion in lengths
    )


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=12),
    group=st.integers(0, 2),
    max_shapes=st.integers(1, 3),
)
def test_chosen_shapes_have_the_fewest_padded_tokens(lengths: Lengths, group: int, max_shapes: int) -> None:
    lengths = [(prompt, completion if group else 0) for prompt, completion in lengths]
    prompts, completions = np.asarray(lengths, np.int32).T.copy()
    limit = (30, 20 if group else 0)
    chosen = list(padding.choose_shapes(prompts, completions, group=group, max_shapes=max_shapes, limit=limit))
    sides = [
        sorted({min(-(-length // 8) * 8, most) for length in side})
        for side, most in zip((prompts.tolist(), completions.tolist()), limit, strict=True)
    ]
    grid = list(itertools.product(*sides))
    best: dict[int, int] = {}
    for count in range(1, max_shapes + 1):
        for chain in itertools.combinations(grid, count):
            if chain[-1] == grid[-1] and all(a[1] <= b[1] for a, b in itertools.pairwise(chain)):
                cost = padded(lengths, list(chain), group)
                best[cost] = min(best.get(cost, count), count)
    assert chosen[-1] == grid[-1]
    assert padded(lengths, chosen, group) == min(best)
    assert len(chosen) == best[min(best)]


def test_many_lengths_are_tried_at_their_quantiles() -> None:
    lengths = np.arange(8, 808, 8, dtype=np.int32)
    quantiles = {int(lengths[-(-100 * i // 32) - 1]) for i in range(1, 33)}
    records = [(n, 0) for n in lengths.tolist()]
    expected = min((padded(records, [(q, 0), (800, 0)], 0), q) for q in quantiles if q < 800)[1]
    zeros = np.zeros(100, np.int32)
    chosen = padding.choose_shapes(lengths, zeros, group=0, max_shapes=2, limit=(800, 0))
    assert chosen == ((expected, 0), (800, 0))


@given(lengths=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 9)), min_size=1, max_size=20))
def test_a_record_goes_to_the_first_shape_that_holds_it(lengths: Lengths) -> None:
    shapes = [(4, 2), (8, 2), (8, 6), (16, 9)]
    prompts, completions = np.asarray(lengths, np.int32).T.copy()
    assert padding.assign_shapes(prompts, completions, shapes).tolist() == [
        next(i for i, (s, t) in enumerate(shapes) if prompt <= s and completion <= t) for prompt, completion in lengths
    ]


@given(
    shape_of=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**64 - 1),
    epochs=st.integers(1, 6),
)
def test_plans_conserve_records_and_keep_shapes_apart(
    shape_of: list[int], batch_size: int, seed: int, epochs: int
) -> None:
    of_record = np.asarray(shape_of, np.int64)
    plans = [padding.plan_epoch(of_record, batch_size=batch_size, seed=seed, epoch=epoch) for epoch in range(epochs)]
    for rows, shapes in plans:
        assert rows.shape == (len(shapes), batch_size)
        # At most one batch lies across each border of two shapes.
        assert sum(len(set(of_record[row])) - 1 for row in rows.tolist()) <= 3
        assert shapes.tolist() == [max(of_record[row]) for row in rows.tolist()]
    counts = np.bincount(np.concatenate([rows.ravel() for rows, _ in plans]), minlength=len(shape_of))
    ahead = counts.sum() - epochs * len(shape_of)
    assert 0 <= ahead < batch_size
    assert counts.min() >= epochs
    if ahead <= len(shape_of):
        assert counts.max() <= epochs + 1


def test_a_plan_is_pinned() -> None:
    """A change of these numbers is a change of everyone's order: it needs a new plan version."""
    rows, shapes = padding.plan_epoch(np.asarray([0, 1, 2, 0, 1, 2, 0]), batch_size=2, seed=42, epoch=3)
    assert (rows.tolist(), shapes.tolist()) == PINNED


def test_orders_are_uniform() -> None:
    """Each of the 24 orders of four records comes up as often as chance allows (χ², 23 degrees, p > 0.001)."""
    one = np.zeros(4, np.int64)
    orders = [tuple(padding.plan_epoch(one, batch_size=4, seed=7, epoch=epoch)[0][0].tolist()) for epoch in range(4800)]
    counts = np.unique(np.asarray(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


@pytest.mark.parametrize(
    "shapes", [[], [(4, 2), (8, 1)], [(4, 2), (4, 2)], [(0, 1)], [(4,)], [(4, 2.5)], [(1 + i, 0) for i in range(33)]]
)
def test_shapes_that_do_not_grow_are_refused(shapes: list[tuple[int, int]], unchecked: None) -> None:
    with pytest.raises(ConfigError, match=r"shapes must be 1 to 32 pairs .*, but received .* Sort them, or leave"):
        padding.check_shapes(shapes)


def test_a_record_that_fits_no_shape_is_named() -> None:
    with pytest.raises(DataError, match=r"received \(4, 4\) and record 0 with 3 prompt and 5 completion tokens"):
        padding.assign_shapes(np.asarray([3], np.int32), np.asarray([5], np.int32), [(4, 4)])


PINNED = ([[0, 4], [1, 2], [3, 6]], [1, 2, 0])
