"""The protocol that a language model keeps to be sampled from and trained here."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from fastpref.data.batches import PackedPairs
from fastpref.kernels import Head
from fastpref.method.errors import ModelError

Cache = Any
"""A pytree of keys and values; its layout belongs to the model."""


@runtime_checkable
class Policy(Protocol):
    """A Flax NNX module that writes completions to prompts.

    K completions of each of P prompts are decoded at once. Prompts may be padded anywhere (left, right or between):
    positions count real tokens only, and padding changes no result.
    """

    vocab_size: int
    """Rows of the head, V. The tokenizer may use fewer."""
    decoder_start: int | None
    """First input of the decoder of an encoder-decoder, None in other models: decides the layout of packed rows."""

    def prefill(
        self, tokens: Int[Array, "P S"], mask: Bool[Array, "P S"], *, completions: int = 1, max_new_tokens: int = 0
    ) -> tuple[Int[Array, " P"], Cache]:
        """Read each prompt once, for K completions that share its keys and values: stored per prompt, not per row.

        Returns:
          The first input of each prompt's completions (its own last token, or the start token of an encoder-decoder),
          and the cache, with room for `max_new_tokens` inputs of each completion; for none, `decode` keeps nothing.
        """
        ...

    def decode(
        self, cache: Cache, tokens: Int[Array, "P K T"], step: Int[Array, ""] | int
    ) -> tuple[Float[Array, "P K T D"], Cache]:
        """Read T inputs of every completion, of which the first is number `step`, and keep them in the cache.

        Entry [p, k, t] of the states predicts completion token `step` + t from the prompt and the tokens before it:
        input 0 is what `prefill` returned, input n is completion token n − 1. Completions do not attend to each other.
        Differentiable.
        """
        ...

    def packed_hidden_states(self, batch: PackedPairs) -> Float[Array, "R L D"]:
        """The same states for packed rows: entry [r, i] predicts `batch.targets[r, i]` wherever that is scored.

        The inputs are the tokens at their `positions`, and place i of a row attends to place j if both belong to the
        same pair, j is not after i, and j is shared by the completions or of the same one: pairs[i] == pairs[j] ≥ 0,
        j ≤ i, streams[j] ∈ {0, streams[i]} (`models.masks.packed_mask`). In an encoder-decoder, place i attends to
        place j of the encoder stream if prompt_pairs[j] == pairs[i], and the encoder's places to each other where
        prompt_pairs agree (`cross_mask`, `prompt_mask`). States of places that are not scored may be anything finite.
        Differentiable.
        """
        ...

    def head(self) -> Head:
        """The map from a hidden state to logits, in the form that the kernels take."""
        ...


def hidden_states(
    policy: Policy,
    prompt_tokens: Int[Array, "P S"],
    prompt_mask: Bool[Array, "P S"],
    completion_tokens: Int[Array, "P K T"],
) -> Float[Array, "P K T D"]:
    """Teacher-forced states: entry t predicts completion token t from the prompt and tokens before t. Differentiable.

    Args:
      policy: any model that keeps the protocol.
      prompt_tokens: token ids, shape [P, S]; each prompt is read once for its K completions.
      prompt_mask: True where a token is real, shape [P, S]; padding may stand anywhere.
      completion_tokens: token ids, shape [P, K, T], padded on the right.
    """
    first, cache = policy.prefill(prompt_tokens, prompt_mask)
    inputs = jnp.broadcast_to(first[:, None, None], (*completion_tokens.shape[:2], 1))
    inputs = jnp.concatenate([inputs, completion_tokens[:, :, :-1]], axis=-1)
    return policy.decode(cache, inputs, 0)[0]


def position_limit(policy: Policy) -> int | None:
    """The most inputs of a sequence that a model has positions for; None for any number."""
    limit: int | None = getattr(getattr(policy, "config", None), "max_positions", None)
    return limit


def check_length(policy: Policy, tokens: int) -> None:
    """Raise ModelError where a model has no positions for a sequence of so many inputs."""
    limit = position_limit(policy)
    if limit is not None and tokens > limit:
        raise ModelError(
            f"prompts and completions of this model must be at most {limit} tokens together, the positions that its "
            f"config.json gives frequencies or vectors for, but received room for {tokens}. Lower max_prompt_tokens "
            "or max_new_tokens (max_completion_tokens)."
        )
