"""Best and worst of K completions of each prompt, by a knockout tournament (INPO, section 4.1).

Round one pairs all K. Winners then meet winners while losers meet losers, until one of each is left, and these two meet
last: only where the best wins do they teach. K = 8 takes 4 + (2 + 2) + (1 + 1) + 1 = 11 comparisons in four rounds; in
general it takes ⌊K/2⌋ + 2·(⌈K/2⌉ − 1) + 1 in 2 + ⌈log2⌈K/2⌉⌉ rounds, whatever the answers.

- Where a number is odd, the last has a bye and comes first in the next round. A bye of round one goes to both sides, so
  under a total order best and worst are always the true ones. Under any other it may end on both: cyclic, dropped
  without a last comparison.
- With K = 2 or 3 the last pair has always met before: its answer is used again and one comparison saved.
- Completions of one class are identical and tie without being asked about.
- The order of the bracket and the winner of a tie (the paper takes the first) come from counters keyed by (seed, step,
  prompt id), not from the index: no position is favoured, and a repetition gives the same.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int8, UInt64

from fastpref.data.batches import token_mask

OUTCOMES = ("kept", "worst_won", "tie", "identical", "cyclic")
"""Outcomes of a prompt: only the first teaches; the others are reasons to drop its pair, and metrics `pairs/...`."""

AskRound = Callable[
    [Int[np.ndarray, " M"], Int[np.ndarray, " M"], Int[np.ndarray, " M"]], Sequence[float] | Float32[np.ndarray, " M"]
]
"""From index of the prompt in the batch, first and second completion (0 to K - 1) of M pairs to p(first ≻ second)."""

HALF = np.float32(0.5)
GOLDEN_RATIO = 0x9E3779B97F4A7C15
MOST_COMPLETIONS = 2**16
ALWAYS_MET = 3
"""Up to so many completions, the best and the worst have met before the last round."""


class Result(NamedTuple):
    """Outcomes of the tournaments of P prompts."""

    best: Int[np.ndarray, " P"]
    """Index of the completion that won, 0 to K - 1."""
    worst: Int[np.ndarray, " P"]
    """Index of the completion that lost."""
    preference: Float32[np.ndarray, " P"]
    """p(best ≻ worst), the judge's answer to the last comparison; above ½ where the pair is kept."""
    kept: Bool[np.ndarray, " P"]
    """True where the pair teaches."""
    outcomes: Int8[np.ndarray, " P"]
    """Index into `OUTCOMES`: 0 where kept, else the reason."""
    comparisons: Int[np.ndarray, " P"]
    """Pairs that the judge was asked about: 11 for K = 8 without identical completions."""


def run(
    ask_round: AskRound,
    num_prompts: int,
    k: int,
    prompt_ids: Int[np.ndarray, " P"],
    step: int,
    seed: int,
    *,
    classes: Int[np.ndarray, "P K"] | None = None,
) -> Result:
    """Find the best and the worst of K completions of each prompt, with one call of the judge a round.

    Args:
      ask_round: answers all pairs of a round; called with at least one.
      num_prompts: P.
      k: K, in [2, 2^16].
      prompt_ids: names of the prompts.
      step: number of the step, in [0, 2^63).
      seed: in [0, 2^64).
      classes: completions of a prompt with equal numbers are identical: they tie, and the judge is not asked. See
        `identical`.

    Returns:
      `Result`.

    Raises:
      ValueError: an argument is out of its range, a size does not fit, or an answer is not one probability in [0, 1]
        for each pair.
    """
    _check(num_prompts, k, prompt_ids, step, seed, classes)
    classes = np.tile(np.arange(k), (num_prompts, 1)) if classes is None else classes
    keys = _mix(_mix(_mix(_word(seed)) + _word(step)) + np.asarray(prompt_ids, np.int64).astype(np.uint64) + _word(0))
    at = np.arange(num_prompts)[:, None, None]
    asked = np.zeros(num_prompts, np.int64)

    def compare(first: Int[np.ndarray, "P S M"], second: Int[np.ndarray, "P S M"]) -> Float32[np.ndarray, "P S M"]:
        answers = np.full(first.shape, HALF)
        different = classes[at, first] != classes[at, second]
        prompt = np.nonzero(different)[0]
        if len(prompt):
            pairs = prompt, first[different], second[different]
            answers[different] = _checked(ask_round(*pairs), *pairs)
        np.add.at(asked, prompt, 1)
        return answers

    # Whoever is still in it, [P, sides, size]: one side in the first round, then winners and losers.
    field = np.argsort(_draws(keys, np.arange(k)), axis=1, kind="stable")[:, None]
    met = np.full((num_prompts, k, k) if k <= ALWAYS_MET else (0, 0, 0), HALF)
    played = 0
    while field.shape[2] > 1:
        paired = field.shape[2] // 2 * 2
        first, second, bye = field[..., :paired:2], field[..., 1:paired:2], field[..., paired:]
        answers = compare(first, second)
        if k <= ALWAYS_MET:
            met[at, first, second], met[at, second, first] = answers, 1 - answers
        matches = answers[0].size if num_prompts else 0
        coin = _draws(keys, k + played + np.arange(matches)).reshape(answers.shape) >> np.uint64(63) != 0
        second_wins = np.where(answers == HALF, coin, answers < HALF)
        winners, losers = np.where(second_wins, second, first), np.where(second_wins, first, second)
        # A bye comes first in the next round. Side 0 goes on with the winner, side 1 with the loser.
        sides = np.concatenate([bye[:, 0], winners[:, 0]], 1), np.concatenate([bye[:, -1], losers[:, -1]], 1)
        field, played = np.stack(sides, 1), played + matches
    best, worst = field[:, 0, 0], field[:, 1, 0]
    last = met[at[:, 0, 0], best, worst] if k <= ALWAYS_MET else compare(field[:, :1], field[:, 1:])[:, 0, 0]
    same = classes[at[:, 0, 0], best] == classes[at[:, 0, 0], worst]
    reasons = np.select([best == worst, same, last > HALF, last < HALF], [4, 3, 0, 1], 2)
    return Result(best, worst, last, reasons == 0, reasons.astype(np.int8), asked)


def identical(tokens: Int[np.ndarray, "P K T"], lengths: Int[np.ndarray, "P K"]) -> Int[np.ndarray, "P K"]:
    """For each completion the index of the first one of its prompt with the same tokens: `classes` of `run`.

    Args:
      tokens: token ids; those past the length do not count.
      lengths: real tokens of each completion.
    """
    clean = np.where(token_mask(lengths, tokens.shape[2]), tokens, 0)
    classes = np.zeros(lengths.shape, np.int32)
    # From the last to the first, so that the first match stands.
    for k in reversed(range(tokens.shape[1])):
        same = (clean == clean[:, k : k + 1]).all(-1) & (lengths == lengths[:, k : k + 1])
        classes[same] = k
    return classes


def _word(value: int) -> UInt64[np.ndarray, "1"]:
    # As an array of one, since NumPy warns where a scalar wraps around.
    return np.array([(value + GOLDEN_RATIO) % 2**64], np.uint64)


def _mix(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64[np.ndarray, "*shape"] = x ^ (x >> np.uint64(31))
    return mixed


def _draws(keys: UInt64[np.ndarray, " P"], counters: Int[np.ndarray, " C"]) -> UInt64[np.ndarray, "P C"]:
    return _mix(keys[:, None] + np.uint64(GOLDEN_RATIO) * (counters[None, :] + 1).astype(np.uint64))


def _check(num_prompts: int, k: int, prompt_ids: np.ndarray, step: int, seed: int, classes: np.ndarray | None) -> None:
    for name, value, low, high in (
        ("k", k, 2, MOST_COMPLETIONS + 1),
        ("step", step, 0, 2**63),
        ("seed", seed, 0, 2**64),
    ):
        if not low <= value < high:
            raise ValueError(f"{name} must be in [{low}, {high}), but received {value}. Choose one of them.")
    if len(prompt_ids) != num_prompts:
        raise ValueError(
            f"prompt_ids must name each of the {num_prompts} prompts, but received {len(prompt_ids)} of them. "
            "Give one id a prompt."
        )
    if classes is not None and classes.shape != (num_prompts, k):
        raise ValueError(
            f"classes must have the completions' shape ({num_prompts}, {k}), but received {classes.shape}. "
            "Give one number for each completion."
        )


def _checked(
    answers: Sequence[float] | np.ndarray, prompt: np.ndarray, first: np.ndarray, second: np.ndarray
) -> Float32[np.ndarray, " M"]:
    given = np.asarray(answers, np.float32)
    if given.shape != prompt.shape:
        raise ValueError(
            f"a round must be answered by one probability for each of {len(prompt)} pairs, but received shape "
            f"{given.shape}. Return p(first beats second) of each."
        )
    wrong = np.flatnonzero(~((given >= 0) & (given <= 1)))
    if len(wrong):
        worst = wrong[0]
        raise ValueError(
            f"probabilities must be in [0, 1], but received {given[worst]} for completions {first[worst]} and "
            f"{second[worst]} of prompt {prompt[worst]}. Return p(first beats second)."
        )
    return given
