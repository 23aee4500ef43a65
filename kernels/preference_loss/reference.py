"""The definition of the loss, with all logits in memory."""

import jax
from fastpref.kernels.head import Head
from fastpref.kernels.preference_loss.objective import Loss, PreferenceLoss, objective, sequence_sums
from fastpref.kernels.token_logprobs.reference import token_logprobs
from jax import Array
from jaxtyping import Bool, Float, Int


def preference_loss(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    segment_ids: Int[Array, " N"],
    ref_logps: Float[Array, "P 2"],
    preference: Float[Array, " P"],
    *,
    loss: Loss,
    where: Bool[Array, " P"],
    frozen_head: bool = False,
) -> PreferenceLoss:
    """`fastpref.kernels.preference_loss`, differentiated by JAX."""
    pairs = preference.shape[0]
    counted = (segment_ids >= 0) & (segment_ids < 2 * pairs)
    logps = token_logprobs(hidden, head, targets, where=counted, frozen_head=frozen_head)
    sums = sequence_sums(logps, segment_ids, pairs)
    ref_logps, preference, loss = jax.lax.stop_gradient((ref_logps, preference, loss))
    return objective(sums, ref_logps, preference, where, loss)
