"""Win rates by a judge, with their uncertainty.

Every pair of completions is judged in both orders, so that a taste for the first place cancels and a tie counts as
half. Intervals are bootstrapped over prompts: they say how far the choice of prompts could move a mean. The deviation
is that of the means between sampling seeds and trained models: it says how far another run could.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from jaxtyping import Float

from fastpref.data import files, read_prompts
from fastpref.data.sources import Source, files_of
from fastpref.judging.protocol import Judge, ask
from fastpref.runs import terminal

ASKED_AT_ONCE = 64
"""Pairs of one call of the judge: what a judge that fails midway has answered before is kept."""

RESAMPLES = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class WinRate:
    """How often `policy` beats `baseline` on the same prompts.

    Args:
      value: mean preference over prompts, ties counted as half.
      low: lower end of the 95 % bootstrap interval over prompts.
      high: upper end of that interval.
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


@dataclass(frozen=True)
class WinRates:
    """How often each of M policies beats each other on the same P prompts.

    Entry [i, j] is about policy i against policy j. Entries [i, j] and [j, i] of `value` add up to exactly 1, and the
    diagonal is ½.

    Args:
      names: of the policies, M of them.
      prompts: the P prompts.
      texts: what each wrote: M lists, a list of P completions for each draw (a model and a sampling seed).
      preference: p(i ≻ j) of each compared pair of draws and prompt, shape [C, P], by the names of i and j, for i
        before j.
      draws: the C pairs of draws, as indices into `texts` of i and of j, by the same names.
      value: mean preference over comparisons and prompts, shape [M, M].
      low: lower ends of the 95 % bootstrap intervals over prompts, shape [M, M].
      high: upper ends, shape [M, M].
      deviation: standard deviation between the means of the C comparisons, shape [M, M]; NaN where C is 1.
    """

    names: Sequence[str]
    prompts: Sequence[str]
    texts: Sequence[Sequence[Sequence[str]]]
    preference: Mapping[tuple[str, str], Float[np.ndarray, "C P"]]
    draws: Mapping[tuple[str, str], Sequence[tuple[int, int]]]
    value: Float[np.ndarray, "M M"]
    low: Float[np.ndarray, "M M"]
    high: Float[np.ndarray, "M M"]
    deviation: Float[np.ndarray, "M M"]

    def rows(self) -> list[dict[str, Any]]:
        """One plain record for each ordered pair of different policies; a deviation of one comparison is None."""
        return [
            {
                "policy": self.names[i],
                "baseline": self.names[j],
                "win_rate": float(self.value[i, j]),
                "low": float(self.low[i, j]),
                "high": float(self.high[i, j]),
                "deviation": None if np.isnan(self.deviation[i, j]) else float(self.deviation[i, j]),
                "comparisons": len(self.preference[self.names[min(i, j)], self.names[max(i, j)]]),
                "prompts": len(self.prompts),
            }
            for i, j in product(range(len(self.names)), repeat=2)
            if i != j
        ]

    def records(self) -> list[dict[str, Any]]:
        """One plain record for each pair of policies, pair of draws and prompt."""
        where = {name: index for index, name in enumerate(self.names)}
        return [
            {
                "policy": one,
                "baseline": other,
                "draws": list(pair),
                "prompt": prompt,
                "policy_completion": self.texts[where[one]][pair[0]][number],
                "baseline_completion": self.texts[where[other]][pair[1]][number],
                "preference": float(preference[number]),
            }
            for (one, other), judged in self.preference.items()
            for pair, preference in zip(self.draws[one, other], judged, strict=True)
            for number, prompt in enumerate(self.prompts)
        ]

    def table(self) -> None:
        """Print the matrix: win rate of the row over the column, deviation behind ±, interval below."""
        terminal.table(
            f"Win rate of the row over the column, {len(self.prompts)} prompts",
            ["p(row ≻ column)", *self.names],
            [[name, *(self._cell(i, j) for j in range(len(self.names)))] for i, name in enumerate(self.names)],
        )

    def _cell(self, i: int, j: int) -> str:
        if i == j:
            return "0.500"
        deviation = "" if np.isnan(self.deviation[i, j]) else f" ± {self.deviation[i, j]:.3f}"
        return f"{self.value[i, j]:.3f}{deviation}\n{self.low[i, j]:.3f} to {self.high[i, j]:.3f}"

    def plot(self, path: str | Path) -> Path:
        """Draw the matrix as a heat map to a PNG file."""
        from fastpref.runs import plots

        return plots.heat_map(Path(path), self.names, self.value, self.deviation)

    def save(self, directory: str | Path) -> None:
        """Write `win_rates.json`, `win_rates.csv`, `win_rates.png` and `records.jsonl`, over what is there."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        matrices = {name: getattr(self, name).tolist() for name in ("value", "low", "high", "deviation")}
        content = {"names": list(self.names), "prompts": len(self.prompts), **matrices}
        # JSON has no NaN: a deviation of one comparison is null.
        files.write_file(folder / "win_rates.json", orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
        entries = self.rows()
        files.write_csv(folder / "win_rates.csv", list(entries[0]), [list(entry.values()) for entry in entries])
        files.write_jsonl(folder / "records.jsonl", self.records())
        self.plot(folder / "win_rates.png")


def win_rate(prompts: Source, policy: Sequence[str], baseline: Sequence[str], judge: Judge) -> WinRate:
    """Compare two sets of completions of the same prompts.

    Args:
      prompts: P texts, at least 2; or any other form that `train` takes, but for messages: of conversations what
        `fastpref.data.read_prompts` makes of them with a policy's tokenizer.
      policy: P completions.
      baseline: P completions.
      judge: says p(first ≻ second).

    Raises:
      ValueError: fewer than 2 prompts, or lists of different lengths.
      JudgeError: see `judging.protocol.ask`.
    """
    texts = read_prompts(prompts)
    check_prompts(texts)
    if not len(texts) == len(policy) == len(baseline):
        raise ValueError(
            "a win rate needs one completion of each side for each prompt, but received "
            f"{len(texts)} prompts, {len(policy)} and {len(baseline)} completions. Give lists of equal length."
        )
    return summarise(texts, policy, baseline, both_orders(judge, texts, policy, baseline))


def check_prompts(prompts: Source) -> None:
    """Raise ValueError for fewer than 2 prompts, as far as their number is known before they are read."""
    if isinstance(prompts, list | tuple) and len(prompts) < 2 and not files_of(prompts):
        raise ValueError(f"a win rate needs at least 2 prompts, but received {len(prompts)}. Give more of them.")


def both_orders(
    judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> Float[np.ndarray, " P"]:
    """p(first ≻ second) of each prompt, the mean of both orders, shape [P], float64; see `judging.protocol.ask`."""
    preference = np.zeros(len(prompts))
    for start in range(0, len(prompts), ASKED_AT_ONCE):
        part, *sides = (texts[start : start + ASKED_AT_ONCE] for texts in (prompts, first, second))
        # In float64: the two orders of a tie then add up to exactly 1.
        forth, back = (ask(judge, part, *pair).astype(np.float64) for pair in (sides, sides[::-1]))
        preference[start : start + ASKED_AT_ONCE] = (forth + 1 - back) / 2
    return preference


def summarise(
    prompts: Sequence[str], policy: Sequence[str], baseline: Sequence[str], preference: Float[np.ndarray, " P"]
) -> WinRate:
    """The win rate of judged completions."""
    low, high = bootstrap(preference[None, :])
    return WinRate(float(preference.mean()), float(low[0]), float(high[0]), prompts, policy, baseline, preference)


def tabulate(
    names: Sequence[str], preference: Mapping[tuple[str, str], Float[np.ndarray, "_ P"]]
) -> tuple[Float[np.ndarray, "M M"], ...]:
    """Value, lower end, upper end and deviation of each entry; `preference` holds each pair once."""
    count = len(names)
    value, low, high = (np.full((count, count), 0.5) for _ in range(3))
    deviation = np.zeros((count, count))
    pairs = [(names.index(one), names.index(other)) for one, other in preference]
    judged = list(preference.values())
    ends = bootstrap(np.stack([entries.mean(0) for entries in judged]))
    for (i, j), entries, below, above in zip(pairs, judged, *ends, strict=True):
        value[i, j] = entries.mean()
        low[i, j], high[i, j] = below, above
        value[j, i], low[j, i], high[j, i] = 1 - value[i, j], 1 - above, 1 - below
        deviation[i, j] = deviation[j, i] = entries.mean(1).std(ddof=1) if len(entries) > 1 else np.nan
    return value, low, high, deviation


def bootstrap(
    values: Float[np.ndarray, "C P"], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """The 95 % percentile bootstrap interval of each row's mean; all rows share their resamples of the P columns.

    Args:
      values: C rows of P independent values.
      resamples: how many samples of P columns are drawn, with replacement.
      seed: of those draws.

    Returns:
      The 2.5 % and the 97.5 % quantile of the means, shape [C] each.
    """
    rng = np.random.default_rng(seed)
    size = values.shape[1]
    means = np.stack([values[:, rng.integers(0, size, size)].mean(1) for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high
