"""Best and worst of K completions by 3K/2 − 1 comparisons (INPO, section 4.1)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

AskRound = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Standing(NamedTuple):
    """Best and worst of each prompt, p(best ≻ worst), whether that is above ½, and comparisons made."""

    best: Int[np.ndarray, " P"]
    worst: Int[np.ndarray, " P"]
    preference: Float[np.ndarray, " P"]
    kept: Bool[np.ndarray, " P"]
    comparisons: int


def run(ask_round: AskRound, num_prompts: int, k: int, prompt_ids: np.ndarray, step: int, seed: int) -> Standing:
    """Play the tournament of every prompt, a round at a time."""
    asked = 0

    def play(table: np.ndarray, sign: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal asked
        first, second = table[:, 0::2], table[:, 1::2]
        index = np.repeat(np.arange(num_prompts), first.shape[1])
        p = np.asarray(ask_round(index, first.ravel(), second.ravel())).reshape(first.shape)
        asked += p.size
        ahead = p >= 0.5
        return np.where(ahead, first, second), np.where(ahead, second, first)

    everyone = np.tile(np.arange(k), (num_prompts, 1))
    winners, losers = play(everyone, 1)
    while winners.shape[1] > 1:
        winners, _ = play(winners, 1)
        _, losers = play(losers, -1)
    best, worst = winners[:, 0], losers[:, 0]
    final = np.asarray(ask_round(np.arange(num_prompts), best, worst), np.float32)
    return Standing(best, worst, final, final > 0.5, asked + num_prompts)
