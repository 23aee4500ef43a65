"""The protocol that a language model keeps to be sampled from and trained here."""

from typing import Any, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Bool, Float, Int

from fastpref.data.batches import PackedPairs
from fastpref.kernels import Head

Cache = Any
"""A pytree of keys and values; its layout belongs to the model."""


@runtime_checkable
class Policy(Protocol):
    """A Flax NNX module that writes completions to prompts.

    B = P·K rows are decoded at once, the K completions of a prompt next to each other. Prompts may be padded
    anywhere (left, right or between): positions count real tokens only, and padding changes no result.
    """

    vocab_size: int
    """Rows of the head, V. The tokenizer may use fewer."""
    decoder_start: int | None
    """First input of the decoder of an encoder-decoder, None in other models: decides the layout of packed rows."""

    def prefill(
        self, tokens: Int[Array, "P S"], mask: Bool[Array, "P S"], *, completions: int, max_new_tokens: int
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read each prompt once; return the hidden states that predict the first completion token, and the cache.

        The K completions of a prompt share its keys and values: the cache stores them per prompt, not per row.
        """
        ...

    def decode(self, cache: Cache, tokens: Int[Array, " B"], step: Int[Array, ""]) -> tuple[Float[Array, "B D"], Cache]:
        """Append completion token number `step` (from 0) of every row; return the states that predict the next."""
        ...

    def hidden_states(
        self,
        prompt_tokens: Int[Array, "P S"],
        prompt_mask: Bool[Array, "P S"],
        completion_tokens: Int[Array, "P K T"],
    ) -> Float[Array, "P K T D"]:
        """Teacher-forced states: entry t predicts completion token t from the prompt and tokens before t.

        The prompt is read once for its K completions, which do not see each other. Differentiable.
        """
        ...

    def packed_hidden_states(self, batch: PackedPairs) -> Float[Array, "R L D"]:
        """The same states for packed rows: entry [r, i] predicts `batch.targets[r, i]` wherever that is scored.

        What is read is the tokens at their `positions`, and place i of a row sees place j if both belong to the same
        pair, j is not after i, and j is shared by the completions or of the same one: pairs[i] == pairs[j] ≥ 0, j ≤ i,
        streams[j] ∈ {0, streams[i]} (`models.packed.visibility`). In an encoder-decoder, place i reads place j of the
        encoder stream if prompt_pairs[j] == pairs[i], and the encoder's places see each other where prompt_pairs agree
        (`cross_visibility`, `prompt_visibility`). States of places that are not scored may be anything finite.
        Differentiable.
        """
        ...

    def head(self) -> Head:
        """The map from a hidden state to logits, in the form that the kernels take."""
        ...
