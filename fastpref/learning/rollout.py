"""From a batch of prompts, or of recorded pairs, to what the learner takes: sample, judge, select, score."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from fastpref.data.batches import PackedPairs, PromptBatch
from fastpref.data.packing import pack_pairs
from fastpref.judging.pairs import Jury, Selection, select
from fastpref.judging.recorded import RecordedJudge
from fastpref.learning import update
from fastpref.learning.row_plan import RowPlan
from fastpref.method.config import TrainConfig
from fastpref.method.schedules import value_at
from fastpref.models import LanguageModel
from fastpref.runs.metrics import sampling_metrics
from fastpref.sampling.completions import Completions
from fastpref.sampling.generate import decode, generate_jit, num_valid_tokens


class Frozen(NamedTuple):
    """A model that is only read."""

    definition: Any
    params: Any


class Gathered(NamedTuple):
    """What one step learns from, and what is told of it."""

    pairs: PackedPairs
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Everything that stays the same from step to step.

    Args:
      config: the settings; its row says who writes, what judges and what is learned from.
      policy: the model that is trained, for its tokenizer and sizes.
      definition: its GraphDef.
      ref: π_ref.
      partner: the frozen model that the sampler mixes with: π_ref, or μ.
      judge: of the completions, with the log of its answers; None where the data has labels.
      texts: each prompt by its id.
      rows: how pairs are laid out.
    """

    config: TrainConfig
    policy: LanguageModel
    definition: Any
    ref: Frozen
    partner: Frozen
    judge: RecordedJudge | None
    texts: Mapping[int, str]
    rows: RowPlan

    def __call__(self, step: int, batch: PromptBatch | PackedPairs, params: Any, round_params: Any) -> Gathered:
        """What is learned from a batch at a step.

        Args:
          step: steps done.
          batch: prompts, or recorded pairs for offline algorithms.
          params: of π.
          round_params: of π_t, where the algorithm has rounds.

        Raises:
          JudgeError: the judge failed.
        """
        if isinstance(batch, PackedPairs):
            return self._recorded(step, batch, round_params)
        return self._sampled(step, batch, params, round_params)

    def _recorded(self, step: int, pairs: PackedPairs, round_params: Any) -> Gathered:
        preference, lengths = pairs.preference[pairs.where], pairs.lengths[pairs.where]
        metrics = {
            "preference/mean": float(preference.mean()),
            "preference/confidence": float(np.abs(preference - np.float32(0.5)).mean()),
            "completions/mean_length": float(lengths.mean()),
            "pairs/used": float(pairs.where.sum()),
        }
        # Not kept from epoch to epoch: their rounding depends on the batch, and a continued run must not differ.
        pairs = pairs._replace(ref_logps=update.score(self.ref.definition, self.ref.params, pairs))
        return Gathered(self._anchored(step, pairs, None, round_params), metrics, [])

    def _sampled(self, step: int, batch: PromptBatch, params: Any, round_params: Any) -> Gathered:
        row, config = self.config.row, self.config
        clock = Clock()
        drawn = self._draw(step, batch, round_params if "round" in row.writers else params)
        tokens, lengths = np.asarray(drawn.tokens), np.asarray(drawn.lengths)
        clock.lap("time/generate")
        prompts = [self.texts[int(index)] for index in batch.ids]
        written = decode(self.policy, drawn)
        assert self.judge is not None
        jury = Jury(self.judge, prompts, written, tokens, lengths, ids=batch.ids, step=step)
        found = select(row.pairs, jury, seed=config.seed, baseline=config.baseline)
        clock.lap("time/judge")
        learned = found.chosen[:, :1] if row.pairs == "first" else found.chosen

        def take(values: Array) -> Float[np.ndarray, "P 2"]:
            return np.pad(np.take_along_axis(np.asarray(values), learned, 1), ((0, 0), (0, 2 - learned.shape[1])))

        ref_logps = take(drawn.ref_logps)
        pairs, slots = pack_pairs(
            batch.tokens,
            batch.lengths,
            np.take_along_axis(tokens, learned[:, :, None], 1),
            np.take_along_axis(lengths, learned, 1),
            ref_logps=ref_logps,
            preference=found.preference,
            scores=found.scores,
            where=found.where,
            ids=batch.ids,
            counts=self.rows.counts,
            **self.rows.shape,
        )
        used = slots >= 0
        # What sampling collected is log π_ref only where π_ref was mixed in, and log π_t only where π_t wrote.
        if config.rescore_reference or self.partner is not self.ref:
            pairs = pairs._replace(ref_logps=update.score(self.ref.definition, self.ref.params, pairs))
            ref_logps[used] = np.asarray(pairs.ref_logps)[slots[used]]
        round_logps = None
        if "round" in row.writers and not config.rescore_reference:
            round_logps = np.zeros(pairs.lengths.shape, np.float32)
            round_logps[slots[used]] = take(drawn.policy_logps)[used]
        different = np.ones(len(prompts), bool)
        metrics = sampling_metrics(drawn, found.judged, different, self.policy.tokenizer.eos_id)
        if self.partner is not self.ref:
            ratios = (take(drawn.policy_logps) - ref_logps)[used]
            metrics["objective/kl"] = float(ratios[:, : learned.shape[1]].mean()) if used.any() else 0.0
        if row.judged_by == "reward":
            tau, _ = config.strengths(step)
            metrics = {name: value for name, value in metrics.items() if not name.startswith(("preference/", "pairs/"))}
            metrics["objective/rlhf_reward"] = found.metrics["objective/scores"] - tau * metrics["objective/kl"]
        metrics |= found.metrics | clock.laps
        pairs = self._anchored(step, pairs, round_logps, round_params)
        return Gathered(pairs, metrics, _samples(prompts, written, found, jury))

    def _anchored(
        self, step: int, pairs: PackedPairs, round_logps: np.ndarray | None, round_params: Any
    ) -> PackedPairs:
        """The pairs with what log π is compared with: the frozen models' log-probs by the weights of the row."""
        of_ref, of_round = self.config.row.anchor_weights(*self.config.strengths(step))
        if of_round == 0:
            return pairs
        if round_logps is None:
            round_logps = np.asarray(update.score(self.definition, round_params, pairs))
        if of_ref == 0:
            return pairs._replace(ref_logps=round_logps)
        both = np.float32(of_ref) * np.asarray(pairs.ref_logps) + np.float32(of_round) * round_logps
        return pairs._replace(ref_logps=both)

    def _draw(self, step: int, batch: PromptBatch, params: Any) -> Completions:
        config = self.config
        betas = config.row.mixture_betas(value_at(config.mixture_beta, step), config.completions)
        rows, completions = len(batch.ids), len(betas)
        drawn: Completions = generate_jit(
            self.definition,
            params,
            self.partner.definition,
            self.partner.params,
            batch.tokens,
            batch.lengths,
            np.broadcast_to(np.asarray(betas, np.float32), (rows, completions)),
            jax.random.fold_in(jax.random.key(config.seed), step),
            np.arange(completions * rows, dtype=np.int32).reshape(rows, completions),
            eos_id=self.policy.tokenizer.eos_id,
            max_new_tokens=config.max_new_tokens,
            num_valid_tokens=num_valid_tokens(self.policy),
            temperature=config.temperature,
        )
        return drawn


class Clock:
    """Seconds between laps, under metric names."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Name what has passed since the last lap."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _samples(prompts: list[str], written: list[list[str]], found: Selection, jury: Jury) -> list[dict[str, Any]]:
    """The first two prompts of a step, for reading."""
    shown = []
    for index, prompt in enumerate(prompts[:2]):
        texts = [written[index][which] for which in found.chosen[index]]
        if len(texts) == 1:
            shown.append({"prompt": prompt, "first": texts[0], "reward": float(jury.rewards()[index, 0])})
        else:
            told = {"first": texts[0], "second": texts[1], "preference": float(found.judged[index])}
            shown.append({"prompt": prompt, **told})
    return shown
