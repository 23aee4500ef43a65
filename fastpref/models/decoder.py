"""Decoder-only language models in Llama's layout: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from fastpref.data.batches import PackedPairs
from fastpref.kernels import Head
from fastpref.models.attention import Cache, Own, Shared
from fastpref.models.layers import Attention, FeedForward, Rotation, normal, right_padded, rms_norm
from fastpref.models.masks import Masks, causal_mask, packed_mask


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
            raise ValueError(
                f"rope scaling must be 'linear' or 'llama3', but received {self.kind!r}. Use a checkpoint with either."
            )


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
                raise ValueError(
                    f"{name} must be at least 1, but received {getattr(self, name)}. Give the size of the model."
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, but received {self.heads} and {self.kv_heads}. Change either."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, but received {self.head_dim}. Change it.")


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
            scale=config.head_dim**-0.5,
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

    def forward(
        self,
        tokens: Int[Array, "P K T"],
        positions: Int[Array, "#P #K T"],
        mask: Masks,
        prompts: tuple[Shared, ...] = (),
        past: tuple[Own, ...] = (),
        slot: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "P K T D"], tuple[Any, ...]]:
        """Run the layers on T tokens of every stream.

        Args:
          tokens: token ids, shape [P, K, T].
          positions: of the tokens in their sequences.
          mask: what they attend to.
          prompts: keys and values that the K streams share, of each layer; empty where there are none.
          past: what was read of every stream before, of each layer; empty where nothing is kept.
          slot: place of the first token in `past`.

        Returns:
          The states, shape [P, K, T, D], and the keys and values of the streams, of each layer.
        """
        x = self.embedding[...][tokens]
        rotation = self._rotation(positions)
        none, written = (None,) * len(self.layers), []
        for layer, prompt, before in zip(self.layers, prompts or none, past or none, strict=True):
            x, own = layer.attention(x, mask, prompt=prompt, past=before, slot=slot, rotation=rotation)
            x = layer.feed_forward(x)
            written.append(own)
        return rms_norm(x, self.norm[...], self.config.norm_eps), tuple(written)

    def prefill(
        self, tokens: Int[Array, "P S"], mask: Bool[Array, "P S"], *, completions: int = 1, max_new_tokens: int = 0
    ) -> tuple[Int[Array, " P"], Cache]:
        """Read each prompt once; return the token that completions are read from on, its last, and the cache."""
        tokens, lengths = right_padded(tokens, mask)
        # Causality keeps padding out of the state of every real token.
        size = tokens.shape[1]
        _, prompts = self.forward(tokens[:, None], jnp.arange(size)[None, None], Masks(causal_mask(size)))
        last = lengths - 1
        first = jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0]
        return first, Cache.of(prompts, last, last, completions=completions, slots=max_new_tokens)

    def decode(
        self, cache: Cache, tokens: Int[Array, "P K T"], step: Int[Array, ""] | int
    ) -> tuple[Float[Array, "P K T D"], Cache]:
        """Read T tokens of every completion from number `step` on; return the states that predict the next ones."""
        positions, mask = cache.reading(tokens.shape[2], step)
        states, written = self.forward(tokens, positions, mask, cache.prompts, cache.completions, step)
        return states, cache._replace(completions=written) if cache.completions else cache

    def packed_hidden_states(self, batch: PackedPairs) -> Float[Array, "R L D"]:
        """The states of packed rows; prompts lie in the decoder stream, shared or not.

        Raises:
          ValueError: the rows have an encoder stream.
        """
        if batch.prompt_tokens.shape[1]:
            raise ValueError(
                "rows of a decoder-only model must have no encoder stream, but received "
                f"{batch.prompt_tokens.shape[1]} places of it. Pack the pairs for a decoder-only model."
            )
        tokens, positions = (jnp.asarray(x)[:, None] for x in (batch.tokens, batch.positions))
        return self.forward(tokens, positions, Masks(packed_mask(batch)))[0][:, 0]

    def _rotation(self, positions: Int[Array, "#P #K T"]) -> Rotation:
        angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(self.config)[None, None, None]
        return Rotation(jnp.cos(angles), jnp.sin(angles))
