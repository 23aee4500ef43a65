"""Layers of both model families: norms, projections, attention and feed-forward blocks.

Shape letters: P prompts, K completions of each, T tokens of a stream (S for prompts), D width, N key-value heads,
G query heads per key-value head, H head width. A stream of activations is [P, K, T, D]; a batch of prompts is a stream
with K = 1. Kernels are stored [in, out], so that no step transposes a weight.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from fastpref.models.attention import Own, Room, Shared, attend
from fastpref.models.lowrank import Kernel, product
from fastpref.models.masks import Mask, Masks
from fastpref.models.rope import Rotation

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
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


NORMS = ("rms", "rms+1", "layer")
"""Kinds of `Norm`."""


class Norm(nnx.Module):
    """Norm of the last axis, in float32.

    `rms` divides by the root mean square and multiplies by `scale` (Zhang and Sennrich, 2019); `rms+1` multiplies by
    1 + `scale`, before it returns to the dtype of what it was given (Gemma); `layer` subtracts the mean first, divides
    by the standard deviation, multiplies by `scale` and adds `bias` (Ba et al., 2016).

    Args:
      width: D.
      kind: one of `NORMS`.
      eps: added to the mean square.
      dtype: of the parameters.
    """

    def __init__(self, width: int, *, kind: str = "rms", eps: float, dtype: DTypeLike) -> None:
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param((jnp.zeros if kind == "rms+1" else jnp.ones)(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise each row."""
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = jnp.broadcast_to(self.scale[...], x.shape)
        if self.kind == "rms":
            return wide.astype(x.dtype) * scale
        if self.bias is None:
            return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        bias = jnp.broadcast_to(self.bias[...], x.shape).astype(jnp.float32)
        return (wide * scale.astype(jnp.float32) + bias).astype(x.dtype)


ATTENDED = "attended"
"""The name of what attention read, for policies of what is kept."""
_named: Callable[[Array, str], Array] = checkpoint_name

_POLICIES = jax.checkpoint_policies
REMAT = {
    # Not the scores: of a long row that is taken in blocks, all of them together are the square of its length.
    "none": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(ATTENDED)
    ),
    "layers": _POLICIES.dots_with_no_batch_dims_saveable,
    "all": _POLICIES.nothing_saveable,
}
"""What is kept of a layer besides its input for the gradient, by the setting `remat`.

What is no product costs less to compute again than to keep for every layer of the loop."""


STACKS = ("layers", "cross")
"""Names of modules that are layers of one kind: each parameter in them has an axis of layers in front."""

M = TypeVar("M", bound=nnx.Module)


def layers_in(path: Sequence[Any]) -> int | None:
    """Place in a path of the module whose parameters have an axis of layers; None of other parameters.

    A module of one's own may have layers in a list: a number then follows their name.
    """
    pairs = enumerate(pairwise([*path, ""]))
    return next((at for at, (name, after) in pairs if name in STACKS and not str(after).isdigit()), None)


def stack(layers: Sequence[M]) -> M:
    """Layers of one kind as one module, whose parameters lie on a new first axis, layer by layer."""
    graph = nnx.graphdef(layers[0])
    module: M = nnx.merge(graph, jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(nnx.state, layers)))
    return module


def scan(
    layers: M, run: Callable[[M, Any, Any], tuple[Any, Any]], x: Any, inputs: Any = None, *, remat: str = "none"
) -> tuple[Any, Any]:
    """Run layers one after the other, as one loop over stacked parameters: compiled once, however many they are.

    Args:
      layers: what `stack` returned, or several of them in a dict.
      run: called with a layer, what the layer before returned first, and its own inputs; returns what the next layer is
        called with, and what is kept of this one.
      x: what the first layer is called with.
      inputs: arrays with an axis of layers in front.
      remat: what is computed again for the gradient, a key of `REMAT`.

    Returns:
      What the last layer returned first, and what was kept, with an axis of layers in front.
    """
    graph, state = nnx.split(layers)

    def body(x: Any, each: tuple[Any, Any]) -> tuple[Any, Any]:
        own, own_inputs = each
        return run(nnx.merge(graph, own), x, own_inputs)

    # Within a loop nothing else can be merged with what is computed again.
    return jax.lax.scan(jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False), x, (state, inputs))


def residual(x: Array, result: Array, after: Norm | None, multiplier: float) -> Array:
    """`x` plus the result of a block, normalised and multiplied first where the model does so."""
    result = result if after is None else after(result)
    return x + (result if multiplier == 1 else result * multiplier)


class Attention(nnx.Module):
    """An attention block: its norms and its four projections.

    Args:
      width: D.
      heads: query heads, N·G.
      kv_heads: key-value heads, N.
      head_dim: H.
      stds: standard deviations of the initial q, k, v and o kernels.
      norm: of what the block reads; None reads it as it is.
      after: of the block's result; None adds it as it is.
      q_norm: of the queries, of width H (each head by itself) or N·G·H (all heads at once); None for none.
      k_norm: of the keys, likewise.
      scale: multiplies the scores.
      cap: soft bound of the scores, cap · tanh(score / cap); None for none.
      multiplier: of the result, before it is added.
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
        norm: Norm | None,
        after: Norm | None = None,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        scale: float = 1.0,
        cap: float | None = None,
        multiplier: float = 1.0,
        bias: bool = False,
        output_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.cap, self.multiplier = scale, cap, multiplier
        self.norm, self.after, self.q_norm, self.k_norm = norm, after, q_norm, k_norm
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
        past: Room | None = None,
        slot: Int[Array, ""] | int = 0,
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "P K T D"], Shared | Own | Room]:
        """Let tokens attend to their own stream, and to the prompt under the same softmax.

        Args:
          x: T tokens of every stream.
          mask: what they attend to.
          prompt: what the streams of a prompt share.
          past: room with what was read of every stream before; the keys and values of `x` are written to it.
          slot: place of the first token in `past`.
          rotation: of queries and keys, by their positions.

        Returns:
          `x` plus what was read, and the keys and values of `x`, or the room that they were written to.
        """
        inner = x if self.norm is None else self.norm(x)
        queries, keys = self.queries(inner), self.keys(inner)
        if rotation is not None:
            queries, keys = rotation.turn(queries), rotation.turn(keys)
        own: Shared | Own
        kept: Shared | Own | Room
        if past is None:
            kept = own = (Shared if x.shape[1] == 1 else Own).of(keys, self.values(inner))
        else:
            kept = past.write(Own.of(keys, self.values(inner)), slot)
            own = kept.read()
        shared = () if prompt is None else ((prompt, mask.prompt),)
        return self.merge(x, attend(as_queries(queries), *shared, (own, mask.own), cap=self.cap)), kept

    def cross(self, x: Float[Array, "P K T D"], prompt: Shared, mask: Mask) -> Float[Array, "P K T D"]:
        """`x` plus what its tokens read of the prompt."""
        queries = self.queries(x if self.norm is None else self.norm(x))
        return self.merge(x, attend(as_queries(queries), (prompt, mask), cap=self.cap))

    def queries(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T N G H"]:
        """Query heads, scaled and grouped by the key-value head that they read."""
        shape = (*x.shape[:3], self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        heads = normed_heads(project(x, self.q, self.q_bias), self.q_norm, shape)
        return heads if self.scale == 1 else heads * self.scale

    def keys(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T N H"]:
        """Key heads."""
        shape = (*x.shape[:3], self.kv_heads, self.head_dim)
        return normed_heads(project(x, self.k, self.k_bias), self.k_norm, shape)

    def values(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T N H"]:
        """Value heads."""
        return project(x, self.v, self.v_bias).reshape(*x.shape[:3], self.kv_heads, self.head_dim)

    def merge(self, x: Float[Array, "P K T D"], attended: Float[Array, "P N K G T H"]) -> Float[Array, "P K T D"]:
        """`x` plus the projected heads."""
        attended = _named(attended, ATTENDED)
        flat = attended.transpose(0, 2, 4, 1, 3, 5).reshape(*x.shape[:3], -1)
        return residual(x, project(flat, self.o, self.o_bias), self.after, self.multiplier)


def normed_heads(flat: Float[Array, "P K T I"], norm: Norm | None, shape: tuple[int, ...]) -> Array:
    """Projected heads in their shape: normalised all at once, each by itself, or not at all, by the norm's width."""
    if norm is None:
        return flat.reshape(shape)
    if norm.scale.shape[0] == flat.shape[-1]:
        return norm(flat).reshape(shape)
    heads: Array = norm(flat.reshape(shape))
    return heads


def project(x: Float[Array, "*rows I"], kernel: nnx.Param[Array], bias: nnx.Param[Array] | None = None) -> Array:
    """x @ kernel + bias, in the dtype of the kernel, with the adapters that the kernel has.

    Rows are flattened first: else the gradient of the kernel contracts several axes at once, which XLA turns into a
    transposing copy of the activations on a CPU.
    """
    weight: Kernel = kernel[...]
    result = product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])
    return result if bias is None else result + jnp.broadcast_to(bias[...], result.shape)


def as_queries(heads: Float[Array, "P K T N G H"]) -> Float[Array, "P N K G T H"]:
    """Query heads in the layout of `attend`."""
    return heads.transpose(0, 3, 1, 4, 2, 5)


class FeedForward(nnx.Module):
    """A feed-forward block with its norms: down(act(gate(x)) · up(x)), or down(act(up(x))).

    Args:
      width: D.
      hidden: width inside.
      activation: a key of `ACTIVATIONS`.
      gated: whether there is a gate.
      stds: standard deviations of the initial inner (gate, up) and outer (down) kernels.
      norm: of what the block reads; None reads it as it is.
      after: of the block's result; None adds it as it is.
      multiplier: of the result, before it is added.
      bias: whether the projections add a bias.
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
        norm: Norm | None,
        after: Norm | None = None,
        multiplier: float = 1.0,
        bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation, self.multiplier = activation, multiplier
        self.norm, self.after = norm, after
        self.gate = normal(rngs, (width, hidden), stds[0], dtype) if gated else None
        self.up = normal(rngs, (width, hidden), stds[0], dtype)
        self.down = normal(rngs, (hidden, width), stds[1], dtype)
        self.gate_bias = nnx.Param(jnp.zeros(hidden, dtype)) if bias and gated else None
        self.up_bias = nnx.Param(jnp.zeros(hidden, dtype)) if bias else None
        self.down_bias = nnx.Param(jnp.zeros(width, dtype)) if bias else None

    def __call__(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T D"]:
        """`x` plus the block's result."""
        inner = x if self.norm is None else self.norm(x)
        activate = ACTIVATIONS[self.activation]
        up = project(inner, self.up, self.up_bias)
        middle = activate(up) if self.gate is None else activate(project(inner, self.gate, self.gate_bias)) * up
        return residual(x, project(middle, self.down, self.down_bias), self.after, self.multiplier)
