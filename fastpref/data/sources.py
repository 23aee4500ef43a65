"""Files, tables and iterables to rows, in order and in bounded memory; what cannot be read is told from what can."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from fastpref.data.json_files import CODECS, LINES, json_rows
from fastpref.method.errors import DataError

COLUMNS = (
    ("prompt",),
    ("prompt", "completion"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "chosen", "rejected", "preference"),
)
"""What a record may consist of."""

FOR_TEMPLATES = ("system", "tools", "chat_template_kwargs")
"""What may stand beside the messages of a record."""

KNOWN = frozenset(name for names in COLUMNS for name in names) | {"messages", *FOR_TEMPLATES}

Source = str | Path | pa.Table | Iterable[Any]
"""A file, a folder of `save_to_disk`, a pattern of names, or a list of these, read one after the other; an Arrow table,
a `datasets.Dataset`, a data frame; or an iterable of records."""


Row = tuple[str, str, int, object]
"""Name of the file, what its numbers count, the number, and the record; a BadRecord where it cannot be read."""

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files of a folder that `save_to_disk` wrote: of a data set, and of several by name."""

_ARROW = (".arrow", ".feather", ".ipc")
_SUFFIXES = (*LINES, *(line + packed for line in LINES for packed in CODECS), *_ARROW, ".parquet")


def open_rows(source: object, unused: set[str]) -> tuple[str, Iterator[Row]]:
    """A name for messages, and the rows.

    Args:
      source: where records come from.
      unused: takes the names of columns that no record can use, as they are met.

    Raises:
      DataError: nothing that records could be read from.
    """
    if paths := files_of(source):
        name = paths[0].name if len(paths) == 1 else f"{paths[0].name} to {paths[-1].name}, {len(paths)} files"
        return name, (row for path in paths for row in _file_rows(path, unused))
    if hasattr(source, "__arrow_c_stream__"):
        table = source if isinstance(source, pa.Table) else _table(source)
        return "table", _whole("table", "Arrow table", iter(table.to_batches()), unused)
    if isinstance(source, Mapping):
        raise DataError(
            f"a source must be a path, a table or many records, but received a {type(source).__name__} of "
            f"{', '.join(map(str, source)) or 'nothing'}. Pass one of its values if they are data sets, or a list of "
            "mappings."
        )
    if hasattr(source, "column_names") and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return "records", _numbered(_rows_of_columns(source, unused))
    if not isinstance(source, Iterable) or hasattr(source, "columns"):
        raise DataError(
            f"a source must be a path, a table or many records, but received {type(source).__name__}. Make it a list "
            "of mappings."
        )
    return "records", _numbered(source)


def _table(source: Any) -> pa.Table:
    """An Arrow table of whatever can be one, such as a data frame."""
    try:
        return pa.table(source)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"a {type(source).__name__} must have columns of one type each to be read, but received "
            f"{type(error).__name__}: {error}. Make its columns text, or pass its rows as a list of mappings."
        ) from error


def files_of(source: object) -> list[Path]:
    """The files that a source names, in order; none where it holds the records itself.

    Raises:
      DataError: a file that is missing or of an unknown kind, or text among the names.
    """
    if isinstance(source, str | Path):
        return _files(Path(source))
    if not isinstance(source, list | tuple):
        return []
    named = [isinstance(item, Path) or (isinstance(item, str) and names_file(item)) for item in source]
    if any(named) and not all(named):
        raise DataError(
            "a list must hold records or the names of files, but received "
            f"{str(source[named.index(True)])!r} among others. Pass the files as a list of their own."
        )
    return [path for item in source for path in _files(Path(item))] if any(named) else []


def names_file(text: str) -> bool:
    """Whether a text is the name of a data file, of files or of a saved data set, which no prompt is."""
    if len(text) > 4096 or "\n" in text:
        return False
    if any(map(str.isspace, text)):
        return text.lower().endswith(_SUFFIXES) and _is_file(Path(text))
    return text.lower().endswith(_SUFFIXES) or _is_file(Path(text, STATE)) or _is_file(Path(text, SPLITS))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def format_of(path: Path) -> str:
    """The suffix that says how a file is read.

    Raises:
      DataError: none that is known.
    """
    name = path.name.lower()
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return suffix
    raise DataError(
        "a file must end in .jsonl, .ndjson, .json (each plain, .gz or .zst), .parquet, .arrow, .feather or .ipc, "
        f"but received {path.name!r}. Rename or convert it."
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _saved(path)
    if path.is_file():
        format_of(path)
        return [path]
    if set("*?[") & set(str(path)):
        anchor = Path(path.anchor)
        matching = sorted(anchor.glob(str(path.relative_to(anchor))))
        if matching:
            return [file for match in matching for file in _files(match)]
        raise DataError(f"a pattern must match at least one file, but received {str(path)!r}. Check the folder.")
    raise DataError(
        f"a source given as text must be the path of a file, but received {str(path)!r}. Put single prompts in a list."
    )


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a folder that the datasets library's `save_to_disk` wrote."""
    splits, state = folder / SPLITS, folder / STATE
    try:
        if splits.is_file():
            names = [str(name) for name in orjson.loads(splits.read_bytes())["splits"]]
            if len(names) == 1:
                return _saved(folder / names[0])
            raise DataError(
                f"a folder must hold one data set, but received {folder} with {', '.join(names)}. "
                f"Name one of them, as in {str(folder / names[0])!r}."
            )
        if not state.is_file():
            raise DataError(
                f"a folder must be one that save_to_disk wrote, but received {folder} without {STATE}. "
                f"Name the files in it, as in {str(folder / '*.parquet')!r}."
            )
        described = orjson.loads(state.read_bytes())
        if described.get("_indices_data_files"):
            raise DataError(
                f"a saved data set must hold its own records, but received {folder} with indices into others. Save it "
                "anew with flatten_indices()."
            )
        paths = [folder / Path(str(entry["filename"])).name for entry in described["_data_files"]]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"a folder must be as save_to_disk wrote it, but received {folder} with {type(error).__name__}: {error}. "
            "Save it anew."
        ) from error
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"a saved data set must be whole, but received {folder} without {path.name}. Copy it again."
            )
    return paths


def _file_rows(path: Path, unused: set[str]) -> Iterator[Row]:
    kind = format_of(path)
    with unchanged(path):
        if kind == ".parquet":
            yield from _whole(path.name, "Parquet file", _parquet_batches(path, unused), unused)
        elif kind in _ARROW:
            yield from _whole(path.name, "Arrow file", _arrow_batches(path), unused)
        else:
            yield from ((path.name, unit, number, row) for unit, number, row in json_rows(path))


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


def _numbered(records: Iterable[object]) -> Iterator[Row]:
    return (("records", "record", number, row) for number, row in enumerate(records))


def _rows_of_columns(source: Any, unused: set[str]) -> Iterator[object]:
    """The rows of a `datasets.Dataset`, or of whatever else has names of columns and rows by number."""
    # Columns that are not asked for may be costly to decode; but a transform of the user's may read them.
    if hasattr(source, "select_columns") and (getattr(source, "format", None) or {}).get("type") != "custom":
        names = list(source.column_names)
        unused.update(name for name in names if name not in KNOWN)
        source = source.select_columns([name for name in names if name in KNOWN])
        source = source.with_format(None) if hasattr(source, "with_format") else source
    for number in range(len(source)):
        row = source[number]
        yield {name: _filled(value) for name, value in row.items()} if isinstance(row, Mapping) else row


# Arrow --------------------------------------------------------------------------------------------------------------


def _parquet_batches(path: Path, unused: set[str]) -> Iterator[pa.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        unused.update(name for name in names if name not in KNOWN)
        yield from file.iter_batches(columns=[name for name in names if name in KNOWN])


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    # Read, not mapped: a mapped file that shrinks kills the process.
    with pa.OSFile(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)


def _table_rows(batches: Iterator[pa.RecordBatch], unused: set[str]) -> Iterator[tuple[int, object]]:
    number = 0
    for batch in batches:
        names = [name for name in batch.schema.names if name in KNOWN]
        # A data frame's index is no column.
        unused.update(name for name in batch.schema.names if name not in KNOWN and not name.startswith("__index_level"))
        values = [_plain(batch.column(name)) for name in names]
        for row in zip(*values, strict=True) if names else ((),) * batch.num_rows:
            yield number, dict(zip(names, row, strict=True))
            number += 1


def _plain(column: pa.Array) -> list[Any]:
    """Python values, text as bytes: one row of bad UTF-8 then spoils that row and not the whole column."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(_binary(column.type))
    # Arrow does not check offsets when it opens a file, and reads through them here.
    column.validate(full=True)
    values: list[Any] = column.to_pylist()
    return [_filled(value) for value in values] if pa.types.is_nested(column.type) else values


def _filled(value: Any) -> Any:
    """A nested value without the empty entries that tables fill mappings up with, so that all have the same keys."""
    if isinstance(value, Mapping):
        return {key: _filled(entry) for key, entry in value.items() if entry is not None}
    return [_filled(entry) for entry in value] if isinstance(value, list | tuple) else value


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


def _whole(name: str, kind: str, batches: Iterator[pa.RecordBatch], unused: set[str]) -> Iterator[Row]:
    try:
        yield from ((name, "record", number, row) for number, row in _table_rows(batches, unused))
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name} must be a whole {kind} with one column of each name, but received {type(error).__name__}: "
            f"{error}. "
            "Write it anew."
        ) from error
