"""What batchers are given, checked: columns of token ids and one number for each record."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from fastpref.data import _native, hashes
from fastpref.data.ragged import Ragged
from fastpref.method.errors import DataError

Rows = Ragged | Sequence[Sequence[int]] | Sequence[np.ndarray]
"""Token ids of N records."""
Numbers = Sequence[int] | Sequence[float] | np.ndarray
"""One number for each of N records."""


def ragged(rows: Rows) -> Ragged:
    """Rows in two arrays, copied only where they are not."""
    return rows if isinstance(rows, Ragged) else Ragged.from_rows(rows)


def column(name: str, rows: Ragged, records: int, vocab_size: int | None) -> _native.Column:
    """Rows with their ids and number checked, for the native core."""
    if len(rows) != records:
        raise DataError(
            f"{name} must have one entry for each of the {records} prompts, but received {len(rows)}. Align them."
        )
    try:
        return _native.Column(rows.values, rows.offsets, vocab_size=vocab_size)
    except ValueError as error:
        raise DataError(f"{name}: {error}. Repair the data or use the tokenizer that belongs to it.") from None


def check_lengths(name: str, lengths: Int32[np.ndarray, " N"], limit_name: str, limit: int) -> None:
    """Raise DataError for a length outside 1 to `limit`."""
    wrong = (lengths < 1) | (lengths > limit)
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(
            f"{name} must have 1 to {limit} tokens ({limit_name}), but received {lengths[at]} at record {at}. "
            "Drop or truncate such records as tokenize_prompts does, or raise the limit."
        )


def per_record(name: str, numbers: Numbers, dtype: type[np.generic], records: int) -> np.ndarray:
    """One number for each record, contiguous; raise DataError where that is not what it is."""
    array = np.asarray(numbers)
    if array.shape != (records,) or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise DataError(
            f"{name} must have one number ({np.dtype(dtype)}) for each of the {records} prompts, "
            f"but received {array.dtype} of shape {array.shape}. Align them."
        )
    return np.ascontiguousarray(array, dtype)


def preferences(preference: Numbers | None, records: int) -> np.ndarray:
    """Probabilities, 1 where none are given; raise DataError for one outside [0, 1]."""
    array = per_record("preference", np.ones(records) if preference is None else preference, np.float32, records)
    wrong = ~((array >= 0) & (array <= 1))
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(
            f"preference must be in [0, 1], but received {array[at]} at record {at}. Repair or drop such records."
        )
    return array


def fingerprint(tables: Mapping[str, Ragged], *numbers: np.ndarray) -> bytes:
    """XXH3-128 of all that a batch may hold: rows of token ids, and contiguous arrays."""
    rows = (part for row in tables.values() for part in (np.diff(row.offsets), _values(row)))
    return hashes.of_buffers(array.data for array in (*rows, *numbers))


def _values(rows: Ragged) -> np.ndarray:
    return rows.values[rows.offsets[0] : rows.offsets[-1]]
