"""The log of a run directory: metrics, samples, TensorBoard.

    config.json      the settings, sorted
    metrics.jsonl    a JSON object a step, `step` first; floats come back equal; null where a number is not finite
    samples.jsonl    what was written at some steps, for reading
    tensorboard/     the finite metrics again

All but the metrics under `time/` and the TensorBoard files are the same, byte for byte, however often a run is
interrupted and continued. No run needs them to go on: where the disk refuses one of them, this is said once, and the
run goes on without it. Checkpoints hold the metrics too (`Run.history`), and `Run.resume` mends the file from there.
"""

import math
import socket
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from fastpref.data import files
from fastpref.method.errors import RunWarning

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"

FLUSH_SECONDS = 10.0
"""TensorBoard sees a step at most so much later."""


class Run:
    """Writer of a run directory; see the top of this file for what is in it.

    A line is in the file when the call that wrote it returns, so a killed process loses at most the line that it was
    writing. Use it as a context manager, or call `close`.

    Args:
      directory: the run directory; made if need be. Files that are there are added to.
      tensorboard: write `tensorboard/` too.

    Warns:
      RunWarning: the disk refuses a file; it is named once, and not written any more.
    """

    def __init__(self, directory: Path | str, *, tensorboard: bool = True) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._tensorboard = tensorboard
        self._events: Any = None
        self._flushed = -math.inf
        self._files: dict[str, IO[bytes]] = {}
        self._refused: set[str] = set()
        self._history = _History([])
        self._closed = False

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.json`, indented and sorted, over what is there."""
        files.write_json(self.directory / "config.json", dict(config))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one step's metrics to `metrics.jsonl` and TensorBoard.

        Args:
          step: steps taken, this one included.
          metrics: numbers by name: Python's, NumPy's or scalar arrays. NaN and infinities become null, which JSON
            has instead of them, and are left out of TensorBoard.

        Raises:
          ValueError: a metric is not a number or is called "step", or the run is closed.
        """
        if "step" in metrics:
            raise ValueError(
                f"a metric must have another name than 'step', but received {metrics['step']!r}. Pass "
                f"it as the argument."
            )
        plain = {name: _number(name, value) for name, value in metrics.items()}
        self._history.add(self._append(METRICS, [{"step": step, **plain}]))
        if self._tensorboard:
            self._try(TENSORBOARD, lambda: self._write_event(step, plain))

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add JSON objects to `samples.jsonl`, each with its `step` first."""
        self._append(SAMPLES, [{"step": step, **sample} for sample in samples])

    def history(self) -> bytes:
        """The metrics so far, for a checkpoint: what `resume` takes."""
        return self._history.packed()

    def resume(self, step: int, history: bytes | None = None) -> list[dict[str, Any]]:
        """Bring the files to where a run goes on: after `step`, or at 0 where it starts again.

        Later metrics and samples are dropped, since those steps are taken again, and so is a line that was cut off by a
        kill. Damaged or missing metrics are written again from `history`; without it, damaged lines are dropped. What
        was damaged is kept beside the file, as `metrics.jsonl.damaged`.

        Args:
          step: the step of the checkpoint.
          history: what `history` returned when it was saved.

        Returns:
          The metrics of the steps up to `step`, each with its `step`.

        Warns:
          RunWarning: lines were damaged or missing; the message says which, and what became of them.
        """
        self._close_files()
        path = self.directory / METRICS
        lines = None if history is None else zlib.decompress(history).splitlines(keepends=True)
        self._mend(SAMPLES, step, None)
        kept = self._mend(METRICS, step, lines)
        self._history = _History(kept)
        records = [orjson.loads(line) for line in kept]
        if missing := gaps([record["step"] for record in records], step):
            _warn(f"{path} must have a line for each of {step} steps, but none of {missing} was found. They stay out.")
        return records

    def close(self) -> None:
        """Close the files. Nothing can be written after it; closing again does nothing."""
        self._close_files()
        if METRICS in self._refused and not self._closed:
            with suppress(OSError):  # the disk may have room by now
                files.write_file(self.directory / METRICS, zlib.decompress(self.history()))
        self._closed = True

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # what it could not write has been said
                file.close()
        self._files.clear()
        if self._events is not None:
            with suppress(OSError):
                self._events.close()
            self._events = None

    def _try(self, name: str, write: Callable[[], object]) -> None:
        """Write to a part of the run directory that the run can do without."""
        if name in self._refused:
            return
        try:
            write()
        except OSError as error:
            self._refused.add(name)
            _warn(
                f"{self.directory / name} must be writable, but received {files.reason(error)}. "
                "The run goes on without it: free space or mend the disk."
            )

    def _mend(self, name: str, step: int, lines: list[bytes] | None) -> list[bytes]:
        """Bring a JSONL file to `lines`, or without them to its own undamaged ones up to `step`; return those."""
        path = self.directory / name
        before = _content(path)
        records, damaged = _read(before)
        if lines is None:
            kept, fate = [line for line, record in records if record["step"] <= step], "dropped"
        else:
            kept, fate = lines, "written again from the checkpoint"
            held = [*before.splitlines(keepends=True), *[b""] * len(kept)]
            damaged = [number for number, (line, here) in enumerate(zip(kept, held, strict=False), 1) if line != here]
        copy = path.with_name(f"{name}.damaged")
        if damaged:
            _warn(
                f"{path} must be as it was written, but {_lines(damaged)} are damaged or missing. "
                f"They are {fate}; what was there is kept as {copy.name}."
            )
            self._try(copy.name, lambda: files.write_file(copy, before))
        if (after := b"".join(kept)) != before:
            self._try(name, lambda: files.write_file(path, after))
        return kept

    def _append(self, name: str, records: Iterable[Mapping[str, Any]]) -> bytes:
        path = self.directory / name
        if self._closed:
            raise ValueError(f"{path} cannot be written: the run is closed. Open another Run of the same directory.")
        lines = b"".join(
            orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY) for record in records
        )

        def write() -> None:
            if name not in self._files:
                _cut_torn_line(path)
                self._files[name] = path.open("ab", buffering=0)
            if (written := self._files[name].write(lines)) < len(lines):
                self._files[name].write(lines[written:])  # raises what cut the first write short

        if lines:
            self._try(name, write)
        return lines

    def _write_event(self, step: int, metrics: Mapping[str, int | float]) -> None:
        # Not tensorboardX's SummaryWriter: its thread dies on a full disk, and the queue to it then blocks for ever.
        if self._events is None:
            folder = self.directory / TENSORBOARD
            folder.mkdir(exist_ok=True)
            # Event files are named by the second: two writers of one second would share, and so lose, one file.
            written = len(list(folder.glob("events.*")))
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{written}"
            self._events = RecordWriter(str(folder / name))
            self._add_event(file_version="brain.Event:2")
            self._add_event(step=step, session_log=SessionLog(status=SessionLog.START))  # hides later steps before it
        values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items() if math.isfinite(x)]
        self._add_event(step=step, summary=Summary(value=values))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:  # it waits for the disk
            self._events.flush()
            self._flushed = time.monotonic()

    def _add_event(self, **content: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **content).SerializeToString())


class _History:
    """Lines, compressed as they come: a checkpoint of a long run costs no more than the last of them."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._parts: list[bytes] = []
        self._packer = zlib.compressobj()
        for line in lines:
            self.add(line)

    def add(self, lines: bytes) -> None:
        self._parts.append(self._packer.compress(lines))

    def packed(self) -> bytes:
        return b"".join(self._parts) + self._packer.copy().flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, each a mapping with its `step`; [] where there is no such file.

    A last line without its end is left out: it is being written.

    Warns:
      RunWarning: a line is damaged and left out.
    """
    records, damaged = _read(_content(path))
    if damaged:
        _warn(f"{path} must hold a JSON object with a step in each line, but {_lines(damaged)} do not. They stay out.")
    return [record for _, record in records]


def gaps(steps: list[int], last: int) -> str:
    """The steps from 1 to `last` that are not among some, as "steps 3, 7 to 9"; "" where none is missing."""
    missing, edges = [], [0, *sorted(step for step in steps if step <= last), last + 1]
    for before, after in pairwise(edges):
        if after - before > 1:
            missing.append(f"{before + 1}" if after - before == 2 else f"{before + 1} to {after - 1}")
    return f"steps {', '.join(missing)}" if missing else ""


def _read(content: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """Whole lines of a JSONL file with what they hold, and the numbers of those that cannot be read."""
    records: list[tuple[bytes, dict[str, Any]]] = []
    damaged: list[int] = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = orjson.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError(record["step"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            damaged.append(number)
        else:
            records.append((line, record))
    return records, damaged


def _content(path: Path) -> bytes:
    """The content of a file; b"" where there is none, or none that can be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _cut_torn_line(path: Path) -> None:
    content = _content(path)
    if content and not content.endswith(b"\n"):
        files.write_file(path, content[: content.rfind(b"\n") + 1])


def _lines(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
    return f"lines {shown}"


def _warn(message: str) -> None:
    warnings.warn(message, RunWarning, stacklevel=3)


def _number(name: str, value: Any) -> int | float:
    number = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(number, int | float):
        raise ValueError(f"a metric must be one number, but received {name}={value!r}. Average it first.")
    return number
