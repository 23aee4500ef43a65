"""What flows through one step, each field with its shape.

Shape letters are those of the README: P prompts (one pair each), K completions of a prompt, S prompt tokens,
T completion tokens. Arrays are padded on the right; a length says how much of a row is real, so that no token id
needs to be reserved for padding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of one step, on the host."""

    tokens: Int[np.ndarray, "P S"]
    """Token ids, int32, padded on the right."""
    lengths: Int[np.ndarray, " P"]
    """Real tokens of each prompt, int32, at least 1."""
    ids: Int[np.ndarray, " P"]
    """Position of each prompt in the source, int64: names it in samples, noise and reports."""

    @property
    def mask(self) -> Bool[np.ndarray, "P S"]:
        """True where a token is real."""
        return np.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None]


@dataclass(frozen=True, slots=True)
class CompletionBatch:
    """Prompts with K recorded completions each, on the host: K is 1 for supervised tuning, 2 for preference pairs."""

    prompt_tokens: Int[np.ndarray, "P S"]
    prompt_lengths: Int[np.ndarray, " P"]
    completion_tokens: Int[np.ndarray, "P K T"]
    """Token ids, int32, padded on the right; a completion that was not truncated ends with its EOS."""
    completion_lengths: Int[np.ndarray, "P K"]
    """Real tokens of each completion, its EOS included, int32."""
    preference: Float[np.ndarray, " P"]
    """Probability that completion 0 beats completion 1, float32; 1 where the source has hard labels."""
    ids: Int[np.ndarray, " P"]


class Completions(NamedTuple):
    """What the sampler wrote, on the device. A completion includes its EOS and nothing after it."""

    tokens: Int[jax.Array, "P K T"]
    """Token ids, int32; 0 past the length."""
    lengths: Int[jax.Array, "P K"]
    """Tokens of each completion, its EOS included, int32; T where it was cut off without one."""
    policy_logps: Float[jax.Array, "P K"]
    """Sum of log π over the completion, at temperature 1, float32."""
    ref_logps: Float[jax.Array, "P K"]
    """Sum of log π_ref over the completion, at temperature 1, float32."""
    mixture_logps: Float[jax.Array, "P K"]
    """Sum of the log-probs that the tokens were drawn with, at the sampling temperature, float32."""

    @property
    def mask(self) -> Bool[jax.Array, "P K T"]:
        """True where a token is real."""
        return jnp.arange(self.tokens.shape[-1])[None, None, :] < self.lengths[:, :, None]


class PairBatch(NamedTuple):
    """Judged pairs, ready for the learner: prompt, two completions in sampled order, and what is known of them."""

    prompt_tokens: Int[jax.Array, "P S"]
    prompt_lengths: Int[jax.Array, " P"]
    completion_tokens: Int[jax.Array, "P 2 T"]
    completion_lengths: Int[jax.Array, "P 2"]
    ref_logps: Float[jax.Array, "P 2"]
    preference: Float[jax.Array, " P"]
    """p(y ≻ y' | x), in [0, 1]."""
    where: Bool[jax.Array, " P"]
    """False for pairs that teach nothing (identical completions): they are counted, not learned from."""


class PackedPairs(NamedTuple):
    """Whole preference pairs packed into rows: host arrays from the packer, traced in the learner.

    R rows of L places of the decoder's stream and S of the encoder's (0 for a decoder-only model), M pairs to a row at
    most, P = R * M slots: slot s of row r is pair r * M + s. On one of several hosts R counts its own rows, and
    `sequences` numbers pairs over all hosts, so that the parts put together are the batch of one host.

    A completion of T tokens y_1 .. y_T to a prompt x_1 .. x_S is scored at T places, whose inputs are
    x_S, y_1 .. y_{T-1}. In a row a pair takes, one after another:

    - "shared" layout: x_1 .. x_{S-1} (stream 0), then the scored places of y (stream 1), then those of y' (stream 2):
      S - 1 + T + T' places.
    - "separate": x_1 .. x_{S-1} and the scored places of y (stream 1), then the same for y' (stream 2):
      2S - 2 + T + T' places.
    - "encoder-decoder": the start token, y_1 .. y_{T-1} (stream 1), the same for y' (stream 2): T + T' places; the
      prompt takes S places of the encoder's stream.

    Place i of a row sees place j of the decoder's stream where both belong to one pair, j <= i, and j's stream is 0 or
    i's own. It sees the encoder's place j where `prompt_pairs[j] == pairs[i]`; encoder places see those of their pair.
    """

    tokens: Int[Array, "R L"]
    """Inputs, int32; 0 where empty."""
    targets: Int[Array, "R L"]
    """The completion token that the state at this place predicts, int32; 0 where there is none."""
    positions: Int[Array, "R L"]
    """Position in its own sequence, int32: prompt token 0 is at 0, and both completions follow the prompt; with an
    encoder-decoder model they begin at 0."""
    pairs: Int[Array, "R L"]
    """Slot within the row, int32; -1 where empty."""
    streams: Int[Array, "R L"]
    """0 for a prompt token that both completions read (and where empty), 1 for y's own, 2 for y''s own, int32."""
    sequences: Int[Array, "R L"]
    """2 * (r * M + s) + k at the scored places of completion k, else -1, int32: `preference_loss`'s segment ids."""
    prompt_tokens: Int[Array, "R S"]
    prompt_positions: Int[Array, "R S"]
    prompt_pairs: Int[Array, "R S"]
    """Slot within the row, int32; -1 where empty."""
    lengths: Int[Array, "P 2"]
    """Completion tokens, int32; 0 in empty slots, and for a second completion that there is none of."""
    preference: Float[Array, " P"]
    """p(y ≻ y' | x), float32; 0 in empty slots."""
    where: Bool[Array, " P"]
    """False for a slot that is empty or teaches nothing."""
    ids: Int[Array, " P"]
    """Name of each pair, int64; -1 in empty slots."""
    ref_logps: Float[Array, "P 2"]
    """Sum of log π_ref over each completion, float32; 0 until it is known."""
