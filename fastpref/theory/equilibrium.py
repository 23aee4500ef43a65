"""The fixed point of a regularised preference game, with a proof of its distance to the exact one.

With K = P − ½ (antisymmetric) and x the opponent's mixture π^(1−β)·π_ref^β, eq. 13 of the IPO-MD paper reads
x ∝ π_ref·exp(s·K·x), s = (1 − β)/τ (its proposition 5.2). At s = 0 x is the reference; from there the solution is
followed to the wanted s by Newton's method, whose matrix is never singular because d·K·d = 0 for every d. Plain
iteration diverges for small τ.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

Vector = Float[np.ndarray, " A"]
Real = np.floating[Any]

NEAR, TRIES, POLISHES, SHORTEST = 1e-6, 8, 4, 1e-9
"""Residual that the path is kept to, Newton steps before a shorter stride is tried, those at the path's end, and the
shortest stride as a share of s: past it the arithmetic has run out of digits, which the bound will say."""


def equilibrium(
    preferences: Float[np.ndarray, "A A"], ref: Vector, tau: float, mixture_beta: float
) -> tuple[Vector, float]:
    """The fixed point of eq. 13 and a bound on its L1 distance to the exact one.

    The bound: F(x) = log x − log π_ref − s·K·x is strongly monotone, (F(x) − F(x*))·(x − x*) ≥ ‖x − x*‖₁² by Pinsker's
    inequality, and constants do not act on differences of policies, so ‖x − x*‖₁ ≤ (max F − min F)/2. The best response
    to x is at most 1/2τ times as far from π as x is from x*.

    Args:
      preferences: p(y ≻ y'), shape [A, A], p + pᵀ = 1 exactly.
      ref: π_ref, shape [A], above 0.
      tau: τ, above 0.
      mixture_beta: β in [0, 1].

    Returns:
      π, shape [A], and the bound.
    """
    # Residuals are differences of numbers as large as 1/2τ: they take what digits the machine has, the steps need few.
    advantages = np.asarray(preferences, np.longdouble) - np.longdouble(0.5)
    log_ref = np.log(np.asarray(ref, np.longdouble))
    target = (1 - np.longdouble(mixture_beta)) / np.longdouble(tau)
    log_ratio = _follow(advantages, log_ref, target)
    opponent, residual = _residual(advantages, log_ref, log_ratio, target)
    error = float(np.ptp(residual)) / 2
    if mixture_beta > 0:
        opponent, error = _softmax(log_ref + advantages @ opponent / np.longdouble(tau)), error / (2 * tau)
    return opponent.astype(np.float64), error


def _follow(advantages: np.ndarray, log_ref: np.ndarray, target: Real) -> np.ndarray:
    """log x/π_ref at s = `target`, centred under x."""
    log_ratio, scale = np.zeros_like(log_ref), np.longdouble(0)
    stride = min(target, np.longdouble(2))
    while scale < target:
        stride = min(stride, target - scale)
        policy, _ = _residual(advantages, log_ref, log_ratio, scale)
        guess = log_ratio + _newton(advantages, policy, scale, stride * (advantages @ policy))
        found, steps = _correct(advantages, log_ref, guess, scale + stride)
        if found is None:
            stride /= 2
            if stride < SHORTEST * scale:
                break
            continue
        log_ratio, scale = found, scale + stride
        stride *= 3 if steps <= 3 else 1.5
    for _ in range(POLISHES):
        policy, residual = _residual(advantages, log_ref, log_ratio, scale)
        log_ratio = log_ratio + _newton(advantages, policy, scale, -residual)
    return log_ratio


def _correct(
    advantages: np.ndarray, log_ref: np.ndarray, log_ratio: np.ndarray, scale: Real
) -> tuple[np.ndarray | None, int]:
    before = np.inf
    for steps in range(TRIES):
        policy, residual = _residual(advantages, log_ref, log_ratio, scale)
        size = float(np.ptp(residual))
        if size < NEAR:
            return log_ratio, steps
        if not size < before:
            break
        before = size
        log_ratio = log_ratio + _newton(advantages, policy, scale, -residual)
    return None, TRIES


def _residual(
    advantages: np.ndarray, log_ref: np.ndarray, log_ratio: np.ndarray, scale: Real
) -> tuple[np.ndarray, np.ndarray]:
    policy = _softmax(log_ref + log_ratio)
    residual = log_ratio - scale * (advantages @ policy)
    return policy, residual - policy @ residual


def _newton(advantages: np.ndarray, policy: np.ndarray, scale: Real, wanted: np.ndarray) -> np.ndarray:
    """The change of log x that changes log x − s·K·x by `wanted` and a constant, and keeps the sum of x."""
    matrix = np.eye(len(policy)) - (scale * advantages * policy).astype(np.float64)
    sides = np.stack([wanted.astype(np.float64), np.ones(len(policy))], 1)
    moved, constant = np.linalg.solve(matrix, sides).T
    weights = policy.astype(np.float64)
    change: np.ndarray = moved - constant * (weights @ moved) / (weights @ constant)
    return change


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    policy: np.ndarray = weights / weights.sum()
    return policy
