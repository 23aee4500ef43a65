"""Judges of a run: another one is refused, the same is asked once, and one that fails loses no step."""

import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small import PROMPTS, language_model, prefers_w1, tokenizer
from test_training import SMALL, metrics_of
from tokenizers import Tokenizer as Backend

from fastpref.data.tokenizer import Tokenizer
from fastpref.judging.judgements import FILE, read
from fastpref.learning.train import TrainResult, train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import CheckpointError, JudgeError

# Of its own: the names of the ids become special tokens of the backend.
OTHER_BACKEND = Backend.from_str(tokenizer().backend.to_str())
OTHER_PAD = replace(language_model(), tokenizer=Tokenizer(OTHER_BACKEND, eos_id=1, pad_id=2))


def says(value: float) -> Any:
    return lambda prompts, first, second: [value] * len(prompts)


def told(value: float, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [value] * len(prompts)


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (
            prefers_w1,
            says(0.5),
            r"judge.name: 'small.prefers_w1' in the checkpoint, 'test_judged_runs.says",
        ),
        (says(0.25), says(0.75), r"judge.closure.value: 0.25 in the checkpoint, 0.75 now"),
        (partial(told, 0.25), partial(told, 0.75), r"judge.arguments.0: 0.25 in the checkpoint, 0.75 now"),
    ],
)
def test_another_judge_is_refused_by_what_differs(before: Any, after: Any, fault: str, tmp_path: Path) -> None:
    def go(judge: Any, steps: int) -> TrainResult:
        return train(language_model(), PROMPTS, judge, TrainConfig(**SMALL, steps=steps), run_dir=tmp_path, quiet=True)

    go(before, 1)
    log = (tmp_path / FILE).read_bytes()
    with pytest.raises(CheckpointError, match=rf"(?s){fault}.*choose another run directory to start again"):
        go(after, 2)
    assert (tmp_path / FILE).read_bytes() == log
    go(before, 2)


def test_another_judge_is_asked_itself_where_only_the_log_is_left(tmp_path: Path) -> None:
    for value in (0.25, 0.75):
        config = TrainConfig(**SMALL, steps=2)
        train(language_model(), PROMPTS, says(value), config, run_dir=tmp_path, quiet=True)
        for name in ("checkpoints", "policy"):
            shutil.rmtree(tmp_path / name)
    answers = {record["judge_key"]: record["answer"] for record in read(tmp_path)}
    assert sorted(answers.values()) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"eval_judge": says(0.5)}, r"evaluation.judge.closure.value: 0.25 in the checkpoint, 0.5 now"),
        ({"eval_prompts": PROMPTS[1:5]}, r"evaluation.prompts"),
        ({"policy": OTHER_PAD}, r"  tokenizer: "),
    ],
)
def test_another_evaluation_or_tokenizer_is_refused(change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    def go(steps: int, **change: Any) -> TrainResult:
        usual: dict[str, Any] = {"policy": language_model(), "eval_prompts": PROMPTS[:4], "eval_judge": says(0.25)}
        config = TrainConfig(**SMALL, steps=steps, eval_every=5)
        return train(prompts=PROMPTS, judge=prefers_w1, config=config, run_dir=tmp_path, quiet=True, **usual | change)

    go(1)
    with pytest.raises(CheckpointError, match=fault):
        go(2, **change)


def test_held_out_evaluation_is_asked_once(tmp_path: Path) -> None:
    """A judge that fails in the middle of it has answered before for good: nothing is asked twice or differs."""
    asked: list[str] = []

    def counts(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        if len(asked) == 3:
            asked.append("failed")
            raise ConnectionError("gone")
        asked.append("answered")
        return prefers_w1(prompts, first, second)

    counts.identity = "counts"  # type: ignore[attr-defined]

    def go(folder: Path, judge: Any) -> TrainResult:
        config = TrainConfig(**SMALL, steps=2, eval_every=1, checkpoint_every=1)
        held_out = {"eval_prompts": PROMPTS[:4], "eval_judge": judge}
        return train(language_model(), PROMPTS, prefers_w1, config, run_dir=folder, quiet=True, **held_out)

    with pytest.raises(JudgeError, match="raised ConnectionError: gone"):
        go(tmp_path / "a", counts)
    go(tmp_path / "a", counts)
    # Two orders of the reference's own pairs, and of the policy's at each of two steps.
    assert asked.count("answered") == 6
    go(tmp_path / "b", prefers_w1)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    purposes = [(record["purpose"], record["step"]) for record in read(tmp_path / "a")]
    assert {("evaluation", 0), ("evaluation", 1), ("evaluation", 2), ("training", 0), ("training", 1)} == set(purposes)


def test_a_judge_that_hangs_ends_the_run_with_its_state_saved(tmp_path: Path) -> None:
    woken = threading.Event()
    calls: list[int] = []

    def hangs(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            woken.wait()
        return prefers_w1(prompts, first, second)

    hangs.identity = "hangs"  # type: ignore[attr-defined]

    def go(timeout: float | None) -> TrainResult:
        config = TrainConfig(**SMALL, steps=2, judge_timeout=timeout)
        return train(language_model(), PROMPTS, hangs, config, run_dir=tmp_path, quiet=True)

    with pytest.raises(JudgeError, match=r"judge_timeout=1 seconds, but .*hangs took longer"):
        go(1.0)
    woken.set()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    # The time that a judge may take is no part of what the run computes.
    assert len(go(None).metrics) == 2


def test_a_judge_that_ends_the_process_is_an_error_with_the_state_saved(tmp_path: Path) -> None:
    def leaves(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        if (tmp_path / "metrics.jsonl").exists():
            sys.exit(0)
        return prefers_w1(prompts, first, second)

    with pytest.raises(JudgeError, match=r"leaves called sys.exit\(0\)"):
        train(language_model(), PROMPTS, leaves, TrainConfig(**SMALL, steps=2), run_dir=tmp_path, quiet=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
