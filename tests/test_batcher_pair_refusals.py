"""What pairs cannot be packed from is refused with the rule, the value and the remedy; wrong states by their field."""

import inspect
import struct
from typing import Any

import numpy as np
import pytest

from fastpref.data import PairBatcher, _native, pack_pairs, row_counts
from fastpref.method.errors import DataError

ROWS = [[1, 2], [3], [4, 5, 6]]


def pairs(*columns: Any, **options: Any) -> PairBatcher:
    # Without the type checker of the tests, which users do not have.
    native = object.__new__(PairBatcher)
    inspect.unwrap(PairBatcher.__init__)(native, *(columns or [ROWS] * 3), **({"rows": 2, "row_tokens": 16} | options))
    return native


def step(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "prompt_tokens": np.ones((3, 4), np.int32), "prompt_lengths": np.asarray([1, 2, 4]),
        "completion_tokens": np.ones((3, 2, 5), np.int32), "completion_lengths": np.asarray([[1, 2], [5, 5], [3, 1]]),
        "row_tokens": 16,
    }  # fmt: skip
    return inspect.unwrap(pack_pairs)(**(arguments | changed))


def plan(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "tokens": np.asarray([3, 4], np.int32), "prompt_tokens": np.zeros(0, np.int32), "shapes": [(1, 8, 0)],
        "max_pairs_per_row": 2, "window": 2, "seed": 0, "epoch": 0,
    }  # fmt: skip
    arguments |= changed
    return _native.plan_pairs(arguments.pop("tokens"), arguments.pop("prompt_tokens"), **arguments)


CHAIN = r"shapes must be 1 to 8 triples \(rows, decoder places, encoder places\), no row smaller than the one before"
T5: dict[str, Any] = {"layout": "encoder-decoder", "prompt_row_tokens": 8, "decoder_start": 0}
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: pairs([], [], []), DataError, r"there must be at least one record, got none. The drop report says"),
    (lambda: pairs(ROWS, ROWS, ROWS[:2]), DataError, r"rejected must have one entry for each of the 3 prompts, got 2"),
    (lambda: pairs(ROWS, [[1], [], [2]], ROWS), DataError,
     r"prompts and completions must have at least one token, got none at record 1. Drop such records"),
    (lambda: pairs(row_tokens=7), DataError,
     r"a row must hold every pair whole, got row_tokens 7 and 8 places at record 2 \(1 of 3 are too long\). Shorten or "
     r"drop such records \(overlong='drop'\), enlarge row_tokens, or add a larger shape to tail"),
    (lambda: pairs(row_tokens=1, overlong="drop"), DataError, r"hold every pair whole, .*\(3 of 3 are too long\)"),
    (lambda: pairs(**T5 | {"prompt_row_tokens": 2}), DataError,
     r"got row_tokens 16, prompt_row_tokens 2 and 6 and 3 places at record 2"),
    (lambda: pairs(overlong="cut"), ValueError, r"overlong must be 'raise' or 'drop', got 'cut'; choose one of them"),
    (lambda: pairs(preference=[0.5, 2, 0]), DataError, r"preference must be in \[0, 1\], got 2.0 at record 1"),
    (lambda: pairs(ref_logps=np.zeros(3)), DataError,
     r"ref_logps must be finite numbers, two for each of the 3 records, got float64 of shape \(3,\). Score"),
    (lambda: pairs(ref_logps=np.full((3, 2), np.nan)), DataError, r"ref_logps must be finite numbers"),
    (lambda: pairs(vocab_size=6), DataError, r"prompts: token ids must be in \[0, 6\), got 6 at record 2"),
    (lambda: pairs(layout="packed"), ValueError,
     r"layout must be 'shared', 'separate' or 'encoder-decoder', got 'packed'"),
    (lambda: pairs(layout="encoder-decoder"), ValueError,
     r"prompt_row_tokens must be given exactly for the layout 'encoder-decoder', got None for 'encoder-decoder'"),
    (lambda: pairs(decoder_start=0), ValueError, r"decoder_start must be given exactly .*, got 0 for 'shared'"),
    (lambda: pairs(**T5 | {"decoder_start": -1}), ValueError, r"decoder_start must be an integer in \[0, .*got -1"),
    (lambda: pairs(rows=0), ValueError, r"rows must be an integer in \[1, 1073741823\], got 0"),
    (lambda: pairs(rows=2.0), TypeError, r"rows must be an integer in .*, got 2.0 \(float\)"),
    (lambda: pairs(row_tokens=2**24 + 1), ValueError, r"row_tokens must be .* \[1, 16777216\], got 16777217"),
    (lambda: pairs(tail=[(2, 16)]), ValueError, rf"{CHAIN} .* no two equal, .*, got \(\(2, 16, 0\), \(2, 16, 0\)\)"),
    (lambda: pairs(tail=[(2, 8)]), ValueError, CHAIN),
    (lambda: pairs(tail=[(1, 32 + i) for i in range(8)]), ValueError, CHAIN),
    (lambda: pairs(tail=[(2, 32, 4)]), ValueError,
     r"a shape of tail must be \(rows, row_tokens\), got \(2, 32, 4\); give these numbers"),
    (lambda: pairs(**T5, tail=[(2, 32)]), ValueError,
     r"a shape of tail must be \(rows, row_tokens, prompt_row_tokens\), got \(2, 32\)"),
    (lambda: pairs(max_pairs_per_row=0), ValueError, r"max_pairs_per_row must be an integer in \[1, .*got 0"),
    (lambda: pairs(rows=2**29, max_pairs_per_row=3), ValueError,
     r"rows \* max_pairs_per_row must be below 2\^30, got 536870912 \* 3"),
    (lambda: pairs(window=0), ValueError, r"window must be an integer in \[1, 65536\], got 0"),
    (lambda: pairs(window=65537), ValueError, r"window must be an integer in \[1, 65536\], got 65537"),
    (lambda: pairs(seed=-1), ValueError, r"seed must be an integer in \[0, 18446744073709551615\], got -1"),
    (lambda: pairs(hosts=3), ValueError, r"hosts must divide the rows of every shape, got 3 hosts and 2 rows"),
    (lambda: pairs(hosts=2, tail=[(1, 32)]), ValueError, r"hosts must divide .*, got 2 hosts and 1 rows"),
    (lambda: pairs(host=2, hosts=2), ValueError, r"host must be an integer in \[0, 1\], got 2"),
    (lambda: pairs(threads=0), ValueError, r"threads must be an integer in \[1, 256\], got 0"),
    (lambda: pairs(prefetch=-1), ValueError, r"prefetch must be an integer in \[0, 1024\], got -1"),
    (lambda: pairs(prefetch=True), TypeError, r"prefetch must be an integer in .*, got True \(bool\)"),
    (lambda: pairs().padding(-1), ValueError, r"epoch must be an integer in \[0, .*got -1"),
    (lambda: inspect.unwrap(PairBatcher.restore)(pairs(), "state"), TypeError, r"state must be bytes, got str"),
    (lambda: step(prompt_lengths=np.asarray([1, 2])), ValueError, r"prompt_lengths must have one entry for each of"),
    (lambda: step(prompt_lengths=np.asarray([1, 0, 1])), ValueError,
     r"prompt_lengths must be in \[1, 4\], got 0 at record 1"),
    (lambda: step(prompt_lengths=np.asarray([1, 1, 5])), ValueError, r"prompt_lengths must be .*, got 5 at record 2"),
    (lambda: step(completion_lengths=np.asarray([[1, 0], [1, 1], [1, 1]])), ValueError,
     r"completion_lengths must be in \[1, 5\], got 0 at record 0"),
    (lambda: step(completion_lengths=np.asarray([[1, 1], [1, 6], [1, 1]])), ValueError, r"got 6 at record 1"),
    (lambda: step(completion_lengths=np.ones((3, 1))), ValueError,
     r"completion_lengths must have one entry for each of the 3 x 2 completions, got 3 x 1"),
    (lambda: step(completion_tokens=np.ones((3, 3, 5)), completion_lengths=np.ones((3, 3))), ValueError,
     r"completion_tokens must hold 1 or 2 completions of each prompt, got 3"),
    (lambda: step(completion_tokens=np.ones((2, 2, 5)), completion_lengths=np.ones((2, 2))), ValueError,
     r"completion_tokens must have one entry for each of the 3 records, got 2"),
    (lambda: step(completion_tokens=np.full((3, 2, 5), -4)), ValueError,
     r"token ids must be in \[0, 2\^31\), got -4 at record 0"),
    (lambda: step(prompt_tokens=np.full((3, 4), -4)), ValueError, r"token ids must be in \[0, 2\^31\), got -4"),
    (lambda: step(preference=np.asarray([0.5, np.nan, 0])), ValueError,
     r"preference must be in \[0, 1\], got nan at record 1"),
    (lambda: step(preference=np.zeros(2)), ValueError, r"preference must have one entry for each of the 3 records"),
    (lambda: step(ref_logps=np.zeros((3, 1))), ValueError, r"ref_logps must have two entries for each record, got 1"),
    (lambda: step(ref_logps=np.zeros((2, 2))), ValueError, r"ref_logps must have one entry for each of the 3 records"),
    (lambda: step(where=np.zeros(4, bool)), ValueError, r"where must have one entry for each of the 3 records, got 4"),
    (lambda: step(ids=np.zeros(4)), ValueError, r"ids must have one entry for each of the 3 records, got 4"),
    (lambda: step(row_tokens=10), ValueError,
     r"row_tokens and prompt_row_tokens must hold every pair whole, got 10 and 0 and a pair of 11 and 0 places at "
     r"record 1"),
    (lambda: step(row_tokens=16, counts=[1]), ValueError,
     r"row_counts must reach the rows that are needed, got at most 1 and 2 rows of pairs"),
    (lambda: step(counts=[]), TypeError, r"row_counts must be a sequence of at least one integer, got \[\]"),
    (lambda: step(counts=[0]), ValueError, r"row_counts must be an integer in \[1, .*got 0"),
    (lambda: step(max_pairs_per_row=0), ValueError, r"max_pairs_per_row must be an integer"),
    (lambda: step(prompt_row_tokens=8), ValueError, r"prompt_row_tokens must be given exactly for the layout"),
    (lambda: row_counts(0), ValueError, r"pairs must be at least 1, got 0; give the largest number"),
    (lambda: row_counts(4, 0), ValueError, r"multiple must be at least 1, got 0"),
    (lambda: plan(tokens=np.zeros(0, np.int32)), ValueError, r"tokens must have 1 to 2\^31 - 2 entries, got 0"),
    (lambda: plan(tokens=np.asarray([9, 1], np.int32)), ValueError,
     r"tokens must be at least 1 and fit the last shape, got 9 and 0 at 0"),
    (lambda: plan(tokens=np.asarray([0, 1], np.int32)), ValueError, r"tokens must be at least 1 .* got 0 and 0 at 0"),
    (lambda: plan(prompt_tokens=np.ones(1, np.int32)), ValueError, r"prompt_tokens must have one entry for each"),
    (lambda: plan(prompt_tokens=np.ones(2, np.int32)), ValueError, CHAIN),
    (lambda: plan(shapes=[]), ValueError, CHAIN),
    (lambda: plan(shapes=[8]), TypeError, CHAIN),
    (lambda: plan(shapes="180"), TypeError, CHAIN),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_packed_is_named(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def loader(**changed: Any) -> _native.PairLoader:
    def column(count: int) -> _native.Column:
        return _native.Column(np.arange(2 * count, dtype=np.int32), np.arange(0, 2 * count + 1, 2))

    arguments: dict[str, Any] = {
        "prompts": column(3), "first": column(3), "second": column(3), "preference": np.ones(3, np.float32),
        "ref_logps": np.zeros(0, np.float32), "ids": np.arange(3), "layout": "shared", "decoder_start": 0,
        "shapes": [(1, 8, 0)], "max_pairs_per_row": 2, "window": 2, "seed": 0, "records": np.zeros(0, np.int32),
        "host": 0, "hosts": 1, "threads": 1, "prefetch": 0, "fingerprint": bytes(16), "tokenizer": bytes(16),
    }  # fmt: skip
    short = {"column2": column(2)}
    return _native.PairLoader(**(arguments | {name: short.get(value, value) if isinstance(value, str) else value
                                               for name, value in changed.items()}))  # fmt: skip


NATIVE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompts": 3}, TypeError, r"prompts must be a Column, got int"),
    ({"second": "column2"}, ValueError, r"second must have one entry for each of the 3 records, got 2"),
    ({"preference": np.ones(2, np.float32)}, ValueError, r"preference must have one entry for each of the 3 records"),
    ({"preference": np.ones(3)}, TypeError, r"preference must be .* type float32, got float64"),
    ({"ref_logps": np.zeros(5, np.float32)}, ValueError, r"ref_logps must have no entry, or two for each of"),
    ({"ref_logps": np.zeros(7, np.float32)}, ValueError, r"ref_logps must have no entry, or two for each of"),
    ({"ids": np.zeros(0, np.int64)}, ValueError, r"ids must have 1 to 2\^31 - 2 entries, got 0"),
    ({"records": np.asarray([0, 3], np.int32)}, ValueError, r"records must be in \[0, 3\), got 3"),
    ({"records": np.asarray([-1], np.int32)}, ValueError, r"records must be in \[0, 3\), got -1"),
    ({"shapes": [(1, 4, 0)]}, ValueError, r"the last of shapes must hold every pair, got record 0 with 5 and 0 places"),
    ({"fingerprint": b"x"}, ValueError, r"fingerprint must be 16 bytes, got b'x'"),
    ({"tokenizer": "x"}, ValueError, r"tokenizer must be 16 bytes, got 'x'"),
    ({"poison": 1}, TypeError, r"poison must be a bool, got 1"),
    ({"layout": 1}, TypeError, r"layout must be .*, got 1 \(int\)"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), NATIVE, ids=range(len(NATIVE)))
def test_wrong_arguments_of_the_loader_are_named(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        loader(**changed)


def sealed(content: bytes) -> bytes:
    checksum = 0xCBF29CE484222325
    for byte in content:
        checksum = ((checksum ^ byte) * 0x100000001B3) % 2**64
    return content + struct.pack("<Q", checksum)


def test_the_layout_of_a_state() -> None:
    native = loader(prefetch=0)
    native.next()
    content = native.state()[:-8]
    digest = _native.plan_pairs(
        np.full(3, 5, np.int32),
        np.zeros(0, np.int32),
        shapes=[(1, 8, 0)],
        max_pairs_per_row=2,
        window=2,
        seed=0,
        epoch=0,
    )[3]
    expected = struct.pack(
        "<8sII16s16sQQIiiiI3iQQQ", b"FPPAIRS\0", 1, 1, bytes(16), bytes(16), 3, 0, 0, 0, 2, 2, 1, 1, 8, 0, 0, 1, digest
    )
    assert content == expected
    assert native.state() == sealed(content)


FIELDS: list[tuple[int, bytes, str]] = [
    (8, b"\x02", r"state is of another format: saved 2, this batcher has 1"),
    (12, b"\x02", r"state is of another plan version: saved 2, this batcher has 1"),
    (64, b"\x03", r"got an unknown layout"),
    (80, b"\x09", r"got more shapes than there can be"),
    (80, b"\x02", r"got bytes that end early"),
    (80, b"\x00", r"got bytes that go on too long"),
    (96, struct.pack("<Q", 2**62), r"got a position beyond 2\^62"),
    (104, struct.pack("<Q", 2**62), r"got a position beyond 2\^62"),
    (104, struct.pack("<Q", 4), r"state is of another plan: saved \d+ at batch 4, this batcher has \d+ with 3 batches"),
    (112, struct.pack("<Q", 5), r"state is of another plan: saved 5 at batch 1, this batcher has \d+ with 3 batches"),
]


@pytest.mark.parametrize(("at", "value", "message"), FIELDS)
def test_sealed_states_are_still_read_with_care(at: int, value: bytes, message: str) -> None:
    native = loader()
    native.next()
    before = native.state()
    content = before[:-8]
    with pytest.raises(ValueError, match=message):
        native.restore(sealed(content[:at] + value + content[at + len(value) :]))
    assert native.state() == before
    native.restore(sealed(content))


def test_the_state_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state must be the bytes of state\(\), got bytes that begin otherwise"):
        loader().restore(b"FPBATCH\0" + bytes(100))
