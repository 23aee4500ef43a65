"""Decoder-only language models: one decoder, whose configuration says in what families differ.

Attention and feed-forward blocks alternate, each with norms and a residual. Positions are rotary or learned, attention
is grouped, over all of the text or over a window of it.
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
from fastpref.models.layers import (
    ACTIVATIONS,
    NORMS,
    Attention,
    FeedForward,
    Norm,
    normal,
    right_padded,
    scan,
    stack,
)
from fastpref.models.lowrank import head_arrays
from fastpref.models.masks import Masks, Places, causal_mask, packed_mask
from fastpref.models.policy import check_length, hidden_states
from fastpref.models.rope import RopeScaling, Rotation


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
    feed_forward_bias: bool = False
    """Whether the projections of the feed-forward blocks add a bias."""
    activation: str = "silu"
    gated: bool = True
    """Whether the feed-forward blocks have a gate."""
    norm: str = "rms"
    """The kind of all norms, one of `layers.NORMS`."""
    norms: str = "before"
    """Where blocks normalise: "before", "after" (OLMo 2) or "both" (Gemma 2)."""
    qk_norm: str | None = None
    """Norms of queries and keys: of each "head" (Qwen3), of their whole "width" (OLMo 2), or None."""
    window: int | None = None
    """Positions that a query of a local layer attends to, back from its own."""
    local: tuple[int, ...] = ()
    """Numbers of the layers with that window."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies of local layers, not scaled (Gemma 3); None for those of the others."""
    unrotated: tuple[int, ...] = ()
    """Numbers of the layers without rotary positions (SmolLM3)."""
    rotary_dim: int | None = None
    """Entries of a head that are rotated, the first ones; None for all."""
    learned_positions: bool = False
    """Whether learned positions are added to the embedding, in the place of rotary ones (GPT-2)."""
    max_positions: int | None = None
    """Tokens of the longest sequence that the positions are made for, where there is a limit."""
    embedding_scale: float = 1.0
    """Multiplies embeddings, not the head that is tied to them."""
    residual_scale: float = 1.0
    """Multiplies the result of every block (Granite)."""
    attention_scale: float | None = None
    """Multiplies attention scores; None for head_dim^-0.5."""
    attention_cap: float | None = None
    """Soft bound of attention scores (Gemma 2)."""
    logit_scale: float = 1.0
    logit_cap: float | None = None
    """Soft bound of logits (Gemma 2)."""

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
        if self.head_dim % 2 and not self.learned_positions:
            raise ValueError(f"head_dim must be even for rotary positions, but received {self.head_dim}. Change it.")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"rotary_dim must be even and at most head_dim, {self.head_dim}, but received {self.rotary_dim}. "
                "Change it."
            )
        for name, choices in {
            "activation": tuple(ACTIVATIONS),
            "norm": NORMS,
            "norms": ("before", "after", "both"),
            "qk_norm": (None, "head", "width"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {choices}, but received {getattr(self, name)!r}. Choose one of them."
                )
        if bool(self.local) != (self.window is not None) or (self.window is not None and self.window < 1):
            raise ValueError(
                "window must be at least 1 where layers are local, and None where none is, but received "
                f"{self.window} with {len(self.local)} local layers. Set both, or neither."
            )
        if strangers := sorted({*self.local, *self.unrotated} - set(range(self.layers))):
            raise ValueError(
                f"local and unrotated must hold numbers below {self.layers}, the number of layers, but received "
                f"{strangers[0]}. Count layers from 0."
            )
        if self.learned_positions and self.max_positions is None:
            raise ValueError(
                "max_positions must come with learned_positions, but received None. Say how many there are."
            )


class DecoderLayer(nnx.Module):
    """One layer: attention, then the feed-forward block, each with its norms and its residual."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        std, head_dim = config.initial_std, config.head_dim

        def norm(width: int) -> Norm:
            return Norm(width, kind=config.norm, eps=config.norm_eps, dtype=dtype)

        def head_norm(heads: int) -> Norm | None:
            return None if config.qk_norm is None else norm(head_dim * (heads if config.qk_norm == "width" else 1))

        def block_norms() -> dict[str, Any]:
            return {
                "norm": None if config.norms == "after" else norm(config.width),
                "after": None if config.norms == "before" else norm(config.width),
                "multiplier": config.residual_scale,
            }

        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            head_dim,
            stds=(std, std, std, std),
            q_norm=head_norm(config.heads),
            k_norm=head_norm(config.kv_heads),
            scale=head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
            cap=config.attention_cap,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            dtype=dtype,
            rngs=rngs,
            **block_norms(),
        )
        self.feed_forward = FeedForward(
            config.width,
            config.hidden,
            activation=config.activation,
            gated=config.gated,
            stds=(std, std),
            bias=config.feed_forward_bias,
            dtype=dtype,
            rngs=rngs,
            **block_norms(),
        )

    def __call__(
        self,
        x: Float[Array, "P K T D"],
        *,
        mask: Masks,
        prompt: Shared | None,
        past: Room | None,
        slot: Int[Array, ""] | int,
        rotation: Rotation | None,
    ) -> tuple[Float[Array, "P K T D"], Shared | Own | Room]:
        """Both blocks; the arguments and the second result are those of `Attention`."""
        x, own = self.attention(x, mask, prompt=prompt, past=past, slot=slot, rotation=rotation)
        return self.feed_forward(x), own


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
        self.remat = "none"
        self.embedding = normal(rngs, (config.vocab_size, config.width), config.initial_std, dtype)
        places = (config.max_positions or 0, config.width)
        self.positions = normal(rngs, places, config.initial_std, dtype) if config.learned_positions else None
        self.layers = stack([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = Norm(config.width, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        shape = (config.width, config.vocab_size)
        self.lm_head = None if config.tied else normal(rngs, shape, config.initial_std, dtype)

    def head(self) -> Head:
        """The map from a hidden state to logits."""
        logits: dict[str, Any] = {"scale": self.config.logit_scale, "soft_cap": self.config.logit_cap}
        if self.lm_head is None:
            return Head(**head_arrays(self.embedding[...]), **logits)
        return Head(**head_arrays(self.lm_head[...]), vocab_axis=1, **logits)

    def forward(
        self,
        tokens: Int[Array, "P K T"],
        positions: Int[Array, "#P #K T"],
        mask: Masks,
        prompts: Shared | None = None,
        past: Own | None = None,
        slot: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "P K T D"], Any]:
        """Run the layers on T tokens of every stream.

        Args:
          tokens: token ids, shape [P, K, T].
          positions: of the tokens in their sequences.
          mask: what they attend to.
          prompts: keys and values that the K streams share, layers in front; None where there are none.
          past: what was read of every stream before, layers in front; None where nothing is kept.
          slot: place of the first token in `past`.

        Returns:
          The states, shape [P, K, T, D], and `past` with the keys and values of the tokens, or these alone.
        """
        config = self.config
        x = self.embedding[...][tokens]
        x = x if config.embedding_scale == 1 else x * config.embedding_scale
        if self.positions is not None:
            # A position beyond the last is no number, so that it cannot go unseen.
            x = x + self.positions[...].at[positions].get(mode="fill", fill_value=jnp.nan)
        numbers = np.arange(config.layers)
        local, unrotated = np.isin(numbers, config.local), np.isin(numbers, config.unrotated)
        all_masks, all_rotations = self._masks(mask), self._rotations(positions)

        def run(
            layer: DecoderLayer, carried: tuple[Array, Own | None], each: tuple[Shared | None, Array, Array, Array]
        ) -> tuple[tuple[Array, Own | None], Any]:
            (x, past), (prompt, number, local, unrotated) = carried, each
            masks, rotation = chosen(all_masks, local), chosen(all_rotations, local)
            if rotation is not None and config.unrotated:
                rotation = rotation.off(unrotated)
            room = None if past is None else Room(past, number)
            x, kept = layer(x, mask=masks, prompt=prompt, past=room, slot=slot, rotation=rotation)
            return ((x, kept.stored), None) if isinstance(kept, Room) else ((x, None), kept)

        inputs = (prompts, numbers, local, unrotated)
        (x, past), written = scan(self.layers, run, (x, past), inputs, remat=self.remat)
        return self.norm(x), written if past is None else past

    hidden_states = hidden_states
    """Teacher-forced states of completions: the function of this name."""

    def prefill(
        self, tokens: Int[Array, "P S"], mask: Bool[Array, "P S"], *, completions: int = 1, max_new_tokens: int = 0
    ) -> tuple[Int[Array, " P"], Cache]:
        """Read each prompt once; return the token that completions are read from on, its last, and the cache.

        Raises:
          ModelError: prompts and completions are longer than the model's positions.
        """
        check_length(self, tokens.shape[1] + max_new_tokens - 1)
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
        size = cache.prompts.values.shape[3]
        check_length(self, size + tokens.shape[2] - 1)
        if self.config.local:
            keys = mask.prompt.keys._replace(positions=jnp.arange(size)[None, None])
            mask = mask._replace(prompt=mask.prompt._replace(queries=Places(positions), keys=keys))
        states, written = self.forward(tokens, positions, mask, cache.prompts, cache.completions, step)
        return states, cache if cache.completions is None else cache._replace(completions=written)

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

    def _masks(self, mask: Masks) -> tuple[Masks, Masks | None]:
        """Of the layers that attend to all positions, and of the local ones, where there are both."""
        config = self.config
        if config.window is None:
            return mask, None
        near = mask.within(config.window)
        return (near, None) if len(config.local) == config.layers else (mask, near)

    def _rotations(self, positions: Int[Array, "#P #K T"]) -> tuple[Rotation | None, Rotation | None]:
        """Of the layers that attend to all positions, and of the local ones, where these have their own."""
        config = self.config
        if config.learned_positions:
            return None, None
        size = config.head_dim if config.rotary_dim is None else config.rotary_dim
        rotation = Rotation.of(positions, size, config.rope_theta, config.rope_scaling)
        if config.max_positions is not None:
            rotation = rotation.until(positions, config.max_positions)
        local = config.local_rope_theta
        return rotation, None if local is None else Rotation.of(positions, size, local)


def chosen(kinds: tuple[Any, Any], local: Bool[Array, ""]) -> Any:
    """Of the two that `_masks` or `_rotations` returned, that of a layer."""
    usual, near = kinds
    return usual if near is None else usual.chosen(local, near)
