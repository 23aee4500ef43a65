"""The parts of a rollout, in the order of a step: draw, judge, pair, anchor. Each takes the whole config."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from fastpref.data.batches import PackedPairs, PromptBatch
from fastpref.data.packing import pack_pairs
from fastpref.judging.pairs import Jury, Selection, select
from fastpref.judging.recorded import RecordedJudge
from fastpref.learning.learner import Frozen
from fastpref.learning.row_plan import RowPlan
from fastpref.method.config import TrainConfig
from fastpref.method.schedules import value_at
from fastpref.models import LanguageModel
from fastpref.models.scoring import score
from fastpref.runs.metrics import sampling_metrics
from fastpref.sampling.completions import Completions
from fastpref.sampling.generate import decode, num_valid_tokens, require_finite, sample


class Judged(NamedTuple):
    """Pairs that were chosen from a step's completions, and what is reported of them."""

    selection: Selection
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


class Paired(NamedTuple):
    """Pairs in rows, not yet anchored."""

    pairs: PackedPairs
    """With log π_ref in `ref_logps`."""
    round_logps: Float[np.ndarray, "P 2"] | None
    """log π_t of the same, where sampling gave it."""
    metrics: dict[str, float]


def draw(
    config: TrainConfig, step: int, batch: PromptBatch, policy: LanguageModel, writer: Frozen, partner: Frozen
) -> Completions:
    """K completions of each prompt of a batch.

    Args:
      config: lengths, temperature, β and seed.
      step: steps done.
      batch: the prompts.
      policy: the model that is trained, for its tokenizer and sizes.
      writer: π, or π_t in algorithms that sample from it.
      partner: the frozen model of the mixture: π_ref, or μ.

    Raises:
      DivergedError: logits were not finite.
    """
    betas = config.method.mixture_betas(value_at(config.mixture_beta, step), config.completions)
    prompts, completions = len(batch.ids), len(betas)
    drawn: Completions = sample(
        writer.definition,
        writer.params,
        partner.definition,
        partner.params,
        batch.tokens,
        batch.lengths,
        np.broadcast_to(np.asarray(betas, np.float32), (prompts, completions)),
        jax.random.fold_in(jax.random.key(config.seed), step),
        np.arange(completions * prompts, dtype=np.int32).reshape(prompts, completions),
        eos_id=policy.tokenizer.stop_ids,
        max_new_tokens=config.max_new_tokens,
        num_valid_tokens=num_valid_tokens(policy),
        temperature=config.temperature,
    )
    require_finite(drawn)
    return drawn


def judge(
    config: TrainConfig,
    step: int,
    batch: PromptBatch,
    drawn: Completions,
    policy: LanguageModel,
    judge: RecordedJudge,
    texts: Mapping[int, str],
) -> Judged:
    """Choice and preference of the pairs that are learned from.

    Args:
      config: names the method, which says how pairs are chosen.
      step: steps done.
      batch: the prompts.
      drawn: their completions.
      policy: for its tokenizer.
      judge: of the completions, with the log of its answers.
      texts: each prompt by its id.

    Raises:
      JudgeError: the judge failed.
    """
    prompts = [texts[int(index)] for index in batch.ids]
    written = decode(policy, drawn, prompts)
    tokens, lengths = np.asarray(drawn.tokens), np.asarray(drawn.lengths)
    jury = Jury(
        judge,
        prompts,
        written,
        tokens,
        lengths,
        ids=batch.ids,
        step=step,
        missing_eos_penalty=config.missing_eos_penalty,
    )
    selection = select(config.method.pairs, jury, seed=config.seed, baseline=config.baseline)
    by_policy = [writer == "policy" for writer in config.method.writers]
    metrics = sampling_metrics(drawn, by_policy if any(by_policy) else None, policy.tokenizer.stop_ids)
    metrics |= selection.metrics
    if config.method.judged_by == "reward":
        tau, _ = config.strengths(step)
        metrics["objective/rlhf_reward"] = metrics["objective/scores"] - tau * metrics["objective/kl"]
    return Judged(selection, metrics, _samples(prompts, written, selection, jury))


def pair(
    config: TrainConfig,
    batch: PromptBatch,
    drawn: Completions,
    selection: Selection,
    plan: RowPlan,
    ref: Frozen,
    *,
    partner_is_ref: bool,
) -> Paired:
    """Chosen pairs in rows, with their reference log-probs.

    Args:
      config: the method; whether the reference scores again.
      batch: the prompts.
      drawn: their completions.
      selection: which of them are learned from.
      plan: the rows.
      ref: π_ref.
      partner_is_ref: the mixture was with π_ref, so that sampling collected its log-probs.
    """
    method = config.method
    learned = selection.chosen[:, :1] if method.pairs == "first" else selection.chosen

    def take(values: Array) -> Float[np.ndarray, "P 2"]:
        return np.pad(np.take_along_axis(np.asarray(values), learned, 1), ((0, 0), (0, 2 - learned.shape[1])))

    def picked(values: Array) -> Int[np.ndarray, "P ..."]:
        array = np.asarray(values)
        return np.take_along_axis(array, learned.reshape(*learned.shape, *[1] * (array.ndim - 2)), 1)

    ref_logps, policy_logps = take(drawn.ref_logps), take(drawn.policy_logps)
    pairs, slots = pack_pairs(
        batch.tokens,
        batch.lengths,
        picked(drawn.tokens),
        picked(drawn.lengths),
        ref_logps=ref_logps,
        preference=selection.preference,
        scores=selection.scores,
        where=selection.where,
        ids=batch.ids,
        counts=plan.counts,
        **plan.shape,
    )
    used = slots >= 0
    metrics = {}
    # What sampling collected is log π_ref only where π_ref was mixed in, and log π_t only where π_t wrote.
    if config.rescore_reference or not partner_is_ref:
        pairs = pairs._replace(ref_logps=score(ref.definition, ref.params, pairs))
        ref_logps[used] = np.asarray(pairs.ref_logps)[slots[used]]
    if not partner_is_ref:
        ratios = (policy_logps - ref_logps)[used, : learned.shape[1]]
        name = "objective/kl" if method.writers[0] == "policy" else "objective/writer_kl"
        metrics[name] = float(ratios.mean()) if used.any() else 0.0
    round_logps = None
    if "round" in method.writers and not config.rescore_reference:
        round_logps = np.zeros(pairs.lengths.shape, np.float32)
        round_logps[slots[used]] = policy_logps[used]
    return Paired(pairs, round_logps, metrics)


def recorded(pairs: PackedPairs, ref: Frozen | None) -> Paired:
    """Recorded pairs of an offline method, with their reference log-probs where the update does not score them."""
    preference, lengths = pairs.preference[pairs.where], pairs.lengths[pairs.where]
    metrics = {
        "preference/mean": float(preference.mean()),
        "preference/confidence": float(np.abs(preference - np.float32(0.5)).mean()),
        "completions/mean_length": float(lengths.mean()),
        "pairs/used": float(pairs.where.sum()),
    }
    if ref is not None:
        # Not kept from epoch to epoch: their rounding depends on the batch, and a continued run must not differ.
        pairs = pairs._replace(ref_logps=score(ref.definition, ref.params, pairs))
    return Paired(pairs, None, metrics)


def anchor(config: TrainConfig, step: int, paired: Paired, at_round: Frozen) -> PackedPairs:
    """The pairs with what log π is compared with: the frozen models' log-probs by the weights of the method.

    Args:
      config: the method, τ and η.
      step: steps done.
      paired: the pairs, with log π_ref.
      at_round: π_t; it scores the pairs where sampling did not.
    """
    pairs, round_logps, _ = paired
    of_ref, of_round = config.method.anchor_weights(*config.strengths(step))
    if of_round == 0:
        return pairs
    if round_logps is None:
        round_logps = np.asarray(score(at_round.definition, at_round.params, pairs))
    if of_ref == 0:
        return pairs._replace(ref_logps=round_logps)
    both = np.float32(of_ref) * np.asarray(pairs.ref_logps) + np.float32(of_round) * round_logps
    return pairs._replace(ref_logps=both)


class Clock:
    """Seconds between laps, under metric names."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Name what has passed since the last lap."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _samples(prompts: list[str], written: list[list[str]], selection: Selection, jury: Jury) -> list[dict[str, Any]]:
    """The first two prompts of a step, for reading."""
    shown = []
    for index, prompt in enumerate(prompts[:2]):
        texts = [written[index][which] for which in selection.chosen[index]]
        if len(texts) == 1:
            shown.append({"prompt": prompt, "first": texts[0], "reward": float(jury.rewards()[index, 0])})
        else:
            answer = {"first": texts[0], "second": texts[1], "preference": float(selection.judged[index])}
            shown.append({"prompt": prompt, **answer})
    return shown
