"""Typed face of the native core in csrc/. Only fastpref.data, fastpref.tournament and fastpref.pair_log import it.

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
_Int8 = npt.NDArray[np.int8]
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

# The online side: tournament and pair log -----------------------------------------------------------------------------

class Tournament:
    """Knockout tournaments of `k` completions of each prompt, all in step; see csrc/tournament.h.

    `classes` [prompts * k] says which completions of a prompt are identical.
    """

    def __init__(self, prompt_ids: _Int64, *, k: int, step: int, seed: int, classes: _Int32 | None = None) -> None: ...
    def questions(self) -> tuple[_Int64, _Int32, _Int32]:
        """Prompt index, first and second completion of each pair that must be compared now; none at the end."""

    def answer(self, probabilities: _Float32) -> None:
        """p(first beats second) of each question. After a ValueError the same questions stand."""

    def results(self) -> tuple[_Int32, _Int32, _Float32, _Int8, _Int32]:
        """Best, worst, p(best beats worst), outcome (an index of `fastpref.tournament.OUTCOMES`), pairs asked about."""

class PairIndex:
    """Answers of a pair log by what was asked; see csrc/pair_log.h."""

    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def scan(self, data: bytes, *, judge: bytes, seed: int, first_step: int) -> tuple[int, int]:
        """Add what a file holds of this judge and seed; its number of records, and the end of what is whole."""

    def add(
        self,
        step: int,
        prompts: _Int64,
        first_values: _Int32,
        first_offsets: _Int64,
        second_values: _Int32,
        second_offsets: _Int64,
        preference: _Float32,
    ) -> None: ...
    def find(
        self,
        step: int,
        prompts: _Int64,
        first_values: _Int32,
        first_offsets: _Int64,
        second_values: _Int32,
        second_offsets: _Int64,
    ) -> _Float32:
        """The answer to each pair, NaN where there is none."""

    def forget_before(self, step: int) -> None: ...

def pair_header(judge: bytes, seed: int) -> tuple[bytes, int]:
    """The beginning of a file, and what the checksum of its first record goes on from."""

def encode_pairs(
    chain: int,
    step: int,
    prompts: _Int64,
    first_values: _Int32,
    first_offsets: _Int64,
    second_values: _Int32,
    second_offsets: _Int64,
    preference: _Float32,
) -> tuple[bytes, int]:
    """Records to append, and what the next one goes on from."""

def decode_pairs(data: bytes) -> tuple[bytes, int, int, _Int64, _Int64, _Float32, _Int64, _Int32]:
    """Judge, seed, end of what is whole; step, prompt, preference of N records; 2N lengths; their tokens in a row."""
