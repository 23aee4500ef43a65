"""Typed face of the native core in csrc/. Only fastpref.data imports it.

Every function raises TypeError or ValueError naming the argument, the rule and what it received, releases the GIL while
it works, and returns read-only arrays at 64-byte aligned addresses that own their memory. Arrays given to a function
must not be written to while it runs.
"""

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

_Int32 = npt.NDArray[np.int32]
_Int64 = npt.NDArray[np.int64]
_Float32 = npt.NDArray[np.float32]
_Shapes = Sequence[tuple[int, int]]

class Column:
    """Ragged rows of token ids: row i is values[offsets[i]:offsets[i + 1]]. Keeps `values`, copies `offsets`."""

    def __init__(self, values: _Int32, offsets: _Int64, *, vocab_size: int | None = None) -> None: ...
    def __len__(self) -> int: ...
    def lengths(self) -> _Int32: ...

def choose_shapes(
    prompt_lengths: _Int32,
    completion_lengths: _Int32,
    *,
    completions: int,
    max_shapes: int,
    multiple: int,
    max_prompt: int,
    max_completion: int,
) -> list[tuple[int, int]]:
    """At most `max_shapes` (at most 32) growing shapes with the fewest padded tokens; see csrc/plan.h.

    `completion_lengths` is the longest completion of each record, empty when `completions` is 0.
    """

def assign_shapes(prompt_lengths: _Int32, completion_lengths: _Int32, shapes: _Shapes) -> _Int32:
    """Index of the first shape that holds each record."""

def plan_epoch(shape_of: _Int32, *, num_shapes: int, batch_size: int, seed: int, epoch: int) -> tuple[_Int64, _Int32]:
    """Records [batches, batch_size] and shape [batches] of the batches of one epoch; see csrc/plan.h."""

def gather(columns: Sequence[Column], rows: _Int64, width: int) -> tuple[_Int32, _Int32]:
    """Tokens [rows, columns, width], zeros past the end, and lengths [rows, columns]."""

@overload
def take(values: _Float32, rows: _Int64) -> _Float32: ...
@overload
def take(values: _Int64, rows: _Int64) -> _Int64: ...
def encode_state(
    batches: int,
    *,
    fingerprint: bytes,
    records: int,
    seed: int,
    batch_size: int,
    completions: int,
    shapes: _Shapes,
) -> bytes:
    """At most 336 bytes: how many batches were handed out, and of what."""

def decode_state(
    state: bytes,
    *,
    fingerprint: bytes,
    records: int,
    seed: int,
    batch_size: int,
    completions: int,
    shapes: _Shapes,
) -> int:
    """The number of batches handed out; ValueError names what differs or that the bytes are damaged."""
