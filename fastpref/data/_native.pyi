"""Typed face of the native core in csrc/. Columns and packing alone import it.

Every function raises TypeError or ValueError naming the argument, the rule and what it received, releases the GIL while
it works, and returns read-only arrays at 64-byte aligned addresses that own their memory. Arrays given to a function
must not be written to while it runs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Int32 = npt.NDArray[np.int32]
_Int64 = npt.NDArray[np.int64]
_Float32 = npt.NDArray[np.float32]
_RowShapes = Sequence[tuple[int, int, int]]

class Column:
    """Ragged rows of token ids: row i is values[offsets[i]:offsets[i + 1]]. Keeps `values`, copies `offsets`."""

    def __init__(self, values: _Int32, offsets: _Int64, *, vocab_size: int | None = None) -> None: ...
    def __len__(self) -> int: ...
    def lengths(self) -> _Int32: ...

# Packed pairs.

def pair_sizes(prompts: Column, first: Column, second: Column, *, layout: str) -> _Int32:
    """Decoder and encoder places that each pair takes, [records, 2]."""

def plan_pairs(
    tokens: _Int32,
    prompt_tokens: _Int32,
    *,
    shapes: _RowShapes,
    batch_pairs: int = 0,
    max_pairs_per_row: int,
    window: int,
    seed: int,
    epoch: int,
) -> tuple[_Int32, _Int64, _Int64, int]:
    """Rows and batches of one epoch of pairs that take `tokens` and `prompt_tokens` (or none); see csrc/pair_plan.h.

    Returns the pairs row after row [pairs], where each row ends among them [rows], for each batch its first row, its
    rows with pairs and its shape [batches, 3], and the hash of all that.
    """

def pack_step(
    prompt_tokens: _Int32,
    prompt_lengths: _Int32,
    completion_tokens: _Int32,
    completion_lengths: _Int32,
    preference: _Float32,
    ref_logps: _Float32,
    scores: _Float32,
    where: npt.NDArray[np.bool_],
    ids: _Int64,
    *,
    layout: str,
    decoder_start: int,
    row_tokens: int,
    prompt_row_tokens: int,
    max_pairs_per_row: int,
    row_counts: Sequence[int],
) -> tuple[tuple[Any, ...], _Int32]:
    """The fields of PackedPairs in order, and the slot of each pair, -1 for those left out."""

class PairLoader:
    """Packed batches in the order of the plan, assembled ahead by native threads. The arrays given must not change."""

    def __init__(
        self,
        prompts: Column,
        first: Column,
        second: Column,
        preference: _Float32,
        ref_logps: _Float32,
        ids: _Int64,
        *,
        layout: str,
        decoder_start: int,
        shapes: _RowShapes,
        batch_pairs: int = 0,
        max_pairs_per_row: int,
        window: int,
        seed: int,
        records: _Int32,
        host: int,
        hosts: int,
        threads: int,
        prefetch: int,
    ) -> None:
        """`ref_logps` is flat or empty; `records` are those to pack, all where it is empty."""

    def next(self) -> tuple[Any, ...]:
        """The fields of PackedPairs in order."""

    def position(self) -> tuple[int, int, int, int]:
        """Epoch, batches handed over in it, batches in it, hash of its plan."""

    def measure(self, epoch: int) -> tuple[int, int, int, int]:
        """Batches and rows of an epoch, decoder places in them, and how many of those hold a token."""

    def seek(self, epoch: int, batch: int, plan: int) -> None:
        """Go on behind `batch` batches of an epoch whose plan has that hash."""

    def close(self) -> None: ...
