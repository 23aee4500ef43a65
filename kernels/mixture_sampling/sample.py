"""What a draw returns, and the rules that every implementation of it shares."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

GROUP_SIZE = 512
"""Consecutive token ids that compete as one in the first level of a draw: part of the contract, not a tile size."""


class MixtureSample(NamedTuple):
    """One drawn token per row, and its log-probs in float32."""

    token: Int[Array, " B"]
    """Token ids, int32; −1 for a row without a finite mixture."""
    policy_logp: Float[Array, " B"]
    """log π of the token, at temperature 1, over all V: what the losses take."""
    ref_logp: Float[Array, " B"]
    """log π_ref of the token, at temperature 1, over all V."""
    mixture_logp: Float[Array, " B"]
    """Log-prob that the token was drawn with, at the sampling temperature, over the valid tokens; 0 when greedy."""


def groups_of(vocab: int) -> int:
    """Number of groups, the last of them possibly short."""
    return -(-vocab // GROUP_SIZE)


def mix(
    policy: Float[Array, "..."], ref: Float[Array, "..."], beta: Float[Array, "..."], temperature: float
) -> Float[Array, "..."]:
    """Mixture logits. β = 0 and β = 1 select instead of multiplying, since 0 · (−inf) is NaN."""
    mixed = jnp.where(beta == 0, policy, jnp.where(beta == 1, ref, (1 - beta) * policy + beta * ref))
    return mixed if temperature in (0.0, 1.0) else mixed / temperature
