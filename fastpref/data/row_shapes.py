"""Numbers of rows that packed batches have: few, so that few programs are compiled, and enough for every batch."""

import numpy as np
from jaxtyping import Int32

from fastpref.data import _native, padding
from fastpref.method.errors import require

RowShape = tuple[int, int, int]
"""Rows of a batch, places of a row, and its places of the encoder's stream (0 without an encoder)."""


def row_counts(pairs: int, multiple: int = 1) -> tuple[int, ...]:
    """Numbers of rows that `pack_pairs` rounds up to: 1, 2, 3, 4, 6, 8, 12, ... times `multiple`, up to `pairs` rows.

    Args:
      pairs: most pairs of a step, at least 1: they fit into as many rows.
      multiple: rows that devices divide among them, at least 1.

    Returns:
      Growing numbers, none more than half as large again as the one before, from 3 rows on: as many programs at most.

    Raises:
      ValueError: an argument below 1.
    """
    for name, value in (("pairs", pairs), ("multiple", multiple)):
        if value < 1:
            raise ValueError(
                f"{name} must be at least 1, but received {value}. Give the largest number that a step may have."
            )
    units, last = [1], -(-pairs // multiple)
    while units[-1] < last:
        power = 1 << (units[-1].bit_length() - 1)
        units.append(units[-1] + max(power // 2, 1))
    return tuple(multiple * min(unit, last) for unit in units)


def batch_shapes(
    sizes: Int32[np.ndarray, "N 2"],
    *,
    batch_size: int,
    row_tokens: int,
    prompt_row_tokens: int,
    max_pairs_per_row: int,
    max_shapes: int,
    multiple: int,
    seed: int,
) -> tuple[tuple[RowShape, ...], int]:
    """Shapes for batches of so many pairs: few that leave the fewest rows of the first epoch empty, then larger ones.

    Args:
      sizes: decoder and encoder places of each pair, shape [N, 2], each at most a row's.
      batch_size: see `PairBatcher`, as for all others.
      row_tokens: places of a row.
      prompt_row_tokens: its places in the encoder's stream, 0 without one.
      max_pairs_per_row: pairs in a row.
      max_shapes: shapes for the first epoch.
      multiple: divides the numbers of rows.
      seed: of the order.

    Returns:
      The shapes, from small to large, of which the last holds any batch; and the decoder places of the first epoch.

    Raises:
      ValueError: a setting out of range.
    """
    require(
        1 <= max_shapes <= padding.MAX_SHAPES,
        f"max_shapes must be in [1, {padding.MAX_SHAPES}]",
        max_shapes,
        "Choose one of these numbers.",
    )
    ladder = row_counts(batch_size, multiple)
    tokens, prompts = (np.ascontiguousarray(column, np.int32) for column in sizes.T)
    _, _, batches, _ = _native.plan_pairs(
        tokens,
        prompts if prompt_row_tokens else np.zeros(0, np.int32),
        shapes=[(ladder[-1], row_tokens, prompt_row_tokens)],
        batch_pairs=batch_size,
        max_pairs_per_row=max_pairs_per_row,
        window=1,
        seed=seed,
        epoch=0,
    )
    needed = batches[:, 1].astype(np.int32)
    chosen = [
        rows
        for rows, _ in padding.choose_shapes(
            needed,
            np.zeros_like(needed),
            group=0,
            max_shapes=max_shapes,
            limit=(ladder[-1], 0),
            multiple=multiple,
        )
    ]
    places = int(np.asarray(chosen)[np.searchsorted(chosen, needed)].sum()) * row_tokens
    chosen += [rows for rows in ladder if rows > chosen[-1]]
    return tuple((rows, row_tokens, prompt_row_tokens) for rows in chosen), places
