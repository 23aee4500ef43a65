"""What a run writes can be read back exactly, cut at a checkpoint, and mended from it."""

import math
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orjson
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from fastpref.method.errors import RunWarning
from fastpref.runs.log import Run, gaps


def records(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def events(path: Path) -> list[Event]:
    blob, found = path.read_bytes(), []
    while blob:
        (length,) = struct.unpack("<Q", blob[:8])
        found.append(Event.FromString(blob[12 : 12 + length]))
        blob = blob[16 + length :]
    return found


def test_config_is_sorted_and_replaced(tmp_path: Path) -> None:
    with Run(tmp_path / "runs" / "one") as run:
        run.write_config({"tau": 0.5})
        run.write_config({"tau": 1.0, "algorithm": "ipo-md", "optimizer": {"name": "adamw", "b": [1, 2]}})
    text = (tmp_path / "runs" / "one" / "config.json").read_text()
    assert text.startswith('{\n  "algorithm": "ipo-md",\n  "optimizer": {\n    "b": [\n')
    assert orjson.loads(text)["tau"] == 1.0
    assert [path.name for path in (tmp_path / "runs" / "one").iterdir()] == ["config.json"]


def test_numbers_come_back_equal(tmp_path: Path) -> None:
    rng = random.Random(7)
    drawn = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000)]
    values = {str(index): value for index, value in enumerate(drawn) if math.isfinite(value)}
    kinds: dict[str, Any] = {
        "float32": np.float32(0.1),
        "float64": np.float64(0.1),
        "jax": jnp.asarray(0.3, jnp.float32),
        "bfloat16": jnp.asarray(0.3, jnp.bfloat16),
        "zero_d": np.asarray(1e-45, np.float32),
        "negative_zero": -0.0,
        "int": np.int64(3),
    }
    with Run(tmp_path, tensorboard=False) as run:
        run.log(1, values | kinds)
    (record,) = records(tmp_path / "metrics.jsonl")
    assert next(iter(record)) == "step"
    assert {name: record[name] for name in values} == values
    assert {name: record[name] for name in kinds} == {name: float(value) for name, value in kinds.items()}
    assert math.copysign(1, record["negative_zero"]) == -1
    assert isinstance(record["int"], int)


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.log(3, {"loss": float("nan"), "grad_norm": np.float32("inf"), "tau": -math.inf, "epoch": 1})
    assert (
        tmp_path / "metrics.jsonl"
    ).read_bytes() == b'{"step":3,"loss":null,"grad_norm":null,"tau":null,"epoch":1}\n'
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert [value.tag for event in events(path) for value in event.summary.value] == ["epoch"]


def test_a_line_is_in_the_file_when_log_returns(tmp_path: Path) -> None:
    with Run(tmp_path, tensorboard=False) as run:
        for step in (1, 2):
            run.log(step, {"loss": 0.5})
            run.log_samples(step, [{"prompt": "é\n", "first": ""}])
            assert len(records(tmp_path / "metrics.jsonl")) == step
            assert records(tmp_path / "samples.jsonl")[-1] == {"step": step, "prompt": "é\n", "first": ""}


def test_no_samples_write_no_file(tmp_path: Path) -> None:
    with Run(tmp_path, tensorboard=False) as run:
        run.log_samples(1, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metrics", "rule"),
    [
        ({"step": 3}, "a metric must have another name than 'step', but received 3"),
        ({"loss": np.ones(2)}, r"must be one number, but received loss=array\(\[1., 1.\]\). Average it first"),
        ({"loss": "low"}, "must be one number, but received loss='low'"),
    ],
)
def test_what_is_no_metric_is_refused(tmp_path: Path, metrics: dict[str, Any], rule: str) -> None:
    with Run(tmp_path) as run, pytest.raises(ValueError, match=rule):
        run.log(1, metrics)
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_fine_and_writing_after_it_is_not(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log(1, {"loss": 1.0})
    run.close()
    run.close()
    with pytest.raises(ValueError, match=r"metrics.jsonl cannot be written: the run is closed. Open another Run"):
        run.log(2, {"loss": 1.0})


FULL_DISK = """
import resource, sys, warnings
from fastpref.runs.log import Run, gaps
heard = []
warnings.showwarning = lambda message, *_: heard.append(str(message))
warnings.simplefilter("always")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with Run(sys.argv[1]) as run:
    run.log(1, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
    for step in range(2, 200):  # many times what tensorboardX's queue holds
        run.log(step, {"loss": 1.0 / step, "tau": 1.0})
        run.log_samples(step, [{"prompt": "p" * 50}])
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print(*heard, sep="\\n")
"""


@pytest.mark.parametrize("limit", [1, 30, 500, 3000])
def test_a_full_disk_neither_stops_nor_hangs_a_run_and_is_said_once_for_each_file(tmp_path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    heard = done.stdout.splitlines()
    assert sorted(line.split(" ")[0] for line in heard) == [
        str(tmp_path / name) for name in ("metrics.jsonl", "samples.jsonl", "tensorboard")
    ]
    assert all("must be writable, but received File too large. The run goes on without it" in line for line in heard)
    # There was room again in the end.
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [*range(1, 200)]


def steps_of(run: Run, steps: range) -> None:
    for step in steps:
        run.log(step, {"loss": 1 / step, "tau": 1.0})
        if step % 2 == 0:
            run.log_samples(step, [{"prompt": f"p{step}", "first": "a"}, {"prompt": f"q{step}", "first": "b"}])


@pytest.mark.parametrize("torn", [b"", b'{"step":8,"lo', b'{"step":3,"loss":0.1}'])
def test_a_continued_run_has_the_files_of_an_uninterrupted_one(tmp_path: Path, torn: bytes) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with Run(whole, tensorboard=False) as run:
        steps_of(run, range(1, 13))
    with Run(cut, tensorboard=False) as run:
        run.resume(0)
        steps_of(run, range(1, 8))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (cut / name).open("ab") as file:
            file.write(torn)
    with Run(cut, tensorboard=False) as run:
        run.resume(5)
        assert [record["step"] for record in records(cut / "metrics.jsonl")] == [1, 2, 3, 4, 5]
        assert [record["step"] for record in records(cut / "samples.jsonl")] == [2, 2, 4, 4]
        steps_of(run, range(6, 13))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in cut.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_torn_line_is_not_written_on_to(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1,"loss":0.5}\n{"step":2,"lo')
    with Run(tmp_path, tensorboard=False) as run:
        run.log(2, {"loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step":1,"loss":0.5}\n{"step":2,"loss":0.25}\n'


@pytest.mark.parametrize("line", [b"\x00\x00", b'{"loss":1}', b"[1]", b'{"step":"2"}', b'{"step":2'])
def test_a_broken_line_is_named_dropped_and_kept_beside_the_file(tmp_path: Path, line: bytes) -> None:
    content = b'{"step":1}\n' + line + b'\n{"step":3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with Run(tmp_path) as run, pytest.warns(RunWarning) as heard:
        assert run.resume(3) == [{"step": 1}, {"step": 3}]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step":1}\n{"step":3}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    said = " ".join(str(warning.message) for warning in heard)
    assert "metrics.jsonl must be as it was written, but lines 2 are damaged or missing. They are dropped" in said
    assert "must have a line for each of 3 steps, but none of steps 2 was found" in said


@pytest.mark.parametrize("damage", ["flip", "digit", "cut", "gone", "shuffled", "empty", "absent"])
def test_damaged_metrics_are_said_and_written_again_from_the_checkpoint(tmp_path: Path, damage: str) -> None:
    with Run(tmp_path, tensorboard=False) as run:
        run.resume(0)
        steps_of(run, range(1, 9))
        history = run.history()
        steps_of(run, range(9, 12))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    whole = b"".join(lines[:8])
    flipped = bytearray(lines[2])
    flipped[4] ^= 8
    damaged = {
        "flip": [*lines[:2], bytes(flipped), *lines[3:]],
        "digit": [lines[0].replace(b"1.0", b"2.0", 1), *lines[1:]],  # reads as another number
        "cut": [*lines[:4], lines[4][:9], b"\n", *lines[5:]],
        "gone": [*lines[:3], *lines[5:]],
        "shuffled": [*lines[1:], lines[0]],
        "empty": [],
        "absent": [],
    }[damage]
    path.unlink() if damage == "absent" else path.write_bytes(b"".join(damaged))
    with Run(tmp_path, tensorboard=False) as run:
        with pytest.warns(
            RunWarning, match=r"metrics.jsonl must be as it was written, but lines .* from the checkpoint; .*damaged"
        ):
            metrics = run.resume(8, history)
        assert path.read_bytes() == whole
        assert [record["step"] for record in metrics] == [*range(1, 9)]
        assert run.history() == history
        steps_of(run, range(9, 12))
    assert path.read_bytes() == b"".join(lines)


def test_metrics_that_were_cut_off_by_a_kill_are_no_damage(tmp_path: Path) -> None:
    with Run(tmp_path, tensorboard=False) as run:
        steps_of(run, range(1, 9))
        history = run.history()
        steps_of(run, range(9, 12))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    with Run(tmp_path, tensorboard=False) as run:
        run.resume(8, history)
    assert [record["step"] for record in records(path)] == [*range(1, 9)]


@pytest.mark.parametrize(
    ("steps", "said"),
    [([], "steps 1 to 5"), ([1, 2, 3, 4, 5], ""), ([2, 4, 9], "steps 1, 3, 5"), ([1, 5], "steps 2 to 4")],
)
def test_gaps_are_named(steps: list[int], said: str) -> None:
    assert gaps(steps, 5) == said


def test_truncation_is_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run(tmp_path, tensorboard=False) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": 1.0})
        before = (tmp_path / "metrics.jsonl").read_bytes()
        seen = []

        def fail(path: Path, target: Path) -> Path:
            seen.append(path.read_bytes())
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.warns(RunWarning, match="metrics.jsonl must be writable, but received Input/output error"):
            run.resume(1)
        assert before[: before.index(b"\n") + 1] in seen
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_hides_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        steps_of(run, range(1, 8))
        run.resume(5)
        steps_of(run, range(6, 9))
    first, second = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.suffix)
    before, after = events(first), events(second)
    assert [event.step for event in before if event.summary.value and event.summary.value[0].tag == "loss"] == [
        *range(1, 8)
    ]
    restart = next(event for event in after if event.session_log.status == SessionLog.START)
    assert restart.step == 6
    losses = {
        e.step: e.summary.value[0].simple_value for e in after if e.summary.value and e.summary.value[0].tag == "loss"
    }
    assert losses == {step: float(np.float32(1 / step)) for step in (6, 7, 8)}
