"""Which of K completions are learned from: both, one alone, the ends of a tournament or of the win rates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fastpref.judging.pairs import Jury, select
from fastpref.judging.recorded import RecordedJudge
from fastpref.method.errors import JudgeError

PROMPTS = 6
TASTE = [0.1, 0.9, 0.35, 0.6]


class Rewards:
    """Scores a text, which is a number, by its place in TASTE; counts how often it is asked."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        self.calls.append(len(completions))
        return [TASTE[int(text)] for text in completions]


class Prefers:
    """p(y ≻ y') = ½ + (taste − taste')/2."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        self.calls.append(len(prompts))
        return [0.5 + (TASTE[int(a)] - TASTE[int(b)]) / 2 for a, b in zip(first, second, strict=True)]


def jury(judge: Any, completions: Sequence[Sequence[int]]) -> Jury:
    """Completions of one token each, of prompts that are all the same."""
    tokens = np.asarray(completions, np.int32)[:, :, None]
    texts = [[str(token) for token in row] for row in completions]
    return Jury(
        RecordedJudge(judge),
        ["x"] * len(texts),
        texts,
        tokens,
        np.ones(tokens.shape[:2], np.int32),
        ids=np.arange(len(texts)),
        step=0,
    )


def shuffled(k: int = 4) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.permutation(4)[:k].tolist() for _ in range(PROMPTS)]


def taste(rows: list[list[int]]) -> np.ndarray:
    return np.array([[TASTE[token] for token in row] for row in rows], np.float32)


def chosen(judge: Any, rows: list[list[int]], pairs: str, **options: Any) -> Any:
    return select(pairs, jury(judge, rows), seed=0, **options)


class Both(Rewards):
    """A judge of a user's own that says that its preferences of pairs are those of its scores."""

    bradley_terry = True

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        raise AssertionError("K completions are scored, not their pairs compared")


class Other(Prefers, Rewards):
    """A judge of a user's own that scores, and has other preferences of pairs."""


@pytest.mark.parametrize("judge", [Prefers, Rewards, Both, Other])
@pytest.mark.parametrize("pairs", ["tournament", "win rates"])
def test_best_and_worst_are_those_of_the_taste(pairs: str, judge: Any) -> None:
    rows, asked = shuffled(), judge()
    found = chosen(asked, rows, pairs)
    np.testing.assert_array_equal(found.chosen, np.stack([taste(rows).argmax(1), taste(rows).argmin(1)], 1))
    assert found.where.all()
    assert (found.preference == 1).all() == (pairs == "tournament")
    # Rewards are asked for once, whatever is compared: σ(r − r') of the same numbers.
    if issubclass(judge, Rewards) and judge is not Other:
        assert asked.calls == [4 * PROMPTS]
        assert found.judged == pytest.approx(1 / (1 + np.exp(0.1 - 0.9)))
    else:
        assert found.judged == pytest.approx(0.9)
    comparisons = {"tournament": 5, "win rates": 6}[pairs]
    assert found.metrics["preference/comparisons"] == comparisons * PROMPTS


def test_win_rates_are_means_over_all_completions() -> None:
    rows = shuffled()
    found = chosen(Prefers(), rows, "win rates")
    mean = np.mean(TASTE)
    for which in (0, 1):
        of = np.take_along_axis(taste(rows), found.chosen[:, which : which + 1], 1)[:, 0]
        # p(y ≻ π_t) − ½ of a judge that is linear in the taste.
        np.testing.assert_allclose(found.scores[:, which], (of - mean) / 2, rtol=1e-5)


def test_an_upset_teaches_nothing_and_is_counted() -> None:
    def cyclic(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [float((int(b) - int(a)) % 4 in (1, 2)) for a, b in zip(first, second, strict=True)]

    found = chosen(cyclic, [[0, 1, 2, 3]] * PROMPTS, "tournament")
    dropped = sum(found.metrics[f"pairs/{reason}"] for reason in ("worst_won", "tie", "cyclic", "identical"))
    assert found.metrics["pairs/used"] + dropped == PROMPTS
    assert found.metrics["pairs/worst_won"] > 0
    assert (found.where == (found.judged > 0.5)).all()


@pytest.mark.parametrize("pairs", ["tournament", "win rates", "both"])
def test_identical_completions_are_left_out_without_asking(pairs: str) -> None:
    judge = Prefers()
    k = 2 if pairs == "both" else 4
    found = chosen(judge, [[1] * k] * PROMPTS, pairs)
    assert judge.calls == []
    assert not found.where.any()
    assert found.metrics["pairs/identical"] == PROMPTS
    assert (found.judged == 0.5).all()


def test_one_alone_is_weighed_by_its_preference_and_learned_from_even_in_a_tie() -> None:
    found = chosen(Prefers(), [[1, 0], [2, 2]], "first")
    np.testing.assert_allclose(found.scores[:, 0], [0.4, 0.0], atol=1e-6)
    assert found.where.all()
    assert found.metrics["pairs/identical"] == 1


def test_a_reward_is_compared_with_the_others_of_its_batch_alone() -> None:
    rows = [[0], [1], [2], [3]]
    plain, relative = (chosen(Rewards(), rows, "first", baseline=name) for name in ("none", "batch"))
    np.testing.assert_allclose(plain.scores[:, 0], TASTE, rtol=1e-6)
    others = [np.mean([taste for other, taste in enumerate(TASTE) if other != own]) for own in range(4)]
    np.testing.assert_allclose(relative.scores[:, 0], np.array(TASTE) - others, rtol=1e-5)
    assert plain.metrics["objective/scores"] == relative.metrics["objective/scores"] == pytest.approx(np.mean(TASTE))
    assert (plain.scores[:, 1] == 0).all()


def test_a_judge_that_errs_is_named_in_every_kind_of_choice() -> None:
    def broken(*texts: Sequence[str]) -> list[float]:
        return [2.0] * len(texts[0])

    for pairs in ("both", "first", "tournament", "win rates"):
        with pytest.raises(JudgeError, match=r"probabilities in \[0, 1\], but received 2.0"):
            chosen(broken, shuffled(2 if pairs in ("both", "first") else 4), pairs)
