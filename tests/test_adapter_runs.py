"""Runs that train adapters: every method, continuation, files, references, and supervised trainings."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from small import PROMPTS, language_model, prefers_w1
from test_training import SMALL, metrics_of

from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.judging.sources import load_judge
from fastpref.learning.supervised import fit_preference_model, fit_reward_model, sft
from fastpref.learning.train import Step, train
from fastpref.method.adapter import AdapterConfig
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import CheckpointError, ConfigError, ModelError, ModelWarning
from fastpref.method.tables import from_mapping, to_json
from fastpref.models import LanguageModel, load, save
from fastpref.models.adapters import merged, split
from fastpref.models.lowrank import is_adapted
from fastpref.runs.read_model import read_model, step_directory

ADAPTER = AdapterConfig(rank=3, alpha=6.0)
FIT: dict[str, Any] = {"batch_size": 8, "max_completion_tokens": 6, "optimizer": "adamw", "adapter": ADAPTER}
RECORDED = [
    {"prompt": prompt, "chosen": f"w1 w{number}", "rejected": f"w{number}"} for number, prompt in enumerate(PROMPTS, 2)
]
ONLINE = ["ipo-md", "online-dpo", "nash-md-pg", "inpo", "sppo"]


def leaves(module: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(module))]


def config(algorithm: str = "ipo-md", **settings: Any) -> TrainConfig:
    rounds = {"rounds": 1, "completions": 3} if algorithm in ("inpo", "sppo") else {}
    known = SMALL | {"steps": 3, "tau": 0.5, "adapter": ADAPTER, "algorithm": algorithm} | rounds
    return TrainConfig(**known | settings)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sft"
    save(language_model(), folder)
    return folder


@pytest.mark.parametrize("algorithm", [*ONLINE, "offline-ipo"])
def test_every_method_trains_adapters_alone(algorithm: str, start: Path) -> None:
    model = load(start)
    before = leaves(model.module)
    offline = algorithm.startswith("offline")
    result = train(
        model, RECORDED if offline else PROMPTS, None if offline else prefers_w1, config(algorithm), quiet=True
    )
    for one, other in zip(before, leaves(model.module), strict=True):
        np.testing.assert_array_equal(one, other)
    parts = split(result.policy)
    assert parts is not None
    base, adapters = parts
    shared = zip(jax.tree.leaves(base.params), jax.tree.leaves(nnx.state(model.module)), strict=True)
    assert all(one is other for one, other in shared)
    assert any(factors.b.any() for factors in adapters.values())
    assert result.metrics[0].get("rewards/margins", 0.0) == pytest.approx(0, abs=1e-5)
    assert all(np.isfinite(step["loss"]) and not step["updates/skipped"] for step in result.metrics)


@pytest.mark.parametrize("family", ["decoder", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_run_writes_adapters_alone_and_goes_on_bit_for_bit(family: str, tmp_path: Path) -> None:
    save(language_model(family), tmp_path / "sft")
    settings = config(steps=3, checkpoint_every=1, adapter=AdapterConfig(rank=3, dropout=0.1))

    def run(folder: str, stop: int = 0) -> Any:
        def fail(step: Step) -> None:
            if step.step == stop:
                raise KeyboardInterrupt

        return train(
            tmp_path / "sft", PROMPTS, prefers_w1, settings, run_dir=tmp_path / folder, callbacks=[fail], quiet=True
        )

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("broken", 2)
    run("broken")
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    names = {file.name for file in (tmp_path / "whole" / "policy").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    weights = [(tmp_path / run / "policy" / "adapter_model.safetensors").read_bytes() for run in ("whole", "broken")]
    assert weights[0] == weights[1]

    def written(model: LanguageModel) -> list[np.ndarray]:
        return leaves(model.module)

    for source in ("whole", "whole/policy", "whole/checkpoints/00000003"):
        for one, other in zip(written(read_model(tmp_path / source)), written(whole.policy), strict=True):
            np.testing.assert_array_equal(one, other)
    early = read_model(step_directory(tmp_path / "broken", 2), like=tmp_path / "sft")
    assert is_adapted(nnx.state(early.module))
    with pytest.raises(CheckpointError, match=r"config.adapter.rank: 3 in the checkpoint, 2 now"):
        train(
            tmp_path / "sft",
            PROMPTS,
            prefers_w1,
            config(adapter=AdapterConfig(rank=2, dropout=0.1)),
            run_dir=tmp_path / "whole",
            quiet=True,
        )


def test_an_adapter_of_sft_is_gone_on_with_and_is_the_reference(start: Path, tmp_path: Path) -> None:
    records = [{"prompt": prompt, "completion": "w1 w2"} for prompt in PROMPTS]
    known = SupervisedConfig(**FIT, steps=6, max_prompt_tokens=8, learning_rate=0.01)
    tuned = sft(start, records, known, run_dir=tmp_path / "sft", quiet=True)
    assert tuned.metrics[-1]["loss"] < tuned.metrics[0]["loss"]
    assert not (tmp_path / "sft" / "model" / "model.safetensors").exists()

    result = train(
        tmp_path / "sft" / "model", PROMPTS, prefers_w1, config(adapter=None, algorithm="online-ipo"), quiet=True
    )
    assert result.metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert result.metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    first, reference, given = split(result.policy), split(result.ref), split(tuned.model)
    assert first is not None
    assert reference is not None
    assert given is not None
    shared = zip(jax.tree.leaves(first[0].params), jax.tree.leaves(reference[0].params), strict=True)
    assert all(one is other for one, other in shared)
    jax.tree.map(np.testing.assert_array_equal, reference[1], given[1])

    # The base itself as the reference: read again from its directory, and shared.
    against = train(
        tmp_path / "sft" / "model",
        PROMPTS,
        prefers_w1,
        config(adapter=None, algorithm="online-ipo", steps=1),
        ref=start,
        quiet=True,
    )
    assert abs(against.metrics[0]["objective/kl"]) > 0.01
    mine, theirs = (jax.tree.leaves(nnx.state(model.module)) for model in (against.ref, against.policy))
    assert {id(leaf) for leaf in mine} <= {id(leaf) for leaf in theirs}


def test_a_base_from_memory_is_saved_merged_and_said_so(tmp_path: Path) -> None:
    with pytest.warns(ModelWarning, match=r"loaded from no directory.*saved merged"):
        result = train(language_model(), PROMPTS, prefers_w1, config(), run_dir=tmp_path, quiet=True)
    for one, other in zip(leaves(load(tmp_path / "policy").module), leaves(merged(result.policy).module), strict=True):
        np.testing.assert_array_equal(one, other)


def test_preference_and_reward_models_are_fitted_by_adapters(start: Path, tmp_path: Path) -> None:
    known = SupervisedConfig(**FIT, steps=12, max_prompt_tokens=64, learning_rate=0.02)
    template = "{prompt} w5 {first} w6 {second} w7"
    preferring = fit_preference_model(
        start, RECORDED, known, template=template, held_out=RECORDED, run_dir=tmp_path / "preference", quiet=True
    )
    rewarding = fit_reward_model(start, RECORDED, known, held_out=RECORDED, run_dir=tmp_path / "reward", quiet=True)
    for fitted, kind, folder in ((preferring, PreferenceModel, "preference"), (rewarding, RewardModel, "reward")):
        assert fitted.metrics[-1]["loss"] < fitted.metrics[0]["loss"]
        again = kind.load(tmp_path / folder / "model")
        columns = [[record[name] for record in RECORDED] for name in ("prompt", "chosen", "rejected")]
        np.testing.assert_allclose(again(*columns), fitted.model(*columns), rtol=1e-6)
        assert not (tmp_path / folder / "model" / "model.safetensors").exists()
        # Judge and policy share one base.
        policy = load(start)
        shared = load_judge(tmp_path / folder, base=policy)
        np.testing.assert_allclose(shared(*columns), again(*columns), rtol=1e-6)
        held = {id(leaf) for leaf in jax.tree.leaves(nnx.state(shared.model.module))}
        assert {id(leaf) for leaf in jax.tree.leaves(nnx.state(policy.module))} <= held
    with pytest.raises(ModelError, match=r"a base must come with an adapter's directory, but received .* with a whole"):
        load(start, base=policy)
    with pytest.raises(ModelError, match=r"a base must come with a preference or reward model that has an adapter"):
        load_judge("json:loads", base=policy)


def test_the_setting_goes_through_json_and_is_checked() -> None:
    table = {"rank": 4, "alpha": 8.0, "targets": ["q_proj"], "dropout": 0.0, "rslora": True, "init": "zero-a"}
    made = from_mapping(TrainConfig, {"adapter": table})
    assert made.adapter == AdapterConfig(rank=4, alpha=8.0, targets=("q_proj",), rslora=True, init="zero-a")
    assert made.adapter.scale == 4.0
    assert from_mapping(TrainConfig, json.loads(json.dumps(to_json(made)))) == made
    with pytest.raises(ConfigError, match=r"adapter must be of type AdapterConfig, but received 16"):
        from_mapping(TrainConfig, {"adapter": 16})
