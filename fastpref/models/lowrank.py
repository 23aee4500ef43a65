"""Kernels, in int8 or with low-rank adapters (LoRA: Hu et al., 2021), and the one product that layers take with them.

Models that share a base are run in one pass: their rows lie one after the other, in equal parts, in every product with
a kernel W, which is read once; each model's own difference s·(x A) B is added to its own rows.
"""

from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float


class LowRank(NamedTuple):
    """A trained difference of rank r to a kernel: s · A B (LoRA, section 4.1), s kept by the kernel.

    Those of layers have an axis of layers in front.
    """

    a: Float[Array, "*layers I r"]
    b: Float[Array, "*layers r O"]


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A frozen matrix in int8, with a scale for each output of its product. It stands in the place of its array.

    A pytree of two arrays, which may have further axes in front alike. Made by `models.int8`.
    """

    weight: Array
    """Entries, [I, O] of a kernel and [V, D] of an embedding."""
    scale: Array
    """Float32: [O], or [V]."""
    axis: int = -2
    """Axis of the entries that have a scale in common: −2 of a kernel, −1 of an embedding."""
    dtype: str = "float32"
    """Of the array that it stands for, and of the rows that are read of an embedding."""

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[int, str]]:
        """The arrays, and what is static."""
        names = ("weight", "scale")
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names), (self.axis, self.dtype)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, str], leaves: tuple[Any, ...]) -> "Quantized":
        """Rebuild without validation: JAX puts tracers, shapes and None in the place of leaves."""
        matrix = object.__new__(cls)
        for name, value in zip(("weight", "scale", "axis", "dtype"), (*leaves, *static), strict=True):
            object.__setattr__(matrix, name, value)
        return matrix

    def __getitem__(self, index: Any) -> Any:
        """The matrix itself, as a parameter is read, or rows of an embedding by their numbers."""
        return self if index is ... else Quantized(self.weight[index], self.scale[index], self.axis, self.dtype).dense()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        return tuple(self.weight.shape)

    @property
    def size(self) -> int:
        """Entries of that array."""
        return int(self.weight.size)

    def dense(self) -> Array:
        """That array."""
        scaled = self.weight.astype(jnp.float32) * jnp.expand_dims(self.scale, self.axis)
        return scaled.astype(self.dtype)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """A kernel with the adapters of M models that share it. It stands in the place of the kernel's array.

    Kernels of layers that are run in a loop lie in one array with an axis of layers in front, and so do their adapters.
    """

    weight: Array | Quantized
    """W, [I, O], read once for the rows of all models."""
    adapters: tuple[LowRank | None, ...]
    """Of each model; None for one that is the base itself."""
    scale: float | tuple[float, ...] = 1.0
    """s, α / r; where layers differ, that of each: 0 for one without an adapter."""
    factors: Array | None = None
    """The same numbers as an array of float32, where layers differ."""
    noise: Array | None = None
    """A key, while the first model's adapter is trained with dropout."""
    dropout: float = 0.0
    """Probability that an entry of x does not reach A, where there is noise."""

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, float]]:
        """The arrays, and what is static."""
        names = ("weight", "adapters", "factors", "noise")
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names), (
            self.scale,
            self.dropout,
        )

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, float], leaves: tuple[Any, ...]) -> "Adapted":
        """Rebuild without validation: JAX puts tracers, shapes and None in the place of leaves."""
        kernel = object.__new__(cls)
        names = ("weight", "adapters", "factors", "noise", "scale", "dropout")
        for name, value in zip(names, (*leaves, *static), strict=True):
            object.__setattr__(kernel, name, value)
        return kernel

    def __getitem__(self, index: EllipsisType) -> "Adapted":
        """The kernel itself: how a parameter is read."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return tuple(self.weight.shape)

    @property
    def size(self) -> int:
        """Entries of the kernel."""
        return int(self.weight.size)

    def merged(self) -> Float[Array, "*layers I O"]:
        """W + s · A B of a single model, in the dtype of W.

        Raises:
          ValueError: several models share the kernel.
        """
        if len(self.adapters) != 1:
            raise ValueError(
                f"a kernel to be merged must have the adapter of one model, but received {len(self.adapters)}. "
                "Merge each model by itself."
            )
        (adapter,) = self.adapters
        weight = dense(self.weight)
        if adapter is None:
            return weight
        a, b = (x.astype(jnp.float32) for x in adapter)
        difference = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        strength: Any = self.scale if self.factors is None else self.factors[:, None, None]
        whole: Array = (weight.astype(jnp.float32) + strength * difference).astype(weight.dtype)
        return whole


Kernel = Array | Quantized | Adapted
"""A matrix [I, O] that rows are multiplied with."""


def product(x: Float[Array, "N I"], kernel: Kernel) -> Float[Array, "N O"]:
    """x W, and to the rows of each model s · (x A) B of its own adapter.

    Args:
      x: rows; those of M models one after the other, in equal parts.
      kernel: W, with adapters or without.
    """
    if isinstance(kernel, Quantized):
        # Entries of int8 are exact in bfloat16, scales are not.
        wide = (x @ kernel.weight.astype(x.dtype)).astype(jnp.float32)
        return (wide * kernel.scale[None]).astype(x.dtype)
    if not isinstance(kernel, Adapted):
        return x @ kernel
    shared = product(x, kernel.weight)
    models = len(kernel.adapters)
    parts = zip(jnp.split(x, models), jnp.split(shared, models), kernel.adapters, strict=True)
    rows = [
        base if adapter is None else base + _difference(part, adapter, kernel, noise=kernel.noise if first else None)
        for first, (part, base, adapter) in zip((True, *(False,) * models), parts, strict=False)
    ]
    return rows[0] if models == 1 else jnp.concatenate(rows)


def _difference(
    x: Float[Array, "n I"], adapter: LowRank, kernel: Adapted, *, noise: Array | None
) -> Float[Array, "n O"]:
    a, b = (factor.astype(x.dtype) for factor in adapter)
    if noise is not None and kernel.dropout:
        kept = jax.random.bernoulli(noise, 1 - kernel.dropout, x.shape)
        x = jnp.where(kept, x / (1 - kernel.dropout), jnp.zeros_like(x))
    strength: Any = kernel.scale if kernel.factors is None else kernel.factors.astype(x.dtype)
    difference: Array = strength * ((x @ a) @ b)
    return difference


def in_dtype(params: Any, dtype: DTypeLike) -> Any:
    """Parameters in the dtype of products; adapters and int8 stay as they are, and are cast where they are used."""
    leaves, structure = jax.tree.flatten(params, is_leaf=_is_kernel)

    def cast(array: Any) -> Any:
        if isinstance(array, Quantized):
            return array if array.dtype == jnp.dtype(dtype).name else replace(array, dtype=jnp.dtype(dtype).name)
        # The same array where there is nothing to do: models that share it are known by that.
        return array if array.dtype == dtype or not jnp.issubdtype(array.dtype, jnp.floating) else array.astype(dtype)

    return jax.tree.unflatten(
        structure,
        [replace(leaf, weight=cast(leaf.weight)) if isinstance(leaf, Adapted) else cast(leaf) for leaf in leaves],
    )


def dense(kernel: Kernel) -> Array:
    """The kernel as one array, its adapter merged."""
    if isinstance(kernel, Adapted):
        return kernel.merged()
    return kernel.dense() if isinstance(kernel, Quantized) else kernel


def head_arrays(kernel: Kernel) -> dict[str, Any]:
    """`weight` and `scales` of a `Head`; a kernel with an adapter is one array."""
    if isinstance(kernel, Quantized):
        return {"weight": kernel.weight, "scales": kernel.scale}
    return {"weight": dense(kernel)}


def is_adapted(tree: Any) -> bool:
    """Whether a tree of parameters has adapters."""
    return any(isinstance(leaf, Adapted) for leaf in jax.tree.leaves(tree, is_leaf=_is_kernel))


def is_quantized(tree: Any) -> bool:
    """Whether a tree of parameters has matrices in int8."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_kernel)
    return any(isinstance(leaf.weight if isinstance(leaf, Adapted) else leaf, Quantized) for leaf in leaves)


def stacked(params: Any, ref_params: Any) -> Any | None:
    """Parameters of two models that share a base, for one pass over the rows of the first and then of the second.

    Args:
      params: of the first model, a tree of arrays and `Adapted` kernels.
      ref_params: of the second.

    Returns:
      The tree in which each kernel has the adapters of both; None where they do not share all else as the same arrays,
      or where a head has an adapter: the sampler takes heads as they are.
    """
    (leaves, structure), (ref_leaves, ref_structure) = (
        jax.tree.flatten_with_path(tree, is_leaf=_is_kernel) for tree in (params, ref_params)
    )
    if len({structure, ref_structure}) > 1:
        return None
    kernels = [_shared(path, leaf, ref) for (path, leaf), (_, ref) in zip(leaves, ref_leaves, strict=True)]
    return None if any(kernel is None for kernel in kernels) else jax.tree.unflatten(structure, kernels)


def _shared(path: Any, first: Kernel, second: Kernel) -> Kernel | None:
    """One kernel of two models, or None where it is not the same."""
    both = [kernel for kernel in (first, second) if isinstance(kernel, Adapted)]
    arrays, theirs = jax.tree.leaves(weight_of(first)), jax.tree.leaves(weight_of(second))
    if not all(array is other for array, other in zip(arrays, theirs, strict=True)):
        return None
    if not both:
        return first
    alike = len({kernel.scale for kernel in both}) == 1 and all(len(kernel.adapters) == 1 for kernel in both)
    if not alike or "lm_head" in jax.tree_util.keystr(path):
        return None
    adapters = tuple(kernel.adapters[0] if isinstance(kernel, Adapted) else None for kernel in (first, second))
    return Adapted(weight_of(first), adapters, both[0].scale, both[0].factors)


def _is_kernel(leaf: Any) -> bool:
    return isinstance(leaf, Adapted | Quantized)


def weight_of(leaf: Kernel) -> Array | Quantized:
    """A kernel without its adapters."""
    return leaf.weight if isinstance(leaf, Adapted) else leaf
