"""Models of a run directory, and the choice among them."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orjson
import pytest
from flax import nnx
from PIL import Image
from small import PROMPTS, language_model

from fastpref.evaluation.best_checkpoint import Ranking, select_checkpoint
from fastpref.evaluation.side_by_side import compare
from fastpref.method.errors import CheckpointError, JudgeError
from fastpref.models import LanguageModel, save
from fastpref.runs import checkpoints
from fastpref.runs.read_model import locate, read_model, step_directory


def early(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [0.5 + 0.5 * ((a < b) - (a > b)) for a, b in zip(first, second, strict=True)]


def same(one: LanguageModel, other: LanguageModel) -> bool:
    leaves = [jax.tree.leaves(nnx.state(model.module)) for model in (one, other)]
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def select(runs: Any, **settings: Any) -> Ranking:
    return select_checkpoint(runs, language_model(seed=1), PROMPTS, early, **{"max_new_tokens": 6} | settings)


def policy_of(step: int) -> LanguageModel:
    return language_model(seed=10 + step)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run that was killed before its final model was written: parameters, and what the optimiser kept."""
    folder = tmp_path / "stopped"
    for step in (1, 2, 3):
        arrays = nnx.split(policy_of(step).module)[1], {"count": jax.numpy.arange(step)}
        checkpoints.save(folder / "checkpoints", step, arrays, {}, fingerprint={}, keep=3)
    return folder


@pytest.fixture
def finished(unfinished: Path) -> Path:
    save(policy_of(3), unfinished / "policy")
    return unfinished


def test_a_checkpoint_is_the_policy_of_its_step(finished: Path) -> None:
    for step in (1, 2, 3):
        assert same(read_model(step_directory(finished, step)), policy_of(step))
    assert not same(policy_of(1), policy_of(3))
    assert same(read_model(finished), policy_of(3))
    assert same(read_model(finished / "policy"), policy_of(3))
    assert read_model(policy_of(1)) is policy_of(1)


def test_a_run_that_has_not_finished_needs_a_pattern(unfinished: Path) -> None:
    place = step_directory(unfinished, 2)
    with pytest.raises(FileNotFoundError, match=r"stands at step 3. Name one of its checkpoints, such as .*00000003"):
        read_model(unfinished)
    with pytest.raises(FileNotFoundError, match=r"has no final model .* Pass like=, a model of the same architecture"):
        read_model(place)
    assert same(read_model(place, like=language_model()), policy_of(2))
    with pytest.raises(CheckpointError, match=r"(?s)do not fit this model.*absent in the checkpoint"):
        read_model(place, like=language_model("t5"))


def test_a_damaged_or_missing_checkpoint_is_refused(unfinished: Path) -> None:
    place = step_directory(unfinished, 2)
    manifest = place / "manifest"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=r"must be as it was written, but is not: .*Choose another step"):
        read_model(place, like=language_model())
    with pytest.raises(FileNotFoundError, match=r"a policy must be a model directory, .*00000007 is not there"):
        locate(step_directory(unfinished, 7))


def test_part_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    tree = {"a": jax.numpy.arange(3.0), "b": (jax.numpy.ones(2), jax.numpy.zeros(0))}
    place = checkpoints.save(tmp_path, 1, tree, {}, fingerprint={}, keep=1)
    part = checkpoints.read(place, {"b": tree["b"]})
    assert jax.tree.map(lambda x: x.tolist(), part) == {"b": ([1.0, 1.0], [])}


def test_every_checkpoint_is_ranked_against_the_baseline(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranking = select(finished)
    assert sorted(one.step or 0 for one in ranking.candidates) == [1, 2, 3]
    values = [one.win_rate.value for one in ranking.candidates]
    assert values == sorted(values, reverse=True)
    assert ranking.best is ranking.candidates[0]
    assert same(read_model(ranking.best.source), policy_of(ranking.best.step or 0))
    ours, theirs = ranking.best.win_rate.policy, ranking.best.win_rate.baseline
    assert ranking.best.win_rate.value == pytest.approx(np.mean(early([], ours, theirs)))
    assert all(list(one.win_rate.baseline) == list(theirs) for one in ranking.candidates)

    ranking.table()
    printed = capsys.readouterr().out
    assert f"{values[0]:.3f}" in printed
    ranking.save(tmp_path / "out")
    with (tmp_path / "out" / "ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["win_rate"]) for row in rows] == values
    assert [row["checkpoint"] for row in rows] == [one.name for one in ranking.candidates]
    lines = (tmp_path / "out" / "records.jsonl").read_bytes().splitlines()
    assert len(lines) == 3 * len(PROMPTS)
    assert orjson.loads(lines[0])["checkpoint"] == ranking.best.name
    with Image.open(tmp_path / "out" / "ranking.png") as image:
        assert min(image.size) > 300


def test_a_copy_of_the_same_weights_does_exactly_as_well(unfinished: Path) -> None:
    # Common noise: two candidates differ by their weights alone, wherever they stand in the list.
    ranking = select([language_model(), step_directory(unfinished, 1), policy_of(1)])
    by_name = {one.name: one for one in ranking.candidates}
    copy, original = by_name[str(step_directory(unfinished, 1))], by_name["model 2"]
    assert (copy.run, copy.step) == (str(unfinished), 1)
    assert copy.win_rate.records() == original.win_rate.records()
    alone = select(language_model()).best
    assert alone.win_rate.records() == by_name["model 0"].win_rate.records()
    with pytest.raises(ValueError, match=r"a plot against steps needs checkpoints of a run, but received 1 models"):
        select(language_model()).plot("never.png")


def test_candidates_that_cannot_be_ranked_are_refused(tmp_path: Path) -> None:
    save(language_model(), tmp_path / "sft")
    with pytest.raises(ValueError, match=r"a ranking needs at least one checkpoint, but received an empty list"):
        select([])
    with pytest.raises(ValueError, match=rf"{re.escape(repr(str(tmp_path / 'sft')))} is given 2 times"):
        select([tmp_path / "sft", str(tmp_path / "sft")])
    with pytest.raises(FileNotFoundError, match=r"no/run is not there. Check the path"):
        select("no/run")
    with pytest.raises(ValueError, match=r"at least 2 prompts, but received 1"):
        select_checkpoint("no/run", "no/model", ["w1"], early, max_new_tokens=6)
    with pytest.raises(
        JudgeError, match=r"must return one probability for each of 24 prompts, but received an array of shape \(1,\)"
    ):
        select_checkpoint(language_model(), language_model(), PROMPTS, lambda *texts: [0.5], max_new_tokens=6)


def test_comparing_takes_runs_too(finished: Path) -> None:
    one = compare(finished, language_model(), PROMPTS, early, max_new_tokens=6)
    other = compare(policy_of(3), language_model(), PROMPTS, early, max_new_tokens=6)
    assert one.records() == other.records()
