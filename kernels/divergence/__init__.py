"""Exact KL to a reference and entropy of the policy at every place, from hidden states."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from ..checks import check_heads, check_length, check_rows
from ..dispatch import Implementation, choose
from ..head import Head
from ..vmem import obstacle
from . import reference, tpu, xla
from .sums import Divergence

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.divergence, obstacle),
    "xla": Implementation(xla.divergence),
    "reference": Implementation(reference.divergence),
}


def divergence(
    hidden: Float[Array, "N Dp"],
    head: Head,
    ref_hidden: Float[Array, "N Dr"],
    ref_head: Head,
    *,
    where: Bool[Array, " N"] | None = None,
    implementation: str | None = None,
) -> Divergence:
    """KL(π ‖ π_ref) and entropy of π under the softmaxes of each row's logits, without an [N, V] array in memory.

    The sum over the vocabulary is exact, up to float32: no draw, no estimate. Along completions that π wrote, the sum
    of `kl` has the mean of log π(y) − log π_ref(y), with each token's draw integrated out.

    KL is accurate to a few 10⁻⁷ of 1 + KL for logits as they are, also where both models are near; equal logits give
    exactly 0. KL cannot be negative: what rounding leaves below 0, no more than that accuracy, is cut off here. A token
    that π cannot draw adds nothing; one that only π can draw makes KL infinite. If both heads hold the same weight
    array and use it alike, it is read once.

    A measurement: differentiating raises, except with `implementation="reference"`, which keeps all logits.

    Args:
      hidden: states of the policy, one per place, flattened over sequences.
      head: head of the policy, V rows. `hidden` has its width and dtype.
      ref_hidden: states of the reference at the same places; its width and dtype may differ.
      ref_head: head of the reference, V rows as well.
      where: False for rows to ignore: they cost nothing and both values are 0, whatever they hold.
      implementation: "tpu", "xla", "reference", or None for the best that runs here.

    Returns:
      KL and entropy of each row, in nats, float32. NaN for a row of either model without a finite logit.

    Raises:
      ValueError: for shapes or dtypes that do not fit.
      NotImplementedError: for an implementation that cannot run here, and for a derivative.
    """
    check_rows(hidden, head)
    check_rows(ref_hidden, ref_head, "ref_hidden")
    check_heads(head, ref_head)
    rows = hidden.shape[0]
    check_length("ref_hidden", ref_hidden, (rows, ref_head.width), "the rows of hidden")
    counted = jnp.ones(rows, bool) if where is None else jnp.asarray(where)
    check_length("where", counted, (rows,), "one flag per row of hidden")
    run = choose("divergence", IMPLEMENTATIONS, implementation)
    if rows == 0:
        return Divergence(jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.float32))
    result: Divergence = run(hidden, head, ref_hidden, ref_head, where=counted)
    return Divergence(jnp.maximum(result.kl, 0.0), result.entropy)
