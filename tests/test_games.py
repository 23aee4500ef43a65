"""Preference games and ΨPO: equilibria against independent solvers, closed forms, dynamics, and refusals."""

import numpy as np
import pytest
from hypothesis import given
from scipy import optimize
from theory_cases import Case, cases

from fastpref.method.errors import ConfigError
from fastpref.theory import equilibrium, psi
from fastpref.theory.games import PreferenceGame, kl

EVEN = [[0.5, 0.8, 0.1], [0.2, 0.5, 0.8], [0.9, 0.2, 0.5]]
UNIFORM = [1 / 3, 1 / 3, 1 / 3]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def random_game(seed: int, *, low: float = -3, high: float = 0.5) -> tuple[PreferenceGame, float]:
    """A game of 2 to 50 actions with τ of 10^low to 10^high, and β; one in three games has hard preferences."""
    random = np.random.default_rng(seed)
    actions, tau = int(random.integers(2, 51)), 10 ** random.uniform(low, high)
    draws = random.uniform(size=(actions, actions))
    upper = np.triu(draws if seed % 3 else np.round(draws), 1)
    ref = np.maximum(random.dirichlet(np.ones(actions)), 1e-9)
    beta = float(random.uniform()) if seed % 2 else 0.0
    return PreferenceGame(upper + np.tril(1 - upper.T, -1) + np.eye(actions) / 2, ref / ref.sum(), tau), beta


def solved_by_scipy(game: PreferenceGame, beta: float) -> np.ndarray:
    """Equation 13 as least squares in log π/π_ref, by MINPACK's Levenberg-Marquardt."""

    def opponent(log_ratio: np.ndarray) -> np.ndarray:
        return softmax((1 - beta) * log_ratio + np.log(game.ref))

    def residual(log_ratio: np.ndarray) -> np.ndarray:
        return log_ratio - (game.preferences - 0.5) @ opponent(log_ratio) / game.tau

    def jacobian(log_ratio: np.ndarray) -> np.ndarray:
        mixed = opponent(log_ratio)
        moved = (1 - beta) * (np.diag(mixed) - np.outer(mixed, mixed))
        return np.eye(len(mixed)) - (game.preferences - 0.5) @ moved / game.tau

    exact = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    found = optimize.least_squares(residual, np.zeros(len(game.ref)), jacobian, method="lm", max_nfev=5000, **exact)
    return softmax(found.x + np.log(game.ref))


@pytest.mark.parametrize("seed", range(200))
def test_equilibria_agree_with_an_independent_solver(seed: int) -> None:
    game, beta = random_game(seed)
    assert np.abs(game.nash(beta) - solved_by_scipy(game, beta)).sum() < 1e-8


@pytest.mark.parametrize("seed", range(10))
def test_where_regularisation_vanishes_the_equilibrium_is_that_of_a_linear_program(seed: int) -> None:
    game, _ = random_game(seed * 3 + 1, low=-7, high=-7)
    actions = len(game.ref)
    # Maximise v with xᵀP ≥ v, x a distribution.
    found = optimize.linprog(
        np.append(np.zeros(actions), -1.0),
        A_ub=np.hstack([-game.preferences.T, np.ones((actions, 1))]),
        b_ub=np.zeros(actions),
        A_eq=[np.append(np.ones(actions), 0.0)],
        b_eq=[1.0],
        bounds=[(0, None)] * actions + [(None, None)],
    )
    assert found.x[-1] == pytest.approx(0.5)
    assert np.abs(game.nash() - found.x[:-1]).sum() < 1e-3


@pytest.mark.parametrize("tau", [1e-2, 1e-4, 1e-6, 1e-8])
def test_equilibria_are_found_where_plain_iteration_diverges(tau: float) -> None:
    game = PreferenceGame(EVEN, [0.2, 0.3, 0.5], tau)
    policy = game.ref
    for _ in range(1000):
        policy = game.best_response(policy)
    nash = game.nash()
    assert game.duality_gap(policy) > 0.1
    assert game.duality_gap(nash) < 1e-12
    assert np.abs(nash - game.best_response(nash)).sum() < 1e-7


@given(cases(actions=(2, 3, 5, 9)))
def test_the_bound_of_an_equilibrium_bounds_its_distance(case: Case) -> None:
    """The same bound, at a point that is not the equilibrium."""
    game, policy = case.game, case.policy("π")
    residual = np.log(policy / game.best_response(policy))
    assert np.abs(policy - game.nash()).sum() <= np.ptp(residual) / 2


def test_tau_too_small_to_prove_anything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    game = PreferenceGame(EVEN, UNIFORM, 1e-13)
    with pytest.raises(ArithmeticError, match=r"must be certain to 1e-10, but for tau = 1e-13 .* Raise tau"):
        game.nash()
    monkeypatch.setattr(equilibrium.np, "longdouble", np.float64)
    ordinary = PreferenceGame(EVEN, [0.2, 0.3, 0.5], 1e-5)
    policy, error = equilibrium.equilibrium(ordinary.preferences, ordinary.ref, ordinary.tau, 0.0)
    assert error < 1e-10
    assert np.abs(policy - ordinary.best_response(policy)).sum() < 1e-9
    with pytest.raises(ArithmeticError, match=r"Raise tau"):
        PreferenceGame(EVEN, [0.2, 0.3, 0.5], 1e-9).nash()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("tau", [1e-2, 1e-4, 1e-6])
def test_the_reported_error_is_no_smaller_than_the_true_one(
    beta: float, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = random_game(8)[0]
    exact, _ = equilibrium.equilibrium(game.preferences, game.ref, tau, beta)
    monkeypatch.setattr(equilibrium.np, "longdouble", np.float64)
    rounded, error = equilibrium.equilibrium(game.preferences, game.ref, tau, beta)
    assert np.abs(rounded - exact).sum() <= error + 1e-15


def test_the_answer_to_a_mixture_is_less_certain_than_the_mixture() -> None:
    game = PreferenceGame(EVEN, [0.2, 0.3, 0.5], 1e-7)
    assert game.nash().sum() == pytest.approx(1)
    with pytest.raises(
        ArithmeticError, match=r"for tau = 1e-07 and mixture_beta = 0.5 rounding leaves an error of up to"
    ):
        game.nash(0.5)


def test_the_ends_of_beta_are_the_nash_policy_and_the_answer_to_the_reference() -> None:
    game = PreferenceGame(EVEN, [0.2, 0.3, 0.5], 0.1)
    np.testing.assert_allclose(game.nash(1.0), game.best_response(game.ref), atol=1e-12)
    np.testing.assert_allclose(game.nash(1e-12), game.nash(), atol=1e-10)
    np.testing.assert_allclose(game.nash(1 - 1e-12), game.nash(1.0), atol=1e-10)


def test_actions_nearly_without_reference_do_no_harm() -> None:
    game = PreferenceGame(EVEN, [1e-300, 0.5, 0.5], 0.01)
    assert game.nash() == pytest.approx([0, 1, 0], abs=1e-6)
    assert game.duality_gap([1, 0, 0]) > 1


@given(cases())
def test_the_duality_gap_is_what_best_responses_gain(case: Case) -> None:
    game, policy = case.game, case.policy("π")
    answer = game.best_response(policy)
    gap = game.payoff(answer, policy) - game.payoff(policy, answer)
    assert game.duality_gap(policy) == pytest.approx(gap, rel=1e-9, abs=1e-12)
    assert game.payoff(answer, policy) >= game.payoff(case.policy("other"), policy)
    assert game.payoff(policy, answer) + game.payoff(answer, policy) == pytest.approx(1)
    assert game.duality_gap(game.nash()) == pytest.approx(0, abs=1e-14)


def test_the_duality_gap_of_a_policy_without_full_support() -> None:
    game = PreferenceGame(EVEN, UNIFORM, 0.5)
    policy = np.array([0.0, 0.25, 0.75])
    answer = game.best_response(policy)
    gap = game.payoff(answer, policy) - game.payoff(policy, answer)
    assert game.duality_gap(policy) == pytest.approx(gap)
    assert kl(policy, policy) == 0


@pytest.mark.parametrize(
    ("algorithm", "beta", "end"),
    [
        ("online-ipo", 0.3, 0.0),
        ("ipo-md", 0.3, 0.3),
        ("ipo-md", 1.0, 1.0),
        ("nash-md-pg", 0.3, 0.3),
        ("self-play", 0.3, 0.0),
        ("offline-ipo", 0.3, 1.0),
    ],
)
def test_trajectories_end_where_the_theory_says(algorithm: str, beta: float, end: float) -> None:
    game = PreferenceGame(EVEN, [0.2, 0.3, 0.5], 0.3)
    path = game.trajectory(algorithm, steps=6000, step_size=0.3, mixture_beta=beta, every=1500)
    assert path.shape == (5, 3)
    assert path[0] == pytest.approx(game.ref)
    np.testing.assert_allclose(path[-1], game.nash(end), atol=1e-9)


def test_a_trajectory_takes_steps_against_the_expected_gradient() -> None:
    game, start = PreferenceGame(EVEN, [0.2, 0.3, 0.5], 0.3), np.array([0.6, 0.3, 0.1])
    settings = {"mixture_beta": 0.2, "behaviour": [0.5, 0.25, 0.25]}
    for algorithm in ("ipo-md", "online-dpo", "online-slic", "nash-md-pg", "offline-dpo", "offline-slic"):
        path = game.trajectory(algorithm, steps=2, step_size=0.1, start=start, **settings)
        wanted = [start]
        for _ in range(2):
            step = 0.1 * game.expected_gradient(wanted[-1], algorithm, **settings)
            wanted.append(softmax(np.log(wanted[-1]) - step))
        np.testing.assert_allclose(path, wanted, rtol=1e-12)
    assert game.trajectory("ipo-md", steps=0, step_size=0.1).tolist() == [game.ref.tolist()]


def test_an_offline_algorithm_learns_from_its_behaviour_policy() -> None:
    game, behaviour = PreferenceGame(EVEN, [0.2, 0.3, 0.5], 0.3), [0.7, 0.2, 0.1]
    end = game.trajectory("offline-ipo", steps=9000, step_size=0.3, behaviour=behaviour, every=9000)[-1]
    np.testing.assert_allclose(end, psi.optimal_policy(EVEN, behaviour, game.ref, 0.3), atol=1e-9)


def test_mixed_with_the_behaviour_policy_ipo_md_is_offline_ipo_in_the_end() -> None:
    """IPO-MD section 5.1: π^(1−β)·μ^β goes from online IPO at β = 0 to offline IPO at β = 1."""
    game, policy, data = PreferenceGame(EVEN, [0.2, 0.3, 0.5], 0.3), [0.1, 0.6, 0.3], [0.7, 0.2, 0.1]
    mixed = [game.expected_gradient(policy, "ipo-md", mixture_beta=beta, behaviour=data) for beta in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(mixed[0], game.expected_gradient(policy, "online-ipo"), rtol=1e-12)
    np.testing.assert_allclose(mixed[2], game.expected_gradient(policy, "offline-ipo", behaviour=data), rtol=1e-12)
    halfway = np.sqrt(np.multiply(policy, data))
    between = game.expected_gradient(policy, "offline-ipo", behaviour=halfway / halfway.sum())
    np.testing.assert_allclose(mixed[1], between, rtol=1e-12)


def test_mirror_descent_needs_no_small_steps_to_hold_at_the_equilibrium() -> None:
    game = PreferenceGame(EVEN, [0.2, 0.3, 0.5], 0.1)
    nash = game.nash()
    np.testing.assert_allclose(game.mirror_descent([0.1, 1.0, 10.0], start=nash), [nash] * 4, atol=1e-12)
    # At η = τ a step is the best response.
    np.testing.assert_allclose(game.mirror_descent([0.1])[1], game.best_response(game.ref), rtol=1e-12)
    assert game.mirror_descent([]).tolist() == [game.ref.tolist()]


def test_rounding_of_float32_is_taken_out() -> None:
    rounded = PreferenceGame(np.float32(EVEN), np.float32(UNIFORM), 0.1)
    assert np.array_equal(rounded.preferences + rounded.preferences.T, np.ones((3, 3)))
    np.testing.assert_allclose(rounded.nash(), PreferenceGame(EVEN, UNIFORM, 0.1).nash(), atol=1e-6)


@pytest.mark.parametrize(
    ("preferences", "ref", "tau", "message"),
    [
        (
            [[0.5, 0.8], [0.1, 0.5]],
            [0.5, 0.5],
            1.0,
            r"for y = 0 and y' = 1 too, but received \(0.8, 0.1\). Set one",
        ),
        ([[0.6, 0.8], [0.2, 0.5]], [0.5, 0.5], 1.0, r"for y = 0 and y' = 0 too, but .*0.5 where y is y'"),
        ([[0.5, 1.2], [-0.2, 0.5]], [0.5, 0.5], 1.0, r"must lie in \[0, 1\], but received \[1.2\]. Give probabilities"),
        ([[0.5, np.nan], [0.5, 0.5]], [0.5, 0.5], 1.0, r"must lie in \[0, 1\], but received \[nan\]"),
        ([[0.5, 0.5]], [0.5, 0.5], 1.0, r"must have the shape \[A, A\], A of 2 or more, but received \(1, 2\)"),
        ([[0.5]], [1.0], 1.0, r"A of 2 or more, but received \(1, 1\)"),
        ([0.5, 0.5], [0.5, 0.5], 1.0, r"but received \(2,\). Give one row per action"),
        ([[0.5, 0.5], [0.5]], [0.5, 0.5], 1.0, r"preferences must be an array of numbers, but .* Give rows of equal"),
        (EVEN, [0.5, 0.5, 0.0], 1.0, r"ref must be above 0 for every action, but received 0.0. Remove actions"),
        (EVEN, [0.5, 0.5], 1.0, r"ref must have the shape \[A\] = \[3\], but received \(2,\)"),
        (EVEN, [0.5, 0.5, 0.5], 1.0, r"ref must sum to 1, but received 1.5. Divide it"),
        (EVEN, [0.5, 0.5, np.nan], 1.0, r"ref must be above 0 for every action, but received nan"),
        (EVEN, UNIFORM, 0.0, r"tau must be a finite number above 0, but received 0.0. Give 0.1"),
        (EVEN, UNIFORM, -1.0, r"but received -1.0"),
        (EVEN, UNIFORM, np.inf, r"but received inf"),
    ],
)
def test_a_game_that_is_none_is_refused(preferences: object, ref: list[float], tau: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceGame(preferences, ref, tau)


def test_arguments_that_break_their_rule_are_refused() -> None:
    game = PreferenceGame(EVEN, UNIFORM, 0.1)
    with pytest.raises(ConfigError, match=r"mixture_beta must lie in \[0, 1\], but received 1.5"):
        game.nash(1.5)
    with pytest.raises(ConfigError, match=r"policy must not be below 0, but received -0.5"):
        game.duality_gap([-0.5, 0.5, 1.0])
    with pytest.raises(ConfigError, match=r"policy must be above 0 for every action, but received 0.0"):
        game.expected_gradient([0.0, 0.5, 0.5], "ipo-md")
    with pytest.raises(ConfigError, match=r"must be one of ipo-md, .*offline-slic, but received 'inpo'. Choose"):
        game.trajectory("inpo", steps=1, step_size=0.1)
    with pytest.raises(ConfigError, match=r"behaviour must sum to 1, but received 2.0"):
        game.trajectory("offline-ipo", steps=1, step_size=0.1, behaviour=[1.0, 1.0, 0.0])
    with pytest.raises(ConfigError, match=r"steps must be 0 or more and every 1 or more, but received \(3, 0\)"):
        game.trajectory("ipo-md", steps=3, step_size=0.1, every=0)
    with pytest.raises(ConfigError, match=r"every η must be above 0, but received 0.0"):
        game.mirror_descent([1.0, 0.0])
    with pytest.raises(ConfigError, match=r"etas must have the shape \[N\], but received \(1, 1\)"):
        game.mirror_descent([[1.0]])


def test_psi_at_its_limits() -> None:
    hard = np.array([[0.5, 1.0, 0.6], [0.0, 0.5, 0.5], [0.4, 0.5, 0.5]])
    behaviour, ref = [0.25, 0.5, 0.25], [0.2, 0.3, 0.5]
    assert psi.optimal_policy(hard, behaviour, ref, 5.0, psi.logit).tolist() == [1, 0, 0]
    # An action that never won against what μ plays is given up, whatever τ is.
    given_up = psi.optimal_policy(hard, [0.5, 0.0, 0.5], ref, 5.0, psi.logit)
    assert given_up[1] == 0
    assert given_up[0] / ref[0] > given_up[2] / ref[2] > 0
    assert psi.objective([0.5, 0.5, 0.0], hard, [0.5, 0.0, 0.5], ref, 5.0, psi.logit) == -np.inf
    assert np.isfinite(psi.objective([0.5, 0.0, 0.5], hard, [0.5, 0.0, 0.5], ref, 5.0, psi.logit))


@given(cases())
def test_no_policy_is_worth_more_than_the_optimum_of_psi(case: Case) -> None:
    arguments = (case.preferences, case.policy("μ"), case.policy("ref"), case.tau, np.sqrt)
    best = psi.objective(psi.optimal_policy(*arguments), *arguments)
    assert all(psi.objective(case.policy(name), *arguments) < best for name in ("π", "π'"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda q: -q, r"Ψ must be non-decreasing, but received '-0 at 0 and -0.01 at 0.01'. A preferred answer"),
        (lambda q: np.where(q > 0.504, 0.3 + q / 9, q), r"Ψ must be non-decreasing, but received '0.5 at 0.5 and "),
        (lambda q: q[:2], r"Ψ must return one value per preference, but received \(2,\)"),
        (lambda q: np.where(q < 0.2, np.nan, q), r"Ψ must be defined on \[0, 1\], but received 'nan'"),
        (psi.logit, r"Ψ may be \+∞ or −∞ but not both, but received 'both for action 1'. Take a bounded Ψ"),
        (lambda q: np.where(q == 1, np.inf, q), r"Ψ must leave one optimum: .*but received \[inf, inf, "),
        (lambda q: np.full(q.shape, -np.inf), r"Ψ must leave one optimum"),
    ],
)
def test_a_psi_that_breaks_its_rule_is_refused(function: psi.Psi, message: str) -> None:
    chain = [[0.5, 1.0, 0.5], [0.0, 0.5, 1.0], [0.5, 0.0, 0.5]]
    with pytest.raises(ConfigError, match=message):
        psi.optimal_policy(chain, UNIFORM, UNIFORM, 1.0, function)


def test_psi_refuses_what_a_game_refuses() -> None:
    with pytest.raises(ConfigError, match=r"tau must be a finite number above 0, but received 0.0"):
        psi.optimal_policy(EVEN, UNIFORM, UNIFORM, 0.0)
    with pytest.raises(ConfigError, match=r"behaviour must sum to 1"):
        psi.objective(UNIFORM, EVEN, [1.0, 1.0, 1.0], UNIFORM, 1.0)
    with pytest.raises(ConfigError, match=r"ref must be above 0 for every action"):
        psi.optimal_policy(EVEN, UNIFORM, [0.5, 0.5, 0.0], 1.0)
