"""What the native core refuses: damaged states, states of other batchers, and wrong arguments, each by its name."""

import itertools
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import _native

NO_LENGTHS = np.zeros(0, np.int32)
MASK = 2**64 - 1
SEEDED = settings(derandomize=True, deadline=None)
seeds = st.integers(0, MASK)


def column(rows: list[list[int]], **options: Any) -> _native.Column:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return _native.Column(np.asarray(list(itertools.chain(*rows)), np.int32), offsets, **options)


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
    assert _native.encode_state(12345, **IDENTITY) == content + struct.pack("<Q", checksum)


@SEEDED
@given(batches=st.integers(0, 2**56), seed=seeds, count=st.integers(1, 32))
def test_state_round_trip(batches: int, seed: int, count: int) -> None:
    identity = IDENTITY | {"seed": seed, "shapes": [(1 + i, i) for i in range(count)]}
    state = _native.encode_state(batches, **identity)
    assert len(state) <= 336
    assert _native.decode_state(state, **identity) == batches


def test_every_damaged_byte_and_length_is_refused() -> None:
    state = _native.encode_state(12345, **IDENTITY)
    for at in range(len(state)):
        for flip in (1, 0x80, 0xFF):
            damaged = state[:at] + bytes([state[at] ^ flip]) + state[at + 1 :]
            with pytest.raises(ValueError, match=r"state must be the bytes of state\(\), got bytes .* undamaged copy"):
                _native.decode_state(damaged, **IDENTITY)
        with pytest.raises(ValueError, match=r"state must be the bytes of state\(\)"):
            _native.decode_state(state[:at], **IDENTITY)
    with pytest.raises(ValueError, match="checksum"):
        _native.decode_state(state + b"\0", **IDENTITY)


def sealed(content: bytes) -> bytes:
    checksum = 0xCBF29CE484222325
    for byte in content:
        checksum = ((checksum ^ byte) * 0x100000001B3) & MASK
    return content + struct.pack("<Q", checksum)


@SEEDED
@given(content=st.binary(max_size=200), cut=st.integers(0, 200))
def test_bytes_with_a_right_checksum_are_still_checked(content: bytes, cut: int) -> None:
    head = _native.encode_state(1, **IDENTITY)[: max(8, min(cut, 120))]
    with pytest.raises(ValueError, match="state "):
        _native.decode_state(sealed(head + content), **(IDENTITY | {"records": 77}))


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
    content = _native.encode_state(12345, **IDENTITY)[:-8]
    with pytest.raises(ValueError, match=message):
        _native.decode_state(sealed(content[:at] + value + content[at + len(value) :]), **IDENTITY)


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
    state = _native.encode_state(5, **IDENTITY)
    with pytest.raises(ValueError, match=f"state is of {message}; restore with what it was saved with"):
        _native.decode_state(state, **(IDENTITY | {field: value}))


def int32(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def choose(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "prompt_lengths": int32(3, 4), "completion_lengths": int32(1, 2), "completions": 2, "max_shapes": 2,
        "multiple": 8, "max_prompt": 8, "max_completion": 8,
    }  # fmt: skip
    arguments |= changed
    return _native.choose_shapes(arguments.pop("prompt_lengths"), arguments.pop("completion_lengths"), **arguments)


def plan_with(**changed: Any) -> Any:
    arguments: dict[str, Any] = {"shape_of": int32(0, 1), "num_shapes": 2, "batch_size": 1, "seed": 0, "epoch": 0}
    arguments |= changed
    return _native.plan_epoch(arguments.pop("shape_of"), **arguments)


native: Any = _native
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
