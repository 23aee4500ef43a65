"""Files and directories that survive a crash, and the manifest by which damage to a directory is found.

Everything is written beside its place, forced to disk, and appears there by one rename. What was there before is taken
away afterwards. A killed process leaves at most a `.tmp-…` beside it, which the next write to the same place, or the
next owner of the directory, removes.

    with replacing("runs/ipo-md/policy") as new:     # a file or a directory, written at the path `new`
        ...
"""

import contextlib
import csv
import ctypes
import fcntl
import glob
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from fastpref.data import hashes
from fastpref.method.errors import ModelError, ModelWarning, WriteError

JSON = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY

MANIFEST = "fastpref_manifest.json"
"""Size and XXH3-128 of each file of a directory, beside them."""

EXCHANGE = 2
"""Linux: `renameat2` with this flag exchanges two paths at once."""


# Writing ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A path at which to write a file or a directory that then replaces `path`, all at once.

    An exception in the block leaves everything as it was.

    Args:
      path: where it appears; directories above it are made.

    Yields:
      The path to write to, in a directory of its own on the same file system.

    Raises:
      WriteError: the disk refused; the message names `path`.
    """
    path = Path(path).resolve()
    with writing(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        tidy(path.parent, path.name)
        new = stack.enter_context(_staging(path)) / path.name
        yield new
        force_to_disk(new)
        if path.is_dir() and new.is_dir():
            _exchange(new, path)
        else:
            new.replace(path)
        _sync(path.parent)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Name `path` in what the block raises when a disk is full, damaged or read-only.

    Raises:
      WriteError: an `OSError` of the block, in our words.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError) or error.errno is None:
            raise
        raise write_error(path, error) from error


def write_error(path: Path | str, error: OSError) -> WriteError:
    """The `WriteError` of an `OSError` that was met while writing to `path`."""
    refused = WriteError(
        f"{path} must be writable, but received {reason(error)}. Free space, mend the disk or its permissions, or "
        "choose another place; what was there is as it was."
    )
    refused.errno = error.errno
    return refused


def reason(error: OSError) -> str:
    """The reply of the disk, without a path: "No space left on device", say."""
    cause = error.__cause__
    return (
        reason(cause) if isinstance(error, WriteError) and isinstance(cause, OSError) else error.strerror or str(error)
    )


def write_file(path: Path | str, content: bytes) -> Path:
    """Write a file so that it is there whole or as it was before; see `replacing`."""
    with replacing(path) as new:
        new.write_bytes(content)
    return Path(path)


def write_json(path: Path | str, content: Any) -> Path:
    """Write indented, sorted JSON; see `replacing`."""
    return write_file(path, orjson.dumps(content, option=JSON))


def write_jsonl(path: Path | str, records: Iterable[Any]) -> Path:
    """Write a JSON value a line; see `replacing`."""
    with replacing(path) as new, new.open("wb") as file:
        for record in records:
            file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
    return Path(path)


def write_csv(path: Path | str, columns: Iterable[str], lines: Iterable[Iterable[Any]]) -> Path:
    """Write comma-separated values in UTF-8 below a line of their names; see `replacing`."""
    with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)
    return Path(path)


def remove(path: Path) -> None:
    """Take a directory away in one rename, so that a kill half-way leaves no half of it."""
    doomed = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:12]}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def tidy(directory: Path | str, name: str | None = None) -> None:
    """Remove what killed processes left in a directory, and bring back what one was replacing when it died.

    What another process is writing at this moment is left alone: it holds a lock on it.

    Args:
      directory: the directory; nothing happens where there is none.
      name: of the file or directory whose remains these are; None for all that lie in `directory`.
    """
    ours = "" if name is None else glob.escape(name)
    for former in Path(directory).glob(f".old-{ours or '*'}"):
        path = former.with_name(former.name.removeprefix(".old-"))
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # another process has just brought it back
                former.rename(path)
    for staging in Path(directory).glob(f".tmp-{ours}*"):
        # Held by its writer, who may have just finished with it; or on a file system without locks.
        with contextlib.suppress(OSError), _locked(staging):
            shutil.rmtree(staging, ignore_errors=True)


def force_to_disk(path: Path) -> None:
    """Force a file, or a directory with all that is in it, to disk."""
    for entry in [*path.rglob("*"), path] if path.is_dir() else [path]:
        _sync(entry)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A directory beside `path` to write in. Its lock tells other processes that its writer lives."""
    with contextlib.ExitStack() as stack:
        while True:
            staging = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:12]}")
            staging.mkdir()
            try:
                stack.enter_context(_locked(staging))
            except (BlockingIOError, FileNotFoundError):  # tidied away before it was locked
                continue
            except OSError:  # a file system without locks: nobody tidies there
                pass
            break
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _exchange(new: Path, path: Path) -> None:
    """Put a directory in the place of another. The other is left at `new`."""
    rename: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    here = -100  # AT_FDCWD: paths are what they are
    if rename is not None and rename(here, os.fsencode(new), here, os.fsencode(path), ctypes.c_uint(EXCHANGE)) == 0:
        return
    # A system that cannot exchange: a kill between these two is mended by `tidy`.
    former = path.with_name(f".old-{path.name}")
    path.rename(former)
    try:
        new.rename(path)
    except BaseException:
        former.rename(path)
        raise
    shutil.rmtree(former, ignore_errors=True)


# Damage -------------------------------------------------------------------------------------------------------------


EDITED = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
"""Files of a checkpoint that people change by hand: a warning says that one is not as it was written."""


def write_manifest(directory: Path) -> None:
    """Write down size and hash of each file of a directory, in a file beside them that no other library reads."""
    (directory / MANIFEST).write_bytes(orjson.dumps({"files": hashes.of_tree(directory)}, option=JSON))


def check_manifest(directory: Path, concerns: Callable[[str], bool] = lambda name: True) -> None:
    """Refuse a directory whose files are not those that were written to it. One without a manifest says nothing.

    Args:
      directory: what `write_manifest` was called on.
      concerns: says by its name whether a file is to be checked.

    Raises:
      ModelError: a file is missing or another, or the manifest cannot be read; the message names it and the remedy.

    Warns:
      ModelWarning: one of `EDITED` is another.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return
    try:
        written = {name: dict(entry) for name, entry in orjson.loads(manifest.read_bytes())["files"].items()}
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{manifest} must list files with size and hash, but received {type(error).__name__}: {error}. "
            "Copy the directory again, or delete this file to go on unchecked."
        ) from error
    for name in filter(concerns, written):
        path = directory / name
        received = hashes.of_file(path) if path.is_file() else "no file"
        if received != written[name] and path.is_file() and path.name in EDITED:
            warnings.warn(
                f"{path} is not as it was written, and is read as it is. If nobody changed it, copy it again; to read "
                f"it without a word, delete {manifest}.",
                ModelWarning,
                stacklevel=4,
            )
        elif received != written[name]:
            raise ModelError(
                f"{path} must be as it was written ({written[name]}), but received {received}. "
                f"Copy it again; or, if it was changed on purpose, delete {manifest}."
            )
