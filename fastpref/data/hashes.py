"""XXH3-128 of files, directories and arrays: the one hash by which content is named and damage is found."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash


def of_tree(directory: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and XXH3-128 of each file in a tree, by its name relative to it."""
    return {str(path.relative_to(directory)): of_file(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def of_file(path: Path) -> dict[str, Any]:
    """Size in bytes and XXH3-128 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        return {"bytes": file.tell(), "xxh3": digest}


def of_buffers(buffers: Iterable[Any]) -> bytes:
    """XXH3-128 of contiguous buffers, one after the other: arrays, bytes."""
    digest = xxhash.xxh3_128()
    for buffer in buffers:
        digest.update(buffer)
    return bytes(digest.digest())


def of_bytes(content: bytes) -> str:
    """XXH3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def sealed(content: dict[str, Any], *, indent: int | None = None) -> bytes:
    """A JSON object below a line with its XXH3-128, in hexadecimal: what `unsealed` reads."""
    text = json.dumps(content, indent=indent, separators=(",", ":")).encode()
    return of_bytes(text).encode() + b"\n" + text


def unsealed(blob: bytes) -> dict[str, Any]:
    """The object that `sealed` was given.

    Raises:
      ValueError: a byte of it has changed.
    """
    digest, _, text = blob.partition(b"\n")
    if of_bytes(text).encode() != digest:
        raise ValueError("its first line is not the xxh3 of the rest")
    content: dict[str, Any] = json.loads(text)
    return content
