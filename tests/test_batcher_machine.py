"""Any sequence of next, save, restore, reshard and close against a model of a few lines."""

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from slow_pairs import SlowBatcher, part_of, random_pairs, same

from fastpref.data import PairBatcher, Ragged

PAIRS = random_pairs(13, (6, 6))
SHAPES = ((2, 14, 0), (4, 30, 0))
OPTIONS: dict[str, Any] = {"rows": 2, "row_tokens": 14, "tail": [(4, 30)], "window": 5, "seed": 11}
PROMPTS, CHOSEN, REJECTED = (
    Ragged.from_rows(rows)
    for rows in zip(*((pair.prompt, pair.completions[0], pair.completions[1]) for pair in PAIRS), strict=True)
)
EPOCHS = [SlowBatcher(PAIRS, SHAPES, window=5, seed=11).epoch(epoch) for epoch in range(16)]
BATCHES = [batch for epoch in EPOCHS for batch in epoch]
EPOCH_OF = [number for number, epoch in enumerate(EPOCHS) for _ in epoch]


class Model:
    """What a batcher is: a position in an endless list."""

    def __init__(self, host: int, hosts: int) -> None:
        self.at, self.host, self.hosts = 0, host, hosts

    def next(self) -> Any:
        self.at += 1
        return part_of(BATCHES[self.at - 1], self.host, self.hosts)


def make(host: int, hosts: int, threads: int, prefetch: int) -> PairBatcher:
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
        **OPTIONS,
    )


runs = st.tuples(st.sampled_from([(0, 1), (0, 2), (1, 2)]), st.integers(1, 3), st.sampled_from([0, 1, 2, 5, 16]))


class Machine(RuleBasedStateMachine):
    states = Bundle("states")

    @initialize(run=runs)
    def start(self, run: Any) -> None:
        ((host, hosts), threads, prefetch) = run
        self.native, self.model = make(host, hosts, threads, prefetch), Model(host, hosts)

    @precondition(lambda self: self.model.at < len(BATCHES) - 20)
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
        self.native, self.model = make(host, hosts, threads, prefetch), Model(host, hosts)
        self.native.restore(state)
        self.model.at = at

    @rule()
    def close(self) -> None:
        """A closed batcher says where it stood, and begins anew as another."""
        state = self.native.state()
        self.native.close()
        assert self.native.state() == state
        self.native, self.model = make(0, 1, 1, 2), Model(0, 1)

    @invariant()
    def epochs_agree(self) -> None:
        assert self.native.epoch == EPOCH_OF[self.model.at]

    def teardown(self) -> None:
        if hasattr(self, "native"):
            self.native.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=1000, stateful_step_count=12, deadline=None, derandomize=True)
