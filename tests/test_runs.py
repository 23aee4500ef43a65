"""Runs: what they report, learn and refuse, and that a killed one goes on as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small import PROMPTS, language_model, prefers_w1
from test_training import SMALL, metrics_of

from fastpref.learning.train import TrainResult, train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import CheckpointError, ConfigError, JudgeError
from fastpref.method.schedules import Schedule
from fastpref.models import LanguageModel
from fastpref.sampling.generate import write


def test_schedules_evaluation_and_rescoring_reach_the_metrics() -> None:
    config = TrainConfig(
        **SMALL,
        steps=3,
        tau=Schedule(start=1.0, end=0.5, steps=2),
        mixture_beta=Schedule(start=0.0, end=1.0, steps=2),
        rescore_reference=True,
        eval_every=2,
    )
    result = train(language_model(), PROMPTS, prefers_w1, config, eval_prompts=PROMPTS[:6], quiet=True)
    assert [step["tau"] for step in result.metrics] == [1.0, 0.75, 0.5]
    assert [step["mixture_beta"] for step in result.metrics] == [0.0, 0.5, 1.0]
    evaluated = [index for index, step in enumerate(result.metrics) if "eval/win_rate" in step]
    assert evaluated == [1, 2]
    for index in evaluated:
        step = result.metrics[index]
        assert step["eval/win_rate_low"] <= step["eval/win_rate"] <= step["eval/win_rate_high"]


def test_the_judged_word_becomes_more_frequent() -> None:
    config = TrainConfig(**SMALL | {"batch_size": 24}, algorithm="online-ipo", steps=30, tau=0.1)
    result = train(language_model(), PROMPTS, prefers_w1, config, quiet=True)

    def share(model: LanguageModel) -> float:
        texts = write(model, PROMPTS, seed=3, completions=8, max_new_tokens=6).texts
        words = [word for completions in texts for text in completions for word in text.split()]
        return words.count("w1") / len(words)

    # One word of 33 at first; the judge wants nothing but this one.
    assert share(result.policy) > 3 * share(language_model())
    assert result.metrics[-1]["rewards/accuracies"] > result.metrics[0]["rewards/accuracies"]


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from fastpref.method.config import TrainConfig
from fastpref.learning.train import train
from slow_packing import PaddedPairs, pack
from small import PROMPTS, language_model, prefers_w1
from test_training import SMALL

def kill(step):
    if step.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

config = TrainConfig(**SMALL, steps=5, checkpoint_every=2)
train(language_model(), PROMPTS, prefers_w1, config, run_dir=sys.argv[2], callbacks=[kill], quiet=True)
"""


def start(folder: Path, kill_at: int, cache: Path) -> int:
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", SCRIPT, tests, str(folder), str(kill_at)]
    return subprocess.run(command, env=os.environ | settings, check=False).returncode


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    cache = tmp_path / "compiled"
    assert start(tmp_path / "whole", 0, cache) == 0
    # Killed between checkpoints, killed again before the next one, then left to finish.
    assert start(tmp_path / "broken", 3, cache) == -signal.SIGKILL
    assert start(tmp_path / "broken", 4, cache) == -signal.SIGKILL
    assert start(tmp_path / "broken", 0, cache) == 0
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    for name in ("samples.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_judge_that_fails_loses_no_step(tmp_path: Path) -> None:
    calls = []

    def fails_third(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("gone")
        return prefers_w1(prompts, first, second)

    # What it counts does not decide what it says.
    fails_third.identity = "fails third"  # type: ignore[attr-defined]
    config = TrainConfig(**SMALL, steps=4)
    with pytest.raises(JudgeError, match=r"raised ConnectionError: gone"):
        train(language_model(), PROMPTS, fails_third, config, run_dir=tmp_path / "a", quiet=True)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["00000002"]
    train(language_model(), PROMPTS, fails_third, config, run_dir=tmp_path / "a", quiet=True)
    train(language_model(), PROMPTS, prefers_w1, config, run_dir=tmp_path / "b", quiet=True)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")


def test_a_run_that_goes_on_does_not_ask_again_what_was_judged(tmp_path: Path) -> None:
    """What was asked since the last checkpoint is answered by `judged.sqlite`, as a killed run leaves it."""
    asked: list[tuple[str, str, str]] = []

    def counts(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        asked.extend(zip(prompts, first, second, strict=True))
        return prefers_w1(prompts, first, second)

    counts.identity = "counts"  # type: ignore[attr-defined]
    config = TrainConfig(**SMALL, steps=4, checkpoint_every=2)
    train(language_model(), PROMPTS, counts, config, run_dir=tmp_path, quiet=True)
    before, questions = metrics_of(tmp_path), len(asked)
    assert questions
    shutil.rmtree(tmp_path / "checkpoints" / "00000004")
    shutil.rmtree(tmp_path / "policy")
    train(language_model(), PROMPTS, counts, config, run_dir=tmp_path, quiet=True)
    assert len(asked) == questions
    assert metrics_of(tmp_path) == before


def test_a_run_of_another_configuration_is_refused_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    def go(seed: int = 0, **settings: Any) -> TrainResult:
        config = TrainConfig(**SMALL, **settings)
        return train(language_model(seed=seed), PROMPTS, prefers_w1, config, run_dir=tmp_path, quiet=True)

    go(steps=1)
    with pytest.raises(CheckpointError, match=r"(?s)config.tau.*(1\.0.*0\.5|0\.5.*1\.0)"):
        go(steps=2, tau=0.5)
    with pytest.raises(CheckpointError, match=r"policy"):
        go(seed=1, steps=2)
    longer = go(steps=2)
    assert len(longer.metrics) == 2
    assert len(metrics_of(tmp_path)) == 2


def test_held_out_evaluation_needs_prompts() -> None:
    with pytest.raises(ConfigError, match=r"eval_every=1 needs at least 2 eval_prompts, but received 0"):
        train(language_model(), PROMPTS, prefers_w1, TrainConfig(**SMALL, steps=1, eval_every=1), quiet=True)


def test_long_prompts_are_dropped_and_counted() -> None:
    config = TrainConfig(**SMALL | {"max_prompt_tokens": 4, "max_lost": 0.7}, steps=1)
    result = train(language_model(), PROMPTS, prefers_w1, config, quiet=True)
    kept = sum(len(prompt.split()) + 1 <= 4 for prompt in PROMPTS)
    assert (result.report.read, result.report.delivered) == (24, kept)
    assert 0 < kept < 24
    assert "prompt too long" in str(result.report)
