"""The plan of padded batches: few shapes that waste little, and an order that is a pure function of seed and epoch."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int32, Int64

from fastpref.method.errors import ConfigError, DataError

Shape = tuple[int, int]
"""Padded prompt and completion tokens of a batch; the second is 0 where there are no completions."""

MAX_SHAPES = 32
SIDE_MULTIPLE = 8
"""Chosen sides are multiples of it, except where the limit is not."""
SIDE_CANDIDATES = 32
"""Of more distinct lengths, so many quantiles are tried."""
PLAN_VERSION = 2
"""Counts changes of the order: the state of another is refused."""

_RECORDS, _BATCHES = 0, 1


def choose_shapes(
    prompts: Int32[np.ndarray, " N"],
    completions: Int32[np.ndarray, " N"],
    *,
    group: int,
    max_shapes: int,
    limit: Shape,
    multiple: int = SIDE_MULTIPLE,
) -> tuple[Shape, ...]:
    """The growing shapes with the fewest padded tokens, by dynamic programming over chains of candidates.

    Args:
      prompts: tokens of each prompt.
      completions: tokens of the longest completion of each prompt; zeros where there are none.
      group: K, completions of a prompt; 0 for prompts alone.
      max_shapes: at most so many, 1 to 32.
      limit: longest prompt and completion that are allowed; no side is larger.
      multiple: divides the sides, but for the limit.
    """
    rows, columns = _sides(prompts, limit[0], multiple), _sides(completions, limit[1], multiple)
    held = np.zeros((len(rows), len(columns)), np.int64)
    np.add.at(held, (np.searchsorted(rows, prompts), np.searchsorted(columns, completions)), 1)
    records = held.cumsum(0).cumsum(1).ravel()
    row, column = np.divmod(np.arange(records.size), len(columns))
    cost = rows[row] + group * columns[column]
    smaller = (row[:, None] >= row) & (column[:, None] >= column) & ~np.eye(records.size, dtype=bool)
    added = (records[:, None] - records) * cost[:, None]
    never = np.iinfo(np.int64).max // 4
    best = records * cost
    fewest, chain = best[-1], [records.size - 1]
    links: list[np.ndarray] = []
    for _ in range(1, max_shapes):
        totals = np.where(smaller, np.minimum(best, never) + added, 2 * never)
        links.append(totals.argmin(1))
        best = totals.min(1)
        if best[-1] < fewest:
            fewest, chain = best[-1], [records.size - 1]
            for link in reversed(links):
                chain.append(int(link[chain[-1]]))
    return tuple((int(rows[row[at]]), int(columns[column[at]])) for at in reversed(chain))


def _sides(lengths: Int32[np.ndarray, " N"], limit: int, multiple: int) -> Int64[np.ndarray, " M"]:
    """Side lengths worth trying, growing; the last holds every length."""
    sides = np.sort(np.minimum(-(-lengths.astype(np.int64) // multiple) * multiple, limit))
    distinct = np.unique(sides)
    if len(distinct) <= SIDE_CANDIDATES:
        return distinct
    return np.unique(sides[-(-len(sides) * np.arange(1, SIDE_CANDIDATES + 1) // SIDE_CANDIDATES) - 1])


def check_shapes(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes as tuples of ints, from small to large.

    Raises:
      ConfigError: they are not 1 to 32 pairs that grow.
    """
    pairs = [tuple(shape) if isinstance(shape, Sequence) else (shape,) for shape in shapes]
    growing = all(
        len(small) == len(large) == 2 and small[0] <= large[0] and small[1] <= large[1] and small != large
        for small, large in pairwise(pairs)
    )
    whole = all(len(pair) == 2 and all(isinstance(side, int | np.integer) for side in pair) for pair in pairs)
    if not whole or not growing or not 1 <= len(pairs) <= MAX_SHAPES or pairs[0][0] < 1 or pairs[0][1] < 0:
        raise ConfigError(
            f"shapes must be 1 to {MAX_SHAPES} pairs (prompt, completion) of lengths, none smaller than the one before "
            f"on either side and no two equal, but received {shapes!r}. Sort them, or leave them out."
        )
    return tuple((int(prompt), int(completion)) for prompt, completion in pairs)


def assign_shapes(
    prompts: Int32[np.ndarray, " N"], completions: Int32[np.ndarray, " N"], shapes: Sequence[Shape]
) -> Int64[np.ndarray, " N"]:
    """The first of the growing shapes that holds each record.

    Raises:
      DataError: the last holds not every record.
    """
    sides = np.asarray(shapes)
    assigned = np.maximum(np.searchsorted(sides[:, 0], prompts), np.searchsorted(sides[:, 1], completions))
    if (assigned == len(shapes)).any():
        at = int((assigned == len(shapes)).argmax())
        raise DataError(
            f"the last of shapes must hold every record, but received {tuple(shapes[-1])} and record {at} with "
            f"{prompts[at]} prompt and {completions[at]} completion tokens. Raise it, or drop or truncate such records."
        )
    return assigned


def permutation(size: int, *, seed: int, turn: int, purpose: int) -> Int64[np.ndarray, " N"]:
    """A permutation of [0, size) from a counter: the same on every machine, since Philox's raw words are."""
    words = np.random.Philox(key=seed + (purpose << 64), counter=turn << 128).random_raw(size)
    return words.argsort(kind="stable")


def plan_epoch(
    shape_of: Int64[np.ndarray, " N"], *, batch_size: int, seed: int, epoch: int
) -> tuple[Int64[np.ndarray, "M P"], Int64[np.ndarray, " M"]]:
    """Records and shape of the batches of an epoch.

    The stream of records is a permutation of all N for each epoch, one after the other. The batches of an epoch finish
    its part of the stream, and the last is filled up from the head of the next. Within an epoch records of one shape
    share a batch, and batches are permuted.
    """
    records = len(shape_of)
    first = -(-epoch * records // batch_size) * batch_size
    last = -(-(epoch + 1) * records // batch_size) * batch_size
    turns = range(first // records, -(-last // records))
    orders = [permutation(records, seed=seed, turn=turn, purpose=_RECORDS) for turn in turns]
    stream = np.concatenate([*orders, np.zeros(0, np.int64)])[first - turns.start * records :][: last - first]
    batches = stream[shape_of[stream].argsort(kind="stable")].reshape(-1, batch_size)
    batches = batches[permutation(len(batches), seed=seed, turn=epoch, purpose=_BATCHES)]
    return batches, shape_of[batches].max(1) if len(batches) else np.zeros(0, np.int64)
