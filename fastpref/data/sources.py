"""Files, tables and iterables to rows, in order and in bounded memory; what cannot be read is told from what can."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from fastpref.data.records import BadRecord
from fastpref.method.errors import DataError

COLUMNS = (
    ("prompt",),
    ("prompt", "completion"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "chosen", "rejected", "preference"),
)
"""What a record may consist of."""

_KNOWN = frozenset(name for names in COLUMNS for name in names) | {"messages"}

LINE_BYTES = 64 * 2**20
"""A line of JSON longer than this is a bad record, and is never held as a whole."""


Source = str | Path | pa.Table | Iterable[Any]
"""A path; an Arrow table; shards as a list of `Path`s, read one after the other; or an iterable of records."""


Row = tuple[str, str, int, object]
"""Name of the file, what its numbers count, the number, and the record; a BadRecord where it cannot be read."""


def open_rows(source: object) -> tuple[str, Iterator[Row]]:
    """A name for messages, and the rows."""
    if isinstance(source, str | Path):
        path = Path(source)
        return path.name, _file_rows(_existing(path))
    if isinstance(source, pa.Table):
        return "table", _whole("table", "Arrow table", iter(source.to_batches()))
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"a source must be a path, a table or many records, but received {type(source).__name__}. Make it a list."
        )
    if isinstance(source, list | tuple) and source and all(isinstance(item, Path) for item in source):
        paths = [_existing(path) for path in source]
        name = f"{paths[0].name} to {paths[-1].name}, {len(paths)} files"
        return name, (row for path in paths for row in _file_rows(path))
    return "records", (("records", "record", number, row) for number, row in enumerate(source))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"a source given as text must be the path of a file, but received {str(path)!r}. Put single prompts in a "
            f"list."
        )
    if path.suffix not in (*_LINES, *_ARROW, ".parquet"):
        raise DataError(
            "a file must end in .jsonl, .ndjson, .json, .parquet, .arrow, .feather or .ipc, "
            f"but received {path.name!r}. Rename or convert it."
        )
    return path


_LINES = (".jsonl", ".ndjson", ".json")
_ARROW = (".arrow", ".feather", ".ipc")


def _file_rows(path: Path) -> Iterator[Row]:
    with unchanged(path):
        if path.suffix in _LINES:
            yield from ((path.name, "line", number, row) for number, row in _json_lines(path))
        elif path.suffix == ".parquet":
            yield from _whole(path.name, "Parquet file", _parquet_batches(path))
        else:
            yield from _whole(path.name, "Arrow file", _arrow_batches(path))


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Refuses a file that was written to or replaced while it was read: its records belong to no one version."""

    def state() -> tuple[int, ...]:
        try:
            found = path.stat()
        except FileNotFoundError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns

    before = state()
    yield
    if state() != before:
        raise DataError(f"{path.name} must not change while it is read, but received one that did. Read it again.")


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    blank: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                blank.append(number)
                continue
            # Blank lines at the end are only an ending; between records one may stand for a record that was lost.
            for empty in blank:
                yield empty, BadRecord("blank line", "a line before the last record must not be blank")
            blank.clear()
            yield number, _json(line) if len(line) <= LINE_BYTES else _skip_line(file, line)


def _skip_line(file: BinaryIO, line: bytes) -> BadRecord:
    size = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(LINE_BYTES)
        size += len(line)
    return BadRecord("line too long", f"a line must have at most {LINE_BYTES} bytes, but received {size}")


def _json(line: bytes) -> object:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return BadRecord("bad UTF-8", f"a line must be valid UTF-8, but received {error.reason} at byte {error.start}")
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BadRecord(
            "broken JSON",
            f"a line must be one JSON object, but received an error at character {error.pos}: {error.msg}",
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
    column = column.cast(_binary(column.type))
    # Arrow does not check offsets when it opens a file, and reads through them here.
    column.validate(full=True)
    values: list[Any] = column.to_pylist()
    return values


def _binary(kind: pa.DataType) -> pa.DataType:
    """The type with bytes for text, inside lists and structs too."""
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_string_view(kind):
        return pa.binary_view()
    if pa.types.is_large_list(kind):
        return pa.large_list(_binary_field(kind.value_field))
    if pa.types.is_list(kind):
        return pa.list_(_binary_field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_binary_field(kind.field(index)) for index in range(kind.num_fields)])
    return kind


def _binary_field(field: pa.Field) -> pa.Field:
    return field.with_type(_binary(field.type))


def _whole(name: str, kind: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    try:
        yield from ((name, "record", number, row) for number, row in _table_rows(batches))
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name} must be a whole {kind} with one column of each name, but received {type(error).__name__}: "
            f"{error}. "
            "Write it anew."
        ) from error
