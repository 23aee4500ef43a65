"""The propositions of the IPO paper on random tabular problems, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy import optimize
from theory_cases import HOLDS, Case, Claim, apart, cases, check, sigmoid

from fastpref.method import losses
from fastpref.theory import psi


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def problem(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Preferences, behaviour μ, reference."""
    return case.preferences, case.policy("μ"), case.policy("ref")


def differences(values: np.ndarray) -> np.ndarray:
    return values[:, None] - values[None, :]


def equation_13(case: Case, policy: np.ndarray, tau: float) -> float:
    preferences, behaviour, ref = problem(case)
    error = differences(np.log(policy / ref)) - differences(preferences @ behaviour) / tau
    return float(behaviour @ error**2 @ behaviour)


def equation_16(case: Case, policy: np.ndarray, tau: float) -> float:
    preferences, behaviour, ref = problem(case)
    ratios = differences(np.log(policy / ref))
    expected = preferences * (ratios - 1 / tau) ** 2 + (1 - preferences) * ratios**2
    return float(behaviour @ expected @ behaviour)


def equation_17(case: Case, policy: np.ndarray) -> float:
    """The expectation of the sampled loss, as the training code has it."""
    preferences, behaviour, ref = problem(case)
    with jax.enable_x64(True):
        ratios = jnp.asarray(differences(np.log(policy / ref)).ravel())
        loss = np.asarray(losses.ipo(ratios, jnp.asarray(preferences.ravel()), tau=case.tau))
    return float(behaviour @ loss.reshape(preferences.shape) @ behaviour)


def newton(case: Case, policy: np.ndarray, scale: float) -> np.ndarray:
    """One Newton step on eq. 13 in logits, its Hessian being 4·(diag μ − μμᵀ): the loss is quadratic (theorem 2)."""
    behaviour = case.policy("μ")
    hessian = scale * 4 * (np.diag(behaviour) - np.outer(behaviour, behaviour))
    gradient = case.game.expected_gradient(policy, "offline-ipo", behaviour=behaviour)
    return softmax(np.log(policy) - np.linalg.pinv(hessian) @ gradient)


def theorem_2_optimum(case: Case, scale: float) -> float:
    optimum = psi.optimal_policy(*problem(case), case.tau)
    found, unmoved = equation_13(case, optimum, scale * case.tau), equation_13(case, case.policy("ref"), case.tau)
    return float(np.sqrt(found / unmoved))


def theorem_2_unique(case: Case, scale: float) -> float:
    """From anywhere, the minimum of the quadratic is the closed form: there is no other."""
    optimum = psi.optimal_policy(*problem(case), case.tau)
    return max(apart(newton(case, case.policy(name), scale), optimum) for name in ("π", "π'"))


def proposition_3(case: Case, scale: float) -> float:
    """Equations 13 and 16 differ by a constant: by the same for two policies."""
    one, two = (
        (equation_13(case, policy, case.tau), equation_16(case, policy, scale * case.tau))
        for policy in (case.policy("π"), case.policy("π'"))
    )
    return apart(one[0] - two[0], one[1] - two[1])


def equation_17_for_16(case: Case, scale: float) -> float:
    one, two = (
        (scale * equation_17(case, policy), equation_16(case, policy, case.tau))
        for policy in (case.policy("π"), case.policy("π'"))
    )
    return apart(one[0] - two[0], one[1] - two[1])


def equation_7(case: Case, scale: float) -> float:
    """For any Ψ the objective falls short of its optimum by τ·KL(π ‖ π*) (appendix A.1)."""
    arguments = (*problem(case), case.tau, lambda q: q**3 + 0.1 * q)
    best, policy = psi.optimal_policy(*arguments), case.policy("π")
    short = psi.objective(best, *arguments) - psi.objective(policy, *arguments)
    return apart(short, scale * case.tau * policy @ np.log(policy / best))


def proposition_1(case: Case, scale: float) -> float:
    """Bradley-Terry: ΨPO with the logit, RLHF with the reward, and DPO have one optimum."""
    optimum = psi.optimal_policy(*problem(case), case.tau, psi.logit)
    rlhf = softmax(np.log(case.policy("ref")) + scale * case.rewards / case.tau)
    gradient = case.game.expected_gradient(rlhf, "offline-dpo", behaviour=case.policy("μ"))
    return max(apart(optimum, rlhf), float(np.abs(gradient).max()))


def proposition_4(case: Case, scale: float) -> float:
    """Any preferences: the policy of RLHF with the best Bradley-Terry reward minimises DPO."""
    preferences, behaviour, ref = problem(case)
    weights = np.outer(behaviour, behaviour)

    def slope(free: np.ndarray) -> np.ndarray:
        reward = np.append(0.0, free)
        return ((weights * (sigmoid(differences(reward)) - preferences)).sum(1))[1:]

    found = optimize.root(slope, np.zeros(case.actions - 1), tol=1e-14)
    assert np.abs(slope(found.x)).max() < HOLDS
    policy = softmax(np.log(ref) + scale * np.append(0.0, found.x) / case.tau)
    return float(np.abs(case.game.expected_gradient(policy, "offline-dpo", behaviour=behaviour)).max())


CLAIMS = {
    theorem_2_optimum: cases(),
    theorem_2_unique: cases(),
    proposition_3: cases(),
    equation_17_for_16: cases(),
    equation_7: cases(),
    proposition_1: cases(kinds=("bradley-terry",)),
    proposition_4: cases(kinds=("soft",)),
}


@pytest.mark.parametrize("scale", [1, 1.01])
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_formula_holds_and_one_that_is_one_per_cent_off_does_not(claim: Claim, scale: float) -> None:
    check(claim, CLAIMS[claim], scale)


@given(cases())
def test_the_loss_of_theorem_2_curves_in_every_direction_but_the_constant_one(case: Case) -> None:
    behaviour = case.policy("μ")
    curvature = np.linalg.eigvalsh(4 * (np.diag(behaviour) - np.outer(behaviour, behaviour)))
    assert abs(curvature[0]) < HOLDS < curvature[1]


def test_two_actions_as_in_section_5_3() -> None:
    certain = [[0.5, 1.0], [0.0, 0.5]]
    for tau in (0.1, 1.0, 10.0):
        found = psi.optimal_policy(certain, [0.5, 0.5], [0.5, 0.5], tau)
        np.testing.assert_allclose(found, [1 / (1 + np.exp(-0.5 / tau)), 1 / (1 + np.exp(0.5 / tau))], rtol=1e-12)
        # Section 4.2: with the logit no τ holds the policy.
        assert psi.optimal_policy(certain, [0.5, 0.5], [0.5, 0.5], tau, psi.logit).tolist() == [1, 0]


def test_appendix_a_2_counts_its_pairs_four_times() -> None:
    """The printed example has 2·(...)²; two of four equally likely pairs differ, which is ½·(...)²."""
    case = Case(seed=1, actions=3, kind="soft", tau=1.0, beta=0.5)
    preferences, behaviour, ref = case.preferences, np.array([0.5, 0.5, 0.0]), np.full(3, 1 / 3)
    policy = case.policy("π")
    rates = preferences @ behaviour
    error = differences(np.log(policy / ref)) - differences(rates)
    loss = behaviour @ error**2 @ behaviour
    assert loss == pytest.approx(0.5 * (rates[0] - rates[1] - np.log(policy[0] / policy[1])) ** 2)
