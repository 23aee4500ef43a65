"""Preference losses as functions of the sequence log-ratio, each with its equation.

ρ = log π(y)π_ref(y') − log π(y')π_ref(y) is `log_ratio`, from sums of token log-probs. Every loss here is elementwise:
`loss(log_ratio: [P], preference: [P], *, tau) -> [P]`, the soft-label form p·L(y, y') + (1 − p)·L(y', y) of
"Human Alignment of Large Language Models through Online Preference Optimisation" (section 6; hereafter IPO-MD).
Bind τ with `bind(loss, tau=...)`: the result is a pytree, so τ may be a traced value and follow a schedule
without a new compilation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

Loss = Callable[..., Float[Array, " P"]]


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


def bind(loss: Loss, *, tau: float | Float[Array, ""]) -> Partial:
    """`loss` with τ fixed, as a pytree that `kernels.preference_loss` takes."""
    bound: Partial = Partial(loss, tau=jnp.asarray(tau, jnp.float32))  # type: ignore[no-untyped-call]
    return bound
