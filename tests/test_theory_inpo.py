"""The claims of the INPO paper on random games, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from theory_cases import Case, Claim, apart, cases, check

from fastpref.method import losses
from fastpref.theory.games import kl


def eta_of(case: Case) -> float:
    """η of at least τ, as theorem 4 takes it."""
    return case.tau / case.beta


def next_policy(case: Case, policy: np.ndarray, scale: float = 1) -> np.ndarray:
    return case.game.mirror_descent([scale * eta_of(case)], start=policy)[1]


def differences(values: np.ndarray) -> np.ndarray:
    return values[:, None] - values[None, :]


def log_ratio(case: Case, policy: np.ndarray, before: np.ndarray) -> np.ndarray:
    """h_t(π, y, y'): exponents 1, −τ/η and −(1 − τ/η)."""
    share = case.tau / eta_of(case)
    return differences(np.log(policy) - share * np.log(case.game.ref) - (1 - share) * np.log(before))


def equation_7(case: Case, policy: np.ndarray, before: np.ndarray) -> float:
    wanted = differences(case.game.win_rate(before)) / eta_of(case)
    return float(before @ (log_ratio(case, policy, before) - wanted) ** 2 @ before)


def equation_8(case: Case, policy: np.ndarray, before: np.ndarray, eta: float) -> float:
    """As the training code has it: IPO's loss of h_t, with η for τ."""
    with jax.enable_x64(True):
        ratios, preferences = (jnp.asarray(a.ravel()) for a in (log_ratio(case, policy, before), case.game.preferences))
        loss = np.asarray(losses.ipo(ratios, preferences, tau=eta))
    return float(before @ loss.reshape(case.actions, -1) @ before)


def equation_6(case: Case, scale: float) -> float:
    before = case.policy("π")
    wanted = differences(case.game.win_rate(before)) / eta_of(case)
    return apart(log_ratio(case, next_policy(case, before), before), scale * wanted)


def lemma_5_optimum(case: Case, scale: float) -> float:
    before = case.policy("π")
    found, unmoved = (equation_7(case, policy, before) for policy in (next_policy(case, before, scale), before))
    return float(np.sqrt(found / unmoved))


def lemma_5_unique(case: Case, scale: float) -> float:
    """L_t is quadratic in the logits: from anywhere its minimum is π_(t+1), which is thus the only one."""
    before, start = case.policy("π"), np.log(case.policy("π'"))
    hessian = scale * 4 * (np.diag(before) - np.outer(before, before))
    wanted = differences(case.game.win_rate(before)) / eta_of(case)
    error = log_ratio(case, np.exp(start), before) - wanted
    gradient = 4 * before * (error @ before)
    found = np.exp(start - np.linalg.pinv(hessian) @ gradient)
    return apart(found / found.sum(), next_policy(case, before))


def proposition_6(case: Case, scale: float) -> float:
    """Equations 7 and 8 differ by a constant: by the same for two policies."""
    before, eta = case.policy("π"), scale * eta_of(case)
    one, two = (
        (equation_7(case, policy, before), equation_8(case, policy, before, eta))
        for policy in (case.policy("first"), case.policy("second"))
    )
    return apart(one[0] - two[0], one[1] - two[1])


def theorem_4_exactly(case: Case, scale: float) -> float:
    """KL(π*, π_(t+1)) = (1 − τ/η)·KL(π*, π_t) − (τ/η)·KL(π_t, π*) + log E_π_t[exp(δ − E_π_t[δ])]."""
    game, before, nash, share = case.game, case.policy("π"), case.game.nash(), case.tau / eta_of(case)
    step = (game.win_rate(before) - case.tau * np.log(before / game.ref)) / eta_of(case)
    step -= before @ step
    spread = np.log1p(before @ (np.expm1(step) - step))
    sides = (1 - scale * share) * kl(nash, before) - share * kl(before, nash) + spread
    return abs(kl(nash, next_policy(case, before)) - sides) / (kl(nash, before) + spread)


def nash_is_stationary(case: Case, scale: float) -> float:
    nash = case.game.nash()
    share = case.tau / eta_of(case)
    moved = nash ** (1 - share) * case.game.ref ** (scale * share) * np.exp(case.game.win_rate(nash) / eta_of(case))
    return max(apart(moved / moved.sum(), nash), apart(next_policy(case, nash), nash))


CLAIMS = {
    equation_6: cases(),
    lemma_5_optimum: cases(),
    lemma_5_unique: cases(),
    proposition_6: cases(),
    theorem_4_exactly: cases(),
    nash_is_stationary: cases(),
}


@pytest.mark.parametrize("scale", [1, 1.01])
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_formula_holds_and_one_that_is_one_per_cent_off_does_not(claim: Claim, scale: float) -> None:
    check(claim, CLAIMS[claim], scale)


@given(cases())
def test_one_step_of_theorem_4_keeps_its_bound(case: Case) -> None:
    game, before, nash, eta = case.game, case.policy("π"), case.game.nash(), eta_of(case)
    bound = np.abs(np.log(before / game.ref)).max()
    constant = max(bound * case.tau, case.tau, 1)
    assert kl(nash, next_policy(case, before)) <= (1 - case.tau / eta) * kl(nash, before) + 8 * constant**2 / eta**2


def distances(case: Case, steps: int, mistake: float = 1.0) -> np.ndarray:
    """KL(π*, π_T) for T = 1 to `steps` with η_t = τ·(t + 2)/2; `mistake` multiplies the pull to the reference."""
    game, nash = case.game, case.game.nash()
    policy, found = game.ref, []
    for t in range(steps):
        share = 2 / (t + 2)
        logits = (1 - share) * np.log(policy) + mistake * share * np.log(game.ref)
        logits = logits + share * game.win_rate(policy) / case.tau
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        found.append(kl(nash, policy))
    return np.array(found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "tau"), [("soft", 0.1), ("hard", 0.3), ("soft", 1.0)])
def test_mirror_descent_converges_as_one_over_t(seed: int, kind: str, tau: float) -> None:
    case = Case(seed=seed, actions=5, kind=kind, tau=tau, beta=0.5)
    steps = np.arange(1, 1501)
    found = distances(case, len(steps))
    through_the_house = case.game.mirror_descent(tau * (np.arange(len(steps)) + 2) / 2)
    assert kl(case.game.nash(), through_the_house[-1]) == pytest.approx(found[-1], rel=1e-6, abs=1e-15)
    # The iterates stay within log π/π_ref of 1/τ, so that C = max(Bτ, τ, 1) is known beforehand.
    ratios = np.log(through_the_house / case.game.ref)
    assert np.abs(ratios).max() <= 1 / tau
    assert np.all(found <= 32 / (tau**2 * (steps + 1)))
    # Sharper than the bound, which is loose by orders of magnitude: T·KL does not grow, but does if the formula is off.
    assert found[-1] * 1500 <= found[149] * 150
    broken = distances(case, len(steps), mistake=1.01)
    assert broken[-1] * 1500 > 3 * broken[149] * 150
