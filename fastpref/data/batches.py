"""What flows through one step, each field with its shape.

Shape letters are those of the README: P prompts (one pair each), K completions of a prompt, S prompt tokens,
T completion tokens. Arrays are padded on the right; a length says how much of a row is real, so that no token id
needs to be reserved for padding.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray
Rows = TypeVar("Rows", jax.Array, np.ndarray)


def token_mask(lengths: Int[Rows, "*rows"], size: int) -> Bool[Rows, "*rows T"]:
    """True at the real tokens of rows padded on the right: at the first `lengths` of `size`."""
    mask: Rows = lengths[..., None] > np.arange(size, dtype=np.int32).reshape((1,) * lengths.ndim + (size,))
    return mask


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of one step, on the host."""

    tokens: Int[np.ndarray, "P S"]
    """Token ids, int32, padded on the right."""
    lengths: Int[np.ndarray, " P"]
    """Real tokens of each prompt, int32, at least 1."""
    ids: Int[np.ndarray, " P"]
    """Position of each prompt in the source, int64: names it in samples, noise and reports."""


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


class PackedPairs(NamedTuple):
    """Judged pairs laid out in R rows of fixed length, several to a row: no place is spent on padding a completion.

    A row has L places for the (decoder) stream and S for the encoder stream, 0 in a decoder-only model. It has M slots:
    pair number r·M + s of the batch, P = R·M of them, lies in slot s of row r, prompt and both completions. Slots may
    be empty. The tokens of a sequence lie next to each other, in order.

    A completion of T tokens is scored at T places, whose inputs are the last prompt token and the completion without
    its last. In a decoder-only model a pair of completions shares the rest of its prompt (stream 0: S − 1 + T + T'
    places), or each reads the whole prompt by itself (no stream 0: 2S − 2 + T + T' places). In an encoder-decoder the
    first input is the decoder's start token instead, and the prompt of at least one token is in the encoder stream.

    Place i of a row sees place j if both belong to the same pair, j is not after i, and j is shared or of the same
    completion: pairs[i] == pairs[j] ≥ 0, j ≤ i, streams[j] ∈ {0, streams[i]}. It sees place j of the encoder stream
    if prompt_pairs[j] == pairs[i]; places of the encoder stream see each other if their prompt_pairs agree.

    The packer gives host arrays, which the learner traces. On one of several hosts R counts its own rows, and
    `sequences` numbers pairs over all hosts, so that the parts put together are the batch of one host.
    """

    tokens: Int[Array, "R L"]
    """Inputs of the decoder stream, int32; 0 where empty."""
    targets: Int[Array, "R L"]
    """The completion token that the state at a place predicts, int32; 0 where none."""
    positions: Int[Array, "R L"]
    """Position of the token in its own sequence, int32: prompt token 0 is 0, a completion goes on where its prompt ends
    (from 0 in an encoder-decoder)."""
    pairs: Int[Array, "R L"]
    """Slot of the pair within the row, int32, 0 to M − 1; −1 where empty."""
    streams: Int[Array, "R L"]
    """0: prompt, read by both completions; 1: belongs to y alone; 2: to y' alone; 0 where empty. int32."""
    sequences: Int[Array, "R L"]
    """Segment id for `kernels.preference_loss`, int32: 2·(r·M + s) + k where completion k is scored, else −1."""
    prompt_tokens: Int[Array, "R S"]
    """Inputs of the encoder stream, int32; 0 where empty."""
    prompt_positions: Int[Array, "R S"]
    """Position of the token in its prompt, int32."""
    prompt_pairs: Int[Array, "R S"]
    """Slot of the pair within the row, int32; −1 where empty."""
    lengths: Int[Array, "P 2"]
    """Tokens of each completion, int32; 0 in empty slots, and second where only y is learned from."""
    preference: Float[Array, " P"]
    """p(y ≻ y' | x), in [0, 1]."""
    where: Bool[Array, " P"]
    """False for empty slots and for pairs that teach nothing."""
    ids: Int[Array, " P"]
    """Names the pair in its source, int64; −1 in empty slots."""
    ref_logps: Float[Array, "P 2"]
    """What log π is compared with, float32: log π_ref, log π_t or their weighted sum; zeros until scored."""
    scores: Float[Array, "P 2"]
    """For losses of single completions, float32: p − ½, the reward, or the win rate − ½ of each; else 0."""
