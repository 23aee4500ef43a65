"""What both model families are made of: norms, projections, feed-forward blocks and one attention function.

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

MASKED = -1e30
"""Added to a score that must not count: finite, so that no gradient is NaN."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Shared(NamedTuple):
    """Keys and values of a prompt, read by all K completions of it."""

    keys: Float[Array, "P N H S"]
    values: Float[Array, "P N S H"]


class Own(NamedTuple):
    """Keys and values of each completion, read by itself alone."""

    keys: Float[Array, "P N K T H"]
    values: Float[Array, "P N K T H"]

    def write(self, new: "Own", slot: Int[Array, ""] | int) -> "Own":
        """The cache with `new` stored from token `slot` on."""
        start = (0, 0, 0, slot, 0)
        return Own(*(jax.lax.dynamic_update_slice(old, x, start) for old, x in zip(self, new, strict=True)))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> nnx.Param[Array]:
    """A parameter drawn from a normal distribution."""
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * std).astype(dtype))


def compact(tokens: Int[Array, "P S"], mask: Bool[Array, "P S"]) -> tuple[Int[Array, "P S"], Int[Array, " P"]]:
    """Move the real tokens of each row to its front, in order, and count them.

    After this every prompt is padded on the right alone, whatever it was before: the same numbers come out of left,
    right and middle padding, and positions are one shared range.
    """
    _, front = jax.lax.sort((~mask, tokens), num_keys=1, is_stable=True)
    return front, mask.sum(-1, dtype=jnp.int32)


def padding_bias(lengths: Int[Array, " P"], size: int) -> Float[Array, "P 1 1 1 1 S"]:
    """0 for the first `lengths` keys of each prompt, `MASKED` for the rest."""
    bias = jnp.where(jnp.arange(size)[None, :] < lengths[:, None], 0.0, MASKED)
    return bias[:, None, None, None, None, :]


def causal_bias(size: int) -> Float[Array, "1 1 1 1 T T"]:
    """0 where the key is not after the query, `MASKED` elsewhere."""
    return jnp.where(jnp.tri(size, dtype=bool), 0.0, MASKED)[None, None, None, None]


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """Divide each row by its root mean square, in float32, and scale it; no mean is subtracted."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * jnp.broadcast_to(scale, x.shape)


def attend(
    queries: Float[Array, "P N K G T H"],
    shared: Shared | None = None,
    shared_bias: Float[Array, "#P #N 1 1 #T S"] | Float[Array, "#P #N 1 1 #T #S"] | None = None,
    own: Own | None = None,
    own_bias: Float[Array, "#P #N 1 1 #T U"] | None = None,
) -> Float[Array, "P N K G T H"]:
    """Softmax attention of every query to the prompt's keys, its completion's own keys, or both under one softmax.

    Scores, softmax and sums are float32; the products take their operands as they are. Queries come scaled. Prompt keys
    are met by the queries of all completions in one product and never repeated.

    Args:
      queries: scaled queries, shape [P, N, K, G, T, H].
      shared: the prompt's keys and values, S tokens.
      shared_bias: added to the scores of the prompt's keys.
      own: each completion's keys and values, U tokens.
      own_bias: added to the scores of those.

    Returns:
      The attended values, shape [P, N, K, G, T, H], in the dtype of the queries.
    """
    p, n, k, g, t, h = queries.shape
    scores = []
    if shared is not None:
        product = partial(jnp.einsum, "pnmh,pnhs->pnms", preferred_element_type=jnp.float32)
        scores.append(product(queries.reshape(p, n, k * g * t, h), shared.keys).reshape(p, n, k, g, t, -1))
        if shared_bias is not None:
            scores[-1] += shared_bias
    if own is not None:
        product = partial(jnp.einsum, "pnkmh,pnkuh->pnkmu", preferred_element_type=jnp.float32)
        scores.append(product(queries.reshape(p, n, k, g * t, h), own.keys).reshape(p, n, k, g, t, -1))
        if own_bias is not None:
            scores[-1] += own_bias
    top = partial(jnp.max, axis=-1, keepdims=True)
    peak = jax.lax.stop_gradient(top(scores[0]) if len(scores) == 1 else jnp.maximum(top(scores[0]), top(scores[1])))
    weights = [jnp.exp(score - peak) for score in scores]
    total = weights[0].sum(-1, keepdims=True)
    if len(weights) == 2:
        total += weights[1].sum(-1, keepdims=True)
    # The division comes last: it costs H numbers a query where normalised weights would cost S + U.
    mixed = []
    if shared is not None:
        flat = weights[0].astype(queries.dtype).reshape(p, n, k * g * t, -1)
        product = partial(jnp.einsum, "pnms,pnsh->pnmh", preferred_element_type=jnp.float32)
        mixed.append(product(flat, shared.values).reshape(queries.shape))
    if own is not None:
        flat = weights[-1].astype(queries.dtype).reshape(p, n, k, g * t, -1)
        product = partial(jnp.einsum, "pnkmu,pnkuh->pnkmh", preferred_element_type=jnp.float32)
        mixed.append(product(flat, own.values).reshape(queries.shape))
    out = mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]
    return (out / total).astype(queries.dtype)


class Attention(nnx.Module):
    """The norm before an attention block, and its four projections.

    Args:
      width: D.
      heads: query heads, N·G.
      kv_heads: key-value heads, N.
      head_dim: H.
      stds: standard deviations of the initial q, k, v and o kernels.
      eps: added to the mean square in the norm.
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
        bias: bool = False,
        output_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, eps
        self.norm = nnx.Param(jnp.ones(width, dtype))
        self.q = normal(rngs, (width, heads * head_dim), stds[0], dtype)
        self.k = normal(rngs, (width, kv_heads * head_dim), stds[1], dtype)
        self.v = normal(rngs, (width, kv_heads * head_dim), stds[2], dtype)
        self.o = normal(rngs, (heads * head_dim, width), stds[3], dtype)
        self.q_bias = nnx.Param(jnp.zeros(heads * head_dim, dtype)) if bias else None
        self.k_bias = nnx.Param(jnp.zeros(kv_heads * head_dim, dtype)) if bias else None
        self.v_bias = nnx.Param(jnp.zeros(kv_heads * head_dim, dtype)) if bias else None
        self.o_bias = nnx.Param(jnp.zeros(width, dtype)) if output_bias else None

    def normalise(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T D"]:
        """What the projections of this block read."""
        return rms_norm(x, self.norm[...], self.eps)

    def queries(self, x: Float[Array, "P K T D"]) -> Float[Array, "P K T N G H"]:
        """Query heads, grouped by the key-value head that they read."""
        flat = project(x, self.q, self.q_bias)
        return flat.reshape(*x.shape[:3], self.kv_heads, self.heads // self.kv_heads, self.head_dim)

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


def as_shared(keys: Float[Array, "P 1 S N H"], values: Float[Array, "P 1 S N H"]) -> Shared:
    """Heads of a prompt in the layout of `attend`."""
    return Shared(keys[:, 0].transpose(0, 2, 3, 1), values[:, 0].transpose(0, 2, 1, 3))


def as_own(keys: Float[Array, "P K T N H"], values: Float[Array, "P K T N H"]) -> Own:
    """Heads of completions in the layout of `attend`."""
    return Own(keys.transpose(0, 3, 1, 2, 4), values.transpose(0, 3, 1, 2, 4))


def empty_own(p: int, n: int, k: int, slots: int, h: int, dtype: DTypeLike) -> Own:
    """A cache of completions with room for `slots` tokens each."""
    return Own(jnp.zeros((p, n, k, slots, h), dtype), jnp.zeros((p, n, k, slots, h), dtype))


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
