"""Tokens on disk: a source is read and encoded once, and mapped into memory from then on.

    tokens, report = tokenized(
        "pairs.jsonl", tokenizer, columns=("prompt", "chosen", "rejected"),
        max_prompt_tokens=512, max_completion_tokens=256, cache="cache",
    )

The file is named after all that decides what is in it: the content of the source, the tokenizer, the limits and the
policies. Reading and encoding go through memory in parts, so neither text nor tokens need to fit; and since the same
file gives the same tokens in the same order, a batcher over it resumes exactly.

    cache/<key>.arrow    Arrow IPC, one record batch: prompt, completion_0, ... (lists of int32), preference, id;
                         of prompts alone also text (see `PromptTexts`), which judges read
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.ipc
import tokenizers
from jaxtyping import Int64

from fastpref.data import files, hashes
from fastpref.data.chat import ChatTemplate
from fastpref.data.ragged import Ragged
from fastpref.data.readers import RecordStream
from fastpref.data.records import DropReport
from fastpref.data.rendered import Rendered, conversation_of
from fastpref.data.sources import Source, files_of, format_of, unchanged
from fastpref.data.tokenization import CHUNK, Encoder, TokenRecords, TokenStream
from fastpref.method.choices import OnBadRecord, Overlong, TruncationSide
from fastpref.method.errors import CacheWarning, DataError

FORMAT = 3


@runtime_checkable
class Fingerprinted(Protocol):
    """What a tokenizer needs besides, to name a cache after it."""

    @property
    def fingerprint(self) -> bytes:
        """Differs where the tokens may."""


def tokenized(
    source: Source,
    tokenizer: Encoder,
    *,
    max_prompt_tokens: int,
    max_completion_tokens: int = 1,
    cache: str | Path | None = None,
    columns: Sequence[str] = ("prompt",),
    vocab_size: int | None = None,
    overlong: Overlong = "drop",
    truncation_side: TruncationSide = "right",
    on_bad_record: OnBadRecord = "raise",
    template: ChatTemplate | None = None,
    chunk: int = CHUNK,
) -> tuple[TokenRecords, DropReport]:
    """Read and encode a source; with a cache, or map what an earlier call with the same content and arguments wrote.

    Several processes may do so at once: each writes a file of its own, and one rename makes it appear. Nobody else may
    change files in the directory in place; deleting them is safe. What is mapped is checked first, every byte of it.

    Args:
      source: as for `read_records`. Of files only the content counts, not the name; other sources are read as a whole
        before they are looked up.
      tokenizer: encodes; for a cache it has a `fingerprint`, as `fastpref.Tokenizer` does.
      max_prompt_tokens: limit of a prompt, as for `tokenize_completions`, as are the others there.
      max_completion_tokens: limit of a completion with its EOS.
      cache: the directory, made if need be; None to keep the tokens in memory alone.
      columns: what the records hold, as for `read_records`.
      vocab_size: ids are below it.
      overlong: what becomes of a record over a limit.
      truncation_side: of prompts that are cut.
      on_bad_record: what becomes of a bad one. A warning is given again where the tokens come from the cache.
      template: writes conversations as text.
      chunk: records that are in memory at a time.

    Returns:
      The tokens, read-only and mapped where there is a cache, and the account from the source to here.

    Raises:
      DataError: as `read_records` and `tokenize_completions` do; or the directory cannot be written.
      ValueError: a setting is unknown or out of range, or there is a cache and the tokenizer has no fingerprint.

    Warns:
      CacheWarning: a damaged file was found and is replaced.
    """
    fingerprint = b"" if cache is None else _fingerprint(tokenizer)
    paths = files_of(source)
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(unchanged(path))
        read = RecordStream(paths or source, columns=columns, on_bad_record=on_bad_record, template=template)
        records = read if paths or cache is None else list(read)
        encoded = TokenStream(
            records,
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            vocab_size=vocab_size,
            overlong=overlong,
            truncation_side=truncation_side,
            on_bad_record=on_bad_record,
            chunk=chunk,
        )
        if cache is None:
            tokens = TokenRecords.joined(list(encoded))
            return tokens, read.report.then(encoded.report)
        described = {
            "format": FORMAT,
            "content": [[format_of(path), hashes.of_file(path)["xxh3"]] for path in paths]
            if paths
            else _digest_records(records, read.report),
            "tokenizer": fingerprint.hex(),
            "tokenizers": tokenizers.__version__,
            "columns": list(columns),
            "limits": [max_prompt_tokens, max_completion_tokens, vocab_size or tokenizer.vocab_size],
            "policies": [overlong, truncation_side, on_bad_record],
            "template": None if template is None else template.identity,
        }
        key = hashes.of_bytes(orjson.dumps(described, option=orjson.OPT_SORT_KEYS))
        path = Path(cache) / f"{key}.arrow"
        found = _open(path, key)
        if found is not None:
            _warn_again(found[1], on_bad_record)
            return found
        completions = len([name for name in columns if name not in ("prompt", "preference")])
        try:
            _write(path, key, encoded, completions, read)
        except OSError as error:
            raise DataError(
                f"{cache} must be a directory to write to, but received: {error}. Free space, or choose another."
            ) from error
    written = _open(path, key)
    if written is None:
        raise DataError(
            f"{path} must be there once it is written, but received nothing. Let nobody else change {cache}."
        )
    return written


def _fingerprint(tokenizer: Encoder) -> bytes:
    if not isinstance(tokenizer, Fingerprinted):
        raise ValueError(
            f"a tokenizer must have a fingerprint to be cached by, but received {type(tokenizer).__name__}. "
            "Add the property, or use tokenize_completions."
        )
    return tokenizer.fingerprint


def _digest_records(records: Any, report: DropReport) -> str:
    parts = (orjson.dumps([record, *map(_marks, (record.prompt, *record.completions))]) for record in records)
    return hashes.of_buffers([orjson.dumps(asdict(report), option=orjson.OPT_SORT_KEYS), *parts]).hex()


def _marks(text: str) -> list[Any]:
    return [text.literals, text.end, conversation_of(text)] if isinstance(text, Rendered) else []


def _warn_again(report: DropReport, on_bad_record: OnBadRecord) -> None:
    if on_bad_record == "warn" and report.dropped:
        warnings.warn(f"from the cache: {report}", UserWarning, stacklevel=3)


# Writing ------------------------------------------------------------------------------------------------------------


def _write(path: Path, key: str, encoded: TokenStream, completions: int, read: RecordStream) -> None:
    """Spool the tokens to raw files first: only then is their number known, and one record batch can hold them."""
    files.tidy(path.parent)
    with files.replacing(path) as new, ExitStack() as stack:
        names = ["prompt", *(f"completion_{k}" for k in range(completions)), *([] if completions else ["text"])]
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=new.parent)))
        lengths, rest = _spool(spool, names, encoded)
        arrays: dict[str, pa.Array] = {}
        for name in names:
            arrays[name] = _list_array(lengths[name], stack.enter_context(_mapped(spool / name)))
        arrays |= {name: pa.array(values) for name, values in rest.items()}
        report = read.report.then(encoded.report)
        described = {"key": key, "report": asdict(report), "digests": _digests(arrays)}
        batch = pa.record_batch(arrays).replace_schema_metadata({"fastpref": orjson.dumps(described)})
        with pyarrow.ipc.new_file(str(new), batch.schema) as writer:
            writer.write_batch(batch)
        # A mapped file that shrinks kills the process, so nobody should write to it in place.
        new.chmod(0o444)


def _spool(
    folder: Path, names: Sequence[str], encoded: TokenStream
) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """Values of each column to a file of its name; the lengths of its rows, and preferences and ids."""
    lengths: dict[str, list[np.ndarray]] = {name: [np.zeros(1, np.int64)] for name in names}
    preference, ids = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        for part in encoded:
            text = [] if part.text is None else [part.text]
            for name, rows in zip(names, (part.prompts, *part.completions, *text), strict=True):
                files[name].write(rows.values.data)
                lengths[name].append(np.diff(rows.offsets))
            preference.append(part.preference)
            ids.append(part.ids)
    return lengths, {"preference": np.concatenate(preference), "id": np.concatenate(ids)}


def _mapped(path: Path) -> Any:
    # An empty file cannot be mapped.
    return pa.memory_map(str(path)) if path.stat().st_size else pa.BufferReader(b"")


def _list_array(lengths: list[np.ndarray], values: Any) -> pa.Array:
    offsets: Int64[np.ndarray, " N_plus_1"] = np.cumsum(np.concatenate(lengths))
    tokens = pa.Array.from_buffers(pa.int32(), int(offsets[-1]), [None, values.read_buffer()])
    return pa.LargeListArray.from_arrays(pa.array(offsets), tokens)


# Reading ------------------------------------------------------------------------------------------------------------


class _Damage(Exception):
    """A file is not what was written."""


def _open(path: Path, key: str) -> tuple[TokenRecords, DropReport] | None:
    """What a file holds, or None where there is none, or none that is whole."""
    if not path.exists():
        return None
    try:
        return _mapped_records(path, key)
    except (_Damage, pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"the cache {path.name} is damaged and made anew: {error or type(error).__name__}",
            CacheWarning,
            stacklevel=3,
        )
        return None


def _mapped_records(path: Path, key: str) -> tuple[TokenRecords, DropReport]:
    table = pyarrow.ipc.open_file(pa.memory_map(str(path))).read_all()
    # Arrow does not check offsets when it opens a file.
    table.validate(full=True)
    described: Mapping[str, Any] = orjson.loads((table.schema.metadata or {})[b"fastpref"])
    if described["key"] != key:
        raise _Damage("it belongs to other data")
    arrays = {name: _only_chunk(table.column(name)) for name in table.column_names}
    if _digests(arrays) != described["digests"]:
        raise _Damage("its content does not match its checksum")
    ragged = {name: _ragged(array) for name, array in arrays.items() if pa.types.is_large_list(array.type)}
    text = ragged.pop("text", None)
    prompts, *completions = ragged.values()
    preference, ids = (arrays[name].to_numpy(zero_copy_only=True) for name in ("preference", "id"))
    return TokenRecords(prompts, tuple(completions), preference, ids, text), _report(described["report"])


def _report(described: Mapping[str, Any]) -> DropReport:
    # JSON has no tuples.
    return DropReport(**{**described, "unused": tuple(described["unused"])})


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks != 1 or column.null_count:
        raise _Damage(f"a column has {column.num_chunks} chunks and {column.null_count} nulls instead of 1 and 0")
    return column.chunk(0)


def _ragged(array: pa.Array) -> Ragged:
    return Ragged(array.values.to_numpy(zero_copy_only=True), array.offsets.to_numpy(zero_copy_only=True))


def _digests(arrays: Mapping[str, pa.Array]) -> dict[str, str]:
    """XXH3-128 of each column."""
    digests = {}
    for name, array in arrays.items():
        parts = (array.offsets, array.values) if pa.types.is_large_list(array.type) else (array,)
        values = [part.to_numpy(zero_copy_only=True).data for part in parts]
        digests[name] = hashes.of_buffers([str(array.type).encode(), *values]).hex()
    return digests
