"""Records in, from files, tables and iterables: each one delivered, or counted with its reason."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fastpref.data.chat import ChatTemplate, is_conversation
from fastpref.data.records import IDENTICAL, BadRecord, DropReport, Ledger, Record
from fastpref.data.rendered import Rendered
from fastpref.data.sources import COLUMNS, FOR_TEMPLATES, Row, Source, names_file, open_rows
from fastpref.data.tokenizer import Tokenizer
from fastpref.method.choices import OnBadRecord
from fastpref.method.errors import ChatError, DropWarning


def read_records(
    source: Source,
    *,
    columns: Sequence[str] = ("prompt",),
    on_bad_record: OnBadRecord = "raise",
    template: ChatTemplate | None = None,
) -> tuple[list[Record], DropReport]:
    """Read prompts, supervised examples or preference pairs.

    Args:
      source: one of
        - a file: JSON (`.jsonl`, `.ndjson`, `.json`; one object a line or one array of objects; plain, `.gz` or
          `.zst`), Parquet (`.parquet`) or Arrow (`.arrow`, `.feather`, `.ipc`); a folder that `save_to_disk` of the
          datasets library wrote; a pattern such as `data/*.jsonl`, its files in the order of their names; or a list of
          these, read one after the other. Text in a list that names a data file is a file, never a prompt;
        - a table: an Arrow table, a data frame, a `datasets.Dataset`;
        - an iterable of mappings, of strings for prompts, or of what this function returned.
      columns: `prompt`; `prompt, completion`; `prompt, chosen, rejected`, optionally `preference`. Where `preference`
        is not named it is taken from the records that have it and is 1 for the others. The report names columns that
        nothing is read from.
      on_bad_record: "raise" at the first; "skip" counts them; "warn" counts them and warns once. A record is bad for
        one of these reasons: broken JSON, line too long (above 64 MiB), blank line (before the last record), not a
        record, missing column, not a string, bad UTF-8, bad conversation, empty prompt, name of a file, empty
        completion, identical completions, bad preference (not a number in [0, 1]).
      template: writes records that hold messages, lists of `role` and `content`, as text; see `ChatTemplate.texts` for
        where they may stand. Such a record may also have `system`, text that becomes its first message, and `tools` (a
        list) and `chat_template_kwargs` (a mapping), which the template reads; both may be JSON in text.

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
    source: Source,
    tokenizer: Tokenizer | None = None,
    *,
    on_bad_record: OnBadRecord = "raise",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Read prompts as text; conversations by the chat template of `tokenizer`, where it brings one.

    Args:
      source: as for `read_records`; conversations that another model's template wrote are written anew.
      tokenizer: of the model that they are for; None where all are text.
      on_bad_record: what becomes of bad records, as for `read_records`.
      chat_template_kwargs: options of the chat template, such as `enable_thinking`.

    Returns:
      The prompts; those that the template wrote are `Rendered`.

    Raises:
      DataError: as `read_records` does.
      ChatError: a prompt is a conversation that another template wrote, and the tokenizer brings none.

    Warns:
      DropWarning: records were dropped, or hold columns that are not used; see `read_records` for the account itself.
    """
    template = None if tokenizer is None else ChatTemplate.find(tokenizer, chat_template_kwargs)
    records, report = read_records(source, on_bad_record=on_bad_record, template=template)
    said = on_bad_record == "warn" and report.dropped
    if (report.dropped or report.unused) and not said:
        named = f" of {source}" if isinstance(source, str | Path) else ""
        warnings.warn(f"prompts{named}: {report}", DropWarning, stacklevel=3)
    prompts = [record.prompt for record in records]
    return prompts if tokenizer is None else written_by(template, prompts)


def written_by(template: ChatTemplate | None, prompts: Iterable[str]) -> list[str]:
    """Prompts as a template writes them: each conversation that another template wrote is written anew.

    Raises:
      ChatError: a prompt is a conversation, and there is no template or it refuses the conversation.
    """
    written: list[str] = []
    for prompt in prompts:
        said = prompt.conversation if isinstance(prompt, Rendered) else None
        if said is None or (template is not None and template.wrote(prompt)):
            written.append(prompt)
        elif template is None:
            raise ChatError(
                "a model that reads conversations must bring a chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), but received none. Save its template beside it, or give the prompts as text."
            )
        else:
            written.append(template.prompt(said.messages, said.tools, said.options))
    return written


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
            raise ValueError(
                f"columns must be one of [{known}], but received {self._columns!r}. Choose what the records hold."
            )
        if start < 0:
            raise ValueError(
                f"start must be at least 0, but received {start}. Give the number of records to pass over."
            )
        unused: set[str] = set()
        name, rows = open_rows(source, unused)
        self._ledger = Ledger(name, on_bad_record)
        self._ledger.unused = unused
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
                record = _record(index, row, self._columns, self._template, self._ledger.unused)
            except BadRecord as bad:
                self._ledger.drop(f"{name}, {unit} {number}", bad)
                continue
            yield record
        self._ledger.close()


def _record(
    index: int, row: object, columns: tuple[str, ...], template: ChatTemplate | None, unused: set[str]
) -> Record:
    if isinstance(row, BadRecord):
        raise row
    if isinstance(row, str) and columns == ("prompt",):
        if names_file(row):
            raise BadRecord("name of a file", f"a prompt must be text, but received the name of a file, {row!r}")
        row = {"prompt": row}
    if isinstance(row, Record):
        row = _columns_of(row)
    if not isinstance(row, Mapping):
        raise BadRecord(
            "not a record", f"a record must map {', '.join(columns)} to text, but received {type(row).__name__}"
        )
    written = _written(row, columns, template)
    read = {*columns, *written, *["preference"] * ("chosen" in columns)}
    unused.update(str(name) for name, value in row.items() if name not in read and value is not None)
    if template is not None and written:
        try:
            row = {**row, **template.texts(row, columns)}
        except ChatError as error:
            raise BadRecord("bad conversation", str(error)) from None
        except UnicodeError as error:
            raise BadRecord("bad UTF-8", f"messages must hold valid UTF-8, but received {error}") from None
    prompt = _text(row, "prompt")
    if isinstance(prompt, Rendered) and template is not None and columns == ("prompt",):
        try:
            (prompt,) = written_by(template, [prompt])
        except ChatError as error:
            raise BadRecord("bad conversation", str(error)) from None
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
        raise BadRecord("bad preference", f"preference must be a number in [0, 1], but received {preference!r}")
    return Record(index, prompt, completions, float(preference))


def _columns_of(record: Record) -> dict[str, Any]:
    """The mapping that a record was read from, as far as it is text."""
    names = {0: (), 1: ("completion",), 2: ("chosen", "rejected")}[len(record.completions)]
    preference = {"preference": record.preference} if len(names) == 2 else {}
    return {"prompt": record.prompt, **dict(zip(names, record.completions, strict=True)), **preference}


def _written(row: Mapping[str, Any], columns: tuple[str, ...], template: ChatTemplate | None) -> set[str]:
    """What a template reads beside the columns of messages, or of text with a system; nothing where all is plain text.

    Raises:
      BadRecord: what stands beside its text or messages would be lost.
    """
    given = [name for name in FOR_TEMPLATES if not _empty(row.get(name))]
    if not is_conversation(row, columns) and given != ["system"]:
        if given:
            raise BadRecord(
                "bad conversation", f"{' and '.join(given)} must stand beside messages, but received text alone"
            )
        return set()
    if given and template is None:
        raise BadRecord(
            "bad conversation", f"{' and '.join(given)} must be written by a chat template, but received none"
        )
    messages = ["messages"] * ("messages" in row and any(name not in row for name in columns if name != "preference"))
    whole = [row[name] for name in (*columns, *messages) if name != "prompt" and _begins(row.get(name))]
    if whole and not _empty(row.get("prompt")) and not _is_start(row["prompt"], whole[0]):
        raise BadRecord(
            "bad conversation",
            "a prompt beside whole conversations must be their beginning or what the user says there, but received "
            f"{row['prompt']!r:.50}",
        )
    return {*FOR_TEMPLATES, *messages}


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, Sized) and len(value) == 0)


def _begins(value: object) -> bool:
    """Whether messages begin a conversation, rather than answer one."""
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], Mapping):
        return False
    return value[0].get("role") not in ("assistant", b"assistant")


def _is_start(prompt: object, conversation: Sequence[Any]) -> bool:
    """Whether a prompt is text that the user says in a conversation, or its first messages."""
    messages = [message for message in conversation if isinstance(message, Mapping)]
    if isinstance(prompt, list | tuple):
        return list(prompt) == messages[: len(prompt)]
    said = [message.get("content") for message in messages if message.get("role") in ("user", b"user")]
    return _stripped(prompt) in map(_stripped, said)


def _stripped(text: object) -> str:
    return (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).strip()


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise _missing(row, column)
    value = row[column]
    try:
        if isinstance(value, bytes):
            return _no_messages(column, value.decode())
        if isinstance(value, str):
            # Lone surrogates, which no tokenizer takes.
            value.encode()
            return _no_messages(column, value)
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRecord("bad UTF-8", f"column {column!r} must hold valid UTF-8, but received {error.reason}") from None
    detail = f"column {column!r} must hold text, but received {type(value).__name__}"
    if isinstance(value, list | tuple):
        detail += "; conversations need a chat template"
    raise BadRecord("not a string", detail)


def _no_messages(column: str, text: str) -> str:
    """The text, refused where it is the JSON of messages: a file of them that was read without its quotes."""
    if not isinstance(text, Rendered) and text.lstrip().startswith("[") and '"role"' in text:
        with suppress(orjson.JSONDecodeError):
            parsed = orjson.loads(text)
            if parsed and all(isinstance(message, dict) and "role" in message for message in parsed):
                raise BadRecord(
                    "bad conversation",
                    f"column {column!r} must hold text or messages, but received messages as the text of JSON; read "
                    "them with json.loads",
                )
    return text


def _missing(row: Mapping[str, Any], column: str) -> BadRecord:
    return BadRecord(
        "missing column", f"column {column!r} must be there, but received {', '.join(map(repr, row)) or 'none'}"
    )
