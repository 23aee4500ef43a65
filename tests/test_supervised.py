"""Supervised fine-tuning, preference models and reward models: what they learn, return, write down and refuse."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import language_model, prefers_w1

from fastpref.data import read_records
from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.judging.protocol import agreement
from fastpref.learning import fit as fit_loop
from fastpref.learning.supervised import FitResult, fit_preference_model, fit_reward_model, sft
from fastpref.method.config import SupervisedConfig
from fastpref.method.errors import CheckpointError, DataError
from fastpref.models import load
from fastpref.models.policy import hidden_states

ADAM = optax.adam(0.02)
TEMPLATE = "{prompt} 1 {first} 2 {second}"
NEXT = [{"prompt": f"w{word}", "completion": f"w{word + 1} w{word + 2}"} for word in range(8)]
SAME = [{"prompt": f"w{word}", "completion": f"w{word + 9} w{word + 9}"} for word in range(8)]


def config(**settings: Any) -> SupervisedConfig:
    return SupervisedConfig(
        **({"batch_size": 8, "max_shapes": 1, "max_prompt_tokens": 8, "max_completion_tokens": 4} | settings)
    )


def tune(data: Any = NEXT, held_out: Any = (), run_dir: Path | None = None, **settings: Any) -> FitResult:
    # One optimiser object for all, so that one update is compiled.
    chosen = config(**settings)
    return sft(language_model(), data, chosen, held_out=held_out, run_dir=run_dir, optimizer=ADAM, quiet=True)


def leaves(module: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(module))]


def buffers(module: Any) -> list[int]:
    """Where the arrays of a module lie."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(module))]


def equal(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def w1_pairs(count: int, seed: int, *, reverse: bool = False) -> list[dict[str, Any]]:
    """Pairs whose better completion holds w1; with `reverse`, every second pair says so by a preference of 0."""
    rng = np.random.default_rng(seed)
    records = []
    for index in range(count):
        prompt, one, other, place = (int(word) for word in rng.integers(2, 28, 4))
        with_w1 = f"w1 w{one}" if place % 2 else f"w{one} w1"
        pair = {"prompt": f"w{prompt}", "chosen": with_w1, "rejected": f"w{one} w{other}"}
        if reverse and index % 2:
            pair |= {"chosen": pair["rejected"], "rejected": with_w1, "preference": 0.0}
        records.append(pair)
    return records


def test_sft_learns_a_deterministic_task_and_leaves_the_model_alone() -> None:
    before = leaves(language_model().module)
    result = tune(steps=60)
    losses = [step["loss"] for step in result.metrics]
    assert losses[0] == pytest.approx(np.log(36), abs=1.0)
    assert losses[-1] < 0.2
    assert result.held_out is None
    assert set(result.metrics[0]) == {"loss", "grad_norm", "updates/skipped", "time/step"}
    assert str(result.report) == "8 records read, 8 delivered, 0 dropped"
    assert equal(before, leaves(language_model().module))
    assert not equal(before, leaves(result.model.module))


def test_the_loss_is_nats_per_completion_token() -> None:
    model = language_model()
    total, count = 0.0, 0
    for record in NEXT:
        (prompt,) = model.tokenizer.encode_prompts([record["prompt"]])
        (completion,) = model.tokenizer.encode_completions([record["completion"]])
        tokens = jnp.asarray([[completion]], jnp.int32)
        hidden = hidden_states(model.module, jnp.asarray([prompt]), jnp.ones((1, len(prompt)), bool), tokens)
        logps = jax.nn.log_softmax(model.module.head().logits(hidden[0, 0]))
        total -= float(logps[np.arange(len(completion)), np.array(completion)].sum())
        count += len(completion)
    # A batch of eight holds all eight records, whatever their order.
    assert tune(steps=1).metrics[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_best_by_held_out_loss_is_returned() -> None:
    # What is held out contradicts what is learned: its loss falls while the words are learned, then only rises.
    result = tune(steps=24, held_out=SAME, eval_every=2)
    seen = {index + 1: step["eval/loss"] for index, step in enumerate(result.metrics) if "eval/loss" in step}
    assert list(seen) == list(range(2, 25, 2))
    best = min(seen, key=lambda step: seen[step])
    assert best < 24
    assert result.held_out == pytest.approx(seen[best], rel=1e-6)
    assert equal(leaves(result.model.module), leaves(tune(steps=best).model.module))


def test_records_that_are_too_long_are_dropped_and_counted() -> None:
    long = [{"prompt": "w1", "completion": "w1 w2 w3 w4"}] * 2 + [{"prompt": "w1 " * 9, "completion": "w1"}]
    result = tune(NEXT + long, steps=1)
    assert (result.report.read, result.report.delivered) == (11, 8)
    assert result.report.dropped == {"completion too long": 2, "prompt too long": 1}


def test_a_run_directory_holds_everything_and_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 5, "eval_every": 1, "checkpoint_every": 2, "held_out": SAME}
    whole = tune(run_dir=tmp_path / "whole", **settings)

    updates = fit_loop.learn
    made = []

    def stop(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        result = updates(*arguments, **options)
        if len(made) == 4:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(fit_loop, "learn", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(run_dir=tmp_path / "broken", **settings)
    assert len(metrics_of(tmp_path / "broken")) == 3
    again = tune(run_dir=tmp_path / "broken", **settings)
    assert [step["loss"] for step in again.metrics] == [step["loss"] for step in whole.metrics]
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    assert len(metrics_of(tmp_path / "broken")) == 5
    assert again.held_out == whole.held_out
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "broken")]
    assert weights[0] == weights[1]

    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "plots", "model"} <= names
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["steps"] == 5
    assert list((tmp_path / "whole" / "plots").iterdir())
    assert equal(leaves(load(tmp_path / "whole" / "model").module), leaves(whole.model.module))

    with pytest.raises(CheckpointError, match=r"config\.batch_size"):
        tune(run_dir=tmp_path / "whole", **settings | {"batch_size": 4})
    for others in (NEXT, SAME[1:], ()):
        with pytest.raises(CheckpointError, match=r"held_out"):
            tune(run_dir=tmp_path / "whole", **settings | {"held_out": others})


def fit_preference(data: Any, held_out: Any = (), *, symmetric: bool = True, **settings: Any) -> FitResult:
    return fit_preference_model(
        language_model("t5"),
        data,
        config(batch_size=32, max_prompt_tokens=16, **settings),
        held_out=held_out,
        template=TEMPLATE,
        symmetric=symmetric,
        optimizer=ADAM,
        quiet=True,
    )


def test_a_preference_model_learns_what_is_preferred(tmp_path: Path) -> None:
    result = fit_preference(w1_pairs(192, 0, reverse=True), w1_pairs(64, 1), steps=150, eval_every=50)
    assert isinstance(result.model, PreferenceModel)
    assert result.held_out is not None
    assert result.held_out > 0.9
    assert result.held_out == max(step["eval/accuracy"] for step in result.metrics if "eval/accuracy" in step)
    records, _ = read_records(w1_pairs(64, 1), columns=("prompt", "chosen", "rejected"))
    assert agreement(result.model, records) == pytest.approx(result.held_out)
    assert agreement(prefers_w1, records) == 1.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_preference_model_is_fitted_to_soft_labels_in_both_orders(symmetric: bool) -> None:
    pairs = [pair | {"preference": 0.25} for pair in w1_pairs(32, 2)]
    judge = PreferenceModel(language_model("t5"), TEMPLATE, symmetric=symmetric)
    prompts, chosen, rejected = ([pair[name] for pair in pairs] for name in ("prompt", "chosen", "rejected"))
    margins = judge.margins(prompts * 2, chosen + rejected, rejected + chosen).astype(np.float64)
    labels = np.repeat([0.25, 0.75], 32)
    expected = labels * np.log1p(np.exp(-margins)) + (1 - labels) * np.log1p(np.exp(margins))
    # A batch of 32 holds all the pairs, whatever their order.
    records, _ = read_records(pairs, columns=("prompt", "chosen", "rejected"))
    for data in (pairs, records):
        first = fit_preference(data, steps=1, symmetric=symmetric).metrics[0]
        assert first["loss"] == pytest.approx(expected.mean(), rel=1e-4)


def test_a_reward_model_learns_what_is_preferred(tmp_path: Path) -> None:
    result = fit_reward_model(
        language_model(),
        w1_pairs(96, 0, reverse=True),
        config(batch_size=32, steps=40, eval_every=20),
        held_out=w1_pairs(64, 1),
        run_dir=tmp_path,
        optimizer=ADAM,
        quiet=True,
    )
    assert isinstance(result.model, RewardModel)
    assert result.metrics[0]["loss"] == pytest.approx(np.log(2)), "its rewards start at zero"
    assert result.held_out is not None
    assert result.held_out > 0.9
    with_w1, without = result.model.scores(["w3"] * 2, ["w1 w5", "w6 w5"])
    assert with_w1 > without
    again = RewardModel.load(tmp_path / "model")
    np.testing.assert_array_equal(again.scores(["w3"] * 2, ["w1 w5", "w6 w5"]), [with_w1, without])
    # A body is held once, and the one that the training began with is as it was.
    for judge in (result.model, again):
        assert buffers(judge.model.module) == buffers(judge.module.policy)
    start = language_model()
    assert buffers(RewardModel.from_model(start).module.policy) == buffers(start.module)
    assert not {*buffers(start.module)} & {*buffers(result.model.module)}
    assert all(np.isfinite(leaf).all() for leaf in leaves(start.module))


def test_agreement_counts_ties_as_half() -> None:
    pairs = [{"prompt": "x", "chosen": "a", "rejected": "b", "preference": p} for p in (1.0, 1.0, 0.7, 0.5, 0.2)]
    records, _ = read_records(pairs, columns=("prompt", "chosen", "rejected"))

    def judge(*texts: Sequence[str]) -> list[float]:
        return [0.9, 0.5, 0.1, 0.9, 0.4]

    # Agrees, tie, disagrees, tie, agrees.
    assert agreement(judge, records) == pytest.approx((1 + 0.5 + 0 + 0.5 + 1) / 5)


def test_bad_records_are_refused_by_place_and_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"records, record 8: column 'completion' must be there"):
        tune([*NEXT, {"prompt": "w1"}], steps=1)
    with pytest.raises(DataError, match=r"records, record 0: column 'prompt' must hold text, but received int"):
        tune(NEXT, [{"prompt": 1, "completion": "w1"}], steps=1)
    with pytest.raises(DataError, match=r"records, record 0: chosen and rejected must differ"):
        fit_preference([{"prompt": "w1", "chosen": "w2", "rejected": "w2"}], steps=1)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\n{"prompt": "w1", "chosen"\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 2: .*broken JSON"):
        fit_reward_model(language_model(), path, config(steps=1), quiet=True)


def test_no_record_left_is_refused() -> None:
    with pytest.raises(DataError, match=r"at least one record to learn from, but received none"):
        tune([{"prompt": "w1", "completion": "w1 w2 w3 w4 w5"}], steps=1)
    with pytest.raises(DataError, match=r"received none from held_out: 1 records read, .*1 completion too long"):
        tune(held_out=[{"prompt": "w1", "completion": "w1 w2 w3 w4 w5"}], steps=1)
    with pytest.raises(DataError, match=r"at least one record to learn from, but received none"):
        fit_preference([], steps=1)
