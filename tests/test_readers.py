"""Readers: broken input of every kind is named or counted, and every record is accounted for."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import settings

from fastpref.data import DropReport, Record, json_files, read_records
from fastpref.data.readers import RecordStream
from fastpref.method.errors import DataError

SEEDED = settings(derandomize=True, deadline=None)
PAIR = ("prompt", "chosen", "rejected")
GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}'


def pair(**columns: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": "a", "rejected": "b"} | columns


BAD_LINES: list[tuple[bytes, str, str]] = [
    (GOOD[:-5], "broken JSON", r"a line must be one JSON object, but received an error at character \d+: .*"),
    (GOOD + GOOD, "broken JSON", "a line must be one JSON object"),
    (b"\x00", "broken JSON", "a line must be one JSON object"),
    (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "broken JSON", "a line must be one JSON object"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "b", "preference": NaN}', "broken JSON", "a line must be one JSON"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "b", "preference": 1e999}', "broken JSON", "number is infinity"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "b", "preference": -Infinity}', "broken JSON", "a line must be"),
    (b'{"prompt": ' * 3000 + b"1" + b"}" * 3000, "broken JSON", "a line must be one JSON object"),
    (b'{"prompt": "p\x00", "chosen": "a", "rejected": "b"}', "broken JSON", "a line must be one JSON object"),
    (b'{"prompt": "\xff"}', "bad UTF-8", r"a line must be valid UTF-8, but received invalid start byte at byte 12"),
    (GOOD.decode().encode("utf-16"), "bad UTF-8", "a line must be valid UTF-8"),
    (b"   ", "blank line", "a line before the last record must not be blank"),
    (b"[1, 2]", "not a record", "a record must map prompt, chosen, rejected to text, but received list"),
    (b'"p"', "not a record", "but received str"),
    (b"null", "not a record", "but received NoneType"),
    (b'{"prompt": "p", "chosen": "a"}', "missing column",
     "column 'rejected' must be there, but received 'prompt', 'chosen'"),
    (b"{}", "missing column", "column 'prompt' must be there, but received none"),
    (b'{"prompt": 3, "chosen": "a", "rejected": "b"}', "not a string",
     "column 'prompt' must hold text, but received int"),
    (b'{"prompt": "p", "chosen": null, "rejected": "b"}', "not a string",
     "column 'chosen' must hold text, but received None"),
    (b'{"prompt": " \\n", "chosen": "a", "rejected": "b"}', "empty prompt", "must hold more than white space"),
    (b'{"prompt": "p", "chosen": "a", "rejected": ""}', "empty completion", "a completion must hold more than"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "a"}', "identical completions", "chosen and rejected must differ"),
    (GOOD[:-1] + b', "preference": 1.5}', "bad preference",
     r"preference must be a number in \[0, 1\], but received 1.5"),
    (GOOD[:-1] + b', "preference": -1e-9}', "bad preference", "but received -1e-09"),
    (GOOD[:-1] + b', "preference": 123456789012345678901234567890}', "bad preference", "but received 1.23"),
    (GOOD[:-1] + b', "preference": "1"}', "bad preference", "but received '1'"),
    (GOOD[:-1] + b', "preference": null}', "bad preference", "but received None"),
    (GOOD[:-1] + b', "preference": true}', "bad preference", "but received True"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_broken_line_is_named_or_counted(line: bytes, reason: str, detail: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]))
    with pytest.raises(DataError, match=rf"^pairs.jsonl, line 2: .*{detail}.*\[{reason}\]. Repair it, or have"):
        read_records(path, columns=PAIR)
    # UTF-16 spells its own line ends, which a reader of lines sees as several bad lines.
    bad = line.count(b"\n") + 1
    records, report = read_records(str(path), columns=PAIR, on_bad_record="skip")
    assert report == DropReport(2 + bad, 2, {reason: bad})
    assert records == [Record(0, "p", ("a", "b")), Record(1 + bad, "p", ("a", "b"))]
    with pytest.warns(
        UserWarning, match=rf"^pairs.jsonl: 3 records read, 2 delivered, .*; the first: .*line 2: .*{detail}"
    ):
        read_records(path, columns=PAIR, on_bad_record="warn")


@pytest.mark.parametrize(
    "content",
    [
        GOOD + b"\n" + GOOD,
        GOOD + b"\n" + GOOD + b"\n",
        GOOD + b"\r\n" + GOOD + b"\r\n",
        b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n\n \r\n",
        b"  " + GOOD + b"  \n" + GOOD,
    ],
)
def test_line_ends_byte_order_marks_and_blank_endings_are_no_fault(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    records, report = read_records(path, columns=PAIR)
    assert records == [Record(0, "p", ("a", "b")), Record(1, "p", ("a", "b"))]
    assert report == DropReport(2, 2)


def test_a_blank_line_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([b"", GOOD, b" ", b"", GOOD, GOOD, b""]))
    records, report = read_records(path, columns=PAIR, on_bad_record="skip")
    assert report == DropReport(6, 3, {"blank line": 3})
    assert [record.id for record in records] == [1, 4, 5]


def test_an_empty_file_holds_no_records(tmp_path: Path) -> None:
    path = tmp_path / "nothing.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n")
    assert read_records(path) == ([], DropReport(0, 0))


def test_each_kind_of_record_is_read() -> None:
    assert read_records(["a", {"prompt": "b", "other": 3}, b"c".decode()])[0] == [
        Record(0, "a"), Record(1, "b"), Record(2, "c"),
    ]  # fmt: skip
    supervised = read_records(iter([{"prompt": "a", "completion": "x"}]), columns=("prompt", "completion"))[0]
    assert supervised == [Record(0, "a", ("x",))]
    soft = [pair(preference=0.25), pair()]
    assert [record.preference for record in read_records(soft, columns=PAIR)[0]] == [0.25, 1.0]
    with pytest.raises(DataError, match=r"records, record 1: column 'preference' must be there"):
        read_records(soft, columns=(*PAIR, "preference"))


def test_lone_surrogates_and_byte_strings_are_checked() -> None:
    records, report = read_records([{"prompt": b"caf\xc3\xa9"}, {"prompt": b"\xff"}, "\ud800"], on_bad_record="skip")
    assert records == [Record(0, "café")]
    assert report.dropped == {"bad UTF-8": 2}


TABLE = {"prompt": ["p", "q", None], "chosen": ["a", "b", "c"], "rejected": ["b", "b", "d"], "extra": [1, 2, 3]}


def write_parquet(table: pa.Table, path: Path) -> None:
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def write_arrow_file(table: pa.Table, path: Path) -> None:
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_stream(table: pa.Table, path: Path) -> None:
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = [(write_parquet, "t.parquet"), (write_arrow_file, "t.arrow"), (write_arrow_stream, "t.arrow")]


@pytest.mark.parametrize(("write", "name"), WRITERS)
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_tables_are_read_like_lines(write: Any, name: str, kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({key: pa.array(value, kind if key != "extra" else pa.int64()) for key, value in TABLE.items()})
    write(table, tmp_path / name)
    for source in (tmp_path / name, table):
        records, report = read_records(source, columns=PAIR, on_bad_record="skip")
        assert records == [Record(0, "p", ("a", "b"))]
        assert report == DropReport(3, 1, {"identical completions": 1, "not a string": 1})
    with pytest.raises(DataError, match=rf"^{name}, record 1: chosen and rejected must differ"):
        read_records(tmp_path / name, columns=PAIR)
    with pytest.raises(
        DataError, match=r"record 0: column 'completion' must be there, but received 'prompt', 'chosen', 'rejected'"
    ):
        read_records(tmp_path / name, columns=("prompt", "completion"))


def test_a_table_without_any_known_column_loses_no_record() -> None:
    assert read_records(pa.table({"x": [1, 2]}), on_bad_record="skip")[1] == DropReport(2, 0, {"missing column": 2})


def test_one_row_of_bad_utf8_spoils_that_row_alone() -> None:
    offsets, text = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, text])
    records, report = read_records(pa.table({"prompt": column}), on_bad_record="skip")
    assert [(record.id, record.prompt) for record in records] == [(0, "a"), (2, "b")]
    assert report.dropped == {"bad UTF-8": 1}


def test_a_table_with_offsets_out_of_range_is_refused() -> None:
    """Only the middle offset is wrong, which Arrow itself accepts."""
    offsets, text = pa.py_buffer(b"\0\0\0\0\xff\xff\xff\x00\1\0\0\0"), pa.py_buffer(b"a")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, text])
    with pytest.raises(
        DataError,
        match=r"^table must be a whole Arrow table with one column of each name, but "
        r"received .*Write it anew",
    ):
        read_records(pa.table({"prompt": column}), on_bad_record="skip")


@pytest.mark.parametrize(("write", "name"), WRITERS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_cut_table_is_refused_as_a_whole(write: Any, name: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / name
    write(pa.table({"prompt": ["p" * 50] * 40}), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    kind = "Parquet" if name == "t.parquet" else "Arrow"
    with pytest.raises(
        DataError,
        match=rf"{name} must be a whole {kind} file with one column of each name, but "
        rf"received .*Write it anew",
    ):
        read_records(path, on_bad_record="skip")


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt\n")
    for source, message in (
        (
            tmp_path / "absent.jsonl",
            r"must be the path of a file, but received '.*absent.jsonl'. Put single prompts in a list",
        ),
        ("Write a poem.", "must be the path of a file, but received 'Write a poem.'"),
        (tmp_path, r"a folder must be one that save_to_disk wrote, but received .* without state.json. Name the files"),
        (tmp_path / "x.csv", r"must end in .jsonl, .* or .ipc, but received 'x.csv'. Rename or convert it"),
        (
            {"prompt": "p"},
            r"a path, a table or many records, but received a dict of prompt. Pass one of its values .* or a list of",
        ),
    ):
        with pytest.raises(DataError, match=message):
            read_records(source)


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_of_reading_are_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"columns must be one of \[prompt; prompt, completion; .*but received "
        r"\('chosen',\)",
    ):
        read_records([], columns=("chosen",))
    with pytest.raises(ValueError, match="on_bad_record must be 'raise', 'skip' or 'warn', but received 'ignore'"):
        read_records([], on_bad_record="ignore")


def test_the_report_reads_as_one_line_and_keeps_its_sum() -> None:
    report = DropReport(100, 90, {"empty prompt": 3, "prompt too long": 7})
    assert str(report) == "100 records read, 90 delivered, 10 dropped (7 prompt too long, 3 empty prompt)"
    whole = report.then(DropReport(90, 88, {"prompt too long": 2}, truncated=5))
    assert str(whole) == "100 records read, 88 delivered, 12 dropped (9 prompt too long, 3 empty prompt), 5 truncated"
    assert str(DropReport(2, 2)) == "2 records read, 2 delivered, 0 dropped"
    with pytest.raises(
        ValueError, match=r"delivered and dropped records must add up to those read, but received 8 and .* of 10"
    ):
        DropReport(10, 8, {"empty prompt": 1})
    with pytest.raises(
        ValueError, match="a later stage must read the 90 records that this one delivered, but received 91"
    ):
        report.then(DropReport(91, 91))


def test_good_records_pass_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "prompts.ndjson"
    path.write_bytes(b"\n".join(orjson.dumps({"prompt": f"prompt {i}"}) for i in range(50)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records, _ = read_records(path, on_bad_record="warn")
    assert [record.id for record in records] == list(range(50))


def test_a_huge_line_is_counted_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "LINE_BYTES", 100)
    path = tmp_path / "pairs.jsonl"
    exact = GOOD[:-1] + b" " * (99 - len(GOOD)) + b"}"
    for ending in (b"", b"\n"):
        path.write_bytes(b"\n".join([exact, b"x" * 1000, exact[:-1] + b" }", GOOD, b'"' + b"y" * 101]) + ending)
        records, report = read_records(path, columns=PAIR, on_bad_record="skip")
        assert [record.id for record in records] == [0, 3]
        assert report == DropReport(5, 2, {"line too long": 3})
    with pytest.raises(
        DataError, match=r"pairs.jsonl, line 2: a line must have at most 100 bytes, but received 1001 \["
    ):
        read_records(path, columns=PAIR)


def test_shards_are_one_source_and_each_is_named(tmp_path: Path) -> None:
    first, second, third = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.arrow"
    first.write_bytes(GOOD + b"\n\n" + GOOD)
    table = pa.table({"prompt": ["p", ""], "chosen": ["a", "b"], "rejected": ["b", "c"]})
    write_parquet(table, second)
    write_arrow_stream(table, third)
    records, report = read_records([first, second, third], columns=PAIR, on_bad_record="skip")
    assert [record.id for record in records] == [0, 2, 3, 5]
    assert report == DropReport(7, 4, {"blank line": 1, "empty prompt": 2})
    with pytest.raises(DataError, match=r"^b.parquet, record 1: the prompt must hold more than white space"):
        read_records((second, third), columns=PAIR)
    with pytest.warns(UserWarning, match=r"^a.jsonl to c.arrow, 3 files: 7 records read, 4 delivered, 3 dropped"):
        read_records([first, second, third], columns=PAIR, on_bad_record="warn")
    with pytest.raises(DataError, match=r"must be the path of a file, but received '.*d.jsonl'"):
        read_records([first, tmp_path / "d.jsonl"], columns=PAIR)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "table", "iterable"])
def test_a_stream_goes_on_where_another_stopped(kind: str, tmp_path: Path) -> None:
    rows = [pair(prompt=f"p{i}" if i % 5 else " ") for i in range(40)]

    def source() -> Any:
        path = tmp_path / f"pairs.{kind}"
        if kind == "jsonl":
            path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
        elif kind == "parquet":
            write_parquet(pa.Table.from_pylist(rows), path)
        elif kind == "arrow":
            write_arrow_file(pa.Table.from_pylist(rows), path)
        else:
            return pa.Table.from_pylist(rows) if kind == "table" else iter(rows)
        return path

    whole, report = read_records(source(), columns=PAIR, on_bad_record="skip")
    assert report == DropReport(40, 32, {"empty prompt": 8})
    for start in (0, 1, 17, 39, 40, 41):
        stream = RecordStream(source(), columns=PAIR, on_bad_record="skip", start=start)
        assert list(stream) == [record for record in whole if record.id >= start]
        assert stream.report.read == max(40 - start, 0)
    # Stopped after n records: what was read is where the other begins.
    stream = RecordStream(source(), columns=PAIR, on_bad_record="skip")
    head = [next(stream) for _ in range(9)]
    assert stream.report == DropReport(12, 9, {"empty prompt": 3})
    rest = RecordStream(source(), columns=PAIR, on_bad_record="skip", start=stream.report.read)
    assert [*head, *rest] == whole
    with pytest.raises(ValueError, match="start must be at least 0, but received -1"):
        RecordStream(source(), start=-1)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "pairs.arrow"])
@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_a_file_that_changes_while_it_is_read_is_refused(name: str, change: str, tmp_path: Path) -> None:
    path, other = tmp_path / name, tmp_path / f"other-{name}"
    for target in (path, other):
        if target.suffix == ".jsonl":
            target.write_bytes(GOOD + b"\n" + GOOD)
        else:
            table = pa.Table.from_pylist([pair(), pair()])
            (write_parquet if target.suffix == ".parquet" else write_arrow_file)(table, target)
    stream = RecordStream(path, columns=PAIR)
    next(stream)
    if change == "append":
        with path.open("ab") as file:
            file.write(b"\n")
    elif change == "replace":
        other.replace(path)
    else:
        path.unlink()
    with pytest.raises(
        DataError, match=rf"^{name} must not change while it is read, but received one that did. Read it again"
    ):
        list(stream)


def test_preferences_of_every_number_type_are_read() -> None:
    rows = [pair(preference=kind(0.5)) for kind in (float, np.float32, np.float64, np.float16)]
    rows += [pair(preference=kind(1)) for kind in (int, np.int64, np.uint8)]
    records, _ = read_records(rows, columns=(*PAIR, "preference"))
    assert [record.preference for record in records] == [0.5] * 4 + [1.0] * 3
    assert all(type(record.preference) is float for record in records)
    table = pa.table({key: [value] for key, value in pair().items()} | {"preference": pa.array([0.25], pa.float32())})
    assert read_records(table, columns=PAIR)[0][0].preference == 0.25


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_a_flipped_byte_in_a_table_is_refused_or_read(write: Any, name: str, tmp_path: Path) -> None:
    """Nothing but DataError comes out, whatever byte is wrong; Arrow and Parquet check little themselves."""
    path = tmp_path / name
    write(pa.table({"prompt": [f"prompt {i}" for i in range(40)], "chosen": ["a"] * 40, "rejected": ["b"] * 40}), path)
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), max(1, len(content) // 100)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            _, report = read_records(path, columns=PAIR, on_bad_record="skip")
        except DataError:
            refused += 1
        else:
            assert report.delivered + sum(report.dropped.values()) == report.read
    assert refused
