"""Whole preference pairs packed into rows of fixed size: offline from a data set, online from one step's completions.

Both pairs of tokens and their prompt always share a row, so that a loss over pairs never waits for another row; rows
have one static shape, so that one program is compiled. Rows are filled best-fit, the largest pairs first, within a
window of pairs that come one after another in a seeded order: a larger window wastes less, a smaller one mixes more.
"""

import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import numpy as np
import xxhash
from jaxtyping import Bool, Float, Int, Int32, Int64

from fastpref.data import _native, state
from fastpref.data.batches import PackedPairs
from fastpref.data.columns import Numbers, Rows, column, fingerprint, per_record, preferences, ragged
from fastpref.data.ragged import Ragged
from fastpref.data.records import DropReport
from fastpref.method.errors import DataError

Layout = Literal["shared", "separate", "encoder-decoder"]
"""Where the tokens of a pair lie in a row: see `PackedPairs`."""
RowShape = tuple[int, int, int]
"""Rows of a batch, places of a row, and its places of the encoder's stream (0 without an encoder)."""

Own = TypeVar("Own", bound="PairBatcher")

MAX_PAIRS = 32
TOO_LONG = "pair too long for a row"
PLAN_VERSION = 1
"""Counts changes of csrc/pair_plan.cc that give the same arguments another order: a state of the old one is refused."""


class PairBatcher:
    """Endless iterator over packed batches of preference pairs, each `PackedPairs` on the host.

    Every epoch hands out every pair exactly once, in an order that is a pure function of the lengths, the seed, the
    epoch and the settings of the packing. The last batch of an epoch, and of each shape, may have empty rows. Neither
    threads nor prefetching nor the number of hosts change what a batch is. Arrays are read-only, begin at multiples of
    64 bytes, so that JAX takes them without a copy, and own their memory: it is used again when nothing refers to any
    of them. `close()` ends the threads; so does the end of a `with` block and that of the process.

    Args:
      prompts: token ids of N records.
      chosen: token ids of the first completion of each, its EOS included.
      rejected: token ids of the second.
      preference: probability that the first beats the second, in [0, 1]; None for 1.
      rows: R, rows in a batch.
      row_tokens: L, places in a row.
      prompt_row_tokens: S, places of a row in the encoder's stream; for the "encoder-decoder" layout alone.
      tail: larger shapes for the pairs that do not fit, growing: (rows, row_tokens), or (rows, row_tokens,
        prompt_row_tokens) with an encoder. Each is compiled anew.
      layout: "shared" (the prompt once for both completions), "separate" or "encoder-decoder"; see `PackedPairs`.
      decoder_start: first decoder input of an encoder-decoder model.
      max_pairs_per_row: M, at least 1.
      window: pairs that are packed together, 1 to 65536.
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
        rows: int,
        row_tokens: int,
        prompt_row_tokens: int | None = None,
        tail: Sequence[tuple[int, ...]] = (),
        layout: Layout = "shared",
        decoder_start: int | None = None,
        max_pairs_per_row: int = MAX_PAIRS,
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
        self.shapes: tuple[RowShape, ...] = ((rows, row_tokens, encoder), *(_shape(one, encoder) for one in tail))
        """Rows, places and encoder places of a batch, from small to large."""
        sizes = _sizes(columns, layout)
        fitting = np.all(sizes <= np.asarray(self.shapes[-1][1:]), axis=1)
        if not fitting.all() and (overlong == "raise" or not fitting.any()):
            _refuse(sizes, fitting, self.shapes[-1])
        dropped = np.flatnonzero(~fitting)
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
            max_pairs_per_row=max_pairs_per_row,
            window=window,
            seed=seed,
            records=np.flatnonzero(fitting).astype(np.int32) if len(dropped) else np.zeros(0, np.int32),
            host=host,
            hosts=hosts,
            threads=threads,
            prefetch=prefetch,
        )
        self._identity = {
            "tokenizer hash": xxhash.xxh3_128_hexdigest(
                tokenizer_hash.encode() if isinstance(tokenizer_hash, str) else tokenizer_hash
            ),
            "number of pairs": count - len(dropped),
            "data fingerprint": fingerprint(tables, names, chances, logps).hex(),
            "seed": int(seed),
            "layout": layout,
            "decoder_start": start,
            "max_pairs_per_row": int(max_pairs_per_row),
            "window": int(window),
            "set of shapes (rows, row_tokens, prompt_row_tokens)": [list(map(int, shape)) for shape in self.shapes],
            "plan version": PLAN_VERSION,
        }
        self.dropped_ids: Int64[np.ndarray, " D"] = names[dropped]
        """Names of the records that fit no shape."""
        self.report = DropReport(count, count - len(dropped), {TOO_LONG: len(dropped)} if len(dropped) else {})
        """What became of every record: each delivered once an epoch, or dropped."""
        # Threads that are left at the end of the process would be cut off in the middle of their work.
        self._close = weakref.finalize(self, self._loader.close)

    @property
    def epoch(self) -> int:
        """Epoch that the next batch belongs to."""
        epoch, done, batches, _ = self._loader.position()
        return epoch + (done == batches)

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


def row_counts(pairs: int, multiple: int = 1) -> tuple[int, ...]:
    """Numbers of rows that `pack_pairs` rounds up to: 1, 2, 3, 4, 6, 8, 12, ... times `multiple`, up to `pairs` rows.

    Args:
      pairs: most pairs of a step, at least 1: they fit into as many rows.
      multiple: rows that devices divide among them, at least 1.

    Returns:
      Growing numbers, none more than half as large again as the one before, from 3 rows on: as many programs at most.

    Raises:
      ValueError: an argument below 1.
    """
    for name, value in (("pairs", pairs), ("multiple", multiple)):
        if value < 1:
            raise ValueError(
                f"{name} must be at least 1, but received {value}. Give the largest number that a step may have."
            )
    units, last = [1], -(-pairs // multiple)
    while units[-1] < last:
        power = 1 << (units[-1].bit_length() - 1)
        units.append(units[-1] + max(power // 2, 1))
    return tuple(multiple * min(unit, last) for unit in units)


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


def _refuse(sizes: Int32[np.ndarray, "N 2"], fitting: Bool[np.ndarray, " N"], shape: RowShape) -> NoReturn:
    """Name the first pair that fits no row."""
    at = int((~fitting).argmax())
    rule, received = f"row_tokens {shape[1]}", f"{sizes[at, 0]}"
    if shape[2]:
        rule, received = f"{rule}, prompt_row_tokens {shape[2]}", f"{received} and {sizes[at, 1]}"
    raise DataError(
        f"a row must hold every pair whole, but received {rule} and {received} places at record {at} "
        f"({(~fitting).sum()} of {len(fitting)} are too long). Shorten or drop such records (overlong='drop'), enlarge "
        "row_tokens, or add a larger shape to tail."
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
