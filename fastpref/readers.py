"""Records in, from files, tables and iterables: each one delivered, or counted with its reason."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

OnBadRecord = Literal["raise", "skip", "warn"]

COLUMNS = (
    ("prompt",),
    ("prompt", "completion"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "chosen", "rejected", "preference"),
)
"""What a record may consist of."""


class DataError(ValueError):
    """Data that cannot be used. The message says where it is, the rule, what was received, and the remedy."""


class BadRecord(Exception):
    """One record that cannot be used: `reason` is counted, `detail` is shown."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its K recorded completions: none, one (supervised) or two (chosen, then rejected)."""

    id: int
    """Position in the source, from 0, bad records counted too."""
    prompt: str
    completions: tuple[str, ...] = ()
    preference: float = 1.0
    """Probability that completion 0 beats completion 1."""


@dataclass(frozen=True, slots=True)
class DropReport:
    """What became of every record that was read: `delivered` and the sum of `dropped` are `read`.

    Raises:
      ValueError: they are not.
    """

    read: int
    delivered: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Records by the reason they were dropped for."""
    truncated: int = 0
    """Records among the delivered that were cut to a limit."""

    def __post_init__(self) -> None:
        if self.delivered + sum(self.dropped.values()) != self.read:
            raise ValueError(
                f"delivered and dropped records must add up to those read, got {self.delivered} and "
                f"{dict(self.dropped)} of {self.read}; count each record once"
            )

    def __str__(self) -> str:
        text = f"{self.read} records read, {self.delivered} delivered, {self.read - self.delivered} dropped"
        if self.dropped:
            reasons = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
            text += f" ({', '.join(f'{count} {reason}' for reason, count in reasons)})"
        return text + (f", {self.truncated} truncated" if self.truncated else "")

    def then(self, later: "DropReport") -> "DropReport":
        """This report and that of a later stage, which read what this one delivered, as one.

        Raises:
          ValueError: the later stage read another number of records.
        """
        if later.read != self.delivered:
            raise ValueError(
                f"a later stage must read the {self.delivered} records that this one delivered, got {later.read}; "
                "join reports in the order of their stages"
            )
        dropped = dict(Counter(self.dropped) + Counter(later.dropped))
        return DropReport(self.read, later.delivered, dropped, self.truncated + later.truncated)


class Ledger:
    """Counts the records of one stage and deals with the bad ones as `on_bad_record` says."""

    def __init__(self, source: str, on_bad_record: OnBadRecord) -> None:
        if on_bad_record not in ("raise", "skip", "warn"):
            raise ValueError(
                f"on_bad_record must be 'raise', 'skip' or 'warn', got {on_bad_record!r}; choose one of them"
            )
        self.source = source
        self.on_bad_record = on_bad_record
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self.first = ""

    def drop(self, place: str, bad: BadRecord, *, counted: bool | None = None) -> None:
        """Count a bad record; raise DataError instead if the policy, or `counted=False`, says so."""
        if not (self.on_bad_record != "raise" if counted is None else counted):
            raise DataError(
                f"{place}: {bad} [{bad.reason}]. Repair it, or have such records dropped and counted."
            ) from None
        self.first = self.first or f"{place}: {bad}"
        self.dropped[bad.reason] += 1

    def report(self, delivered: int) -> DropReport:
        """Close the account; warn once if that is the policy and a record was dropped."""
        report = DropReport(self.read, delivered, dict(self.dropped), self.truncated)
        if self.on_bad_record == "warn" and self.dropped:
            warnings.warn(f"{self.source}: {report}; the first: {self.first}", UserWarning, stacklevel=3)
        return report


def read_records(
    source: str | Path | pa.Table | Iterable[Any],
    *,
    columns: Sequence[str] = ("prompt",),
    on_bad_record: OnBadRecord = "raise",
) -> tuple[list[Record], DropReport]:
    """Read prompts, supervised examples or preference pairs.

    Args:
      source: the path of a JSONL (`.jsonl`, `.ndjson`, `.json`: one object a line), Parquet (`.parquet`) or Arrow
        (`.arrow`, `.feather`, `.ipc`) file; an Arrow table; or an iterable of mappings, or of strings for prompts.
      columns: `prompt`; `prompt, completion`; `prompt, chosen, rejected`, optionally `preference`. Where `preference`
        is not named it is taken from the records that have it and is 1 for the others. Other columns are ignored.
      on_bad_record: "raise" at the first; "skip" counts them; "warn" counts them and warns once. A record is bad for
        one of these reasons: broken JSON, blank line (before the last record), not a record, missing column, not a
        string, bad UTF-8, empty prompt, empty completion, identical completions, bad preference (not a number in
        [0, 1]).

    Returns:
      The records in the order of the source, and the account of those dropped.

    Raises:
      DataError: a bad record under "raise" (the message names file, line and reason), or a file that is missing, of an
        unknown kind, or unreadable as a whole.
      ValueError: unknown columns or policy.
    """
    wanted = tuple(columns)
    if wanted not in COLUMNS:
        known = "; ".join(", ".join(names) for names in COLUMNS)
        raise ValueError(f"columns must be one of [{known}], got {wanted!r}; choose what the records hold")
    name, unit, rows = _open(source)
    ledger = Ledger(name, on_bad_record)
    records: list[Record] = []
    for number, row in rows:
        try:
            records.append(_record(ledger.read, row, wanted))
        except BadRecord as bad:
            ledger.drop(f"{name}, {unit} {number}", bad)
        ledger.read += 1
    return records, ledger.report(len(records))


def _record(index: int, row: object, columns: tuple[str, ...]) -> Record:
    if isinstance(row, BadRecord):
        raise row
    if isinstance(row, str) and columns == ("prompt",):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise BadRecord("not a record", f"a record must map {', '.join(columns)} to text, got {type(row).__name__}")
    prompt = _text(row, "prompt")
    if not prompt.strip():
        raise BadRecord("empty prompt", "the prompt must hold more than white space")
    if "completion" in columns:
        completions: tuple[str, ...] = (_text(row, "completion"),)
    elif "chosen" in columns:
        completions = (_text(row, "chosen"), _text(row, "rejected"))
    else:
        return Record(index, prompt)
    if not all(text.strip() for text in completions):
        raise BadRecord("empty completion", "a completion must hold more than white space")
    if len(completions) == 1:
        return Record(index, prompt, completions)
    if completions[0] == completions[1]:
        raise BadRecord("identical completions", "chosen and rejected must differ")
    if "preference" in columns and "preference" not in row:
        raise _missing(row, "preference")
    preference = row.get("preference", 1.0)
    # A NaN fails both comparisons.
    if isinstance(preference, bool) or not isinstance(preference, int | float) or not 0 <= preference <= 1:
        raise BadRecord("bad preference", f"preference must be a number in [0, 1], got {preference!r}")
    return Record(index, prompt, completions, float(preference))


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise _missing(row, column)
    value = row[column]
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            # Lone surrogates, which no tokenizer takes.
            value.encode()
            return value
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRecord("bad UTF-8", f"column {column!r} must hold valid UTF-8, got {error.reason}") from None
    raise BadRecord("not a string", f"column {column!r} must hold text, got {type(value).__name__}")


def _missing(row: Mapping[str, Any], column: str) -> BadRecord:
    return BadRecord("missing column", f"column {column!r} must be there, got {', '.join(map(repr, row)) or 'none'}")


def _open(source: object) -> tuple[str, str, Iterator[tuple[int, object]]]:
    """A name for messages, what its numbers count, and the numbered rows; a row that cannot be read is a BadRecord."""
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise DataError(
                f"a source given as text must be the path of a file, got {str(source)!r}. Put single prompts in a list."
            )
        if path.suffix in (".jsonl", ".ndjson", ".json"):
            return path.name, "line", _json_lines(path)
        if path.suffix == ".parquet":
            return path.name, "record", _whole(path.name, "Parquet file", _parquet_batches(path))
        if path.suffix in (".arrow", ".feather", ".ipc"):
            return path.name, "record", _whole(path.name, "Arrow file", _arrow_batches(path))
        raise DataError(
            "a file must end in .jsonl, .ndjson, .json, .parquet, .arrow, .feather or .ipc, "
            f"got {path.name!r}. Rename or convert it."
        )
    if isinstance(source, pa.Table):
        return "table", "record", _whole("table", "Arrow table", iter(source.to_batches()))
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"a source must be a path, a table or many records, got {type(source).__name__}. Make it a list."
        )
    return "records", "record", enumerate(source)


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    blank: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                blank.append(number)
                continue
            # Blank lines at the end are only an ending; between records one may stand for a record that was lost.
            for empty in blank:
                yield empty, BadRecord("blank line", "a line before the last record must not be blank")
            blank.clear()
            yield number, _json(line)


def _json(line: bytes) -> object:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return BadRecord("bad UTF-8", f"a line must be valid UTF-8, got {error.reason} at byte {error.start}")
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BadRecord(
            "broken JSON", f"a line must be one JSON object, got an error at character {error.pos}: {error.msg}"
        )


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(columns=[name for name in file.schema_arrow.names if name in _KNOWN])


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    # Read, not mapped: a mapped file that shrinks kills the process.
    with pa.OSFile(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)


_KNOWN = frozenset(name for names in COLUMNS for name in names)


def _table_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, object]]:
    number = 0
    for batch in batches:
        names = [name for name in batch.schema.names if name in _KNOWN]
        values = [_plain(batch.column(name)) for name in names]
        for row in zip(*values, strict=True) if names else ((),) * batch.num_rows:
            yield number, dict(zip(names, row, strict=True))
            number += 1


def _plain(column: pa.Array) -> list[Any]:
    """Python values, text as bytes: one row of bad UTF-8 then spoils that row and not the whole column."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    elif pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_string_view(column.type):
        column = column.cast(pa.binary_view())
    # Arrow does not check offsets when it opens a file, and reads through them here.
    column.validate(full=True)
    values: list[Any] = column.to_pylist()
    return values


def _whole(name: str, kind: str, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, object]]:
    try:
        yield from _table_rows(batches)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} must be a whole {kind}, got an error: {error}. Write it anew.") from error
