"""Log-probability of every scored token, from hidden states."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ..checks import check_frozen, check_length, check_rows
from ..dispatch import Implementation, choose
from ..head import Head
from ..vmem import obstacle
from . import reference, tpu, xla

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.token_logprobs, obstacle),
    "xla": Implementation(xla.token_logprobs),
    "reference": Implementation(reference.token_logprobs),
}


def token_logprobs(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    *,
    where: Bool[Array, " N"] | None = None,
    frozen_head: bool = False,
    implementation: str | None = None,
) -> Float[Array, " N"]:
    """Log-prob of each target under the softmax of its row's logits, without the [N, V] logits in memory.

    Differentiable once (reverse mode) in `hidden` and, unless `frozen_head`, in `head.weight`; gradients have the
    dtype of what they belong to and are accumulated in float32. Only the log-sum-exp of each row is kept for the
    backward pass, which computes the logits again, a chunk at a time. With `frozen_head` the forward pass also takes
    the expectation of the head's rows under the softmax, and the backward pass is elementwise: two products in all
    instead of three.

    Args:
      hidden: states, one per scored token, flattened over sequences.
      head: the map to logits. `hidden` has its width and, unless it is in int8, its dtype.
      targets: token ids in [0, V). Those of ignored rows may be anything.
      where: False for rows to ignore: they cost nothing, their value is 0 and their gradient is 0, whatever they hold.
      frozen_head: no gradient goes to the head; True for a head in int8.
      implementation: "tpu", "xla", "reference", or None for the best that runs here.

    Returns:
      Log-probs in nats, float32; 0 for ignored rows.

    Raises:
      ValueError: for shapes or dtypes that do not fit.
      NotImplementedError: for an implementation that cannot run here.
    """
    check_rows(hidden, head)
    check_frozen(head, frozen_head)
    rows = hidden.shape[0]
    check_length("targets", targets, (rows,), "one id per row of hidden")
    active = jnp.ones(rows, bool) if where is None else where
    check_length("where", active, (rows,), "one flag per row of hidden")
    run = choose("token_logprobs", IMPLEMENTATIONS, implementation)
    if rows == 0:
        return jnp.zeros(0, jnp.float32)
    result: Float[Array, " N"] = run(
        hidden, jax.lax.stop_gradient(head) if frozen_head else head, targets, where=active, frozen_head=frozen_head
    )
    return result
