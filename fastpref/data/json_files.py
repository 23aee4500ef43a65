"""JSON lines and JSON arrays to records, plain or compressed: in order, in bounded memory, broken ones by number."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from fastpref.data.records import BadRecord
from fastpref.method.errors import DataError

LINES = (".jsonl", ".ndjson", ".json")
CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Arrow's codecs by the last suffix of a file."""

LINE_BYTES = 64 * 2**20
"""A line of JSON longer than this is a bad record, and is never held as a whole."""
BUFFER = 2**20
CHUNK = 2**20
"""Bytes of an array that are looked at, and read, at a time."""

_BOM = b"\xef\xbb\xbf"
_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{},"]', re.DOTALL)
"""Whole strings, brackets and commas, and the quote of a string that does not end."""


def json_rows(path: Path) -> Iterator[tuple[str, int, object]]:
    """What a number counts, the number, and the record, or a `BadRecord`, of each line or each entry of an array.

    A file is an array if it begins with a bracket: no line of JSON lines does.

    Raises:
      DataError: compressed data that are not whole, or an array that is not one.
    """
    codec = CODECS.get(path.suffix.lower())
    try:
        with _opened(path, codec) as file:
            if file.peek(BUFFER).removeprefix(_BOM).lstrip()[:1] == b"[":
                yield from (("record", number, row) for number, row in _array(path.name, file))
            else:
                yield from (("line", number, row) for number, row in _lines(file))
    except (OSError, EOFError, pa.ArrowException) as error:
        if codec is None:
            raise
        raise DataError(
            f"{path.name} must be whole {codec} data, but received {type(error).__name__}: {error}. Compress it anew."
        ) from error


def _opened(path: Path, codec: str | None) -> io.BufferedReader:
    raw: Any = path.open("rb", 0) if codec is None else pa.CompressedInputStream(pa.OSFile(str(path)), codec)
    return io.BufferedReader(raw, BUFFER)


def _lines(file: BinaryIO) -> Iterator[tuple[int, object]]:
    blank: list[int] = []
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
        line = line.removeprefix(_BOM) if number == 1 else line
        if not line.strip():
            blank.append(number)
            continue
        # Blank lines at the end are only an ending; between records one may stand for a record that was lost.
        for empty in blank:
            yield empty, BadRecord("blank line", "a line before the last record must not be blank")
        blank.clear()
        yield number, _json(line, "line") if len(line) <= LINE_BYTES else _skip_line(file, line)


def _skip_line(file: BinaryIO, line: bytes) -> BadRecord:
    size = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(LINE_BYTES)
        size += len(line)
    return BadRecord("line too long", f"a line must have at most {LINE_BYTES} bytes, but received {size}")


def _array(name: str, file: BinaryIO) -> Iterator[tuple[int, object]]:
    """The entries of an array, found by strings, brackets and commas: a broken one spoils none of the others."""
    text = file.read(CHUNK).removeprefix(_BOM)
    number = depth = 0
    begin = at = text.index(b"[") + 1
    while True:
        for mark in _MARKS.finditer(text, at):
            start, kind = mark.start(), text[mark.start() : mark.start() + 1]
            if kind == b'"':
                if mark.end() == start + 1:
                    break
            elif kind != b",":
                depth += 1 if kind in b"[{" else -1
            at = mark.end()
            if depth < 0 or (depth == 0 and kind == b","):
                entry = text[begin:start].strip()
                if entry or number or depth == 0:
                    yield number, _json(entry, "record")
                if depth < 0:
                    _require_end(name, text[at:], file)
                    return
                number, begin = number + 1, at
        if len(text) - begin > LINE_BYTES:
            raise DataError(
                f"{name}, record {number}: a record must have at most {LINE_BYTES} bytes, but received more. "
                "Shorten it, or close its strings and brackets."
            )
        more = file.read(max(CHUNK, len(text) - begin))
        if not more:
            raise DataError(
                f"{name} must be one whole JSON array, but received one that ends within record {number}. Write it "
                "anew, or write one object a line."
            )
        text, begin, at = text[begin:] + more, 0, at - begin


def _require_end(name: str, rest: bytes, file: BinaryIO) -> None:
    while rest:
        if rest.strip():
            raise DataError(
                f"{name} must be one JSON array, but received {rest.strip()[:20]!r} behind its end. Write one array, "
                "or one object a line."
            )
        rest = file.read(CHUNK)


def _json(text: bytes, unit: str) -> object:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return BadRecord(
            "bad UTF-8", f"a {unit} must be valid UTF-8, but received {error.reason} at byte {error.start}"
        )
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return BadRecord(
            "broken JSON",
            f"a {unit} must be one JSON object, but received an error at character {error.pos}: {error.msg}",
        )
