"""Token ids of N records in two arrays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Int32, Int64

from fastpref.method.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """N rows of token ids in two arrays: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Int32[np.ndarray, " M"]
    offsets: Int64[np.ndarray, " N_plus_1"]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int] | np.ndarray]) -> "Ragged":
        """Copy rows of token ids.

        Raises:
          DataError: something that is not a whole number of at most 32 bits.
        """
        rows = list(rows)
        for index, row in enumerate(rows):
            if not hasattr(row, "__len__"):
                raise DataError(
                    f"a row must be a list of token ids, but received {row!r} at record {index}. Put it in a list."
                )
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        # An empty array is one of floats unless it is told otherwise.
        full = [row for row in rows if len(row)]
        if full and all(isinstance(row, np.ndarray) and row.ndim == 1 for row in full):
            values = np.concatenate(full)
        else:
            values = np.asarray(list(chain.from_iterable(rows)))
        if values.size and values.dtype.kind not in "iu":
            raise DataError(
                f"token ids must be whole numbers, but received {values.dtype}. Tokenize text first, as "
                f"tokenize_prompts does."
            )
        if values.size and (values.min() < -(2**31) or values.max() >= 2**31):
            raise DataError(
                f"token ids must fit into 32 bits, but received {values.min()} to {values.max()}. Repair the tokens."
            )
        return cls(values.astype(np.int32), offsets)

    @classmethod
    def joined(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """The rows of all parts, one after the other."""
        lengths = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
        values = [part.values[part.offsets[0] : part.offsets[-1]] for part in parts]
        return cls(np.concatenate([np.zeros(0, np.int32), *values]), np.cumsum(np.concatenate(lengths)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int32[np.ndarray, " L"]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row must be in [{-len(self)}, {len(self)}), but received {index}")
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]]
