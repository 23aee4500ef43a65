"""Tabular preference games: what every algorithm here should do, known exactly.

A game is a matrix of preferences p(y ≻ y') over A actions, a reference π_ref and τ. Two players choose policies; the
first is paid E[p(y ≻ y')] − τ·KL(π₁ ‖ π_ref) + τ·KL(π₂ ‖ π_ref), the second what is left to 1. Equations are those of
"Human Alignment of Large Language Models through Online Preference Optimisation" (IPO-MD) and of "Iterative Nash
Policy Optimization" (INPO); `docs/theory.md` says where the printed ones are loose. All numbers are float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike

from fastpref.method.algorithms import ALGORITHMS
from fastpref.method.errors import ConfigError, require
from fastpref.method.losses import Objective
from fastpref.theory.equilibrium import equilibrium

Vector = Float[np.ndarray, " A"]


class PreferenceGame:
    """A regularised preference game over A actions (IPO-MD eq. 9).

    Args:
      preferences: p(y ≻ y') for row y and column y', shape [A, A], in [0, 1], with p(y ≻ y') + p(y' ≻ y) = 1.
      ref: π_ref, shape [A], above 0 everywhere, summing to 1.
      tau: strength of the regularisation towards the reference, above 0.

    Raises:
      ConfigError: a rule above is broken; sums may be off by 1e-6, the rounding of float32, which is then taken out.
    """

    preferences: Float[np.ndarray, "A A"]
    ref: Vector
    tau: float

    def __init__(self, preferences: ArrayLike, ref: ArrayLike, tau: float) -> None:
        matrix = preference_matrix(preferences)
        self.ref = distribution(ref, len(matrix), "ref", full_support=True)
        require(bool(np.isfinite(tau) and tau > 0), "tau must be a finite number above 0", tau, "Give 0.1, say.")
        self.preferences, self.tau = matrix, float(tau)

    def win_rate(self, opponent: ArrayLike) -> Vector:
        """p(y ≻ opponent) = E_y'[p(y ≻ y')] for every action y, shape [A]."""
        rates: Vector = self.preferences @ self._policy(opponent)
        return rates

    def payoff(self, first: ArrayLike, second: ArrayLike) -> float:
        """What the first player is paid: E[p(y ≻ y')] − τ·KL(first ‖ ref) + τ·KL(second ‖ ref) (eq. 9)."""
        one, two = self._policy(first), self._policy(second)
        return float(one @ self.preferences @ two - self.tau * (kl(one, self.ref) - kl(two, self.ref)))

    def best_response(self, opponent: ArrayLike) -> Vector:
        """The policy that is paid most against `opponent`: ∝ π_ref(y)·exp(p(y ≻ opponent)/τ) (eq. 7), shape [A]."""
        return _softmax(np.log(self.ref) + self.win_rate(opponent) / self.tau)

    def mixture(self, policy: ArrayLike, mixture_beta: float) -> Vector:
        """The geometric mixture π^(1−β)·π_ref^β, normalised, shape [A]; β = 0 is the policy and 1 the reference."""
        probabilities, weight = self._policy(policy), _mixture_weight(mixture_beta)
        if weight == 0:
            return probabilities
        return self.ref if weight == 1 else _softmax((1 - weight) * _log(probabilities) + weight * np.log(self.ref))

    def duality_gap(self, policy: ArrayLike) -> float:
        """What best responses gain against `policy`, both players together: 0 at the Nash equilibrium only.

        max_π₁ J(π₁, π) − min_π₂ J(π, π₂) (INPO section 2.2). For a symmetric game it is 2τ·KL(π ‖ best response to π),
        and is computed as that: exact to rounding even where it is tiny.
        """
        probabilities = self._policy(policy)
        return 2 * self.tau * kl(probabilities, self.best_response(probabilities))

    def nash(self, mixture_beta: float = 0.0) -> Vector:
        """The best response to the mixture of itself and the reference: π ∝ π_ref·exp(p(· ≻ π^(1−β)·π_ref^β)/τ).

        At β = 0 this is the Nash equilibrium (eq. 12), else the fixed point of IPO-MD and Nash-MD-PG (eq. 13). Its
        residual proves that its L1 distance to the exact policy is at most 1e-10.

        Args:
          mixture_beta: β in [0, 1], the weight of the reference in the opponent.

        Returns:
          The policy, shape [A].

        Raises:
          ConfigError: mixture_beta is outside [0, 1].
          ArithmeticError: τ is so small that arithmetic here cannot prove 1e-10: below about 1e-9, for β > 0 below
            about 1e-5 (where long double is no longer than double, 1e-6 and 1e-3).
        """
        policy, error = equilibrium(self.preferences, self.ref, self.tau, _mixture_weight(mixture_beta))
        if not error <= 1e-10:
            raise ArithmeticError(
                f"the equilibrium must be certain to 1e-10, but for tau = {self.tau:g} and mixture_beta = "
                f"{mixture_beta:g} rounding leaves an error of up to {error:.1e}. Raise tau."
            )
        return policy

    def mirror_descent(self, etas: ArrayLike, start: ArrayLike | None = None) -> Float[np.ndarray, "T A"]:
        """Online mirror descent: π_(t+1) ∝ exp(p(y ≻ π_t)/η_t)·π_ref^(τ/η_t)·π_t^(1−τ/η_t) (INPO eq. 5).

        Args:
          etas: η_t of each of N steps, shape [N], above 0; 1/η is the learning rate.
          start: π_0, shape [A]; the reference if None.

        Returns:
          The policies π_0 to π_N, shape [T, A], T = N + 1.
        """
        rates = np.asarray(etas, np.float64)
        require(rates.ndim == 1, "etas must have the shape [N]", rates.shape, "Give one η per step.")
        require(bool(np.all(rates > 0)), "every η must be above 0", float(rates.min(initial=np.inf)), "Give τ or more.")
        log_ref = np.log(self.ref)
        policies = [self.ref if start is None else self._policy(start)]
        for eta in rates:
            log_ratio = _log(policies[-1]) - log_ref
            step = (self.preferences @ policies[-1] - self.tau * log_ratio) / eta
            policies.append(_softmax(log_ref + log_ratio + step))
        return np.stack(policies)

    def expected_gradient(
        self, policy: ArrayLike, algorithm: str, *, mixture_beta: float = 0.0, behaviour: ArrayLike | None = None
    ) -> Vector:
        """The gradient of an algorithm's expected loss in the logits of a softmax policy; training goes against it.

        The expectation is exact, over y, y' and the label; the samplers are held fixed (the paper's SG), and the
        slope of the loss is that of `fastpref.method.losses`.

        Args:
          policy: π, shape [A], above 0 everywhere.
          algorithm: a name of `fastpref.ALGORITHMS` whose pairs are written by two, outside rounds.
          mixture_beta: β, for algorithms that sample from the mixture.
          behaviour: μ, shape [A]: whose data an offline algorithm has, and what the mixture π^(1−β)·μ^β is made with
            (IPO-MD section 5.1); the reference if None.

        Returns:
          The gradient, shape [A]; it sums to 0.

        Raises:
          ConfigError: an unknown algorithm, or an argument that breaks its rule.
        """
        logits = np.log(distribution(policy, len(self.ref), "policy", full_support=True))
        setting, objective = self._setting(algorithm, mixture_beta, behaviour)
        with jax.enable_x64(True):
            return np.asarray(_gradient(jnp.asarray(logits), *map(jnp.asarray, setting), objective=objective))

    def trajectory(
        self,
        algorithm: str,
        *,
        steps: int,
        step_size: float,
        mixture_beta: float = 0.0,
        behaviour: ArrayLike | None = None,
        start: ArrayLike | None = None,
        every: int = 1,
    ) -> Float[np.ndarray, "T A"]:
        """Policies along gradient descent on the logits, with the exact expected gradient of `expected_gradient`.

        Args:
          algorithm: as for `expected_gradient`.
          steps: number of steps, at least 0.
          step_size: what multiplies the gradient.
          mixture_beta: as for `expected_gradient`.
          behaviour: as for `expected_gradient`.
          start: first policy, shape [A], above 0 everywhere; the reference if None.
          every: keep each `every`-th policy, at least 1.

        Returns:
          The policies after 0, every, 2·every, ... steps, shape [T, A], T = 1 + steps // every.

        Raises:
          ConfigError: an unknown algorithm, or an argument that breaks its rule.
        """
        require(steps >= 0 and every >= 1, "steps must be 0 or more and every 1 or more", (steps, every), "Raise it.")
        first = self.ref if start is None else distribution(start, len(self.ref), "start", full_support=True)
        setting, objective = self._setting(algorithm, mixture_beta, behaviour)
        with jax.enable_x64(True):
            logits = _descend(
                jnp.log(first),
                jnp.asarray(step_size, jnp.float64),
                *map(jnp.asarray, setting),
                objective=objective,
                kept=steps // every,
                every=every,
            )
            return np.concatenate([first[None], np.asarray(jax.nn.softmax(logits))])

    def _policy(self, policy: ArrayLike) -> Vector:
        return distribution(policy, len(self.ref), "policy")

    def _setting(
        self, algorithm: str, mixture_beta: float, behaviour: ArrayLike | None
    ) -> tuple[tuple[np.ndarray, ...], Objective]:
        """Preferences, log π_ref, τ, weights of π in the two samplers, log of what else they mix; and the objective."""
        beta = _mixture_weight(mixture_beta)
        # What is left out chooses its pairs from many, has a reward, or goes in rounds.
        left_out = {name for name, row in ALGORITHMS.items() if row.selects or row.in_rounds or len(row.writers) != 2}
        known = [name for name in ALGORITHMS if name not in left_out]
        require(algorithm in known, "algorithm must be one of " + ", ".join(known), algorithm, "Choose one.")
        row = ALGORITHMS[algorithm]
        partner = self.ref if behaviour is None else distribution(behaviour, len(self.ref), "behaviour")
        shares = {"policy": 1.0, "mixture": 1 - beta, "data": 0.0}
        weights = np.array([shares[writer] for writer in row.writers])
        return (self.preferences, np.log(self.ref), np.asarray(self.tau), weights, _log(partner)), row.objective


def preference_matrix(preferences: ArrayLike) -> Float[np.ndarray, "A A"]:
    """A matrix of preferences, checked and made antisymmetric about ½ to the last bit, float64.

    Raises:
      ConfigError: not a square matrix of at least 2 actions, a value outside [0, 1], or p(y ≻ y') + p(y' ≻ y) further
        than 1e-6 from 1.
    """
    matrix = _array(preferences, "preferences")
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and len(matrix) >= 2
    require(square, "preferences must have the shape [A, A], A of 2 or more", matrix.shape, "Give one row per action.")
    outside = matrix[~((matrix >= 0) & (matrix <= 1))]
    require(not outside.size, "preferences must lie in [0, 1]", outside[:1].tolist(), "Give probabilities.")
    off = np.abs(matrix + matrix.T - 1)
    row, column = np.unravel_index(off.argmax(), off.shape)
    require(
        bool(off.max() <= 1e-6),
        f"p(y ≻ y') + p(y' ≻ y) must be 1, for y = {row} and y' = {column} too",
        (float(matrix[row, column]), float(matrix[column, row])),
        "Set one of the two to 1 minus the other (both to 0.5 where y is y').",
    )
    balanced: Float[np.ndarray, "A A"] = 0.5 + (matrix - matrix.T) / 2
    return balanced


def distribution(values: ArrayLike, actions: int, name: str, *, full_support: bool = False) -> Vector:
    """Probabilities of the actions, checked, summing to 1, float64.

    Raises:
      ConfigError: a wrong shape, a negative value, with full_support a zero, or a sum further than 1e-6 from 1.
    """
    probabilities = _array(values, name)
    require(
        probabilities.shape == (actions,),
        f"{name} must have the shape [A] = [{actions}]",
        probabilities.shape,
        "Give one probability per action.",
    )
    least = probabilities.min()
    if full_support:
        remedy = "Remove actions that never occur, or give them a small probability."
        require(bool(least > 0), f"{name} must be above 0 for every action", float(least), remedy)
    require(bool(least >= 0), f"{name} must not be below 0", float(least), "Give probabilities.")
    total = float(probabilities.sum())
    require(abs(total - 1) <= 1e-6, f"{name} must sum to 1", total, "Divide it by its sum.")
    return probabilities / total


def kl(policy: Vector, other: Vector) -> float:
    """KL(policy ‖ other) in nats, never below 0: each action's term is other − policy + policy·log(policy/other)."""
    log_ratio = np.log(policy, where=policy > 0, out=np.zeros_like(policy)) - _log(other)
    known = policy > 0
    terms = policy[known] * (np.expm1(-log_ratio[known]) + log_ratio[known])
    return float(terms.sum() + other[~known].sum())


def _array(values: ArrayLike, name: str) -> np.ndarray:
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be an array of numbers, but {error}. Give rows of equal length.") from error


def _mixture_weight(mixture_beta: float) -> float:
    require(0 <= mixture_beta <= 1, "mixture_beta must lie in [0, 1]", mixture_beta, "It is the reference's weight.")
    return float(mixture_beta)


def _log(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        logarithms: np.ndarray = np.log(probabilities)
    return logarithms


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.exp(logits - logits.max())
    return weights / np.float64(weights.sum())


def _sampler(log_policy: Array, weight: Array, log_partner: Array) -> Array:
    # The other side of each product may be log 0, whose product with 0 is not a number.
    mixed = jnp.where(weight == 0, 0.0, weight * log_policy) + jnp.where(weight == 1, 0.0, (1 - weight) * log_partner)
    return jax.nn.softmax(mixed)


@partial(jax.jit, static_argnames="objective")
def _gradient(
    logits: Float[Array, " A"],
    preferences: Float[Array, "A A"],
    log_ref: Float[Array, " A"],
    tau: Float[Array, ""],
    weights: Float[Array, " 2"],
    log_partner: Float[Array, " A"],
    *,
    objective: Objective,
) -> Float[Array, " A"]:
    log_policy = jax.nn.log_softmax(logits)
    advantage = log_policy - log_ref
    first, second = (_sampler(log_policy, weight, log_partner) for weight in weights)
    pairs = preferences.ravel()
    if objective.contrastive:
        ratios = (advantage[:, None] - advantage[None, :]).ravel()
        slopes = jax.grad(lambda values: objective.loss(values, pairs, tau=tau).sum())(ratios)
    else:
        logps, anchors = (jnp.repeat(values, len(log_ref)) for values in (log_policy, log_ref))
        slopes = jax.grad(lambda values: objective.loss(values, anchors, pairs - 0.5, tau=tau).sum())(logps)
    pulls = first[:, None] * second[None, :] * slopes.reshape(preferences.shape)
    # ρ(y, y') moves by +1 with the logit of y and by −1 with that of y', for the softmax's normaliser cancels; log π(y)
    # moves by +1 with the logit of y and by −π with all.
    against = pulls.sum(0) if objective.contrastive else jax.nn.softmax(logits) * pulls.sum()
    gradient: Array = pulls.sum(1) - against
    return gradient


@partial(jax.jit, static_argnames=("objective", "kept", "every"))
def _descend(
    logits: Float[Array, " A"],
    step_size: Float[Array, ""],
    *setting: Array,
    objective: Objective,
    kept: int,
    every: int,
) -> Float[Array, "T A"]:
    def step(_: Array | int, logits: Array) -> Array:
        moved: Array = logits - step_size * _gradient(logits, *setting, objective=objective)
        return moved

    def keep(logits: Array, _: None) -> tuple[Array, Array]:
        after = jax.lax.fori_loop(0, every, step, logits)
        return after, after

    policies: Array = jax.lax.scan(keep, logits, None, length=kept)[1]
    return policies
