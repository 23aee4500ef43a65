"""What pairs cannot be packed from is refused with the rule, the value and the remedy; wrong states by their field."""

import inspect
from typing import Any

import numpy as np
import pytest

from fastpref.data import PairBatcher, PromptBatcher, _native, pack_pairs, row_counts
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
    (lambda: pairs([], [], []), DataError, r"there must be at least one record, but received none. The drop report "
        r"says"),
    (lambda: pairs(ROWS, ROWS, ROWS[:2]), DataError, r"rejected must have one entry for each of the 3 prompts, but "
        r"received 2"),
    (lambda: pairs(ROWS, [[1], [], [2]], ROWS), DataError,
     r"prompts and completions must have at least one token, but received none at record 1. Drop such records"),
    (lambda: pairs(row_tokens=7), DataError,
     r"a row must hold every pair whole, but received row_tokens 7 and 8 places at record 2 \(1 of 3 are too long\). "
         r"Shorten or "
     r"drop such records \(overlong='drop'\), enlarge row_tokens, or add a larger shape to tail"),
    (lambda: pairs(row_tokens=1, overlong="drop"), DataError, r"hold every pair whole, .*\(3 of 3 are too long\)"),
    (lambda: pairs(**T5 | {"prompt_row_tokens": 2}), DataError,
     r"but received row_tokens 16, prompt_row_tokens 2 and 6 and 3 places at record 2"),
    (lambda: pairs(overlong="cut"), ValueError,
     r"overlong must be 'raise' or 'drop', but received 'cut'. Choose one of them"),
    (lambda: pairs(preference=[0.5, 2, 0]), DataError, r"preference must be in \[0, 1\], but received 2.0 at record 1"),
    (lambda: pairs(ref_logps=np.zeros(3)), DataError,
     r"ref_logps must be finite numbers, two for each of the 3 records, but received float64 of shape \(3,\). Score"),
    (lambda: pairs(ref_logps=np.full((3, 2), np.nan)), DataError, r"ref_logps must be finite numbers"),
    (lambda: pairs(vocab_size=6), DataError, r"prompts: token ids must be in \[0, 6\), but received 6 at record 2"),
    (lambda: pairs(layout="packed"), ValueError,
     r"layout must be 'shared', 'separate' or 'encoder-decoder', but received 'packed'"),
    (lambda: pairs(layout="encoder-decoder"), ValueError,
     r"prompt_row_tokens must be given exactly for the layout 'encoder-decoder', but received None for "
         r"'encoder-decoder'"),
    (lambda: pairs(decoder_start=0), ValueError, r"decoder_start must be given exactly .*, but received 0 for "
        r"'shared'"),
    (lambda: pairs(**T5 | {"decoder_start": -1}), ValueError,
     r"decoder_start must be an integer in \[0, .*but received -1"),
    (lambda: pairs(rows=0), ValueError, r"rows must be an integer in \[1, 1073741823\], but received 0"),
    (lambda: pairs(rows=2.0), TypeError, r"rows must be an integer in .*, but received 2.0 \(float\)"),
    (lambda: pairs(row_tokens=2**24 + 1), ValueError, r"row_tokens must be .* \[1, 16777216\], but received 16777217"),
    (lambda: pairs(tail=[(2, 16)]), ValueError, rf"{CHAIN} .* no two equal, .*, but received \(\(2, 16, 0\), \(2, "
        rf"16, 0\)\)"),
    (lambda: pairs(tail=[(2, 8)]), ValueError, CHAIN),
    (lambda: pairs(tail=[(1, 32 + i) for i in range(8)]), ValueError, CHAIN),
    (lambda: pairs(tail=[(2, 32, 4)]), ValueError,
     r"a shape of tail must be \(rows, row_tokens\), but received \(2, 32, 4\). Give these numbers"),
    (lambda: pairs(**T5, tail=[(2, 32)]), ValueError,
     r"a shape of tail must be \(rows, row_tokens, prompt_row_tokens\), but received \(2, 32\)"),
    (lambda: pairs(max_pairs_per_row=0), ValueError, r"max_pairs_per_row must be an integer in \[1, .*but received 0"),
    (lambda: pairs(rows=2**29, max_pairs_per_row=3), ValueError,
     r"rows \* max_pairs_per_row must be below 2\^30, but received 536870912 \* 3"),
    (lambda: pairs(window=0), ValueError, r"window must be an integer in \[1, 65536\], but received 0"),
    (lambda: pairs(window=65537), ValueError, r"window must be an integer in \[1, 65536\], but received 65537"),
    (lambda: pairs(seed=-1), ValueError, r"seed must be an integer in \[0, 18446744073709551615\], but received -1"),
    (lambda: pairs(hosts=3), ValueError, r"hosts must divide the rows of every shape, but received 3 hosts and 2 rows"),
    (lambda: pairs(hosts=2, tail=[(1, 32)]), ValueError, r"hosts must divide .*, but received 2 hosts and 1 rows"),
    (lambda: pairs(host=2, hosts=2), ValueError, r"host must be an integer in \[0, 1\], but received 2"),
    (lambda: pairs(threads=0), ValueError, r"threads must be an integer in \[1, 256\], but received 0"),
    (lambda: pairs(prefetch=-1), ValueError, r"prefetch must be an integer in \[0, 1024\], but received -1"),
    (lambda: pairs(prefetch=True), TypeError, r"prefetch must be an integer in .*, but received True \(bool\)"),
    (lambda: pairs().padding(-1), ValueError, r"epoch must be an integer in \[0, .*but received -1"),
    (lambda: inspect.unwrap(PairBatcher.restore)(pairs(), b"state"), DataError, r"state must be the bytes of state"),
    (lambda: step(prompt_lengths=np.asarray([1, 2])), ValueError, r"prompt_lengths must have one entry for each of"),
    (lambda: step(prompt_lengths=np.asarray([1, 0, 1])), ValueError,
     r"prompt_lengths must be in \[1, 4\], but received 0 at record 1"),
    (lambda: step(prompt_lengths=np.asarray([1, 1, 5])), ValueError, r"prompt_lengths must be .*, but received 5 at "
        r"record 2"),
    (lambda: step(completion_lengths=np.asarray([[1, 0], [1, 1], [1, 1]])), ValueError,
     r"completion_lengths must be in \[1, 5\], but received 0 at record 0"),
    (lambda: step(completion_lengths=np.asarray([[1, 1], [1, 6], [1, 1]])), ValueError, r"but received 6 at record 1"),
    (lambda: step(completion_lengths=np.ones((3, 1))), ValueError,
     r"completion_lengths must have one entry for each of the 3 x 2 completions, but received 3 x 1"),
    (lambda: step(completion_tokens=np.ones((3, 3, 5)), completion_lengths=np.ones((3, 3))), ValueError,
     r"completion_tokens must hold 1 or 2 completions of each prompt, but received 3"),
    (lambda: step(completion_tokens=np.ones((2, 2, 5)), completion_lengths=np.ones((2, 2))), ValueError,
     r"completion_tokens must have one entry for each of the 3 records, but received 2"),
    (lambda: step(completion_tokens=np.full((3, 2, 5), -4)), ValueError,
     r"token ids must be in \[0, 2\^31\), but received -4 at record 0"),
    (lambda: step(prompt_tokens=np.full((3, 4), -4)), ValueError, r"token ids must be in \[0, 2\^31\), but received "
        r"-4"),
    (lambda: step(preference=np.asarray([0.5, np.nan, 0])), ValueError,
     r"preference must be in \[0, 1\], but received nan at record 1"),
    (lambda: step(preference=np.zeros(2)), ValueError, r"preference must have one entry for each of the 3 records"),
    (lambda: step(ref_logps=np.zeros((3, 1))), ValueError, r"ref_logps must have two entries for each record, but "
        r"received 1"),
    (lambda: step(ref_logps=np.zeros((2, 2))), ValueError, r"ref_logps must have one entry for each of the 3 records"),
    (lambda: step(where=np.zeros(4, bool)), ValueError, r"where must have one entry for each of the 3 records, but "
        r"received 4"),
    (lambda: step(ids=np.zeros(4)), ValueError, r"ids must have one entry for each of the 3 records, but received 4"),
    (lambda: step(row_tokens=10), ValueError,
     r"row_tokens and prompt_row_tokens must hold every pair whole, but received 10 and 0 and a pair of 11 and 0 "
         r"places at "
     r"record 1"),
    (lambda: step(row_tokens=16, counts=[1]), ValueError,
     r"row_counts must reach the rows that are needed, but received at most 1 for 2 rows of pairs"),
    (lambda: step(counts=[]), TypeError, r"row_counts must be a sequence of at least one integer, but received \[\]"),
    (lambda: step(counts=[0]), ValueError, r"row_counts must be an integer in \[1, .*but received 0"),
    (lambda: step(max_pairs_per_row=0), ValueError, r"max_pairs_per_row must be an integer"),
    (lambda: step(prompt_row_tokens=8), ValueError, r"prompt_row_tokens must be given exactly for the layout"),
    (lambda: row_counts(0), ValueError, r"pairs must be at least 1, but received 0. Give the largest number"),
    (lambda: row_counts(4, 0), ValueError, r"multiple must be at least 1, but received 0"),
    (lambda: plan(tokens=np.zeros(0, np.int32)), ValueError, r"tokens must have 1 to 2\^31 - 2 entries, but received "
        r"0"),
    (lambda: plan(tokens=np.asarray([9, 1], np.int32)), ValueError,
     r"tokens must be at least 1 and fit the last shape, but received 9 and 0 at 0"),
    (lambda: plan(tokens=np.asarray([0, 1], np.int32)), ValueError, r"tokens must be at least 1 .* but received 0 "
        r"and 0 at 0"),
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
        "host": 0, "hosts": 1, "threads": 1, "prefetch": 0,
    }  # fmt: skip
    short = {"column2": column(2)}
    return _native.PairLoader(**(arguments | {name: short.get(value, value) if isinstance(value, str) else value
                                               for name, value in changed.items()}))  # fmt: skip


NATIVE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompts": 3}, TypeError, r"prompts must be a Column, but received int"),
    ({"second": "column2"}, ValueError, r"second must have one entry for each of the 3 records, but received 2"),
    ({"preference": np.ones(2, np.float32)}, ValueError, r"preference must have one entry for each of the 3 records"),
    ({"preference": np.ones(3)}, TypeError, r"preference must be .* type float32, but received float64"),
    ({"ref_logps": np.zeros(5, np.float32)}, ValueError, r"ref_logps must have no entry, or two for each of"),
    ({"ref_logps": np.zeros(7, np.float32)}, ValueError, r"ref_logps must have no entry, or two for each of"),
    ({"ids": np.zeros(0, np.int64)}, ValueError, r"ids must have 1 to 2\^31 - 2 entries, but received 0"),
    ({"records": np.asarray([0, 3], np.int32)}, ValueError, r"records must be in \[0, 3\), but received 3"),
    ({"records": np.asarray([-1], np.int32)}, ValueError, r"records must be in \[0, 3\), but received -1"),
    (
        {"shapes": [(1, 4, 0)]},
        ValueError,
        r"the last of shapes must hold every pair, but received record 0 with 5 and 0 places",
    ),
    ({"layout": 1}, TypeError, r"layout must be .*, but received 1 \(int\)"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), NATIVE, ids=range(len(NATIVE)))
def test_wrong_arguments_of_the_loader_are_named(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        loader(**changed)


def test_a_state_of_another_plan_is_refused() -> None:
    native = loader()
    native.next()
    epoch, batch, batches, plan = native.position()
    assert (epoch, batch, batches) == (0, 1, 3)
    for wrong in ((0, 4, plan), (0, 1, plan ^ 1)):
        with pytest.raises(
            ValueError, match=r"must be of this batcher's plan, \d+ with 3 batches, but received .* Restore"
        ):
            native.seek(*wrong)
    assert native.position() == (epoch, batch, batches, plan)
    native.seek(0, 0, plan)
    assert native.position() == (0, 0, 3, plan)


def test_the_state_of_another_kind_is_refused() -> None:
    native = pairs(ROWS, ROWS, ROWS)
    prompts = PromptBatcher(ROWS, batch_size=1, max_tokens=8)
    with pytest.raises(DataError, match=r"state must have the tokenizer hash of this batcher"):
        inspect.unwrap(PairBatcher.restore)(native, prompts.state())
    with pytest.raises(DataError, match=r"state must be the bytes of state\(\)"):
        inspect.unwrap(PairBatcher.restore)(native, b"FPPAIRS\0" + bytes(100))
