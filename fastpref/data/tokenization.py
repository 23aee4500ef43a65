"""Records of text to records of token ids, within limits: each one delivered, or counted with its reason."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from fastpref.data import hashes
from fastpref.data.ragged import Ragged
from fastpref.data.records import IDENTICAL, BadRecord, DropReport, Ledger, Record, share
from fastpref.data.rendered import Rendered
from fastpref.method.choices import OnBadRecord, Overlong, TruncationSide
from fastpref.method.errors import CutWarning, DataError

CHUNK = 8192
"""Records that are encoded together."""


@runtime_checkable
class Encoder(Protocol):
    """What a tokenizer must be able to do."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, ready to be continued. No special tokens are added to a `Rendered` one."""

    def encode_completions(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, ending with EOS."""


@runtime_checkable
class SeamEncoder(Encoder, Protocol):
    """What a tokenizer may be able to do besides: encode whole texts, and tell what a template wrote."""

    @property
    def affixes(self) -> tuple[int, int]:
        """Tokens that a plain prompt begins and ends with whatever its text is."""

    def recognised(self, text: str) -> str:
        """A text that a template wrote as `Rendered`, any other as it is."""

    def encode_records(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each prompt and its completions, cut out of those of the whole texts."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenRecords:
    """N prompts with K recorded completions each, as token ids."""

    prompts: Ragged
    completions: tuple[Ragged, ...]
    """K columns of N rows: none for prompts alone, one for supervised examples, chosen and rejected for pairs."""
    preference: Float32[np.ndarray, " N"]
    """Probability that completion 0 beats completion 1."""
    ids: Int64[np.ndarray, " N"]
    """Position of each record in the source."""
    text: Ragged | None = None
    """Of prompts alone, the text of each, packed; see `PromptTexts`."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def joined(cls, parts: Sequence["TokenRecords"]) -> "TokenRecords":
        """The records of all parts, one after the other; no completions where there is no part."""
        columns = zip(*(part.completions for part in parts), strict=True)
        texts = [part.text for part in parts if part.text is not None]
        return cls(
            Ragged.joined([part.prompts for part in parts]),
            tuple(Ragged.joined(column) for column in columns),
            np.concatenate([np.zeros(0, np.float32), *(part.preference for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part.ids for part in parts)]),
            Ragged.joined(texts) if len(texts) == len(parts) else None,
        )


class PromptTexts(Mapping[int, str]):
    """Texts of prompts by id, as judges read them, without an object for each: one million may be mapped from a file.

    Each text is a byte that says whether a template rendered it, its UTF-8, or `Rendered.pack`, and a filling of 255,
    which is no byte of UTF-8, to whole words of 32 bits.

    Args:
      records: prompts alone.
    """

    def __init__(self, records: TokenRecords) -> None:
        self._ids, self._text = records.ids, records.text or Ragged.from_rows([])

    @staticmethod
    def pack(texts: Iterable[str]) -> Ragged:
        """The `text` of `TokenRecords`."""
        rows = []
        for text in texts:
            packed = text.pack() if isinstance(text, Rendered) else text.encode("utf-8", "surrogatepass")
            content = bytes([isinstance(text, Rendered)]) + packed
            rows.append(np.frombuffer(content + b"\xff" * (-len(content) % 4), "<i4"))
        return Ragged.from_rows(rows)

    def __getitem__(self, index: int) -> str:
        position = int(np.searchsorted(self._ids, index))
        if position == len(self._ids) or self._ids[position] != index:
            raise KeyError(index)
        rendered, *_ = content = self._text[position].tobytes().rstrip(b"\xff")
        return Rendered.unpack(content[1:]) if rendered else content[1:].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids.tolist())

    @property
    def digest(self) -> str:
        """Hash of all texts, with the conversations that they were written from."""
        return hashes.of_buffers([self._text.values, self._text.offsets]).hex()

    def __len__(self) -> int:
        return len(self._ids)


def tokenize_prompts(
    prompts: Sequence[Record | str],
    tokenizer: Encoder,
    *,
    max_tokens: int,
    vocab_size: int | None = None,
    overlong: Overlong = "drop",
    truncation_side: TruncationSide = "right",
    on_bad_record: OnBadRecord = "raise",
) -> tuple[TokenRecords, DropReport]:
    """Encode prompts; completions are left out. The arguments are those of `tokenize_completions`."""
    bare = [
        Record(index, record) if isinstance(record, str) else replace(record, completions=(), preference=1.0)
        for index, record in enumerate(prompts)
    ]
    return tokenize_completions(
        bare,
        tokenizer,
        max_prompt_tokens=max_tokens,
        max_completion_tokens=1,
        vocab_size=vocab_size,
        overlong=overlong,
        truncation_side=truncation_side,
        on_bad_record=on_bad_record,
    )


def tokenize_completions(
    records: Sequence[Record],
    tokenizer: Encoder,
    *,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    vocab_size: int | None = None,
    overlong: Overlong = "drop",
    truncation_side: TruncationSide = "right",
    on_bad_record: OnBadRecord = "raise",
) -> tuple[TokenRecords, DropReport]:
    """Encode supervised examples or preference pairs.

    Args:
      records: all with the same number of completions.
      tokenizer: encodes; a completion gets its EOS from it.
      max_prompt_tokens: limit of a prompt, at least 1.
      max_completion_tokens: limit of a completion with its EOS, at least 1.
      vocab_size: ids are below it; None for the tokenizer's own.
      overlong: for a record over a limit: "drop" counts it ("prompt too long", "completion too long"), "raise" raises,
        "truncate" cuts it and counts it as truncated: a chat loses its oldest turns, or is dropped where it has one
        alone; any other prompt keeps what the post-processor adds, and its first or last tokens; a completion keeps its
        first tokens and has no EOS, like a sampled one that ran into the limit.
      truncation_side: of prompts that are cut: "right" keeps the first tokens, "left" the last.
      on_bad_record: for a record without tokens, with an id outside the vocabulary, or whose completions are the same
        tokens: "raise", "skip" (counted), or "warn" (counted, one warning). Those that only cutting makes the same are
        counted.

    Returns:
      The tokens in the order of the records, and the account of those dropped.

    Raises:
      DataError: a record that the policies refuse; the message names its place in the source.
      ValueError: a limit below 1, an unknown policy, or mixed numbers of completions.
    """
    stream = TokenStream(
        records,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        max_completion_tokens=max_completion_tokens,
        vocab_size=vocab_size,
        overlong=overlong,
        truncation_side=truncation_side,
        on_bad_record=on_bad_record,
    )
    return TokenRecords.joined(list(stream)), stream.report


class TokenStream:
    """The tokens of `tokenize_completions` in parts, for records that do not fit into memory.

    Takes `chunk` records at a time from where they come, a `RecordStream` say, and encodes them together. What a record
    becomes does not depend on the chunk it lies in.

    Args:
      records: all with the same number of completions.
      tokenizer: as for `tokenize_completions`, as are the others.
      max_prompt_tokens: limit of a prompt.
      max_completion_tokens: limit of a completion with its EOS.
      vocab_size: ids are below it.
      overlong: what becomes of a record over a limit.
      truncation_side: of prompts that are cut.
      on_bad_record: what becomes of a bad one. The warning of "warn" comes with the last record.
      chunk: records that are encoded together, at least 1.

    Raises:
      DataError: from the iterator, as `tokenize_completions` does.
      ValueError: a limit or chunk below 1, an unknown policy; from the iterator, mixed numbers of completions.
    """

    def __init__(
        self,
        records: Iterable[Record],
        tokenizer: Encoder,
        *,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        vocab_size: int | None = None,
        overlong: Overlong = "drop",
        truncation_side: TruncationSide = "right",
        on_bad_record: OnBadRecord = "raise",
        chunk: int = CHUNK,
    ) -> None:
        sizes = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens, "chunk": chunk}
        for name, limit in sizes.items():
            if limit < 1:
                raise ValueError(
                    f"{name} must be at least 1, but received {limit}. Give the number of tokens that fit."
                )
        if overlong not in ("drop", "raise", "truncate"):
            raise ValueError(
                f"overlong must be 'drop', 'raise' or 'truncate', but received {overlong!r}. Choose one of them."
            )
        self._limits = (max_prompt_tokens, max_completion_tokens)
        self._tokenizer = tokenizer
        self._seams = tokenizer if isinstance(tokenizer, SeamEncoder) else None
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._overlong = overlong
        self._side: TruncationSide = truncation_side
        self._ledger = Ledger("tokenization", on_bad_record)
        self._parts = self._encode(iter(records), chunk)

    def __iter__(self) -> Iterator[TokenRecords]:
        return self

    def __next__(self) -> TokenRecords:
        return next(self._parts)

    @property
    def report(self) -> DropReport:
        """The account of what has been encoded so far."""
        return self._ledger.account()

    def _encode(self, records: Iterator[Record], chunk: int) -> Iterator[TokenRecords]:
        counts: set[int] = set()
        while part := list(islice(records, chunk)):
            counts |= {len(record.completions) for record in part}
            if len(counts) > 1:
                raise ValueError(
                    f"records must have one number of completions, but received {sorted(counts)}. Tokenize each kind "
                    f"apart."
                )
            yield self._part(part, max(counts))
        self._ledger.close()

    def _part(self, records: list[Record], completions: int) -> TokenRecords:
        limits = (self._limits[0], *[self._limits[1]] * completions)
        kept: list[Record] = []
        rows: list[list[list[int]]] = []
        known = self._recognised(records)
        for record, row in zip(known, self._rows(known, completions), strict=True):
            place = f"record {record.id}"
            long = _overlong(row, limits)
            found: tuple[Record, list[list[int]]] | None = (record, row)
            if long is not None and self._overlong == "truncate":
                found = self._shortened(record, row, limits)
            try:
                _check(row if found is None else found[1], self._vocab_size)
            except BadRecord as bad:
                cut_alike = bad.reason == IDENTICAL and row[1] != row[2]
                self._ledger.drop(place, bad, counted=True if cut_alike else None)
                continue
            if long is not None and (found is None or self._overlong != "truncate"):
                self._ledger.drop(place, long, counted=self._overlong != "raise")
                continue
            self._ledger.truncated += long is not None
            kept.append(found[0] if found else record)
            rows.append(found[1] if found else row)
        ragged = [Ragged.from_rows([row[column] for row in rows]) for column in range(len(limits))]
        return TokenRecords(
            ragged[0],
            tuple(ragged[1:]),
            np.asarray([record.preference for record in kept], np.float32),
            np.asarray([record.id for record in kept], np.int64),
            None if completions else PromptTexts.pack(record.prompt for record in kept),
        )

    def _recognised(self, records: list[Record]) -> list[Record]:
        """The records, those marked that a template wrote before they came from a file; refused ones are counted."""
        known: list[Record] = []
        for record in records:
            self._ledger.read += 1
            try:
                prompt = record.prompt if self._seams is None else self._seams.recognised(record.prompt)
            except DataError as error:
                self._ledger.drop(f"record {record.id}", BadRecord("bad conversation", str(error)))
                continue
            if isinstance(prompt, Rendered) and prompt is not record.prompt:
                # What stands beside it in the file was written by the template too.
                completions = tuple(map(Rendered, record.completions))
                record = replace(record, prompt=prompt, completions=completions)
            known.append(record)
        return known

    def _rows(self, records: list[Record], completions: int) -> list[list[list[int]]]:
        prompts = [record.prompt for record in records]
        if completions and self._seams is not None:
            return self._seams.encode_records(prompts, [record.completions for record in records])
        columns = [self._tokenizer.encode_prompts(prompts)]
        for k in range(completions):
            columns.append(self._tokenizer.encode_completions([record.completions[k] for record in records]))
        return [list(row) for row in zip(*columns, strict=True)]

    def _shortened(
        self, record: Record, row: list[list[int]], limits: Sequence[int]
    ) -> tuple[Record, list[list[int]]] | None:
        """A record cut to the limits, or None where its prompt cannot be."""
        if len(row[0]) > limits[0]:
            found = shortened(record.prompt, row[0], self._tokenizer, limits[0], self._side)
            if found is None:
                return None
            if found[0] != record.prompt:
                record = replace(record, prompt=found[0])
                (row,) = self._rows([record], len(row) - 1)
            else:
                row = [found[1], *row[1:]]
        return record, [tokens[:limit] for tokens, limit in zip(row, limits, strict=True)]


def shortened(
    prompt: str, tokens: list[int], tokenizer: Encoder, limit: int, side: TruncationSide
) -> tuple[str, list[int]] | None:
    """A prompt cut to a number of tokens, and these; None where no turn is left to take out, or no room for any text.

    Args:
      prompt: the text.
      tokens: its token ids, more than `limit`.
      tokenizer: of the prompt.
      limit: the most tokens.
      side: where text is cut that is no chat.
    """
    if isinstance(prompt, Rendered):
        shorter: Rendered | None = prompt
        while shorter is not None and len(tokens) > limit:
            template = shorter.template or getattr(tokenizer, "template", None)
            shorter = None if template is None else template.shorter(shorter)
            if shorter is not None:
                (tokens,) = tokenizer.encode_prompts([shorter])
        return None if shorter is None else (shorter, tokens)
    begin, end = tokenizer.affixes if isinstance(tokenizer, SeamEncoder) else (0, 0)
    text, room = tokens[begin : len(tokens) - end], limit - begin - end
    if room < 1:
        return None
    text = text[:room] if side == "right" else text[-room:]
    return prompt, [*tokens[:begin], *text, *tokens[len(tokens) - end :]]


def fit_prompts(
    prompts: Sequence[str],
    tokenizer: Encoder,
    *,
    max_prompt_tokens: int,
    truncation_side: TruncationSide = "right",
) -> list[list[int]]:
    """Token ids of prompts that are all written to or judged: those above the limit are cut, and that is said.

    Args:
      prompts: N texts.
      tokenizer: of the model that reads them.
      max_prompt_tokens: the most tokens of each.
      truncation_side: where a text is cut; a chat loses its oldest turns.

    Raises:
      DataError: a chat has no turn that could be left out.

    Warns:
      CutWarning: some were cut.
    """
    encoded = tokenizer.encode_prompts(list(prompts))
    longest = max(map(len, encoded), default=0)
    long = [index for index, tokens in enumerate(encoded) if len(tokens) > max_prompt_tokens]
    for index in long:
        prompt = tokenizer.recognised(prompts[index]) if isinstance(tokenizer, SeamEncoder) else prompts[index]
        found = shortened(prompt, encoded[index], tokenizer, max_prompt_tokens, truncation_side)
        if found is None:
            raise DataError(
                f"a prompt must have at most {max_prompt_tokens} tokens, or older turns that can be left out, but "
                f"received prompt {index} with {len(encoded[index])}. Raise max_prompt_tokens, or leave it out."
            )
        encoded[index] = found[1]
    if long:
        warnings.warn(
            f"{len(long)} of {len(prompts)} prompts ({share(len(long), len(prompts))}) are cut to "
            f"max_prompt_tokens={max_prompt_tokens}; the longest has {longest} tokens",
            CutWarning,
            stacklevel=3,
        )
    return encoded


def _overlong(row: list[list[int]], limits: Sequence[int]) -> BadRecord | None:
    for column, (tokens, limit) in enumerate(zip(row, limits, strict=True)):
        if len(tokens) > limit:
            side = "completion" if column else "prompt"
            return BadRecord(
                f"{side} too long",
                f"a {side} must have at most {limit} tokens, but received {len(tokens)}",
                max(map(len, row[1:])) if column else len(tokens),
            )
    return None


def _check(row: list[list[int]], vocab_size: int) -> None:
    for column, tokens in enumerate(row):
        side = "completion" if column else "prompt"
        if not tokens:
            raise BadRecord(f"empty {side}", f"a {side} must have at least one token, but received none")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= vocab_size:
            raise BadRecord(
                "token outside the vocabulary",
                f"token ids must be in [0, {vocab_size}), but received {low if low < 0 else high} in a {side}",
            )
    if len(row) == 3 and row[1] == row[2]:
        raise BadRecord(IDENTICAL, "chosen and rejected must differ in their tokens")
