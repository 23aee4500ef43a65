"""The sides that the batcher is timed against, and the pairs that all of them pack."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fastpref.data import PairBatcher, Ragged, _native

ROWS, ROW_TOKENS, WINDOW, COLLATED = 8, 4096, 1024, 16
LAWS = (((5.0, 0.8), "prompts"), ((5.5, 0.7), "first"), ((5.45, 0.7), "second"))
Columns = list[Ragged]


def lengths(count: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.lognormal(*law, count).clip(4, 1024).astype(np.int64) for law, _ in LAWS]


def columns(count: int, seed: int) -> Columns:
    random = np.random.default_rng(seed + 1000)
    made = []
    for each in lengths(count, seed):
        offsets = np.concatenate([[0], np.cumsum(each)])
        made.append(Ragged(random.integers(0, 32_000, offsets[-1], dtype=np.int32), offsets))
    return made


def native(data: Columns, layout: str) -> Callable[[], int]:
    """Plan an epoch and assemble its batches in one thread."""
    batches = PairBatcher(*data, rows=ROWS, row_tokens=ROW_TOKENS, window=WINDOW, layout=layout, prefetch=0)

    def run() -> int:
        for _ in range(batches.batches_in(0)):
            next(batches)
        return batches._loader.measure(0)[3]

    return run


def native_held(data: Columns, layout: str) -> Callable[[], int]:
    """The same, for who keeps the batches: each is then written to memory of its own."""
    batches = PairBatcher(*data, rows=ROWS, row_tokens=ROW_TOKENS, window=WINDOW, layout=layout, prefetch=0)
    held: list[Any] = []

    def run() -> int:
        held.extend(next(batches) for _ in range(batches.batches_in(0)))
        return batches._loader.measure(0)[3]

    return run


def grain_best_fit(data: Columns, layout: str) -> Callable[[], int]:
    """Each pair as one sequence of as many tokens, alone or with the two fields that segments do not tell.

    The arrays are there already, and are read without threads.
    """
    import grain
    from grain.experimental import BestFitPackIterDataset

    prompts, first, second = data
    pairs = []
    for i in range(len(prompts)):
        prompt, y, z = prompts[i], first[i], second[i]
        pair = {"tokens": np.concatenate([prompt, y[:-1], prompt[-1:], z[:-1]])}
        if layout == "all fields":
            context = np.zeros(len(prompt) - 1, np.int32)
            pair["targets"] = np.concatenate([context, y, z])
            pair["streams"] = np.concatenate([context, np.full(len(y), 1, np.int32), np.full(len(z), 2, np.int32)])
        pairs.append(pair)
    source = grain.MapDataset.source(pairs).shuffle(seed=0).to_iter_dataset(grain.ReadOptions(num_threads=0))
    capacity = dict.fromkeys(pairs[0], ROW_TOKENS)
    packed = BestFitPackIterDataset(source, length_struct=capacity, num_packing_bins=64).batch(ROWS)

    def run() -> int:
        return sum(int((batch["tokens_segment_ids"] > 0).sum()) for batch in packed)

    return run


def python_lists(data: Columns, layout: str) -> Callable[[], int]:
    """Concatenate, mask and pad lists, as collators of preference pairs do; a few pairs a batch, the prompt twice."""
    rows = [[each[i].tolist() for i in range(len(each))] for each in data]

    def padded(sequences: list[list[int]]) -> np.ndarray:
        arrays = [np.array(sequence) for sequence in sequences]
        out = np.zeros((len(arrays), max(map(len, arrays))), np.int64)
        for at, array in enumerate(arrays):
            out[at, : len(array)] = array
        return out

    def run() -> int:
        real = 0
        for at in range(0, len(rows[0]), COLLATED):
            prompts, *completions = (column[at : at + COLLATED] for column in rows)
            ids = [p + c for column in completions for p, c in zip(prompts, column, strict=True)]
            scored = [
                [0] * len(p) + [1] * len(c) for column in completions for p, c in zip(prompts, column, strict=True)
            ]
            padded(ids), padded([[1] * len(each) for each in ids]), padded(scored)
            real += sum(map(len, ids))
        return real

    return run


def numpy_slices(data: Columns, layout: str) -> Callable[[], int]:
    """The same rows, given the plan: six fields filled slice by slice."""
    prompts, first, second = data
    sizes = _native.pair_sizes(*(_native.Column(each.values, each.offsets) for each in data), layout="shared")
    members, ends, batches, _ = _native.plan_pairs(
        np.ascontiguousarray(sizes[:, 0]),
        np.zeros(0, np.int32),
        shapes=[(ROWS, ROW_TOKENS, 0)],
        max_pairs_per_row=32,
        window=WINDOW,
        seed=0,
        epoch=0,
    )
    rows = [row.tolist() for row in np.split(members, ends)[:-1]]
    plan = [rows[start : start + count] for start, count, _ in batches.tolist()]

    def run() -> int:
        real = 0
        for batch in plan:
            fields = [np.full((ROWS, ROW_TOKENS), empty, np.int32) for empty in (0, 0, 0, -1, 0, -1)]
            tokens, targets, positions, pairs, streams, sequences = fields
            for r, row in enumerate(batch):
                at = 0
                for s, i in enumerate(row):
                    prompt = prompts[i]
                    context = len(prompt) - 1
                    tokens[r, at : at + context] = prompt[:-1]
                    positions[r, at : at + context] = np.arange(context)
                    pairs[r, at : at + context] = s
                    at += context
                    for k, completion in enumerate((first[i], second[i])):
                        end = at + len(completion)
                        tokens[r, at] = prompt[-1]
                        tokens[r, at + 1 : end] = completion[:-1]
                        targets[r, at:end] = completion
                        positions[r, at:end] = np.arange(context, context + len(completion))
                        pairs[r, at:end] = s
                        streams[r, at:end] = 1 + k
                        sequences[r, at:end] = 2 * (r * 32 + s) + k
                        at = end
                real += at
        return real

    return run


SIDES: dict[str, tuple[Callable[[Columns, str], Callable[[], int]], str]] = {
    "fastpref, shared prompt": (native, "shared"),
    "fastpref, shared prompt, every batch held": (native_held, "shared"),
    "fastpref, separate": (native, "separate"),
    "NumPy slices, given the plan": (numpy_slices, "shared"),
    "grain best-fit": (grain_best_fit, "all fields"),
    "grain best-fit, tokens alone": (grain_best_fit, "tokens"),
    "Python lists, padded": (python_lists, "separate"),
}
