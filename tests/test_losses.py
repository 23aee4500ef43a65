"""Losses against the papers' equations, and against each other where the papers say so."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.method import losses

RATIOS = st.floats(-30, 30)
PROBABILITIES = st.floats(0, 1)
TAUS = st.floats(0.05, 5)
BY_NAME = {"ipo": losses.ipo, "dpo": losses.dpo, "slic": losses.slic}


def one(loss: losses.Loss, ratio: float, preference: float, tau: float) -> float:
    return float(loss(jnp.float32([ratio]), jnp.float32([preference]), tau=tau)[0])


@given(RATIOS, TAUS)
def test_hard_labels_give_the_printed_losses(ratio: float, tau: float) -> None:
    expected = {
        "ipo": (ratio - 1 / (2 * tau)) ** 2,
        "dpo": np.logaddexp(0, -tau * ratio),
        "slic": max(0.0, 1 - tau * ratio),
    }
    for name, value in expected.items():
        assert one(BY_NAME[name], ratio, 1.0, tau) == pytest.approx(value, rel=2e-5, abs=1e-5), name


@given(RATIOS, PROBABILITIES, TAUS)
def test_soft_labels_are_the_expectation_over_hard_ones(ratio: float, preference: float, tau: float) -> None:
    for name, loss in BY_NAME.items():
        hard = preference * one(loss, ratio, 1.0, tau) + (1 - preference) * one(loss, -ratio, 1.0, tau)
        assert one(loss, ratio, preference, tau) == pytest.approx(hard, rel=1e-4, abs=1e-4), name


@given(RATIOS, PROBABILITIES, TAUS)
def test_soft_ipo_is_a_square_around_its_target(ratio: float, preference: float, tau: float) -> None:
    constant = one(losses.ipo, 0.0, preference, tau) - ((preference - 0.5) / tau) ** 2
    square = (ratio - (preference - 0.5) / tau) ** 2
    assert one(losses.ipo, ratio, preference, tau) == pytest.approx(square + constant, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(("name", "expected"), [("ipo", (1 / (2 * 0.25)) ** 2), ("dpo", np.log(2)), ("slic", 1.0)])
def test_the_loss_of_the_reference_is_its_closed_form(name: str, expected: float) -> None:
    assert one(BY_NAME[name], 0.0, 1.0, 0.25) == pytest.approx(expected, rel=1e-6)


@given(RATIOS, PROBABILITIES)
def test_swapping_the_pair_changes_nothing(ratio: float, preference: float) -> None:
    for name, loss in BY_NAME.items():
        there, back = one(loss, ratio, preference, 0.5), one(loss, -ratio, 1 - preference, 0.5)
        assert there == pytest.approx(back, rel=1e-4, abs=1e-4), name


def test_a_bound_loss_follows_a_traced_tau_without_compiling_again() -> None:
    traces = []

    @jax.jit
    def total(tau: jax.Array) -> jax.Array:
        traces.append(tau)
        return losses.bind(losses.ipo, tau=tau)(jnp.float32([1.0]), jnp.float32([1.0])).sum()

    values = [float(total(jnp.float32(tau))) for tau in (0.5, 1.0)]
    assert values == [pytest.approx(0.0), pytest.approx(0.25)]
    assert len(traces) == 1


@given(RATIOS, PROBABILITIES, TAUS)
def test_slopes_are_those_of_the_papers_formulas(ratio: float, preference: float, tau: float) -> None:
    ratio, preference, tau = (float(np.float32(value)) for value in (ratio, preference, tau))
    sigmoid = 1 / (1 + np.exp(-tau * ratio))
    expected = {
        "ipo": 2 * (ratio - (preference - 0.5) / tau),
        "dpo": tau * (sigmoid - preference),
        "slic": tau * ((1 - preference) * (tau * ratio > -1) - preference * (tau * ratio < 1)),
    }
    for name, slope in expected.items():
        if name == "slic" and abs(abs(tau * ratio) - 1) < 1e-5:
            continue
        found = jax.grad(lambda value, name=name: BY_NAME[name](value[None], jnp.float32([preference]), tau=tau)[0])
        assert float(found(jnp.float32(ratio))) == pytest.approx(slope, rel=1e-4, abs=1e-4 / tau), name


@given(RATIOS, RATIOS, st.floats(-1, 1), TAUS)
def test_losses_of_single_completions_pull_as_printed(policy: float, anchor: float, score: float, tau: float) -> None:
    policy, anchor, score, tau = (float(np.float32(value)) for value in (policy, anchor, score, tau))
    weight = score - tau * (policy - anchor)
    expected = {
        losses.policy_gradient: (-weight * policy, -weight),
        losses.sppo: ((policy - anchor - score / tau) ** 2, 2 * (policy - anchor - score / tau)),
    }
    for loss, (value, slope) in expected.items():
        found = jax.value_and_grad(lambda logp, loss=loss: loss(logp, jnp.float32(anchor), jnp.float32(score), tau=tau))
        assert [float(x) for x in found(jnp.float32(policy))] == pytest.approx([value, slope], rel=1e-4, abs=2e-3)


def test_the_policy_gradient_is_zero_on_average_at_its_fixed_point() -> None:
    """π ∝ π_ref·exp(r/τ), IPO-MD eq. 3: the mean of slope times score function vanishes; 1 % of τ more does not."""
    rng = np.random.default_rng(3)
    reward, ref = rng.normal(size=5), rng.dirichlet(np.ones(5))
    policy = ref * np.exp(reward / 0.7)
    policy /= policy.sum()
    for tau, vanishes in ((0.7, True), (0.707, False)):
        slopes = jax.vmap(jax.grad(partial(losses.policy_gradient, tau=tau)))(
            *(jnp.float32(values) for values in (np.log(policy), np.log(ref), reward))
        )
        weighted = policy * np.asarray(slopes, np.float64)
        gradient = weighted - policy * weighted.sum()
        assert (np.abs(gradient).max() < 1e-6) == vanishes
