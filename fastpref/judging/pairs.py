"""Choice of the completions that are learned from among K of each prompt, and their judgement.

The loop asks for `select`; each kind of `pairs` of a method in the table is one function here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fastpref.data.rendered import is_finished
from fastpref.judging import tournament
from fastpref.judging.protocol import Rewarder, by_scores, probability
from fastpref.judging.recorded import RecordedJudge

PURPOSE = "training"
"""Purpose under which the log keeps the answers of a step."""


class Selection(NamedTuple):
    """What is learned from the K completions of P prompts."""

    chosen: Int[np.ndarray, "P C"]
    """Numbers of y and, where there are two, y' among the K."""
    judged: Float[np.ndarray, " P"]
    """p(y ≻ y'); ½ where there is no y'."""
    preference: Float[np.ndarray, " P"]
    """The same as the loss takes it: 1 for pairs that won a tournament."""
    scores: Float[np.ndarray, "P 2"]
    """What a loss of single completions takes; else 0."""
    where: Bool[np.ndarray, " P"]
    """Whether a pair is learned from."""
    metrics: dict[str, float]


class Jury:
    """Answers comparisons: ½ where two completions are the same tokens, else as the judge says.

    Where `by_scores` holds, p(y ≻ y') = σ(r(y) − r(y')), and every completion is scored once.

    Args:
      judge: the judge; answers that its log holds for this step are used again.
      prompts: P texts.
      texts: the K completions of each, `Unfinished` where they were cut off.
      tokens: their token ids, [P, K, T].
      lengths: how many of them are real, [P, K].
      ids: names of the prompts, for the draw of a tournament.
      step: number of the step, for the same and for the log.
      missing_eos_penalty: subtracted from the reward of a completion that was cut off.
    """

    def __init__(
        self,
        judge: RecordedJudge,
        prompts: Sequence[str],
        texts: Sequence[Sequence[str]],
        tokens: Int[np.ndarray, "P K T"],
        lengths: Int[np.ndarray, "P K"],
        *,
        ids: Int[np.ndarray, " P"],
        step: int,
        missing_eos_penalty: float | None = None,
    ) -> None:
        self._penalty = np.float32(missing_eos_penalty or 0.0)
        self.judge, self.prompts, self.texts = judge, prompts, texts
        self.ids, self.step = ids, step
        self.classes = tournament.identical(tokens, lengths)
        """Equal numbers, equal completions, [P, K]."""
        self.asked = 0
        """Comparisons that the judge was asked for."""
        self._rewards: np.ndarray | None = None

    def rewards(self) -> Float[np.ndarray, "P K"]:
        """r(x, y) of every completion, less the penalty where it was cut off; asked for once."""
        if not isinstance(self.judge.judge, Rewarder):
            raise TypeError(
                f"rewards must come from a judge with scores(prompts, completions), but received "
                f"{self.judge.judge!r}. Pass a RewardModel."
            )
        if self._rewards is None:
            prompts, completions = self.classes.shape
            flat = self.judge.rate(
                [prompt for prompt in self.prompts for _ in range(completions)],
                [text for written in self.texts for text in written],
                purpose=PURPOSE,
                step=self.step,
            )
            cut = np.array([not is_finished(text) for written in self.texts for text in written], bool)
            self._rewards = np.where(cut, flat - self._penalty, flat).reshape(prompts, completions)
        return self._rewards

    def compare(
        self, prompt: Int[np.ndarray, " M"], first: Int[np.ndarray, " M"], second: Int[np.ndarray, " M"]
    ) -> Float[np.ndarray, " M"]:
        """p(first ≻ second) of completions of prompts, all by number, in one call of the judge."""
        preference = np.full(len(prompt), 0.5, np.float32)
        different = self.classes[prompt, first] != self.classes[prompt, second]
        prompt, first, second = (np.asarray(index)[different] for index in (prompt, first, second))
        self.asked += len(prompt)
        if not len(prompt):
            return preference
        if by_scores(self.judge.judge):
            rewards = self.rewards()
            preference[different] = probability(rewards[prompt, first] - rewards[prompt, second])
        else:
            preference[different] = self.judge.ask(
                [self.prompts[at] for at in prompt],
                [self.texts[at][which] for at, which in zip(prompt, first, strict=True)],
                [self.texts[at][which] for at, which in zip(prompt, second, strict=True)],
                purpose=PURPOSE,
                step=self.step,
            )
        return preference


def select(pairs: str, jury: Jury, *, seed: int, baseline: str = "none") -> Selection:
    """Judge the completions and choose what is learned from.

    Args:
      pairs: see `algorithms.Algorithm`.
      jury: judges the completions; it holds them.
      seed: of the run, for the draw of a tournament.
      baseline: of rewards; see `TrainConfig`.

    Returns:
      `Selection`.

    Raises:
      JudgeError: see `protocol.ask` and `protocol.rate`.
    """
    prompts, completions = jury.classes.shape
    everyone = np.arange(prompts)
    if pairs == "first" and completions == 1:
        return _rewarded(jury, baseline)
    if pairs == "tournament":
        found = tournament.run(jury.compare, prompts, completions, jury.ids, jury.step, seed, classes=jury.classes)
        chosen, preference, kept = np.stack([found.best, found.worst], 1), found.preference, found.kept
        scores, label = np.zeros((prompts, 2), np.float32), np.ones(prompts, np.float32)
    elif pairs == "win rates":
        chosen, preference, scores = _by_win_rate(jury)
        label, kept = preference, np.ones(prompts, bool)
    else:
        chosen = np.tile(np.arange(2), (prompts, 1))
        preference = jury.compare(everyone, chosen[:, 0], chosen[:, 1])
        scores = np.stack([preference - np.float32(0.5), np.float32(0.5) - preference], 1)
        label, kept = preference, np.ones(prompts, bool)
    best, worst = (jury.classes[everyone, chosen[:, which]] for which in (0, 1))
    identical = best == worst
    # Alone, y is also pulled back to the reference, whatever its opponent.
    where = np.ones(prompts, bool) if pairs == "first" else kept & ~identical
    metrics = {
        "preference/mean": float(preference.mean()),
        "preference/confidence": float(np.abs(preference - np.float32(0.5)).mean()),
        "preference/comparisons": float(jury.asked),
        "pairs/used": float(where.sum()),
        "pairs/identical": float(identical.sum()),
    }
    if pairs == "tournament":
        for code, reason in enumerate(tournament.OUTCOMES[1:], 1):
            metrics[f"pairs/{reason}"] = float((found.outcomes == code).sum())
    return Selection(chosen, preference, label, scores, where, metrics)


def _by_win_rate(jury: Jury) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best and worst by p(y ≻ π_t), estimated from all K completions, y among them; p(best ≻ worst); both rates − ½."""
    prompts, completions = jury.classes.shape
    first, second = np.triu_indices(completions, 1)
    prompt = np.repeat(np.arange(prompts), len(first))
    asked = jury.compare(prompt, np.tile(first, prompts), np.tile(second, prompts)).reshape(prompts, -1)
    beats = np.full((prompts, completions, completions), 0.5, np.float32)
    beats[:, first, second] = asked
    beats[:, second, first] = 1 - asked
    rates = beats.mean(-1)
    # The first of equals is the best, the last of equals the worst, so that they are two.
    chosen = np.stack([rates.argmax(1), completions - 1 - rates[:, ::-1].argmin(1)], 1)
    everyone = np.arange(prompts)
    scores = np.take_along_axis(rates, chosen, 1) - np.float32(0.5)
    return chosen, beats[everyone, chosen[:, 0], chosen[:, 1]], scores


def _rewarded(jury: Jury, baseline: str) -> Selection:
    rewards = jury.rewards()[:, 0]
    prompts = len(rewards)
    # Of the other completions alone: one's own reward in its baseline would bias the gradient.
    others = (rewards.sum() - rewards) / np.float32(max(prompts - 1, 1))
    score = rewards - others if baseline == "batch" else rewards
    tie = np.full(prompts, 0.5, np.float32)
    return Selection(
        np.zeros((prompts, 1), np.int64),
        tie,
        tie,
        np.stack([score, np.zeros_like(score)], 1),
        np.ones(prompts, bool),
        {"objective/scores": float(rewards.mean()), "pairs/used": float(prompts)},
    )
