"""What a judge may answer, and what is said when it answers something else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fastpref.judging.protocol import ask, rate
from fastpref.method.errors import JudgeError


def shortest(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in zip(first, second, strict=True)]


def test_a_plain_function_is_a_judge() -> None:
    answer = ask(shortest, ["x"] * 3, ["a", "bb", "c"], ["aa", "b", "d"])
    assert answer.dtype == np.float32
    assert answer.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([0.5], r"one probability for each of 2 prompts, but returned an array of shape \(1,\)"),
        ([[0.5], [0.5]], r"shape \(2, 1\)"),
        ([0.5, float("nan")], r"in \[0, 1\], but returned nan for pair 1 \(1 of 2 answers are wrong\)"),
        ([-0.1, 2.0], r"but returned -0.1\d* for pair 0 \(2 of 2"),
        (["yes", "no"], r"must return numbers, but returned list"),
        (None, r"the judge must return"),
    ],
)
def test_anything_but_probabilities_is_refused(answer: Any, text: str) -> None:
    with pytest.raises(JudgeError, match=text):
        ask(lambda *texts: answer, ["x", "y"], ["a", "b"], ["c", "d"])


def test_a_judge_that_raises_is_named() -> None:
    def broken(*texts: Sequence[str]) -> list[float]:
        raise TimeoutError("no answer")

    with pytest.raises(JudgeError, match=r"raised TimeoutError: no answer.*goes on from the last checkpoint") as caught:
        ask(broken, ["x"], ["a"], ["b"])
    assert isinstance(caught.value.__cause__, TimeoutError)


class Fixed:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> Any:
        return self.answer


def test_rewards_are_any_finite_numbers() -> None:
    answer = rate(Fixed([-3.5, 12]), ["x", "y"], ["a", "b"])
    assert answer.dtype == np.float32
    assert answer.tolist() == [-3.5, 12.0]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([1.0], r"one reward for each of 2 prompts, but returned an array of shape \(1,\)"),
        ([1.0, float("inf")], r"finite rewards, but returned inf for completion 1 \(1 of 2 answers are wrong\)"),
        (["good", "bad"], r"must return numbers, but returned list of str. Return one reward"),
    ],
)
def test_other_rewards_are_refused(answer: Any, text: str) -> None:
    with pytest.raises(JudgeError, match=text):
        rate(Fixed(answer), ["x", "y"], ["a", "b"])
