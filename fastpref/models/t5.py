"""Encoder-decoder language models: T5 v1.1 (gated GELU, its own head) and the original T5 (ReLU, tied head).

The prompt is the encoder's input. The decoder reads the start token and then the completion: its state at position t
predicts completion token t. Attention scores are not scaled; a bias by relative position, shared by all layers of a
stack, is added instead (Raffel et al., 2020).
"""

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
from fastpref.models.attention import Cache, Own, Room, Shared
from fastpref.models.layers import ACTIVATIONS, Attention, FeedForward, Norm, normal, right_padded, scan, stack
from fastpref.models.lowrank import head_arrays
from fastpref.models.masks import Distances, Mask, Masks, cross_mask, packed_mask, padding_mask, prompt_mask
from fastpref.models.policy import hidden_states


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
                raise ValueError(
                    f"{name} must be at least 1, but received {getattr(self, name)}. Give the size of the model."
                )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, but received {self.activation!r}. "
                f"Choose one of them."
            )
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                "buckets must be a multiple of 4 and max_distance above half of it, "
                f"but received {self.buckets} and {self.max_distance}. Use those of the checkpoint."
            )
        if not 0 <= self.start_id < self.vocab_size:
            raise ValueError(
                f"start_id must lie in the vocabulary, 0 to {self.vocab_size - 1}, but received {self.start_id}. "
                f"Choose another."
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
            norm=Norm(config.width, eps=config.norm_eps, dtype=dtype),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "P K T D"],
        *,
        mask: Masks,
        cross: Attention | None = None,
        prompt: Shared | None = None,
        past: Room | None = None,
        slot: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "P K T D"], Shared | Own | Room]:
        """The blocks, with `cross` between them, which reads the prompt, in a decoder; and what attention returns."""
        x, own = self.attention(x, mask, past=past, slot=slot)
        if cross is not None and prompt is not None:
            x = cross.cross(x, prompt, mask.prompt)
        return self.feed_forward(x), own


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
        norm=Norm(width, eps=config.norm_eps, dtype=dtype),
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
        self.layers = stack([T5Layer(config, dtype=dtype, rngs=rngs) for _ in range(count)])
        self.norm = Norm(config.width, eps=config.norm_eps, dtype=dtype)

    def distances(self, size: int, first: Int[Array, ""] | int = 0) -> Distances:
        """Bias of each head by relative position, float32, of streams of `size` tokens; `first` is that of a query."""
        rows = relative_buckets(
            np.arange(1 - size, size + 1),
            bidirectional=not self.decoder,
            buckets=self.config.buckets,
            max_distance=self.config.max_distance,
        )
        return Distances(self.position_bias[...][jnp.asarray(rows)].T.astype(jnp.float32), first)


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
        self.remat = "none"
        self.embedding = normal(rngs, (config.vocab_size, config.width), config.initial_factor, dtype)
        self.encoder = Stack(config, decoder=False, dtype=dtype, rngs=rngs)
        self.decoder = Stack(config, decoder=True, dtype=dtype, rngs=rngs)
        # One for each layer of the decoder: reads the encoder's result between that layer's two blocks.
        self.cross = stack([attention(config, dtype=dtype, rngs=rngs) for _ in range(config.decoder_layers)])
        shape = (config.width, config.vocab_size)
        self.lm_head = None if config.tied else normal(rngs, shape, config.initial_factor, dtype)

    def head(self) -> Head:
        """The map from a hidden state to logits."""
        scale = self.config.width**-0.5 if self.config.scaled_output else 1.0
        if self.lm_head is None:
            return Head(**head_arrays(self.embedding[...]), scale=scale)
        return Head(**head_arrays(self.lm_head[...]), vocab_axis=1, scale=scale)

    def encode(self, tokens: Int[Array, "P S"], mask: Mask) -> Shared:
        """Run the encoder on prompts; return the keys and values that the layers of the decoder read of them."""
        x = self.embedding[...][tokens][:, None]
        own = Masks(mask._replace(distances=self.encoder.distances(tokens.shape[1])))

        def run(layer: T5Layer, x: Array, _: None) -> tuple[Array, None]:
            return layer(x, mask=own)[0], None

        def read(cross: Attention, x: Array, _: None) -> tuple[Array, Shared]:
            return x, Shared.of(cross.keys(x), cross.values(x))

        x, _ = scan(self.encoder.layers, run, x, remat=self.remat)
        prompts: Shared = scan(self.cross, read, self.encoder.norm(x))[1]
        return prompts

    def forward(
        self,
        tokens: Int[Array, "P K T"],
        mask: Masks,
        prompts: Shared,
        past: Own | None = None,
        slot: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "P K T D"], Own | None]:
        """Run the decoder on T tokens of every completion. Positions are places in the stream.

        Args:
          tokens: token ids, shape [P, K, T].
          mask: what they attend to.
          prompts: what `encode` returned.
          past: what was read of every completion before, layers in front; None where nothing is kept.
          slot: place of the first token in `past`.

        Returns:
          The states, shape [P, K, T, D], and `past` with the keys and values of the tokens, if it was given.
        """
        x = self.embedding[...][tokens]
        size = tokens.shape[2] if past is None else past.values.shape[4]
        mask = mask._replace(own=mask.own._replace(distances=self.decoder.distances(size, slot)))

        def run(
            layers: Any, carried: tuple[Array, Own | None], each: tuple[Shared, Array]
        ) -> tuple[tuple[Array, Own | None], None]:
            (x, past), (prompt, number) = carried, each
            room = None if past is None else Room(past, number)
            x, kept = layers["own"](x, mask=mask, cross=layers["cross"], prompt=prompt, past=room, slot=slot)
            return (x, kept.stored if isinstance(kept, Room) else None), None

        layers: Any = nnx.Dict(own=self.decoder.layers, cross=self.cross)
        (x, past), _ = scan(layers, run, (x, past), (prompts, np.arange(self.config.decoder_layers)), remat=self.remat)
        return self.decoder.norm(x), past

    hidden_states = hidden_states
    """Teacher-forced states of completions: the function of this name."""

    def prefill(
        self, tokens: Int[Array, "P S"], mask: Bool[Array, "P S"], *, completions: int = 1, max_new_tokens: int = 0
    ) -> tuple[Int[Array, " P"], Cache]:
        """Read each prompt once; return the token that completions are read from on, and the cache."""
        tokens, lengths = right_padded(tokens, mask)
        prompts = self.encode(tokens, padding_mask(lengths, tokens.shape[1]))
        first = jnp.full_like(lengths, self.config.start_id)
        begin = jnp.zeros_like(lengths)
        return first, Cache.of(prompts, lengths, begin, completions=completions, slots=max_new_tokens)

    def decode(
        self, cache: Cache, tokens: Int[Array, "P K T"], step: Int[Array, ""] | int
    ) -> tuple[Float[Array, "P K T D"], Cache]:
        """Read T tokens of every completion from number `step` on; return the states that predict the next ones."""
        _, mask = cache.reading(tokens.shape[2], step)
        states, written = self.forward(tokens, mask, cache.prompts, cache.completions, step)
        return states, cache if cache.completions is None else cache._replace(completions=written)

    def packed_hidden_states(self, batch: PackedPairs) -> Float[Array, "R L D"]:
        """The states of packed rows; prompts lie in the encoder stream.

        Relative positions are differences of places in the row, for the tokens of a sequence lie next to each other.

        Raises:
          ValueError: the rows have no encoder stream.
        """
        if not batch.prompt_tokens.shape[1]:
            raise ValueError(
                "rows of an encoder-decoder must have an encoder stream, but received some without. "
                "Pack the pairs for an encoder-decoder."
            )
        prompts = self.encode(jnp.asarray(batch.prompt_tokens), prompt_mask(batch))
        masks = Masks(packed_mask(batch), cross_mask(batch))
        return self.forward(jnp.asarray(batch.tokens)[:, None], masks, prompts)[0][:, 0]
