"""Token log-probs for TPUs: rows that count are brought together, then one kernel makes a pass over them."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ..head import Head
from ..slices import gradient_like, known_or_nan, local_ids, lse_over_slices, sum_over_slices, vary_alike
from ..tiles import Compacted, Tiles, oriented
from ..vmem import UNIT
from . import backward_pass, forward_pass, frozen_pass


def token_logprobs(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    *,
    where: Bool[Array, " N"],
    frozen_head: bool = False,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, " N"]:
    """`fastpref.kernels.token_logprobs`; `tiles` overrides the blocks, `interpret` is Pallas's."""
    run = _frozen if frozen_head else _trained
    logps: Float[Array, " N"] = run(hidden, head, targets, where, tiles, interpret)
    return logps


def forward(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    where: Bool[Array, " N"],
    tiles: Tiles | None,
    interpret: Any,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-prob and log-sum-exp of the rows that count, 0 elsewhere."""
    tiles = replace(tiles, tokens=UNIT) if tiles else forward_pass.forward_tiles(head, hidden.dtype, hidden.shape[0])
    rows = Compacted.of(where, tiles.rows)
    # Here a mask costs nothing: with it XLA gathers and transposes in one pass, without it in two, with a copy between.
    counts = jnp.arange(rows.order.shape[0])[:, None] < rows.total
    states = oriented(jnp.where(counts, rows.take(hidden), 0), head)
    ids = local_ids(head, rows.take(targets))
    states, sliced, ids, count = vary_alike(states, head, ids, rows.total)
    lse, picked = forward_pass.forward(states, sliced, ids, count, tiles, interpret)
    lse, picked = lse_over_slices(head, lse), sum_over_slices(head, picked)
    picked = known_or_nan(head, rows.take(targets), picked)
    return rows.put(picked - lse), rows.put(lse)


def backward(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    where: Bool[Array, " N"],
    lse: Float[Array, " N"],
    coefficients: Float[Array, " N"],
    tiles: Tiles | None,
    interpret: Any,
) -> tuple[Float[Array, "N D"], Array]:
    """Gradients of Σ coefficient · log-prob over the rows that count, in the dtype of what they belong to."""
    tiles = tiles or backward_pass.backward_tiles(head, hidden.shape[0])
    rows = Compacted.of(where, tiles.rows)
    ids, lse = local_ids(head, rows.take(targets)), rows.take(lse)
    coefficients = jnp.where(jnp.arange(ids.shape[0]) < rows.total, rows.take(coefficients), 0.0)
    states, sliced, ids, lse, coefficients, total = vary_alike(
        rows.take(hidden), head, ids, lse, coefficients, rows.total
    )
    in_hidden, in_weight = backward_pass.backward(states, sliced, ids, lse, coefficients, total, tiles, interpret)
    in_hidden = sum_over_slices(head, in_hidden).astype(hidden.dtype)
    # Nothing was written behind the last block with rows that count; `put` leaves that out.
    in_hidden = rows.put(in_hidden)
    return gradient_like(in_hidden, hidden), gradient_like(in_weight, head.weight)


def forward_with_gradient(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    where: Bool[Array, " N"],
    tiles: Tiles | None,
    interpret: Any,
) -> tuple[Float[Array, " N"], Float[Array, "N D"]]:
    """Log-prob of the rows that count, and its gradient in the hidden state, float32: w_target − E[w]."""
    tiles = tiles or frozen_pass.frozen_tiles(head, hidden.dtype, hidden.shape[0])
    rows = Compacted.of(where, tiles.rows)
    states, ids = oriented(rows.take(hidden), head), local_ids(head, rows.take(targets))
    states, sliced, ids, count = vary_alike(states, head, ids, rows.total)
    slice_lse, picked, mean = frozen_pass.frozen(states, sliced, ids, count, tiles, interpret)
    lse, picked = lse_over_slices(head, slice_lse), sum_over_slices(head, picked)
    picked = known_or_nan(head, rows.take(targets), picked)
    # `picked` is behind the soft cap: its slope there is what one unit of log-prob makes of the product.
    slope = jnp.where(ids < 0, 0.0, head.product_gradient(jnp.ones_like(picked), picked))
    ids_here = jnp.clip(ids, 0, head.slice_size - 1)
    place = (ids_here,) if head.vocab_axis == 0 else (slice(None), ids_here)
    chosen = head.weight.at[place].get(mode="promise_in_bounds")
    chosen = (chosen if head.vocab_axis == 0 else chosen.T).astype(jnp.float32)
    if head.scales is not None:
        chosen *= head.scales[ids_here][:, None]
    gradient = slope[:, None] * chosen - jnp.exp(slice_lse - lse)[:, None] * mean
    gradient = rows.put(sum_over_slices(head, gradient).astype(hidden.dtype))
    return rows.put(picked - lse), gradient


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _trained(
    hidden: Array, head: Head, targets: Array, where: Array, tiles: Tiles | None, interpret: Any
) -> Float[Array, " N"]:
    return forward(hidden, head, targets, where, tiles, interpret)[0]


def _trained_forward(
    hidden: Array, head: Head, targets: Array, where: Array, tiles: Tiles | None, interpret: Any
) -> tuple[Array, tuple[Array, Head, Array, Array, Array]]:
    logps, lse = forward(hidden, head, targets, where, tiles, interpret)
    return logps, (hidden, head, targets, where, lse)


def _trained_backward(
    tiles: Tiles | None, interpret: Any, residuals: tuple[Array, Head, Array, Array, Array], cotangent: Array
) -> tuple[Array, Head, None, None]:
    hidden, head, targets, where, lse = residuals
    gradients = backward(hidden, head, targets, where, lse, cotangent, tiles, interpret)
    return gradients[0], head.with_weight(gradients[1]), None, None


_trained.defvjp(_trained_forward, _trained_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _frozen(
    hidden: Array, head: Head, targets: Array, where: Array, tiles: Tiles | None, interpret: Any
) -> Float[Array, " N"]:
    return forward(hidden, head, targets, where, tiles, interpret)[0]


def _frozen_forward(
    hidden: Array, head: Head, targets: Array, where: Array, tiles: Tiles | None, interpret: Any
) -> tuple[Array, tuple[Array, Array]]:
    logps, gradient = forward_with_gradient(hidden, head, targets, where, tiles, interpret)
    return logps, (gradient, hidden[:0])


def _frozen_backward(
    _tiles: Tiles | None, _interpret: Any, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None, None, None]:
    gradient, like = residuals
    in_hidden = (gradient.astype(jnp.float32) * cotangent[:, None]).astype(like.dtype)
    return gradient_like(in_hidden, like), None, None, None


_frozen.defvjp(_frozen_forward, _frozen_backward)
