"""Random games, and the one way in which every proposition is tested: it holds, and a formula 1 % off is seen.

A claim is a function `claim(case, scale) -> float`: how far the two sides of a formula are apart, relative to their
size, with one side (or the parameter inside it) multiplied by `scale`. At scale 1 that is rounding; at 1.01 it must not
be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.theory.games import PreferenceGame

HOLDS, SEEN = 1e-10, 1e-7
"""Largest error of a true formula, and smallest of one that is 1 % off."""

EXAMPLES = 40


@dataclass(frozen=True)
class Case:
    """A random game with what propositions speak of: policies, a behaviour policy, β and η."""

    seed: int
    actions: int
    kind: str
    tau: float
    beta: float

    @cached_property
    def rewards(self) -> np.ndarray:
        return np.random.default_rng(self.seed).normal(size=self.actions)

    @cached_property
    def game(self) -> PreferenceGame:
        return PreferenceGame(self.preferences, self.policy("ref"), self.tau)

    @property
    def preferences(self) -> np.ndarray:
        draws = np.random.default_rng([self.seed, 1]).uniform(size=(self.actions, self.actions))
        if self.kind == "bradley-terry":
            return 1 / (1 + np.exp(self.rewards[None, :] - self.rewards[:, None]))
        upper = np.triu(draws if self.kind == "soft" else np.round(draws), 1)
        return upper + np.tril(1 - upper.T, -1) + np.eye(self.actions) / 2

    def policy(self, name: str) -> np.ndarray:
        """A random policy with full support, another for every name."""
        logits = np.random.default_rng([self.seed, *name.encode()]).normal(size=self.actions)
        return np.exp(logits) / np.exp(logits).sum()


def cases(
    actions: tuple[int, ...] = (2, 3, 5), kinds: tuple[str, ...] = ("soft", "hard", "bradley-terry")
) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        seed=st.integers(0, 2**32 - 1),
        actions=st.sampled_from(actions),
        kind=st.sampled_from(kinds),
        tau=st.floats(0.3, 2),
        beta=st.floats(0.05, 0.9),
    )


Claim = Callable[[Case, float], float]


def check(claim: Claim, drawn: st.SearchStrategy[Case], scale: float) -> None:
    """The claim holds in every case at scale 1, and in none at another scale."""

    @settings(max_examples=EXAMPLES)
    @given(drawn)
    def run(case: Case) -> None:
        error = claim(case, scale)
        assert error < HOLDS if scale == 1 else error > SEEN, (case, error)

    run()


def apart(left: np.ndarray | float, right: np.ndarray | float) -> float:
    """Distance of two arrays, relative to their size."""
    one, two = np.asarray(left), np.asarray(right)
    return float(np.abs(one - two).max() / max(np.abs(one).max(), np.abs(two).max()))


def scores_of(policy: np.ndarray) -> np.ndarray:
    """∇ log π(y) in the logits of a softmax policy, one row per action, shape [A, A]."""
    return np.eye(len(policy)) - policy[None, :]


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))
