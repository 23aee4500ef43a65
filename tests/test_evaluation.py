"""Win rates: the mean and interval by hand, the judge's taste for a place cancelled, the draws named by a seed."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from small import PROMPTS, language_model

from fastpref.evaluation import WinRate, evaluate, win_rate
from fastpref.judging import JudgeError

GIVEN = {("a", "b"): 0.9, ("b", "a"): 0.2, ("c", "d"): 0.5, ("d", "c"): 0.5, ("e", "f"): 0.3, ("f", "e"): 0.9}


def table(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [GIVEN[pair] for pair in zip(first, second, strict=True)]


def shorter(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [0.5 + 0.5 * np.sign(len(b.split()) - len(a.split())) for a, b in zip(first, second, strict=True)]


def compare(**settings: Any) -> WinRate:
    return evaluate(language_model(), language_model(), PROMPTS, shorter, **{"max_new_tokens": 6} | settings)


def test_value_and_interval_are_those_of_the_mean() -> None:
    result = win_rate(["x", "y", "z"], ["a", "c", "e"], ["b", "d", "f"], table)
    # (0.9 + 1 − 0.2) / 2, (0.5 + 1 − 0.5) / 2, (0.3 + 1 − 0.9) / 2.
    np.testing.assert_allclose(result.preference, [0.85, 0.5, 0.2], rtol=1e-6)
    mean = (0.85 + 0.5 + 0.2) / 3
    deviation = (((0.85 - mean) ** 2 + (0.5 - mean) ** 2 + (0.2 - mean) ** 2) / 2) ** 0.5
    half = 1.96 * deviation / 3**0.5
    assert result.value == pytest.approx(mean)
    assert result.low == pytest.approx(mean - half, abs=1e-4)
    assert result.high == pytest.approx(mean + half, abs=1e-4)
    assert result.records()[2] == {"prompt": "z", "policy": "e", "baseline": "f", "preference": pytest.approx(0.2)}


def test_the_interval_stays_within_zero_and_one() -> None:
    def certain(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [float(text != "b") if text in "ab" else 0.0 for text in first]

    result = win_rate(["x"] * 4, ["a", "a", "a", "c"], ["b", "b", "b", "a"], certain)
    assert (result.value, result.high) == (0.75, 1.0)
    opposite = win_rate(["x"] * 4, ["b", "b", "b", "a"], ["a", "a", "a", "c"], certain)
    assert (opposite.value, opposite.low) == (0.25, 0.0)


def test_a_taste_for_the_first_place_cancels() -> None:
    result = win_rate(["x"] * 3, ["a"] * 3, ["b"] * 3, lambda prompts, first, second: [0.9] * len(prompts))
    assert (result.value, result.low, result.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((1, 1, 1), "needs at least 2 prompts, but received 1."),
        ((0, 0, 0), "needs at least 2 prompts, but received 0."),
        ((3, 2, 3), "one completion of each side for each prompt, but received 3 prompts, 2 and 3 completions"),
        ((2, 2, 3), "received 2 prompts, 2 and 3 completions. Give lists of equal length"),
    ],
)
def test_lists_that_do_not_fit_are_refused(counts: tuple[int, int, int], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        win_rate(*(["a"] * count for count in counts), table)


def test_a_judge_that_answers_wrongly_is_refused() -> None:
    with pytest.raises(JudgeError, match=r"probabilities in \[0, 1\], but returned 3\.0"):
        win_rate(["x"] * 2, ["a"] * 2, ["b"] * 2, lambda *texts: [3.0, 0.5])


def test_the_same_seed_gives_the_same_comparison_and_another_does_not() -> None:
    one, again, other = compare(), compare(), compare(seed=1)
    assert one.records() == again.records()
    assert (one.value, one.low, one.high) == (again.value, again.low, again.high)
    assert list(one.policy) != list(other.policy)
    assert list(one.baseline) != list(other.baseline)


def test_a_policy_against_itself_is_even_but_not_a_copy() -> None:
    result = compare(max_new_tokens=6)
    assert list(result.policy) != list(result.baseline), "the two sides draw with different noise"
    assert result.low < 0.5 < result.high
    assert 0 < result.low < result.high < 1
    assert list(result.prompts) == PROMPTS


def test_the_policy_is_the_first_side() -> None:
    seen: list[list[str]] = []

    def spy(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        seen.append(list(first))
        return [1.0] * len(prompts) if len(seen) == 1 else [0.0] * len(prompts)

    result = evaluate(language_model(), language_model(), PROMPTS, spy, max_new_tokens=6)
    assert result.value == 1.0
    assert seen == [list(result.policy), list(result.baseline)]


@pytest.mark.parametrize("prompts", [[], ["w1"]])
def test_too_few_prompts_are_refused_before_a_model_is_read(prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"at least 2 prompts, but received {len(prompts)}\."):
        evaluate("no/such/model", "no/such/model", prompts, shorter, max_new_tokens=6)
