"""Decoder-only language models in Llama's layout: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from fastpref.data.batches import PackedPairs
from fastpref.kernels import Head
from fastpref.models.layers import (
    MASKED,
    Attention,
    FeedForward,
    Own,
    Shared,
    as_own,
    as_queries,
    as_shared,
    attend,
    causal_bias,
    compact,
    empty_own,
    normal,
    padding_bias,
    rms_norm,
)
from fastpref.models.packed import attend_rows, sight, visibility


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those first trained on.

    `linear` divides every frequency by `factor`. `llama3` divides the low ones, keeps the high ones and interpolates
    between; its three further numbers say where (Llama 3.1).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling is 'linear' or 'llama3', not {self.kind!r}: use a checkpoint with either")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and options of a `Decoder`; the defaults are Llama's."""

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    """Whether the head is the embedding."""
    attention_bias: bool = False
    """Whether q, k and v add a bias (Qwen2)."""
    output_bias: bool = False
    """Whether the attention's output projection adds a bias."""
    initial_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "hidden", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}: give the size of the model")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is a multiple of kv_heads, but {self.heads} is none of {self.kv_heads}: change either"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is even for rotary positions, not {self.head_dim}: change it")


def inverse_frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    """Radians that each pair of a head turns per position, shape [H / 2], float32."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequency = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:
        turns = scaling.original_max_positions * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    return frequency.astype(np.float32)


class Rotation(NamedTuple):
    """Cosines and sines of the tokens of a stream; P is 1 where all prompts share their positions."""

    cos: Float[Array, "P 1 T half"]
    sin: Float[Array, "P 1 T half"]

    def turn(self, heads: Float[Array, "P K T *heads H"]) -> Float[Array, "P K T *heads H"]:
        """Rotate the two halves of every head, in float32."""
        cos, sin = (jnp.expand_dims(table, tuple(range(3, heads.ndim - 1))) for table in self)
        first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(heads.dtype)


class DecoderCache(NamedTuple):
    """What decoding has read: prompts once each, completions row by row."""

    lengths: Int[Array, " P"]
    prompts: tuple[Shared, ...]
    completions: tuple[Own, ...]


class DecoderLayer(nnx.Module):
    """One layer: attention, then the feed-forward block, each with its norm and its residual."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        std = config.initial_std
        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            config.head_dim,
            stds=(std, std, std, std),
            eps=config.norm_eps,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.feed_forward = FeedForward(
            config.width,
            config.hidden,
            activation="silu",
            gated=True,
            stds=(std, std),
            eps=config.norm_eps,
            dtype=dtype,
            rngs=rngs,
        )

    def project(
        self, x: Float[Array, "P K T D"], rotation: Rotation
    ) -> tuple[Float[Array, "P N K G T H"], Float[Array, "P K T N H"], Float[Array, "P K T N H"]]:
        """Scaled queries, and the keys and values of `x`."""
        inner = self.attention.normalise(x)
        queries = rotation.turn(self.attention.queries(inner) * self.attention.head_dim**-0.5)
        return as_queries(queries), rotation.turn(self.attention.keys(inner)), self.attention.values(inner)

    def finish(self, x: Float[Array, "P K T D"], attended: Float[Array, "P N K G T H"]) -> Float[Array, "P K T D"]:
        """The rest of the layer."""
        return self.feed_forward(self.attention.merge(x, attended))


class Decoder(nnx.Module):
    """A decoder-only language model: keeps `fastpref.models.Policy`.

    Args:
      config: sizes and options.
      dtype: of the parameters and so of the matrix products; norms, scores and softmax are float32 always.
      rngs: where initial values come from: normal with `config.initial_std`, ones for norms, zeros for biases.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.decoder_start: int | None = None
        self.embedding = normal(rngs, (config.vocab_size, config.width), config.initial_std, dtype)
        self.layers = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.Param(jnp.ones(config.width, dtype))
        shape = (config.width, config.vocab_size)
        self.lm_head = None if config.tied else normal(rngs, shape, config.initial_std, dtype)

    def head(self) -> Head:
        """The map from a hidden state to logits."""
        return Head(self.embedding[...]) if self.lm_head is None else Head(self.lm_head[...], vocab_axis=1)

    def prefill(
        self, tokens: Int[Array, "P S"], mask: Bool[Array, "P S"], *, completions: int, max_new_tokens: int
    ) -> tuple[Float[Array, "B D"], DecoderCache]:
        """Read each prompt once; return the states that predict the first completion token, and the cache."""
        tokens, lengths = compact(tokens, mask)
        x, prompts = self._read(tokens)
        last = jnp.take_along_axis(x[:, 0], lengths[:, None, None] - 1, axis=1)[:, 0]
        c, p = self.config, tokens.shape[0]
        own = tuple(empty_own(p, c.kv_heads, completions, max_new_tokens, c.head_dim, x.dtype) for _ in range(c.layers))
        states = jnp.repeat(self._normalise(last), completions, axis=0)
        return states, DecoderCache(lengths, prompts, own)

    def decode(
        self, cache: DecoderCache, tokens: Int[Array, " B"], step: Int[Array, ""]
    ) -> tuple[Float[Array, "B D"], DecoderCache]:
        """Append completion token number `step` (from 0) of every row; return the states that predict the next."""
        p, _, k, slots, _ = cache.completions[0].keys.shape
        x = self.embedding[...][tokens].reshape(p, k, 1, -1)
        rotation = self._rotation((cache.lengths + step)[:, None])
        shared_bias = padding_bias(cache.lengths, cache.prompts[0].keys.shape[-1])
        own_bias = jnp.where(jnp.arange(slots) <= step, 0.0, MASKED)[None, None, None, None, None]
        written = []
        for layer, shared, own in zip(self.layers, cache.prompts, cache.completions, strict=True):
            queries, keys, values = layer.project(x, rotation)
            own = own.write(as_own(keys, values), step)
            x = layer.finish(x, attend(queries, shared, shared_bias, own, own_bias))
            written.append(own)
        return self._normalise(x.reshape(p * k, -1)), cache._replace(completions=tuple(written))

    def hidden_states(
        self,
        prompt_tokens: Int[Array, "P S"],
        prompt_mask: Bool[Array, "P S"],
        completion_tokens: Int[Array, "P K T"],
    ) -> Float[Array, "P K T D"]:
        """Teacher-forced states: entry t predicts completion token t from the prompt and tokens before t."""
        tokens, lengths = compact(prompt_tokens, prompt_mask)
        _, prompts = self._read(tokens)
        # A completion is read from the prompt's last token on: its state predicts the first completion token.
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, :, None]
        first = jnp.broadcast_to(last, (*completion_tokens.shape[:2], 1))
        inputs = jnp.concatenate([first, completion_tokens[:, :, :-1]], axis=-1)
        x = self.embedding[...][inputs]
        size = inputs.shape[-1]
        rotation = self._rotation(lengths[:, None] - 1 + jnp.arange(size)[None, :])
        shared_bias = padding_bias(lengths - 1, tokens.shape[1])
        own_bias = causal_bias(size)
        for layer, shared in zip(self.layers, prompts, strict=True):
            queries, keys, values = layer.project(x, rotation)
            x = layer.finish(x, attend(queries, shared, shared_bias, as_own(keys, values), own_bias))
        return self._normalise(x)

    def packed_hidden_states(self, batch: PackedPairs) -> Float[Array, "R L D"]:
        """The states of packed rows; prompts lie in the decoder stream, shared or not.

        Raises:
          ValueError: the rows have an encoder stream.
        """
        if batch.prompt_tokens.shape[1]:
            raise ValueError(
                "a decoder-only model reads rows without an encoder stream, but this one has "
                f"{batch.prompt_tokens.shape[1]} places: pack the pairs for a decoder-only model"
            )
        tokens, positions = jnp.asarray(batch.tokens), jnp.asarray(batch.positions)
        x, _ = self._run(tokens, positions, partial(attend_rows, sight=sight(visibility(batch))))
        return self._normalise(x[:, 0])

    def _read(self, tokens: Int[Array, "P S"]) -> tuple[Float[Array, "P 1 S D"], tuple[Shared, ...]]:
        """Run prompts padded on the right; causality keeps padding out of every real token's state."""
        positions, bias = jnp.arange(tokens.shape[1])[None, :], causal_bias(tokens.shape[1])
        return self._run(tokens, positions, partial(attend, shared_bias=bias))

    def _run(
        self, tokens: Int[Array, "P S"], positions: Int[Array, "#P S"], attend: Callable[[Array, Shared], Array]
    ) -> tuple[Float[Array, "P 1 S D"], tuple[Shared, ...]]:
        """Run single streams; return their states before the last norm, and the keys and values of each layer."""
        x = self.embedding[...][tokens][:, None]
        rotation = self._rotation(positions)
        read = []
        for layer in self.layers:
            queries, keys, values = layer.project(x, rotation)
            read.append(as_shared(keys, values))
            x = layer.finish(x, attend(queries, read[-1]))
        return x, tuple(read)

    def _rotation(self, positions: Int[Array, "P T"]) -> Rotation:
        angles = positions.astype(jnp.float32)[:, None, :, None] * inverse_frequencies(self.config)[None, None, None, :]
        return Rotation(jnp.cos(angles), jnp.sin(angles))

    def _normalise(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return rms_norm(x, self.norm[...], self.config.norm_eps)
