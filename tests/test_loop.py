"""The outer loop: what is written down is whole, whatever happened to it between two starts."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orjson
import pytest

from fastpref.learning import loop
from fastpref.method.config import SupervisedConfig
from fastpref.method.errors import RunWarning


class Counter:
    """A source of 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.next = 0

    def state(self) -> bytes:
        return str(self.next).encode()

    def restore(self, state: bytes, /) -> None:
        self.next = int(state)


def drive(run_dir: Path, steps: int, **options: Any) -> Any:
    source = Counter()

    def advance(done: int, arrays: Any) -> loop.Outcome:
        source.next += 1
        samples = [{"prompt": f"p{done}", "first": "a"}] if done % 2 else []
        metrics = {"loss": 1.0 / (done + 1), "grad_norm": float("nan"), "updates/skipped": 0.0}
        return loop.Outcome(arrays + source.next, metrics, samples)

    config = SupervisedConfig(steps=steps, checkpoint_every=3, keep_checkpoints=2)
    told = {"run_dir": run_dir, "fingerprint": {"run": 1}, "description": "test", "quiet": True}
    return loop.drive(advance, jnp.zeros(3), source, config, **told, **options)


def untimed(path: Path) -> list[dict[str, Any]]:
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    return [{name: value for name, value in line.items() if name != "time/step"} for line in lines]


@pytest.mark.parametrize("damage", ["number", "gap", "absent"])
def test_damaged_metrics_of_a_run_are_whole_again_after_the_next_start(tmp_path: Path, damage: str) -> None:
    drive(tmp_path / "whole", 8)
    drive(tmp_path / "run", 6)
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    if damage == "absent":
        path.unlink()
    else:
        changed = [lines[2].replace(b'"loss":0.3', b'"loss":0.7')] if damage == "number" else []
        path.write_bytes(b"".join([*lines[:2], *changed, *lines[3:]]))
        assert path.read_bytes() != before
    with pytest.warns(RunWarning, match=r"metrics.jsonl must be as it was written, but lines .*from the checkpoint"):
        arrays, _ = drive(tmp_path / "run", 8)
    assert path.read_bytes().startswith(before)
    assert untimed(path) == untimed(tmp_path / "whole" / "metrics.jsonl")
    assert arrays.tolist() == [36.0] * 3  # 1 + 2 + ... + 8


def test_a_finished_run_mends_its_metrics_too(tmp_path: Path) -> None:
    drive(tmp_path, 4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(before[:40])
    with pytest.warns(RunWarning, match="lines 1, 2, 3, 4 are damaged or missing"):
        drive(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_disk_that_refuses_all_but_checkpoints_does_not_stop_a_run(tmp_path: Path) -> None:
    drive(tmp_path, 1)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
    (tmp_path / "tensorboard").rename(tmp_path / "moved")
    (tmp_path / "tensorboard").write_text("")
    with pytest.warns(RunWarning) as heard:
        arrays, history = drive(tmp_path, 40)
    assert arrays.tolist() == [820.0] * 3
    assert len(history) == 40
    said = [str(warning.message) for warning in heard]
    for name in ("metrics.jsonl", "samples.jsonl", "tensorboard"):
        assert sum(text.startswith(f"{tmp_path / name} must be writable, but received") for text in said) == 1
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).rmdir()
    with pytest.warns(RunWarning, match="written again from the checkpoint"):
        drive(tmp_path, 40)
    assert [line["step"] for line in untimed(tmp_path / "metrics.jsonl")] == [*range(1, 41)]
