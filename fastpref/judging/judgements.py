"""Judgements: every answer of a judge, on disk before it is used, in one SQLite file.

    with Judgements(run_dir / "judged.sqlite") as log:
        preference = log.answers(identity(judge), "training", step, prompts, first, second, answer=ask)

A run that goes on from a checkpoint draws the same completions again, and finds the answers to them here: the judge is
not asked twice, so a judge that never answers the same twice does not change the continuation. Each row has a checksum,
rows are numbered without gaps, and the file says how many there are: a damaged or missing row is named and refused.
A process killed at any moment leaves whole answers only, as SQLite's rollback journal sees to.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float32

from fastpref.data.rendered import conversation_of
from fastpref.judging.identity import Identity
from fastpref.method.errors import JudgeError, JudgementsError
from fastpref.runs import owner

FILE = "judged.sqlite"
"""Name of the file in a run directory."""

APPLICATION, VERSION = 0x66707265, 3
"""Number that names these files among those of SQLite, and that of their layout."""

COLUMNS = ("judge", "judge_key", "purpose", "step", "prompt", "conversation", "first", "second", "finished", "answer")
TABLE = """
CREATE TABLE judged (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    judge TEXT NOT NULL, judge_key TEXT NOT NULL, purpose TEXT NOT NULL, step INTEGER NOT NULL,
    prompt TEXT NOT NULL, conversation TEXT, first TEXT NOT NULL, second TEXT, finished TEXT, answer REAL NOT NULL,
    checksum TEXT NOT NULL
)
"""

Answer = Callable[[list[int]], Float32[np.ndarray, " M"]]
"""From the positions of M questions among those given to the answer to each."""


class Judgements:
    """Asks a judge what the file does not hold, and writes the answers down before they are used.

    Args:
      path: the file; made if need be, with its folder.

    Raises:
      JudgementsError: a row is damaged (the message names file and row), or the file cannot be read or written.
      OwnerError: another process writes it; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.replayed: int = 0
        """Questions answered from the file so far."""
        self.asked: int = 0
        """Questions answered by the judge so far."""
        self._answers: dict[bytes, float] = {}
        self._rows = 0
        with ExitStack() as stack:
            try:
                stack.enter_context(owner.hold(self.path.parent, f"{self.path.name}.lock"))
                self._connection = stack.enter_context(
                    closing(sqlite3.connect(self.path, timeout=60, isolation_level=None))
                )
            except (OSError, sqlite3.Error) as error:
                raise _unusable(self.path, error) from error
            self._open()
            self._held = stack.pop_all()

    def __len__(self) -> int:
        """Number of answers in the file."""
        return self._rows

    def answers(
        self,
        judge: Identity,
        purpose: str,
        step: int,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str] | None = None,
        *,
        finished: Sequence[Sequence[bool]] | None = None,
        by_content: bool = False,
        answer: Answer,
    ) -> Float32[np.ndarray, " P"]:
        """Answer P questions: from the file where the same judge was asked the same for the same step, else by it.

        Args:
          judge: whose answers these are.
          purpose: names what they are for, such as "training".
          step: number of the step.
          prompts: P texts; the conversation that a template wrote one from is part of the question.
          first: a completion of each.
          second: what it is compared with; None for rewards of the first alone.
          finished: for each of those lists, which of its completions ended, where the judge is told; it is part of the
            question.
          by_content: take an answer that was given for any purpose and step.
          answer: asked about all missing questions at once, each once; not called if there are none. What it returns is
            on disk when this function returns.

        Returns:
          The answer to each question, float32.

        Raises:
          JudgementsError: the answers could not be written. The file is as it was.
          JudgeError: the judge failed; what it had answered before is kept.
        """
        others: Sequence[str | None] = [None] * len(prompts) if second is None else second
        flags: list[str | None] = [None] * len(prompts)
        if finished is not None:
            flags = [_shown(ends) for ends in zip(*finished, strict=True)]
        asked = list(zip(prompts, map(conversation_of, prompts), first, others, flags, strict=True))
        occasion = () if by_content else (purpose, step)
        questions = [_hash(judge.key, *occasion, *texts) for texts in asked]
        missing: dict[bytes, int] = {}
        for at, question in enumerate(questions):
            if question not in self._answers:
                missing.setdefault(question, at)
        if missing:
            positions = list(missing.values())

            def keep(given: Mapping[int, float]) -> None:
                self._write([(judge.name, judge.key, purpose, step, *asked[positions[at]], given[at]) for at in given])

            try:
                answers = np.asarray(answer(positions), np.float32)
            except JudgeError as error:
                if error.answered:
                    keep({at: float(np.float32(value)) for at, value in error.answered.items()})
                raise
            if len(answers) != len(positions):
                raise ValueError(
                    f"a judge must answer each of {len(positions)} questions, but received {len(answers)} answers. "
                    "Return one for each."
                )
            keep({at: float(value) for at, value in enumerate(answers)})
        self.replayed += len(questions) - len(missing)
        self.asked += len(missing)
        return np.array([self._answers[question] for question in questions], np.float32)

    def close(self) -> None:
        """Let go of the file. Everything is on disk already."""
        self._held.close()

    def __enter__(self) -> "Judgements":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        try:
            # The journal, and the name that it is removed by, are forced to disk too.
            self._connection.execute("PRAGMA synchronous = EXTRA")
            self._connection.execute("BEGIN IMMEDIATE")
            empty = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
            if empty and not self._connection.execute("PRAGMA application_id").fetchone()[0]:
                self._connection.execute(TABLE)
                self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
                self._connection.execute(f"PRAGMA user_version = {VERSION}")
            self._connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise _unusable(self.path, error) from error
        except sqlite3.DatabaseError as error:
            raise _damaged(self.path, str(error)) from error
        for row in _rows(self._connection, self.path):
            self._remember(row)
            self._rows += 1

    def _write(self, rows: list[tuple[Any, ...]]) -> None:
        numbered = [(self._rows + at, *row) for at, row in enumerate(rows, 1)]
        names = ", ".join(("id", *COLUMNS, "checksum"))
        places = ", ".join("?" * (len(COLUMNS) + 2))
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(
                f"INSERT INTO judged ({names}) VALUES ({places})", [(*row, _hash(*row).hex()) for row in numbered]
            )
            self._connection.execute("COMMIT")
        except (sqlite3.Error, UnicodeEncodeError) as error:
            with suppress(sqlite3.Error):
                self._connection.rollback()
            raise JudgementsError(
                f"the answers of a judge must be on disk before they are used, but writing {len(rows)} of them to "
                f"{self.path} failed: {error}. Free space or mend the disk; the answers before them are as they were."
            ) from error
        self._rows += len(rows)
        for row in rows:
            self._remember(row)

    def _remember(self, row: tuple[Any, ...]) -> None:
        """The answer of a row, for its purpose and step, and for those who ask by content."""
        _, key, purpose, step, *texts, answer = row
        self._answers[_hash(key, purpose, step, *texts)] = answer
        self._answers.setdefault(_hash(key, *texts), answer)


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read what was judged, in the order it was written. It may be written to meanwhile.

    Args:
      path: the file, or the run directory that it is in.

    Yields:
      For each answer `judge` (its name), `judge_key` (its identity), `purpose`, `step`, `prompt`, `conversation` (JSON
      of the messages, tools and options that a chat template wrote the prompt from, else None), `first`, `second`
      (None for a reward), `finished` (the word "ended" or "cut" for each completion, where the judge was told, else
      None) and `answer` (p(first ≻ second), or the reward): a mapping that any JSON writer takes.

    Raises:
      JudgementsError: a row is damaged (the message names file and row), or there is no such file.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise JudgementsError(f"a log of judgements must be a file {FILE}, but received {str(path)!r}. Check the path.")
    try:
        connection = sqlite3.connect(file.absolute().as_uri() + "?mode=rw", uri=True, timeout=60)
    except sqlite3.Error as error:
        raise _unusable(file, error) from error
    with closing(connection):
        # All at once: a reader that takes its time would hold up the process that writes.
        rows = list(_rows(connection, file))
    for row in rows:
        yield dict(zip(COLUMNS, row, strict=True))


def _rows(connection: sqlite3.Connection, path: Path) -> Iterator[tuple[Any, ...]]:
    """All rows without number and checksum, both checked."""
    connection.text_factory = bytes
    count = 0
    try:
        if connection.execute("PRAGMA application_id").fetchone() != (APPLICATION,):
            raise _damaged(path, "it is not a log of judgements")
        if connection.execute("PRAGMA user_version").fetchone() != (VERSION,):
            raise _damaged(path, "it was written by another version of fastpref")
        for number, *row, checksum in connection.execute(
            f"SELECT id, {', '.join(COLUMNS)}, checksum FROM judged ORDER BY id"
        ):
            count += 1
            if number != count or checksum != _hash(number, *row).hex().encode():
                raise _damaged(path, f"row {count} is not as it was written")
            yield tuple(value.decode() if isinstance(value, bytes) else value for value in row)
        written = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'judged'").fetchone() or (0,)
        if written != (count,):
            raise _damaged(path, f"it holds {count} rows, and {written[0]} were written")
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise _unusable(path, error) from error
        raise _damaged(path, f"row {count + 1} cannot be read: {error}") from error


def _shown(ends: Sequence[bool]) -> str:
    return " ".join("ended" if end else "cut" for end in ends)


def _hash(*values: Any) -> bytes:
    state = xxhash.xxh3_128()
    for value in values:
        text = isinstance(value, str | bytes)
        kind = b"text" if text else type(value).__name__.encode()
        content = value if isinstance(value, bytes) else (value if text else repr(value)).encode()
        state.update(kind + len(content).to_bytes(8, "little"))
        state.update(content)
    return state.digest()


def _unusable(path: Path, error: Exception) -> JudgementsError:
    return JudgementsError(
        f"{path} must be a file that can be read and written, but received: {error}. "
        "Free space, give the rights, or choose another directory."
    )


def _damaged(path: Path, fault: str) -> JudgementsError:
    return JudgementsError(
        f"{path} must be as it was written, but {fault}. Bring the file back from a copy, or move it away to go on "
        "without it: what it held since the last checkpoint is then asked again."
    )
