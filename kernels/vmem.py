"""What the TPU kernels share: logits, tile by tile, in VMEM.

Logits stand with the vocabulary along sublanes and rows along lanes, [tokens, rows]. A maximum, a sum or a choice over
the vocabulary is then elementwise work on whole registers, and what it yields has one lane a row: no reduction across
lanes, whose units are few. Products are made a unit of UNIT tokens × LANES rows at a time, in one straight piece of
code with what is done to their logits, so that the scheduler lays the one under the other.

Left to itself the compiler keeps whatever a unit has computed or read in registers until its next use, thousands of
cycles later, and spills it. So repeated reads go through offsets that are zero only at run time (`Zeros`): it must
then read again, which the load slots have room for.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from .dispatch import platform
from .head import Head

LANES, SUBLANES = 128, 8
UNIT = 512
"""Tokens of a unit: the size of a sampler's group."""
CHUNK = 32
"""Tokens that are in registers at once when a unit's logits are read back."""
PARTS = (2, 4)
"""Products that make a unit, by vocab_axis: sums and operands of one leave registers free."""
NEVER = float("-inf")

_DEFAULT_VMEM = 128 << 20
"""VMEM of a TPU v5e or v6e, which shapes are checked for where there is no TPU."""
_RESERVED_VMEM = 8 << 20
"""What a kernel leaves for the compiler's own use."""


def obstacle() -> str | None:
    """What keeps the kernels out of a program that is compiled here, or None where nothing does."""
    found = platform()
    return None if found == "tpu" else f"run on a TPU, but received a program for a {found}"


def vmem_limit() -> int:
    """Bytes of VMEM that a kernel may use on the TPU at hand, or that it is being compiled for."""
    try:
        capacity = int(pltpu.get_tpu_info().vmem_capacity_bytes)
    except ValueError:
        capacity = _DEFAULT_VMEM
    return capacity - _RESERVED_VMEM


def matrix_unit() -> int:
    """Columns of a matrix unit of the TPU at hand, or that it is being compiled for: 256 on a v6e, else 128."""
    try:
        return int(pltpu.get_tpu_info().mxu_column_size)
    except ValueError:
        return LANES


def tile_bytes(rows: int, columns: int, dtype: Any) -> int:
    """Bytes of a [rows, columns] array in VMEM, where tiles are 8 × 128 words of 32 bits."""
    size = int(jnp.dtype(dtype).itemsize)
    sublanes = SUBLANES * 4 // size
    return -(-rows // sublanes) * sublanes * -(-columns // LANES) * LANES * size


def opaque_zeros(count: int) -> Int[Array, " C"]:
    """Zeros for a kernel's scalar memory, which the compiler cannot know to be zeros."""
    return jnp.zeros(count, jnp.int32)


def unit_ids(width: int) -> Int[Array, "..."]:
    """Number of each token of a chunk, in registers."""
    shape = (CHUNK // SUBLANES, SUBLANES, width)
    register = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return SUBLANES * register + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def as_registers(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """A chunk cut into registers."""
    return values.reshape(CHUNK // SUBLANES, SUBLANES, values.shape[1])


def turned(matrix: Float[Array, "..."]) -> Float[Array, "..."]:
    """The transpose: of a unit's logits [rows, tokens] it is four squares, which lie under the product."""
    return matrix.T


def product(head: Head, weight: Any, first: Any, states: list[Array], out: Any, scales: Any = ()) -> None:
    """Write W @ hidden of UNIT tokens, [UNIT, rows], not yet shaped.

    Args:
      head: says how `weight` lies.
      weight: a ref of the tile.
      first: the unit's first token in the tile.
      states: hidden states, [D, rows] for a [V, D] weight and [rows, D] for a [D, V] one, read once for each part.
      out: a ref, [UNIT, rows].
      scales: a ref of the scales of an int8 tile by token, [tokens, rows].
    """
    size = UNIT // len(states)
    for number, part in enumerate(states):
        tokens = pl.ds(pl.multiple_of(first + number * size, size), size)
        if head.vocab_axis == 0:
            result = jnp.dot(weight[tokens, :].astype(part.dtype), part, preferred_element_type=jnp.float32)
        else:
            result = turned(jnp.dot(part, weight[:, tokens].astype(part.dtype), preferred_element_type=jnp.float32))
        if head.scales is not None:
            result *= scales[tokens, :]
        out[number * size : (number + 1) * size, :] = result


def finite_or_zero(top: Float[Array, "..."]) -> Float[Array, "..."]:
    """A maximum to subtract: 0 where nothing has been seen, since (−inf) − (−inf) is NaN."""
    return jnp.where(top == NEVER, 0.0, top)


def log_of_sum(top: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Log-sum-exp from a maximum and the sum of exponentials relative to it."""
    return finite_or_zero(top) + jnp.log(total)


def over_sublanes(tops: Float[Array, "..."], totals: Float[Array, "..."]) -> tuple[Array, Array]:
    """One maximum and one sum per lane, [1, W], from one per sublane and lane."""
    top = jnp.max(tops, axis=0, keepdims=True)
    return top, jnp.sum(totals * jnp.exp(tops - finite_or_zero(top)), axis=0, keepdims=True)
