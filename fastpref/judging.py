"""The Judge protocol, and the one place where a judge is asked and its answer checked."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from fastpref.readers import Record


@runtime_checkable
class Judge(Protocol):
    """Anything that says how likely the first completion of a prompt beats the second. A plain function will do."""

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], /
    ) -> Sequence[float] | Float[np.ndarray, " P"]:
        """p(first ≻ second | prompt) for each of the P prompts, in [0, 1]; ½ is a tie."""
        ...


class JudgeError(RuntimeError):
    """A judge raised, or answered with something that is not one probability for each pair."""


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
    try:
        answer = judge(prompts, first, second)
    except Exception as error:
        raise JudgeError(
            f"the judge must answer without raising, but raised {type(error).__name__}: {error}. "
            "Mend the judge and start the same command again: it goes on from the last checkpoint."
        ) from error
    try:
        preference = np.asarray(answer, np.float32)
    except (TypeError, ValueError) as error:
        raise JudgeError(
            f"the judge must return numbers, but returned {type(answer).__name__}. "
            "Return one float in [0, 1] for each prompt."
        ) from error
    if preference.shape != (len(prompts),):
        raise JudgeError(
            f"the judge must return one probability for each of {len(prompts)} prompts, but returned an array of shape "
            f"{preference.shape}. Return a flat list in the order of the prompts."
        )
    wrong = ~((preference >= 0) & (preference <= 1))
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise JudgeError(
            f"the judge must return probabilities in [0, 1], but returned {preference[index]} for pair {index} "
            f"({int(wrong.sum())} of {len(prompts)} answers are wrong). "
            "Return p(first beats second), not a score or a difference of scores."
        )
    return preference


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
