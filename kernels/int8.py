"""Weights in int8 with a scale for each output."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8

LARGEST = 127
"""Largest size of an entry: the range is symmetric."""
_SMALLEST = 2.0**-126
"""Smallest scale, a normal number of float32: devices take others as 0."""


def quantize(weight: Float[Array, "..."], axis: int) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Round a weight to int8 · scale, with the scale that takes the largest size along an axis to 127.

    An entry is off by at most half of its scale, and by the float32 rounding of the quotient. Ties go to even. Where
    all entries are zero the scale is 1.

    Args:
      weight: finite numbers.
      axis: that a product sums over, so that its outputs have a scale each: 1 for a head of [V, D], 0 for [D, V].

    Returns:
      The entries, and float32 scales without that axis.
    """
    wide = weight.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=axis)
    scale = jnp.where(top == 0, 1.0, top / LARGEST)
    scale = jnp.maximum(scale, _SMALLEST)
    entries = jnp.clip(jnp.round(wide / jnp.expand_dims(scale, axis)), -LARGEST, LARGEST)
    return entries.astype(jnp.int8), scale
