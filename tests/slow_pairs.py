"""A slow, obvious batcher of packed pairs: what the native one must equal, byte for byte."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fastpref.data import _native
from fastpref.data.batches import PackedPairs

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
RECORDS, BATCHES, ROWS = 0, 1, 2
"""What a permutation is of; ROWS + i for the rows of shape i."""

Size = tuple[int, int]
"""Decoder and encoder places."""


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def draws(seed: int, epoch: int, purpose: int) -> Iterator[int]:
    state = 0
    for part in (seed, epoch, purpose):
        state = mix((state + part + GOLDEN) & MASK)
    while True:
        state = (state + GOLDEN) & MASK
        yield mix(state)


@cache
def permutation(size: int, seed: int, epoch: int, purpose: int) -> tuple[int, ...]:
    random = draws(seed, epoch, purpose)
    order = list(range(size))
    for i in range(size):
        j = i + (next(random) * (size - i) >> 64)
        order[i], order[j] = order[j], order[i]
    return tuple(order)


def fits(size: Size, room: Size) -> bool:
    return size[0] <= room[0] and size[1] <= room[1]


def pack(pairs: Sequence[int], sizes: Sequence[Size], capacity: Size, most: int) -> list[list[int]]:
    """Rows of pairs: the largest share first, into the row that it leaves the fewest decoder places free in."""

    def share(pair: int) -> int:
        tokens, prompt = sizes[pair]
        return max(tokens * capacity[1], prompt * capacity[0]) if capacity[1] else tokens

    rows: list[list[int]] = []
    room: list[Size] = []
    changed: list[int] = []  # rows, the one changed last first
    for pair in sorted(pairs, key=share, reverse=True):
        open_rows = [row for row in changed if fits(sizes[pair], room[row]) and len(rows[row]) < most]
        if open_rows:
            row = min(open_rows, key=lambda row: room[row][0])
            changed.remove(row)
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(pair)
        room[row] = (room[row][0] - sizes[pair][0], room[row][1] - sizes[pair][1])
        changed.insert(0, row)
    return rows


def plan(
    sizes: Sequence[Size], shapes: Sequence[tuple[int, int, int]], most: int, window: int, seed: int, epoch: int
) -> list[tuple[int, list[list[int]]]]:
    """The batches of an epoch: the shape of each, and its rows that hold pairs."""
    order = permutation(len(sizes), seed, epoch, RECORDS)
    shape_of = [next(i for i, shape in enumerate(shapes) if fits(size, shape[1:])) for size in sizes]
    batches = []
    for i, (count, *capacity) in enumerate(shapes):
        part = [pair for pair in order if shape_of[pair] == i]
        rows = []
        for at in range(0, len(part), window):
            rows += pack(part[at : at + window], sizes, (capacity[0], capacity[1]), most)
        rows = [rows[row] for row in permutation(len(rows), seed, epoch, ROWS + i)]
        batches += [(i, rows[at : at + count]) for at in range(0, len(rows), count)]
    return [batches[batch] for batch in permutation(len(batches), seed, epoch, BATCHES)]


def native_plan(sizes: Sequence[Size], shapes: Sequence[Any], **options: Any) -> list[tuple[int, list[list[int]]]]:
    """What `plan` and `plan_counted` give, from the native core."""
    tokens, prompts = np.asarray(sizes, np.int32).T.copy()
    prompts = prompts if prompts.any() else prompts[:0]
    members, ends, batches, _ = _native.plan_pairs(tokens, prompts, shapes=shapes, **options)
    rows = [row.tolist() for row in np.split(members, ends)[:-1]]
    return [(shape, rows[first : first + count]) for first, count, shape in batches.tolist()]


def plan_counted(
    sizes: Sequence[Size], shapes: Sequence[tuple[int, int, int]], most: int, batch: int, seed: int, epoch: int
) -> list[tuple[int, list[list[int]]]]:
    """The batches of an epoch of exactly `batch` pairs: those that begin in its part of the stream of permutations."""
    count, batches = len(sizes), []
    for number in range(-(-epoch * count // batch), -(-(epoch + 1) * count // batch)):
        pairs = []
        for place in range(number * batch, (number + 1) * batch):
            pairs.append(permutation(count, seed, place // count, RECORDS)[place % count])
        rows = pack(pairs, sizes, shapes[0][1:], most)
        batches.append((next(i for i, shape in enumerate(shapes) if shape[0] >= len(rows)), rows))
    return batches


@dataclass(frozen=True)
class SlowPair:
    prompt: list[int]
    completions: list[list[int]]
    """Two, or one."""
    id: int
    preference: float = 1.0
    ref_logps: tuple[float, float] = (0.0, 0.0)
    scores: tuple[float, float] = (0.0, 0.0)

    def places(self, layout: str, start: int) -> list[tuple[int, int, int, int, int]]:
        """Token, target, position, stream and completion (-1 for none) of each decoder place."""
        *context, last = self.prompt
        found = []
        if layout == "shared":
            found += [(token, 0, at, 0, -1) for at, token in enumerate(context)]
        for k, completion in enumerate(self.completions):
            if layout == "separate":
                found += [(token, 0, at, 1 + k, -1) for at, token in enumerate(context)]
            first = 0 if layout == "encoder-decoder" else len(context)
            inputs = [start if layout == "encoder-decoder" else last, *completion[:-1]]
            for at, (token, target) in enumerate(zip(inputs, completion, strict=True)):
                found.append((token, target, first + at, 1 + k, k))
        return found

    def size(self, layout: str) -> Size:
        return len(self.places(layout, 0)), len(self.prompt) if layout == "encoder-decoder" else 0


def write(
    rows: Sequence[Sequence[SlowPair]], shape: tuple[int, int, int], most: int, layout: str, start: int
) -> PackedPairs:
    """A batch of those rows; rows beyond them are empty."""
    count, length, encoded = shape
    decoder = [np.full((count, length), empty, np.int32) for empty in (0, 0, 0, -1, 0, -1)]
    encoder = [np.full((count, encoded), empty, np.int32) for empty in (0, 0, -1)]
    slots = count * most
    lengths = np.zeros((slots, 2), np.int32)
    logps, scores = np.zeros((slots, 2), np.float32), np.zeros((slots, 2), np.float32)
    preference, where, ids = np.zeros(slots, np.float32), np.zeros(slots, bool), np.full(slots, -1)
    for r, row in enumerate(rows):
        at = encoder_at = 0
        for s, pair in enumerate(row):
            slot = r * most + s
            for token, target, position, stream, k in pair.places(layout, start):
                sequence = -1 if k < 0 else 2 * slot + k
                for field, value in zip(decoder, (token, target, position, s, stream, sequence), strict=True):
                    field[r, at] = value
                at += 1
            if layout == "encoder-decoder":
                for position, token in enumerate(pair.prompt):
                    for field, value in zip(encoder, (token, position, s), strict=True):
                        field[r, encoder_at] = value
                    encoder_at += 1
            for k, completion in enumerate(pair.completions):
                lengths[slot, k] = len(completion)
            logps[slot], scores[slot] = pair.ref_logps, pair.scores
            preference[slot], where[slot], ids[slot] = pair.preference, True, pair.id
    return PackedPairs(*decoder, *encoder, lengths, preference, where, ids, logps, scores)


@dataclass(frozen=True)
class SlowBatcher:
    """Hands out batches by epoch and number; it has no state at all."""

    pairs: list[SlowPair]
    shapes: tuple[tuple[int, int, int], ...]
    most: int = 32
    window: int = 1024
    seed: int = 0
    layout: str = "shared"
    start: int = 0
    batch: int = 0
    """Pairs of a batch; with 0 rows are filled."""

    def epoch(self, epoch: int) -> list[PackedPairs]:
        sizes = [pair.size(self.layout) for pair in self.pairs]
        made = (
            plan_counted(sizes, self.shapes, self.most, self.batch, self.seed, epoch)
            if self.batch
            else plan(sizes, self.shapes, self.most, self.window, self.seed, epoch)
        )
        return [
            write(
                [[self.pairs[pair] for pair in row] for row in rows],
                self.shapes[shape],
                self.most,
                self.layout,
                self.start,
            )
            for shape, rows in made
        ]


def part_of(batch: PackedPairs, host: int, hosts: int) -> PackedPairs:
    """What one host is given of a batch."""

    def cut(field: Any) -> Any:
        size = len(field) // hosts
        return field[host * size : (host + 1) * size]

    return PackedPairs(*map(cut, batch))


def random_pairs(count: int, longest: Size, seed: int = 0) -> list[SlowPair]:
    """Pairs of up to so many prompt and completion tokens, with soft labels and log-probs."""
    random = np.random.default_rng(seed)

    def tokens(most: int) -> list[int]:
        return [int(token) for token in random.integers(0, 100, random.integers(1, most + 1))]

    return [
        SlowPair(
            tokens(longest[0]),
            [tokens(longest[1]), tokens(longest[1])],
            7 * at,
            float(np.float32(random.random())),
            (-float(np.float32(random.random())), -float(np.float32(random.random()))),
        )
        for at in range(count)
    ]


def same(left: PackedPairs, right: PackedPairs) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(left, right, strict=True)
    )
