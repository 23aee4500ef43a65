"""What is written is there whole or as it was before, whenever the process dies, and damage to it is found."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from fastpref.data import files
from fastpref.method.errors import ModelError, WriteError


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def write_directory(path: Path, text: str) -> None:
    with files.replacing(path) as new:
        (new / "inner").mkdir(parents=True)
        (new / "inner" / "a").write_text(text)
        (new / "b").write_text(text)


@pytest.fixture(params=["exchange", "two renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    return str(request.param)


def test_a_file_and_a_directory_are_written_replaced_and_alone(tmp_path: Path, system: str) -> None:
    for text in ("one", "two"):
        write_directory(tmp_path / "new" / "d", text)
        files.write_file(tmp_path / "new" / "f", text.encode())
        assert tree(tmp_path) == dict.fromkeys(["new/d/inner/a", "new/d/b", "new/f"], text.encode()), system


def test_an_exception_leaves_what_was_there(tmp_path: Path, system: str) -> None:
    write_directory(tmp_path / "d", "one")

    def fail(error: BaseException) -> None:
        with files.replacing(tmp_path / "d") as new:
            new.mkdir()
            raise error

    for error in (KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert tree(tmp_path) == {"d/inner/a": b"one", "d/b": b"one"}, system
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


WRITER = """
import os, sys
from pathlib import Path
from fastpref.data import files
limit, path, system = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
calls = 0
def watch(event, args):
    # Every call that changes the file system is one at which the process may die.
    global calls
    if event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "open", "ctypes.call_function", "shutil.rmtree"):
        calls += 1
        if calls == limit:
            os._exit(9)
if system != "exchange":
    import ctypes
    ctypes.CDLL = lambda *_, **__: object()
sys.addaudithook(watch)
with files.replacing(path) as new:
    new.mkdir()
    (new / "a").write_text("new")
    (new / "b").write_text("new")
os._exit(0)
"""


def test_a_write_killed_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, system: str) -> None:
    outcomes, point = set(), 0
    while True:
        point += 1
        folder = tmp_path / str(point)
        write_directory(folder / "model", "old")
        before = tree(folder)
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(point), str(folder / "model"), system], capture_output=True, check=False
        )
        assert done.returncode in (0, 9), done.stderr
        if system == "exchange":
            assert (folder / "model").is_dir(), point  # at every moment, and before anybody tidies
        files.tidy(folder)
        after = tree(folder)
        assert after in (before, {"model/a": b"new", "model/b": b"new"}), point
        assert [path.name for path in folder.iterdir()] == ["model"], point
        outcomes.add(after == before)
        if done.returncode == 0:
            break
    assert outcomes == {True, False}
    assert point > 8


def test_tidying_leaves_alone_what_is_being_written_and_what_has_another_name(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "model") as new:
        new.write_text("x")
        (tmp_path / ".tmp-policy-1").mkdir()
        files.tidy(tmp_path, "model")
        assert new.exists()
        assert (tmp_path / ".tmp-policy-1").exists()
        files.tidy(tmp_path)
        assert not (tmp_path / ".tmp-policy-1").exists()
        assert new.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    files.tidy(tmp_path / "absent")


@pytest.mark.parametrize("where", ["write", "fsync", "rename", "mkdir"])
def test_a_refusing_disk_is_one_error_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    files.write_file(tmp_path / "f", b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, name = {"fsync": (os, "fsync"), "rename": (Path, "replace"), "mkdir": (Path, "mkdir")}.get(
        where, (Path, "write_bytes")
    )
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(WriteError) as refused:
        files.write_file(tmp_path / "f", b"new")
    assert str(refused.value) == (
        f"{tmp_path / 'f'} must be writable, but received No space left on device. Free space, mend the disk or its "
        "permissions, or choose another place; what was there is as it was."
    )
    assert refused.value.errno == errno.ENOSPC
    assert tree(tmp_path) == {"f": b"old"}


def test_a_file_is_written_through_a_link_and_a_directory_too(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    write_directory(tmp_path / "far" / "d", "one")
    (tmp_path / "d").symlink_to(tmp_path / "far" / "d")
    write_directory(tmp_path / "d", "two")
    assert (tmp_path / "d").is_symlink()
    assert (tmp_path / "far" / "d" / "b").read_text() == "two"


def test_tables_and_lines_come_back(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": "x,\ny", "b": np.float32(0.5)}, {"a": "é", "c": 3}]
    table = files.write_csv(tmp_path / "t.csv", ["a", "b"], [["x,\ny", 0.5], ["é", None]])
    assert table.read_text() == 'a,b\n"x,\ny",0.5\né,\n'
    lines = files.write_jsonl(tmp_path / "l.jsonl", rows).read_bytes().splitlines()
    assert [orjson.loads(line) for line in lines] == [{"a": "x,\ny", "b": 0.5}, {"a": "é", "c": 3}]
    assert files.write_json(tmp_path / "o.json", {"b": 1, "a": None}).read_bytes() == b'{\n  "a": null,\n  "b": 1\n}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "l.jsonl", "o.json"}


def test_every_flip_of_a_bit_and_every_cut_is_found_and_named(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", "some text")
    files.write_manifest(tmp_path / "d")
    files.check_manifest(tmp_path / "d")
    rng = random.Random(0)
    for name in ("b", "inner/a"):
        path = tmp_path / "d" / name
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(ModelError, match=rf"d/{name} must be as it was written .* but received .*xxh3"):
                files.check_manifest(tmp_path / "d")
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(ModelError, match=rf"if it was changed on purpose, delete .*{files.MANIFEST}"):
            files.check_manifest(tmp_path / "d")
        files.check_manifest(tmp_path / "d", lambda file, name=name: file != name)
        path.unlink()
        with pytest.raises(ModelError, match="but received no file"):
            files.check_manifest(tmp_path / "d")
        path.write_bytes(whole)
    for content in (b"", b"[]", b'{"files": 3}', b'{"files": {"b": 3}}'):
        (tmp_path / "d" / files.MANIFEST).write_bytes(content)
        with pytest.raises(ModelError, match=r"must list files with size and hash, .* delete this file to go on"):
            files.check_manifest(tmp_path / "d")
    (tmp_path / "d" / files.MANIFEST).unlink()
    files.check_manifest(tmp_path / "d")
