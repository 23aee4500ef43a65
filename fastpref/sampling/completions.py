"""Completions of a step, with the log-probs that sampling collected.

Shape letters: P prompts, K completions of a prompt, T completion tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int


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


def ended(
    tokens: Int[jax.Array | np.ndarray, "P K T"],
    lengths: Int[jax.Array | np.ndarray, "P K"],
    eos_id: int | Sequence[int] | None,
) -> Bool[np.ndarray, "P K"]:
    """Which completions end with the token, or one of the tokens, that ends them, instead of having been cut off."""
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    last = np.take_along_axis(tokens, np.maximum(lengths[:, :, None] - 1, 0), axis=2)[:, :, 0]
    ends = np.asarray([] if eos_id is None else eos_id, np.int64)
    result: Bool[np.ndarray, "P K"] = np.isin(last, ends) & (lengths > 0)
    return result
