"""Side-by-side win rates of one policy over another, by a judge, with their uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fastpref.generation import write
from fastpref.judging import Judge, ask
from fastpref.models import LanguageModel, as_model

NORMAL_95 = 1.959963984540054
"""Quantile of the standard normal that leaves 2.5 % above it."""


@dataclass(frozen=True)
class WinRate:
    """How often `policy` beats `baseline` on the same prompts.

    Args:
      value: mean preference over prompts, ties counted as half.
      low: lower end of the 95 % interval.
      high: upper end of the 95 % interval.
      prompts: the P prompts.
      policy: a completion of the policy to each prompt.
      baseline: a completion of the baseline to each prompt.
      preference: p(policy ≻ baseline) of each prompt, averaged over both orders, shape [P].
    """

    value: float
    low: float
    high: float
    prompts: Sequence[str]
    policy: Sequence[str]
    baseline: Sequence[str]
    preference: Float[np.ndarray, " P"]

    def records(self) -> list[dict[str, Any]]:
        """One plain record for each prompt."""
        return [
            {"prompt": prompt, "policy": policy, "baseline": baseline, "preference": float(preference)}
            for prompt, policy, baseline, preference in zip(
                self.prompts, self.policy, self.baseline, self.preference, strict=True
            )
        ]


def _check_number(prompts: Sequence[str]) -> None:
    if len(prompts) < 2:
        raise ValueError(f"a win rate needs at least 2 prompts, but received {len(prompts)}. Give more of them.")


def win_rate(prompts: Sequence[str], policy: Sequence[str], baseline: Sequence[str], judge: Judge) -> WinRate:
    """Compare two sets of completions of the same prompts.

    Each pair is judged in both orders, so that a judge's taste for the first place cancels. The interval is the normal
    one of the mean over prompts, which are taken as independent.

    Args:
      prompts: P texts, at least 2.
      policy: P completions.
      baseline: P completions.
      judge: says p(first ≻ second).

    Raises:
      ValueError: fewer than 2 prompts, or lists of different lengths.
      JudgeError: see `judging.ask`.
    """
    _check_number(prompts)
    if not len(prompts) == len(policy) == len(baseline):
        raise ValueError(
            "a win rate needs one completion of each side for each prompt, but received "
            f"{len(prompts)} prompts, {len(policy)} and {len(baseline)} completions. Give lists of equal length."
        )
    preference = (ask(judge, prompts, policy, baseline) + 1 - ask(judge, prompts, baseline, policy)) / 2
    value = float(preference.mean())
    half = NORMAL_95 * float(preference.std(ddof=1)) / len(prompts) ** 0.5
    return WinRate(
        value=value,
        low=max(0.0, value - half),
        high=min(1.0, value + half),
        prompts=prompts,
        policy=policy,
        baseline=baseline,
        preference=preference,
    )


def evaluate(
    policy: LanguageModel | str | Path,
    baseline: LanguageModel | str | Path,
    prompts: Sequence[str],
    judge: Judge,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> WinRate:
    """Let two policies write to the same held-out prompts and compare them side by side.

    Args:
      policy: the policy that is evaluated; a `LanguageModel` or the directory of a checkpoint.
      baseline: what it is compared with, usually the reference.
      prompts: P texts that neither was trained on, at least 2.
      judge: says p(first ≻ second).
      max_new_tokens: longest completion, EOS included.
      max_prompt_tokens: longest prompt; longer ones keep their first tokens.
      temperature: of the draws.
      seed: of the draws; the two policies draw with different noise.
      batch_size: prompts decoded at once.

    Raises:
      ValueError: fewer than 2 prompts, or an empty one.
      JudgeError: see `judging.ask`.
    """
    # Before anything is written, which may take long.
    _check_number(prompts)

    def sample(model: LanguageModel | str | Path, stream: int) -> list[str]:
        written = write(
            as_model(model),
            prompts,
            seed=2 * seed + stream,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            temperature=temperature,
            batch_size=batch_size,
        )
        return [first for (first,) in written.texts]

    return win_rate(prompts, sample(policy, 0), sample(baseline, 1), judge)
