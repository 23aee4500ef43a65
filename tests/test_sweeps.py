"""Sweeps: every point once, in a directory of its own, resumed where it stopped, and a table that a hand computes."""

import csv
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orjson
import pytest
from flax import nnx
from PIL import Image
from small import PROMPTS, language_model

from fastpref.cli import main
from fastpref.evaluation.sweeps import SweepResult, sweep
from fastpref.learning.train import Step, train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError, DivergedError
from fastpref.method.schedules import Schedule
from fastpref.models import save
from fastpref.runs.read_model import read_model, step_directory

BASE = TrainConfig(steps=4, eval_every=2)


class Runs:
    """Pretends to train: writes two lines of metrics, and remembers what it was asked for."""

    def __init__(self, score: Callable[[TrainConfig], float]) -> None:
        self.score, self.folders = score, list[Path]()

    def __call__(self, config: TrainConfig, folder: Path) -> None:
        self.folders.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [{"step": 1, "eval/win_rate": 0.0}, {"step": 2, "eval/win_rate": self.score(config), "loss": 1.0}]
        # The last step has no evaluation: the value of the step before counts.
        (folder / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in [*lines, {"step": 3}]))


def by_tau(config: TrainConfig) -> float:
    assert isinstance(config.tau, float)
    return config.tau / 10 + config.seed / 100


def go(grid: Any, runs: Any, folder: Path, **settings: Any) -> SweepResult:
    return sweep(grid, BASE, runs, run_dir=folder, quiet=True, **settings)


def test_every_point_is_run_once_and_seeds_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(by_tau)
    found = go({"tau": [0.5, 2], "seed": [0, 1, 2]}, runs, tmp_path)
    names = [f"tau={tau},seed={seed}" for tau in (0.5, 2.0) for seed in (0, 1, 2)]
    assert [folder.name for folder in runs.folders] == names
    assert [point.score for point in found.points] == pytest.approx([0.05, 0.06, 0.07, 0.2, 0.21, 0.22])
    assert found.rows() == [
        {"tau": 0.5, "mean": pytest.approx(0.06), "deviation": pytest.approx(0.01), "seeds": 3, "diverged": 0},
        {"tau": 2.0, "mean": pytest.approx(0.21), "deviation": pytest.approx(0.01), "seeds": 3, "diverged": 0},
    ]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[4]["run"] == "tau=2.0,seed=1"
    assert (rows[4]["tau"], rows[4]["seed"], float(rows[4]["eval/win_rate"])) == ("2.0", "1", pytest.approx(0.21))
    assert (tmp_path / "results.md").read_text() == (
        "| tau | eval/win_rate | deviation | seeds | diverged |\n| --- | --- | --- | --- | --- |\n"
        "| 0.5 | 0.06 | 0.01 | 3 | 0 |\n| 2.0 | 0.21 | 0.01 | 3 | 0 |\n"
    )
    with Image.open(tmp_path / "results.png") as image:
        assert min(image.size) > 300
    found.table()
    assert "0.21" in capsys.readouterr().out

    again = go({"tau": [0.5, 2.0, 3.0], "seed": [0, 1, 2]}, runs, tmp_path)
    assert [folder.name for folder in runs.folders[6:]] == [f"tau=3.0,seed={seed}" for seed in (0, 1, 2)]
    assert [point.score for point in again.points[:6]] == [point.score for point in found.points]


def test_a_finished_point_is_run_again_only_under_other_settings(tmp_path: Path) -> None:
    runs = Runs(by_tau)
    go({"tau": [0.5]}, runs, tmp_path)
    go({"tau": [0.5]}, runs, tmp_path)
    assert len(runs.folders) == 1
    sweep({"tau": [0.5]}, TrainConfig(steps=5, eval_every=2), runs, run_dir=tmp_path, quiet=True)
    assert len(runs.folders) == 2
    # Another metric is read from what is there.
    other = sweep({"tau": [0.5]}, TrainConfig(steps=5, eval_every=2), runs, run_dir=tmp_path, metric="loss", quiet=True)
    assert len(runs.folders) == 2
    assert other.points[0].score == 1.0


def test_an_interrupted_point_goes_on_and_a_diverged_one_is_noted(tmp_path: Path) -> None:
    seen: list[str] = []
    stop = {"tau=0.5"}

    def run(config: TrainConfig, folder: Path) -> None:
        seen.append(folder.name)
        if folder.name in stop:
            raise KeyboardInterrupt
        if config.tau == 0.1:
            raise DivergedError("not finite in 5 updates")
        Runs(by_tau)(config, folder)

    with pytest.raises(KeyboardInterrupt):
        go({"tau": [0.1, 1.0, 0.5]}, run, tmp_path)
    assert seen == ["tau=0.1", "tau=1.0", "tau=0.5"]
    stop.clear()
    found = go({"tau": [0.1, 1.0, 0.5]}, run, tmp_path)
    assert seen[3:] == ["tau=0.5"]
    assert [point.error for point in found.points] == ["not finite in 5 updates", None, None]
    assert math.isnan(found.points[0].score)
    assert found.rows()[0] == {"tau": 0.1, "mean": None, "deviation": None, "seeds": 1, "diverged": 1}
    assert "| 0.1 | – | – | 1 | 1 |" in found.markdown()


def test_several_fields_schedules_and_names(tmp_path: Path) -> None:
    schedule = {"start": 1.0, "end": 0.5, "steps": 4}
    grid = {"algorithm": ["ipo-md", "online-dpo"], "tau": [schedule, Schedule(start=1.0, end=0.1, steps=4)]}
    runs = Runs(lambda config: 0.5)
    found = go(grid, runs, tmp_path)
    assert [folder.name for folder in runs.folders][:2] == [
        "algorithm=ipo-md,tau=1.0~0.5~4~linear",
        "algorithm=ipo-md,tau=1.0~0.1~4~linear",
    ]
    assert found.rows()[0]["tau"] == {
        "start": 1.0,
        "end": 0.5,
        "steps": 4,
        "kind": "linear",
        "warmup": 0.0,
        "repeat": False,
    }
    # Only seeds, and None among numbers, have a place on the axis too.
    go({"seed": [0, 1]}, Runs(by_tau), tmp_path / "seeds")
    go({"max_grad_norm": [None, 1.0], "tau": [0.1, 0.2]}, Runs(by_tau), tmp_path / "none")


def test_a_metric_may_be_measured_on_the_finished_run(tmp_path: Path) -> None:
    def length(config: TrainConfig, folder: Path) -> float:
        return len(folder.name) + config.seed

    found = go({"seed": [3]}, Runs(by_tau), tmp_path, metric=length)
    assert found.metric == "length"
    assert found.points[0].score == len("seed=3") + 3


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ({}, r"a grid needs at least one field, but received none"),
        ({"tau": []}, r"must have a list of at least one value, but tau has \[\]. Write tau = \[...\]"),
        ({"tau": 0.5}, r"must have a list of at least one value, but tau has 0.5"),
        ({"algorithm": "ipo-md"}, r"must have a list of at least one value, but algorithm has 'ipo-md'"),
        ({"taau": [1.0]}, r"TrainConfig has no setting of that name, but received 'taau'. Did you mean 'tau'\?"),
        ({"tau": [1.0, -1.0]}, r"tau must be above 0, but received -1.0"),
        ({"tau": [1.0, 1]}, r"the points of a grid must differ, but 'tau=1.0' is there twice"),
        ({"steps": ["many"]}, r"steps must be of type int, but received 'many'"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_before_the_first_run(grid: Any, text: str, tmp_path: Path) -> None:
    runs = Runs(by_tau)
    with pytest.raises(ConfigError, match=text):
        sweep(grid, BASE, runs, run_dir=tmp_path / "sweep", quiet=True)
    assert not runs.folders
    assert not (tmp_path / "sweep").exists()


def test_a_metric_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"but received 'eval/winrate'. Did you mean 'eval/win_rate'\?"):
        go({"tau": [1.0]}, Runs(by_tau), tmp_path, metric="eval/winrate")
    with pytest.raises(ConfigError, match=r"'eval/kl' needs held-out evaluation, but received eval_every=0"):
        sweep({"tau": [1.0]}, TrainConfig(), Runs(by_tau), run_dir=tmp_path, metric="eval/kl")
    with pytest.raises(ConfigError, match=r"must log its metric 'objective/kl', but .* has eval/win_rate, loss, step"):
        go({"tau": [1.0]}, Runs(by_tau), tmp_path, metric="objective/kl")
    with pytest.raises(ConfigError, match=r"must log its metric 'loss', but .* has nothing"):
        go({"tau": [1.0]}, lambda config, folder: None, tmp_path / "empty", metric="loss")


# Real runs ----------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"steps": 2, "batch_size": 4, "max_prompt_tokens": 8, "max_shapes": 1, "max_new_tokens": 6}


def in_order(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that never calls two different texts equal: each step learns."""
    return [float(a > b) for a, b in zip(first, second, strict=True)]


def test_a_killed_sweep_goes_on_inside_its_point(tmp_path: Path) -> None:
    optimizer = optax.sgd(0.01)
    made: list[tuple[str, int]] = []
    stop = True

    def run(config: TrainConfig, folder: Path) -> None:
        def note(step: Step) -> None:
            made.append((folder.name, step.step))
            if stop and made[-1] == ("seed=1", 1):
                raise KeyboardInterrupt

        train(
            language_model(), PROMPTS, in_order, config,
            run_dir=folder, optimizer=optimizer, callbacks=[note], quiet=True,
        )  # fmt: skip

    def go() -> SweepResult:
        base = TrainConfig(**TINY, algorithm="online-ipo", checkpoint_every=1)
        return sweep({"seed": [0, 1]}, base, run, run_dir=tmp_path, metric="objective/kl", quiet=True)

    with pytest.raises(KeyboardInterrupt):
        go()
    stop = False
    found = go()
    assert made == [("seed=0", 1), ("seed=0", 2), ("seed=1", 1), ("seed=1", 2)]
    assert all(point.score != 0 for point in found.points)
    assert found.rows()[0]["seeds"] == 2
    # The last checkpoint of a run is its final model, and that is not the one before.
    place = tmp_path / "seed=1"
    last, before, final = (read_model(one) for one in (step_directory(place, 2), step_directory(place, 1), place))
    weights = [np.asarray(jax.tree.leaves(nnx.state(model.module))[0]) for model in (last, before, final)]
    np.testing.assert_array_equal(weights[0], weights[2])
    assert (weights[0] != weights[1]).any()


@pytest.fixture
def _process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_process_state")
def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save(language_model(), tmp_path / "sft")
    (tmp_path / "prompts.jsonl").write_bytes(b"".join(orjson.dumps({"prompt": text}) + b"\n" for text in PROMPTS))
    (tmp_path / "judges.py").write_text("def flat(prompts, first, second):\n    return [0.75] * len(prompts)\n")
    (tmp_path / "sweep.toml").write_text(
        'policy = "sft"\nprompts = "prompts.jsonl"\njudge = "judges:flat"\nrun_dir = "swept"\n'
        'eval_prompts = "prompts.jsonl"\nbaseline = "sft"\n'
        '[grid]\ntau = [0.5]\n[settings]\nsteps = 1\nbatch_size = 4\nmax_shapes = 1\nmax_new_tokens = 6\n'
        'algorithm = "online-ipo"\nmax_prompt_tokens = 8\n'
    )  # fmt: skip
    assert main(["sweep", "sweep.toml"]) == 0
    printed = capsys.readouterr().out
    assert "win_rate" in printed
    # The judge's taste for the first place cancels.
    assert "| 0.5 | 0.5 | – | 1 | 0 |" in (tmp_path / "swept" / "results.md").read_text()
    assert main(["sweep", "sweep.toml", "grid.taau=[1]"]) == 1
    assert "Did you mean 'tau'?" in capsys.readouterr().err
    assert main(["sweep", "sweep.toml", "grid.tau=0.5"]) == 1
    assert "must have a list of at least one value, but tau has 0.5" in capsys.readouterr().err
    assert main(["sweep", "sweep.toml", "metric=loss"]) == 1
    assert "must come with eval_prompts and without a metric" in capsys.readouterr().err
    assert main(["sweep", "sweep.toml", "grid=3"]) == 1
    assert "grid must be a table" in capsys.readouterr().err

    (tmp_path / "evaluate.toml").write_text(
        'prompts = "prompts.jsonl"\njudge = "judges:flat"\noutput = "compared"\n'
        '[policies]\nsft = "sft"\nswept = ["swept/tau=0.5"]\n[settings]\nmax_new_tokens = 6\nseeds = [0]\n'
    )  # fmt: skip
    assert main(["evaluate", "evaluate.toml"]) == 0
    assert "0.500" in capsys.readouterr().out
    assert len((tmp_path / "compared" / "records.jsonl").read_bytes().splitlines()) == len(PROMPTS)
    for override, text in (
        ("policy=sft", "either policy and baseline or a table [policies], but received policy, policies"),
        ("settings.seed=1", "no setting of that name, but received 'seed'"),
        ("settings.seeds=1", "seeds must be of type list, but received 1"),
        ("policies.sft=1", "a policy must be a directory or a list of them, but received sft = 1"),
        ("policies.other=none", "but none is not there"),
    ):
        assert main(["evaluate", "evaluate.toml", override]) == 1
        assert text in capsys.readouterr().err
