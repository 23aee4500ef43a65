"""ΨPO on tabular problems: the objective that has RLHF, DPO and IPO as cases, and its optimum in closed form.

Source: "A General Theoretical Paradigm to Understand Learning from Human Preferences" (IPO), section 4. Against a fixed
behaviour policy μ, a policy is worth E[Ψ(p(y ≻ y'))] − τ·KL(π ‖ π_ref), y ~ π, y' ~ μ. With Ψ the identity this is IPO;
with the logit, and Bradley-Terry preferences, RLHF and DPO.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from fastpref.method.errors import require
from fastpref.theory.games import Vector, distribution, kl, preference_matrix

Psi = Callable[[np.ndarray], np.ndarray]
"""A non-decreasing function of probabilities, elementwise on arrays of any shape."""


def identity(preference: np.ndarray) -> np.ndarray:
    """Ψ of IPO: the probability itself; bounded, so that the regularisation always holds."""
    return preference


def logit(preference: np.ndarray) -> np.ndarray:
    """Ψ of RLHF and DPO: log(q/(1 − q)); ±∞ at certain preferences, where no τ holds the policy (IPO section 4.2)."""
    with np.errstate(divide="ignore"):
        values: np.ndarray = np.log(preference) - np.log1p(-preference)
    return values


def scores(preferences: ArrayLike, behaviour: ArrayLike, psi: Psi = identity) -> Vector:
    """g(y) = E_y'[Ψ(p(y ≻ y'))], y' ~ μ: what each action is worth before regularisation (IPO section 5.1).

    Args:
      preferences: p(y ≻ y'), shape [A, A], in [0, 1], p + pᵀ = 1.
      behaviour: μ, shape [A]; may be 0 somewhere.
      psi: Ψ, non-decreasing; `identity` and `logit` are the papers'.

    Returns:
      g, shape [A]; ±∞ where Ψ is.

    Raises:
      ConfigError: an array that breaks its rule, Ψ that decreases, or Ψ of +∞ and −∞ for one action.
    """
    matrix = preference_matrix(preferences)
    weights = distribution(behaviour, len(matrix), "behaviour")
    values = _apply(psi, matrix)[:, weights > 0]
    torn = np.isposinf(values).any(1) & np.isneginf(values).any(1)
    require(
        not bool(torn.any()),
        "an action's Ψ may be +∞ or −∞ but not both",
        f"both for action {int(torn.argmax())}",
        "Take a bounded Ψ, such as psi.identity, or move certain preferences off 0 and 1.",
    )
    # Not a matrix product: some of them turn ∞ times a number into none.
    totals: Vector = (values * weights[weights > 0]).sum(1)
    return totals


def optimal_policy(
    preferences: ArrayLike, behaviour: ArrayLike, ref: ArrayLike, tau: float, psi: Psi = identity
) -> Vector:
    """The policy that maximises the ΨPO objective: ∝ π_ref(y)·exp(E_y'[Ψ(p(y ≻ y'))]/τ) (IPO eq. 7).

    An action whose Ψ is −∞ gets 0, and one whose Ψ is +∞ all: the limits of eq. 7.

    Args:
      preferences: p(y ≻ y'), shape [A, A], in [0, 1], p + pᵀ = 1.
      behaviour: μ, shape [A], who plays y'.
      ref: π_ref, shape [A], above 0.
      tau: τ, above 0.
      psi: Ψ, non-decreasing.

    Returns:
      The policy, shape [A].

    Raises:
      ConfigError: an argument breaks its rule, or Ψ is +∞ for several actions or −∞ for all: no one optimum then.
    """
    values, reference = scores(preferences, behaviour, psi), _reference(ref, tau, preferences)
    endless = np.isposinf(values)
    certain = int(endless.sum())
    require(
        certain <= 1 and not bool(np.isneginf(values).all()),
        "Ψ must leave one optimum: +∞ for at most one action, −∞ not for all",
        values.tolist(),
        "Take a bounded Ψ, such as psi.identity, or move certain preferences off 0 and 1.",
    )
    if certain:
        return endless.astype(np.float64)
    logits = np.log(reference) + values / tau
    weights = np.exp(logits - logits.max())
    policy: Vector = weights / weights.sum()
    return policy


def objective(
    policy: ArrayLike, preferences: ArrayLike, behaviour: ArrayLike, ref: ArrayLike, tau: float, psi: Psi = identity
) -> float:
    """What ΨPO maximises: E[Ψ(p(y ≻ y'))] − τ·KL(π ‖ π_ref), y ~ π, y' ~ μ (IPO eq. 6).

    Args:
      policy: π, shape [A]; the others are those of `optimal_policy`.
      preferences: p(y ≻ y'), shape [A, A].
      behaviour: μ, shape [A].
      ref: π_ref, shape [A].
      tau: τ.
      psi: Ψ.

    Returns:
      The value, ±∞ where Ψ is at an action that the policy plays.

    Raises:
      ConfigError: an argument breaks its rule.
    """
    values, reference = scores(preferences, behaviour, psi), _reference(ref, tau, preferences)
    probabilities = distribution(policy, len(reference), "policy")
    played = probabilities > 0
    return float((probabilities[played] * values[played]).sum()) - tau * kl(probabilities, reference)


def _apply(psi: Psi, matrix: Float[np.ndarray, "A A"]) -> Float[np.ndarray, "A A"]:
    # Ψ is held to its rule at all preferences and between them, so that a wiggle does not hide.
    grid = np.unique(np.concatenate([matrix.ravel(), np.linspace(0, 1, 101)]))
    values = np.asarray(psi(grid), np.float64)
    require(values.shape == grid.shape, "Ψ must return one value per preference", values.shape, "Write it with numpy.")
    require(
        not bool(np.isnan(values).any()), "Ψ must be defined on [0, 1]", "nan", "Let it be ±∞ at the ends if it must."
    )
    falls = values[1:] < values[:-1]
    where = int(falls.argmax()) if falls.any() else 0
    require(
        not bool(falls.any()),
        "Ψ must be non-decreasing",
        f"{values[where]:g} at {grid[where]:g} and {values[where + 1 :][:1].sum():g} at {grid[where + 1]:g}",
        "A preferred answer must not be worth less.",
    )
    return values[np.searchsorted(grid, matrix)]


def _reference(ref: ArrayLike, tau: float, preferences: ArrayLike) -> Vector:
    require(bool(np.isfinite(tau) and tau > 0), "tau must be a finite number above 0", tau, "Give 0.1, say.")
    return distribution(ref, len(np.asarray(preferences)), "ref", full_support=True)
