"""Whole preference pairs packed into rows of fixed size: offline from a data set, online from one step's completions.

Both pairs of tokens and their prompt always share a row, so that a loss over pairs never waits for another row; rows
have few static shapes, so that few programs are compiled. Rows are filled best-fit, the largest pairs first, from pairs
that come one after another in a seeded order: those of one batch, or of a window from which full rows are made.
"""

import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64

from fastpref.data import _native, hashes, state
from fastpref.data.batches import PackedPairs
from fastpref.data.columns import Numbers, Rows, column, fingerprint, per_record, preferences, ragged
from fastpref.data.ragged import Ragged
from fastpref.data.records import DropReport
from fastpref.data.row_shapes import RowShape, batch_shapes, row_counts
from fastpref.method.errors import DataError, require

Layout = Literal["shared", "separate", "encoder-decoder"]
"""Where the tokens of a pair lie in a row: see `PackedPairs`."""
Own = TypeVar("Own", bound="PairBatcher")

MAX_PAIRS = 32
MAX_BATCH = 65536
TOO_LONG = "pair too long for a row"
PLAN_VERSION = 1
"""Counts changes of csrc/pair_plan.cc that give the same arguments another order: a state of the old one is refused."""


class PairBatcher:
    """Endless iterator over packed batches of preference pairs, each `PackedPairs` on the host.

    With `batch_size`, the order is as with `PromptBatcher`: a permutation for each epoch, one after another. Each
    `batch_size` consecutive pairs are a batch, the last of an epoch filled up from the head of the next. Packing
    decides only how many rows a batch has: the first of the `shapes` that holds them.

    With `rows` instead, batches are full rows and hold as many pairs as that takes, for trainers that weigh tokens
    alike. Every epoch hands out every pair exactly once; its last batch, and that of each shape, may have empty rows.

    Either way batches are a pure function of the lengths, the seed, the epoch and the settings of the packing. Neither
    threads nor prefetching nor the number of hosts change what a batch is. Arrays are read-only, begin at multiples of
    64 bytes, so that JAX takes them without a copy, and own their memory: it is used again when nothing refers to any
    of them. `close()` ends the threads; so does the end of a `with` block and that of the process.

    Args:
      prompts: token ids of N records.
      chosen: token ids of the first completion of each, its EOS included.
      rejected: token ids of the second.
      preference: probability that the first beats the second, in [0, 1]; None for 1.
      batch_size: P, pairs in every batch, 1 to 65536. With more than N, a batch holds some pairs several times.
      rows: R, rows in a batch, where they are filled; give this or `batch_size`.
      row_tokens: L, places in a row.
      prompt_row_tokens: S, places of a row in the encoder's stream; for the "encoder-decoder" layout alone.
      max_shapes: at most so many numbers of rows, 1 to 32, are chosen for the batches of the first epoch, with
        `batch_size`. A later batch that needs more gets the next of `row_counts`.
      multiple: divides these numbers of rows: devices, hosts or parts that share a batch.
      tail: with `rows`, larger shapes for the pairs that do not fit, growing: (rows, row_tokens), or (rows, row_tokens,
        prompt_row_tokens) with an encoder. Each is compiled anew.
      layout: "shared" (the prompt once for both completions), "separate" or "encoder-decoder"; see `PackedPairs`.
      decoder_start: first decoder input of an encoder-decoder model.
      max_pairs_per_row: M, at least 1; None for 32, or for `batch_size` where that is less.
      window: with `rows`, pairs that are packed together, 1 to 65536.
      seed: of the order, in [0, 2^64).
      overlong: what to do with a pair that fits no shape: "raise", or "drop" and count it in `report`.
      ids: name of each record, for `PackedPairs.ids`; None for its position.
      ref_logps: log π_ref of both completions of each record, shape [N, 2], where it is known already.
      vocab_size: ids must be below it; None checks only that they are not negative.
      tokenizer_hash: of the tokenizer that made the ids; a saved state of another is refused.
      host: which of the `hosts` this is; it gets its rows of every batch.
      hosts: divides the rows of every shape.
      threads: threads that assemble batches.
      prefetch: batches assembled ahead; with 0 there are no threads.

    Raises:
      DataError: a record breaks a rule; the message names it.
      ValueError: a setting out of range.
    """

    def __init__(
        self,
        prompts: Rows,
        chosen: Rows,
        rejected: Rows,
        preference: Numbers | None = None,
        *,
        batch_size: int | None = None,
        rows: int | None = None,
        row_tokens: int,
        prompt_row_tokens: int | None = None,
        max_shapes: int = 4,
        multiple: int = 1,
        tail: Sequence[tuple[int, ...]] = (),
        layout: Layout = "shared",
        decoder_start: int | None = None,
        max_pairs_per_row: int | None = None,
        window: int = 1024,
        seed: int = 0,
        overlong: Literal["raise", "drop"] = "raise",
        ids: Numbers | None = None,
        ref_logps: Float[np.ndarray, "N 2"] | None = None,
        vocab_size: int | None = None,
        tokenizer_hash: str | bytes = b"",
        host: int = 0,
        hosts: int = 1,
        threads: int = 1,
        prefetch: int = 2,
    ) -> None:
        if overlong not in ("raise", "drop"):
            raise ValueError(f"overlong must be 'raise' or 'drop', but received {overlong!r}. Choose one of them.")
        require(
            (batch_size is None) != (rows is None) and not (batch_size and tail),
            "batch_size or rows must be given, one of them, and tail with rows alone",
            {"batch_size": batch_size, "rows": rows, "tail": tail},
            "Give batch_size for so many pairs in every batch, rows for full rows.",
        )
        require(
            batch_size is None or 1 <= batch_size <= MAX_BATCH,
            f"batch_size must be in [1, {MAX_BATCH}]",
            batch_size,
            "Choose one of these numbers.",
        )
        most = min(MAX_PAIRS, batch_size or MAX_PAIRS) if max_pairs_per_row is None else max_pairs_per_row
        self.shapes: tuple[RowShape, ...]
        """Rows, places and encoder places of a batch, from small to large."""
        tables = {"prompts": ragged(prompts), "chosen": ragged(chosen), "rejected": ragged(rejected)}
        count = len(tables["prompts"])
        if count == 0:
            raise DataError(
                "there must be at least one record, but received none. The drop report says where they went."
            )
        columns = [column(name, of_rows, count, vocab_size) for name, of_rows in tables.items()]
        names = per_record("ids", range(count) if ids is None else ids, np.int64, count)
        chances = preferences(preference, count)
        logps = _ref_logps(ref_logps, count)
        encoder, start = _encoder(layout, prompt_row_tokens, decoder_start)
        sizes = _sizes(columns, layout)
        largest = _shape(tail[-1], encoder)[1:] if tail else (row_tokens, encoder)
        fitting = np.all(sizes <= np.asarray(largest), axis=1)
        if not fitting.all() and (overlong == "raise" or not fitting.any()):
            _refuse(sizes, fitting, largest, counted=rows is None)
        dropped = np.flatnonzero(~fitting)
        if rows is not None:
            self.shapes = ((rows, row_tokens, encoder), *(_shape(one, encoder) for one in tail))
        elif batch_size is not None:
            self.shapes, _ = batch_shapes(
                sizes[fitting],
                batch_size=batch_size,
                row_tokens=row_tokens,
                prompt_row_tokens=encoder,
                max_pairs_per_row=most,
                max_shapes=max_shapes,
                multiple=multiple,
                seed=seed,
            )
        self._loader = _native.PairLoader(
            columns[0],
            columns[1],
            columns[2],
            chances,
            logps,
            names,
            layout=layout,
            decoder_start=start,
            shapes=self.shapes,
            batch_pairs=batch_size or 0,
            max_pairs_per_row=most,
            window=window,
            seed=seed,
            records=np.flatnonzero(fitting).astype(np.int32) if len(dropped) else np.zeros(0, np.int32),
            host=host,
            hosts=hosts,
            threads=threads,
            prefetch=prefetch,
        )
        self._identity = {
            "tokenizer hash": hashes.of_bytes(
                tokenizer_hash.encode() if isinstance(tokenizer_hash, str) else tokenizer_hash
            ),
            "number of pairs": count - len(dropped),
            "data fingerprint": fingerprint(tables, names, chances, logps).hex(),
            "seed": int(seed),
            "layout": layout,
            "decoder_start": start,
            "batch_size": None if batch_size is None else int(batch_size),
            "max_pairs_per_row": int(most),
            "window": int(window),
            "set of shapes (rows, row_tokens, prompt_row_tokens)": [list(map(int, shape)) for shape in self.shapes],
            "plan version": PLAN_VERSION,
        }
        self._batch_size: int | None = batch_size
        self.dropped_ids: Int64[np.ndarray, " D"] = names[dropped]
        """Names of the records that fit no shape."""
        self.report = DropReport(count, count - len(dropped), {TOO_LONG: len(dropped)} if len(dropped) else {})
        """What became of every record: each delivered once an epoch, or dropped."""
        # Threads that are left at the end of the process would be cut off in the middle of their work.
        self._close = weakref.finalize(self, self._loader.close)

    @property
    def epoch(self) -> int:
        """Epoch that the next batch, or its first pair, belongs to."""
        epoch, done, batches, _ = self._loader.position()
        if self._batch_size is None:
            return epoch + (done == batches)
        before = -(-epoch * self.report.delivered // self._batch_size)
        return (before + done) * self._batch_size // self.report.delivered

    def batches_in(self, epoch: int) -> int:
        """Number of batches of an epoch; it may differ a little between epochs. Plans the epoch."""
        return self._loader.measure(epoch)[0]

    def padding(self, epoch: int) -> float:
        """Share of the decoder's places that hold no token in an epoch. Plans the epoch."""
        _, _, places, used = self._loader.measure(epoch)
        return 1 - used / places

    def __iter__(self) -> Iterator[PackedPairs]:
        return self

    def __next__(self) -> PackedPairs:
        return PackedPairs._make(self._loader.next())

    def state(self) -> bytes:
        """Where the next batch is taken from, in less than 1 KB: what `restore` continues at.

        It counts the batches that were handed out, never those assembled ahead, and is that of all hosts.
        """
        epoch, batch, _, plan = self._loader.position()
        return state.encode(self._identity, {"epoch": epoch, "batch": batch, "plan": plan})

    def restore(self, saved: bytes, /) -> None:
        """Continue exactly where `saved` was taken, in whatever process, with any host, hosts, threads and prefetch.

        Takes no time that grows with the position, once the epoch is planned.

        Raises:
          DataError: the state is damaged, or of other data, tokenizer, seed, settings or format; the message names it.
        """
        self._loader.seek(**state.decode(saved, self._identity))

    def close(self) -> None:
        """End the threads and let go of the data. Batches that were handed out stay valid."""
        self._close()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Packing(NamedTuple):
    """One step's pairs in rows."""

    pairs: PackedPairs
    slots: Int32[np.ndarray, " P"]
    """Slot of each pair that was given, int32; -1 for those left out."""


def pack_pairs(
    prompt_tokens: Int[np.ndarray, "P S"],
    prompt_lengths: Int[np.ndarray, " P"],
    completion_tokens: Int[np.ndarray, "P K T"],
    completion_lengths: Int[np.ndarray, "P K"],
    *,
    row_tokens: int,
    prompt_row_tokens: int | None = None,
    preference: Float[np.ndarray, " P"] | None = None,
    ref_logps: Float[np.ndarray, "P 2"] | None = None,
    scores: Float[np.ndarray, "P 2"] | None = None,
    where: Bool[np.ndarray, " P"] | None = None,
    ids: Int[np.ndarray, " P"] | None = None,
    layout: Layout = "shared",
    decoder_start: int | None = None,
    max_pairs_per_row: int | None = None,
    counts: Sequence[int] | None = None,
) -> Packing:
    """Pack the pairs of one online step, by the rule and the code of `PairBatcher`.

    Args:
      prompt_tokens: token ids of P prompts, padded on the right.
      prompt_lengths: real tokens of each, at least 1.
      completion_tokens: K completions of each, padded on the right: 2, or 1 for algorithms that train on y alone.
      completion_lengths: real tokens of each, at least 1.
      row_tokens: L, places in a row.
      prompt_row_tokens: S, places of a row in the encoder's stream; for the "encoder-decoder" layout alone.
      preference: p(y ≻ y' | x) in [0, 1]; None for 1.
      ref_logps: sums of log π_ref; None for 0.
      scores: what a loss of single completions takes; None for 0.
      where: False for pairs that teach nothing: they are left out of the rows, and their other fields may be anything.
        None for True.
      ids: name of each pair; None for its position.
      layout: see `PackedPairs`.
      decoder_start: first decoder input of an encoder-decoder model.
      max_pairs_per_row: M; None for the smaller of 32 and P.
      counts: numbers of rows to round up to; None for `row_counts(P)`, which always suffices.

    Returns:
      `Packing`: rows, and where each pair lies. The same arguments give the same bytes.

    Raises:
      ValueError: an argument that breaks its rule, or a pair too long for a row; the message names it.
    """
    count = len(prompt_lengths)
    encoder, start = _encoder(layout, prompt_row_tokens, decoder_start)
    fields, slots = _native.pack_step(
        _as(prompt_tokens, np.int32),
        _as(prompt_lengths, np.int32),
        _as(completion_tokens, np.int32),
        _as(completion_lengths, np.int32),
        _as(np.ones(count) if preference is None else preference, np.float32),
        _as(np.zeros((count, 2)) if ref_logps is None else ref_logps, np.float32),
        _as(np.zeros((count, 2)) if scores is None else scores, np.float32),
        _as(np.ones(count) if where is None else where, np.bool_),
        _as(np.arange(count) if ids is None else ids, np.int64),
        layout=layout,
        decoder_start=start,
        row_tokens=row_tokens,
        prompt_row_tokens=encoder,
        max_pairs_per_row=max(min(MAX_PAIRS, count), 1) if max_pairs_per_row is None else max_pairs_per_row,
        row_counts=row_counts(max(count, 1)) if counts is None else counts,
    )
    return Packing(PackedPairs._make(fields), slots)


def _as(array: Any, dtype: type[np.generic]) -> np.ndarray:
    return np.ascontiguousarray(array, dtype)


def _encoder(layout: str, prompt_row_tokens: int | None, decoder_start: int | None) -> tuple[int, int]:
    """Encoder places of a row and the start token, 0 where there is no encoder."""
    for name, value in (("prompt_row_tokens", prompt_row_tokens), ("decoder_start", decoder_start)):
        if (value is not None) != (layout == "encoder-decoder"):
            raise ValueError(
                f"{name} must be given exactly for the layout 'encoder-decoder', but received {value} for {layout!r}; "
                "take the layout of the model."
            )
    return prompt_row_tokens or 0, decoder_start or 0


def pair_sizes(prompts: Ragged, first: Ragged, second: Ragged, *, layout: Layout) -> Int32[np.ndarray, "N 2"]:
    """Places that each pair takes in the decoder's and in the encoder's stream, shape [N, 2].

    Raises:
      DataError: a prompt or completion without tokens.
    """
    named = {"prompts": prompts, "chosen": first, "rejected": second}
    return _sizes([column(name, rows, len(prompts), None) for name, rows in named.items()], layout)


def _sizes(columns: list[_native.Column], layout: str) -> Int32[np.ndarray, "N 2"]:
    try:
        return _native.pair_sizes(*columns, layout=layout)
    except ValueError as error:
        raise DataError(f"{error}. Drop such records as tokenize_completions does.") from None


def _refuse(
    sizes: Int32[np.ndarray, "N 2"], fitting: Bool[np.ndarray, " N"], places: tuple[int, int], *, counted: bool
) -> NoReturn:
    """Name the first pair that fits no row."""
    at = int((~fitting).argmax())
    rule, received = f"row_tokens {places[0]}", f"{sizes[at, 0]}"
    if places[1]:
        rule, received = f"{rule}, prompt_row_tokens {places[1]}", f"{received} and {sizes[at, 1]}"
    larger = "or enlarge row_tokens" if counted else "enlarge row_tokens, or add a larger shape to tail"
    raise DataError(
        f"a row must hold every pair whole, but received {rule} and {received} places at record {at} "
        f"({(~fitting).sum()} of {len(fitting)} are too long). Shorten or drop such records (overlong='drop'), "
        f"{larger}."
    )


def _shape(shape: tuple[int, ...], encoder: int) -> RowShape:
    if len(shape) != (3 if encoder else 2):
        form = "(rows, row_tokens, prompt_row_tokens)" if encoder else "(rows, row_tokens)"
        raise ValueError(f"a shape of tail must be {form}, but received {shape!r}. Give these numbers.")
    return shape[0], shape[1], shape[2] if encoder else 0


def _ref_logps(ref_logps: Any, count: int) -> np.ndarray:
    """Flat, or empty where nothing is known."""
    if ref_logps is None:
        return np.zeros(0, np.float32)
    array = np.asarray(ref_logps)
    if array.shape != (count, 2) or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DataError(
            f"ref_logps must be finite numbers, two for each of the {count} records, but received {array.dtype} of "
            f"shape "
            f"{array.shape}. Score the records anew, or leave ref_logps out."
        )
    return np.ascontiguousarray(array, np.float32).reshape(-1)
