"""The native core against a slow, obvious Python version, byte for byte, and against damaged and wrong arguments."""

import gc
import itertools
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import _batcher

NO_LENGTHS = np.zeros(0, np.int32)
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def draws(seed: int, epoch: int, purpose: int) -> Iterator[int]:
    state = 0
    for part in (seed, epoch, purpose):
        state = mix((state + part + GOLDEN) & MASK)
    while True:
        state = (state + GOLDEN) & MASK
        yield mix(state)


def below(random: Iterator[int], bound: int) -> int:
    """Uniform in [0, bound): draws that fall into the incomplete last part of the range are drawn again."""
    while True:
        product = next(random) * bound
        if product % 2**64 >= 2**64 % bound:
            return product >> 64


@lru_cache(maxsize=64)
def permutation(size: int, seed: int, epoch: int, purpose: int) -> tuple[int, ...]:
    random = draws(seed, epoch, purpose)
    order = list(range(size))
    for i in range(size):
        j = i + below(random, size - i)
        order[i], order[j] = order[j], order[i]
    return tuple(order)


def plan(shape_of: list[int], batch_size: int, seed: int, epoch: int) -> tuple[list[list[int]], list[int]]:
    records = len(shape_of)
    first = -(-epoch * records // batch_size) * batch_size
    last = -(-(epoch + 1) * records // batch_size) * batch_size
    stream = [permutation(records, seed, place // records, 0)[place % records] for place in range(first, last)]
    stream.sort(key=lambda row: shape_of[row])
    batches = [stream[at : at + batch_size] for at in range(0, len(stream), batch_size)]
    batches = [batches[at] for at in permutation(len(batches), seed, epoch, 1)]
    return batches, [max(shape_of[row] for row in batch) for batch in batches]


def column(rows: list[list[int]], **options: Any) -> _batcher.Column:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return _batcher.Column(np.asarray(list(itertools.chain(*rows)), np.int32), offsets, **options)


shape_lists = st.lists(st.integers(0, 3), min_size=1, max_size=40)
seeds = st.integers(0, MASK)
SEEDED = settings(derandomize=True, deadline=None)


@SEEDED
@given(shape_of=shape_lists, batch_size=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 5) | st.integers(0, 2**50))
def test_plan_equals_the_python_version(shape_of: list[int], batch_size: int, seed: int, epoch: int) -> None:
    rows, shapes = _batcher.plan_epoch(
        np.asarray(shape_of, np.int32), num_shapes=4, batch_size=batch_size, seed=seed, epoch=epoch
    )
    expected_rows, expected_shapes = plan(shape_of, batch_size, seed, epoch)
    assert rows.tolist() == expected_rows
    assert shapes.tolist() == expected_shapes
    assert rows.shape == (len(expected_rows), batch_size)


@SEEDED
@given(shape_of=shape_lists, batch_size=st.integers(1, 50), seed=seeds, epochs=st.integers(1, 6))
def test_plans_conserve_records(shape_of: list[int], batch_size: int, seed: int, epochs: int) -> None:
    plans = [
        _batcher.plan_epoch(np.asarray(shape_of, np.int32), num_shapes=4, batch_size=batch_size, seed=seed, epoch=epoch)
        for epoch in range(epochs)
    ]
    handed_out = np.concatenate([rows.ravel() for rows, _ in plans])
    counts = np.bincount(handed_out, minlength=len(shape_of))
    ahead = len(handed_out) - epochs * len(shape_of)
    assert 0 <= ahead < batch_size
    assert counts.min() >= epochs
    if ahead <= len(shape_of):
        assert counts.max() <= epochs + 1


def test_plan_is_pinned() -> None:
    """A change of these numbers is a change of everyone's order: it needs a new plan version."""
    shape_of = np.asarray([0, 1, 2, 0, 1, 2, 0], np.int32)
    rows, shapes = _batcher.plan_epoch(shape_of, num_shapes=3, batch_size=2, seed=42, epoch=3)
    assert (rows.tolist(), shapes.tolist()) == plan(shape_of.tolist(), 2, 42, 3)
    assert rows.tolist() == [[6, 3], [5, 2], [0, 1]]
    assert shapes.tolist() == [0, 2, 1]


def test_plan_order_is_uniform() -> None:
    """Every one of the 24 orders of four records comes up as often as chance allows (χ², 23 degrees, p > 0.001)."""
    orders = [
        tuple(_batcher.plan_epoch(np.zeros(4, np.int32), num_shapes=1, batch_size=4, seed=7, epoch=epoch)[0][0])
        for epoch in range(4800)
    ]
    counts = np.unique(np.asarray(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


def padded(lengths: list[tuple[int, int]], shapes: list[tuple[int, int]], completions: int) -> int:
    """Tokens when each record goes to the first shape that holds it."""
    return sum(
        next(s + completions * t for s, t in shapes if prompt <= s and completion <= t)
        for prompt, completion in lengths
    )


@SEEDED
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12)), min_size=1, max_size=12),
    completions=st.integers(0, 2),
    max_shapes=st.integers(1, 3),
    multiple=st.sampled_from([4, 8]),
)
def test_chosen_shapes_have_the_fewest_padded_tokens(
    lengths: list[tuple[int, int]], completions: int, max_shapes: int, multiple: int
) -> None:
    lengths = [(prompt, completion if completions else 0) for prompt, completion in lengths]
    prompts, responses = np.asarray(lengths, np.int32).T.copy()
    chosen = _batcher.choose_shapes(
        prompts,
        responses if completions else NO_LENGTHS,
        completions=completions,
        max_shapes=max_shapes,
        multiple=multiple,
        max_prompt=20,
        max_completion=12,
    )
    sides = [
        sorted({min(-(-length // multiple) * multiple, limit) for length in side})
        for side, limit in ((prompts.tolist(), 20), (responses.tolist(), 12))
    ]
    grid = list(itertools.product(*sides))
    best: dict[int, int] = {}
    for count in range(1, max_shapes + 1):
        for chain in itertools.combinations(grid, count):
            if chain[-1] == grid[-1] and all(a[1] <= b[1] for a, b in itertools.pairwise(chain)):
                cost = padded(lengths, list(chain), completions)
                best[cost] = min(best.get(cost, count), count)
    assert chosen[-1] == grid[-1]
    assert padded(lengths, chosen, completions) == min(best)
    assert len(chosen) == best[min(best)]


def test_many_lengths_are_tried_at_their_quantiles() -> None:
    lengths = np.arange(1, 101, dtype=np.int32)
    quantiles = {int(lengths[-(-100 * i // 32) - 1]) for i in range(1, 33)}
    expected = min((padded([(n, 0) for n in range(1, 101)], [(q, 0), (100, 0)], 0), q) for q in quantiles if q < 100)[1]
    chosen = _batcher.choose_shapes(
        lengths, NO_LENGTHS, completions=0, max_shapes=2, multiple=1, max_prompt=100, max_completion=0
    )
    assert chosen == [(expected, 0), (100, 0)]


@SEEDED
@given(lengths=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 9)), min_size=1, max_size=20))
def test_assigned_shape_is_the_first_that_holds_the_record(lengths: list[tuple[int, int]]) -> None:
    shapes = [(4, 2), (8, 2), (8, 6), (16, 9)]
    prompts, responses = np.asarray(lengths, np.int32).T.copy()
    assigned = _batcher.assign_shapes(prompts, responses, shapes)
    assert assigned.tolist() == [
        next(i for i, (s, t) in enumerate(shapes) if prompt <= s and response <= t) for prompt, response in lengths
    ]


@SEEDED
@given(
    columns=st.integers(1, 5).flatmap(
        lambda records: st.lists(
            st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), min_size=records, max_size=records),
            min_size=1,
            max_size=3,
        )
    ),
    data=st.data(),
)
def test_gather_equals_the_python_version(columns: list[list[list[int]]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(columns[0]) - 1), max_size=12))
    tokens, lengths = _batcher.gather([column(part) for part in columns], np.asarray(rows, np.int64), 9)
    expected = [[part[row] + [0] * (9 - len(part[row])) for part in columns] for row in rows]
    assert tokens.shape == (len(rows), len(columns), 9)
    assert tokens.tolist() == expected
    assert lengths.tolist() == [[len(part[row]) for part in columns] for row in rows]
    assert tokens.dtype == lengths.dtype == np.int32


def test_columns_may_start_and_end_within_their_values() -> None:
    part = _batcher.Column(np.asarray([-1, 5, 6, 7, -1], np.int32), np.asarray([1, 3, 4]))
    assert len(part) == 2
    assert part.lengths().tolist() == [2, 1]
    assert _batcher.gather([part], np.asarray([1, 0]), 2)[0].tolist() == [[[7, 0]], [[5, 6]]]


@pytest.mark.parametrize("count", [1, 3, 16, 1000])
def test_arrays_are_aligned_read_only_and_own_their_memory(count: int) -> None:
    part = column([list(range(7))] * count)
    rows = np.arange(count)
    arrays: list[np.ndarray] = [
        *_batcher.gather([part, part], rows, 7),
        part.lengths(),
        _batcher.take(np.linspace(0, 1, count, dtype=np.float32), rows),
        *_batcher.plan_epoch(np.zeros(count, np.int32), num_shapes=1, batch_size=1, seed=0, epoch=0),
    ]
    for array in arrays:
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)
    before = [array.copy() for array in arrays]
    del part
    gc.collect()
    # Memory freed too early would be handed to these.
    reused = [np.full(array.size, -7, array.dtype) for array in arrays for _ in range(20)]
    assert len(reused) == 20 * len(arrays)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_column_keeps_its_values_alive_and_its_offsets_to_itself() -> None:
    values, offsets = np.arange(1000, dtype=np.int32), np.asarray([0, 1000])
    part = _batcher.Column(values, offsets)
    offsets[:] = [-(2**62), 2**62]
    del values
    gc.collect()
    reused = [np.full(1000, -7, np.int32) for _ in range(50)]
    assert _batcher.gather([part], np.asarray([0]), 1000)[0].ravel().tolist() == list(range(1000))
    assert len(reused) == 50


def test_the_interpreter_runs_on_while_the_core_works() -> None:
    """With a switch interval of minutes a thread gets the interpreter only when another gives it up."""
    shape_of = np.zeros(1_000_000, np.int32)

    def interleaved() -> bool:
        events: list[str] = []
        started = threading.Event()

        def work() -> None:
            events.append("before")
            started.set()
            _batcher.plan_epoch(shape_of, num_shapes=1, batch_size=1, seed=0, epoch=0)
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


def test_threads_share_columns() -> None:
    part = column([[row] * (row % 50) for row in range(2000)])
    rows = np.random.default_rng(0).permutation(2000)
    expected = _batcher.gather([part], rows, 50)[0]
    with ThreadPoolExecutor(4) as pool:
        for tokens, _ in pool.map(lambda _: _batcher.gather([part], rows, 50), range(16)):
            np.testing.assert_array_equal(tokens, expected)


IDENTITY: dict[str, Any] = {
    "fingerprint": bytes(range(16)),
    "records": 1000,
    "seed": MASK,
    "batch_size": 32,
    "completions": 2,
    "shapes": [(64, 32), (128, 32), (128, 2**31 - 1)],
}


def test_state_layout_is_pinned() -> None:
    """A change of these bytes is a change of format: it needs a new number."""
    content = struct.pack(
        "<8sII16sQQQIIiiiiiiQ", b"FPBATCH\0", 1, 1, bytes(range(16)), 1000, MASK, 32, 2, 3,
        64, 32, 128, 32, 128, 2**31 - 1, 12345,
    )  # fmt: skip
    checksum = 0xCBF29CE484222325
    for byte in content:
        checksum = ((checksum ^ byte) * 0x100000001B3) & MASK
    assert _batcher.encode_state(12345, **IDENTITY) == content + struct.pack("<Q", checksum)


@SEEDED
@given(batches=st.integers(0, 2**56), seed=seeds, count=st.integers(1, 32))
def test_state_round_trip(batches: int, seed: int, count: int) -> None:
    identity = IDENTITY | {"seed": seed, "shapes": [(1 + i, i) for i in range(count)]}
    state = _batcher.encode_state(batches, **identity)
    assert len(state) <= 336
    assert _batcher.decode_state(state, **identity) == batches


def test_every_damaged_byte_and_length_is_refused() -> None:
    state = _batcher.encode_state(12345, **IDENTITY)
    for at in range(len(state)):
        for flip in (1, 0x80, 0xFF):
            damaged = state[:at] + bytes([state[at] ^ flip]) + state[at + 1 :]
            with pytest.raises(ValueError, match=r"state must be the bytes of state\(\), got bytes .* undamaged copy"):
                _batcher.decode_state(damaged, **IDENTITY)
        with pytest.raises(ValueError, match=r"state must be the bytes of state\(\)"):
            _batcher.decode_state(state[:at], **IDENTITY)
    with pytest.raises(ValueError, match="checksum"):
        _batcher.decode_state(state + b"\0", **IDENTITY)


def sealed(content: bytes) -> bytes:
    checksum = 0xCBF29CE484222325
    for byte in content:
        checksum = ((checksum ^ byte) * 0x100000001B3) & MASK
    return content + struct.pack("<Q", checksum)


@SEEDED
@given(content=st.binary(max_size=200), cut=st.integers(0, 200))
def test_bytes_with_a_right_checksum_are_still_checked(content: bytes, cut: int) -> None:
    head = _batcher.encode_state(1, **IDENTITY)[: max(8, min(cut, 120))]
    with pytest.raises(ValueError, match="state "):
        _batcher.decode_state(sealed(head + content), **(IDENTITY | {"records": 77}))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, struct.pack("<I", 9), "another format: saved 9, this batcher has 1"),
        (12, struct.pack("<I", 9), "another plan version: saved 9, this batcher has 1"),
        (60, struct.pack("<I", 2**32 - 1), "more shapes than there can be"),
        (60, struct.pack("<I", 2), "go on too long"),
        (60, struct.pack("<I", 32), "end early"),
        (88, struct.pack("<Q", 2**63), "position beyond"),
    ],
)
def test_well_formed_states_with_impossible_content_are_refused(at: int, value: bytes, message: str) -> None:
    content = _batcher.encode_state(12345, **IDENTITY)[:-8]
    with pytest.raises(ValueError, match=message):
        _batcher.decode_state(sealed(content[:at] + value + content[at + len(value) :]), **IDENTITY)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fingerprint", bytes(16), r"another data fingerprint: saved 000102.*0f, this batcher has 0{32}"),
        ("records", 999, r"another number of records: saved 1000, this batcher has 999"),
        ("seed", 1, rf"another seed: saved {MASK}, this batcher has 1"),
        ("batch_size", 64, r"another batch_size: saved 32, this batcher has 64"),
        ("completions", 1, r"another number of completions: saved 2, this batcher has 1"),
        ("shapes", [(128, 64)], r"another set of shapes: saved \(64, 32\) .*, this batcher has \(128, 64\)"),
    ],
)
def test_state_of_another_batcher_is_refused_by_field(field: str, value: Any, message: str) -> None:
    state = _batcher.encode_state(5, **IDENTITY)
    with pytest.raises(ValueError, match=f"state is of {message}; restore with what it was saved with"):
        _batcher.decode_state(state, **(IDENTITY | {field: value}))


def int32(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def choose(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "prompt_lengths": int32(3, 4), "completion_lengths": int32(1, 2), "completions": 2, "max_shapes": 2,
        "multiple": 8, "max_prompt": 8, "max_completion": 8,
    }  # fmt: skip
    arguments |= changed
    return _batcher.choose_shapes(arguments.pop("prompt_lengths"), arguments.pop("completion_lengths"), **arguments)


def plan_with(**changed: Any) -> Any:
    arguments: dict[str, Any] = {"shape_of": int32(0, 1), "num_shapes": 2, "batch_size": 1, "seed": 0, "epoch": 0}
    arguments |= changed
    return _batcher.plan_epoch(arguments.pop("shape_of"), **arguments)


native: Any = _batcher
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: native.Column([1, 2], np.asarray([0, 2])), TypeError,
     r"values must be a contiguous array of one dimension and type int32, got list"),
    (lambda: native.Column(np.zeros(2), np.asarray([0, 2])), TypeError, r"type int32, got float64"),
    (lambda: native.Column(np.zeros((2, 2), np.int32), np.asarray([0, 2])), ValueError, r"got 2 dimensions"),
    (lambda: native.Column(np.zeros(9, np.int32)[::2], np.asarray([0, 2])), ValueError, r"not contiguous"),
    (lambda: native.Column(int32(1), int32(0, 1)), TypeError, r"offsets must be .* type int64, got int32"),
    (lambda: native.Column(int32(1), np.zeros(0, np.int64)), ValueError, r"offsets must hold at least one entry"),
    (lambda: native.Column(int32(1), np.asarray([-1, 1])), ValueError, r"offsets must start at 0 or later, got -1"),
    (lambda: native.Column(int32(1, 2), np.asarray([0, 2, 1])), ValueError,
     r"offsets must not decrease, got 2 then 1 at record 1"),
    (lambda: native.Column(int32(1, 2), np.asarray([0, 3])), ValueError,
     r"offsets must end within the 2 values, got 3"),
    (lambda: native.Column(int32(1, 2), np.asarray([0, 2**62])), ValueError,
     r"a row must be shorter than 2\^31 tokens, got \d+ at record 0"),
    (lambda: column([[1], [2, 9]], vocab_size=9), ValueError, r"token ids must be in \[0, 9\), got 9 at record 1"),
    (lambda: column([[1], [-1]]), ValueError, r"token ids must be in \[0, 2147483648\), got -1 at record 1"),
    (lambda: column([[1]], vocab_size=0), ValueError,
     r"vocab_size must be an integer in \[1, 2147483648\], got 0 \(int\)"),
    (lambda: native.gather([], np.asarray([0]), 4), ValueError, r"columns must hold at least one column, got none"),
    (lambda: native.gather([None], np.asarray([0]), 4), TypeError, r"columns must hold Column objects, got None"),
    (lambda: native.gather([column([[1]])], np.asarray([1]), 4), ValueError, r"rows must be in \[0, 1\), got 1"),
    (lambda: native.gather([column([[1]])], np.asarray([-1]), 4), ValueError, r"rows must be in \[0, 1\), got -1"),
    (lambda: native.gather([column([[1, 2, 3]])], np.asarray([0]), 2), ValueError,
     r"width must hold every row, got 2 and 3 tokens at record 0"),
    (lambda: native.gather([column([[1]])], np.asarray([0]), 0), ValueError,
     r"width must be an integer in \[1, .*got 0"),
    (lambda: native.gather([column([[1]])], np.asarray([0.0]), 4), TypeError, r"rows must be .* int64, got float64"),
    (lambda: native.take(np.zeros(2, np.float32), np.asarray([2])), ValueError, r"rows must be in \[0, 2\), got 2"),
    (lambda: native.take(np.zeros(2, np.int16), np.asarray([0])), TypeError, r"values must be .* int64, got int16"),
    (lambda: choose(prompt_lengths=NO_LENGTHS), ValueError, r"prompt_lengths must have at least one entry, got none"),
    (lambda: choose(completion_lengths=int32(1)), ValueError,
     r"completion_lengths must have one entry for each of the 2 records, got 1"),
    (lambda: choose(completions=0), ValueError, r"completion_lengths must have one entry for each of the 0 records"),
    (lambda: choose(prompt_lengths=int32(3, 9)), ValueError, r"prompt_lengths must be in \[1, 8\], got 9 at 1"),
    (lambda: choose(prompt_lengths=int32(0, 3)), ValueError, r"prompt_lengths must be in \[1, 8\], got 0 at 0"),
    (lambda: choose(max_shapes=33), ValueError, r"max_shapes must be an integer in \[1, 32\], got 33"),
    (lambda: choose(multiple=True), TypeError, r"multiple must be an integer in .*, got True \(bool\)"),
    (lambda: native.assign_shapes(int32(3), NO_LENGTHS, []), ValueError,
     r"shapes must be 1 to 32 pairs .*, got \[\]"),
    (lambda: native.assign_shapes(int32(3), NO_LENGTHS, [(4, 2), (8, 1)]), ValueError,
     r"none smaller than the one before"),
    (lambda: native.assign_shapes(int32(3), NO_LENGTHS, [(4, 2), (4, 2)]), ValueError, r"no two equal"),
    (lambda: native.assign_shapes(int32(3), NO_LENGTHS, [4]), TypeError, r"shapes must be .*, got \[4\] \(list\)"),
    (lambda: native.assign_shapes(int32(3), NO_LENGTHS, "48"), TypeError, r"shapes must be .*, got '48' \(str\)"),
    (lambda: native.assign_shapes(int32(3), int32(5), [(4, 4)]), ValueError,
     r"the last of shapes must hold every record, got \(4, 4\) and record 0 with 3 prompt and 5 completion tokens"),
    (lambda: plan_with(shape_of=NO_LENGTHS), ValueError, r"shape_of must have at least one entry, got none"),
    (lambda: plan_with(shape_of=int32(0, 2)), ValueError, r"shape_of must be in \[0, 1\], got 2 at 1"),
    (lambda: plan_with(batch_size=0), ValueError, r"batch_size must be an integer in \[1, 2147483647\], got 0"),
    (lambda: plan_with(batch_size=1.5), TypeError, r"batch_size must be an integer in .*, got 1.5 \(float\)"),
    (lambda: plan_with(seed=-1), ValueError, r"seed must be an integer in \[0, 18446744073709551615\], got -1"),
    (lambda: plan_with(seed=2**64), ValueError, r"seed must be an integer in"),
    (lambda: plan_with(epoch=2**62), ValueError, r"epoch \* records must stay below 2\^62, got epoch \d+ of 2 records"),
    (lambda: native.decode_state("x", **IDENTITY), TypeError, r"state must be bytes, got str"),
    (lambda: native.encode_state(0, **(IDENTITY | {"fingerprint": b"x"})), ValueError,
     r"fingerprint must be 16 bytes, got b'x'"),
    (lambda: native.encode_state(-1, **IDENTITY), ValueError, r"batches must be an integer in \[0, "),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_integers_of_numpy_are_taken() -> None:
    assert plan_with(batch_size=np.int32(2), seed=np.uint64(MASK))[0].shape == (1, 2)
