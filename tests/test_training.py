"""A step: every loss at the reference, its gradients by hand, what has no part in it, and where a run starts."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from slow_packing import PaddedPairs, pack
from small import PROMPTS, language_model, prefers_w1

from fastpref.data.batches import PackedPairs
from fastpref.learning import update as learner
from fastpref.learning.train import Step, train
from fastpref.method.algorithms import ALGORITHMS
from fastpref.method.config import TrainConfig
from fastpref.models import load, scoring

SGD = optax.sgd(1.0)
"""One object for all: a compiled update belongs to its optimiser."""
SMALL: dict[str, Any] = {
    "batch_size": 4,
    "max_prompt_tokens": 8,
    "max_new_tokens": 6,
    "max_shapes": 1,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "sample_every": 1,
}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """All metrics of a run but those that time it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def pairs(
    ref_logps: Any = 0.0, preference: Any = 1.0, where: Any = True, count: int = 4, scores: Any = 0.0
) -> PaddedPairs:
    rng = np.random.default_rng(0)
    return PaddedPairs(
        prompt_tokens=rng.integers(3, 33, (count, 5)).astype(np.int32),
        prompt_lengths=rng.integers(1, 6, count).astype(np.int32),
        completion_tokens=rng.integers(3, 33, (count, 2, 6)).astype(np.int32),
        completion_lengths=rng.integers(1, 7, (count, 2)).astype(np.int32),
        ref_logps=np.broadcast_to(np.asarray(ref_logps, np.float32), (count, 2)),
        preference=np.broadcast_to(np.asarray(preference, np.float32), count),
        scores=np.broadcast_to(np.asarray(scores, np.float32), (count, 2)),
        where=np.broadcast_to(np.asarray(where, bool), count),
    )


def packed(batch: PaddedPairs, family: str = "decoder") -> PackedPairs:
    """Two pairs to a row, in their order."""
    layout, prompt = ("encoder-decoder", 10) if family == "t5" else ("shared", 0)
    return pack(batch, rows=2, length=32, slots=2, layout=layout, prompt_length=prompt)


def update(
    batch: PaddedPairs, *, family: str = "decoder", algorithm: str = "online-ipo", tau: float = 0.5, **options: Any
) -> Any:
    definition, params = nnx.split(language_model(family).module)
    params = jax.tree.map(np.array, params)
    return learner.update(
        definition,
        params,
        SGD.init(params),
        packed(batch, family),
        np.float32(tau),
        optimizer=SGD,
        objective=ALGORITHMS[algorithm].objective,
        **options,
    )


def scored(batch: PaddedPairs, family: str = "decoder") -> PaddedPairs:
    definition, params = nnx.split(language_model(family).module)
    logps = np.asarray(scoring.score(definition, params, packed(batch, family)))
    return batch._replace(ref_logps=logps[: len(batch.where)])


@pytest.mark.parametrize("family", ["decoder", "t5"])
def test_at_the_reference_every_loss_is_its_closed_form(family: str) -> None:
    batch = scored(pairs(), family)
    expected = {"online-ipo": (1 / (2 * 0.5)) ** 2, "online-dpo": np.log(2), "online-slic": 1.0, "sppo": 0.0}
    for name, value in expected.items():
        _, _, metrics = update(batch, family=family, algorithm=name)
        assert float(metrics["loss"]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert float(metrics["rewards/margins"]) == pytest.approx(0, abs=1e-5)


def test_accumulated_gradients_are_averaged_over_pairs() -> None:
    # Parts with different numbers of pairs: an average of averages would differ.
    batch = scored(pairs(preference=[1.0, 0.2, 0.7, 0.0], where=[True, True, True, False]))
    whole, parts = (update(batch, gradient_accumulation=number) for number in (1, 2))
    for one, other in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(parts[0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert float(whole[2]["loss"]) == pytest.approx(float(parts[2]["loss"]), rel=1e-5)
    alone = update(PaddedPairs(*(field[:3] for field in batch)))
    assert float(whole[2]["grad_norm"]) == pytest.approx(float(alone[2]["grad_norm"]), rel=1e-5)


def test_pairs_that_are_left_out_teach_nothing() -> None:
    before = nnx.split(language_model().module)[1]
    after, _, metrics = update(scored(pairs(where=False)))
    assert float(metrics["grad_norm"]) == 0
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_identical_completions_have_exactly_no_gradient() -> None:
    """Next to no temperature: both completions of a prompt are the likeliest one."""
    model = language_model()
    config = TrainConfig(**SMALL, algorithm="online-ipo", steps=1, temperature=1e-6)
    result = train(model, PROMPTS, prefers_w1, config, quiet=True)
    assert result.metrics[0]["pairs/identical"] == 4
    assert result.metrics[0]["grad_norm"] == 0
    for before, after in zip(
        *(jax.tree.leaves(nnx.state(each.module)) for each in (model, result.policy)), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_prompts_are_no_part_of_a_log_prob_and_padding_of_nothing() -> None:
    batch = pairs()
    wider = batch._replace(
        prompt_tokens=np.pad(batch.prompt_tokens, ((0, 0), (0, 3)), constant_values=7),
        completion_tokens=np.pad(batch.completion_tokens, ((0, 0), (0, 0), (0, 4)), constant_values=9),
    )
    np.testing.assert_allclose(scored(batch).ref_logps, scored(wider).ref_logps, rtol=1e-5)


def test_length_normalisation_divides_by_each_length() -> None:
    batch = scored(pairs())._replace(ref_logps=np.zeros((4, 2), np.float32))
    logps = scored(batch).ref_logps / batch.completion_lengths
    expected = ((logps[:, 0] - logps[:, 1] - 1.0) ** 2).mean()
    assert float(update(batch, length_normalize=True)[2]["loss"]) == pytest.approx(expected, rel=1e-4)


LOGPS = np.random.default_rng(7).normal(-20, 2, (2, 4, 2)).astype(np.float32)
"""Log-probs of two frozen models for four pairs."""
WHERE = [True, True, False, True]


def inpo_slopes(policy: np.ndarray, tau: float, eta: float) -> tuple[np.ndarray, float]:
    """INPO eq. 8, written out: the mean of (h_t(π, y_w, y_l) − 1/2η)² and its slopes in log π."""
    ref, at_round = LOGPS.astype(np.float64)
    ratios = [logps[:, 0] - logps[:, 1] for logps in (policy, ref, at_round)]
    apart = ratios[0] - tau / eta * ratios[1] - (eta - tau) / eta * ratios[2] - 1 / (2 * eta)
    return np.stack([2 * apart, -2 * apart], 1), float((apart**2)[WHERE].mean())


def gradient_slopes(policy: np.ndarray, tau: float, scores: np.ndarray) -> tuple[np.ndarray, float]:
    """IPO-MD section 2.6, written out, averaged over both completions."""
    slopes = -(scores - tau * (policy - LOGPS[0].astype(np.float64)))
    return slopes / 2, float((slopes * policy)[WHERE].mean())


def sppo_slopes(policy: np.ndarray, eta: float, scores: np.ndarray) -> tuple[np.ndarray, float]:
    """The square of log π/π_t − (p − ½)/η, averaged over both completions."""
    apart = policy - LOGPS[1].astype(np.float64) - scores / eta
    return apart, float((apart**2)[WHERE].mean())


def test_gradients_are_those_of_the_papers_formulas() -> None:
    tau, eta = 0.3, 0.8
    scores = np.random.default_rng(8).uniform(-0.5, 0.5, (4, 2))
    # INPO's anchor is the weighted combination of two frozen models: with it, IPO's loss at η is eq. 8.
    shares = ALGORITHMS["inpo"].anchor_weights(tau, eta)
    combined = (shares[0] * LOGPS[0] + shares[1] * LOGPS[1]).astype(np.float32)
    plain = pairs(where=WHERE, scores=scores)
    definition, params = nnx.split(language_model().module)

    @jax.jit
    def pull(params: Any, batch: PackedPairs, slopes: jax.Array) -> Any:
        return jax.vjp(lambda weights: scoring.sequence_logps(nnx.merge(definition, weights), batch), params)[1](slopes)

    policy = np.asarray(scoring.score(definition, params, packed(plain))).astype(np.float64)
    cases = {
        "inpo": (combined, eta, inpo_slopes(policy, tau, eta)),
        "nash-md-pg": (LOGPS[0], tau, gradient_slopes(policy, tau, scores)),
        "sppo": (LOGPS[1], eta, sppo_slopes(policy, eta, scores)),
    }
    for name, (anchor, strength, (slopes, value)) in cases.items():
        after, _, metrics = update(plain._replace(ref_logps=anchor), algorithm=name, tau=strength)
        assert float(metrics["loss"]) == pytest.approx(value, rel=1e-4), name
        expected = pull(params, packed(plain), (slopes * np.asarray(WHERE)[:, None] / sum(WHERE)).astype(np.float32))[0]
        for new, old, wanted in zip(*map(jax.tree.leaves, (after, params, expected)), strict=True):
            scale = np.abs(wanted).max() + 1e-3
            np.testing.assert_allclose((old - np.asarray(new)) / scale, wanted / scale, atol=2e-4, err_msg=name)


def test_a_completion_that_is_not_learned_from_has_no_part() -> None:
    alone = pairs(scores=0.3)
    alone = alone._replace(
        completion_tokens=alone.completion_tokens[:, :1], completion_lengths=alone.completion_lengths[:, :1]
    )
    logps = np.asarray(scored(alone).ref_logps)
    assert (logps[:, 1] == 0).all()
    assert (logps[:, 0] < 0).all()
    _, _, metrics = update(scored(alone), algorithm="rl")
    assert float(metrics["loss"]) == pytest.approx(-0.3 * logps[:, 0].mean(), rel=1e-4)
    assert not any(name.startswith("rewards/") for name in metrics)


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    before = nnx.split(language_model().module)[1]
    after, _, metrics = update(pairs(ref_logps=[np.inf, 0.0]))
    assert float(metrics["updates/skipped"]) == 1
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("algorithm", "family"), [("ipo-md", "t5"), ("online-ipo", "decoder")])
def test_a_run_starts_at_the_reference_and_leaves_its_model_alone(algorithm: str, family: str, tmp_path: Path) -> None:
    model = language_model(family)
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model.module))]
    seen: list[Step] = []
    config = TrainConfig(**SMALL, algorithm=algorithm, steps=2, tau=0.5, mixture_beta=0.25)
    result = train(model, PROMPTS, prefers_w1, config, run_dir=tmp_path, callbacks=[seen.append], quiet=True)
    first = result.metrics[0]
    # Of IPO-MD the mixture is the writer, of online IPO the policy: the name says which.
    assert first["objective/writer_kl" if algorithm == "ipo-md" else "objective/kl"] == 0
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["pairs/used"] + first["pairs/identical"] == 4
    assert [step.step for step in seen] == [1, 2]
    assert str(result.report) == "24 records read, 24 delivered, 0 dropped"
    for one, other in zip(before, jax.tree.leaves(nnx.state(model.module)), strict=True):
        np.testing.assert_array_equal(one, other)
    saved = jax.tree.leaves(nnx.state(load(tmp_path / "policy").module))
    for one, other in zip(saved, jax.tree.leaves(nnx.state(result.policy.module)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "tensorboard", "plots", "policy"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_rescoring_the_reference_agrees_with_what_sampling_collected() -> None:
    """The gap between cached decoding and a teacher-forced forward, in float32, stays at rounding."""
    results = [
        train(language_model(), PROMPTS, prefers_w1, TrainConfig(**SMALL, steps=1, rescore_reference=flag), quiet=True)
        for flag in (False, True)
    ]
    for name in ("loss", "grad_norm", "logps/chosen"):
        assert results[0].metrics[0][name] == pytest.approx(results[1].metrics[0][name], rel=1e-4, abs=1e-4)
