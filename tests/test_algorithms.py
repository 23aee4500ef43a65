"""The table, and every row of it end to end on both model families."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from small import PROMPTS, language_model, prefers_w1

from fastpref.judging.models import RewardModel
from fastpref.learning.train import Step, TrainResult, train
from fastpref.method import losses
from fastpref.method.algorithms import ALGORITHMS, Algorithm
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError, DataError
from fastpref.runs.metrics import METRICS

SMALL: dict[str, Any] = {
    "batch_size": 4,
    "max_prompt_tokens": 8,
    "max_new_tokens": 3,
    "max_shapes": 1,
    "sample_every": 1,
    "tau": 0.5,
}
OPTIMIZER = optax.sgd(0.5)
"""One object for all: a compiled update belongs to its optimiser."""
PAIRS = [{"prompt": prompt, "chosen": "w1 w2", "rejected": "w3"} for prompt in PROMPTS]


class CountsW1:
    """A reward model: the number of w1."""

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [2.0 * text.split().count("w1") for text in completions]


def judge_of(row: Algorithm) -> Any:
    return {"labels": None, "preference": prefers_w1, "reward": CountsW1()}[row.judged_by]


def settings(name: str, **others: Any) -> TrainConfig:
    row = ALGORITHMS[name]
    several = {"completions": 4} if row.pairs in ("tournament", "win rates") else {}
    return TrainConfig(**{**SMALL, **several, "algorithm": name, **others})


def go(name: str, family: str = "decoder", **options: Any) -> TrainResult:
    row = ALGORITHMS[name]
    passed = {key: options.pop(key) for key in ("run_dir", "callbacks", "behaviour", "ref") if key in options}
    judge = options.pop("judge", judge_of(row))
    data = options.pop("data", PAIRS if row.offline else PROMPTS)
    config = settings(name, **options)
    return train(language_model(family), data, judge, config, optimizer=OPTIMIZER, quiet=True, **passed)


def weights(result: TrainResult) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(result.policy.module))]


@pytest.mark.parametrize("family", ["decoder", "t5"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_on_both_families(name: str, family: str, tmp_path: Path) -> None:
    method = ALGORITHMS[name]
    result = go(name, family, steps=2, rounds=2, run_dir=tmp_path)
    first, last = result.metrics
    assert not first["updates/skipped"]
    assert not last["updates/skipped"]
    assert {name for step in result.metrics for name in step} <= set(METRICS)
    assert ("eta" in first) == (method.strength == "eta")
    assert ("objective/rlhf_reward" in first) == ("objective/scores" in first) == (method.judged_by == "reward")
    if not method.offline:
        assert first["objective/kl" if "policy" in method.writers else "objective/writer_kl"] == 0
    if method.pairs != "first":
        # With π_t in the anchor it is no reward of DPO's kind, and has another name.
        margins = "rewards/margins" if method.anchor == "ref" else "anchor/margins"
        assert first[margins] == pytest.approx(0, abs=1e-5)
        assert (
            margins.replace(*(("rewards", "anchor") if method.anchor == "ref" else ("anchor", "rewards"))) not in first
        )
        if first["pairs/used"] and (method.offline or method.pairs == "tournament"):
            # Hard labels at the reference: the closed forms of the losses, with η = 3τ where that is the strength.
            strength = 1.5 if method.strength == "eta" else 0.5
            closed = {losses.ipo: (1 / (2 * strength)) ** 2, losses.dpo: np.log(2), losses.slic: 1.0}
            assert first["loss"] == pytest.approx(closed[method.loss], rel=1e-4)
    if method.in_rounds:
        assert [step["round"] for step in result.metrics] == [1, 2]
    if method.pairs == "tournament":
        reasons = ("used", "identical", "worst_won", "tie", "cyclic")
        assert sum(first[f"pairs/{reason}"] for reason in reasons) == 4
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(language_model(family).module))]
    moved = [not np.array_equal(*both) for both in zip(before, weights(result), strict=True)]
    assert any(moved) == any(step["grad_norm"] > 0 for step in result.metrics)
    assert (tmp_path / "samples.jsonl").exists() != method.offline
    if not method.offline:
        samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        told = {"reward"} if method.judged_by == "reward" else {"second", "preference"}
        assert [set(sample) for sample in samples] == [{"step", "prompt", "first"} | told] * 4


def test_a_run_in_rounds_goes_on_bit_for_bit_within_a_round(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: Step) -> None:
        if step.step == 5:
            raise Killed

    options: dict[str, Any] = {"steps": 6, "rounds": 2, "checkpoint_every": 4, "tau": 0.1, "temperature": 1.5}
    whole = go("inpo", run_dir=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        go("inpo", run_dir=tmp_path / "broken", callbacks=[kill], **options)
    # As if killed harder: the step after the checkpoint is lost, and π_t dates from before it.
    for folder in (tmp_path / "broken" / "checkpoints").iterdir():
        if folder.name != "00000004":
            for file in sorted(folder.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            folder.rmdir()
    broken = go("inpo", run_dir=tmp_path / "broken", **options)
    assert len(broken.metrics) == 6, "the steps of both processes"
    for name, value in whole.metrics[-1].items():
        assert name.startswith("time/") or value == broken.metrics[-1][name], name
    for one, other in zip(weights(whole), weights(broken), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_behaviour_model_is_what_the_mixture_mixes_with(tmp_path: Path) -> None:
    other = language_model(seed=1)
    go("ipo-md", steps=1, mixture_beta=1.0, mixture_partner="behaviour", behaviour=other, run_dir=tmp_path / "a")
    config = settings("online-ipo", steps=1)
    train(other, PROMPTS, prefers_w1, config, optimizer=OPTIMIZER, run_dir=tmp_path / "b", quiet=True)
    a, b = ((tmp_path / name / "samples.jsonl").read_bytes() for name in "ab")
    assert a == b
    # Its log-probs are no part of ρ: π is π_ref, whoever wrote.
    metrics = json.loads((tmp_path / "a" / "metrics.jsonl").read_text())
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_a_reward_model_is_a_preference_oracle_too() -> None:
    reward = RewardModel.from_model(language_model())
    result = go("inpo", steps=1, rounds=1, judge=reward)
    assert result.metrics[0]["pairs/used"] == 0
    assert result.metrics[0]["pairs/tie"] + result.metrics[0]["pairs/identical"] == 4
    (scored,) = go("rl", steps=1, judge=reward, baseline="batch").metrics
    assert scored["objective/scores"] == 0


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("offline-ipo", {"data": PROMPTS}, DataError, r"offline-ipo learns from recorded pairs: .*record"),
        ("offline-dpo", {"judge": prefers_w1}, ConfigError, r"must be given no judge, but received <function .*None"),
        ("online-dpo", {"judge": None}, ConfigError, r"online-dpo is online and must be given a judge.*None.*Pass a f"),
        ("rl", {"judge": None}, ConfigError, r"rl is online and must be given a judge.*Pass a RewardModel"),
        (
            "rl",
            {"judge": prefers_w1},
            ConfigError,
            r"judged by rewards.*scores.*<function.*Pass a RewardModel",
        ),
        ("ipo-md", {"mixture_partner": "behaviour"}, ConfigError, r"behaviour must be a model .*received None"),
        ("offline-ipo", {"eval_every": 1}, ConfigError, r"eval_every=1 needs a judge of pairs, but received None"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, options: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        go(name, steps=1, **options)


def test_a_behaviour_model_without_its_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"behaviour must be None for mixture_partner='ref', but received Language"):
        go("ipo-md", steps=1, behaviour=language_model())


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("ipo-md", {"judged_by": "labels"}, r"come from the data together, but received .*mixture.*labels"),
        ("offline-ipo", {"pairs": "tournament"}, r"recorded pairs are learned from as they are.*Use writers"),
        ("rl", {"judged_by": "preference"}, r"a reward judges one completion, a preference two or more"),
        ("ipo-md", {"writers": ("mixture",) * 3}, r"pairs='both' learns from two completions.*tournament"),
        ("inpo", {"writers": ("round", "policy")}, r"one model writes all completions of a step"),
        ("ipo-md", {"pairs": "first"}, r"a contrastive loss needs both completions, but received 'first'"),
        ("sppo", {"pairs": "tournament"}, r"needs a score for each, but received 'tournament'.*win rates"),
        ("rl", {"pairs": "win rates"}, r"pairs='win rates' learns from two completions, but received \('policy',\)"),
    ],
)
def test_a_row_whose_parts_do_not_fit_is_refused(name: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(ALGORITHMS[name], **changes)


def test_who_writes_and_what_is_compared_with_are_read_off_the_row() -> None:
    assert ALGORITHMS["nash-md-pg"].mixture_betas(0.25) == (0.0, 0.25)
    assert ALGORITHMS["ipo-md"].mixture_betas(0.25, 2) == (0.25, 0.25)
    assert ALGORITHMS["inpo"].mixture_betas(0.25, 3) == (0.0, 0.0, 0.0)
    assert ALGORITHMS["inpo"].anchor_weights(0.5, 2.0) == (0.25, 0.75)
    assert ALGORITHMS["inpo"].anchor_weights(0.0, 2.0) == ALGORITHMS["sppo"].anchor_weights(0.5, 2.0) == (0.0, 1.0)
    assert ALGORITHMS["iterative-dpo"].anchor_weights(0.5, 2.0) == (1.0, 0.0)
