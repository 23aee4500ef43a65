"""Records in, from files, tables and iterables: each one delivered, or counted with its reason."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from fastpref.data.chat import ChatError, ChatTemplate, is_conversation
from fastpref.data.sources import COLUMNS, Row, Source, open_rows
from fastpref.data.sources import BadRecord as BadRecord
from fastpref.data.sources import DataError as DataError
from fastpref.tokenizer import Tokenizer

IDENTICAL = "identical completions"
"""The reason of a pair that teaches nothing."""

OnBadRecord = str
""""raise", "skip" or "warn"."""


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its K recorded completions: none, one (supervised) or two (chosen, then rejected)."""

    id: int
    """Position in the source, from 0, bad records counted too."""
    prompt: str
    """A `Rendered` one where a chat template wrote it."""
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
            setting = "on_bad_record='skip'" if counted is None else "overlong='drop'"
            raise DataError(
                f"{place}: {bad} [{bad.reason}]. Repair it, or have such records dropped and counted: {setting}."
            ) from None
        self.first = self.first or f"{place}: {bad}"
        self.dropped[bad.reason] += 1

    def account(self) -> DropReport:
        """The account so far."""
        delivered = self.read - sum(self.dropped.values())
        return DropReport(self.read, delivered, dict(self.dropped), self.truncated)

    def close(self) -> None:
        """Warn, once for all, if that is the policy and a record was dropped."""
        if self.on_bad_record == "warn" and self.dropped:
            warnings.warn(f"{self.source}: {self.account()}; the first: {self.first}", UserWarning, stacklevel=4)


def read_records(
    source: Source,
    *,
    columns: Sequence[str] = ("prompt",),
    on_bad_record: OnBadRecord = "raise",
    template: ChatTemplate | None = None,
) -> tuple[list[Record], DropReport]:
    """Read prompts, supervised examples or preference pairs.

    Args:
      source: the path of a JSONL (`.jsonl`, `.ndjson`, `.json`: one object a line), Parquet (`.parquet`) or Arrow
        (`.arrow`, `.feather`, `.ipc`) file; a list of `Path`s of such files, read one after the other; an Arrow table;
        or an iterable of mappings, or of strings for prompts.
      columns: `prompt`; `prompt, completion`; `prompt, chosen, rejected`, optionally `preference`. Where `preference`
        is not named it is taken from the records that have it and is 1 for the others. Other columns are ignored.
      on_bad_record: "raise" at the first; "skip" counts them; "warn" counts them and warns once. A record is bad for
        one of these reasons: broken JSON, line too long (above 64 MiB), blank line (before the last record), not a
        record, missing column, not a string, bad UTF-8, bad conversation, empty prompt, empty completion, identical
        completions, bad preference (not a number in [0, 1]).
      template: writes records that hold messages, lists of `role` and `content`, as text; see `ChatTemplate.texts` for
        where they may stand.

    Returns:
      The records in the order of the source, and the account of those dropped.

    Raises:
      DataError: a bad record under "raise" (the message names file, line and reason), or a file that is missing, of an
        unknown kind, unreadable as a whole, or changed while it was read.
      ValueError: unknown columns or policy.
    """
    stream = RecordStream(source, columns=columns, on_bad_record=on_bad_record, template=template)
    return list(stream), stream.report


def read_prompts(
    source: Source, tokenizer: Tokenizer | None = None, *, on_bad_record: OnBadRecord = "raise"
) -> list[str]:
    """Read prompts as text; conversations by the chat template of `tokenizer`, where it brings one.

    Args:
      source: as for `read_records`.
      tokenizer: of the model that they are for; None where all are text.
      on_bad_record: what becomes of bad records, as for `read_records`.

    Returns:
      The prompts; those that the template wrote are `Rendered`.

    Raises:
      DataError: as `read_records` does.
    """
    template = None if tokenizer is None else ChatTemplate.find(tokenizer)
    records, _ = read_records(source, on_bad_record=on_bad_record, template=template)
    return [record.prompt for record in records]


class RecordStream:
    """The records of `read_records` one by one, for sources that do not fit into memory.

    Files are read in order, in chunks. The order is that of the source and does not depend on memory or time, so a
    reader that has taken n records, dropped ones counted, goes on exactly with `start=n`.

    Args:
      source: as for `read_records`, as are the others.
      columns: what the records hold.
      on_bad_record: what becomes of bad ones. The warning of "warn" comes with the last record.
      template: writes conversations as text.
      start: number of records to pass over; they are neither checked nor counted, and ids go on from there.

    Raises:
      DataError: from the iterator, as `read_records` does.
      ValueError: unknown columns or policy, a negative start.
    """

    def __init__(
        self,
        source: Source,
        *,
        columns: Sequence[str] = ("prompt",),
        on_bad_record: OnBadRecord = "raise",
        template: ChatTemplate | None = None,
        start: int = 0,
    ) -> None:
        self._columns = tuple(columns)
        if self._columns not in COLUMNS:
            known = "; ".join(", ".join(names) for names in COLUMNS)
            raise ValueError(f"columns must be one of [{known}], got {self._columns!r}; choose what the records hold")
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}; give the number of records to pass over")
        name, rows = open_rows(source)
        self._ledger = Ledger(name, on_bad_record)
        self._template = template
        self._records = self._read(islice(enumerate(rows), start, None))

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        return next(self._records)

    @property
    def report(self) -> DropReport:
        """The account of what has been read so far."""
        return self._ledger.account()

    def _read(self, rows: Iterator[tuple[int, "Row"]]) -> Iterator[Record]:
        for index, (name, unit, number, row) in rows:
            self._ledger.read += 1
            try:
                record = _record(index, row, self._columns, self._template)
            except BadRecord as bad:
                self._ledger.drop(f"{name}, {unit} {number}", bad)
                continue
            yield record
        self._ledger.close()


def _record(index: int, row: object, columns: tuple[str, ...], template: ChatTemplate | None) -> Record:
    if isinstance(row, BadRecord):
        raise row
    if isinstance(row, str) and columns == ("prompt",):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise BadRecord("not a record", f"a record must map {', '.join(columns)} to text, got {type(row).__name__}")
    if template is not None and is_conversation(row, columns):
        try:
            row = {**row, **template.texts(row, columns)}
        except ChatError as error:
            raise BadRecord("bad conversation", str(error)) from None
        except UnicodeError as error:
            raise BadRecord("bad UTF-8", f"messages must hold valid UTF-8, got {error}") from None
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
        raise BadRecord(IDENTICAL, "chosen and rejected must differ")
    if "preference" in columns and "preference" not in row:
        raise _missing(row, "preference")
    preference = row.get("preference", 1.0)
    # A NaN fails both comparisons.
    if (
        isinstance(preference, bool)
        or not isinstance(preference, int | float | np.integer | np.floating)
        or not 0 <= preference <= 1
    ):
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
    detail = f"column {column!r} must hold text, got {type(value).__name__}"
    if isinstance(value, list | tuple):
        detail += "; conversations need a chat template"
    raise BadRecord("not a string", detail)


def _missing(row: Mapping[str, Any], column: str) -> BadRecord:
    return BadRecord("missing column", f"column {column!r} must be there, got {', '.join(map(repr, row)) or 'none'}")
