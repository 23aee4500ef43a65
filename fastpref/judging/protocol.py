"""What judges and rewards are, and the one place where they are asked and their answers checked."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from fastpref.data.records import Record
from fastpref.method.errors import JudgeError


@runtime_checkable
class Judge(Protocol):
    """Anything that says how likely the first completion of a prompt beats the second. A plain function will do."""

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], /
    ) -> Sequence[float] | Float[np.ndarray, " P"]:
        """p(first ≻ second | prompt) for each of the P prompts, in [0, 1]; ½ is a tie."""
        ...


@runtime_checkable
class Rewarder(Protocol):
    """Anything that scores single completions, such as `fastpref.RewardModel`."""

    def scores(
        self, prompts: Sequence[str], completions: Sequence[str], /
    ) -> Sequence[float] | Float[np.ndarray, " P"]:
        """r(prompt, completion) of each of the P prompts, any finite number."""
        ...


def ask(judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, " P"]:
    """The judge's preferences, checked.

    Args:
      judge: the judge.
      prompts: P texts.
      first: y of each prompt.
      second: y' of each prompt.

    Returns:
      p(y ≻ y' | x), shape [P], float32, in [0, 1].

    Raises:
      JudgeError: the judge raised, gave another number of answers than P, or gave one that is not in [0, 1].
    """
    preference = _answer("probability", judge, prompts, first, second)
    wrong = ~((preference >= 0) & (preference <= 1))
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise JudgeError(
            f"the judge must return probabilities in [0, 1], but returned {preference[index]} for pair {index} "
            f"({int(wrong.sum())} of {len(prompts)} answers are wrong). "
            "Return p(first beats second), not a score or a difference of scores."
        )
    return preference


def rate(judge: Rewarder, prompts: Sequence[str], completions: Sequence[str]) -> Float[np.ndarray, " P"]:
    """The rewards of P completions, checked.

    Args:
      judge: the reward model.
      prompts: P texts.
      completions: one of each prompt.

    Returns:
      r(x, y), shape [P], float32.

    Raises:
      JudgeError: the reward model raised, gave another number of answers than P, or gave one that is not finite.
    """
    rewards = _answer("reward", judge.scores, prompts, completions)
    wrong = ~np.isfinite(rewards)
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise JudgeError(
            f"the judge must return finite rewards, but returned {rewards[index]} for completion {index} "
            f"({int(wrong.sum())} of {len(prompts)} answers are wrong). Mend the reward model."
        )
    return rewards


def _answer(
    kind: str, judge: Callable[..., Sequence[float] | np.ndarray], prompts: Sequence[str], *texts: Sequence[str]
) -> Float[np.ndarray, " P"]:
    """What the judge says, one float32 for each prompt."""
    try:
        answer = judge(prompts, *texts)
    except Exception as error:
        raise JudgeError(
            f"the judge must answer without raising, but raised {type(error).__name__}: {error}. "
            "Mend the judge and start the same command again: it goes on from the last checkpoint."
        ) from error
    try:
        numbers = np.asarray(answer, np.float32)
    except (TypeError, ValueError) as error:
        raise JudgeError(
            f"the judge must return numbers, but returned {type(answer).__name__}. "
            f"Return one {kind} for each prompt, as a float."
        ) from error
    if numbers.shape != (len(prompts),):
        raise JudgeError(
            f"the judge must return one {kind} for each of {len(prompts)} prompts, but returned an array of shape "
            f"{numbers.shape}. Return a flat list in the order of the prompts."
        )
    return numbers


def agreement(judge: Judge, records: Sequence[Record]) -> float:
    """Share of pairs where the judge and the record prefer the same completion, a tie of either counted as half."""
    prompts, chosen, rejected, preference = columns_of(records)
    given = np.sign(ask(judge, prompts, chosen, rejected) - np.float32(0.5))
    return float((1 + given * np.sign(preference - np.float32(0.5))).mean() / 2)


def columns_of(records: Sequence[Record]) -> tuple[list[str], list[str], list[str], Float[np.ndarray, " P"]]:
    """Prompts, first and second completions, and preferences of recorded pairs."""
    return (
        [record.prompt for record in records],
        [record.completions[0] for record in records],
        [record.completions[1] for record in records],
        np.array([record.preference for record in records], np.float32),
    )
