"""What the TPU kernels share that score blocks of rows: order of rows, sizes, specs of blocks, loops over units.

Rows are compacted before they come to a kernel: the first `count` of them count, and blocks of rows behind those are
skipped. What binds each kernel, compiled for a v5e, is the matrix unit: elementwise work on a unit's logits lies under
its product (see `fastpref.kernels.vmem`).

A matrix unit of 256 columns, as a v6e has, is half idle under products of 128, so `Tiles.columns` follows it; there the
work on the logits then takes more of the schedule than the products do.

Tried and rejected: products of 512 columns, whose sums fill the registers (200 to 700 spills each, none at 128); a tile
size that divides V, which V = 251 · 128 would make 128: the last tile overhangs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from .head import Head
from .vmem import (
    CHUNK,
    LANES,
    PARTS,
    UNIT,
    as_registers,
    matrix_unit,
    opaque_zeros,
    tile_bytes,
    vmem_limit,
)

ZEROS = max(PARTS)
"""Scalars that are zero, before the number of blocks."""
_ROW_BLOCKS = (1024, 512, 256, LANES)
_ROWS_OF_BYTES = 32
"""Rows of a register of 8 bits."""
_NARROW = 2048
"""Below this D a unit's product is too short to cover the work on its logits."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks that a kernel works on."""

    rows: int
    """Rows of hidden states: a multiple of 128."""
    tokens: int
    """Rows of the head: a multiple of 512."""
    columns: int = LANES
    """Columns of every product, which are those of the matrix units: 128, or 256 on a v6e."""

    def unit(self, head: Head) -> int:
        """Rows of a unit: they are the columns of its product with a [V, D] weight."""
        return self.columns if head.vocab_axis == 0 else LANES

    def parts(self, head: Head) -> int:
        """Products that make a unit, each with sums of 32 registers."""
        return PARTS[0] * self.columns // LANES if head.vocab_axis == 0 else PARTS[1] * LANES // self.columns


class Compacted(NamedTuple):
    """Rows that count first, in their order; the first of them again behind them, up to whole blocks."""

    order: Int[Array, " M"]
    """Row numbers."""
    places: Int[Array, " N"]
    """Where each row stands in that order; M for those that do not count."""
    total: Int[Array, ""]
    """How many count."""

    @classmethod
    def of(cls, where: Bool[Array, " N"], block: int) -> "Compacted":
        """Order of the rows, padded to a multiple of `block`."""
        rows, total = where.shape[0], jnp.sum(where, dtype=jnp.int32)
        order = jnp.pad(jnp.argsort(~where, stable=True).astype(jnp.int32), (0, -rows % block))
        # A row that counts is finite where it must be, and needs no mask, for which XLA would copy the states twice.
        order = jnp.where(jnp.arange(order.shape[0]) < total, order, order[:1])
        places = jnp.where(where, jnp.cumsum(where, dtype=jnp.int32) - 1, order.shape[0])
        return cls(order, places, total)

    def take(self, values: Array) -> Array:
        """Values of the rows in this order."""
        return values.at[self.order].get(mode="promise_in_bounds")

    def put(self, values: Array) -> Array:
        """Values back at the places of their rows, 0 at the others."""
        return values.at[self.places].get(mode="fill", fill_value=0)


def oriented(hidden: Float[Array, "N D"], head: Head) -> Float[Array, "..."]:
    """Hidden states as the product with the head's weight takes them: [D, N] for a [V, D] weight."""
    return hidden.T if head.vocab_axis == 0 else hidden


def choose(
    bytes_of: Callable[[Tiles], int], rows: int, tokens: tuple[int, ...], largest: int, columns: int | None = None
) -> Tiles:
    """The largest tiles that the VMEM at hand holds, more tokens before more rows, no larger than the problem.

    Args:
      bytes_of: VMEM that a kernel takes with these tiles.
      rows: rows of the problem.
      tokens: sizes of a tile of the head, the preferred ones first.
      largest: most rows of a block.
      columns: of every product; None for those of the matrix unit at hand.
    """
    columns = columns or (matrix_unit() if rows > LANES else LANES)
    needed = -(-rows // columns) * columns
    for tile in tokens:
        for block in _ROW_BLOCKS:
            tiles = Tiles(min(block, needed), tile, columns)
            if columns <= block <= largest and bytes_of(tiles) <= vmem_limit():
                return tiles
    return Tiles(LANES, UNIT)


def weight_bytes(head: Head, tokens: int, dtype: Any) -> int:
    """Bytes in VMEM of a tile of this many tokens in this dtype."""
    return tile_bytes(*weight_block(head, tokens), dtype)


def columns_of(width: int, tiles: Tiles) -> int:
    """Columns of D in one product of a gradient."""
    return tiles.columns if width % tiles.columns == 0 else width


def cuts(tiles: Tiles) -> list[slice]:
    """Rows in parts, two for 128 columns: the sums of one product of 512 rows are then 32 registers."""
    count = 2 * tiles.columns // LANES
    size = tiles.rows // count
    return [slice(number * size, (number + 1) * size) for number in range(count)]


def parameters() -> pltpu.CompilerParams:
    """The grid runs in order: results accumulate."""
    return pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit())


def scalar_memory(count: Int[Array, ""], tiles: Tiles) -> Int[Array, " S"]:
    """Zeros, and the number of blocks with rows that count."""
    active = jnp.maximum(-(-count // tiles.rows), 1)
    return jnp.concatenate([opaque_zeros(ZEROS), active[None]])


def _clamp(block: Any, scalars: Any) -> Any:
    """Blocks that are skipped ask for the last one that is not, which is there already."""
    return jnp.minimum(block, scalars[ZEROS] - 1)


def states_spec(turned: bool, head: Head, tiles: Tiles, block: Any) -> pl.BlockSpec:
    """A block of hidden states, turned to [D, rows] or not. `block` takes the grid's two indices."""
    if turned:
        return pl.BlockSpec((head.width, tiles.rows), lambda *at: (0, _clamp(block(*at[:2]), at[2])))
    return pl.BlockSpec((tiles.rows, head.width), lambda *at: (_clamp(block(*at[:2]), at[2]), 0))


def row_spec(fields: int, tiles: Tiles, block: Any) -> pl.BlockSpec:
    """So many numbers for every row of a block."""
    return pl.BlockSpec((1, fields, tiles.rows), lambda *at: (_clamp(block(*at[:2]), at[2]), 0, 0))


def weight_block(head: Head, tokens: int) -> tuple[int, int]:
    """Shape of a tile of this many tokens."""
    return (tokens, head.width) if head.vocab_axis == 0 else (head.width, tokens)


def weight_spec(head: Head, tokens: int, tile: Any) -> pl.BlockSpec:
    """A tile of the weight. `tile` takes the grid's two indices."""

    def at(*index: Any) -> tuple[Any, Any]:
        number = tile(*index[:2])
        return (number, 0) if head.vocab_axis == 0 else (0, number)

    return pl.BlockSpec(weight_block(head, tokens), at)


def rows_of(number: Any, size: int) -> Any:
    """Cut number `number` of this size."""
    return pl.ds(pl.multiple_of(number * size, size), size)


def loop(count: int, body: Any) -> None:
    """Call `body(number, None)` so many times, as a loop of the program."""
    jax.lax.fori_loop(0, count, body, None)


def units_at_once(head: Head, units: int) -> int:
    """Units that stand in one straight piece of code, each product beside the work on the logits before it."""
    narrow = _NARROW if head.soft_cap is None else 2 * _NARROW
    return 2 if head.width < narrow and units % 2 == 0 else 1


def by_unit(units: int, side: int, unit: Any) -> None:
    """Call `unit(number, place)` for every unit, `side` of them at a time, each place with buffers of its own."""

    def several(number: Any, carry: Any) -> Any:
        for place in range(side):
            unit(number * side + place, place)
        return carry

    loop(units // side, several)


def by_tile(step: Any, vocab: int, tokens: int, work: Any) -> None:
    """Do `work(masked)`: masked in a last tile that overhangs the vocabulary."""
    steps = -(-vocab // tokens)
    if steps > 1 or vocab % tokens == 0:
        pl.when(step < vocab // tokens)(partial(work, False))
    if vocab % tokens:
        pl.when(step == steps - 1)(partial(work, True))


def read_states(head: Head, tiles: Tiles, states: Any, lanes: Any, scalars: Any) -> list[Array]:
    """A unit's rows of hidden states, read anew for every part of its product."""
    parts = range(tiles.parts(head))
    if head.vocab_axis == 0:
        return [states[pl.ds(pl.multiple_of(scalars[part], LANES), head.width), lanes] for part in parts]
    return [states[pl.ds(pl.multiple_of(lanes.start + scalars[part], LANES), LANES), :] for part in parts]


def read_logits(head: Head, logits: Any, again: Any, chunk: int) -> Array:
    """A chunk of a unit's logits, read anew and shaped."""
    return head.shape_logits(as_registers(logits[pl.ds(pl.multiple_of(again, UNIT) + chunk, CHUNK), :]))


def read_weight(head: Head, weight: Any, part: Any, again: Any, masked: bool, limit: Any, dtype: Any) -> Array:
    """These columns of the tile, read anew, in a dtype; rows at and past the limit are zero, whatever lies there."""
    again = pl.multiple_of(again, LANES)
    tile: Array
    if head.vocab_axis == 0:
        tile = weight[pl.ds(again, weight.shape[0]), part].astype(dtype)
    else:
        tile = weight[pl.ds(pl.multiple_of(part.start + again, _ROWS_OF_BYTES), part.size), :].astype(dtype)
    if masked:
        ids = jax.lax.broadcasted_iota(jnp.int32, tile.shape, head.vocab_axis)
        tile = jnp.where(ids < limit, tile, jnp.zeros_like(tile))
    return tile


def per_row(by_row: Array, columns: int) -> Array:
    """One number per row, to multiply `columns` columns: as it lies where that is a register's width."""
    return by_row if columns == LANES else by_row[:, 0:1]
