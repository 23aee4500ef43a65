"""One meaning: every metric that is logged is in the table, and the formulas give what a hand computes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import PROMPTS, language_model, prefers_w1

from fastpref.learning.supervised import fit_preference_model, sft
from fastpref.learning.train import train
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.runs.metrics import METRICS, markdown, pair_metrics, sampling_metrics
from fastpref.sampling.completions import Completions, ended

DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"


OF_ALGORITHMS = {
    *("eta", "round", "objective/scores", "objective/rlhf_reward", "objective/kl", "objective/entropy"),
    *("anchor/chosen", "anchor/rejected", "anchor/margins", "anchor/accuracies", "learning_rate"),
    *("pairs/worst_won", "pairs/tie", "pairs/cyclic"),
}


def test_the_document_has_the_table() -> None:
    assert markdown() in DOCUMENT.read_text(), "put what fastpref.runs.metrics.markdown() returns into docs/metrics.md"


def test_every_logged_metric_is_in_the_table_and_the_other_way_round() -> None:
    sgd = optax.sgd(0.1)
    settings = TrainConfig(steps=1, batch_size=4, max_prompt_tokens=8, max_shapes=1, max_new_tokens=6, eval_every=1)
    online = train(language_model(), PROMPTS, prefers_w1, settings, optimizer=sgd, eval_prompts=PROMPTS[:8], quiet=True)
    config = SupervisedConfig(steps=1, batch_size=4, max_prompt_tokens=8, max_shapes=1, eval_every=1)
    examples = [{"prompt": prompt, "completion": "w1 w2"} for prompt in PROMPTS]
    pairs = [{"prompt": prompt, "chosen": "w1", "rejected": "w2"} for prompt in PROMPTS]
    tuned = sft(language_model(), examples, config, held_out=examples[:4], optimizer=sgd, quiet=True)
    longer = dataclasses.replace(config, max_prompt_tokens=32)
    template: dict[str, Any] = {"template": "{prompt} {first} {second}", "held_out": pairs[:4]}
    fitted = fit_preference_model(language_model(), pairs, longer, **template, optimizer=sgd, quiet=True)
    logged = {name for run in (online, tuned, fitted) for step in run.metrics for name in step} | {"step"}
    # tests/test_algorithms.py sees the rest, whose algorithms are run there.
    assert logged | OF_ALGORITHMS == set(METRICS)
    assert not logged & OF_ALGORITHMS


def test_every_metric_says_its_unit_or_is_a_share_or_a_setting() -> None:
    plain = {"loss", "grad_norm", "learning_rate", "tau", "eta", "mixture_beta", "updates/skipped", "eval/loss"}
    shares = {
        *(
            "rewards/accuracies",
            "anchor/accuracies",
            "preference/mean",
            "preference/confidence",
            "completions/eos_rate",
            "eval/win_rate",
        ),
        *("eval/win_rate_low", "eval/win_rate_high", "eval/eos_rate", "eval/agreement", "eval/accuracy"),
    }
    assert {name for name, metric in METRICS.items() if not metric.unit} == plain | shares
    assert all(metric.over for name, metric in METRICS.items() if name in shares or "/" in metric.unit)


def test_pair_metrics_by_hand() -> None:
    # Log-ratios with the reference: pair 0: 1, −2; pair 1: 0.5, 3; pair 2 (a tie): 2, 0; pair 3 is not used.
    policy = np.array([[-4.0, -6.0], [-2.5, -1.0], [-3.0, -7.0], [-np.inf, 5.0]], np.float32)
    ref = np.array([[-5.0, -4.0], [-3.0, -4.0], [-5.0, -7.0], [0.0, 0.0]], np.float32)
    preference = np.array([0.8, 0.9, 0.5, 1.0], np.float32)
    where = np.array([True, True, True, False])
    found = pair_metrics(*map(jnp.asarray, (policy, ref, preference, where)), jnp.float32(0.1))
    wanted = {
        "rewards/chosen": 0.1 * (1 + 0.5 + 1) / 3,
        "rewards/rejected": 0.1 * (-2 + 3 + 1) / 3,
        "rewards/margins": 0.1 * (3 - 2.5 + 0) / 3,
        "rewards/accuracies": (1 + 0 + 0.5) / 3,
        "logps/chosen": (-4 - 2.5 - 5) / 3,
        "logps/rejected": (-6 - 1 - 5) / 3,
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, rel=1e-6)
    # The other order of every pair says the same.
    turned = pair_metrics(*map(jnp.asarray, (policy[:, ::-1], ref[:, ::-1], 1 - preference, where)), jnp.float32(0.1))
    assert {name: float(value) for name, value in turned.items()} == pytest.approx(wanted, rel=1e-6)
    nothing = pair_metrics(*map(jnp.asarray, (policy, ref, preference, where & False)), jnp.float32(0.1))
    assert not any(float(value) for value in nothing.values())


def test_sampling_metrics_by_hand() -> None:
    # Lengths 3, 1, 2, 4; EOS is 1; what lies past a length is never read.
    tokens = np.array([[[5, 6, 1, 1], [1, 9, 9, 9]], [[7, 8, 1, 0], [5, 5, 5, 5]]], np.int32)
    completions = Completions(
        tokens=jnp.asarray(tokens),
        lengths=jnp.array([[3, 1], [2, 4]], jnp.int32),
        policy_logps=jnp.array([[-3.0, -1.0], [-2.0, -8.0]]),
        ref_logps=jnp.array([[-4.0, -1.5], [-2.0, -6.0]]),
        mixture_logps=jnp.zeros((2, 2)),
    )
    rest = {"completions/mean_length": 10 / 4, "completions/eos_rate": 2 / 4, "tokens/generated": 10}
    # Of two models in turns, what is said of π is averaged over the completions that π wrote.
    assert sampling_metrics(completions, [True, True], 1) == pytest.approx(
        {"objective/kl": (1 + 0.5 + 0 - 2) / 4, "objective/entropy": 14 / 10} | rest
    )
    assert sampling_metrics(completions, [True, False], 1) == pytest.approx(
        {"objective/kl": (1 + 0) / 2, "objective/entropy": 5 / 5} | rest
    )
    assert sampling_metrics(completions, None, 1) == pytest.approx(
        {"objective/writer_kl": (1 + 0.5 + 0 - 2) / 4, "objective/writer_entropy": 14 / 10} | rest
    )


def test_nothing_written_has_not_ended() -> None:
    assert not ended(np.full((1, 1, 3), 1), np.array([[0]]), 1).any()
