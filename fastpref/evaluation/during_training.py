"""Held-out evaluation during a run: win rate, distance from the reference, lengths, agreement with the judge."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from fastpref.data.batches import token_mask
from fastpref.data.packing import pack_pairs
from fastpref.data.rendered import conversation_of
from fastpref.evaluation.win_rates import both_orders, summarise
from fastpref.judging.identity import digest
from fastpref.judging.recorded import RecordedJudge
from fastpref.kernels import Divergence, divergence
from fastpref.kernels.divergence import xla
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError, CutWarning, ModelError
from fastpref.models import LanguageModel
from fastpref.models.policy import Policy, hidden_states
from fastpref.models.scoring import score
from fastpref.sampling.generate import Written, write

PURPOSE = "evaluation"
"""Purpose under which the log keeps answers; those to pairs of the reference's own stand at step 0."""
SAMPLES = 8
"""Held-out prompts that are kept for reading."""


def exact_kl(
    policy: Policy,
    ref: Policy,
    prompt_tokens: Int[Array, "P S"],
    prompt_mask: Bool[Array, "P S"],
    completion_tokens: Int[Array, "P K T"],
    completion_mask: Bool[Array, "P K T"],
    *,
    chunk: int | None = None,
) -> Divergence:
    """KL(π ‖ π_ref) and the entropy of π at every token of given completions. Traceable: call it under `jax.jit`.

    Summed along completions that π wrote, the KL has the mean of log π(y) − log π_ref(y) and less variance: it is that
    estimate with each token's draw integrated out.

    Args:
      policy: π.
      ref: π_ref, of the same vocabulary.
      prompt_tokens: token ids, shape [P, S].
      prompt_mask: True where a prompt token is real, shape [P, S].
      completion_tokens: token ids, shape [P, K, T].
      completion_mask: True where a completion token is real, shape [P, K, T]; the others cost nothing.
      chunk: tokens whose [chunk, V] logits, of each model, are alive at once; None for what suits the device.

    Returns:
      KL and entropy in nats, float32, of shape [P, K, T]; 0 where a token does not count.

    Raises:
      ModelError: the two heads have different numbers of rows.
    """
    shape, head, ref_head = completion_tokens.shape, policy.head(), ref.head()
    if head.vocab_size != ref_head.vocab_size:
        raise ModelError(
            "a policy and its reference must have one vocabulary, but received heads of "
            f"{head.vocab_size} and {ref_head.vocab_size} rows. Use the model that the policy was trained from."
        )
    hidden, ref_hidden = (
        hidden_states(model, prompt_tokens, prompt_mask, completion_tokens).reshape(completion_tokens.size, -1)
        for model in (policy, ref)
    )
    measure = divergence if chunk is None else partial(xla.divergence, chunk=chunk)
    kl, entropy = measure(hidden, head, ref_hidden, ref_head, where=completion_mask.reshape(-1))
    return Divergence(kl.reshape(shape), entropy.reshape(shape))


@partial(jax.jit, static_argnames=("definition", "ref_definition"))
def _along(
    definition: Any, params: Any, ref_definition: Any, ref_params: Any, *written: Array
) -> tuple[Float[Array, "P K"], Float[Array, "P K"]]:
    """KL and entropy, summed along each completion."""
    prompt_tokens, prompt_lengths, tokens, lengths = written
    masks = token_mask(prompt_lengths, prompt_tokens.shape[1]), token_mask(lengths, tokens.shape[2])
    policy, ref = nnx.merge(definition, params), nnx.merge(ref_definition, ref_params)
    kl, entropy = exact_kl(policy, ref, prompt_tokens, masks[0], tokens, masks[1])
    return kl.sum(-1), entropy.sum(-1)


class _Texts(NamedTuple):
    """Prompts and completions as arrays, padded on the right."""

    prompt_tokens: Int[np.ndarray, "P S"]
    prompt_lengths: Int[np.ndarray, " P"]
    tokens: Int[np.ndarray, "P K T"]
    lengths: Int[np.ndarray, "P K"]

    @classmethod
    def of(cls, *written: Written) -> "_Texts":
        """Completions of the same prompts, side by side."""
        first = written[0]
        tokens, lengths = (
            np.concatenate([getattr(side, name) for side in written], axis=1) for name in ("tokens", "lengths")
        )
        return cls(first.prompt_tokens, first.prompt_lengths, tokens, lengths)


class _References(NamedTuple):
    """What the reference wrote to the held-out prompts, and what the judge and the reference itself say of it."""

    pairs: _Texts
    first: list[str]
    preference: Float[np.ndarray, " P"]
    ref_logps: Float[np.ndarray, "P 2"]


class HeldOut:
    """Held-out comparisons of a changing policy with its reference.

    The reference writes two completions to each prompt once: the first is what the policy is compared with, and the
    judge's preference between the two is what the policy's own log-ratio is held against.

    Args:
      ref: π_ref.
      prompts: held-out prompts, at least 2 where `config.eval_every` asks for evaluation.
      judge: says p(first ≻ second); it is asked nothing that its log holds.
      config: lengths, temperature and batch size of the run.

    Raises:
      ConfigError: too few prompts.
    """

    def __init__(self, ref: LanguageModel, prompts: list[str], judge: RecordedJudge, config: TrainConfig) -> None:
        if config.eval_every and len(prompts) < 2:
            raise ConfigError(
                f"eval_every={config.eval_every} needs at least 2 eval_prompts, but received {len(prompts)}. "
                "Pass held-out prompts, or set eval_every=0."
            )
        self._ref, self._prompts, self._judge, self._config = ref, prompts, judge, config
        self._rows = min(2 * config.batch_size, max(len(prompts), 1))
        self._baseline: _References | None = None
        self.samples: list[dict[str, Any]] = []
        """The first prompts with what the reference and the policy wrote, and p(policy ≻ reference), last measured."""

    def fingerprint(self) -> dict[str, Any]:
        """Judge and prompts as JSON, for the fingerprint of the run: a curve is measured by one judge on one set."""
        prompts = [(str(prompt), conversation_of(prompt)) for prompt in self._prompts]
        return {"judge": self._judge.identity.fingerprint(), "prompts": digest(prompts)}

    def measure(self, policy: LanguageModel, step: int) -> dict[str, float]:
        """Metrics of the policy as it is now, under `eval/`; `fastpref.runs.metrics` says what they mean.

        Args:
          policy: π.
          step: steps done, under which the answers of the judge are kept.

        Raises:
          JudgeError: see `judging.protocol.ask`.
        """
        if self._baseline is None:
            self._baseline = self._references()
        pairs, baseline, preference, ref_logps = self._baseline
        written = self._write(policy, seed=0)
        texts = [text for (text,) in written.texts]
        judged = both_orders(self._judge.at(PURPOSE, step), self._prompts, texts, baseline)
        rate = summarise(self._prompts, texts, baseline, judged)
        self.samples = [
            {"prompt": prompt, "before": before, "after": after, "preference": float(p)}
            for prompt, before, after, p in zip(self._prompts[:SAMPLES], baseline, texts, judged, strict=False)
        ]
        definition, params = nnx.split(policy.module)
        measure = partial(_along, definition, params, *nnx.split(self._ref.module))
        kl, entropy = self._batched(measure, _Texts.of(written))
        # Both from the same computation, so that a policy that is the reference ties exactly.
        first, second = (self._score(policy, pairs) - ref_logps).T
        differ = (pairs.tokens[:, 0] != pairs.tokens[:, 1]).any(1)
        agreed = (1 + np.sign(first - second) * np.sign(preference - 0.5)) / 2
        tokens = float(written.lengths.sum())
        return {
            "eval/win_rate": rate.value,
            "eval/win_rate_low": rate.low,
            "eval/win_rate_high": rate.high,
            "eval/kl": float((written.policy_logps - written.ref_logps).mean()),
            "eval/kl_exact": float(kl.mean()),
            "eval/kl_per_token": float(kl.sum() / tokens),
            "eval/entropy": float(entropy.sum() / tokens),
            "eval/mean_length": float(written.lengths.mean()),
            "eval/eos_rate": float(written.finished.mean()),
            "eval/agreement": float(agreed[differ].mean()) if differ.any() else float("nan"),
        }

    def _references(self) -> _References:
        # Two calls of one program: with two completions at once it would be another, compiled for this alone.
        written = self._write(self._ref, seed=1), self._write(self._ref, seed=2)
        first, second = ([text for (text,) in side.texts] for side in written)
        preference = both_orders(self._judge.at(PURPOSE, 0), self._prompts, first, second)
        pairs = _Texts.of(*written)
        return _References(pairs, first, preference, self._score(self._ref, pairs))

    def _write(self, model: LanguageModel, *, seed: int) -> Written:
        with warnings.catch_warnings():
            # Which prompts are cut was said before the run began.
            warnings.simplefilter("ignore", CutWarning)
            return write(
                model,
                self._prompts,
                ref=self._ref,
                seed=seed,
                max_new_tokens=self._config.max_new_tokens,
                max_prompt_tokens=self._config.max_prompt_tokens,
                truncation_side=self._config.truncation_side,
                temperature=self._config.temperature,
                batch_size=self._rows,
            )

    def _score(self, model: LanguageModel, pairs: _Texts) -> Float[np.ndarray, "P 2"]:
        """Teacher-forced log π of both completions of each prompt."""
        definition, params = nnx.split(model.module)
        prompt, completions = pairs.prompt_tokens.shape[1], 2 * pairs.tokens.shape[2]
        rows: dict[str, Any] = {"row_tokens": prompt + completions}
        if (start := model.module.decoder_start) is not None:
            rows = {"row_tokens": completions, "prompt_row_tokens": prompt, "decoder_start": start}
            rows["layout"] = "encoder-decoder"

        def logps(*batch: np.ndarray) -> tuple[np.ndarray]:
            packed, slots = pack_pairs(*batch, **rows, max_pairs_per_row=1, counts=[len(batch[0])])
            return (np.asarray(score(definition, params, packed))[slots],)

        return self._batched(logps, pairs)[0]

    def _batched(self, measure: Callable[..., tuple[Any, ...]], texts: _Texts) -> tuple[Float[np.ndarray, "P K"], ...]:
        """Call `measure` on batches of one shape, the last filled up, and join what it finds."""
        count = len(texts.lengths)
        filled = np.arange(-(-count // self._rows) * self._rows) % count
        found = [
            measure(*(array[filled[start : start + self._rows]] for array in texts))
            for start in range(0, count, self._rows)
        ]
        return tuple(np.concatenate([np.asarray(part) for part in parts])[:count] for parts in zip(*found, strict=True))
