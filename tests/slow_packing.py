"""Packed rows made in the obvious way, place after place: what the native packer and the models must agree on."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastpref.data.batches import PackedPairs

LAYOUTS = ("shared", "separate", "encoder-decoder")


class PaddedPairs(NamedTuple):
    """P pairs as they are before packing: K completions of each prompt, 1 or 2."""

    prompt_tokens: np.ndarray
    prompt_lengths: np.ndarray
    completion_tokens: np.ndarray
    completion_lengths: np.ndarray
    ref_logps: np.ndarray
    preference: np.ndarray
    scores: np.ndarray
    where: np.ndarray


class Place(NamedTuple):
    token: int
    target: int
    position: int
    stream: int
    completion: int


def places(prompt: list[int], completions: list[list[int]], layout: str, start_id: int) -> Iterator[Place]:
    """What one pair takes of a row."""
    if layout == "shared":
        for position, token in enumerate(prompt[:-1]):
            yield Place(token, 0, position, 0, -1)
    for k, completion in enumerate(completions):
        if not completion:
            continue
        first, begin = (start_id, 0) if layout == "encoder-decoder" else (prompt[-1], len(prompt) - 1)
        if layout == "separate":
            for position, token in enumerate(prompt[:-1]):
                yield Place(token, 0, position, k + 1, -1)
        for step, (token, target) in enumerate(zip([first, *completion[:-1]], completion, strict=True)):
            yield Place(token, target, begin + step, k + 1, k)


def blank(rows: int, length: int, slots: int, prompt_length: int = 0) -> PackedPairs:
    def full(shape: tuple[int, ...], value: int = 0, dtype: Any = np.int32) -> Any:
        return np.full(shape, value, dtype)

    row, prompt, pairs = (rows, length), (rows, prompt_length), rows * slots
    return PackedPairs(
        tokens=full(row),
        targets=full(row),
        positions=full(row),
        pairs=full(row, -1),
        streams=full(row),
        sequences=full(row, -1),
        prompt_tokens=full(prompt),
        prompt_positions=full(prompt),
        prompt_pairs=full(prompt, -1),
        lengths=full((pairs, 2)),
        preference=full((pairs,), dtype=np.float32),
        where=full((pairs,), dtype=bool),
        ids=full((pairs,), -1, np.int64),
        ref_logps=full((pairs, 2), dtype=np.float32),
        scores=full((pairs, 2), dtype=np.float32),
    )


def pack(
    batch: PaddedPairs,
    *,
    rows: int,
    length: int,
    slots: int,
    layout: str,
    prompt_length: int = 0,
    start_id: int = 0,
    order: Sequence[int] | None = None,
) -> PackedPairs:
    """Each pair, in order, into the first row with room for it; `ids` are the numbers of the pairs in `batch`."""
    packed = blank(rows, length, slots, prompt_length)
    used, read, taken = ([0] * rows for _ in range(3))
    for pair in range(len(batch.preference)) if order is None else order:
        prompt = batch.prompt_tokens[pair][: batch.prompt_lengths[pair]].tolist()
        pieces = zip(batch.completion_tokens[pair], batch.completion_lengths[pair], strict=True)
        completions = [tokens[:size].tolist() for tokens, size in pieces]
        laid = list(places(prompt, completions, layout, start_id))
        encoded = prompt if layout == "encoder-decoder" else []
        row = next(
            r
            for r in range(rows)
            if used[r] + len(laid) <= length and read[r] + len(encoded) <= prompt_length and taken[r] < slots
        )
        slot, number = taken[row], row * slots + taken[row]
        for at, place in enumerate(laid, used[row]):
            packed.tokens[row, at] = place.token
            packed.targets[row, at] = place.target
            packed.positions[row, at] = place.position
            packed.pairs[row, at] = slot
            packed.streams[row, at] = place.stream
            packed.sequences[row, at] = -1 if place.completion < 0 else 2 * number + place.completion
        for at, token in enumerate(encoded, read[row]):
            packed.prompt_tokens[row, at] = token
            packed.prompt_positions[row, at] = at - read[row]
            packed.prompt_pairs[row, at] = slot
        packed.lengths[number, : len(completions)] = batch.completion_lengths[pair]
        packed.preference[number] = batch.preference[pair]
        packed.where[number] = batch.where[pair]
        packed.ids[number] = pair
        packed.ref_logps[number] = batch.ref_logps[pair]
        packed.scores[number] = batch.scores[pair]
        used[row] += len(laid)
        read[row] += len(encoded)
        taken[row] += 1
    return packed


def scored(packed: PackedPairs) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of the places that score each completion, by number of the pair and of the completion."""
    sequences = np.asarray(packed.sequences)
    found: Iterable[int] = np.unique(sequences[sequences >= 0]).tolist()
    return {(int(packed.ids[one // 2]), one % 2): np.nonzero(sequences == one) for one in found}
