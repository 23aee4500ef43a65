"""Cutting scored rows into chunks, ignored rows left out."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

_CHUNK_ELEMENTS = 9 << 20
"""Logits alive at once: 36 MiB of float32, 288 rows at V = 32128. Larger products are no faster on a CPU."""
_ROW_MULTIPLE = 16
"""Rows of a chunk divide by this: wide enough for the matrix units, and above the slow bfloat16 products on a CPU."""


class Rows(NamedTuple):
    """Which rows to work on, in what order."""

    order: Int[Array, " M"]
    """Row numbers, those that count first; what follows them repeats one of those, so that its values are harmless."""
    count: Int[Array, ""]
    """How many count."""


def chunk_rows(rows: int, vocab: int, override: int | None = None) -> int:
    """Rows of one chunk: within the budget of logits, and no more than there are rows."""
    fitting = max(_CHUNK_ELEMENTS // vocab // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
    return override or min(fitting, -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def compact(active: Bool[Array, " N"], chunk: int) -> Rows:
    """Active rows in their order, with a chunk of harmless repeats behind them."""
    count = jnp.sum(active, dtype=jnp.int32)
    return pad_order(jnp.argsort(~active, stable=True), count, chunk)


def pad_order(order: Int[Array, " N"], count: Int[Array, ""], chunk: int) -> Rows:
    """Overwrite what follows the first `count` entries by the first of them, and append a chunk of it."""
    padded = jnp.pad(order.astype(jnp.int32), (0, chunk))
    return Rows(jnp.where(jnp.arange(padded.shape[0]) < count, padded, padded[0]), count)
