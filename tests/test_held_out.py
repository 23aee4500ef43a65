"""Exact distances against a dense float64 computation, and every held-out metric against what was written."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import PROMPTS, language_model, prefers_w1

from fastpref.data.batches import token_mask
from fastpref.evaluation.during_training import HeldOut, _Texts, exact_kl
from fastpref.judging.recorded import RecordedJudge
from fastpref.kernels import Head
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError, ModelError
from fastpref.models import Decoder, DecoderConfig
from fastpref.models.policy import hidden_states
from fastpref.sampling.generate import write

CONFIG = TrainConfig(batch_size=4, max_prompt_tokens=8, max_new_tokens=6, eval_every=2)
HELD_OUT = PROMPTS[:11]


def dense(hidden: Any, ref_hidden: Any, head: Head, ref_head: Head) -> tuple[np.ndarray, np.ndarray]:
    """KL and entropy in float64 from all logits at once."""

    def logps(states: Any, head: Head) -> np.ndarray:
        weight = np.asarray(head.weight, np.float64)
        logits = head.scale * np.asarray(states, np.float64) @ (weight.T if head.vocab_axis == 0 else weight)
        if head.soft_cap is not None:
            logits = head.soft_cap * np.tanh(logits / head.soft_cap)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    policy, ref = logps(hidden, head), logps(ref_hidden, ref_head)
    return (np.exp(policy) * (policy - ref)).sum(-1), -(np.exp(policy) * policy).sum(-1)


@pytest.mark.parametrize(("family", "chunk"), [("decoder", None), ("t5", 16)])
def test_models_are_compared_at_every_token(family: str, chunk: int | None) -> None:
    policy, ref = language_model(family).module, language_model(family, seed=1).module
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(3, 33, (3, 5)), jnp.int32)
    prompt_mask = jnp.arange(5)[None, :] < jnp.array([[5], [2], [4]])
    tokens = jnp.asarray(rng.integers(3, 33, (3, 2, 6)), jnp.int32)
    mask = jnp.arange(6)[None, None, :] < jnp.asarray(rng.integers(0, 7, (3, 2, 1)))

    @nnx.jit
    def both(policy: Any, ref: Any) -> Any:
        states = [hidden_states(model, prompts, prompt_mask, tokens) for model in (policy, ref)]
        return exact_kl(policy, ref, prompts, prompt_mask, tokens, mask, chunk=chunk), states

    found, (states, ref_states) = both(policy, ref)
    kl, entropy = dense(states, ref_states, policy.head(), ref.head())
    assert found.kl.shape == (3, 2, 6)
    np.testing.assert_allclose(found.kl, np.where(mask, kl, 0), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found.entropy, np.where(mask, entropy, 0), rtol=2e-5, atol=1e-5)


def test_other_vocabularies_are_refused() -> None:
    policy = language_model().module
    config = DecoderConfig(vocab_size=30, width=16, hidden=24, layers=1, heads=2, kv_heads=2, head_dim=8)
    ref, tokens = Decoder(config, rngs=nnx.Rngs(0)), jnp.ones((1, 2, 3), jnp.int32)
    with pytest.raises(ModelError, match=r"must have one vocabulary, but received heads of 36 and 30 rows\. Use the"):
        exact_kl(policy, ref, tokens[:, 0], tokens[:, 0] > 0, tokens, tokens > 0)


def test_every_metric_is_what_was_written() -> None:
    policy, ref = language_model(seed=1), language_model()
    asked: list[int] = []

    def judge(prompts: Any, first: Any, second: Any) -> list[float]:
        asked.append(len(prompts))
        return prefers_w1(prompts, first, second)

    evaluation = HeldOut(ref, HELD_OUT, RecordedJudge(judge), CONFIG)
    found = evaluation.measure(policy, 1)
    settings: dict[str, Any] = {"max_new_tokens": 6, "max_prompt_tokens": 8, "ref": ref, "batch_size": 8}
    ours = write(policy, HELD_OUT, seed=0, **settings)
    pair = [write(ref, HELD_OUT, seed=seed, **settings) for seed in (1, 2)]
    first, second = ([text for (text,) in side.texts] for side in pair)
    mine = [text for (text,) in ours.texts]
    assert found["eval/win_rate"] == pytest.approx(np.mean(prefers_w1([], mine, first)))
    assert found["eval/win_rate_low"] <= found["eval/win_rate"] <= found["eval/win_rate_high"]
    assert found["eval/kl"] == pytest.approx((ours.policy_logps - ours.ref_logps).mean(), rel=1e-5)
    assert found["eval/mean_length"] == ours.lengths.mean()
    ends = [row[0][length[0] - 1] == 1 for row, length in zip(ours.tokens, ours.lengths, strict=True)]
    assert found["eval/eos_rate"] == pytest.approx(np.mean(ends))

    mask = token_mask(jnp.asarray(ours.prompt_lengths), ours.prompt_tokens.shape[1])
    states = nnx.jit(
        lambda module: hidden_states(module, jnp.asarray(ours.prompt_tokens), mask, jnp.asarray(ours.tokens))
    )
    real = np.arange(6)[None, None, :] < ours.lengths[:, :, None]
    heads = policy.module.head(), ref.module.head()
    kl, entropy = dense(states(policy.module), states(ref.module), *heads)
    assert found["eval/kl_exact"] == pytest.approx((kl * real).sum((1, 2)).mean(), rel=1e-3)
    assert found["eval/kl_per_token"] == pytest.approx((kl * real).sum() / real.sum(), rel=1e-3)
    assert found["eval/entropy"] == pytest.approx((entropy * real).sum() / real.sum(), rel=1e-4)
    assert 0 < found["eval/kl_per_token"] < found["eval/kl_exact"]

    ratios = evaluation._score(policy, _Texts.of(*pair)) - np.concatenate([side.ref_logps for side in pair], axis=1)
    margins = ratios[:, 0] - ratios[:, 1]
    agreed = (1 + np.sign(margins) * np.sign(np.array(prefers_w1([], first, second)) - 0.5)) / 2
    different = np.array([a != b for a, b in zip(first, second, strict=True)])
    assert found["eval/agreement"] == pytest.approx(agreed[different].mean())

    judged = len(asked)
    assert evaluation.measure(policy, 1) == found
    assert len(asked) == judged + 2, "the reference's own pairs are judged once"


def test_at_the_reference_the_distance_is_zero_and_agreement_is_chance() -> None:
    ref = language_model()
    found = HeldOut(ref, HELD_OUT, RecordedJudge(prefers_w1), CONFIG).measure(ref, 1)
    assert (found["eval/kl"], found["eval/kl_exact"], found["eval/kl_per_token"]) == (0, 0, 0)
    assert found["eval/agreement"] == 0.5
    assert 2 < found["eval/entropy"] < np.log(36)


def test_prompts_are_needed_where_evaluation_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"eval_every=2 needs at least 2 eval_prompts, but received 1"):
        HeldOut(language_model(), ["w1"], RecordedJudge(prefers_w1), CONFIG)
    HeldOut(language_model(), [], RecordedJudge(prefers_w1), replace(CONFIG, eval_every=0))
