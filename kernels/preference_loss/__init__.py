"""The contrastive preference loss and its gradients, from hidden states."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Bool, Float, Int

from ..checks import check_fraction, check_frozen, check_length, check_rows
from ..dispatch import Implementation, choose
from ..head import Head
from ..token_logprobs import tpu
from ..vmem import obstacle
from . import fused, reference
from .objective import PreferenceLoss

IMPLEMENTATIONS = {
    "tpu": Implementation(partial(reference.preference_loss, token_logprobs=tpu.token_logprobs), obstacle),
    "xla": Implementation(fused.preference_loss),
    "reference": Implementation(reference.preference_loss),
}


def preference_loss(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    segment_ids: Int[Array, " N"],
    ref_logps: Float[Array, "P 2"],
    preference: Float[Array, " P"],
    *,
    loss: Callable[..., Array],
    where: Bool[Array, " P"] | None = None,
    frozen_head: bool = False,
    implementation: str | None = None,
) -> PreferenceLoss:
    """Mean preference loss of P pairs of completions, from the hidden states of their N tokens.

    Rows of all sequences lie flat, in any order; `segment_ids` says whose they are. No logits outlive their chunk.
    With "xla", where both completions of a pair fit a chunk (a few hundred tokens, depending on V), gradients are taken
    while its logits are alive, so a step costs the three products of ordinary JAX. Longer pairs cost a fourth, which
    makes the logits again, and so does every step with "tpu". Without differentiation it costs one.

    Differentiable once (reverse mode), through the field `loss` alone, in `hidden` and, unless `frozen_head`, in
    `head.weight`. The other fields are reports: their gradient is zero, as is the one in `ref_logps`, `preference`
    and the parameters of `loss`. Gradients have the dtype of what they belong to and are accumulated in float32.

    Args:
      hidden: states, one per scored token, flattened over sequences.
      head: the map to logits. `hidden` has its width and, unless it is in int8, its dtype.
      targets: token ids in [0, V). Those of ignored rows may be anything.
      segment_ids: 2i for a token of completion y of pair i, 2i + 1 for y'; −1 for a row to ignore, which costs nothing.
      ref_logps: sum of log π_ref over y and y' of each pair, nats.
      preference: p(y ≻ y') in [0, 1].
      loss: `loss(log_ratio [P], preference [P]) -> [P]`, elementwise in the log-ratio: `fastpref.losses.bind(ipo,
        tau=0.1)`, any `jax.tree_util.Partial`, whose arrays may be traced, or a plain function.
      where: False for pairs that are not learned from, such as identical completions: exactly no gradient, and out of
        the mean. Their log-probs are still reported; ignore their rows as well to save that.
      frozen_head: no gradient goes to the head, and the step costs two products; True for a head in int8.
      implementation: "tpu", "xla", "reference", or None for the best that runs here.

    Returns:
      The mean loss over the pairs that count (0 where none does), each pair's, the sums of log π, and ρ.

    Raises:
      ValueError: for shapes, dtypes or probabilities that break the rules above.
      NotImplementedError: for an implementation that cannot run here.

    Source: "Human Alignment of Large Language Models through Online Preference Optimisation", section 6.
    """
    check_rows(hidden, head)
    check_frozen(head, frozen_head)
    rows, pairs = hidden.shape[0], preference.shape[0]
    check_length("targets", targets, (rows,), "one id per row of hidden")
    check_length("segment_ids", segment_ids, (rows,), "one id per row of hidden")
    check_length("preference", preference, (pairs,), "one probability per pair")
    check_fraction("preference", preference)
    check_length("ref_logps", ref_logps, (pairs, 2), "one sum per completion of each pair")
    counted = jnp.ones(pairs, bool) if where is None else where
    check_length("where", counted, (pairs,), "one flag per pair")
    run = choose("preference_loss", IMPLEMENTATIONS, implementation)
    # A batch on the host is NumPy's, whose arrays cannot be indexed by what is traced.
    targets, segment_ids, counted = jnp.asarray(targets), jnp.asarray(segment_ids), jnp.asarray(counted)
    if rows == 0:
        hidden, targets = jnp.zeros((1, hidden.shape[1]), hidden.dtype), jnp.zeros(1, jnp.int32)
        segment_ids = jnp.full(1, -1, jnp.int32)
    result: PreferenceLoss = run(
        hidden,
        jax.lax.stop_gradient(head) if frozen_head else head,
        targets,
        segment_ids,
        jnp.asarray(ref_logps, jnp.float32),
        jnp.asarray(preference, jnp.float32),
        loss=loss if isinstance(loss, Partial) else Partial(loss),  # type: ignore[no-untyped-call]
        where=counted,
        frozen_head=frozen_head,
    )
    return PreferenceLoss(result.loss, *jax.lax.stop_gradient(result[1:]))
