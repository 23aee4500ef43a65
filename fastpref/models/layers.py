"""Layers of both model families: norms, projections, attention and feed-forward blocks.

Shape letters: P prompts, K completions of each, T tokens of a stream (S for prompts), D width, N key-value heads,
G query heads per key-value head, H head width. A stream of activations is [P, K, T, D]; a batch of prompts is a stream
with K = 1. Kernels are stored [in, out], so that no step transposes a weight.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from fastpref.models.attention import Own, Shared, attend
from fastpref.models.masks import Mask, Masks

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> nnx.Param[Array]:
    """A parameter drawn from a normal distribution."""
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * std).astype(dtype))


def right_padded(tokens: Int[Array, "P S"], mask: Bool[Array, "P S"]) -> tuple[Int[Array, "P S"], Int[Array, " P"]]:
    """Move the real tokens of each row to its front, in order, and count them.

    After this every prompt is padded on the right alone, whatever it was before: the same numbers come out of left,
    right and middle padding, and positions are one shared range.
    """
    _, front = jax.lax.sort((~mask, tokens), num_keys=1, is_stable=True)
    return front, mask.sum(-1, dtype=jnp.int32)


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """Divide each row by its root mean square, in float32, and scale it; no mean is subtracted."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * jnp.broadcast_to(scale, x.shape)


class Rotation(NamedTuple):
    """Cosines and sines of the tokens of streams (RoPE)."""

    cos: Float[Array, "#P #K T half"]
    sin: Float[Array, "#P #K T half"]

    def turn(self, heads: Float[Array, "P K T *heads H"]) -> Float[Array, "P K T *heads H"]:
        """Rotate the two halves of every head, in float32."""
        cos, sin = (jnp.expand_dims(table, tuple(range(3, heads.ndim - 1))) for table in self)
        first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(heads.dtype)


class Attention(nnx.Module):
    """The norm before an attention block, and its four projections.

    Args:
      width: D.
      heads: query heads, N·G.
      kv_heads: key-value heads, N.
      head_dim: H.
      stds: standard deviations of the initial q, k, v and o kernels.
      eps: added to the mean square in the norm.
      scale: multiplies the scores.
      bias: whether q, k and v add a bias.
      output_bias: whether o adds a bias.
      dtype: of the parameters, and so of the products.
      rngs: where initial values come from.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        stds: tuple[float, float, float, float],
        eps: float,
        scale: float = 1.0,
        bias: bool = False,
        output_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.eps, self.scale = eps, scale
        self.norm = nnx.Param(jnp.ones(width, dtype))
        self.q = normal(rngs, (width, heads * head_dim), stds[0], dtype)
        self.k = normal(rngs, (width, kv_heads * head_dim), stds[1], dtype)
        self.v = normal(rngs, (width, kv_heads * head_dim), stds[2], dtype)
        self.o = normal(rngs, (heads * head_dim, width), stds[3], dtype)
        self.q_bias = nnx.Param(jnp.zeros(heads * head_dim, dtype)) if bias else None
        self.k_bias = nnx.Param(jnp.zeros(kv_heads * head_dim, dtype)) if bias else None
        self.v_bias = nnx.Param(jnp.zeros(kv_heads * head_dim, dtype)) if bias else None
        self.o_bias = nnx.Param(jnp.zeros(width, dtype)) if output_bias else None

    def __call__(
        self,
        x: Float[Array, "P K T D"],
        mask: Masks,
        *,
        prompt: Shared | None = None,
        past: Own | None = None,
        slot: Int[Array, ""] | int = 0,
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "P K T D"], Shared | Own]:
        """Let tokens attend to their own stream, and to the prompt under the same softmax.

        Args:
          x: T tokens of every stream.
          mask: what they attend to.
          prompt: what the streams of a prompt share.
          past: what was read of every stream before; the keys and values of `x` are written to it.
          slot: place of the first token in `past`.
          rotation: of queries and keys, by their positions.

        Returns:
          `x` plus what was read, and the keys and values of the streams.
        """
        inner = rms_norm(x, self.norm[...], self.eps)
        queries, keys = self.queries(inner), self.keys(inner)
        if rotation is not None:
            queries, keys = rotation.turn(queries), rotation.turn(keys)
        own: Shared | Own
        if past is None:
            own = (Shared if x.shape[1] == 1 else Own).of(keys, self.values(inner))
        else:
            own = past.write(Own.of(keys, self.values(inner)), slot)
        shared = () if prompt is None else ((prompt, mask.prompt),)
        return self.merge(x, attend(as_queries(queries), *shared, (own, mask.own))), own

    def cross(self, x: Float[Array, "P K T D"], prompt: Shared, mask: Mask) -> Float[Array, "P K T D"]:
        """`x` plus what its tokens read of the prompt."""
        queries = self.queries(rms_norm(x, self.norm[...], self.eps))
        return self.merge(x, attend(as_queries(queries), (prompt, mask)))

    def queries(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T N G H"]:
        """Query heads, scaled and grouped by the key-value head that they read."""
        flat = project(x, self.q, self.q_bias)
        heads = flat.reshape(*x.shape[:3], self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        return heads if self.scale == 1 else heads * self.scale

    def keys(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T N H"]:
        """Key heads."""
        return project(x, self.k, self.k_bias).reshape(*x.shape[:3], self.kv_heads, self.head_dim)

    def values(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T N H"]:
        """Value heads."""
        return project(x, self.v, self.v_bias).reshape(*x.shape[:3], self.kv_heads, self.head_dim)

    def merge(self, x: Float[Array, "P K T D"], attended: Float[Array, "P N K G T H"]) -> Float[Array, "P K T D"]:
        """`x` plus the projected heads."""
        flat = attended.transpose(0, 2, 4, 1, 3, 5).reshape(*x.shape[:3], -1)
        return x + project(flat, self.o, self.o_bias)


def project(x: Float[Array, "*rows I"], kernel: nnx.Param[Array], bias: nnx.Param[Array] | None = None) -> Array:
    """x @ kernel + bias, in the dtype of the kernel.

    Rows are flattened first: else the gradient of the kernel contracts several axes at once, which XLA turns into a
    transposing copy of the activations on a CPU.
    """
    weight = kernel[...]
    product = (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], weight.shape[1])
    return product if bias is None else product + jnp.broadcast_to(bias[...], product.shape)


def as_queries(heads: Float[Array, "P K T N G H"]) -> Float[Array, "P N K G T H"]:
    """Query heads in the layout of `attend`."""
    return heads.transpose(0, 3, 1, 4, 2, 5)


class FeedForward(nnx.Module):
    """The norm before a feed-forward block, and the block: down(act(gate(x)) · up(x)), or down(act(up(x))).

    Args:
      width: D.
      hidden: width inside.
      activation: a key of `ACTIVATIONS`.
      gated: whether there is a gate.
      stds: standard deviations of the initial inner (gate, up) and outer (down) kernels.
      eps: added to the mean square in the norm.
      dtype: of the parameters, and so of the products.
      rngs: where initial values come from.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        gated: bool,
        stds: tuple[float, float],
        eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation, self.eps = activation, eps
        self.norm = nnx.Param(jnp.ones(width, dtype))
        self.gate = normal(rngs, (width, hidden), stds[0], dtype) if gated else None
        self.up = normal(rngs, (width, hidden), stds[0], dtype)
        self.down = normal(rngs, (hidden, width), stds[1], dtype)

    def __call__(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T D"]:
        """`x` plus the block's result."""
        inner = rms_norm(x, self.norm[...], self.eps)
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return x + project(activate(project(inner, self.up)), self.down)
        return x + project(activate(project(inner, self.gate)) * project(inner, self.up), self.down)
