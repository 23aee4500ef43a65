"""Encoder-decoder language models: T5 v1.1 (gated GELU, its own head) and the original T5 (ReLU, tied head).

The prompt is the encoder's input. The decoder reads the start token and then the completion: its state at position t
predicts completion token t. Attention scores are not scaled; a bias by relative position, shared by all layers of a
stack, is added instead (Raffel et al., 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from fastpref.data.batches import PackedPairs
from fastpref.kernels import Head
from fastpref.models.layers import (
    ACTIVATIONS,
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
from fastpref.models.packed import attend_rows, cross_visibility, prompt_visibility, sight, visibility


@dataclass(frozen=True, slots=True)
class T5Config:
    """Sizes and options of a `T5`; the defaults are those of v1.1."""

    vocab_size: int
    width: int
    hidden: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    start_id: int = 0
    """The token that the decoder reads first."""
    activation: str = "gelu_new"
    gated: bool = True
    tied: bool = False
    """Whether the head is the embedding."""
    scaled_output: bool = False
    """Whether hidden states are multiplied by D^-0.5 before the head, as tied checkpoints expect."""
    buckets: int = 32
    max_distance: int = 128
    """Relative positions from here on share a bucket."""
    norm_eps: float = 1e-6
    initial_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "hidden", "encoder_layers", "decoder_layers", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}: give the size of the model")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {sorted(ACTIVATIONS)}, not {self.activation!r}: choose one of them")
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                "buckets is a multiple of 4 and max_distance above half of it, "
                f"not {self.buckets} and {self.max_distance}: use those of the checkpoint"
            )
        if not 0 <= self.start_id < self.vocab_size:
            raise ValueError(
                f"start_id lies in the vocabulary, 0 to {self.vocab_size - 1}, not {self.start_id}: choose another"
            )


def relative_buckets(
    distances: Int[np.ndarray, "..."], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[np.ndarray, "..."]:
    """The bias row of each relative position (key minus query): exact when near, logarithmic when far.

    Float32 throughout, as in the original, so that positions on the edge of a bucket fall on the same side.
    """
    offset = np.zeros_like(distances)
    if bidirectional:
        buckets //= 2
        offset = np.where(distances > 0, buckets, 0)
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(distances, exact).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int64)
    return offset + np.where(distances < exact, distances, np.minimum(far, buckets - 1))


def toeplitz(by_distance: Float[Array, "N W"]) -> Float[Array, "N S S"]:
    """The matrix whose entry (i, j) is `by_distance[(j - i) mod W]`, with W = 2·S.

    Rows are shifted by laying copies end to end and cutting them one short: no gather, and no scatter in the gradient.
    """
    heads, wide = by_distance.shape
    size = wide // 2
    laid = jnp.broadcast_to(by_distance[:, None, :], (heads, size, wide)).reshape(heads, size * wide)
    return laid[:, : size * (wide - 1)].reshape(heads, size, wide - 1)[:, :, :size]


class T5Cache(NamedTuple):
    """What decoding has read: the encoder's keys and values once per prompt, completions row by row."""

    lengths: Int[Array, " P"]
    bias: Float[Array, "N W"]
    """Bias of the decoder by slot, reversed and followed by `MASKED`: the biases at one step are a slice of it."""
    prompts: tuple[Shared, ...]
    completions: tuple[Own, ...]


class T5Layer(nnx.Module):
    """One layer of either stack: attention to its own stream, then the feed-forward block."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(
            config.width,
            config.hidden,
            activation=config.activation,
            gated=config.gated,
            stds=(config.initial_factor * config.width**-0.5, config.initial_factor * config.hidden**-0.5),
            eps=config.norm_eps,
            dtype=dtype,
            rngs=rngs,
        )


def attention(config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Attention:
    """A T5 attention block; the missing scale of the scores is in the initial values of q."""
    factor, width, inner = config.initial_factor, config.width, config.heads * config.head_dim
    return Attention(
        width,
        config.heads,
        config.heads,
        config.head_dim,
        stds=(
            factor * (width * config.head_dim) ** -0.5,
            factor * width**-0.5,
            factor * width**-0.5,
            factor * inner**-0.5,
        ),
        eps=config.norm_eps,
        dtype=dtype,
        rngs=rngs,
    )


class Stack(nnx.Module):
    """The layers of an encoder or a decoder, their position bias and their last norm."""

    def __init__(self, config: T5Config, *, decoder: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config, self.decoder = config, decoder
        count = config.decoder_layers if decoder else config.encoder_layers
        std = config.initial_factor * config.width**-0.5
        self.position_bias = normal(rngs, (config.buckets, config.heads), std, dtype)
        self.layers = nnx.List([T5Layer(config, dtype=dtype, rngs=rngs) for _ in range(count)])
        self.norm = nnx.Param(jnp.ones(config.width, dtype))

    def bias(self, distances: Int[np.ndarray, " W"]) -> Float[Array, "N W"]:
        """Bias of each head at each relative position (key minus query), float32."""
        rows = relative_buckets(
            distances,
            bidirectional=not self.decoder,
            buckets=self.config.buckets,
            max_distance=self.config.max_distance,
        )
        return self.position_bias[...][jnp.asarray(rows)].T.astype(jnp.float32)

    def square_bias(self, size: int) -> Float[Array, "1 N 1 1 S S"]:
        """Bias of every query and key of a stream of `size` tokens."""
        wrapped = np.concatenate([np.arange(size), np.arange(-size, 0)])
        return toeplitz(self.bias(wrapped))[None, :, None, None]

    def normalise(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The last norm."""
        return rms_norm(x, self.norm[...], self.config.norm_eps)


class T5(nnx.Module):
    """An encoder-decoder language model: keeps `fastpref.models.Policy`.

    Args:
      config: sizes and options.
      dtype: of the parameters and so of the matrix products; norms, scores and softmax are float32 always.
      rngs: where initial values come from: normal, by the widths and `config.initial_factor`, ones for norms.
    """

    def __init__(self, config: T5Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.decoder_start: int | None = config.start_id
        self.embedding = normal(rngs, (config.vocab_size, config.width), config.initial_factor, dtype)
        self.encoder = Stack(config, decoder=False, dtype=dtype, rngs=rngs)
        self.decoder = Stack(config, decoder=True, dtype=dtype, rngs=rngs)
        # One for each layer of the decoder: reads the encoder's result between that layer's two blocks.
        self.cross = nnx.List([attention(config, dtype=dtype, rngs=rngs) for _ in range(config.decoder_layers)])
        shape = (config.width, config.vocab_size)
        self.lm_head = None if config.tied else normal(rngs, shape, config.initial_factor, dtype)

    def head(self) -> Head:
        """The map from a hidden state to logits."""
        scale = self.config.width**-0.5 if self.config.scaled_output else 1.0
        if self.lm_head is None:
            return Head(self.embedding[...], scale=scale)
        return Head(self.lm_head[...], vocab_axis=1, scale=scale)

    def prefill(
        self, tokens: Int[Array, "P S"], mask: Bool[Array, "P S"], *, completions: int, max_new_tokens: int
    ) -> tuple[Float[Array, "B D"], T5Cache]:
        """Read each prompt once; return the states that predict the first completion token, and the cache."""
        tokens, lengths = compact(tokens, mask)
        prompts = self._read(tokens, padded(padding_bias(lengths, tokens.shape[1])))
        c, p, slots = self.config, tokens.shape[0], max_new_tokens + 1
        later = jnp.full((c.heads, slots - 1), MASKED)
        bias = jnp.concatenate([self.decoder.bias(np.arange(-slots + 1, 1)), later], axis=1)
        dtype = self.embedding[...].dtype
        own = tuple(empty_own(p, c.heads, completions, slots, c.head_dim, dtype) for _ in range(c.decoder_layers))
        start = jnp.full(p * completions, c.start_id, jnp.int32)
        return self._append(T5Cache(lengths, bias, prompts, own), start, 0)

    def decode(
        self, cache: T5Cache, tokens: Int[Array, " B"], step: Int[Array, ""]
    ) -> tuple[Float[Array, "B D"], T5Cache]:
        """Append completion token number `step` (from 0) of every row; return the states that predict the next."""
        return self._append(cache, tokens, step + 1)

    def hidden_states(
        self,
        prompt_tokens: Int[Array, "P S"],
        prompt_mask: Bool[Array, "P S"],
        completion_tokens: Int[Array, "P K T"],
    ) -> Float[Array, "P K T D"]:
        """Teacher-forced states: entry t predicts completion token t from the prompt and tokens before t."""
        tokens, lengths = compact(prompt_tokens, prompt_mask)
        padding = padding_bias(lengths, tokens.shape[1])
        prompts = self._read(tokens, padded(padding))
        first = jnp.full_like(completion_tokens[:, :, :1], self.config.start_id)
        inputs = jnp.concatenate([first, completion_tokens[:, :, :-1]], axis=-1)
        bias = self.decoder.square_bias(inputs.shape[-1]) + causal_bias(inputs.shape[-1])

        def own(queries: Array, keys: Array, values: Array) -> Array:
            return attend(queries, own=as_own(keys, values), own_bias=bias)

        return self._write(inputs, prompts, own, partial(attend, shared_bias=padding))

    def packed_hidden_states(self, batch: PackedPairs) -> Float[Array, "R L D"]:
        """The states of packed rows; prompts lie in the encoder stream.

        Relative positions are differences of places in the row, for the tokens of a sequence lie next to each other.

        Raises:
          ValueError: the rows have no encoder stream.
        """
        if not batch.prompt_tokens.shape[1]:
            raise ValueError(
                "an encoder-decoder reads prompts from the encoder stream, but these rows have none: "
                "pack the pairs for an encoder-decoder"
            )
        prompts = self._read(
            jnp.asarray(batch.prompt_tokens), partial(attend_rows, sight=sight(prompt_visibility(batch)))
        )
        seen, bias = sight(visibility(batch)), self.decoder.square_bias(batch.tokens.shape[1])

        def own(queries: Array, keys: Array, values: Array) -> Array:
            return attend_rows(queries, as_shared(keys, values), seen, bias)

        across = partial(attend_rows, sight=sight(cross_visibility(batch)))
        return self._write(jnp.asarray(batch.tokens)[:, None], prompts, own, across)[:, 0]

    def _read(self, tokens: Int[Array, "P S"], attend: Callable[..., Array]) -> tuple[Shared, ...]:
        """Encode prompts; return the keys and values that each decoder layer reads of them.

        `attend` takes queries, keys with their values, and as `position_bias` what relative positions add to scores.
        """
        x = self.embedding[...][tokens][:, None]
        bias = self.encoder.square_bias(tokens.shape[1])
        for layer in self.encoder.layers:
            inner = layer.attention.normalise(x)
            prompt = as_shared(layer.attention.keys(inner), layer.attention.values(inner))
            queries = as_queries(layer.attention.queries(inner))
            x = layer.feed_forward(layer.attention.merge(x, attend(queries, prompt, position_bias=bias)))
        x = self.encoder.normalise(x)
        return tuple(as_shared(cross.keys(x), cross.values(x)) for cross in self.cross)

    def _write(
        self,
        inputs: Int[Array, "P K T"],
        prompts: tuple[Shared, ...],
        attend_own: Callable[[Array, Array, Array], Array],
        attend_prompt: Callable[[Array, Shared], Array],
    ) -> Float[Array, "P K T D"]:
        """Run the decoder on whole completions; the two functions attend to those that a query may see."""
        x = self.embedding[...][inputs]
        for layer, cross, prompt in zip(self.decoder.layers, self.cross, prompts, strict=True):
            inner = layer.attention.normalise(x)
            queries = as_queries(layer.attention.queries(inner))
            attended = attend_own(queries, layer.attention.keys(inner), layer.attention.values(inner))
            x = read_prompt(cross, layer.attention.merge(x, attended), prompt, attend_prompt)
            x = layer.feed_forward(x)
        return self.decoder.normalise(x)

    def _append(
        self, cache: T5Cache, tokens: Int[Array, " B"], slot: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B D"], T5Cache]:
        """Run the decoder on one token of every row, stored in `slot` of the cache."""
        p, heads, k, slots, _ = cache.completions[0].keys.shape
        x = self.embedding[...][tokens].reshape(p, k, 1, -1)
        read = partial(attend, shared_bias=padding_bias(cache.lengths, cache.prompts[0].keys.shape[-1]))
        bias = jax.lax.dynamic_slice(cache.bias, (0, slots - 1 - slot), (heads, slots))[None, :, None, None, None]
        written = []
        stack = zip(self.decoder.layers, self.cross, cache.prompts, cache.completions, strict=True)
        for layer, cross, prompt, own in stack:
            inner = layer.attention.normalise(x)
            own = own.write(as_own(layer.attention.keys(inner), layer.attention.values(inner)), slot)
            queries = as_queries(layer.attention.queries(inner))
            x = layer.attention.merge(x, attend(queries, own=own, own_bias=bias))
            x = layer.feed_forward(read_prompt(cross, x, prompt, read))
            written.append(own)
        return self.decoder.normalise(x.reshape(p * k, -1)), cache._replace(completions=tuple(written))


def read_prompt(
    cross: Attention, x: Float[Array, "P K T D"], prompt: Shared, attend: Callable[[Array, Shared], Array]
) -> Float[Array, "P K T D"]:
    """`x` plus what its cross-attention reads of the prompt."""
    return cross.merge(x, attend(as_queries(cross.queries(cross.normalise(x))), prompt))


def padded(padding: Float[Array, "P 1 1 1 1 S"]) -> Callable[..., Array]:
    """Attention to prompts of their own rows, padded on the right."""

    def attend_padded(queries: Array, prompt: Shared, *, position_bias: Array) -> Array:
        return attend(queries, prompt, position_bias + padding)

    return attend_padded
