"""Columns of token ids in the native core: memory that they keep, and what they refuse, each by its name."""

import gc
import itertools
import sys
import threading
from typing import Any

import numpy as np
import pytest

from fastpref.data import _native

native: Any = _native


def int32(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def column(rows: list[list[int]], **options: Any) -> _native.Column:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return _native.Column(np.asarray(list(itertools.chain(*rows)), np.int32), offsets, **options)


def test_columns_may_start_and_end_within_their_values() -> None:
    part = _native.Column(int32(-1, 5, 6, 7, -1), np.asarray([1, 3, 4]))
    assert len(part) == 2
    assert part.lengths().tolist() == [2, 1]


def test_lengths_are_aligned_read_only_and_own_their_memory() -> None:
    part = column([list(range(7))] * 1000)
    array = part.lengths()
    assert array.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.setflags(write=True)
    del part
    gc.collect()
    reused = [np.full(array.size, -7, array.dtype) for _ in range(20)]
    assert len(reused) == 20
    assert set(array.tolist()) == {7}


def test_a_column_keeps_its_offsets_to_itself() -> None:
    offsets = np.asarray([0, 1000])
    part = _native.Column(np.arange(1000, dtype=np.int32), offsets)
    offsets[:] = [-(2**62), 2**62]
    assert part.lengths().tolist() == [1000]


def test_the_interpreter_runs_on_while_the_core_works() -> None:
    """With a switch interval of minutes a thread gets the interpreter only when another gives it up."""
    tokens = np.ones(1_000_000, np.int32)

    def interleaved() -> bool:
        events: list[str] = []
        started = threading.Event()

        def work() -> None:
            events.append("before")
            started.set()
            _native.plan_pairs(tokens, int32(), shapes=[(4, 8, 0)], max_pairs_per_row=8, window=64, seed=0, epoch=0)
            events.append("after")

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        events.append("meanwhile")
        thread.join()
        return events == ["before", "meanwhile", "after"]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        # A busy machine may not schedule the main thread in time, but a core that kept the lock could never let it in.
        assert any(interleaved() for _ in range(20))
    finally:
        sys.setswitchinterval(interval)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: native.Column([1, 2], np.asarray([0, 2])), TypeError,
     r"values must be a contiguous array of one dimension and type int32, but received list"),
    (lambda: native.Column(np.zeros(2), np.asarray([0, 2])), TypeError, r"type int32, but received float64"),
    (lambda: native.Column(np.zeros((2, 2), np.int32), np.asarray([0, 2])), ValueError, r"but received 2 dimensions"),
    (lambda: native.Column(np.zeros(9, np.int32)[::2], np.asarray([0, 2])), ValueError, r"not contiguous"),
    (lambda: native.Column(int32(1), int32(0, 1)), TypeError, r"offsets must be .* type int64, but received int32"),
    (lambda: native.Column(int32(1), np.zeros(0, np.int64)), ValueError, r"offsets must hold at least one entry"),
    (lambda: native.Column(int32(1), np.asarray([-1, 1])), ValueError,
     r"offsets must start at 0 or later, but received -1"),
    (lambda: native.Column(int32(1, 2), np.asarray([0, 2, 1])), ValueError,
     r"offsets must not decrease, but received 2 then 1 at record 1"),
    (lambda: native.Column(int32(1, 2), np.asarray([0, 3])), ValueError,
     r"offsets must end within the 2 values, but received 3"),
    (lambda: native.Column(int32(1, 2), np.asarray([0, 2**62])), ValueError,
     r"a row must be shorter than 2\^31 tokens, but received \d+ at record 0"),
    (lambda: column([[1], [2, 9]], vocab_size=9), ValueError,
     r"token ids must be in \[0, 9\), but received 9 at record 1"),
    (lambda: column([[1], [-1]]), ValueError,
     r"token ids must be in \[0, 2147483648\), but received -1 at record 1"),
    (lambda: column([[1]], vocab_size=0), ValueError,
     r"vocab_size must be an integer in \[1, 2147483648\], but received 0 \(int\)"),
    (lambda: column([[1]], vocab_size=True), TypeError, r"vocab_size must be an integer in .*, but received True"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
