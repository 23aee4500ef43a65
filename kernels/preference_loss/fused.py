"""The loss and its gradients in one custom VJP: three products where pairs fit a chunk.

The gradient of a token's logits is one number per sequence times (one-hot − softmax), and that number is known as
soon as both sequences of the pair are. So rows are sorted by pair, and windows of whole pairs are taken to their
gradients while their logits are alive: log-sum-exp, sums, slope of the loss, gradients. The ordinary order, all
log-probs first and the logits again in the backward pass, costs a fourth product; it remains for pairs that do not
fit. After chunked preference losses in Liger Kernel, which take one pair at a time.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ..chunks import Rows, chunk_rows, compact, pad_order, put
from ..head import Head
from ..token_logprobs.xla import (
    add_weight_gradient,
    backward,
    chosen_logits,
    forward,
    forward_with_gradient,
    hidden_gradient,
    product_gradients,
    token_logprobs,
)
from .objective import Loss, PreferenceLoss, Problem, sequence_sums
from .reference import preference_loss as composed


class _Window(NamedTuple):
    """What a loop over windows carries."""

    start: Int[Array, ""]
    policy_logps: Float[Array, "P 2"]
    hidden: Float[Array, "N D"]
    weight: Float[Array, "..."]


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
    chunk: int | None = None,
) -> PreferenceLoss:
    """`fastpref.kernels.preference_loss` for every backend; `chunk` overrides the rows of a chunk."""
    if head.mesh_axis is not None:
        # The devices of a split vocabulary would have to meet in every window.
        return composed(
            hidden, head, targets, segment_ids, ref_logps, preference, loss=loss, where=where, frozen_head=frozen_head,
            token_logprobs=partial(token_logprobs, chunk=chunk),
        )  # fmt: skip
    problem = Problem.of(targets, segment_ids, ref_logps, preference, where, loss)
    run = _frozen if frozen_head else _trained
    result: PreferenceLoss = run(hidden, head, problem, chunk_rows(hidden.shape[0], head.slice_size, chunk))
    return result


def _value(hidden: Float[Array, "N D"], head: Head, problem: Problem, chunk: int) -> PreferenceLoss:
    """Without gradients: one product."""
    logps, _ = forward(hidden, head, problem.targets, compact(problem.counted, chunk), chunk)
    return problem.value(sequence_sums(logps, problem.segments, problem.pairs))


_Residuals = tuple[Array, Array | None, Array, Head]
"""Gradient in the hidden states and in the weight, both float32; an empty array of the states' dtype; the head."""


def _trained_forward(hidden: Array, head: Head, problem: Problem, chunk: int) -> tuple[PreferenceLoss, _Residuals]:
    """Three products for pairs in windows, four for the others."""
    fits = _fitting(problem, chunk)
    window = _windows(hidden, head, problem, fits, chunk)

    # Pairs that `where` leaves out need their log-probs alone.
    others = problem.counted & ~problem.rows_of(fits)
    logps, lse = forward(hidden, head, problem.targets, compact(others, chunk), chunk)
    policy_logps = window.policy_logps + sequence_sums(logps, problem.segments, problem.pairs)
    learned = compact(others & problem.rows_of(problem.where), chunk)
    coefficients = problem.coefficients(policy_logps, problem.segments)
    so_far = (window.hidden, window.weight)
    gradients = backward(hidden, head, problem.targets, lse, coefficients, learned, chunk, so_far)
    return problem.value(policy_logps), (*gradients, jnp.zeros(0, hidden.dtype), head)


def _frozen_forward(hidden: Array, head: Head, problem: Problem, chunk: int) -> tuple[PreferenceLoss, _Residuals]:
    """Two products: a token's own gradient waits for its coefficient, which then only scales it."""
    rows = compact(problem.counted, chunk)
    logps, gradient = forward_with_gradient(hidden, head, problem.targets, rows, chunk)
    policy_logps = sequence_sums(logps, problem.segments, problem.pairs)
    gradient = gradient * problem.coefficients(policy_logps, problem.segments)[:, None]
    return problem.value(policy_logps), (gradient, None, jnp.zeros(0, hidden.dtype), head)


def _backward(_chunk: int, residuals: _Residuals, cotangent: PreferenceLoss) -> tuple[Array, Head | None, None]:
    """The gradients are known: scale them."""
    hidden, weight, like, head = residuals
    scaled = (hidden * cotangent.loss).astype(like.dtype)
    if weight is None:
        return scaled, None, None
    return scaled, head.with_weight((weight * cotangent.loss).astype(head.weight.dtype)), None


_trained = jax.custom_vjp(_value, nondiff_argnums=(3,))
_trained.defvjp(_trained_forward, _backward)
_frozen = jax.custom_vjp(_value, nondiff_argnums=(3,))
_frozen.defvjp(_frozen_forward, _backward)


def _pair_lengths(problem: Problem) -> Int[Array, " P"]:
    return jnp.zeros(problem.pairs, jnp.int32).at[problem.segments // 2].add(1, mode="drop")


def _fitting(problem: Problem, chunk: int) -> Bool[Array, " P"]:
    """Pairs for which windows are cheaper than two passes.

    A window costs three products of a chunk, two passes cost four of the pair. A pair that takes between half and
    three quarters of a chunk leaves too much of its window empty.
    """
    lengths = _pair_lengths(problem)
    fits = (lengths <= chunk // 2) | ((4 * lengths >= 3 * chunk) & (lengths <= chunk))
    return fits & (lengths > 0) & problem.where


def _windows(hidden: Array, head: Head, problem: Problem, fits: Bool[Array, " P"], chunk: int) -> _Window:
    """Log-probs and gradients of the pairs that fit, longest first, as many whole pairs at once as a chunk holds."""
    lengths = jnp.where(fits, _pair_lengths(problem), 0)
    by_length = jnp.argsort(-lengths, stable=True)
    ends = jnp.cumsum(lengths[by_length])
    rank = jnp.zeros_like(by_length).at[by_length].set(jnp.arange(problem.pairs))
    row_rank = jnp.pad(jnp.where(fits, rank, problem.pairs), (0, 1), constant_values=problem.pairs)
    order = jnp.argsort(row_rank[problem.segments // 2], stable=True)
    rows = pad_order(order, jnp.sum(lengths, dtype=jnp.int32), chunk)

    window = _Window(
        jnp.zeros((), jnp.int32),
        jnp.zeros((problem.pairs, 2), jnp.float32),
        jnp.zeros(hidden.shape, jnp.float32),
        jnp.zeros(head.weight.shape, jnp.float32),
    )
    # The last rows go to smaller windows. Pairs longer than those have come first.
    half = chunk // 2
    for size, floor in ((chunk, half), (half, 0)):
        window = jax.lax.while_loop(
            partial(_exceeds, rows, floor), partial(_window, hidden, head, problem, rows, ends, size), window
        )
    return window


def _exceeds(rows: Rows, floor: int, window: _Window) -> Bool[Array, ""]:
    return rows.total - window.start > floor


def _window(
    hidden: Array, head: Head, problem: Problem, rows: Rows, ends: Int[Array, " P"], size: int, window: _Window
) -> _Window:
    """One window: the whole pairs that fit `size` rows from where the last one ended."""
    end = jnp.max(jnp.where(ends <= window.start + size, ends, window.start), initial=0)
    index = jax.lax.dynamic_slice_in_dim(rows.order, window.start, size)
    live = window.start + jnp.arange(size) < end
    segments = jnp.where(live, problem.segments[index], 2 * problem.pairs)
    states, targets = hidden[index], problem.targets[index]
    logits = head.logits(states)
    picked, lse = chosen_logits(head, logits, targets)
    policy_logps = window.policy_logps + sequence_sums(picked - lse, segments, problem.pairs)
    coefficients = problem.coefficients(policy_logps, segments)
    # An infinite log-sum-exp makes every probability of a row outside the window exactly 0.
    product = product_gradients(head, logits, jnp.where(live, lse, jnp.inf), targets, coefficients, states.dtype)
    return _Window(
        end,
        policy_logps,
        put(window.hidden, index, live, hidden_gradient(head, product)),
        add_weight_gradient(head, window.weight, product, states),
    )
