"""Completions of a step, with the log-probs that sampling collected.

Shape letters: P prompts, K completions of a prompt, T completion tokens.
"""

from typing import NamedTuple

import jax
from jaxtyping import Float, Int


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
