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
from fastpref.data.rendered import conversation_of
from fastpref.evaluation.win_rates import both_orders, summarise
from fastpref.judging.identity import digest
from fastpref.judging.recorded import RecordedJudge
from fastpref.kernels import Divergence, divergence, token_logprobs
from fastpref.kernels.divergence import xla
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError, CutWarning, ModelError
from fastpref.models import LanguageModel
from fastpref.models.policy import Policy, hidden_states
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
    prompt_tokens, prompt_mask, tokens, mask = _masked(*written)
    found = exact_kl(
        nnx.merge(definition, params), nnx.merge(ref_definition, ref_params), prompt_tokens, prompt_mask, tokens, mask
    )
    return found.kl.sum(-1), found.entropy.sum(-1)


@partial(jax.jit, static_argnames=("definition",))
def _logps(definition: Any, params: Any, *written: Array) -> Float[Array, "P K"]:
    """Teacher-forced log π(y | x)."""
    policy: Policy = nnx.merge(definition, params)
    prompt_tokens, prompt_mask, tokens, mask = _masked(*written)
    hidden = hidden_states(policy, prompt_tokens, prompt_mask, tokens).reshape(tokens.size, -1)
    logps = token_logprobs(hidden, policy.head(), tokens.reshape(-1), where=mask.reshape(-1))
    return logps.reshape(tokens.shape).sum(-1)


def _masked(
    prompt_tokens: Int[Array, "P S"],
    prompt_lengths: Int[Array, " P"],
    tokens: Int[Array, "P K T"],
    lengths: Int[Array, "P K"],
) -> tuple[Array, Array, Array, Array]:
    return (
        prompt_tokens,
        token_mask(prompt_lengths, prompt_tokens.shape[1]),
        tokens,
        token_mask(lengths, tokens.shape[2]),
    )


class _References(NamedTuple):
    """What the reference wrote to the held-out prompts, and what the judge and the reference itself say of it."""

    pairs: tuple[Written, Written]
    first: list[str]
    preference: Float[np.ndarray, " P"]
    ref_logps: tuple[Float[np.ndarray, " P"], ...]


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
        kl, entropy = self._batched(partial(_along, definition, params, *nnx.split(self._ref.module)), written)
        # Both from the same computation, so that a policy that is the reference ties exactly.
        first, second = (self._score(policy, side) - logps for side, logps in zip(pairs, ref_logps, strict=True))
        differ = (pairs[0].tokens != pairs[1].tokens).any((1, 2))
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
        pairs = self._write(self._ref, seed=1), self._write(self._ref, seed=2)
        first, second = ([text for (text,) in side.texts] for side in pairs)
        preference = both_orders(self._judge.at(PURPOSE, 0), self._prompts, first, second)
        return _References(pairs, first, preference, tuple(self._score(self._ref, side) for side in pairs))

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

    def _score(self, model: LanguageModel, written: Written) -> Float[np.ndarray, " P"]:
        definition, params = nnx.split(model.module)
        (logps,) = self._batched(lambda *batch: (_logps(definition, params, *batch),), written)
        return logps[:, 0]

    def _batched(
        self, measure: Callable[..., tuple[Array, ...]], written: Written
    ) -> tuple[Float[np.ndarray, "P K"], ...]:
        """Call `measure` on batches of one shape, the last filled up, and join what it finds."""
        arrays = (written.prompt_tokens, written.prompt_lengths, written.tokens, written.lengths)
        count = len(written.lengths)
        filled = np.arange(-(-count // self._rows) * self._rows) % count
        found = [
            measure(*(array[filled[start : start + self._rows]] for array in arrays))
            for start in range(0, count, self._rows)
        ]
        return tuple(np.concatenate([np.asarray(part) for part in parts])[:count] for parts in zip(*found, strict=True))
