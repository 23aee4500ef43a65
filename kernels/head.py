"""The map from a hidden state to logits, in the form that every kernel takes."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A language-model head: logits = soft_cap · tanh(scale · hidden @ W / soft_cap), in float32.

    A pytree whose leaves are `weight` and `scales`; the rest is static. Two heads that hold the same arrays, and use
    them alike, cost the sampler one reading of them. Inside `jax.shard_map`, a head whose vocabulary is split over a
    mesh axis holds this device's slice of the weight and names the axis; draws and values are those of the whole head.

    A weight in int8 is frozen: W is `scales` · `weight`, a scale for each token. "tpu" reads one byte for each of its
    numbers; the others hold a copy in the dtype of the hidden states while they run.
    """

    weight: Array
    """[V, D] (an embedding) when `vocab_axis` is 0, [D, V] (a projection) when it is 1, floating point or int8. Neither
    is ever transposed."""
    vocab_axis: int = 0
    """Axis of `weight` that counts the vocabulary."""
    scale: float = 1.0
    """Multiplies the product in float32: D^-0.5 for T5 heads that are tied to the embedding."""
    soft_cap: float | None = None
    """Bound on the size of a logit, as in Gemma 2; None for none."""
    mesh_axis: str | None = None
    """Mesh axis over which the vocabulary is split in equal, consecutive slices; None where `weight` is whole."""
    scales: Array | None = None
    """[V] float32, positive: of each token of an int8 weight, split as it is; None for a floating-point weight."""

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(
                f"a head's weight must have 2 axes, but received shape {self.weight.shape}. Pass [V, D] or [D, V]."
            )
        if not (jnp.issubdtype(self.weight.dtype, jnp.floating) or self.weight.dtype == jnp.int8):
            raise ValueError(
                f"a head's weight must be floating point or int8, but received {self.weight.dtype}. Convert it with "
                "astype."
            )
        if self.vocab_axis not in (0, 1):
            raise ValueError(
                f"vocab_axis must be 0 or 1, but received {self.vocab_axis!r}. Pass 0 for [V, D] or 1 for [D, V]."
            )
        self._check_scales()
        if not (isinstance(self.scale, int | float) and math.isfinite(self.scale)):
            raise ValueError(
                f"scale must be a finite Python number, but received {self.scale!r}. Fold arrays into the weight."
            )
        if self.soft_cap is not None and not (isinstance(self.soft_cap, int | float) and self.soft_cap > 0):
            raise ValueError(
                f"soft_cap must be a Python number above 0, but received {self.soft_cap!r}. Pass None for no cap."
            )

    def _check_scales(self) -> None:
        if self.scales is None:
            if self.weight.dtype == jnp.int8:
                raise ValueError(
                    "the scales of a head must come with an int8 weight, but received None. Pass scales=, [V] float32."
                )
            return
        if self.weight.dtype != jnp.int8:
            raise ValueError(
                f"the scales of a head must be None for a floating-point weight, but received an array beside "
                f"{self.weight.dtype}. Multiply the weight, or pass it in int8."
            )
        if self.scales.shape != (self.slice_size,) or self.scales.dtype != jnp.float32:
            raise ValueError(
                f"the scales of a head must have one float32 for each token, [{self.slice_size}], but received "
                f"{self.scales.dtype} of shape {self.scales.shape}. Reshape or convert them."
            )

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[int, float, float | None, str | None]]:
        """The weight and its scales, and what is static."""
        return (self.weight, self.scales), (self.vocab_axis, self.scale, self.soft_cap, self.mesh_axis)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, float, float | None, str | None], leaves: tuple[Any, Any]) -> "Head":
        """Rebuild without validation: JAX puts tracers, shapes and None in the place of leaves."""
        head = object.__new__(cls)
        names = ("weight", "scales", "vocab_axis", "scale", "soft_cap", "mesh_axis")
        for name, value in zip(names, (*leaves, *static), strict=True):
            object.__setattr__(head, name, value)
        return head

    @property
    def vocab_size(self) -> int:
        """V, the rows of the whole head; the tokenizer may use fewer."""
        shards = 1 if self.mesh_axis is None else jax.lax.axis_size(self.mesh_axis)
        return self.slice_size * int(shards)

    @property
    def slice_size(self) -> int:
        """Rows of the head that `weight` holds: V unless the vocabulary is split."""
        return int(self.weight.shape[self.vocab_axis])

    @property
    def first_id(self) -> Int[Array, ""]:
        """Token id of the first row that `weight` holds."""
        shard = 0 if self.mesh_axis is None else jax.lax.axis_index(self.mesh_axis)
        return jnp.asarray(shard * self.slice_size, jnp.int32)

    def whole(self) -> "Head":
        """The head with all its rows on every device."""
        if self.mesh_axis is None:
            return self
        weight = jax.lax.all_gather(self.weight, self.mesh_axis, axis=self.vocab_axis, tiled=True)
        scales = None if self.scales is None else jax.lax.all_gather(self.scales, self.mesh_axis, tiled=True)
        return Head.tree_unflatten((self.vocab_axis, self.scale, self.soft_cap, None), (weight, scales))

    @property
    def frozen(self) -> bool:
        """Whether no gradient can go to the weight, which is in int8."""
        return self.scales is not None

    @property
    def width(self) -> int:
        """D, the width of the hidden states that it takes."""
        return int(self.weight.shape[1 - self.vocab_axis])

    def logits(self, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Float32 logits of each row; the operands of the product keep their dtype, its sums are float32."""
        product = jax.lax.dot_general(
            hidden,
            self.operand(hidden.dtype),
            (((1,), (1 - self.vocab_axis,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return self.shape_logits(self.by_token(product, axis=1))

    def product_by_token(self, hidden: Float[Array, "N D"]) -> Float[Array, "V N"]:
        """Float32 W @ hidden, vocabulary first and not yet shaped: the faster product where N is far below V."""
        product = jax.lax.dot_general(
            self.operand(hidden.dtype),
            hidden,
            (((1 - self.vocab_axis,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return self.by_token(product, axis=0)

    def operand(self, dtype: DTypeLike) -> Array:
        """The weight as products take it; an int8 weight in the dtype of the states, which holds it exactly."""
        return self.weight if self.scales is None else self.weight.astype(dtype)

    def by_token(self, values: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """Values times the scales of an int8 weight, with the vocabulary along `axis` of two."""
        return values if self.scales is None else values * jnp.expand_dims(self.scales, 1 - axis)

    def shape_logits(self, product: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scale and soft cap of a float32 product."""
        scaled = product if self.scale == 1 else product * self.scale
        return scaled if self.soft_cap is None else self.soft_cap * jnp.tanh(scaled / self.soft_cap)

    def product_gradient(self, gradient: Float[Array, "..."], logits: Float[Array, "..."]) -> Float[Array, "..."]:
        """Gradient in the product from the gradient in the logits, and the logits."""
        scaled = gradient if self.soft_cap is None else gradient * (1 - (logits / self.soft_cap) ** 2)
        return scaled if self.scale == 1 else scaled * self.scale

    def same_map(self, other: "Head") -> bool:
        """Whether both hold the same weight array, by identity, and use it alike."""
        arrays, static = self.tree_flatten()
        theirs, alike = other.tree_flatten()
        return static == alike and all(own is array for own, array in zip(arrays, theirs, strict=True))

    def of(self, ids: Int[Array, " C"]) -> "Head":
        """The map to the logits of these tokens alone, in this order."""
        scales = None if self.scales is None else jnp.take(self.scales, ids)
        return Head.tree_unflatten(self.tree_flatten()[1], (jnp.take(self.weight, ids, axis=self.vocab_axis), scales))

    def with_weight(self, weight: Array) -> "Head":
        """The same map with another weight in floating point: how a gradient of a head is written."""
        return Head.tree_unflatten(self.tree_flatten()[1], (weight, None))
