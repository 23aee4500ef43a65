"""Win rates: means and intervals by hand, the judge's taste for a place cancelled, the draws named by seed and name."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image
from scipy import stats
from small import PROMPTS, language_model

from fastpref.evaluation.side_by_side import compare, evaluate
from fastpref.evaluation.win_rates import WinRate, WinRates, bootstrap, tabulate, win_rate
from fastpref.judging.judgements import read
from fastpref.method.errors import JudgeError
from fastpref.models import save

GIVEN = {("a", "b"): 0.9, ("b", "a"): 0.2, ("c", "d"): 0.5, ("d", "c"): 0.5, ("e", "f"): 0.3, ("f", "e"): 0.9}


def table(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [GIVEN[pair] for pair in zip(first, second, strict=True)]


def early(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Likes the completion whose words come first in the alphabet."""
    return [0.5 + 0.5 * ((a < b) - (a > b)) for a, b in zip(first, second, strict=True)]


def two(**settings: Any) -> WinRate:
    return compare(language_model(), language_model(), PROMPTS, early, **{"max_new_tokens": 6} | settings)


def many(policies: Any, judge: Any = early, **settings: Any) -> WinRates:
    return evaluate(policies, PROMPTS, judge, **{"max_new_tokens": 6, "seeds": (0,)} | settings)


# Two sides ----------------------------------------------------------------------------------------------------------


def test_the_value_is_the_mean_of_both_orders() -> None:
    result = win_rate(["x", "y", "z"], ["a", "c", "e"], ["b", "d", "f"], table)
    # (0.9 + 1 − 0.2) / 2, (0.5 + 1 − 0.5) / 2, (0.3 + 1 − 0.9) / 2.
    np.testing.assert_allclose(result.preference, [0.85, 0.5, 0.2], rtol=1e-6)
    assert result.value == pytest.approx((0.85 + 0.5 + 0.2) / 3)
    assert 0.2 <= result.low < result.value < result.high <= 0.85
    assert result.records()[2] == {"prompt": "z", "policy": "e", "baseline": "f", "preference": pytest.approx(0.2)}


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
    with pytest.raises(JudgeError, match=r"probabilities in \[0, 1\], but received 3\.0"):
        win_rate(["x"] * 2, ["a"] * 2, ["b"] * 2, lambda *texts: [3.0, 0.5])


def test_the_same_seed_gives_the_same_comparison_and_another_does_not() -> None:
    one, again, other = two(), two(), two(seed=1)
    assert one.records() == again.records()
    assert (one.value, one.low, one.high) == (again.value, again.low, again.high)
    assert list(one.policy) != list(other.policy)
    assert list(one.baseline) != list(other.baseline)


def test_a_policy_against_itself_is_even_but_not_a_copy() -> None:
    result = two()
    assert list(result.policy) != list(result.baseline), "the two sides draw with different noise"
    assert 0 < result.low < 0.5 < result.high < 1
    assert list(result.prompts) == PROMPTS


def test_the_policy_is_the_first_side() -> None:
    seen: list[list[str]] = []

    def spy(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        seen.append(list(first))
        return [1.0] * len(prompts) if len(seen) == 1 else [0.0] * len(prompts)

    result = compare(language_model(), language_model(), PROMPTS, spy, max_new_tokens=6)
    assert result.value == 1.0
    assert seen == [list(result.policy), list(result.baseline)]


@pytest.mark.parametrize("prompts", [[], ["w1"]])
def test_too_few_prompts_are_refused_before_a_model_is_read(prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"at least 2 prompts, but received {len(prompts)}\."):
        compare("no/such/model", "no/such/model", prompts, early, max_new_tokens=6)


# Intervals ----------------------------------------------------------------------------------------------------------


def test_the_interval_is_the_bootstrap_of_another_library_and_nearly_the_normal_one() -> None:
    values = np.random.default_rng(3).beta(0.5, 0.4, (2, 400))
    low, high = bootstrap(values)
    error = values.std(1, ddof=1) / 400**0.5
    other = stats.bootstrap((values,), np.mean, axis=-1, n_resamples=4000, method="percentile", rng=5)
    for found, wanted in ((low, other.confidence_interval.low), (high, other.confidence_interval.high)):
        np.testing.assert_array_less(np.abs(found - wanted) / error, 0.2)
    np.testing.assert_array_less(np.abs(low - (values.mean(1) - 1.96 * error)) / error, 0.2)
    np.testing.assert_array_less(np.abs(high - (values.mean(1) + 1.96 * error)) / error, 0.2)


def test_rows_share_their_resamples_and_a_seed_names_them() -> None:
    values = np.random.default_rng(3).random((2, 20))
    low, high = bootstrap(values)
    # Of the complement the same resamples give the complementary ends: this could not hold with others.
    other_low, other_high = bootstrap(np.stack([values[0], 1 - values[0]]))
    assert (low[0], high[0]) == (other_low[0], other_high[0])
    np.testing.assert_allclose([other_low[1], other_high[1]], [1 - high[0], 1 - low[0]], rtol=1e-12)
    assert bootstrap(values, seed=1)[0].tolist() != low.tolist()


def test_an_interval_stays_within_zero_and_one() -> None:
    low, high = bootstrap(np.array([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.5] * 4]))
    assert high[0] == 1
    assert low[1] == 0
    assert (low[2], high[2]) == (0.5, 0.5)


def test_a_matrix_by_hand() -> None:
    preference = {
        ("a", "b"): np.array([[0.9, 0.7], [0.5, 0.3]]),
        ("a", "c"): np.array([[0.2, 0.2], [0.2, 0.2]]),
        ("b", "c"): np.array([[0.1, 0.4], [0.6, 0.6]]),
    }
    value, low, high, deviation = tabulate(["a", "b", "c"], preference)
    np.testing.assert_allclose(value, [[0.5, 0.6, 0.2], [0.4, 0.5, 0.425], [0.8, 0.575, 0.5]])
    # Means of the comparisons are 0.8 and 0.4; 0.2 and 0.2; 0.25 and 0.6.
    spread = [0.4 / 2**0.5, 0.0, 0.35 / 2**0.5]
    np.testing.assert_allclose(deviation[[0, 0, 1], [1, 2, 2]], spread, atol=1e-15)
    np.testing.assert_allclose(deviation, deviation.T)
    assert (low <= value).all()
    assert (value <= high).all()
    assert (low[0, 1], high[0, 1]) == pytest.approx((0.5, 0.7))  # means over comparisons: 0.7 and 0.5


# Many policies ------------------------------------------------------------------------------------------------------


def test_the_matrix_is_antisymmetric_and_agrees_with_its_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = many({"one": language_model(), "two": language_model(seed=1), "three": language_model()}, seeds=(0, 1))
    assert found.names == ["one", "two", "three"]
    assert (found.value + found.value.T == 1).all()
    assert (found.low + found.high.T == 1).all()
    assert found.value.diagonal().tolist() == [0.5] * 3
    assert found.deviation.diagonal().tolist() == [0.0] * 3
    records = found.records()
    assert len(records) == 3 * 2 * len(PROMPTS)
    for i, j, one, other in ((0, 1, "one", "two"), (0, 2, "one", "three"), (1, 2, "two", "three")):
        mine = [record for record in records if (record["policy"], record["baseline"]) == (one, other)]
        sides = [(record["policy_completion"], record["baseline_completion"]) for record in mine]
        wanted = np.array(early([], *zip(*sides, strict=True)))  # type: ignore[arg-type]
        np.testing.assert_allclose([record["preference"] for record in mine], wanted)
        assert found.value[i, j] == pytest.approx(wanted.mean())
        means = [wanted[: len(PROMPTS)].mean(), wanted[len(PROMPTS) :].mean()]
        assert found.deviation[i, j] == pytest.approx(np.std(means, ddof=1))
        assert {tuple(record["draws"]) for record in mine} == {(0, 0), (1, 1)}

    found.save(tmp_path / "out")
    content = orjson.loads((tmp_path / "out" / "win_rates.json").read_bytes())
    assert content["value"] == found.value.tolist()
    assert (content["names"], content["prompts"]) == (["one", "two", "three"], len(PROMPTS))
    with (tmp_path / "out" / "win_rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[2] | {"policy": "two", "baseline": "one", "comparisons": "2", "prompts": "24"} == rows[2]
    assert float(rows[2]["win_rate"]) == found.value[1, 0]
    assert [orjson.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_bytes().splitlines()] == records
    with Image.open(tmp_path / "out" / "win_rates.png") as image:
        assert min(image.size) > 300
    found.table()
    printed = capsys.readouterr().out
    assert f"{found.value[1, 0]:.3f} ± {found.deviation[1, 0]:.3f}" in printed
    assert f"{found.low[1, 0]:.3f} to {found.high[1, 0]:.3f}" in printed


def test_another_policy_changes_nobodys_draws() -> None:
    few = many({"one": language_model(), "two": language_model(seed=1)})
    more = many({"new": language_model(), "two": language_model(seed=1), "one": language_model()})
    assert few.texts[0] == more.texts[2]
    assert few.texts[1] == more.texts[1]
    assert few.texts[0] != more.texts[0], "the same model under two names draws with different noise"
    # One comparison has no deviation; the judgement is the same from the other side.
    assert np.isnan(few.deviation[0, 1])
    assert few.rows()[0]["deviation"] is None
    assert few.value[0, 1] == pytest.approx(more.value[2, 1])


def test_models_of_one_name_are_compared_across_as_in_the_papers_table() -> None:
    runs = {"ours": [language_model(seed=seed) for seed in (0, 1, 2)], "theirs": [language_model()] * 3}
    found = many(runs)
    judged = found.preference["ours", "theirs"]
    assert judged.shape == (9, len(PROMPTS))
    assert found.draws["ours", "theirs"] == [(i, j) for i in range(3) for j in range(3)]
    assert found.value[0, 1] == pytest.approx(judged.mean())
    assert found.deviation[0, 1] == pytest.approx(np.std(judged.mean(1), ddof=1))
    for (i, j), row in zip(found.draws["ours", "theirs"], judged, strict=True):
        np.testing.assert_allclose(row, early([], found.texts[0][i], found.texts[1][j]))


def test_directories_and_runs_are_policies(tmp_path: Path) -> None:
    save(language_model(), tmp_path / "sft")
    save(language_model(seed=1), tmp_path / "run" / "policy")
    found = many([tmp_path / "sft", tmp_path / "run", language_model()])
    assert found.names == [str(tmp_path / "sft"), str(tmp_path / "run"), "policy 2"]
    same = many({str(tmp_path / "run"): language_model(seed=1), "policy 2": language_model()})
    assert same.texts == found.texts[1:]


@pytest.mark.parametrize(
    ("policies", "text"),
    [
        ([language_model], "at least 2 policies, but received 1. Add a baseline"),
        ([], "at least 2 policies, but received 0."),
        (["a", "b", "a"], "policies must have different names, but received 'a' 2 times. Pass a mapping"),
        ({"a": language_model, "b": []}, "a policy must have at least one model, but 'b' has none"),
        (["no/such", "no/other"], "a policy must be a model directory, a run directory .* but no/such is not there"),
        (["tests", language_model], "but tests is none of them. Check the path"),
    ],
)
def test_policies_that_cannot_be_compared_are_refused(policies: Any, text: str) -> None:
    made = [model() if callable(model) else model for model in policies] if isinstance(policies, list) else policies
    if isinstance(made, dict):
        made = {name: model() if callable(model) else model for name, model in made.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        many(made)


def test_other_arguments_that_cannot_work_are_refused() -> None:
    policies = {"one": language_model(), "two": language_model()}
    with pytest.raises(ValueError, match=r"seeds must be different, at least one, but received \[1, 1\]"):
        many(policies, seeds=(1, 1))
    with pytest.raises(ValueError, match=r"seeds must be different, at least one, but received \[\]"):
        many(policies, seeds=())
    with pytest.raises(JudgeError, match=r"the judge must answer without raising, but .* raised RuntimeError: no"):
        many(policies, judge=lambda *texts: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(ValueError, match=r"at least 2 prompts, but received 1"):
        evaluate(policies, ["w1"], early, max_new_tokens=6)


def test_what_a_folder_keeps_is_asked_once(tmp_path: Path) -> None:
    """A judge that fails in the middle of a comparison has answered before for good."""
    asked: list[int] = []

    def fails_third(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        asked.append(len(prompts))
        if len(asked) == 3:
            raise ConnectionError("gone")
        return early(prompts, first, second)

    fails_third.identity = "fails third"  # type: ignore[attr-defined]
    policies = {"one": language_model(), "two": language_model(seed=1), "three": language_model(seed=2)}
    with pytest.raises(JudgeError, match="raised ConnectionError: gone"):
        many(policies, fails_third, save=tmp_path)
    found = many(policies, fails_third, save=tmp_path)
    # Two orders of three pairs, and the call that failed.
    assert asked == [len(PROMPTS)] * 7
    expected = many(policies)
    for pair in expected.preference:
        np.testing.assert_array_equal(found.preference[pair], expected.preference[pair])
    assert many(policies, fails_third, save=tmp_path).value.tolist() == expected.value.tolist()
    assert len(asked) == 7
    assert {record["purpose"] for record in read(tmp_path)} == {"side by side"}


def test_a_long_comparison_is_asked_in_parts() -> None:
    asked: list[int] = []

    def counts(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        asked.append(len(prompts))
        return [0.25 if a < b else 0.5 for a, b in zip(first, second, strict=True)]

    prompts = [str(number) for number in range(130)]
    first, second = [f"{number % 7}" for number in range(130)], [f"{number % 5}" for number in range(130)]
    found = win_rate(prompts, first, second, counts)
    assert asked == [64, 64, 64, 64, 2, 2]
    by_hand = [0.375 if a < b else 0.625 if a > b else 0.5 for a, b in zip(first, second, strict=True)]
    np.testing.assert_array_equal(found.preference, by_hand)
