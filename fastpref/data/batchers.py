"""Padded batches of token ids in few static shapes: seeded, exactly resumable, taken without a copy.

The order is one endless stream: a seeded permutation of the N records for epoch 0, another for epoch 1, and so on. The
batches of an epoch finish its part of the stream; the last of them is filled up from the head of the next epoch, which
begins after those records. So every batch is full, and the batches of epochs 0 to e hold each record e + 1 times, plus
the fewer than `batch_size` places that were taken ahead. Within an epoch, records of similar length share a batch, and
the batches are permuted.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int64

from fastpref.data import padding, state
from fastpref.data.batches import CompletionBatch, PromptBatch
from fastpref.data.columns import Numbers, Rows, check_lengths, column, fingerprint, per_record, preferences, ragged
from fastpref.data.padding import Shape
from fastpref.data.ragged import Ragged
from fastpref.method.errors import ClosedError, ConfigError, DataError

Batch = TypeVar("Batch", PromptBatch, CompletionBatch)
Own = TypeVar("Own", bound="_Batcher[Any]")

ALIGNMENT = 64
"""JAX takes arrays without a copy at multiples of it."""


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ConfigError(
            f"{name} must be an integer in [{low}, {high}], but received {value!r}. Choose one of these numbers."
        )
    return int(value)


def _aligned(values: np.ndarray) -> np.ndarray:
    """A read-only copy that JAX takes as it is."""
    memory = np.empty(values.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    copy.flags.writeable = False
    return copy


def _padded(tables: Sequence[Ragged], records: Int64[np.ndarray, " P"], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of K columns, [P, K, width], zeros past the end, and their lengths, [P, K], both int32."""
    tokens = np.zeros((len(records), len(tables), width), np.int32)
    lengths = np.zeros((len(records), len(tables)), np.int32)
    for k, table in enumerate(tables):
        starts, ends = table.offsets[records], table.offsets[records + 1]
        places = starts[:, None] + np.arange(width)
        real = places < ends[:, None]
        tokens[:, k][real] = table.values[places[real]]
        lengths[:, k] = ends - starts
    return _aligned(tokens), _aligned(lengths)


class _Batcher(ABC, Generic[Batch]):
    """What every batcher does. One thread at a time."""

    def __init__(
        self,
        prompts: Rows,
        completions: Mapping[str, Rows],
        *,
        batch_size: int,
        limits: Mapping[str, int],
        seed: int,
        max_shapes: int,
        shapes: Sequence[Shape] | None,
        ids: Numbers | None,
        preference: Numbers | None,
        vocab_size: int | None,
    ) -> None:
        tables = {"prompts": ragged(prompts)} | {name: ragged(rows) for name, rows in completions.items()}
        self.num_records: int = len(tables["prompts"])
        """N."""
        if self.num_records == 0:
            raise DataError(
                "there must be at least one record, but received none. The drop report says where they went."
            )
        for name, rows in tables.items():
            column(name, rows, self.num_records, vocab_size)
        self._tables: dict[str, Ragged] = tables
        self._ids: np.ndarray = per_record(
            "ids", range(self.num_records) if ids is None else ids, np.int64, self.num_records
        )
        self._preference: np.ndarray = preferences(preference, self.num_records)
        lengths = {name: np.diff(rows.offsets).astype(np.int32) for name, rows in tables.items()}
        (max_prompt, *rest) = limits.items()
        for name, of_column in lengths.items():
            check_lengths(name, of_column, *(max_prompt if name == "prompts" else rest[0]))
        longest = np.maximum.reduce([lengths[name] for name in completions] or [np.zeros(self.num_records, np.int32)])
        _whole("max_shapes", max_shapes, 1, padding.MAX_SHAPES)
        self.shapes: tuple[Shape, ...] = (
            padding.choose_shapes(
                lengths["prompts"],
                longest,
                group=len(completions),
                max_shapes=max_shapes,
                limit=(max_prompt[1], rest[0][1] if completions else 0),
            )
            if shapes is None
            else padding.check_shapes(shapes)
        )
        """Padded sides (S, T) of the batches, from small to large; T is 0 for prompts alone."""
        self._shape_of = padding.assign_shapes(lengths["prompts"], longest, self.shapes)
        self.batch_size: int = _whole("batch_size", batch_size, 1, 2**31 - 1)
        self._seed = _whole("seed", seed, 0, 2**64 - 1)
        self._identity: dict[str, Any] = {
            "number of completions": len(completions),
            "number of records": self.num_records,
            "data fingerprint": fingerprint(tables, self._ids, self._preference).hex(),
            "seed": self._seed,
            "batch_size": self.batch_size,
            "set of shapes": [list(shape) for shape in self.shapes],
            "plan version": padding.PLAN_VERSION,
        }
        self.batches_done = 0
        """Batches handed out since the beginning."""
        self._plan: tuple[int, Int64[np.ndarray, "M P"], Int64[np.ndarray, " M"]] | None = None
        self._closed: bool = False

    @property
    def epoch(self) -> int:
        """Epoch that the next batch belongs to."""
        return self.batches_done * self.batch_size // self.num_records

    def batches_in(self, epoch: int) -> int:
        """Number of batches of an epoch; it differs by at most one between epochs."""
        return self._first_batch(epoch + 1) - self._first_batch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._check_open()
        epoch = self.epoch
        if self._plan is None or self._plan[0] != epoch:
            rows, shapes = padding.plan_epoch(self._shape_of, batch_size=self.batch_size, seed=self._seed, epoch=epoch)
            self._plan = (epoch, rows, shapes)
        _, rows, shapes = self._plan
        at = self.batches_done - self._first_batch(epoch)
        batch = self._assemble(rows[at], self._ids[rows[at]], self.shapes[shapes[at]])
        self.batches_done += 1
        return batch

    def in_order(self, *, pad: bool = False) -> Iterator[Batch]:
        """Hand out every record once, in the order of the source; the endless order is not touched.

        Args:
          pad: fill the last batch up to `batch_size` with copies of its first record under the id -1, so that no new
            shape is compiled for it; otherwise it is as short as it comes.

        Yields:
          Batches, each in the smallest shape that holds it.
        """
        for start in range(0, self.num_records, self.batch_size):
            self._check_open()
            rows = np.arange(start, min(start + self.batch_size, self.num_records))
            missing = self.batch_size - len(rows) if pad else 0
            ids = self._ids[rows]
            if missing:
                ids = np.concatenate([ids, np.full(missing, -1)])
                rows = np.concatenate([rows, np.full(missing, start)])
            yield self._assemble(rows, ids, self.shapes[self._shape_of[rows].max()])

    def state(self) -> bytes:
        """Where the next batch is taken from, in a few hundred bytes: what `restore` continues at."""
        return state.encode(self._identity, {"batches": self.batches_done})

    def restore(self, saved: bytes, /) -> None:
        """Continue exactly where `saved` was taken, in whatever process.

        Raises:
          DataError: the state is damaged, or of other data, seed, batch size, shapes or format; the message says which.
        """
        self._check_open()
        self.batches_done = state.decode(saved, self._identity)["batches"]

    def close(self) -> None:
        """Let go of the data. Batches that were handed out stay valid."""
        self._closed = True
        self._tables = {}
        self._plan = None

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _assemble(self, rows: Int64[np.ndarray, " P"], ids: Int64[np.ndarray, " P"], shape: Shape) -> Batch: ...

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("a batcher must be open to hand out batches, but received a closed one. Make another.")

    def _first_batch(self, epoch: int) -> int:
        return -(-epoch * self.num_records // self.batch_size)


class PromptBatcher(_Batcher[PromptBatch]):
    """Endless iterator over batches of prompts.

    Args:
      prompts: token ids of N records, each with 1 to `max_tokens` of them.
      batch_size: P, prompts in every batch, at least 1. With more than N, a batch holds some prompts several times.
      max_tokens: limit of a prompt.
      seed: of the order, in [0, 2^64). The same arguments give the same batches on every machine.
      max_shapes: at most so many widths, 1 to 32, are chosen for the fewest padded tokens.
      widths: the widths to use instead, growing; the last must hold the longest prompt.
      ids: name of each record, for `PromptBatch.ids`; None for its position.
      vocab_size: ids must be below it; None checks only that they are not negative.

    Raises:
      DataError: a record breaks a limit; the message names it.
      ValueError: a setting out of range.
    """

    def __init__(
        self,
        prompts: Rows,
        *,
        batch_size: int,
        max_tokens: int,
        seed: int = 0,
        max_shapes: int = 4,
        widths: Sequence[int] | None = None,
        ids: Numbers | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(
            prompts,
            {},
            batch_size=batch_size,
            limits={"max_tokens": max_tokens},
            seed=seed,
            max_shapes=max_shapes,
            shapes=None if widths is None else [(width, 0) for width in widths],
            ids=ids,
            preference=None,
            vocab_size=vocab_size,
        )

    def _assemble(self, rows: Int64[np.ndarray, " P"], ids: Int64[np.ndarray, " P"], shape: Shape) -> PromptBatch:
        tokens, lengths = _padded([self._tables["prompts"]], rows, shape[0])
        return PromptBatch(tokens[:, 0], lengths[:, 0], _aligned(ids))


class _RecordedBatcher(_Batcher[CompletionBatch]):
    def _assemble(self, rows: Int64[np.ndarray, " P"], ids: Int64[np.ndarray, " P"], shape: Shape) -> CompletionBatch:
        prompts, *completions = self._tables.values()
        prompt_tokens, prompt_lengths = _padded([prompts], rows, shape[0])
        tokens, lengths = _padded(completions, rows, shape[1])
        preference = _aligned(self._preference[rows])
        return CompletionBatch(prompt_tokens[:, 0], prompt_lengths[:, 0], tokens, lengths, preference, _aligned(ids))


class CompletionBatcher(_RecordedBatcher):
    """Endless iterator over batches of supervised examples: prompts with one completion each (K is 1).

    Args:
      prompts: token ids of N records.
      completions: token ids of the completion of each, its EOS included.
      batch_size: P, records in every batch, at least 1.
      max_prompt_tokens: limit of a prompt.
      max_completion_tokens: limit of a completion.
      seed: of the order, in [0, 2^64).
      max_shapes: at most so many shapes, 1 to 32, are chosen for the fewest padded tokens.
      shapes: the (prompt, completion) sides to use instead, growing on both; the last must hold every record.
      ids: name of each record, for `CompletionBatch.ids`; None for its position.
      vocab_size: ids must be below it; None checks only that they are not negative.

    Raises:
      DataError: a record breaks a limit; the message names it.
      ValueError: a setting out of range.
    """

    def __init__(
        self,
        prompts: Rows,
        completions: Rows,
        *,
        batch_size: int,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        seed: int = 0,
        max_shapes: int = 4,
        shapes: Sequence[Shape] | None = None,
        ids: Numbers | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(
            prompts,
            {"completions": completions},
            batch_size=batch_size,
            limits={"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens},
            seed=seed,
            max_shapes=max_shapes,
            shapes=shapes,
            ids=ids,
            preference=None,
            vocab_size=vocab_size,
        )


class PaddedPairBatcher(_RecordedBatcher):
    """Endless iterator over padded batches of preference pairs (K is 2: `chosen`, then `rejected`).

    For models that judge whole completions. To train a policy on pairs, `PairBatcher` packs them without padding.

    Args:
      prompts: token ids of N records.
      chosen: token ids of the first completion of each, its EOS included.
      rejected: token ids of the second.
      preference: probability that the first beats the second, in [0, 1]; None for 1.
      batch_size: see `CompletionBatcher`, as for all others.
      max_prompt_tokens: limit of a prompt.
      max_completion_tokens: limit of a completion.
      seed: of the order.
      max_shapes: at most so many shapes are chosen.
      shapes: the shapes to use instead.
      ids: name of each record.
      vocab_size: ids must be below it.

    Raises:
      DataError: a record breaks a limit; the message names it.
      ValueError: a setting out of range.
    """

    def __init__(
        self,
        prompts: Rows,
        chosen: Rows,
        rejected: Rows,
        preference: Numbers | None = None,
        *,
        batch_size: int,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        seed: int = 0,
        max_shapes: int = 4,
        shapes: Sequence[Shape] | None = None,
        ids: Numbers | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(
            prompts,
            {"chosen": chosen, "rejected": rejected},
            batch_size=batch_size,
            limits={"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens},
            seed=seed,
            max_shapes=max_shapes,
            shapes=shapes,
            ids=ids,
            preference=preference,
            vocab_size=vocab_size,
        )
