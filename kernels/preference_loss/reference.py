"""The definition of the loss, over any log-probs: those of the reference hold all logits in memory."""

from collections.abc import Callable

import jax
from jax import Array
from jaxtyping import Bool, Float, Int

from ..head import Head
from ..token_logprobs import reference
from .objective import Loss, PreferenceLoss, Problem, sequence_sums


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
    token_logprobs: Callable[..., Float[Array, " N"]] = reference.token_logprobs,
) -> PreferenceLoss:
    """`fastpref.kernels.preference_loss`, differentiated by JAX down to the log-probs of tokens."""
    ref_logps, preference, loss = jax.lax.stop_gradient((ref_logps, preference, loss))
    problem = Problem.of(targets, segment_ids, ref_logps, preference, where, loss)
    logps = token_logprobs(hidden, head, targets, where=problem.counted, frozen_head=frozen_head)
    result = problem.value(sequence_sums(logps, problem.segments, problem.pairs))
    return PreferenceLoss(result.loss, *jax.lax.stop_gradient(result[1:]))
