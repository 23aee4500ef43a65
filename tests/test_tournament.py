"""INPO's tournament against a slow, obvious version; what it promises for any K and any judge."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.judging import tournament

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
HALF = np.float32(0.5)


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class Reference:
    """One tournament of one prompt. `ask` gives p(first beats second)."""

    def __init__(self, k: int, prompt_id: int, step: int, seed: int, classes: list[int], ask: Any) -> None:
        self.key = 0
        for part in (seed, step, prompt_id):
            self.key = mix((self.key + part + GOLDEN) & MASK)
        self.k, self.classes, self.ask = k, classes, ask
        self.played = self.asked = 0
        self.answers: dict[tuple[int, int], np.float32] = {}

    def draw(self, counter: int) -> int:
        return mix((self.key + GOLDEN * (counter + 1)) & MASK)

    def compare(self, first: int, second: int) -> np.float32:
        if self.classes[first] == self.classes[second]:
            return HALF
        self.asked += 1
        return np.float32(self.ask(first, second))

    def halve(self, field: list[int]) -> tuple[list[int], list[int]]:
        bye = field[-1:] if len(field) % 2 else []
        winners, losers = [*bye], [*bye]
        for first, second in zip(field[0::2], field[1::2], strict=False):
            p = self.compare(first, second)
            self.answers |= {(first, second): p, (second, first): np.float32(1) - p}
            second_wins = self.draw(self.k + self.played) >= 2**63 if p == HALF else p < HALF
            self.played += 1
            winners.append(second if second_wins else first)
            losers.append(first if second_wins else second)
        return winners, losers

    def run(self) -> tuple[int, int, np.float32, str, int]:
        field = sorted(range(self.k), key=lambda index: self.draw(index))
        winners, losers = self.halve(field)
        while len(winners) > 1:
            winners, losers = self.halve(winners)[0], self.halve(losers)[1]
        (best,), (worst,) = winners, losers
        if best == worst:
            return best, worst, HALF, "cyclic", self.asked
        if self.classes[best] == self.classes[worst]:
            return best, worst, HALF, "identical", self.asked
        p = self.answers[best, worst] if self.k <= 3 else self.compare(best, worst)
        outcome = "kept" if p > HALF else "worst_won" if p < HALF else "tie"
        return best, worst, p, outcome, self.asked


def lookup(table: np.ndarray) -> Callable[..., np.ndarray]:
    """A judge that reads p(first beats second) from [P, K, K]."""
    return lambda prompts, first, second: table[prompts, first, second]


def random_table(random: np.random.Generator, prompts: int, k: int, kind: str) -> np.ndarray:
    if kind == "soft":
        table = random.random((prompts, k, k))
    elif kind == "hard":
        table = random.integers(0, 2, (prompts, k, k)).astype(float)
    elif kind == "ties":
        table = random.choice([0.0, 0.5, 1.0], (prompts, k, k))
    elif kind == "even":
        table = np.full((prompts, k, k), 0.5)
    elif kind == "edges":
        edges = [0.0, 1e-45, 1e-8, np.nextafter(np.float32(0.5), np.float32(0)), 0.5]
        edges += [np.nextafter(np.float32(0.5), np.float32(1)), 1 - 2**-24, 1.0]
        table = random.choice(np.array(edges, np.float32), (prompts, k, k)).astype(float)
    else:  # a cycle: each beats the next few
        ahead = (np.arange(k)[None, :] - np.arange(k)[:, None]) % k
        table = np.broadcast_to((ahead <= k // 2) & (ahead > 0), (prompts, k, k)).astype(float)
    return table.astype(np.float32)


def test_thousands_of_random_tournaments_are_those_of_the_reference() -> None:
    random = np.random.default_rng(0)
    seen: set[str] = set()
    kinds = ("soft", "hard", "ties", "even", "edges", "cycle")
    for case, (k, kind) in enumerate(itertools.product([*range(2, 14), 16, 17, 31, 33], kinds)):
        prompts = 40
        table = random_table(random, prompts, k, kind)
        ids = random.integers(-(2**63), 2**63 - 1, prompts)
        seed, step = int(random.integers(0, 2**64, dtype=np.uint64)), int(random.integers(0, 2**40))
        classes = random.integers(0, k, (prompts, k)) if case % 3 == 0 else None
        result = tournament.run(lookup(table), prompts, k, ids, step, seed, classes=classes)
        for p in range(prompts):
            row = list(range(k)) if classes is None else classes[p].tolist()
            slow = Reference(k, int(ids[p]), step, seed, row, partial(np.ndarray.item, table[p]))
            best, worst, preference, outcome, asked = slow.run()
            seen.add(outcome)
            assert (result.best[p], result.worst[p]) == (best, worst)
            assert result.preference[p].tobytes() == np.float32(preference).tobytes()
            assert tournament.OUTCOMES[result.outcomes[p]] == outcome
            assert result.kept[p] == (outcome == "kept")
            assert result.comparisons[p] == asked
    assert seen == set(tournament.OUTCOMES)


def rounds_and_pairs(k: int, kind: str = "soft") -> tuple[list[int], tournament.Result]:
    table = random_table(np.random.default_rng(k), 3, k, kind)
    sizes: list[int] = []

    def ask(prompts: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        sizes.append(len(prompts))
        return table[prompts, first, second]

    return sizes, tournament.run(ask, 3, k, np.arange(3), 0, 0)


def test_eight_completions_take_the_eleven_comparisons_of_the_paper() -> None:
    for kind in ("soft", "hard", "even", "cycle"):
        sizes, result = rounds_and_pairs(8, kind)
        assert sizes == [3 * 4, 3 * 4, 3 * 2, 3 * 1]
        assert result.comparisons.tolist() == [11] * 3


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7, 9, 15, 16, 17, 64])
def test_rounds_and_comparisons_depend_on_k_alone(k: int) -> None:
    half = -(-k // 2)
    expected = k // 2 + 2 * (half - 1) + (k > 3)
    for kind in ("soft", "cycle", "even"):
        sizes, result = rounds_and_pairs(k, kind)
        # With a bye one completion may be both ends, and there is no last comparison.
        assert result.comparisons.tolist() == (expected - (k > 3) * (result.best == result.worst)).tolist()
        assert len(sizes) == 1 + int(np.ceil(np.log2(half))) + (k > 3)


@given(k=st.integers(2, 40), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**63 - 1))
@settings(max_examples=200)
def test_a_total_order_gives_its_ends(k: int, seed: int, step: int) -> None:
    strength = np.random.default_rng(k).permutation(k)
    table = (strength[:, None] > strength[None, :]).astype(np.float32) * np.float32(0.5) + np.float32(0.25)
    result = tournament.run(lookup(table[None]), 1, k, np.array([seed % 1000]), step, seed)
    assert (strength[result.best[0]], strength[result.worst[0]]) == (k - 1, 0)
    assert result.kept[0]
    assert result.preference[0] == np.float32(0.75)


def test_a_repetition_gives_the_same_and_a_batch_does_not_matter() -> None:
    table = random_table(np.random.default_rng(1), 6, 8, "ties")
    ids = np.array([5, 9, 2, 7, 5, 1])
    table[4] = table[0]
    whole = tournament.run(lookup(table), 6, 8, ids, 3, 11)
    again = tournament.run(lookup(table), 6, 8, ids, 3, 11)
    turned = tournament.run(lookup(table[::-1]), 6, 8, ids[::-1], 3, 11)
    for one, two, three in zip(whole, again, turned, strict=True):
        assert one.tobytes() == two.tobytes() == three[::-1].tobytes()
        assert one[0] == one[4]


def test_neither_order_nor_ties_favour_an_index() -> None:
    """Under an even judge each of K is best, and worst, equally often, whatever the seed, step or prompt changes."""
    prompts, k = 4000, 5
    table = np.full((1, k, k), 0.5, np.float32)
    even = lambda prompt, first, second: table[0, first, second]  # noqa: E731
    runs = [tournament.run(even, prompts, k, np.arange(prompts), 0, 0)]
    zeros = np.zeros(40, np.int64)
    for index in range(100):
        runs.append(tournament.run(even, 40, k, zeros + index, 0, 0))
        runs.append(tournament.run(even, 40, k, zeros, index, 0))
        runs.append(tournament.run(even, 40, k, zeros, 0, index))
    for column in (0, 1):
        counts = np.bincount(runs[0][column], minlength=k)
        assert (abs(counts - prompts / k) < 5 * np.sqrt(prompts / k)).all()
    for varied in (runs[1::3], runs[2::3], runs[3::3]):
        assert {int(run.best[0]) for run in varied} == set(range(k))


def test_the_order_of_asking_favours_no_index() -> None:
    """A judge that always prefers the first it sees picks every completion about equally often."""
    first_wins = lambda prompts, first, second: np.ones(len(first), np.float32)  # noqa: E731
    best = tournament.run(first_wins, 4000, 8, np.arange(4000), 0, 0).best
    assert (abs(np.bincount(best, minlength=8) - 500) < 5 * np.sqrt(500)).all()


def test_identical_completions_tie_and_are_not_asked_about() -> None:
    tokens = np.zeros((2, 4, 3), np.int64)
    tokens[0] = [[4, 5, 0], [4, 5, 9], [4, 0, 0], [4, 5, 7]]
    lengths = np.array([[2, 2, 1, 2], [3, 3, 3, 3]])
    classes = tournament.identical(tokens, lengths)
    assert classes.tolist() == [[0, 0, 2, 0], [0, 0, 0, 0]]
    asked: list[tuple[int, int, int]] = []

    def ask(prompts: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        asked.extend(zip(prompts.tolist(), first.tolist(), second.tolist(), strict=True))
        return (second == 2).astype(np.float32)

    result = tournament.run(ask, 2, 4, np.arange(2), 0, 0, classes=classes)
    assert asked
    assert all(prompt == 0 and 2 in (first, second) for prompt, first, second in asked)
    assert (result.worst[0], result.kept[0]) == (2, True)
    assert (result.comparisons[1], tournament.OUTCOMES[result.outcomes[1]]) == (0, "identical")

    def never(*_: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing is left to ask")

    assert tournament.run(never, 1, 4, np.arange(1), 0, 0, classes=classes[1:]).comparisons.tolist() == [0]
    assert len(tournament.run(never, 0, 4, np.arange(0), 0, 0).best) == 0


def test_a_bye_may_win_above_and_lose_below() -> None:
    """Three in a circle: where the one with the bye beats the winner and is beaten by the loser, no pair is left."""
    circle = np.array([[[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]], np.float32)
    prompts = 200
    table = np.broadcast_to(circle, (prompts, 3, 3))
    result = tournament.run(lookup(table), prompts, 3, np.arange(prompts), 0, 0)
    cyclic = result.best == result.worst
    assert 0 < cyclic.sum() <= prompts
    assert (result.outcomes[cyclic] == tournament.OUTCOMES.index("cyclic")).all()
    assert not result.kept[cyclic].any()


def answers(value: Any) -> Any:
    return lambda prompts, first, second: np.full(len(first), value, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 1}, r"k must be in \[2, 65537\), but received 1\. Choose"),
        ({"k": 2**17}, r"k must be in \[2, 65537\), but received 131072"),
        ({"prompt_ids": np.arange(3)}, "prompt_ids must name each of the 2 prompts, but received 3 of them"),
        ({"step": -1}, r"step must be in \[0, 9223372036854775808\), but received -1"),
        ({"seed": 2**64}, r"seed must be in \[0, 18446744073709551616\), but received"),
        ({"classes": np.zeros((2, 3), int)}, r"have the completions' shape \(2, 4\), but received \(2, 3\)"),
        ({"ask_round": answers(np.nan)}, r"in \[0, 1\], but received nan for completions \d and \d of prompt 0\."),
        ({"ask_round": answers(1.5)}, r"received 1.5 for .* of prompt 0\. Return p\(first beats second\)"),
        ({"ask_round": answers(-1e-9)}, r"probabilities must be in \[0, 1\], but received -9.99\d*e-10"),
        ({"ask_round": lambda *_: [0.5]}, r"one probability for each of 4 pairs, but received shape \(1,\)"),
        ({"ask_round": lambda *_: np.zeros((2, 2))}, r"each of 4 pairs, but received shape \(2, 2\)"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"ask_round": answers(1), "num_prompts": 2, "k": 4, "prompt_ids": np.arange(2)}
    with pytest.raises(ValueError, match=message):
        tournament.run(**usual | {"step": 0, "seed": 0} | arguments)
