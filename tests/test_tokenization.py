"""Tokenization: limits, policies and parts; every record becomes tokens or is counted with its reason."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import DropReport, Record, read_records, tokenize_completions, tokenize_prompts
from fastpref.data.ragged import Ragged
from fastpref.data.readers import RecordStream
from fastpref.data.tokenization import TokenRecords, TokenStream
from fastpref.method.errors import DataError

SEEDED = settings(derandomize=True, deadline=None)
PAIR = ("prompt", "chosen", "rejected")
TEXTS = st.sampled_from(["", " ", "a", "b", "abcdef", "é", "\ud800", None, 3])


class Characters:
    """A tokenizer of ASCII: a character is its code, EOS is 1."""

    vocab_size = 128

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]

    def encode_completions(self, texts: list[str]) -> list[list[int]]:
        return [[*tokens, 1] for tokens in self.encode_prompts(texts)]


@SEEDED
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {}, optional={"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS, "preference": st.floats()}
        )
        | st.none()
    ),
    overlong=st.sampled_from(["drop", "truncate"]),
)
def test_every_record_is_delivered_or_counted(rows: list[Any], overlong: Any) -> None:
    records, read = read_records(rows, columns=PAIR, on_bad_record="skip")
    limits: dict[str, Any] = {"max_prompt_tokens": 3, "max_completion_tokens": 3}
    tokens, kept = tokenize_completions(records, Characters(), **limits, overlong=overlong, on_bad_record="skip")
    whole = read.then(kept)
    assert (read.read, read.delivered, kept.delivered) == (len(rows), len(records), len(tokens))
    assert whole.read == len(rows) == len(tokens) + sum(whole.dropped.values())
    texts = {record.id: record for record in records}
    for at, name in enumerate(tokens.ids):
        assert [*map(chr, tokens.prompts[at])] == [*texts[name].prompt[:3]]
        assert tokens.preference[at] == pytest.approx(rows[name].get("preference", 1.0))


@pytest.mark.parametrize("overlong", ["drop", "raise", "truncate"])
def test_overlong_records_follow_their_policy(overlong: Any) -> None:
    records = [Record(3, "abc", ("x", "y")), Record(5, "abcde", ("x", "y")), Record(8, "abc", ("x", "wxyz"))]
    limits: dict[str, Any] = {"max_prompt_tokens": 4, "max_completion_tokens": 3, "overlong": overlong}
    if overlong == "raise":
        with pytest.raises(
            DataError, match=r"record 5: a prompt must have at most 4 tokens, but received 5 \[prompt too long\]"
        ):
            tokenize_completions(records, Characters(), **limits)
        return
    tokens, report = tokenize_completions(records, Characters(), **limits)
    if overlong == "drop":
        assert report == DropReport(3, 1, {"prompt too long": 1, "completion too long": 1})
        assert tokens.ids.tolist() == [3]
    else:
        assert report == DropReport(3, 3, {}, truncated=2)
        assert tokens.prompts[1].tolist() == [ord(c) for c in "abcd"]
        assert [tokens.completions[k][2].tolist() for k in (0, 1)] == [[ord("x"), 1], [ord(c) for c in "wxy"]]


def test_completions_that_truncation_makes_equal_are_dropped() -> None:
    limits: dict[str, Any] = {"max_prompt_tokens": 4, "max_completion_tokens": 2, "overlong": "truncate"}
    records = [Record(0, "p", ("abX", "abY"))]
    assert tokenize_completions(records, Characters(), **limits)[1] == DropReport(1, 0, {"identical completions": 1})
    # Cutting is what the settings asked for. Where it has no part in it, the record itself is bad.
    same = [Record(0, "p", ("abX", "abX"))]
    with pytest.raises(DataError, match=r"record 0: chosen and rejected must differ in their tokens"):
        tokenize_completions(same, Characters(), **limits)
    assert tokenize_completions(same, Characters(), **limits, on_bad_record="skip")[1].delivered == 0


class Odd(Characters):
    """Encodes some prompts to nothing."""

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [[] if text == "none" else [-1] if text == "low" else tokens for text, tokens in
                zip(texts, super().encode_prompts(texts), strict=True)]  # fmt: skip


def test_tokens_out_of_the_vocabulary_and_lost_prompts_are_bad_records() -> None:
    prompts = ["a", "none", "low", "é"]
    tokens, report = tokenize_prompts(prompts, Odd(), max_tokens=4, on_bad_record="skip")
    assert tokens.ids.tolist() == [0]
    assert report == DropReport(4, 1, {"empty prompt": 1, "token outside the vocabulary": 2})
    for prompt, message in (
        ("none", "a prompt must have at least one token, but received none"),
        ("low", r"token ids must be in \[0, 128\), but received -1 in a prompt"),
        ("\x80", r"token ids must be in \[0, 128\), but received 128 in a prompt"),
        ("é", r"token ids must be in \[0, 128\), but received 233 in a prompt \[token outside the vocabulary\]"),
    ):
        with pytest.raises(DataError, match=f"record 0: {message}"):
            tokenize_prompts([prompt], Odd(), max_tokens=4)
    assert tokenize_prompts(["\x7f"], Characters(), max_tokens=4)[1] == DropReport(1, 1)
    assert tokenize_prompts(["é"], Characters(), max_tokens=4, vocab_size=256)[1] == DropReport(1, 1)
    with pytest.warns(UserWarning, match=r"^tokenization: 2 records read, 1 delivered, 1 dropped \(1 empty prompt\)"):
        tokenize_prompts(["a", "none"], Odd(), max_tokens=4, on_bad_record="warn")


def test_prompts_are_taken_from_any_record() -> None:
    tokens, report = tokenize_prompts([Record(7, "ab", ("x", "y")), Record(9, "c")], Characters(), max_tokens=4)
    assert (tokens.ids.tolist(), tokens.completions) == ([7, 9], ())
    assert [tokens.prompts[at].tolist() for at in (0, 1)] == [[97, 98], [99]]
    assert report == DropReport(2, 2)
    assert len(tokenize_prompts([], Characters(), max_tokens=4)[0]) == 0


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_of_tokenization_are_named() -> None:
    with pytest.raises(ValueError, match="max_prompt_tokens must be at least 1, but received 0"):
        tokenize_prompts(["a"], Characters(), max_tokens=0)
    with pytest.raises(ValueError, match="overlong must be 'drop', 'raise' or 'truncate', but received 'cut'"):
        tokenize_prompts(["a"], Characters(), max_tokens=4, overlong="cut")
    with pytest.raises(ValueError, match=r"records must have one number of completions, but received \[0, 2\]"):
        tokenize_completions(
            [Record(0, "a"), Record(1, "a", ("x", "y"))], Characters(), max_prompt_tokens=4, max_completion_tokens=4
        )


def test_a_stream_holds_little_at_a_time() -> None:
    """It takes no more from its source than it gives, and tokens no more than a chunk."""
    taken = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal taken
        while True:
            taken += 1
            yield {"prompt": f"p{taken}", "chosen": "a", "rejected": "b"}

    stream = RecordStream(endless(), columns=PAIR)
    next(stream)
    assert taken == 1
    limits: dict[str, Any] = {"max_prompt_tokens": 9, "max_completion_tokens": 9}
    tokens = TokenStream(stream, Characters(), **limits, chunk=10)
    assert [len(next(tokens)) for _ in range(3)] == [10, 10, 10]
    assert (taken, tokens.report) == (31, DropReport(30, 30))


@SEEDED
@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}), max_size=30),
    chunk=st.integers(1, 12),
    overlong=st.sampled_from(["drop", "truncate"]),
)
def test_chunks_change_nothing(rows: list[Any], chunk: int, overlong: Any) -> None:
    limits: dict[str, Any] = {"max_prompt_tokens": 3, "max_completion_tokens": 3, "overlong": overlong}
    records, _ = read_records(rows, columns=PAIR, on_bad_record="skip")
    expected, report = tokenize_completions(records, Characters(), **limits, on_bad_record="skip")
    stream = TokenStream(iter(records), Characters(), **limits, on_bad_record="skip", chunk=chunk)
    parts = list(stream)
    joined = TokenRecords.joined(parts)
    assert stream.report == report
    assert joined.ids.tolist() == expected.ids.tolist()
    assert joined.preference.tolist() == expected.preference.tolist()
    for one, other in zip(
        (joined.prompts, *joined.completions), (expected.prompts, *expected.completions), strict=True
    ):
        assert [row.tolist() for row in one] == [row.tolist() for row in other]
    assert sum(map(len, parts)) == len(expected)


def test_rows_of_arrays_are_those_of_lists() -> None:
    rows = [[1, 2**31 - 1], [], [-(2**31)], [7, 8, 9]]
    expected = Ragged.from_rows(rows)
    for kinds in (["int64"] * 4, ["int32", "float64", "int64", "uint8"]):
        # An empty array is one of floats by default.
        arrays = [np.array(row, kind) for row, kind in zip(rows, kinds, strict=True)]
        ragged = Ragged.from_rows(arrays)
        assert (ragged.values.dtype, ragged.values.tolist()) == (np.int32, expected.values.tolist())
        assert ragged.offsets.tolist() == expected.offsets.tolist() == [0, 2, 2, 3, 6]
    for wrong, message in (
        (np.array([0.5]), "must be whole numbers, but received float64"),
        (np.array([2**31]), "into 32 bits"),
    ):
        with pytest.raises(DataError, match=message):
            Ragged.from_rows([np.array([1]), wrong])
