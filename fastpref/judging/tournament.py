"""Best and worst of K completions of each prompt, by INPO's knockout tournament: the thin face of csrc/tournament.h."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int8, Int32, Int64

from fastpref.data import _native
from fastpref.data.batches import token_mask

OUTCOMES = ("kept", "worst won", "tie", "identical completions", "cyclic preferences")
"""What becomes of a prompt: only the first teaches, the others are reasons to drop its pair."""

AskRound = Callable[
    [Int64[np.ndarray, " M"], Int32[np.ndarray, " M"], Int32[np.ndarray, " M"]],
    Sequence[float] | Float32[np.ndarray, " M"],
]
"""From index of the prompt in the batch, first and second completion (0 to K - 1) of M pairs to p(first ≻ second)."""


class Result(NamedTuple):
    """What the tournaments of P prompts came to."""

    best: Int32[np.ndarray, " P"]
    """Index of the completion that won, 0 to K - 1."""
    worst: Int32[np.ndarray, " P"]
    """Index of the completion that lost."""
    preference: Float32[np.ndarray, " P"]
    """p(best ≻ worst), the judge's answer to the last comparison; above ½ where the pair is kept."""
    kept: Bool[np.ndarray, " P"]
    """True where the pair teaches."""
    outcomes: Int8[np.ndarray, " P"]
    """Index into `OUTCOMES`: 0 where kept, else the reason."""
    comparisons: Int32[np.ndarray, " P"]
    """Pairs the judge was asked about: 11 for K = 8 without identical completions."""

    def dropped(self) -> dict[str, int]:
        """Number of prompts by the reason they were dropped for."""
        counts = np.bincount(self.outcomes, minlength=len(OUTCOMES))
        return {reason: int(count) for reason, count in zip(OUTCOMES[1:], counts[1:], strict=True) if count}


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
    """Find the best and the worst of K completions of each prompt, with one call to the judge a round.

    The K completions are paired; then winners meet winners and losers meet losers until one of each is left, and these
    two meet last (INPO, section 4.1). Pairs in which the worst wins that comparison, or it is even, are dropped. K = 8
    takes 11 comparisons in four rounds of 4, 4, 2 and 1 pairs a prompt. Odd numbers have byes; under a total order best
    and worst are the true ones for every K, and under any other the number of rounds is the same. Who meets whom, and
    who wins a tie (the paper takes the first), come from (seed, step, prompt id), so the result is the same in every
    repetition and no position is favoured.

    Args:
      ask_round: answers all pairs of a round; called with at least one.
      num_prompts: P.
      k: K, at least 2.
      prompt_ids: names of the prompts.
      step: number of the step, at least 0.
      seed: in [0, 2^64).
      classes: completions of a prompt with equal numbers are identical: they tie, and the judge is not asked. See
        `identical`.

    Returns:
      `Result`.

    Raises:
      ValueError: K is below 2, a size does not fit, or an answer is not one probability in [0, 1] for each pair.
    """
    ids = np.ascontiguousarray(prompt_ids, np.int64)
    if len(ids) != num_prompts:
        raise ValueError(
            f"prompt_ids must name each of the {num_prompts} prompts, got {len(ids)} of them; give one id a prompt"
        )
    if k < 2:
        raise ValueError(f"k must be at least 2, got {k}; a tournament needs two completions of a prompt")
    same = None
    if classes is not None:
        if classes.shape != (num_prompts, k):
            raise ValueError(f"classes must have the completions' shape ({num_prompts}, {k}), got {classes.shape}")
        same = np.ascontiguousarray(classes, np.int32).reshape(-1)
    tournament = _native.Tournament(ids, k=k, step=step, seed=seed, classes=same)
    while len((questions := tournament.questions())[0]):
        tournament.answer(np.ascontiguousarray(ask_round(*questions), np.float32))
    best, worst, preference, outcomes, comparisons = tournament.results()
    return Result(best, worst, preference, outcomes == 0, outcomes, comparisons)


def identical(tokens: Int[np.ndarray, "P K T"], lengths: Int[np.ndarray, "P K"]) -> Int32[np.ndarray, "P K"]:
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
