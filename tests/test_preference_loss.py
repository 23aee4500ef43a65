from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from kernel_cases import (
    Case,
    assert_as_exact,
    every_fast_one,
    every_implementation,
    float64,
    interpreted_tpu,
    make_head,
    make_hidden,
    make_targets,
    products,
    true_gradients,
    true_log_softmax,
    true_logits,
)

from fastpref.kernels import Head, PreferenceLoss, preference_loss
from fastpref.kernels.preference_loss.fused import preference_loss as fused
from fastpref.method import losses

pytestmark = interpreted_tpu
TAU = 0.3
CASES = [
    Case(17, rows=90),
    Case(513, rows=90, vocab_axis=1, scale=0.5, soft_cap=3.0),
    Case(1000, rows=90, dtype="bfloat16"),
    Case(32128, rows=24, width=8, vocab_axis=1),
]
LENGTHS = (9, 4, 1, 14, 3, 0, 20, 5, 2, 2, 11, 6)
"""Rows of each sequence of six pairs: one completion is empty. The other rows are ignored."""
both_heads = pytest.mark.parametrize("frozen_head", [False, True], ids=["trained", "frozen"])


class Problem(NamedTuple):
    hidden: Array
    head: Head
    targets: Array
    segment_ids: Array
    ref_logps: Array
    preference: Array
    where: Array


def make_problem(case: Case, lengths: tuple[int, ...] = LENGTHS) -> Problem:
    """Rows in random order. Ignored rows hold NaN and impossible targets; one pair does not count."""
    lengths = tuple(length * min(case.rows, 90) // 90 + (length > 0) for length in lengths)
    segments = np.repeat(np.arange(len(lengths)), lengths)
    segments = np.concatenate([segments, np.full(max(case.rows - len(segments), 3), -1)])
    np.random.default_rng(0).shuffle(segments)
    case = Case(case.vocab, len(segments), case.width, case.vocab_axis, case.scale, case.soft_cap, case.dtype)
    pairs = len(lengths) // 2
    kept = jnp.asarray(segments >= 0)
    return Problem(
        jnp.where(kept[:, None], make_hidden(case), jnp.nan).astype(case.dtype),
        make_head(case),
        jnp.where(kept, make_targets(case), -7),
        jnp.asarray(segments, jnp.int32),
        -30 * jax.random.uniform(jax.random.key(1), (pairs, 2)),
        jax.random.uniform(jax.random.key(2), (pairs,)),
        jnp.arange(pairs) != 2,
    )


@partial(jax.jit, static_argnames=("implementation", "chunk", "frozen_head"))
def run(
    problem: Problem,
    loss: losses.Loss,
    *,
    implementation: str | None = None,
    chunk: int | None = None,
    frozen_head: bool = False,
) -> tuple[PreferenceLoss, Array, Array]:
    """Result, and gradients of the loss in the hidden states and in the weight."""
    function: Callable[..., PreferenceLoss] = partial(preference_loss, implementation=implementation)
    if chunk:
        function = partial(fused, chunk=chunk)

    def value(hidden: Array, head: Head) -> tuple[Array, PreferenceLoss]:
        *rest, where = problem[2:]
        result = function(hidden, head, *rest, loss=loss, where=where, frozen_head=frozen_head)
        return result.loss, result

    (_, result), (states, head) = jax.value_and_grad(value, (0, 1), has_aux=True)(problem.hidden, problem.head)
    return result, states, head.weight


def true_loss(name: str, ratio: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each pair and its slope, written out once more, in float64."""
    if name == "ipo":
        target = 1 / (2 * TAU)
        return (
            p * (ratio - target) ** 2 + (1 - p) * (ratio + target) ** 2,
            2 * (p * (ratio - target) + (1 - p) * (ratio + target)),
        )
    if name == "dpo":
        win = 1 / (1 + np.exp(-TAU * ratio))
        value = p * np.logaddexp(0, -TAU * ratio) + (1 - p) * np.logaddexp(0, TAU * ratio)
        return value, TAU * (win - p)
    up, down = 1 - TAU * ratio, 1 + TAU * ratio
    slope = TAU * ((1 - p) * (down > 0) - p * (up > 0))
    return p * np.maximum(0, up) + (1 - p) * np.maximum(0, down), slope


def truth(problem: Problem, name: str) -> tuple[PreferenceLoss, np.ndarray, np.ndarray]:
    hidden, head, targets, segment_ids, ref_logps, preference, where = problem
    kept = np.flatnonzero(np.asarray(segment_ids) >= 0)
    segments = np.asarray(segment_ids)[kept]
    logps = true_log_softmax(true_logits(hidden[kept], head))[np.arange(len(kept)), np.asarray(targets)[kept]]
    sums = np.zeros(2 * len(where))
    np.add.at(sums, segments, logps)
    margins = sums.reshape(-1, 2) - float64(ref_logps)
    ratio = margins[:, 0] - margins[:, 1]
    counted = np.asarray(where)
    per_pair, slope = true_loss(name, ratio, float64(preference))
    per_pair, slope = np.where(counted, per_pair, 0), np.where(counted, slope / counted.sum(), 0)
    coefficients = np.stack([slope, -slope], axis=1).reshape(-1)[segments]
    rows, weight = true_gradients(hidden[kept], head, targets[kept], coefficients)
    states = np.zeros(hidden.shape)
    states[kept] = rows
    loss = per_pair.sum() / counted.sum()
    return PreferenceLoss(loss, per_pair, sums.reshape(-1, 2), ratio), states, weight


@every_fast_one
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("name", "frozen_head"), [("ipo", False), ("dpo", True), ("slic", False)], ids=["ipo", "dpo-frozen", "slic"]
)
def test_values_and_gradients_are_as_exact_as_ordinary_jax(
    case: Case, name: str, frozen_head: bool, implementation: str
) -> None:
    problem = make_problem(case)
    loss = losses.bind(getattr(losses, name), tau=TAU)
    expected = run(problem, loss, implementation="reference", frozen_head=frozen_head)
    ours = run(problem, loss, implementation=implementation, frozen_head=frozen_head)
    exact = truth(problem, name)
    for value, ordinary, true in zip(ours[0], expected[0], exact[0], strict=True):
        assert_as_exact(value, ordinary, np.asarray(true), "float32")
    gradients = (exact[1], np.zeros_like(exact[2]) if frozen_head else exact[2])
    for value, ordinary, true in zip(ours[1:], expected[1:], gradients, strict=True):
        assert value.dtype == case.dtype
        assert_as_exact(value, ordinary, true, case.dtype)


@pytest.mark.parametrize("chunk", [1, 16, 24, 48, 128])
def test_windows_and_two_passes_agree(chunk: int) -> None:
    # The longest pair has 27 rows: it fits no chunk below that, and from 48 on all pairs take windows.
    problem = make_problem(CASES[1])
    loss = losses.bind(losses.dpo, tau=TAU)
    expected = run(problem, loss, implementation="reference")
    for value, other in zip(jax.tree.leaves(run(problem, loss, chunk=chunk)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=2e-6)


def test_chunk_size_changes_nothing_for_frozen_heads() -> None:
    problem = make_problem(CASES[1])
    loss = losses.bind(losses.ipo, tau=TAU)
    small, large = (run(problem, loss, chunk=chunk, frozen_head=True) for chunk in (16, 256))
    for value, other in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=2e-6)


@every_implementation
@both_heads
def test_pairs_that_do_not_count_have_exactly_no_gradient(implementation: str, frozen_head: bool) -> None:
    problem = make_problem(CASES[0])
    problem = problem._replace(ref_logps=problem.ref_logps.at[2].set(jnp.nan))
    loss = losses.bind(losses.ipo, tau=TAU)
    result, states, weight = run(problem, loss, implementation=implementation, frozen_head=frozen_head)
    pair = problem.segment_ids // 2
    assert not np.any(states[pair == 2])
    assert result.per_pair[2] == 0
    without = problem._replace(segment_ids=jnp.where(pair == 2, -1, problem.segment_ids))
    other = run(without, loss, implementation=implementation, frozen_head=frozen_head)
    np.testing.assert_allclose(result.loss, other[0].loss, rtol=1e-6)
    np.testing.assert_allclose(states, other[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weight, other[2], rtol=1e-5, atol=1e-6)


@every_implementation
def test_identical_completions_have_opposite_gradients(implementation: str) -> None:
    case = Case(513, rows=10)
    states, targets = make_hidden(case), make_targets(case)
    problem = Problem(
        jnp.concatenate([states, states]),
        make_head(case),
        jnp.concatenate([targets, targets]),
        jnp.repeat(jnp.arange(2), 10),
        jnp.full((1, 2), -12.0),
        jnp.full((1,), 0.9),
        jnp.ones(1, bool),
    )
    loss = losses.bind(losses.ipo, tau=TAU)
    result, gradient, weight = run(problem, loss, implementation=implementation)
    assert result.log_ratio[0] == 0
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_array_equal(gradient[:10], -gradient[10:])
    np.testing.assert_allclose(weight, np.zeros(weight.shape), atol=1e-5)
    masked = run(problem._replace(where=jnp.zeros(1, bool)), loss, implementation=implementation)
    assert not any(np.any(array) for array in (masked[0].loss, masked[1], masked[2]))
    np.testing.assert_array_equal(masked[0].policy_logps, result.policy_logps)


@every_implementation
@pytest.mark.parametrize(("name", "value"), [("ipo", 1 / (2 * TAU) ** 2), ("dpo", np.log(2))], ids=["ipo", "dpo"])
def test_at_the_start_the_loss_is_known(implementation: str, name: str, value: float) -> None:
    problem = make_problem(CASES[0])
    loss = losses.bind(getattr(losses, name), tau=TAU)
    sums = run(problem, loss, implementation=implementation)[0].policy_logps
    start = problem._replace(ref_logps=sums, preference=jnp.ones_like(problem.preference))
    result = run(start, loss, implementation=implementation)[0]
    np.testing.assert_array_equal(result.log_ratio, 0)
    np.testing.assert_allclose(result.loss, value, rtol=1e-6)


@every_implementation
@both_heads
def test_nothing_to_learn_is_zero(implementation: str, frozen_head: bool) -> None:
    problem = make_problem(CASES[0])
    loss = losses.bind(losses.dpo, tau=TAU)
    kwargs = {"implementation": implementation, "frozen_head": frozen_head}
    uncounted = run(problem._replace(where=jnp.zeros(6, bool)), loss, **kwargs)
    ignored = run(problem._replace(segment_ids=jnp.full_like(problem.segment_ids, -1)), loss, **kwargs)
    empty = run(
        problem._replace(hidden=problem.hidden[:0], targets=problem.targets[:0], segment_ids=problem.segment_ids[:0]),
        loss,
        **kwargs,
    )
    assert uncounted[0].loss == 0
    assert empty[1].shape == (0, 16)
    np.testing.assert_array_equal(ignored[0].policy_logps, 0)
    np.testing.assert_array_equal(empty[0].loss, ignored[0].loss)
    for _, states, weight in (uncounted, ignored, empty):
        assert not np.any(states)
        assert not np.any(weight)


@every_implementation
def test_one_pair_of_single_tokens(implementation: str) -> None:
    case = Case(17, rows=2)
    problem = Problem(
        make_hidden(case), make_head(case), make_targets(case), jnp.arange(2), jnp.zeros((1, 2)), jnp.ones(1),
        jnp.ones(1, bool),
    )  # fmt: skip
    result, states, weight = run(problem, losses.bind(losses.dpo, tau=TAU), implementation=implementation)
    exact = truth(problem, "dpo")
    np.testing.assert_allclose(result.loss, exact[0].loss, rtol=1e-5)
    np.testing.assert_allclose(states, exact[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weight, exact[2], rtol=1e-4, atol=1e-6)


@both_heads
def test_tau_may_follow_a_schedule_and_gradients_scale(frozen_head: bool) -> None:
    hidden, head, *rest, where = make_problem(CASES[0])
    traces = []

    @jax.jit
    def gradient(tau: Array, factor: Array) -> Array:
        traces.append(1)
        loss = losses.bind(losses.ipo, tau=tau)
        return jax.grad(
            lambda hidden: (
                factor * preference_loss(hidden, head, *rest, loss=loss, where=where, frozen_head=frozen_head).loss
            )
        )(hidden)

    one, three = (gradient(jnp.float32(tau), jnp.float32(factor)) for tau, factor in ((0.5, 1.0), (0.5, 3.0)))
    other = gradient(jnp.float32(0.1), jnp.float32(1.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-5, atol=1e-7)
    assert np.abs(other - one).max() > 0.1
    assert len(traces) == 1


@every_implementation
def test_reports_and_parameters_have_no_gradient(implementation: str) -> None:
    hidden, head, targets, segment_ids, ref_logps, preference, where = make_problem(CASES[0])

    @partial(jax.jit, static_argnums=4)
    def value(hidden: Array, ref_logps: Array, preference: Array, tau: Array, fields: tuple[str, ...]) -> Array:
        loss = losses.bind(losses.ipo, tau=tau)
        result = preference_loss(
            hidden, head, targets, segment_ids, ref_logps, preference, loss=loss, where=where,
            implementation=implementation,
        )  # fmt: skip
        return sum((jnp.sum(getattr(result, field)) for field in fields), jnp.zeros(()))

    arguments = (hidden, ref_logps, preference, jnp.float32(TAU))
    assert not np.any(jax.grad(value)(*arguments, ("per_pair", "policy_logps", "log_ratio")))
    assert not any(np.any(gradient) for gradient in jax.grad(value, (1, 2, 3))(*arguments, ("loss",)))


def test_a_plain_function_is_a_loss() -> None:
    problem = make_problem(CASES[0])
    bound = run(problem, losses.bind(losses.ipo, tau=TAU))
    hidden, head, *rest, where = problem

    def value(hidden: Array) -> Array:
        loss = partial(losses.ipo, tau=TAU)
        return preference_loss(hidden, head, *rest, loss=loss, where=where).loss

    plain, gradient = jax.jit(jax.value_and_grad(value))(hidden)
    np.testing.assert_allclose(plain, bound[0].loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, bound[1], rtol=1e-5, atol=1e-7)


def test_values_alone_cost_one_product() -> None:
    hidden, head, *rest, where = make_problem(CASES[0])

    def value(hidden: Array, frozen_head: bool) -> Array:
        loss = losses.bind(losses.ipo, tau=TAU)
        return preference_loss(hidden, head, *rest, loss=loss, where=where, frozen_head=frozen_head).loss

    assert products(lambda hidden: value(hidden, False), hidden) == 1
    assert products(jax.grad(lambda hidden: value(hidden, True)), hidden) == 2


def test_most_of_the_logits_are_never_alive() -> None:
    rows, vocab, width, pairs = 2048, 32128, 4, 16
    shape = jax.ShapeDtypeStruct
    head = Head.tree_unflatten((0, 1.0, None, None), (shape((vocab, width), jnp.float32), None))

    def temporary(implementation: str) -> int:
        def value(hidden: Array, head: Head, targets: Array, segment_ids: Array) -> Array:
            return preference_loss(
                hidden, head, targets, segment_ids, jnp.zeros((pairs, 2)), jnp.ones(pairs),
                loss=losses.bind(losses.ipo, tau=TAU), implementation=implementation,
            ).loss  # fmt: skip

        ids = shape((rows,), jnp.int32)
        lowered = jax.jit(jax.grad(value, (0, 1))).lower(shape((rows, width), jnp.float32), head, ids, ids)
        return int(lowered.compile().memory_analysis().temp_size_in_bytes)

    assert temporary("xla") < 0.15 * temporary("reference")


def test_vmap_equals_a_loop() -> None:
    problem = make_problem(Case(17, rows=40))
    taus = jnp.array([0.1, 0.5, 2.0])

    @jax.jit
    def gradient(tau: Array) -> Array:
        def value(hidden: Array) -> Array:
            _, *rest, where = problem
            return fused(hidden, *rest, loss=losses.bind(losses.dpo, tau=tau), where=where, chunk=16).loss

        return jax.grad(value)(problem.hidden)

    np.testing.assert_allclose(
        jax.vmap(gradient)(taus), jnp.stack([gradient(tau) for tau in taus]), rtol=1e-5, atol=1e-7
    )


def test_errors_say_rule_value_and_remedy() -> None:
    hidden, head, targets, segment_ids, ref_logps, preference, where = make_problem(CASES[0])
    call = partial(preference_loss, loss=losses.bind(losses.ipo, tau=TAU), where=where)
    with pytest.raises(
        ValueError, match=r"preference must lie in \[0, 1\], but received values between .* and 2\.0\. Pass a weight"
    ):
        call(hidden, head, targets, segment_ids, ref_logps, preference.at[1].set(2.0))
    with pytest.raises(ValueError, match=r"hidden must be as wide as its head, but received D = 4"):
        call(hidden[:, :4], head, targets, segment_ids, ref_logps, preference)
    with pytest.raises(ValueError, match=r"preference_loss must be one of .*'reference'.* or None, but received 'gpu'"):
        call(hidden, head, targets, segment_ids, ref_logps, preference, implementation="gpu")
