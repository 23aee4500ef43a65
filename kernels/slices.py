"""Heads whose vocabulary is split over a mesh axis: what their devices add up, and which axes their values vary over.

Inside `jax.shard_map` a loop carry, a kernel's result or a gradient must vary over the same mesh axes as what it
belongs to. Nothing here does anything where there is no mesh.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from .head import Head

Tree = TypeVar("Tree")

# JAX does not annotate these.
_sum: Callable[[Array, Any], Array] = jax.lax.psum
_max: Callable[[Array, Any], Array] = jax.lax.pmax
_shape: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct


def sum_over_slices(head: Head, values: Array) -> Array:
    """The sum over the devices that share the vocabulary, on each of them."""
    return values if head.mesh_axis is None else _sum(values, head.mesh_axis)


def max_over_slices(head: Head, values: Array) -> Array:
    """The largest over the devices that share the vocabulary, on each of them."""
    return values if head.mesh_axis is None else _max(values, head.mesh_axis)


def lse_over_slices(head: Head, lse: Float[Array, " N"]) -> Float[Array, " N"]:
    """The log-sum-exp over the whole vocabulary, from those over the slices."""
    if head.mesh_axis is None:
        return lse
    top = _max(lse, head.mesh_axis)
    base = jnp.where(jnp.isfinite(top), top, 0.0)
    return base + jnp.log(_sum(jnp.exp(lse - base), head.mesh_axis))


def gather(values: Tree, mesh_axis: str) -> Tree:
    """Arrays of all devices along the axis, stacked, the same on each: a sum, since what it yields varies no more."""
    shards, shard = jax.lax.axis_size(mesh_axis), jax.lax.axis_index(mesh_axis)

    def one(value: Array) -> Array:
        here = (jnp.arange(shards) == shard).reshape(-1, *(1,) * value.ndim)
        return _sum(jnp.where(here, value[None], jnp.zeros_like(value)[None]), mesh_axis)

    result: Tree = jax.tree.map(one, values)
    return result


def local_ids(head: Head, ids: Int[Array, " N"]) -> Int[Array, " N"]:
    """Token ids counted from the beginning of this device's slice; −1 for those of other slices."""
    if head.mesh_axis is None:
        return ids
    ids = ids - head.first_id
    return jnp.where(ids < head.slice_size, jnp.maximum(ids, -1), -1)


def known_or_nan(head: Head, ids: Int[Array, " N"], values: Float[Array, " N"]) -> Float[Array, " N"]:
    """The values where the ids are those of tokens, NaN elsewhere: no slice knows that no other holds them."""
    return jnp.where((ids >= 0) & (ids < head.vocab_size), values, jnp.nan)


def axes_of(*values: Any) -> frozenset[str]:
    """Mesh axes over which any of the arrays in these trees varies."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(values)))


def vary(values: Tree, axes: frozenset[str]) -> Tree:
    """The same arrays, varying over these axes as well."""

    def one(value: Array) -> Array:
        missing = tuple(sorted(axes - axes_of(value)))
        return jax.lax.pcast(value, missing, to="varying") if missing else value

    result: Tree = jax.tree.map(one, values)
    return result


def vary_alike(*values: Any) -> Any:
    """The same trees, all arrays varying over the same axes."""
    return vary(values, axes_of(*values))


def gradient_like(gradient: Array, primal: Array) -> Array:
    """A gradient of what is the same on several devices: the sum of what they found."""
    extra = tuple(sorted(axes_of(gradient) - axes_of(primal)))
    return _sum(gradient, extra) if extra else gradient


def result_shape(shape: tuple[int, ...], dtype: Any, *inputs: Any) -> jax.ShapeDtypeStruct:
    """Shape of a kernel's result, which varies as its inputs do."""
    axes = axes_of(*inputs)
    if not axes:
        return _shape(shape, dtype)
    like = next(kind for leaf in jax.tree.leaves(inputs) if (kind := jax.typeof(leaf).manual_axis_type).varying == axes)
    return _shape(shape, dtype, manual_axis_type=like)
