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
from jaxtyping import Int32, Int64

from fastpref.data import _native
from fastpref.data.batches import CompletionBatch, PromptBatch
from fastpref.data.columns import Numbers, Rows, check_lengths, column, fingerprint, per_record, preferences, ragged
from fastpref.method.errors import DataError

Shape = tuple[int, int]
"""Padded prompt and completion tokens of a batch; the second is 0 where there are no completions."""
Batch = TypeVar("Batch", PromptBatch, CompletionBatch)
Own = TypeVar("Own", bound="_Batcher[Any]")

SIDE_MULTIPLE = 8
"""Chosen sides are multiples of it, except where the limit is not."""


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
            raise DataError("there must be at least one record, got none. The drop report says where they went.")
        self._columns: dict[str, _native.Column] = {
            name: column(name, rows, self.num_records, vocab_size) for name, rows in tables.items()
        }
        self._ids: np.ndarray = per_record(
            "ids", range(self.num_records) if ids is None else ids, np.int64, self.num_records
        )
        self._preference: np.ndarray = preferences(preference, self.num_records)
        lengths = {name: column.lengths() for name, column in self._columns.items()}
        (max_prompt, *rest) = limits.items()
        for name, of_column in lengths.items():
            check_lengths(name, of_column, *(max_prompt if name == "prompts" else rest[0]))
        longest = np.maximum.reduce([lengths[name] for name in completions]) if completions else np.zeros(0, np.int32)
        if shapes is None:
            shapes = _native.choose_shapes(
                lengths["prompts"],
                longest,
                completions=len(completions),
                max_shapes=max_shapes,
                multiple=SIDE_MULTIPLE,
                max_prompt=max_prompt[1],
                max_completion=rest[0][1] if completions else 0,
            )
        self.shapes: tuple[Shape, ...] = tuple((prompt, completion) for prompt, completion in shapes)
        """Padded sides (S, T) of the batches, from small to large; T is 0 for prompts alone."""
        self._shape_of = _native.assign_shapes(lengths["prompts"], longest, self.shapes)
        self.batch_size = batch_size
        self._identity: dict[str, Any] = {
            "fingerprint": fingerprint(tables, self._ids, self._preference),
            "records": self.num_records,
            "seed": seed,
            "batch_size": batch_size,
            "completions": len(completions),
            "shapes": self.shapes,
        }
        self._seed = seed
        self.batches_done = 0
        """Batches handed out since the beginning."""
        self._plan: tuple[int, Int64[np.ndarray, "M P"], Int32[np.ndarray, " M"]] | None = None
        self._closed: bool = False
        # Refuses a batch size or seed that is out of range before the first batch does.
        self.state()

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
            rows, shapes = _native.plan_epoch(
                self._shape_of, num_shapes=len(self.shapes), batch_size=self.batch_size, seed=self._seed, epoch=epoch
            )
            self._plan = (epoch, rows, shapes)
        _, rows, shapes = self._plan
        at = self.batches_done - self._first_batch(epoch)
        batch = self._assemble(rows[at], _native.take(self._ids, rows[at]), self.shapes[shapes[at]])
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
            ids = _native.take(self._ids, rows)
            if missing:
                ids = np.concatenate([ids, np.full(missing, -1)])
                rows = np.concatenate([rows, np.full(missing, start)])
            yield self._assemble(rows, ids, self.shapes[self._shape_of[rows].max()])

    def state(self) -> bytes:
        """Where the next batch is taken from, in at most 336 bytes: what `restore` continues at."""
        return _native.encode_state(self.batches_done, **self._identity)

    def restore(self, state: bytes) -> None:
        """Continue exactly where `state` was taken, in whatever process.

        Raises:
          DataError: the state is damaged, or of other data, seed, batch size, shapes or format; the message says which.
        """
        self._check_open()
        try:
            self.batches_done = _native.decode_state(state, **self._identity)
        except ValueError as error:
            raise DataError(str(error)) from None

    def close(self) -> None:
        """Let go of the data. Batches that were handed out stay valid."""
        self._closed = True
        self._columns = {}
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
            raise ValueError("a batcher must be open to hand out batches, got a closed one; make another")

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
        tokens, lengths = _native.gather([self._columns["prompts"]], rows, shape[0])
        return PromptBatch(tokens[:, 0], lengths[:, 0], ids)


class _RecordedBatcher(_Batcher[CompletionBatch]):
    def _assemble(self, rows: Int64[np.ndarray, " P"], ids: Int64[np.ndarray, " P"], shape: Shape) -> CompletionBatch:
        prompts, *completions = self._columns.values()
        prompt_tokens, prompt_lengths = _native.gather([prompts], rows, shape[0])
        tokens, lengths = _native.gather(completions, rows, shape[1])
        preference = _native.take(self._preference, rows)
        return CompletionBatch(prompt_tokens[:, 0], prompt_lengths[:, 0], tokens, lengths, preference, ids)


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
