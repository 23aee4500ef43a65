"""Any sequence of next, save, restore, reshard and close against a model of a few lines."""

from typing import Any, ClassVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from slow_pairs import SlowBatcher, part_of, random_pairs, same

from fastpref.data import PairBatcher, Ragged

PAIRS = random_pairs(13, (6, 6))
PROMPTS, CHOSEN, REJECTED = (
    Ragged.from_rows(rows)
    for rows in zip(*((pair.prompt, pair.completions[0], pair.completions[1]) for pair in PAIRS), strict=True)
)


class Model:
    """What a batcher is: a position in an endless list."""

    def __init__(self, batches: list[Any], host: int, hosts: int) -> None:
        self.batches, self.at, self.host, self.hosts = batches, 0, host, hosts

    def next(self) -> Any:
        self.at += 1
        return part_of(self.batches[self.at - 1], self.host, self.hosts)


def native(options: dict[str, Any], host: int, hosts: int, threads: int, prefetch: int) -> PairBatcher:
    return PairBatcher(
        PROMPTS,
        CHOSEN,
        REJECTED,
        np.asarray([pair.preference for pair in PAIRS], np.float32),
        ids=[pair.id for pair in PAIRS],
        ref_logps=np.asarray([pair.ref_logps for pair in PAIRS], np.float32),
        host=host,
        hosts=hosts,
        threads=threads,
        prefetch=prefetch,
        **options,
    )


runs = st.tuples(st.sampled_from([(0, 1), (0, 2), (1, 2)]), st.integers(1, 3), st.sampled_from([0, 1, 2, 5, 16]))


class Machine(RuleBasedStateMachine):
    states = Bundle("states")
    options: ClassVar[dict[str, Any]]
    epochs: ClassVar[list[list[Any]]]

    def make(self, host: int, hosts: int, threads: int, prefetch: int) -> tuple[PairBatcher, Model]:
        batches = [batch for epoch in self.epochs for batch in epoch]
        return native(self.options, host, hosts, threads, prefetch), Model(batches, host, hosts)

    @initialize(run=runs)
    def start(self, run: Any) -> None:
        ((host, hosts), threads, prefetch) = run
        self.native, self.model = self.make(host, hosts, threads, prefetch)

    @precondition(lambda self: self.model.at < len(self.model.batches) - 20)
    @rule(count=st.integers(1, 9))
    def next(self, count: int) -> None:
        for _ in range(count):
            assert same(next(self.native), self.model.next())

    @rule(target=states)
    def save(self) -> Any:
        return self.native.state(), self.model.at

    @rule(saved=states)
    def restore(self, saved: Any) -> None:
        state, self.model.at = saved
        self.native.restore(state)

    @rule(run=runs, closing=st.booleans())
    def reshard(self, run: Any, closing: bool) -> None:
        """Go on in a batcher of another host, with other threads, whether the old one was closed or only dropped."""
        ((host, hosts), threads, prefetch) = run
        state, at = self.native.state(), self.model.at
        if closing:
            self.native.close()
        self.native, self.model = self.make(host, hosts, threads, prefetch)
        self.native.restore(state)
        self.model.at = at

    @rule()
    def close(self) -> None:
        """A closed batcher says where it stood, and begins anew as another."""
        state = self.native.state()
        self.native.close()
        assert self.native.state() == state
        self.native, self.model = self.make(0, 1, 1, 2)

    @invariant()
    def epochs_agree(self) -> None:
        begun = [number for number, epoch in enumerate(self.epochs) for _ in epoch]
        assert self.native.epoch == begun[self.model.at]

    def teardown(self) -> None:
        if hasattr(self, "native"):
            self.native.close()


class FullRows(Machine):
    options: ClassVar[dict[str, Any]] = {"rows": 2, "row_tokens": 14, "tail": [(4, 30)], "window": 5, "seed": 11}
    epochs: ClassVar[list[list[Any]]] = [
        SlowBatcher(PAIRS, ((2, 14, 0), (4, 30, 0)), window=5, seed=11).epoch(epoch) for epoch in range(16)
    ]


class SomePairs(Machine):
    """Of 13 records 5 a batch, so that batches lie over the end of epochs."""

    options: ClassVar[dict[str, Any]] = {"batch_size": 5, "row_tokens": 20, "multiple": 2, "seed": 11}
    epochs: ClassVar[list[list[Any]]] = [
        slow.epoch(epoch)
        for slow in [SlowBatcher(PAIRS, native(options, 0, 1, 1, 0).shapes, most=5, seed=11, batch=5)]
        for epoch in range(16)
    ]


TestFullRows = FullRows.TestCase
TestFullRows.settings = settings(max_examples=700, stateful_step_count=12, deadline=None, derandomize=True)
TestSomePairs = SomePairs.TestCase
TestSomePairs.settings = settings(max_examples=300, stateful_step_count=12, deadline=None, derandomize=True)
