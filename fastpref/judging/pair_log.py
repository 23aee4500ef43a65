"""Every pair that a judge was asked about, on disk before it is used: the thin face of csrc/pair_log.h.

    with PairLog(run_dir / "pairs", judge="my judge") as log:
        preference = log.judge(step, prompt_ids, first_tokens, second_tokens, ask)

A run that goes on from a checkpoint draws the same completions again, and finds the answers to them here: the judge is
not asked twice, so a judge that never answers the same twice does not change the continuation. A process killed while
it writes leaves half a record, which is cut off on opening; a record that does not match its checksum is refused.

    pairs/00000001.pairs    the pairs of one process, numbered in order; a new file after 64 MiB
    pairs/lock              held by the process that writes
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from fastpref.data import _native
from fastpref.data.ragged import Ragged
from fastpref.method.errors import PairLogError

FILE_BYTES = 64 * 2**20
"""A file that has grown to this size is followed by another."""

Ask = Callable[[Int64[np.ndarray, " M"]], Sequence[float] | Float32[np.ndarray, " M"]]
"""From the positions of M pairs among those given to p(first ≻ second) of each."""


class PairLog:
    """Asks a judge about pairs that the log does not hold, and writes the answers down before they are used.

    Args:
      directory: where the files lie; made if need be.
      judge: names the judge. Answers of another name are kept and not used.
      seed: names the draws. Answers under another seed are kept and not used.
      first_step: answers of earlier steps are not needed again.

    Raises:
      PairLogError: a record is damaged (the message names file, record and offset), the directory cannot be read or
        written, or another process holds it.
    """

    def __init__(self, directory: str | Path, *, judge: str = "", seed: int = 0, first_step: int = 0) -> None:
        self.directory = Path(directory)
        self._judge = judge.encode()
        self._seed = seed
        self._index = _native.PairIndex()
        self._step = first_step
        self._file: int | None = None
        self._size = self._chain = 0
        self._closed = False
        self.records: int = 0
        """Pairs that the log held when it was opened, of all judges and steps."""
        self.cut: dict[str, int] = {}
        """Bytes of unfinished records that were cut off on opening, by the name of the file."""
        self.replayed: int = 0
        """Pairs answered from the log so far."""
        self.asked: int = 0
        """Pairs answered by the judge so far."""
        # Refuses a name or a seed out of range before anything is made.
        _native.pair_header(self._judge, seed)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in files(self.directory):
                self._read(path)
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise PairLogError(
                    f"{self.directory} must be written by one process at a time, got a second one. "
                    "Wait for the other, or choose another directory."
                ) from None
            if isinstance(error, OSError):
                raise self._unusable(error) from error
            raise

    def judge(
        self,
        step: int,
        ids: Sequence[int] | Int64[np.ndarray, " P"],
        first: Ragged | Sequence[Sequence[int]] | Sequence[np.ndarray],
        second: Ragged | Sequence[Sequence[int]] | Sequence[np.ndarray],
        ask: Ask,
    ) -> Float32[np.ndarray, " P"]:
        """Answer P pairs: from the log where it holds the same step, prompt and tokens, else by the judge.

        Args:
          step: number of the step; never below that of the call before.
          ids: names of the prompts.
          first: token ids of the first completion of each.
          second: token ids of the second.
          ask: asked about all missing pairs at once; not called if there are none. What it returns is on disk when
            this function returns.

        Returns:
          p(first ≻ second) of each pair, float32.

        Raises:
          PairLogError: the answers could not be written. The log is as it was.
          ValueError: the log is closed, the step goes back, sizes differ, or an answer is not one probability in
            [0, 1] for each pair asked about. Nothing is written.
        """
        if self._closed:
            raise ValueError("a pair log must be open to judge, got a closed one; open it again")
        if step < self._step:
            raise ValueError(f"step must be at least {self._step}, got {step}; open the log again to go back")
        prompts = np.ascontiguousarray(ids, np.int64)
        sides = [rows if isinstance(rows, Ragged) else Ragged.from_rows(rows) for rows in (first, second)]
        if not len(prompts) == len(sides[0]) == len(sides[1]):
            raise ValueError(
                f"ids, first and second must have one entry a pair, got {len(prompts)}, {len(sides[0])} and "
                f"{len(sides[1])}; align them"
            )
        self._index.forget_before(step)
        self._step = step
        preference = self._index.find(step, prompts, *_arrays(sides))
        missing = self._missing(preference, prompts, sides)
        if len(missing):
            answers = np.ascontiguousarray(ask(missing), np.float32)
            if answers.shape != missing.shape:
                raise ValueError(
                    f"ask must return one probability for each of {len(missing)} pairs, got shape {answers.shape}"
                )
            rest = [Ragged.from_rows([rows[int(at)] for at in missing]) for rows in sides]
            self._append(step, prompts[missing], rest, answers)
            preference = self._index.find(step, prompts, *_arrays(sides))
        self.replayed += len(prompts) - len(missing)
        self.asked += len(missing)
        return preference

    @property
    def replayable(self) -> int:
        """Answers that the log still holds for the last step judged and those after it."""
        return len(self._index)

    def close(self) -> None:
        """Let go of the directory. Everything is on disk already."""
        if not self._closed:
            self._closed = True
            self._leave_file()
            os.close(self._lock)

    def __enter__(self) -> "PairLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unusable(self, error: OSError) -> PairLogError:
        return PairLogError(f"{self.directory} must be a directory to read and write, got: {error}. Choose another.")

    def _missing(
        self, preference: Float32[np.ndarray, " P"], prompts: Int64[np.ndarray, " P"], sides: list[Ragged]
    ) -> Int64[np.ndarray, " M"]:
        """Pairs without an answer, each once: a second answer to the same question could not be replayed."""
        first: dict[tuple[int, bytes, bytes], int] = {}
        for at in map(int, np.flatnonzero(np.isnan(preference))):
            first.setdefault((int(prompts[at]), sides[0][at].tobytes(), sides[1][at].tobytes()), at)
        return np.array(list(first.values()), np.int64)

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        try:
            records, end = self._index.scan(data, judge=self._judge, seed=self._seed, first_step=self._step)
        except ValueError as error:
            raise _damaged(path, error) from None
        self.records += records
        if end < len(data):
            self.cut[path.name] = len(data) - end
            os.truncate(path, end)

    def _append(
        self, step: int, prompts: Int64[np.ndarray, " M"], sides: list[Ragged], answers: Float32[np.ndarray, " M"]
    ) -> None:
        header, chain = b"", self._chain
        fresh = self._file is None or self._size >= FILE_BYTES
        if fresh:
            header, chain = _native.pair_header(self._judge, self._seed)
        content, chain = _native.encode_pairs(chain, step, prompts, *_arrays(sides), answers)
        try:
            file = self._next_file() if self._file is None or fresh else self._file
            _write(file, header + content)
        except OSError as error:
            self._take_back()
            raise PairLogError(
                f"the answers of step {step} could not be written to {self.directory}: {error}. "
                "Free space or mend the disk; the pairs before them are as they were."
            ) from error
        self._size += len(header) + len(content)
        self._chain = chain
        self._index.add(step, prompts, *_arrays(sides), answers)

    def _next_file(self) -> int:
        self._leave_file()
        number = max((int(path.stem) for path in files(self.directory)), default=0) + 1
        path = self.directory / f"{number:08d}.pairs"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._size = 0
        # Its name, too, must outlive a loss of power.
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return self._file

    def _leave_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _take_back(self) -> None:
        """Remove half a write. The next goes to a new file, so that nothing follows it even where this fails."""
        if self._file is not None:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._leave_file()


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read a log, or one file of it, in the order it was written. It may be written to meanwhile.

    Args:
      path: the directory, or a file in it.

    Yields:
      For each pair `step`, `prompt_id`, `first` and `second` (lists of token ids), `preference` (p(first ≻ second)),
      `judge` and `seed`: a mapping that any JSON writer takes. An unfinished record at the end of a file is left out.

    Raises:
      PairLogError: a record is damaged (the message names file, record and offset), or there is no such log.
    """
    source = Path(path)
    if not source.exists():
        raise PairLogError(f"a pair log must be a directory or a file, got {str(source)!r}. Check the path.")
    for file in files(source) if source.is_dir() else [source]:
        try:
            judge, seed, _, steps, prompts, preference, lengths, tokens = _native.decode_pairs(file.read_bytes())
        except ValueError as error:
            raise _damaged(file, error) from None
        ends = np.cumsum(lengths)[:-1]
        rows = np.split(tokens, ends) if len(lengths) else []
        for at, (step, prompt, p) in enumerate(zip(steps, prompts, preference, strict=True)):
            yield {
                "step": int(step),
                "prompt_id": int(prompt),
                "first": rows[2 * at].tolist(),
                "second": rows[2 * at + 1].tolist(),
                "preference": float(p),
                "judge": judge.decode(errors="replace"),
                "seed": seed,
            }


def files(directory: Path) -> list[Path]:
    """The files of a log, in the order they were written."""
    named = [path for path in directory.iterdir() if re.fullmatch(r"[0-9]{8,}\.pairs", path.name)]
    return sorted(named, key=lambda path: int(path.stem))


def _arrays(sides: Sequence[Ragged]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return sides[0].values, sides[0].offsets, sides[1].values, sides[1].offsets


def _damaged(path: Path, error: ValueError) -> PairLogError:
    return PairLogError(
        f"{path}: {error}. Bring the file back from a copy, or move it away: what it held is then asked again."
    )


def _write(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]
    os.fsync(file)
