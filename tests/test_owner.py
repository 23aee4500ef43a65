"""A run directory has one owner, whoever dies."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref import SupervisedConfig, TrainConfig, fit_preference_model, fit_reward_model, sft, train
from fastpref.cli import USER_ERRORS
from fastpref.method.errors import OwnerError, RunWarning
from fastpref.runs.owner import hold
from tests import small

HOLDER = """
import sys
from fastpref.runs.owner import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_owners_process_and_host(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        with pytest.raises(OwnerError) as refused, hold(tmp_path / "run"):
            pass
        process.communicate("")
    assert str(refused.value).startswith(
        f"A run directory must have one owner, but {tmp_path / 'run'} is held by process {process.pid} "
        f"on host {socket.gethostname()} since "
    )
    assert str(refused.value).endswith(". Wait for it, stop it, or choose another run_dir.")
    assert isinstance(refused.value, USER_ERRORS)
    with hold(tmp_path / "run"):
        pass


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert str(process.pid) in (tmp_path / "owner").read_text()
    with hold(tmp_path):
        assert str(os.getpid()) in (tmp_path / "owner").read_text()
    assert "process" not in (tmp_path / "owner").read_text()


def fail_while_holding(run_dir: Path) -> None:
    with hold(run_dir):
        with pytest.raises(OwnerError, match=f"process {os.getpid()} "), hold(run_dir):
            pass
        raise KeyError


def test_a_second_run_of_the_same_process_is_refused_and_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail_while_holding(tmp_path)
    with hold(tmp_path), hold(tmp_path / "point-1"), hold(None), hold(None):
        pass


def test_the_next_owner_removes_and_brings_back_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in (".tmp-policy-0123456789ab", ".old-model", ".old-policy", "model"):
        (tmp_path / name / "inner").mkdir(parents=True)
    with hold(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"model", "policy", "owner"}


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(RunWarning, match=r"has no locks \(Function not implemented\). Let no second"), hold(tmp_path):
        pass


PAIRS = [{"prompt": prompt, "chosen": "w1 w2", "rejected": "w3"} for prompt in small.PROMPTS[:4]]
BRIEF = SupervisedConfig(steps=1, batch_size=2, max_prompt_tokens=16, max_completion_tokens=8)
RUNS: dict[str, Callable[[Path], Any]] = {
    "online": lambda run_dir: train(
        small.language_model(),
        small.PROMPTS,
        small.prefers_w1,
        TrainConfig(steps=1, batch_size=2, max_new_tokens=4, max_prompt_tokens=16),
        run_dir=run_dir,
        quiet=True,
    ),
    "offline": lambda run_dir: train(
        small.language_model(),
        PAIRS,
        config=TrainConfig(algorithm="offline-ipo", steps=1, batch_size=2, max_new_tokens=8, max_prompt_tokens=16),
        run_dir=run_dir,
        quiet=True,
    ),
    "sft": lambda run_dir: sft(
        small.language_model(),
        [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS],
        BRIEF,
        run_dir=run_dir,
        quiet=True,
    ),
    "preference": lambda run_dir: fit_preference_model(
        small.language_model(), PAIRS, BRIEF, template="{prompt} {first} {second}", run_dir=run_dir, quiet=True
    ),
    "reward": lambda run_dir: fit_reward_model(small.language_model(), PAIRS, BRIEF, run_dir=run_dir, quiet=True),
}


@pytest.mark.parametrize("kind", RUNS)
def test_every_kind_of_run_takes_the_lock_and_leaves_the_directory_alone(kind: str, tmp_path: Path) -> None:
    with hold(tmp_path):
        with pytest.raises(OwnerError, match="must have one owner"):
            RUNS[kind](tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"owner"}


@pytest.mark.parametrize("kind", RUNS)
def test_every_kind_of_run_holds_its_directory_until_model_and_report_are_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(run_dir: Path, *_: object, **__: object) -> None:
        with pytest.raises(OwnerError, match="must have one owner"), hold(run_dir):
            pass
        written.append(Path(run_dir))

    written: list[Path] = []
    for module in ("train", "fit"):
        monkeypatch.setattr(f"fastpref.learning.{module}.finish", finish)
    RUNS[kind](tmp_path)
    assert written == [tmp_path]
