"""The definition of a token's log-prob, with all logits in memory."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ..head import Head


def token_logprobs(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    *,
    where: Bool[Array, " N"],
    frozen_head: bool = False,
) -> Float[Array, " N"]:
    """`fastpref.kernels.token_logprobs`, differentiated by JAX."""
    if frozen_head:
        head = jax.lax.stop_gradient(head)
    # Selecting before the product keeps what ignored rows hold, NaN included, out of values and gradients.
    hidden = jnp.where(where[:, None], hidden, jnp.zeros_like(hidden))
    targets = jnp.where(where, targets, 0)
    logps = jnp.take_along_axis(jax.nn.log_softmax(head.whole().logits(hidden)), targets[:, None], axis=1)[:, 0]
    return jnp.where(where, logps, 0.0)
