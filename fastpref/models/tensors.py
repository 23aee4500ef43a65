"""Tensors of a checkpoint's safetensors files: where each lies, by which name, and the array that it is read into.

A tensor is read in parts into its final array, so that loading takes the memory of the result and little more.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orjson
from jax import Array
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from fastpref.method.errors import ModelError, ModelWarning

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

DTYPES: dict[str, Any] = {
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
}
"""Types of tensors that are read, in the words of safetensors."""

PART = 1 << 22
"""Bytes of a tensor, as they are stored, that are read at once."""

WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module|base_model\.model)\.)+|(?<=\.)_orig_mod\.")
"""Names of what a training wrapped its model in: torch.compile, DistributedDataParallel, PEFT."""

UNMERGED = re.compile(r"\.lora_|\.base_layer\.|\.modules_to_save\.|prompt_encoder\.")
"""Names of tensors of an adapter that is not merged into its base."""


class Tensor(NamedTuple):
    """A tensor of a safetensors file."""

    file: Path
    name: str
    """In the file."""
    dtype: str
    """In the words of safetensors."""
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which its numbers begin."""

    @property
    def row_bytes(self) -> int:
        """Bytes of an entry of its first axis."""
        return int(np.prod(self.shape[1:], dtype=np.int64) * np.dtype(DTYPES[self.dtype]).itemsize)

    def rows(self, first: int, last: int) -> np.ndarray:
        """The numbers of entries `first` to `last` of its first axis, without mapping the file into memory."""
        size = self.row_bytes
        raw = np.fromfile(self.file, np.uint8, (last - first) * size, offset=self.start + first * size)
        return np.asarray(raw.view(DTYPES[self.dtype])).reshape(last - first, *self.shape[1:])

    def parts(self) -> Iterator[tuple[int, int]]:
        """Ranges of its first axis of at most `PART` bytes each, or of one entry."""
        return parts(0, self.shape[0], self.row_bytes)

    def same(self, other: "Tensor") -> bool:
        """Whether two tensors hold the same bytes."""
        return (self.shape, self.dtype) == (other.shape, other.dtype) and all(
            np.array_equal(self.rows(*part).view(np.uint8), other.rows(*part).view(np.uint8)) for part in self.parts()
        )


def parts(first: int, last: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges between two rows of at most `PART` bytes each, or of one row."""
    step = max(1, PART // max(1, row_bytes))
    for start in range(first, last, step):
        yield start, min(start + step, last)


class Part(NamedTuple):
    """A tensor, or a part of it, as an array is read from it."""

    tensor: Tensor
    turned: bool = False
    """Whether the array is the transpose of what is stored."""
    rows: slice = slice(None)
    """Of the first axis of what is stored."""
    columns: slice = slice(None)
    """Of the second."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        cuts = (self.rows, self.columns, *(slice(None),) * len(self.tensor.shape))
        shape = tuple(len(range(*cut.indices(size))) for cut, size in zip(cuts, self.tensor.shape, strict=False))
        return shape[::-1] if self.turned else shape

    def pieces(self, dtype: DTypeLike, *, finite: bool) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """The array in pieces of a few megabytes, each with the place of its first number."""
        tensor = self.tensor
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"a tensor must be of type {', '.join(DTYPES)}, but received {tensor.name} of {tensor.file.parent} "
                f"with type {tensor.dtype}. Save the weights in one of these."
            )
        whole = tensor if tensor.shape else tensor._replace(shape=(1,))
        first, last, _ = self.rows.indices(whole.shape[0])
        for start, end in parts(first, last, whole.row_bytes):
            piece = whole.rows(start, end)
            piece = piece if len(whole.shape) < 2 else piece[:, self.columns]
            with np.errstate(over="ignore", invalid="ignore"):  # said below
                # NumPy casts from eight bits to single precision alone.
                piece = piece.astype(np.float32 if piece.dtype.itemsize == 1 else dtype).astype(dtype, copy=False)
            if finite and not np.isfinite(piece).all():
                raise ModelError(
                    f"weights must be finite, but received {tensor.name} of {tensor.file.parent} with NaN or infinity "
                    f"in {jnp.dtype(dtype).name}. Use an earlier checkpoint, or load(..., finite=False)."
                )
            if not tensor.shape:
                yield (), piece[0]
                continue
            begin = (start - first, *(0,) * (piece.ndim - 1))
            yield (begin[::-1], np.ascontiguousarray(piece.T)) if self.turned else (begin, np.ascontiguousarray(piece))


def read_tensor(
    tensor: Tensor,
    dtype: DTypeLike,
    *,
    turned: bool = False,
    rows: slice = slice(None),
    columns: slice = slice(None),
    finite: bool = True,
) -> Array:
    """Read a tensor, or a part of it, into an array on the default device: `read_parts` of one."""
    return read_parts([Part(tensor, turned, rows, columns)], dtype, finite=finite)


def read_parts(parts: Sequence[Part], dtype: DTypeLike, *, stacked: bool = False, finite: bool = True) -> Array:
    """Read an array on the default device from tensors, a few megabytes at a time.

    Args:
      parts: what is read, of one shape.
      dtype: of the array.
      stacked: the parts lie one after the other on a new first axis; else there is one.
      finite: refuse NaN and infinity, also where they come from a `dtype` that is too narrow.

    Raises:
      ModelError: a tensor's type is not in `DTYPES`, or a number is not finite.
    """
    shape = (len(parts), *parts[0].shape) if stacked else parts[0].shape
    pieces = (
        ((number, *at), piece[None]) if stacked else (at, piece)
        for number, part in enumerate(parts)
        for at, piece in part.pieces(dtype, finite=finite)
    )
    if np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize <= PART:
        small = np.zeros(shape, dtype)
        for at, piece in pieces:
            small[tuple(slice(start, start + size) for start, size in zip(at, piece.shape, strict=True))] = piece
        return jnp.asarray(small)
    array = jnp.zeros(shape, dtype)
    for at, piece in pieces:
        array = _put(array, piece, at)
        # What is on its way would else take the memory of the whole.
        array.block_until_ready()
    return array


@partial(jax.jit, donate_argnames="array")
def _put(array: Array, piece: Array, at: tuple[Array, ...]) -> Array:
    return jax.lax.dynamic_update_slice(array, piece, at)


# Files --------------------------------------------------------------------------------------------------------------


def open_tensors(source: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name without what a training wrapped its model in.

    Raises:
      FileNotFoundError: there are no weights, or a shard is missing.
      ModelError: a file is damaged, a shard lies elsewhere, or two shards hold one tensor.
    """
    tensors: dict[str, Tensor] = {}
    for shard in weight_files(source):
        header = read_header(source / shard)
        if twice := sorted(header.keys() & tensors.keys()):
            raise ModelError(
                f"a tensor must lie in one shard, but received {twice[0]} of {source} in {shard} and in "
                f"{tensors[twice[0]].file.name}. Delete the shards that are not of this checkpoint and its index, or "
                "copy it again."
            )
        tensors |= header
    if adapters := sorted(filter(UNMERGED.search, tensors)):
        raise ModelError(
            f"weights must be those of a model alone, but received {source} with {len(adapters)} tensors of an "
            f"adapter in it, first {adapters[0]}. Merge it with peft: model.merge_and_unload().save_pretrained(...)."
        )
    return unwrapped(tensors, source)


def unwrapped(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors by their names without `WRAPPERS`; a warning says what was taken off."""
    names = {name: WRAPPERS.sub("", name) for name in tensors}
    changed = [name for name in names if names[name] != name]
    if len(set(names.values())) < len(names):
        raise ModelError(
            f"names of tensors must differ by more than a wrapper's prefix, but received {changed[0]} beside "
            f"{names[changed[0]]} in {source}. Save the model that was wrapped, and it alone."
        )
    if changed:
        warnings.warn(
            f"{source}: {len(changed)} names of tensors are read without a wrapper's prefix, such as {changed[0]} as "
            f"{names[changed[0]]}",
            ModelWarning,
            stacklevel=2,
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def weight_files(source: Path) -> Sequence[str]:
    """Names of the files that hold the weights of a checkpoint: `model.safetensors`, else what the index names.

    A warning says that both are there and disagree: `transformers` reads the first, too.
    """
    index = (source / INDEX).is_file()
    if (source / WEIGHTS).is_file():
        if index and indexed_files(source) != [WEIGHTS]:
            warnings.warn(
                f"{source}: {WEIGHTS} is read, as transformers does; {INDEX} beside it and its shards are not",
                ModelWarning,
                stacklevel=2,
            )
        return [WEIGHTS]
    if not index:
        raise _without_weights(source)
    shards = indexed_files(source)
    for shard in shards:
        if Path(shard).name != shard:
            raise ModelError(
                f"{INDEX} must name files of its own directory, but received {shard!r} in {source}. Copy it again."
            )
        if not (source / shard).is_file():
            raise FileNotFoundError(
                f"{INDEX} must name files that are there, but received {shard} in {source}. Copy it again."
            )
    return shards


def _without_weights(source: Path) -> FileNotFoundError:
    """The refusal of a checkpoint whose weights are in another format, or in shards without their index."""
    names = sorted(path.name for path in source.iterdir())
    if orphans := [name for name in names if name.endswith(".safetensors")]:
        found, remedy = "", f"Copy {INDEX} too: {orphans[0]} is there without it."
    elif pickles := [name for name in names if name.startswith("pytorch_model") or name.endswith((".pt", ".pth"))]:
        found = f", and {pickles[0]}, a pickle, which may hold code and is not read"
        remedy = (
            f"Write {WEIGHTS} beside it with transformers (AutoModelForCausalLM, or AutoModelForSeq2SeqLM for a T5): "
            f'AutoModelForCausalLM.from_pretrained("{source}").save_pretrained("{source}").'
        )
    else:
        others = [name for name in names if name.endswith((".bin", ".h5", ".msgpack", ".gguf"))]
        found = f", and {others[0]}, which is not read" if others else ""
        remedy = "Save its weights as safetensors."
    return FileNotFoundError(
        f"a checkpoint must hold {WEIGHTS} or {INDEX}, but received {source} with neither{found}. {remedy}"
    )


def indexed_files(source: Path) -> list[str]:
    """The files that the index of a checkpoint names."""
    try:
        return sorted({str(shard) for shard in orjson.loads((source / INDEX).read_bytes())["weight_map"].values()})
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{INDEX} must map tensors to files, but received one in {source} that does not. Copy it again."
        ) from error


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name."""
    try:
        # Checks lengths, types and that tensors lie next to each other.
        with safe_open(path, framework="np"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = orjson.loads(file.read(size))
    except SafetensorError as error:
        raise ModelError(
            f"{path} must be a whole safetensors file, but received one that is not ({error}). Copy it again."
        ) from error
    return {
        name: Tensor(path, name, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


# Embedding and head -------------------------------------------------------------------------------------------------

ENCODER_DECODER = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Further names of the embedding of an encoder-decoder."""


def settle_embedding(
    tensors: dict[str, Tensor], embedding: str, *, tied: bool, encoder_decoder: bool, head: str = "lm_head.weight"
) -> bool:
    """Leave the embedding under one name, and a head of its own only where it differs; return whether there is none.

    As `transformers` decides: tied tensors of which one is stored are that one; tied tensors that differ are two.

    Args:
      tensors: of a checkpoint, by name; copies of the embedding are taken out.
      embedding: the name that the model has for it.
      tied: what `tie_word_embeddings` says.
      encoder_decoder: `transformers` always ties the head of these if only one of the two is stored.
      head: the name of the head.

    Raises:
      ModelError: encoder and decoder read with embeddings that differ.
    """
    copies = ENCODER_DECODER if encoder_decoder else ()
    heads = (head,) if tied or encoder_decoder else ()
    if embedding not in tensors and (stored := [name for name in (*copies, *heads) if name in tensors]):
        tensors[embedding] = tensors.pop(stored[0])
    if embedding not in tensors:
        return tied and head not in tensors
    for name in (*copies, *((head,) if tied else ())):
        if name in tensors and tensors[name].same(tensors[embedding]):
            del tensors[name]
    if apart := [name for name in copies if name in tensors]:
        raise ModelError(
            f"encoder and decoder must read with one embedding, but received {apart[0]} that differs from "
            f"{tensors[embedding].name} in {tensors[embedding].file.parent}. Choose another checkpoint."
        )
    return (tied or encoder_decoder) and head not in tensors
