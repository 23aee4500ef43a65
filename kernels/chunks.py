"""Cutting scored rows into chunks, ignored rows left out."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

Carry = TypeVar("Carry")

_CHUNK_ELEMENTS = 8 << 20
"""Logits alive at once: 32 MiB of float32, 256 rows at V = 32128."""
_MIN_ROWS = 128
"""Rows of a chunk in spite of the budget, at large V: fewer leave the products, and the sums of the head's gradient
over chunks, bound by memory."""
_ROW_MULTIPLE = 16
"""Rows of a chunk divide by this. A bfloat16 product of fewer than 8 rows runs 15 to 40 times slower on a CPU."""


class Rows(NamedTuple):
    """Which rows to work on, in what order."""

    order: Int[Array, " M"]
    """Row numbers, those that count first; what follows them repeats one of those, so that its values are harmless."""
    total: Int[Array, ""]
    """How many count."""


def chunk_rows(rows: int, vocab: int, override: int | None = None) -> int:
    """Rows of one chunk: within the budget of logits, and no more than there are rows."""
    fitting = max(_CHUNK_ELEMENTS // vocab // _ROW_MULTIPLE * _ROW_MULTIPLE, _MIN_ROWS)
    return override or min(fitting, -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def compact(active: Bool[Array, " N"], chunk: int) -> Rows:
    """Active rows in their order, with a chunk of harmless repeats behind them."""
    return pad_order(jnp.argsort(~active, stable=True), jnp.sum(active, dtype=jnp.int32), chunk)


def pad_order(order: Int[Array, " N"], total: Int[Array, ""], chunk: int) -> Rows:
    """Overwrite what follows the first `total` entries by the first of them, and append a chunk of it."""
    padded = jnp.pad(order.astype(jnp.int32), (0, chunk))
    return Rows(jnp.where(jnp.arange(padded.shape[0]) < total, padded, padded[0]), total)


def over_chunks(rows: Rows, chunk: int, step: Callable[[Array, Carry], Carry], start: Carry) -> Carry:
    """Call `step(first position, results)` for as many chunks as the rows that count fill."""
    count = -(-rows.total // chunk)
    results: Carry = jax.lax.fori_loop(0, count, lambda number, results: step(number * chunk, results), start)
    return results


def chunk_index(rows: Rows, start: Array, chunk: int) -> tuple[Int[Array, " C"], Bool[Array, " C"]]:
    """Row numbers of the chunk that starts at this position, and which of them count."""
    index = jax.lax.dynamic_slice_in_dim(rows.order, start, chunk)
    return index, start + jnp.arange(chunk) < rows.total


def put(results: Array, index: Int[Array, " C"], live: Bool[Array, " C"], values: Array) -> Array:
    """Write the values of the rows that count to their places."""
    return results.at[jnp.where(live, index, results.shape[0])].set(values, mode="drop")
