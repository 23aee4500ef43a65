"""The propositions of the IPO-MD paper on random games, exactly, and where its printed formulas do not hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from theory_cases import HOLDS, SEEN, Case, Claim, apart, cases, check, scores_of, sigmoid

from fastpref.method import losses
from fastpref.reproduce import simplex
from fastpref.theory.games import PreferenceGame, kl

LOSSES = {"online-ipo": losses.ipo, "online-dpo": losses.dpo, "online-slic": losses.slic}


def with_tau(game: PreferenceGame, tau: float) -> PreferenceGame:
    return PreferenceGame(game.preferences, game.ref, tau)


def size_of(gradient: np.ndarray) -> float:
    return float(np.abs(gradient).max())


def regret(game: PreferenceGame, policy: np.ndarray, opponent: np.ndarray) -> np.ndarray:
    """p(y ≻ opponent) − τ·log π(y)/π_ref(y), constant exactly where π is the best response."""
    values: np.ndarray = game.win_rate(opponent) - game.tau * np.log(policy / game.ref)
    return values


def covariance(game: PreferenceGame, policy: np.ndarray, sampler: np.ndarray) -> np.ndarray:
    """Cov_sampler(∇ log π, p(· ≻ sampler) − τ·log π/π_ref), in logits."""
    values, slopes = regret(game, policy, sampler), scores_of(policy)
    result: np.ndarray = sampler @ (slopes * (values - sampler @ values)[:, None])
    return result


@jax.jit
def self_play(logits: jax.Array, preferences: jax.Array, ref: jax.Array, tau: jax.Array) -> jax.Array:
    """The update direction printed under proposition 4.2."""

    def payoff(logits: jax.Array) -> jax.Array:
        policy = jax.nn.softmax(logits)
        return policy @ preferences @ jax.lax.stop_gradient(policy) - tau * policy @ jnp.log(policy / ref)

    return jax.grad(payoff)(logits)


@partial(jax.jit, static_argnames="loss")
def literal_gradient(
    policy: jax.Array, sampler: jax.Array, preferences: jax.Array, ref: jax.Array, tau: jax.Array, loss: losses.Loss
) -> jax.Array:
    """Gradient of the printed expectation (10): y, y' from the sampler, then a hard label from λ_p."""

    def expected(logits: jax.Array) -> jax.Array:
        advantage = jax.nn.log_softmax(logits) - jnp.log(ref)
        ratios = (advantage[:, None] - advantage[None, :]).ravel()
        won, lost = (loss(sign * ratios, jnp.ones_like(ratios), tau=tau).reshape(preferences.shape) for sign in (1, -1))
        return sampler @ (preferences * won + (1 - preferences) * lost) @ sampler

    return jax.grad(expected)(jnp.log(policy))


def expected_gradients(case: Case, scale: float) -> float:
    """`expected_gradient` differentiates the losses as printed."""
    game, policy = case.game, case.policy("π")
    mixture, rest = game.mixture(policy, case.beta), (game.preferences, game.ref, np.asarray(game.tau))
    settings = [(name, loss, policy) for name, loss in LOSSES.items()] + [("ipo-md", losses.ipo, mixture)]
    errors = []
    for name, loss, sampler in settings:
        with jax.enable_x64(True):
            printed = np.asarray(literal_gradient(*map(jnp.asarray, (policy, sampler, *rest)), loss=loss))
        errors.append(apart(game.expected_gradient(policy, name, mixture_beta=case.beta), scale * printed))
    return max(errors) if scale == 1 else min(errors)


def equation_12(case: Case, scale: float) -> float:
    game, nash = case.game, case.game.nash()
    return apart(nash, with_tau(game, scale * game.tau).best_response(nash))


def equation_13(case: Case, scale: float) -> float:
    game, policy = case.game, case.game.nash(case.beta)
    return apart(policy, with_tau(game, scale * game.tau).best_response(game.mixture(policy, case.beta)))


def proposition_4_1(case: Case, scale: float) -> float:
    """The Nash equilibrium is stationary under online IPO ..."""
    return size_of(case.game.expected_gradient(with_tau(case.game, scale * case.tau).nash(), "online-ipo"))


def proposition_4_1_alone(case: Case, scale: float) -> float:
    """... and nothing else is: ⟨gradient, log π/BR(π)⟩ = 4·Var_π(log π/BR(π))."""
    game, policy = case.game, case.policy("π")
    distance = np.log(policy / game.best_response(policy))
    variance = policy @ distance**2 - (policy @ distance) ** 2
    return apart(game.expected_gradient(policy, "online-ipo") @ distance, scale * 4 * variance)


def proposition_4_2(case: Case, scale: float) -> float:
    """Online IPO descends where self-play ascends, 4/τ times as fast."""
    game, policy = case.game, case.policy("π")
    with jax.enable_x64(True):
        ascent = np.asarray(self_play(*map(jnp.asarray, (np.log(policy), game.preferences, game.ref, game.tau))))
    online = game.expected_gradient(policy, "online-ipo")
    return max(
        apart(online, -scale * 4 / game.tau * ascent), apart(game.expected_gradient(policy, "self-play"), -ascent)
    )


def proposition_5_1_nash_md(case: Case, scale: float) -> float:
    game, policy = case.game, case.policy("π")
    values = regret(game, policy, game.mixture(policy, case.beta))
    gradient = game.expected_gradient(policy, "nash-md-pg", mixture_beta=case.beta)
    return apart(gradient, -scale * policy @ (scores_of(policy) * (values - 0.5)[:, None]))


def proposition_5_1_ipo_md(case: Case, scale: float) -> float:
    """The exact gradient: −(4/τ)·Cov_π'(∇ log π, p(· ≻ π') − τ·log π/π_ref)."""
    game, policy = case.game, case.policy("π")
    gradient = game.expected_gradient(policy, "ipo-md", mixture_beta=case.beta)
    return apart(gradient, -scale * 4 / game.tau * covariance(game, policy, game.mixture(policy, case.beta)))


def equal_fixed_points(case: Case, scale: float) -> float:
    """Both gradients vanish at the solution of equation 13."""
    policy = with_tau(case.game, scale * case.tau).nash(case.beta)
    sizes = [
        size_of(case.game.expected_gradient(policy, name, mixture_beta=case.beta)) for name in ("ipo-md", "nash-md-pg")
    ]
    return max(sizes) if scale == 1 else min(sizes)


def proposition_5_2(case: Case, scale: float) -> float:
    softer = with_tau(case.game, scale * case.tau / (1 - case.beta))
    mixture = case.game.mixture(case.game.nash(case.beta), case.beta)
    return max(apart(mixture, softer.nash()), apart(mixture, softer.best_response(mixture)))


def estimates(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Probability of each pair, the two estimates of appendix D for it, and ‖∇ log π(y) + ∇ log π(y')‖²·f²."""
    game, policy = case.game, case.policy("π")
    slopes, advantage = scores_of(policy), game.tau * np.log(policy / game.ref)
    f = game.preferences - 0.5 - advantage[:, None] + advantage[None, :]
    first, second = np.broadcast_arrays(slopes[:, None, :], slopes[None, :, :])
    lone, both = -first * f[..., None], -(first - second) * f[..., None] / 2
    return np.outer(policy, policy), lone, both, f**2 * ((first + second) ** 2).sum(-1)


def variance(chance: np.ndarray, estimate: np.ndarray) -> float:
    mean = np.einsum("ij,ijk->k", chance, estimate)
    return float(np.einsum("ij,ijk->", chance, (estimate - mean) ** 2))


def proposition_d_1(case: Case, scale: float) -> float:
    """The contrastive estimate saves E[f²·‖∇ log π(y) + ∇ log π(y')‖²]/4 of the variance: no condition is needed."""
    chance, lone, both, square = estimates(case)
    return apart(variance(chance, lone) - variance(chance, both), scale * (chance * square).sum() / 4)


def proposition_d_1_means(case: Case, scale: float) -> float:
    """Both estimate the same: online IPO's gradient is 4/τ of it."""
    game = case.game
    chance, lone, both, _ = estimates(case)
    means = [np.einsum("ij,ijk->k", chance, estimate) for estimate in (lone, both)]
    online = game.expected_gradient(case.policy("π"), "online-ipo")
    return max(apart(means[0], means[1]), apart(online, scale * 4 / game.tau * means[1]))


def lemma_f_3(case: Case, scale: float) -> float:
    """Equation 15, in logits: π(y) times its derivative in π(y), with the sign of a loss."""
    game, policy, behaviour = case.game, case.policy("π"), case.policy("μ")
    advantage = game.tau * np.log(policy / game.ref)
    inner = (game.preferences - sigmoid(advantage[:, None] - advantage[None, :])) @ behaviour
    gradient = game.expected_gradient(policy, "offline-dpo", behaviour=behaviour)
    return apart(gradient, -scale * 2 * game.tau * behaviour * inner)


def equation_19(game: PreferenceGame) -> np.ndarray:
    """Left less right side, at the Nash equilibrium."""
    nash = game.nash()
    rates = game.win_rate(nash)
    difference: np.ndarray = rates - sigmoid(rates[:, None] - rates[None, :]) @ nash
    return difference


def lemma_f_5(case: Case, scale: float) -> float:
    nash = case.game.nash()
    gradient = case.game.expected_gradient(nash, "online-dpo")
    return apart(gradient, -scale * 2 * case.tau * nash * equation_19(case.game))


def theorem_f_6(case: Case, scale: float) -> float:
    """The two sides of equation 19 differ by (1 − α)·g and −α·g, g = 1 − p − σ(½ − p); p is p(2 ≻ 1)."""
    p, alpha = case.game.preferences[1, 0], case.game.nash()[0]
    gap = 1 - p - sigmoid(0.5 - p)
    return apart(equation_19(case.game), scale * gap * np.array([1 - alpha, -alpha]))


def theorem_f_7(case: Case, scale: float) -> float:
    """Under Bradley-Terry preferences π_ref·exp(r/τ) is stationary under DPO, online and for any behaviour."""
    tilted = case.game.ref * np.exp(scale * case.rewards / case.tau)
    policy = tilted / tilted.sum()
    online = size_of(case.game.expected_gradient(policy, "online-dpo"))
    offline = size_of(case.game.expected_gradient(policy, "offline-dpo", behaviour=case.policy("μ")))
    return max(online, offline) if scale == 1 else min(online, offline)


def remark_f_8(case: Case, scale: float) -> float:
    """Rock, paper, scissors of any strength: the uniform policy is Nash and stationary under online DPO."""
    strength = 0.05 + 0.4 * case.beta
    matrix = 0.5 + strength * (np.roll(np.eye(3), 1, 1) - np.roll(np.eye(3), -1, 1))
    matrix[0, 1] *= scale
    matrix[1, 0] = 1 - matrix[0, 1]
    game, uniform = PreferenceGame(matrix, np.full(3, 1 / 3), case.tau), np.full(3, 1 / 3)
    return max(apart(game.nash(), uniform), size_of(game.expected_gradient(uniform, "online-dpo")))


def remark_f_9(case: Case, scale: float) -> float:
    """Where μ never goes, offline DPO may put any mass: the rest of its solution, shrunk, is a solution."""
    tilted = case.game.ref * np.exp(case.rewards / case.tau)
    tilted[0] *= scale
    share = np.where(np.arange(case.actions) < case.actions - 1, tilted, 0)
    policy = case.beta * share / share.sum()
    policy[-1] = 1 - case.beta
    seen = np.where(np.arange(case.actions) < case.actions - 1, case.policy("μ"), 0)
    return size_of(case.game.expected_gradient(policy, "offline-dpo", behaviour=seen / seen.sum()))


CLAIMS: dict[Claim, object] = {
    expected_gradients: cases(actions=(2, 3), kinds=("soft", "bradley-terry")),
    equation_12: cases(),
    equation_13: cases(),
    proposition_4_1: cases(),
    proposition_4_1_alone: cases(),
    proposition_4_2: cases(),
    proposition_5_1_nash_md: cases(),
    proposition_5_1_ipo_md: cases(),
    equal_fixed_points: cases(),
    proposition_5_2: cases(),
    proposition_d_1: cases(),
    proposition_d_1_means: cases(),
    lemma_f_3: cases(),
    lemma_f_5: cases(),
    theorem_f_6: cases(actions=(2,)),
    theorem_f_7: cases(kinds=("bradley-terry",)),
    remark_f_8: cases(actions=(3,)),
    remark_f_9: cases(actions=(3, 5), kinds=("bradley-terry",)),
}


@pytest.mark.parametrize("scale", [1, 1.01])
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_formula_holds_and_one_that_is_one_per_cent_off_does_not(claim: Claim, scale: float) -> None:
    check(claim, CLAIMS[claim], scale)


@given(cases())
def test_the_printed_gradient_of_ipo_md_is_not_zero_where_it_should_be(case: Case) -> None:
    """Proposition 5.1 prints −(2/τ)·E_π'[∇ log π·(p(· ≻ π') − τ·log π/π_ref)], whose zeros are not those of eq. 13."""
    game = case.game
    for policy, wrong in ((game.nash(case.beta), True), (game.nash(), False)):
        beta = case.beta if wrong else 0.0
        mixture = game.mixture(policy, beta)
        printed = mixture @ (scores_of(policy) * regret(game, policy, mixture)[:, None])
        exact = covariance(game, policy, mixture)
        assert size_of(exact) < HOLDS
        assert (size_of(printed) > SEEN) == (wrong and size_of(mixture - policy) > 1e-5)


def test_the_online_loss_is_stationary_at_the_nash_policy_but_not_smallest_there() -> None:
    """Without the stop-gradient the value of eq. 11 falls further: proposition 4.1 is about the stationary point."""
    game = Case(seed=3, actions=3, kind="soft", tau=0.5, beta=0.5).game

    def value(policy: np.ndarray) -> float:
        advantage = np.log(policy / game.ref)
        ratios, half = advantage[:, None] - advantage[None, :], 1 / (2 * game.tau)
        loss = game.preferences * (ratios - half) ** 2 + (1 - game.preferences) * (ratios + half) ** 2
        return float(policy @ loss @ policy)

    nash = game.nash()
    moved = nash + 1e-3 * (np.eye(3) - nash)
    assert size_of(game.expected_gradient(nash, "online-ipo")) < HOLDS
    assert min(value(policy) for policy in moved) < value(nash) - 1e-4


@given(cases())
def test_the_contrastive_estimate_varies_less_under_any_condition_and_half_as_much_under_the_printed_one(
    case: Case,
) -> None:
    chance, lone, both, _ = estimates(case)
    alone, together = variance(chance, lone), variance(chance, both)
    assert together <= alone * (1 + HOLDS)
    slopes = scores_of(case.policy("π"))
    f = (lone**2).sum(-1) / (slopes**2).sum(-1)[:, None]
    if (chance * (slopes @ slopes.T) * f).sum() >= 0:  # eq. 14
        assert together <= alone / 2 * (1 + HOLDS)


def test_the_printed_condition_of_proposition_d_1_is_not_needed() -> None:
    failing = 0
    for seed in range(50):
        case = Case(seed=seed, actions=3, kind="soft", tau=1.0, beta=0.5)
        chance, lone, both, _ = estimates(case)
        slopes = scores_of(case.policy("π"))
        f = (lone**2).sum(-1) / (slopes**2).sum(-1)[:, None]
        failing += (chance * (slopes @ slopes.T) * f).sum() < 0
        assert variance(chance, both) < variance(chance, lone)
    assert failing > 10


@given(cases(actions=(2,)))
def test_the_sides_of_equation_19_are_three_quarters_of_the_bias_apart(case: Case) -> None:
    """Theorem F.6 with a number: |1 − p − σ(½ − p)| ≥ ¾·|½ − p|, so that only p = ½ closes it."""
    bias, alpha = 0.5 - case.game.preferences[1, 0], case.game.nash()[0]
    assert np.abs(equation_19(case.game)).max() >= 0.75 * abs(bias) * max(alpha, 1 - alpha) * (1 - 1e-9)
    even = PreferenceGame(np.full((2, 2), 0.5), case.game.ref, case.tau)
    assert size_of(equation_19(even)) < HOLDS


@pytest.mark.parametrize("preference", [0.4, 0.7, 1.0])
def test_online_dpo_ends_elsewhere_than_online_ipo(preference: float) -> None:
    matrix = np.array([[0.5, preference], [1 - preference, 0.5]])
    game = PreferenceGame(matrix, np.array([0.4, 0.6]), 1.0)
    ends = {name: game.trajectory(name, steps=20000, step_size=0.2, every=20000)[-1] for name in LOSSES}
    assert np.abs(ends["online-ipo"] - game.nash()).max() < 1e-9
    assert np.abs(ends["online-dpo"] - game.nash()).max() > 0.01


@given(cases(kinds=("bradley-terry",)))
def test_theorem_f_7_means_dpo_where_it_says_ipo(case: Case) -> None:
    tilted = case.game.ref * np.exp(case.rewards / case.tau)
    gradient = case.game.expected_gradient(tilted / tilted.sum(), "offline-ipo", behaviour=case.policy("μ"))
    assert size_of(gradient) > SEEN


def test_the_printed_matrix_of_figure_6_teaches_what_its_symmetrised_one_does() -> None:
    """y and y' are drawn alike, so that IPO sees the mean of p(y ≻ y') and 1 − p(y' ≻ y); equation 12 does not."""
    raw, policy = simplex.PRINTED, np.array([0.2, 0.3, 0.5])
    game = PreferenceGame(simplex.matrices()["printed"], simplex.REF, simplex.TAU)
    with jax.enable_x64(True):
        arguments = map(jnp.asarray, (policy, policy, raw, simplex.REF, np.asarray(simplex.TAU)))
        literal = np.asarray(literal_gradient(*arguments, loss=losses.ipo))
    assert apart(literal, game.expected_gradient(policy, "online-ipo")) < HOLDS
    end = game.nash()
    answer = simplex.REF * np.exp(raw @ end / simplex.TAU)
    assert np.abs(end - answer / answer.sum()).sum() > 0.05


@given(cases())
def test_a_divergence_that_is_constant_in_y_does_not_regularise(case: Case) -> None:
    """Section 6 prints RL's update with τ·KL(π, π_ref) in the place of τ·log π/π_ref: on average it vanishes."""
    policy = case.policy("π")
    printed = policy @ (scores_of(policy) * case.tau * kl(policy, case.game.ref))
    exact = policy @ (scores_of(policy) * case.tau * np.log(policy / case.game.ref)[:, None])
    assert size_of(printed) < HOLDS
    assert size_of(exact) > SEEN
