"""The log of a run directory: metrics, samples, TensorBoard.

    config.json      the settings, sorted
    metrics.jsonl    a JSON object a step, `step` first; floats come back equal; null where a number is not finite
    samples.jsonl    what was written at some steps, for reading
    tensorboard/     the finite metrics again

All but the metrics under `time/` and the TensorBoard files are the same, byte for byte, however often a run is
interrupted and continued.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson
from tensorboardX import SummaryWriter

from fastpref.runs import files


class Run:
    """Writer of a run directory; see the top of this file for what is in it.

    A line is in the file when the call that wrote it returns, so a killed process loses at most the line that it was
    writing. Use it as a context manager, or call `close`.

    Args:
      directory: the run directory; made if need be. Files that are there are added to.
      tensorboard: write `tensorboard/` too.
    """

    def __init__(self, directory: Path | str, *, tensorboard: bool = True) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._files: dict[str, IO[bytes]] = {}
        self._closed = False

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.json`, indented and sorted, over what is there."""
        text = orjson.dumps(dict(config), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
        files.replace(self.directory / "config.json", text)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one step's metrics to `metrics.jsonl` and TensorBoard.

        Args:
          step: steps taken, this one included.
          metrics: numbers by name: Python's, NumPy's or scalar arrays. NaN and infinities become null, which JSON
            has instead of them, and are left out of TensorBoard.

        Raises:
          ValueError: a metric is not a number or is called "step", or the run is closed.
          OSError: the disk refused; the message names the file.
        """
        if "step" in metrics:
            raise ValueError(f"a metric cannot be called 'step'; got {metrics['step']!r}. Pass it as the argument.")
        plain = {name: _number(name, value) for name, value in metrics.items()}
        self._append("metrics.jsonl", [{"step": step, **plain}])
        if self._tensorboard:
            if self._writer is None:
                self._writer = _tensorboard_writer(self.directory / "tensorboard", step)
            for name, value in plain.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add JSON objects to `samples.jsonl`, each with its `step` first."""
        self._append("samples.jsonl", [{"step": step, **sample} for sample in samples])

    def truncate_after(self, step: int) -> None:
        """Drop metrics and samples of steps past `step`, and a line that was cut off by a kill.

        Call it when a run continues from the checkpoint of `step`, or with 0 when it starts again: the steps are taken
        again and would stand in the files twice. Each file is replaced in one rename.

        Raises:
          ValueError: a line is not one that `log` or `log_samples` wrote; the message names file and line.
        """
        self._close_files()
        for name in ("metrics.jsonl", "samples.jsonl"):
            _cut(self.directory / name, step)

    def close(self) -> None:
        """Close the files. Nothing can be written after it; closing again does nothing."""
        self._close_files()
        self._closed = True

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        path = self.directory / name
        if self._closed:
            raise ValueError(f"{path} cannot be written: the run is closed. Open another Run of the same directory.")
        lines = b"".join(
            orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY) for record in records
        )
        if not lines:
            return
        if name not in self._files:
            _cut(path, math.inf)
            self._files[name] = path.open("ab")
        try:
            self._files[name].write(lines)
            self._files[name].flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _tensorboard_writer(directory: Path, step: int) -> Any:
    # Event files are named by the second: two writers of one second would share, and so lose, one file.
    written = len(list(directory.glob("events.*")))
    return SummaryWriter(str(directory), purge_step=step, flush_secs=10, filename_suffix=f".{written}")


def _number(name: str, value: Any) -> int | float:
    number = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(number, int | float):
        raise ValueError(f"a metric must be one number; got {name}={value!r}. Average it first.")
    return number


def _cut(path: Path, last_step: int | float) -> None:
    """Keep the whole lines of a JSONL file whose step is at most `last_step`."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            try:
                keep = orjson.loads(line)["step"] <= last_step
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: each line must be a JSON object with a step, "
                    f"but this one starts {line[:60]!r}. Remove or mend it."
                ) from error
            if keep:
                kept.append(line)
    if len(kept) < len(lines):
        files.replace(path, b"".join(kept))
