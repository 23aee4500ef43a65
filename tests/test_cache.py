"""The cache of tokens: the same as without one, made once, and never believed when it is damaged."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from small import tokenizer

from fastpref.data import DropReport, PairBatcher, TokenRecords, files, read_records, tokenize_completions
from fastpref.data.cache import tokenized
from fastpref.data.chat import ChatTemplate
from fastpref.data.tokenization import TokenStream
from fastpref.method.errors import CacheWarning, DataError

PAIR = ("prompt", "chosen", "rejected")
LIMITS: dict[str, Any] = {"max_prompt_tokens": 9, "max_completion_tokens": 4}
ROWS = [
    {"prompt": f"w{i % 20} w3 " * (1 + i % 4), "chosen": f"w{i % 7} 1", "rejected": "2 2", "preference": i % 3 / 2}
    for i in range(500)
]
ROWS[7] |= {"rejected": ""}
ROWS[8] |= {"chosen": "w1 " * 9}


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def plainly(source: Any, **options: Any) -> tuple[TokenRecords, DropReport]:
    records, read = read_records(source, columns=PAIR, on_bad_record="skip")
    tokens, kept = tokenize_completions(records, tokenizer(), **LIMITS, on_bad_record="skip", **options)
    return tokens, read.then(kept)


def cached(source: Any, folder: Path, **options: Any) -> tuple[TokenRecords, DropReport]:
    return tokenized(source, tokenizer(), cache=folder, **{"columns": PAIR, "on_bad_record": "skip"} | LIMITS | options)


def arrays(tokens: TokenRecords) -> list[np.ndarray]:
    ragged = (tokens.prompts, *tokens.completions)
    return [tokens.ids, tokens.preference, *(array for rows in ragged for array in (rows.values, rows.offsets))]


def assert_equal(one: tuple[TokenRecords, DropReport], other: tuple[TokenRecords, DropReport]) -> None:
    assert one[1] == other[1]
    for a, b in zip(arrays(one[0]), arrays(other[0]), strict=True):
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where something is encoded that a cache should hold."""

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(TokenStream, "_part", refuse)


@pytest.mark.parametrize("chunk", [1, 7, 8192])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "shards", "table", "list"])
def test_tokens_are_those_without_a_cache_and_made_once(
    kind: str, chunk: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sources: dict[str, Any] = {"table": pa.Table.from_pylist(ROWS), "list": ROWS}
    if kind == "shards":
        sources[kind] = [write(tmp_path / "a.jsonl", ROWS[:200]), write(tmp_path / "b.parquet", ROWS[200:])]
    elif kind not in sources:
        sources[kind] = write(tmp_path / f"pairs.{kind}")
    source = sources[kind]
    expected = plainly(source)
    assert expected[1] == DropReport(500, 498, {"empty completion": 1, "completion too long": 1})
    assert_equal(cached(source, tmp_path / "cache", chunk=chunk), expected)
    (path,) = (tmp_path / "cache").iterdir()
    request.getfixturevalue("never")
    again = cached(source, tmp_path / "cache")
    assert_equal(again, expected)
    assert not any(array.flags.writeable for array in arrays(again[0]))
    table = pyarrow.ipc.open_file(str(path)).read_all()
    assert table.column_names == ["prompt", "completion_0", "completion_1", "preference", "id"]
    assert table.column("prompt")[0].as_py() == expected[0].prompts[0].tolist()


def test_the_name_does_not_count_but_everything_else_does(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    source = write(tmp_path / "pairs.jsonl")

    def files() -> int:
        return len(list(folder.iterdir()))

    cached(source, folder)
    for name in ("other.jsonl", "pairs.jsonl"):
        cached(source.rename(tmp_path / name), folder)
        source = tmp_path / name
        assert files() == 1
    template = ChatTemplate("{{ messages }}")
    changes: list[dict[str, Any]] = [
        {"max_prompt_tokens": 8}, {"max_completion_tokens": 3}, {"overlong": "truncate"}, {"on_bad_record": "warn"},
        {"vocab_size": 34}, {"template": template}, {"columns": (*PAIR, "preference")}, {"columns": ("prompt",)},
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cached(source, folder, **change)
        assert files() == number, change
    write(source, ROWS[:-1])
    cached(source, folder)
    assert files() == len(changes) + 2


def test_a_warning_is_given_again(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl")
    with (
        pytest.warns(UserWarning, match=r"^pairs.jsonl: 500 records read, 499 delivered"),
        pytest.warns(UserWarning, match=r"^tokenization: 499 records read, 498 delivered"),
    ):
        cached(source, tmp_path / "cache", on_bad_record="warn")
    with pytest.warns(UserWarning, match=r"^from the cache: 500 records read, 498 delivered, 2 dropped"):
        cached(source, tmp_path / "cache", on_bad_record="warn")


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match=r"pairs.jsonl, line 8: a completion must hold more than white space"):
        cached(source, tmp_path / "cache", on_bad_record="raise")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(DataError, match=r"must be the path of a file, but received '.*absent.jsonl'"):
        cached(tmp_path / "absent.jsonl", tmp_path / "cache")


def test_prompts_alone_and_nothing_at_all_are_cached(tmp_path: Path) -> None:
    for rows in (["w1", "w2 w3"], []):
        for _ in range(2):
            tokens, report = tokenized(rows, tokenizer(), cache=tmp_path, max_prompt_tokens=9)
            assert (len(tokens), len(tokens.prompts), tokens.completions) == (len(rows), len(rows), ())
            assert report == DropReport(len(rows), len(rows))
    empty, _ = cached([], tmp_path / "pairs")
    assert_equal(cached([], tmp_path / "pairs"), (empty, DropReport(0, 0)))
    assert len(empty.completions) == 2


def replace(path: Path, content: bytes) -> None:
    """Not in place: whoever has the file mapped keeps the old one."""
    (path.parent.parent / "new").write_bytes(content)
    (path.parent.parent / "new").replace(path)


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", ROWS[:60])
    expected = cached(source, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    data = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [data[:size] for size in (0, 1, 8, len(data) // 2, len(data) - 1)]
    damaged += [b"", b"ARROW1\0\0", b"x" * len(data), bytes(len(data))]
    damaged += [flip(data, int(at)) for at in random.integers(0, len(data), 60)]
    warned = 0
    for content in damaged:
        replace(path, content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_equal(cached(source, tmp_path / "cache"), expected)
        assert {warning.category for warning in caught} <= {CacheWarning}
        if caught:
            assert path.name in str(caught[0].message)
            assert "is damaged and made anew: " in str(caught[0].message)
            assert path.read_bytes() == data
        warned += len(caught)
    # A flipped bit in the padding between buffers, or in the schema at the head, changes nothing.
    assert warned > len(damaged) * 0.75


def test_a_cache_of_other_data_is_not_taken(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", ROWS[:60])
    expected = cached(source, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    cached(ROWS[:20], tmp_path / "other")
    (other,) = (tmp_path / "other").iterdir()
    other.replace(path)
    with pytest.warns(CacheWarning, match="is damaged and made anew: it belongs to other data"):
        assert_equal(cached(source, tmp_path / "cache"), expected)
    table = pyarrow.ipc.open_file(str(path)).read_all()
    for broken, message in (
        (table.replace_schema_metadata(None), "fastpref"),
        (pa.concat_tables([table, table]), "a column has 2 chunks"),
        (table.set_column(3, "preference", pa.nulls(len(table), pa.float32())), "a column has 1 chunks and 58 nulls"),
        (table.drop_columns(["completion_1"]), "does not match its checksum"),
    ):
        sink = pa.BufferOutputStream()
        with pyarrow.ipc.new_file(sink, broken.schema) as writer:
            writer.write_table(broken)
        replace(path, sink.getvalue().to_pybytes())
        with pytest.warns(CacheWarning, match=message):
            assert_equal(cached(source, tmp_path / "cache"), expected)


def test_a_file_replaced_while_it_is_mapped_does_no_harm(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl")
    tokens, report = cached(source, tmp_path / "cache")
    before = [array.tobytes() for array in arrays(tokens)]
    (path,) = (tmp_path / "cache").iterdir()
    # Writing in place, which would end a process that has it mapped, takes a deliberate chmod.
    assert not path.stat().st_mode & 0o222
    replace(path, b"short")
    with pytest.warns(CacheWarning):
        assert_equal(cached(source, tmp_path / "cache"), (tokens, report))
    path.unlink()
    assert [array.tobytes() for array in arrays(tokens)] == before


@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_a_source_that_changes_while_it_is_read_is_refused(change: str, tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl")

    class Meddling:
        vocab_size, fingerprint = tokenizer().vocab_size, b"meddling"
        encode_completions = staticmethod(tokenizer().encode_completions)

        def encode_prompts(self, texts: list[str]) -> list[list[int]]:
            if change == "append":
                with source.open("ab") as file:
                    file.write(b"\n")
            elif change == "replace":
                write(tmp_path / "new.jsonl").replace(source)
            else:
                source.unlink(missing_ok=True)
            return tokenizer().encode_prompts(texts)

    with pytest.raises(
        DataError, match=r"pairs.jsonl must not change while it is read, but received one that did. Read it aga"
    ):
        tokenized(source, Meddling(), cache=tmp_path / "cache", columns=PAIR, on_bad_record="skip", chunk=100, **LIMITS)


def test_threads_and_processes_write_at_once(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl")
    expected = plainly(source)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: cached(source, tmp_path / "cache"), range(16)):
            assert_equal(found, expected)
    (path,) = (tmp_path / "cache").iterdir()
    path.unlink()
    command = [sys.executable, "-c", OTHER, str(source), str(tmp_path / "cache"), str(Path(__file__).parent)]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [other.communicate()[0] for other in others] == ["498\n", "498\n"]
    assert list((tmp_path / "cache").iterdir()) == [path]


# The top of the package imports JAX, which is not needed here.
OTHER = """
import sys, types
top = types.ModuleType("fastpref")
top.__path__ = [sys.argv[3] + "/../fastpref"]
sys.modules["fastpref"] = top
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from pathlib import Path
from fastpref.data.cache import tokenized
from fastpref.data.tokenizer import Tokenizer
words = ["<pad>", "</s>", "<unk>", "1", "2", *(f"w{number}" for number in range(28))]
backend = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
tokens, _ = tokenized(
    Path(sys.argv[1]), Tokenizer(backend, eos_id=1, pad_id=0), cache=sys.argv[2], max_prompt_tokens=9,
    max_completion_tokens=4, columns=("prompt", "chosen", "rejected"), on_bad_record="skip",
)
print(len(tokens))
"""


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    source = write(tmp_path / "pairs.jsonl")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DataError,
        match=r"cache must be a directory to write to, but received: .*No space left.*Free "
        r"space",
    ):
        cached(source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file must be a directory to write to"):
        cached(source, tmp_path / "file")


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    dead, theirs = tmp_path / ".tmp-dead.arrow-1", tmp_path / ".tmp-theirs.arrow-2"
    for folder in (dead, theirs):
        folder.mkdir()
        (folder / "prompt").write_bytes(b"x")
    with files._locked(theirs):
        cached(ROWS[:10], tmp_path)
        assert (dead.exists(), theirs.exists()) == (False, True)
    cached(ROWS[:11], tmp_path)
    assert not theirs.exists()


def test_a_tokenizer_without_a_fingerprint_is_refused(tmp_path: Path) -> None:
    class Nameless:
        vocab_size = 9
        encode_prompts = encode_completions = staticmethod(lambda texts: [[1] for _ in texts])

    with pytest.raises(ValueError, match="a tokenizer must have a fingerprint to be cached by, but received Nameless"):
        tokenized(["w1"], Nameless(), cache=tmp_path, max_prompt_tokens=9)


def test_a_batcher_over_a_cache_resumes_exactly(tmp_path: Path) -> None:
    """In parts of 50 or of all, mapped or not: the data is the same, and so is the state."""
    source = write(tmp_path / "pairs.jsonl")

    def batcher(tokens: TokenRecords) -> PairBatcher:
        return PairBatcher(
            tokens.prompts, *tokens.completions, tokens.preference, ids=tokens.ids, rows=4, row_tokens=64
        )

    one = batcher(cached(source, tmp_path / "a", chunk=50)[0])
    other = batcher(plainly(source)[0])
    for _ in range(20):
        next(one)
    other.restore(one.state())
    for _ in range(20):
        a, b = next(one), next(other)
        assert a.ids.tolist() == b.ids.tolist()
        assert a.tokens.tobytes() == b.tokens.tobytes()
