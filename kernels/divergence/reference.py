"""The definition of KL and entropy, with all logits in memory."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from ..head import Head
from .sums import Divergence


def divergence(
    hidden: Float[Array, "N Dp"],
    head: Head,
    ref_hidden: Float[Array, "N Dr"],
    ref_head: Head,
    *,
    where: Bool[Array, " N"],
) -> Divergence:
    """`fastpref.kernels.divergence`, differentiated by JAX."""
    # Selecting before the product keeps what ignored rows hold, NaN included, out of values and gradients.
    logps, ref_logps = (
        jax.nn.log_softmax(model.whole().logits(jnp.where(where[:, None], states, jnp.zeros_like(states))))
        for states, model in ((hidden, head), (ref_hidden, ref_head))
    )
    probability = jnp.exp(logps)
    # A token without probability adds nothing, whatever its log-probs: 0 · (−inf) is NaN.
    likely = probability > 0
    kl = jnp.sum(probability * jnp.where(likely, logps - ref_logps, 0.0), axis=1)
    entropy = -jnp.sum(probability * jnp.where(likely, logps, 0.0), axis=1)
    return Divergence(jnp.where(where, kl, 0.0), jnp.where(where, entropy, 0.0))
