"""XXH3-128 of files, directories and arrays: the one hash by which content is named and damage is found."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
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


def of_json(value: Any) -> str:
    """XXH3-128 of a value as JSON, its arrays and dataclasses included, in hexadecimal."""
    return of_bytes(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def of_bytes(content: bytes) -> str:
    """XXH3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)
