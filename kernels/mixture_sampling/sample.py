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


class Part(NamedTuple):
    """What is known of a draw once all logits of some tokens have been seen."""

    policy_lse: Float[Array, " B"]
    ref_lse: Float[Array, " B"]
    mixture_lse: Float[Array, " B"]
    """Over the valid tokens, at the sampling temperature."""
    score: Float[Array, " B"]
    """Of the best group; −inf where there is none."""
    token: Int[Array, " B"]
    """The token of the best group."""
    policy: Float[Array, " B"]
    """Its logit."""
    ref: Float[Array, " B"]


def finish(part: Part, beta: Float[Array, " B"], temperature: float) -> MixtureSample:
    """The draw, from what is known of all tokens."""
    finite = jnp.isfinite(part.mixture_lse)
    nan = jnp.full_like(part.mixture_lse, jnp.nan)
    if temperature == 0:
        mixture_logp = jnp.zeros_like(nan)
    else:
        mixture_logp = mix(part.policy, part.ref, beta, temperature) - part.mixture_lse
    return MixtureSample(
        token=jnp.where(finite, part.token, -1).astype(jnp.int32),
        policy_logp=jnp.where(finite, part.policy - part.policy_lse, nan),
        ref_logp=jnp.where(finite, part.ref - part.ref_lse, nan),
        mixture_logp=jnp.where(finite, mixture_logp, nan),
    )


def groups_of(vocab: int) -> int:
    """Number of groups, the last of them possibly short."""
    return -(-vocab // GROUP_SIZE)


def mix(
    policy: Float[Array, "..."], ref: Float[Array, "..."], beta: Float[Array, "..."], temperature: float
) -> Float[Array, "..."]:
    """Mixture logits. β = 0 and β = 1 select instead of multiplying, since 0 · (−inf) is NaN."""
    mixed = jnp.where(beta == 0, policy, jnp.where(beta == 1, ref, (1 - beta) * policy + beta * ref))
    return mixed if temperature in (0.0, 1.0) else mixed / temperature
