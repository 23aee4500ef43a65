"""Losses as functions of sequence log-probs, each with its equation.

Two forms. *Contrastive* losses are elementwise in ρ = log π(y)π_ref(y') − log π(y')π_ref(y), `log_ratio`, from sums of
token log-probs: `loss(log_ratio: [P], preference: [P], *, tau) -> [P]`, the soft-label form
p·L(y, y') + (1 − p)·L(y', y) of "Human Alignment of Large Language Models through Online Preference Optimisation"
(section 6; hereafter IPO-MD). Losses *of single completions* compare none: `loss(policy_logps, anchor_logps, scores, *,
tau)`, elementwise, where the anchor is the frozen model (or the weighted combination of two) that ρ is taken against.
Bind τ with `bind(loss, tau=...)`: the result is a pytree, so τ may be a traced value and follow a schedule
without a new compilation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

Loss = Callable[..., Array]


class Objective(NamedTuple):
    """What the learner computes of a batch: a loss, and how it reads it."""

    loss: Loss
    contrastive: bool = True
    """Whether `loss` is elementwise in ρ; else it is of single completions."""
    alone: bool = False
    """Whether y is learned from without y'."""


def bradley_terry(margin: Float[Array, " N"], preference: Float[Array, " N"]) -> Float[Array, " N"]:
    """Cross-entropy of σ(margin) with a soft label: −p·log σ(m) − (1 − p)·log σ(−m), shape [N] (IPO-MD, eq. 2)."""
    return -preference * jax.nn.log_sigmoid(margin) - (1 - preference) * jax.nn.log_sigmoid(-margin)


def ipo(log_ratio: Float[Array, " P"], preference: Float[Array, " P"], *, tau: float | Float[Array, ""]) -> Array:
    """Squared distance of ρ from its target: p·(ρ − 1/2τ)² + (1 − p)·(ρ + 1/2τ)².

    Equal to (ρ − (p − ½)/τ)² plus a constant in ρ. Source: IPO eq. 17, IPO-MD section 6.

    Args:
      log_ratio: ρ, shape [P], nats.
      preference: p(y ≻ y'), shape [P], in [0, 1].
      tau: strength of the regularisation towards the reference, above 0.

    Returns:
      The loss of each pair, shape [P].
    """
    target = 1 / (2 * jnp.asarray(tau, log_ratio.dtype))
    return preference * (log_ratio - target) ** 2 + (1 - preference) * (log_ratio + target) ** 2


def dpo(log_ratio: Float[Array, " P"], preference: Float[Array, " P"], *, tau: float | Float[Array, ""]) -> Array:
    """Negative log-likelihood of a Bradley-Terry model: −p·log σ(τρ) − (1 − p)·log σ(−τρ).

    Source: IPO-MD section 2 prints it without the logarithm and the sign; this is the loss of Rafailov et al. (2023).

    Args:
      log_ratio: ρ, shape [P], nats.
      preference: p(y ≻ y'), shape [P], in [0, 1].
      tau: strength of the regularisation towards the reference, above 0.

    Returns:
      The loss of each pair, shape [P].
    """
    scaled = jnp.asarray(tau, log_ratio.dtype) * log_ratio
    return -preference * jax.nn.log_sigmoid(scaled) - (1 - preference) * jax.nn.log_sigmoid(-scaled)


def slic(log_ratio: Float[Array, " P"], preference: Float[Array, " P"], *, tau: float | Float[Array, ""]) -> Array:
    """Hinge: p·max(0, 1 − τρ) + (1 − p)·max(0, 1 + τρ).

    Source: IPO-MD section 2, after Zhao et al. (2023).

    Args:
      log_ratio: ρ, shape [P], nats.
      preference: p(y ≻ y'), shape [P], in [0, 1].
      tau: strength of the regularisation towards the reference, above 0.

    Returns:
      The loss of each pair, shape [P].
    """
    scaled = jnp.asarray(tau, log_ratio.dtype) * log_ratio
    return preference * jax.nn.relu(1 - scaled) + (1 - preference) * jax.nn.relu(1 + scaled)


def policy_gradient(
    policy_logps: Float[Array, "*S"],
    anchor_logps: Float[Array, "*S"],
    scores: Float[Array, "*S"],
    *,
    tau: float | Float[Array, ""],
) -> Array:
    """Regularised policy gradient, over whole sequences: −sg(s − τ·log π(y)/π_ref(y))·log π(y), sg: no gradient.

    Nash-MD-PG has s = p(y ≻ y') − ½ (IPO-MD section 2.6, Munos et al. 2023), RL has s = r(y), with a baseline if any
    (IPO-MD section 6). There the paper prints τ·KL(π, π_ref) in place of the log-ratio, which read as it stands is a
    constant in y and would not regularise; the log-ratio is what makes eq. 3 the fixed point.

    Args:
      policy_logps: log π(y), sums over tokens, any shape, nats.
      anchor_logps: log π_ref(y), the same shape.
      scores: s of each completion.
      tau: strength of the regularisation towards the reference, above 0.

    Returns:
      The loss of each completion. Its gradient is that of the objective; its value is not.
    """
    weight = scores - jnp.asarray(tau, policy_logps.dtype) * (policy_logps - anchor_logps)
    return -jax.lax.stop_gradient(weight) * policy_logps


def sppo(
    policy_logps: Float[Array, "*S"],
    anchor_logps: Float[Array, "*S"],
    scores: Float[Array, "*S"],
    *,
    tau: float | Float[Array, ""],
) -> Array:
    """Squared distance of a completion's log-ratio from its win rate: (log π(y)/π_t(y) − (p(y ≻ π_t) − ½)/η)².

    The log of INPO's eq. 5 without its reference (τ = 0), the normaliser taken as ½/η. INPO sections 3.4 and 4.1 and
    appendix B describe it, after Wu et al. (2024), whose η is 1/η here.

    Args:
      policy_logps: log π(y), sums over tokens, any shape, nats.
      anchor_logps: log π_t(y), the same shape.
      scores: p(y ≻ π_t) − ½ of each completion, estimated.
      tau: η, above 0.

    Returns:
      The loss of each completion.
    """
    return (policy_logps - anchor_logps - scores / jnp.asarray(tau, policy_logps.dtype)) ** 2


def bind(loss: Loss, *, tau: float | Float[Array, ""]) -> Partial:
    """`loss` with τ fixed, as a pytree that `kernels.preference_loss` takes."""
    bound: Partial = Partial(loss, tau=jnp.asarray(tau, jnp.float32))  # type: ignore[no-untyped-call]
    return bound
