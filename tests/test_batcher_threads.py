"""Threads that come and go, memory that is used again at the right moment, processes that end."""

import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from slow_pairs import SlowBatcher, random_pairs, same

from fastpref.data import PairBatcher, Ragged, _native

PAIRS = random_pairs(40, (9, 9))
COLUMNS = [
    Ragged.from_rows(rows)
    for rows in zip(*((pair.prompt, pair.completions[0], pair.completions[1]) for pair in PAIRS), strict=True)
]


def batcher(**options: Any) -> PairBatcher:
    return PairBatcher(*COLUMNS, **({"rows": 4, "row_tokens": 40} | options))


def loader(**options: Any) -> _native.PairLoader:
    arguments: dict[str, Any] = {
        "layout": "shared", "decoder_start": 0, "shapes": [(4, 40, 0)], "max_pairs_per_row": 8, "window": 16, "seed": 0,
        "records": np.zeros(0, np.int32), "host": 0, "hosts": 1, "threads": 1, "prefetch": 0,
    }  # fmt: skip
    return _native.PairLoader(
        *(_native.Column(column.values, column.offsets) for column in COLUMNS),
        np.ones(40, np.float32),
        np.zeros(0, np.float32),
        np.arange(40),
        **(arguments | options),
    )


def threads() -> set[str]:
    """Names of the process's threads. Those of other libraries may end at any time, so tests ask which are new."""
    return {entry.name for entry in Path("/proc/self/task").iterdir()}


def files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def raw(array: np.ndarray) -> bytes:
    """The memory that an array had, whoever has it now."""
    return ctypes.string_at(array.ctypes.data, array.nbytes)


def test_memory_is_used_again_only_when_the_last_reference_dies() -> None:
    native = loader()
    batch = native.next()
    address, size = batch[0].ctypes.data, batch[0].nbytes
    copies = [array.copy() for array in batch]
    last = batch[5][1:3]
    del batch
    gc.collect()
    # One view of one array keeps them all, whatever is asked for meanwhile.
    others = [native.next() for _ in range(20)]
    assert address not in {other[0].ctypes.data for other in others}
    np.testing.assert_array_equal(last, copies[5][1:3])
    assert ctypes.string_at(address, size) == copies[0].tobytes()
    del last
    gc.collect()
    assert native.next()[0].ctypes.data == address


def test_memory_that_jax_took_is_not_used_again() -> None:
    native = loader(prefetch=2)
    on_device = []
    for _ in range(12):
        batch = native.next()
        arrays = [jax.device_put(array) for array in batch[:6]]
        assert all(a.unsafe_buffer_pointer() == b.ctypes.data for a, b in zip(arrays, batch[:6], strict=True))
        on_device.append((arrays, [array.copy() for array in batch[:6]]))
        del batch
    for arrays, copies in on_device:
        for array, copy in zip(arrays, copies, strict=True):
            np.testing.assert_array_equal(np.asarray(array), copy)


def test_batches_outlive_their_batcher() -> None:
    native = batcher(prefetch=3)
    batch = next(native)
    copies = [array.copy() for array in batch]
    native.close()
    del native
    gc.collect()
    for array, copy in zip(batch, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_thousand_batchers_leave_nothing() -> None:
    """Closed, used up to somewhere, or never used: neither threads nor files nor memory stay."""

    def one(turn: int) -> None:
        native = batcher(threads=1 + turn % 3, prefetch=turn % 5)
        for _ in range(turn % 4):
            next(native)
        if turn % 2:
            native.close()

    for turn in range(200):
        one(turn)
    gc.collect()
    threads_before, files_before, resident_before = threads(), files(), resident()
    for turn in range(1000):
        one(turn)
    gc.collect()
    assert threads() <= threads_before
    assert files() == files_before
    # One that stayed would hold its plan and batches: 40 KiB or more.
    assert resident() - resident_before < 1000 * 8192


def test_close_ends_the_threads_and_may_be_called_again() -> None:
    gc.collect()
    before = threads()
    native = batcher(threads=3, prefetch=8)
    assert len(threads() - before) == 4
    next(native)
    native.close()
    native.close()
    assert threads() <= before
    assert batcher(prefetch=0).epoch == 0
    assert threads() <= before
    for use in (lambda: next(native), lambda: native.restore(native.state()), lambda: native.padding(3)):
        with pytest.raises(ValueError, match="must be open to hand out batches, but received a closed one"):
            use()
    # Only what is assembled at once may be fewer than the threads asked for.
    with batcher(threads=8, prefetch=2):
        assert len(threads() - before) == 3
    assert threads() <= before


def test_close_wakes_whoever_waits() -> None:
    """A plan that takes long is given up, and the thread that waits for its batches is told."""
    rows = Ragged(np.ones(3_000_000, np.int32), np.arange(3_000_001))
    native = PairBatcher(rows, rows, rows, rows=1, row_tokens=8, window=65536)
    told: list[str] = []

    def wait() -> None:
        try:
            while True:
                next(native)
        except ValueError as error:
            told.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    native.close()
    waiting.join(60)
    assert not waiting.is_alive()
    assert told
    assert "must be open to hand out batches" in told[0]


def test_threads_of_python_may_share_a_batcher() -> None:
    """Each batch is handed out once, whoever asks."""
    for prefetch in (0, 4):
        with batcher(prefetch=prefetch, threads=2, window=8) as native:
            wanted = sum(native.batches_in(epoch) for epoch in range(8))
            seen: list[Any] = []

            def work(native: PairBatcher = native, wanted: int = wanted, seen: list[Any] = seen) -> None:
                for _ in range(wanted // 4):
                    seen.append(next(native).ids.copy())

            workers = [threading.Thread(target=work) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        with batcher(prefetch=0, window=8) as plain:
            expected = [next(plain).ids for _ in range(wanted // 4 * 4)]
        assert sorted(ids.tolist() for ids in seen) == sorted(ids.tolist() for ids in expected)


def test_an_epoch_of_one_batch_is_prefetched_across_epochs() -> None:
    pairs = PAIRS[:3]
    expected = SlowBatcher(pairs, ((4, 40, 0),))
    columns = [[pair.prompt for pair in pairs], *([pair.completions[k] for pair in pairs] for k in (0, 1))]
    with PairBatcher(
        *columns,
        [pair.preference for pair in pairs],
        ids=[pair.id for pair in pairs],
        ref_logps=np.asarray([pair.ref_logps for pair in pairs]),
        rows=4,
        row_tokens=40,
        threads=3,
        prefetch=16,
    ) as native:
        for epoch in range(40):
            assert native.epoch == epoch
            assert same(next(native), expected.epoch(epoch)[0])


def test_a_child_of_fork_is_told_and_ends() -> None:
    native = batcher(threads=2, prefetch=4)
    held = next(native)
    code = """
        if os.fork() == 0:
            try:
                next(native)
            except RuntimeError as error:
                told = "must be used in the process that made it, but received a child of fork" in str(error)
            del held
            native.close()
            del native
            gc.collect()
            sys.exit(0 if told else 1)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        print(next(native).tokens.shape)
    """
    assert run(code) == "(4, 40)"
    assert held.tokens.shape == (4, 40)


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("raise KeyError('boom')", 1), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGINT)", -2)],
)
def test_the_process_ends_at_once(ending: str, code: int) -> None:
    """While threads assemble and plan ahead, and nobody closes anything."""
    began = run(f"print(time.time(), flush=True)\n{ending}", code)
    # The limit is not a measurement: a thread that was waited for would never end.
    assert time.time() - float(began.splitlines()[0]) < 10


def test_interrupts_reach_whoever_waits() -> None:
    code = """
        rows = Ragged(np.ones(3_000_000, np.int32), np.arange(3_000_001))
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(7))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        slow = PairBatcher(rows, rows, rows, rows=1, row_tokens=3, window=65536, max_pairs_per_row=1)
        while True:
            next(slow)
    """
    run(code, 7)


def run(body: str, code: int = 0) -> str:
    head = """
        import gc, os, signal, sys, time
        import numpy as np
        from fastpref.data import PairBatcher, Ragged
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs behind
        rows = [[1, 2, 3]] * 500
        native = PairBatcher(rows, rows, rows, rows=4, row_tokens=40, threads=3, prefetch=16)
        held = next(native)
    """
    program = textwrap.dedent(head) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout.strip()
