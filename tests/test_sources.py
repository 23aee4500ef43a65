"""Where records come from: arrays, several files, compressed ones, saved data sets, tables; what is said of them."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import ChatTemplate, DropReport, Record, RecordStream, json_files, read_records, tokenized
from fastpref.data.sources import names_file
from fastpref.method.errors import DataError

SEEDED = settings(derandomize=True, deadline=None)
PAIR = ("prompt", "chosen", "rejected")
ROWS = [{"prompt": f"p{n}", "chosen": 'a "[x, {y" \\', "rejected": f"b{n}"} for n in range(5)]
RECORDS = [Record(n, f"p{n}", ('a "[x, {y" \\', f"b{n}")) for n in range(5)]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# JSON arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_array_is_read_as_lines_are(indent: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs{suffix}"
    for mark in (b"", b"\xef\xbb\xbf", b" \r\n "):
        path.write_bytes(mark + json.dumps(ROWS, indent=indent).encode() + b"\n \n")
        assert read_records(path, columns=PAIR) == (RECORDS, DropReport(5, 5))
        assert list(RecordStream(path, columns=PAIR, start=3)) == RECORDS[3:]


def test_an_empty_array_holds_no_records(tmp_path: Path) -> None:
    for content in (b"[]", b" [ \n ] "):
        (tmp_path / "none.json").write_bytes(content)
        assert read_records(tmp_path / "none.json") == ([], DropReport(0, 0))


@SEEDED
@given(
    entries=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.sampled_from('a"\\[]{},: \né☃'), max_size=9),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=8,
    ),
    indent=st.none() | st.integers(0, 3),
    plain=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_any_array_in_any_chunks_is_what_it_is_as_a_whole(
    entries: list[Any], indent: Any, plain: bool, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("array") / "any.json"
    path.write_text(json.dumps(entries, indent=indent, ensure_ascii=plain), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK", chunk)
        assert [row for _, _, row in json_files.json_rows(path)] == entries


ENTRIES: list[tuple[str, str, str]] = [
    ('{"prompt": "p", "chosen": "a" "rejected": "b"}', "broken JSON", "a record must be one JSON object, but received"),
    ('{"prompt": "p", "chosen": "a", "rejected": NaN}', "broken JSON", "a record must be one JSON object"),
    ("", "broken JSON", "a record must be one JSON object"),
    ("3", "not a record", "but received int"),
    ('["p"]', "not a record", "but received list"),
    ('{"prompt": "p", "chosen": "a"}', "missing column", "column 'rejected' must be there"),
]


@pytest.mark.parametrize(("entry", "reason", "detail"), ENTRIES, ids=range(len(ENTRIES)))
def test_a_broken_entry_is_named_and_spoils_no_other(entry: str, reason: str, detail: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    good = json.dumps(ROWS[0], indent=1)
    path.write_text(f"[{good},\n{entry},\n{good}]")
    with pytest.raises(DataError, match=rf"^pairs.json, record 1: .*{detail}.*\[{reason}\]. Repair it, or have"):
        read_records(path, columns=PAIR)
    records, report = read_records(path, columns=PAIR, on_bad_record="skip")
    assert [record.id for record in records] == [0, 2]
    assert report == DropReport(3, 2, {reason: 1})


WHOLE: list[tuple[bytes, str]] = [
    (b'[{"prompt": "p"}, {"prompt": "q', r"cut.json must be one whole JSON array, .* ends within record 1. Write it"),
    (b'[{"prompt": "p"}', r"must be one whole JSON array, .* ends within record 0"),
    (b'[{"prompt": "p"}]\n{"prompt": "q"}', r"must be one JSON array, but received .*prompt.* behind its end. Write"),
    (b'[{"prompt": "p"}}]', r"must be one JSON array, but received b'\]' behind its end"),
    (b'[{"prompt": "' + b"x" * 300 + b'"}]', r"cut.json, record 0: a record must have at most 100 bytes, but received"),
]


@pytest.mark.parametrize(("content", "message"), WHOLE, ids=range(len(WHOLE)))
def test_an_array_that_is_none_is_refused(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "LINE_BYTES", 100)
    monkeypatch.setattr(json_files, "CHUNK", 16)
    (tmp_path / "cut.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / "cut.json", on_bad_record="skip")


class Mixed:
    """A data frame whose columns have no type of Arrow's."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        raise TypeError("Expected bytes, got a 'int' object")


def test_a_data_frame_that_is_no_table_is_refused(unchecked: None) -> None:
    with pytest.raises(DataError, match=r"a Mixed must have columns of one type each to be read, .*got a 'int' object"):
        read_records(Mixed())  # type: ignore[arg-type]


# Compressed files ---------------------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_compressed_json_is_read(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    whole, array, parts = (tmp_path / f"{name}{suffix}" for name in ("a.jsonl", "b.json", "c.ndjson"))
    whole.write_bytes(pack(lines(ROWS)))
    array.write_bytes(pack(json.dumps(ROWS, indent=1).encode()))
    # As loggers and `cat` write them: several streams one after the other.
    parts.write_bytes(pack(lines(ROWS[:2])) + pack(lines(ROWS[2:])))
    for path in (whole, array, parts):
        assert read_records(path, columns=PAIR)[0] == RECORDS
    content = whole.read_bytes()
    codec = {".gz": "gzip", ".zst": "zstd"}[suffix]
    for damaged in (content[: len(content) // 2], b"plain text"):
        whole.write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"a.jsonl{suffix} must be whole {codec} data, but received .* Compress it"
        ):
            read_records(whole, columns=PAIR)


def test_a_compressed_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(
        DataError, match=r"a file must end in .jsonl, .ndjson, .json \(each plain, .gz or .zst\), .parq"
    ):
        read_records(tmp_path / "t.parquet.gz")


# Several files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(ROWS[:2]))
    (folder / "b.json").write_text(json.dumps(ROWS[2:4]))
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS[4:]), folder / "c.parquet")
    return folder


def test_lists_of_names_and_patterns_are_files(shards: Path) -> None:
    named = ["a.jsonl", "b.json", "c.parquet"]
    for source in (
        [str(shards / name) for name in named],
        tuple(shards / name for name in named),
        [str(shards / "a.jsonl"), shards / "[b-c]*"],
        str(shards / "*"),
        shards / "?.*",
    ):
        assert read_records(source, columns=PAIR) == (RECORDS, DropReport(5, 5))
    tokens = tokenized([str(shards / "a.jsonl")], Words(), cache=shards / "cache", max_prompt_tokens=3)
    again = tokenized(str(shards / "a*"), Words(), cache=shards / "cache", max_prompt_tokens=3)
    assert tokens[1] == again[1] == DropReport(2, 2)
    assert len(list((shards / "cache").glob("*.arrow"))) == 1
    assert tokens[1].unused == again[1].unused == ("chosen", "rejected")


class Words:
    """One token for each character."""

    vocab_size = 256
    fingerprint = b"words"

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    encode_completions = encode_prompts


def test_names_of_files_are_never_prompts(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    assert [record.prompt for record in read_records(["a.jsonl"])[0]] == ["p0", "p1"]
    for source in (["a.jsonl", "What is in a.jsonl?"], ["Name a mill.", "a.jsonl"], [{"prompt": "p"}, "a.jsonl"]):
        with pytest.raises(
            DataError, match=r"a list must hold records or the names of files, but received 'a.jsonl' a"
        ):
            read_records(source)
    with pytest.raises(DataError, match=r"must be the path of a file, but received 'missing.jsonl'"):
        read_records(["missing.jsonl"])
    with pytest.raises(DataError, match=r"a pattern must match at least one file, but received 'x\*.jsonl'. Check"):
        read_records(["x*.jsonl"])
    with pytest.raises(DataError, match=r"record 1: a prompt must be text, but received the name of a file, 'a.jsonl'"):
        read_records(iter(["p", "a.jsonl"]))
    records, report = read_records(iter(["p", "a.jsonl"]), on_bad_record="skip")
    assert ([record.prompt for record in records], report.dropped) == (["p"], {"name of a file": 1})
    for text in ("What is in a.jsonl?", "a.jsonl or b.json", "x" * 300, "x" * 9000, "a\n.jsonl", "", "\0", "data", "."):
        assert not names_file(text)
    with pytest.raises(
        DataError, match=r"a folder must be one that save_to_disk wrote, but received .* Name the files"
    ):
        read_records(shards)


# Saved data sets and tables -----------------------------------------------------------------------------------------


def save_to_disk(folder: Path, shards: list[list[Any]]) -> None:
    """The layout that the datasets library writes."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(shards):05}.arrow" for n in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_a_saved_data_set_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_to_disk(folder, [ROWS[:3], ROWS[3:]])
    for source in (folder, str(folder), [str(folder)]):
        assert read_records(source, columns=PAIR)[0] == RECORDS
    save_to_disk(tmp_path / "many" / "train", [ROWS])
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert read_records(tmp_path / "many", columns=PAIR)[0] == RECORDS
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        DataError, match=r"a folder must hold one data set, .* with train, test. Name one of them, as in"
    ):
        read_records(str(tmp_path / "many"), columns=PAIR)


STATES = [
    ("{", r"a folder must be as save_to_disk wrote it, but received .* with JSONDecodeError"),
    ("[]", r"with AttributeError"),
    ("{}", r"with KeyError: '_data_files'. Save it anew"),
    ('{"_data_files": [{"filename": "x.arrow"}]}', r"a saved data set must be whole, but received .* without x.arrow"),
    ('{"_indices_data_files": [{"filename": "i.arrow"}]}', r"with indices into others. Save it anew with flatten_indi"),
]


@pytest.mark.parametrize(("state", "message"), STATES, ids=range(len(STATES)))
def test_a_damaged_data_set_is_refused(state: str, message: str, tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", [ROWS])
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / "saved")


class DatasetLike:
    """What a `datasets.Dataset` is to a reader: names of columns, and rows by number."""

    def __init__(self, rows: list[dict[str, Any]], decoded: list[str]) -> None:
        self.rows, self.column_names, self.decoded = rows, list(rows[0]), decoded

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.decoded += self.column_names
        return {name: self.rows[number].get(name) for name in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def with_format(self, kind: str | None) -> "DatasetLike":
        self.format = {"type": kind}
        return self

    def select_columns(self, names: list[str]) -> "DatasetLike":
        return DatasetLike([{name: row.get(name) for name in names} for row in self.rows], self.decoded)


def test_a_data_set_in_memory_is_read_by_its_columns() -> None:
    decoded: list[str] = []
    rows = [{**row, "image": b"", "score": 0.5} for row in ROWS]
    records, report = read_records(DatasetLike(rows, decoded), columns=PAIR)
    assert records == RECORDS
    assert report.unused == ("image", "score")
    assert set(decoded) == set(PAIR)
    # A transform of the user's makes the columns, and may read any.
    source = DatasetLike(rows, decoded).with_format("custom")
    assert read_records(source, columns=PAIR)[1].unused == ("image", "score")
    assert "score" in decoded
    with pytest.raises(DataError, match=r"but received a dict of train, test. Pass one of its values if they are data"):
        read_records({"train": DatasetLike(rows, []), "test": []})


def test_whatever_speaks_arrow_is_a_table() -> None:
    class Frame:
        """A data frame, as far as Arrow sees one; its own iterator gives the names of columns."""

        columns = PAIR

        def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
            return pa.Table.from_pylist(ROWS).__arrow_c_stream__(requested_schema)

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

    assert read_records(Frame(), columns=PAIR)[0] == RECORDS

    class Older:
        columns = PAIR

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

    with pytest.raises(DataError, match=r"a source must be a path, a table or many records, but received Older. Make"):
        read_records(Older())


# What is said -------------------------------------------------------------------------------------------------------


def test_columns_that_nothing_is_read_from_are_named(tmp_path: Path) -> None:
    rows = [{**row, "score": 1, "source": "web", "none": None} for row in ROWS]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for source in (rows, tmp_path / "a.jsonl"):
        report = read_records(source, columns=PAIR)[1]
        assert str(report) == "5 records read, 5 delivered, 0 dropped; columns not used: score, source"
        assert read_records(source)[1].unused == ("chosen", "rejected", "score", "source")
    assert read_records(tmp_path / "a.parquet", columns=PAIR)[1].unused == ("none", "score", "source")
    many = DropReport(1, 1, unused=tuple(f"c{n:02}" for n in range(23)))
    assert str(many).endswith("c18, c19 and 3 more")
    for _ in range(2):  # encoded, and from the cache
        assert tokenized(
            tmp_path / "a.jsonl", Words(), columns=PAIR, max_prompt_tokens=9, max_completion_tokens=30, cache=tmp_path
        )[1].unused == ("score", "source")


def test_records_are_read_again_as_they_are() -> None:
    rows = [{**row, "preference": 0.25} for row in ROWS]
    records, _ = read_records(rows, columns=PAIR)
    assert read_records(records, columns=PAIR)[0] == records
    assert [record.prompt for record in read_records(records)[0]] == [record.prompt for record in records]
    supervised = [Record(4, "p", ("c",))]
    assert read_records(supervised, columns=("prompt", "completion"))[0] == [Record(0, "p", ("c",))]
    with pytest.raises(DataError, match=r"column 'chosen' must be there, but received 'prompt', 'completion'"):
        read_records(supervised, columns=PAIR)


CHAT = ChatTemplate(
    "{% if tools %}[tools] {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    {"eos_token": "</s>"},
)
ASKED = [{"role": "user", "content": "How high?"}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_prompt_that_its_conversations_do_not_hold_is_not_ignored() -> None:
    turns = [*ASKED, said("Which river?"), {"role": "user", "content": "The Elbe."}]
    row = {"chosen": [*turns, said("Three feet.")], "rejected": [*turns, said("Blue.")]}
    for prompt in ("How high?", " The Elbe.\n", b"The Elbe.", ASKED, turns, None, ""):
        records, _ = read_records([{**row, "prompt": prompt}], columns=PAIR, template=CHAT)
        assert records[0].prompt.endswith("<user>The Elbe.\n<assistant>")
    for prompt in ("How deep?", [{"role": "user", "content": "How deep?"}]):
        with pytest.raises(DataError, match=r"a prompt beside whole conversations must be their beginning or what the"):
            read_records([{**row, "prompt": prompt}], columns=PAIR, template=CHAT)
        with pytest.raises(DataError, match=r"a prompt beside whole conversations must be their beginning or what the"):
            read_records(
                [{"messages": row["chosen"], "prompt": prompt}], columns=("prompt", "completion"), template=CHAT
            )
    supervised = [{"messages": row["chosen"], "prompt": "How high?"}]
    assert read_records(supervised, columns=("prompt", "completion"), template=CHAT)[1] == DropReport(1, 1)
    assert read_records(supervised, template=CHAT)[1].unused == ("messages",)


def test_what_a_template_reads_is_never_lost() -> None:
    tools = [{"type": "function", "function": {"name": "river_level"}}]
    for extra in ({"tools": tools}, {"chat_template_kwargs": {"enable_thinking": False}}, {"tools": json.dumps(tools)}):
        with pytest.raises(
            DataError, match=rf"{next(iter(extra))} must stand beside messages, but received text alone"
        ):
            read_records([{"prompt": "p", **extra}], template=CHAT)
        with pytest.raises(
            DataError, match=rf"{next(iter(extra))} must be written by a chat template, but received none"
        ):
            read_records([{"prompt": ASKED, **extra}])
    with pytest.raises(DataError, match=r"system must be written by a chat template, but received none"):
        read_records([{"prompt": "p", "system": "Be brief."}])
    empty = {"tools": [], "system": "", "chat_template_kwargs": None}
    records, report = read_records([{"prompt": "p", **empty}], template=CHAT)
    assert (records[0].prompt, report.dropped) == ("p", {})


def test_tables_deliver_what_templates_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": ASKED, "system": "Be brief.", "tools": [{"name": "f", "parameters": {"unit": "m"}}]},
        {"prompt": ASKED, "system": None, "tools": [{"name": "g", "parameters": {"depth": "m"}}]},
    ]
    path = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    template = Seen("{{ messages[0].content }}")
    read_records(path, template=template)
    # No keys that the table filled up.
    assert [row["tools"] for row in template.rows] == [
        [{"name": b"f", "parameters": {"unit": b"m"}}], [{"name": b"g", "parameters": {"depth": b"m"}}],
    ]  # fmt: skip
    assert [row["system"] for row in template.rows] == [b"Be brief.", None]


class Seen(ChatTemplate):
    """Keeps the records that it is given."""

    def texts(self, row: Any, columns: Any) -> dict[str, str]:
        self.rows: list[Any] = [*getattr(self, "rows", []), row]
        return super().texts(row, columns)
