"""Token log-probs for CPUs and GPUs: chunks of rows, never more than one chunk of logits alive."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from ..chunks import Rows, chunk_index, chunk_rows, compact, over_chunks, put
from ..head import Head
from ..slices import (
    axes_of,
    gradient_like,
    known_or_nan,
    local_ids,
    lse_over_slices,
    sum_over_slices,
    vary,
    vary_alike,
)

_WEIGHT_TILES = 4
"""Slices in which a chunk's gradient of the weight is formed, so that a second whole weight is never alive."""


def token_logprobs(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    *,
    where: Bool[Array, " N"],
    frozen_head: bool = False,
    chunk: int | None = None,
) -> Float[Array, " N"]:
    """`fastpref.kernels.token_logprobs` for every backend; `chunk` overrides the rows of a chunk."""
    # Devices of a split vocabulary meet once, after all chunks: the gradient needs the sums of all of them first.
    run = _frozen if frozen_head and head.mesh_axis is None else _trained
    return run(hidden, head, targets, where, chunk_rows(hidden.shape[0], head.slice_size, chunk))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _trained(
    hidden: Float[Array, "N D"], head: Head, targets: Int[Array, " N"], where: Bool[Array, " N"], chunk: int
) -> Float[Array, " N"]:
    return forward(hidden, head, targets, compact(where, chunk), chunk)[0]


def _trained_forward(
    hidden: Array, head: Head, targets: Array, where: Array, chunk: int
) -> tuple[Array, tuple[Array, Head, Array, Array, Array]]:
    logps, lse = forward(hidden, head, targets, compact(where, chunk), chunk)
    return logps, (hidden, head, targets, where, lse)


def _trained_backward(
    chunk: int, residuals: tuple[Array, Head, Array, Array, Array], cotangent: Array
) -> tuple[Array, Head | None, None, None]:
    hidden, head, targets, where, lse = residuals
    like, axes = hidden, axes_of(residuals, cotangent)
    hidden, head, targets, where, lse, cotangent = vary((*residuals, cotangent), axes)
    dtype = hidden.dtype if head.mesh_axis is None else jnp.float32
    # None, a tree without arrays, where the head is in int8.
    total = None if head.scales is not None else jnp.zeros(head.weight.shape, jnp.float32)
    zeros = vary((jnp.zeros(hidden.shape, dtype), total), axes)
    in_hidden, in_weight = backward(hidden, head, targets, lse, cotangent, compact(where, chunk), chunk, zeros)
    in_hidden = gradient_like(sum_over_slices(head, in_hidden), like).astype(hidden.dtype)
    if in_weight is None:
        return in_hidden, None, None, None
    in_weight = gradient_like(in_weight, residuals[1].weight).astype(head.weight.dtype)
    return in_hidden, head.with_weight(in_weight), None, None


_trained.defvjp(_trained_forward, _trained_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _frozen(
    hidden: Float[Array, "N D"], head: Head, targets: Int[Array, " N"], where: Bool[Array, " N"], chunk: int
) -> Float[Array, " N"]:
    return forward(hidden, head, targets, compact(where, chunk), chunk)[0]


def _frozen_forward(
    hidden: Array, head: Head, targets: Array, where: Array, chunk: int
) -> tuple[Array, tuple[Array, Array]]:
    logps, gradient = forward_with_gradient(hidden, head, targets, compact(where, chunk), chunk)
    return logps, (gradient, jnp.zeros(0, hidden.dtype))


def _frozen_backward(chunk: int, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None, None]:
    gradient, like = residuals
    return (gradient * cotangent[:, None]).astype(like.dtype), None, None, None


_frozen.defvjp(_frozen_forward, _frozen_backward)


def forward(
    hidden: Float[Array, "N D"], head: Head, targets: Int[Array, " N"], rows: Rows, chunk: int
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-prob and log-sum-exp of the rows that count, 0 elsewhere. One product."""
    counted = put(
        jnp.zeros(hidden.shape[0], bool),
        rows.order,
        jnp.arange(rows.order.shape[0]) < rows.total,
        jnp.ones(rows.order.shape[0], bool),
    )
    known = targets
    hidden, head, targets, rows = vary_alike(hidden, head, targets, rows)

    def step(start: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        index, live = chunk_index(rows, start, chunk)
        picked, lse = chosen_logits(head, head.logits(hidden[index]), targets[index])
        return put(results[0], index, live, picked), put(results[1], index, live, lse)

    zeros = vary(jnp.zeros(hidden.shape[0], jnp.float32), axes_of(hidden))
    picked, lse = over_chunks(rows, chunk, step, (zeros, zeros))
    if head.mesh_axis is None:
        return picked - lse, lse
    lse = lse_over_slices(head, lse)
    logps = known_or_nan(head, known, sum_over_slices(head, picked)) - lse
    return jnp.where(counted, logps, 0.0), lse


def forward_with_gradient(
    hidden: Float[Array, "N D"], head: Head, targets: Int[Array, " N"], rows: Rows, chunk: int
) -> tuple[Float[Array, " N"], Float[Array, "N D"]]:
    """Log-prob, and its gradient in the hidden state (float32), of the rows that count. Two products.

    The gradient is w_target − E[w] with w the head's rows, E the mean under the softmax (weighted by the slope of
    the soft cap where there is one).
    """

    def step(start: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        index, live = chunk_index(rows, start, chunk)
        states = hidden[index]
        logits = head.logits(states)
        picked, lse = chosen_logits(head, logits, targets[index])
        product = product_gradients(head, logits, lse, targets[index], live.astype(jnp.float32), states.dtype)
        gradient = hidden_gradient(head, product)
        return put(results[0], index, live, picked - lse), put(results[1], index, live, gradient)

    return over_chunks(
        rows, chunk, step, (jnp.zeros(hidden.shape[0], jnp.float32), jnp.zeros(hidden.shape, jnp.float32))
    )


def backward(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    lse: Float[Array, " N"],
    coefficients: Float[Array, " N"],
    rows: Rows,
    chunk: int,
    gradients: tuple[Float[Array, "N D"], Float[Array, "..."] | None],
) -> tuple[Float[Array, "N D"], Float[Array, "..."] | None]:
    """Write the hidden gradients of the rows that count, add theirs to the weight's if there is one. Three products."""

    def step(start: Array, results: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        index, live = chunk_index(rows, start, chunk)
        states = hidden[index]
        logits = head.logits(states)
        # An infinite log-sum-exp makes every probability of a repeated row exactly 0.
        row_lse = jnp.where(live, lse[index], jnp.inf)
        weights = jnp.where(live, coefficients[index], 0.0)
        product = product_gradients(head, logits, row_lse, targets[index], weights, states.dtype)
        return (
            put(results[0], index, live, hidden_gradient(head, product).astype(results[0].dtype)),
            None if results[1] is None else add_weight_gradient(head, results[1], product, states),
        )

    return over_chunks(rows, chunk, step, gradients)


def chosen_logits(
    head: Head, logits: Float[Array, "C V"], targets: Int[Array, " C"]
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Logit of each row's target, 0 where another slice holds it, and the row's log-sum-exp over this one."""
    lse, ids = jax.nn.logsumexp(logits, axis=1), local_ids(head, targets)
    if head.mesh_axis is None:
        return jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0], lse
    picked = jnp.take_along_axis(logits, jnp.maximum(ids, 0)[:, None], axis=1)[:, 0]
    return jnp.where(ids < 0, 0.0, picked), lse


def product_gradients(
    head: Head,
    logits: Float[Array, "C V"],
    lse: Float[Array, " C"],
    targets: Int[Array, " C"],
    coefficients: Float[Array, " C"],
    dtype: DTypeLike,
) -> Float[Array, "C V"]:
    """Gradient of Σ coefficient · log-prob in hidden @ weight, in the dtype of the products that follow."""
    hit = jnp.arange(logits.shape[1])[None, :] == local_ids(head, targets)[:, None]
    gradient = coefficients[:, None] * (hit.astype(jnp.float32) - jnp.exp(logits - lse[:, None]))
    return head.by_token(head.product_gradient(gradient, logits), axis=1).astype(dtype)


def hidden_gradient(head: Head, product: Float[Array, "C V"]) -> Float[Array, "C D"]:
    """Gradient in the hidden states, float32, from that in their product with the weight."""
    dimensions = (((1,), (head.vocab_axis,)), ((), ()))
    return jax.lax.dot_general(product, head.operand(product.dtype), dimensions, preferred_element_type=jnp.float32)


def add_weight_gradient(
    head: Head, total: Float[Array, "..."], product: Float[Array, "C V"], states: Float[Array, "C D"]
) -> Float[Array, "..."]:
    """Add the gradient in the weight to the float32 total, a slice of the vocabulary at a time."""
    size = -(-head.slice_size // _WEIGHT_TILES)

    def step(number: Array, total: Array) -> Array:
        # The last slice moves back to end with the vocabulary: what it shares with the one before is added once.
        start = jnp.minimum(number * size, head.slice_size - size)
        tile = jax.lax.dynamic_slice_in_dim(product, start, size, axis=1)
        fresh = start + jnp.arange(size) >= number * size
        tile = jnp.where(fresh[None, :], tile, jnp.zeros_like(tile))
        operands = (tile, states) if head.vocab_axis == 0 else (states, tile)
        part = jax.lax.dot_general(*operands, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        old = jax.lax.dynamic_slice_in_dim(total, start, size, axis=head.vocab_axis)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=head.vocab_axis)

    result: Array = jax.lax.fori_loop(0, _WEIGHT_TILES, step, total)
    return result
