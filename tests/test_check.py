"""`fastpref check`: what it says of each kind of directory, and that its memory is the arrays' own."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small import PROMPTS, language_model, prefers_w1

from fastpref.check import check
from fastpref.cli import main
from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.learning import optimizers
from fastpref.learning.memory import size, train_memory
from fastpref.learning.train import train
from fastpref.method.config import TrainConfig
from fastpref.models import LanguageModel, save

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FEW = {"batch_size": 2, "max_prompt_tokens": 8, "max_new_tokens": 4}


@pytest.fixture(autouse=True)
def _keep_the_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def lines(path: Path, **settings: object) -> dict[str, str]:
    return dict(check(path, FEW | settings))


def test_a_language_model_is_described_loaded_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(language_model(), tmp_path / "model")
    said = lines(tmp_path / "model")
    assert said["kind"] == "a language model of kind llama (LlamaForCausalLM)"
    assert said["size"].endswith("2 layers, width 16, 36 rows, a head of its own")
    assert said["stored as"] == "F32 in model.safetensors"
    assert said["loads"].startswith("yes")
    assert said["tokenizer"] == "33 ids, 36 rows of the embedding"
    assert said["completions end with"] == "'</s>' (1); recorded text with '</s>' (1)"
    assert said["chat template"] == "none: prompts are plain text"
    assert "float32: ipo-md, batch_size 2, prompts of 8 tokens" in said["memory of train"]
    assert main(["check", str(tmp_path / "model"), "batch_size=2", "settings.algorithm=inpo", "max_new_tokens=4"]) == 0
    assert "inpo, batch_size 2" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "model"), "batch_sise=2"]) == 1
    assert "Did you mean 'batch_size'?" in capsys.readouterr().err


def test_a_chat_template_is_shown_and_a_second_one_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(language_model(), folder)
    (folder / "fastpref_manifest.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    said = lines(folder)
    assert said["chat template"] == "of tokenizer_config.json"
    assert said["a prompt"] == repr("user: Is it raining?\nassistant:")
    assert said["its completion"] == "' No, it is dry.', and the token that ends it"
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("assistant:", "Assistant:"))
    said = lines(folder)
    assert said["chat template"] == "of chat_template.jinja (tokenizer_config.json has another, which is not used)"


def test_judges_and_runs_are_told_apart(tmp_path: Path) -> None:
    PreferenceModel(language_model()).save(tmp_path / "preference")
    RewardModel.from_model(language_model("t5")).save(tmp_path / "reward")
    assert lines(tmp_path / "preference")["kind"].startswith("a preference model, on a language model of kind llama")
    reward = lines(tmp_path / "reward")
    assert reward["kind"].startswith("a reward model, on a language model of kind t5")
    assert "memory as a judge" in reward
    assert "memory of train" not in reward
    hub = tmp_path / "hub"
    save(language_model(), hub)
    (hub / "fastpref_manifest.json").unlink()
    weights = load_file(hub / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights | {"score.weight": np.ones((1, 16), np.float32)}, hub / "model.safetensors")
    raw = json.loads((hub / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (hub / "config.json").write_text(json.dumps(raw))
    said = lines(hub)
    assert said["kind"].startswith("a reward model with its head among the weights, on a language model of kind llama")
    assert said["loads"].startswith("yes")
    config = TrainConfig(algorithm="online-ipo", steps=1, optimizer="adamw", **FEW)
    train(language_model(), PROMPTS[:4], prefers_w1, config, run_dir=tmp_path / "run", quiet=True)
    first, *rest = check(tmp_path / "run", FEW)
    assert first == ("kind", "a run directory of online-ipo, saved up to step 1")
    assert dict(rest)["final model"] == str(tmp_path / "run" / "policy")
    assert dict(rest)["loads"].startswith("yes")
    said = list(check(tmp_path / "run" / "checkpoints" / "00000001", FEW))
    assert said[0][1].startswith("a checkpoint of a run: parameters alone")
    assert dict(said)["loads"].startswith("yes")
    shutil.rmtree(tmp_path / "run" / "policy")
    said = list(check(tmp_path / "run", FEW))
    assert [subject for subject, _ in said] == ["kind", "final model"]
    assert said[1][1].startswith("none: a run must be finished to give its final model, but")


def test_an_adapter_is_described_before_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "b"}))
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "an adapter (LORA) of the base 'b'" in said.out
    assert "merge the adapter into its base with peft" in said.err


def test_what_does_not_load_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert "a checkpoint must be a directory" in capsys.readouterr().err
    save(language_model(), tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["check", str(tmp_path / "model")]) == 1
    assert "model.safetensors must be as it was written" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["decoder", "t5"])
@pytest.mark.parametrize("algorithm", ["ipo-md", "offline-dpo", "inpo"])
def test_counted_memory_is_that_of_the_arrays(family: str, algorithm: str) -> None:
    model: LanguageModel = language_model(family)
    definition, params = nnx.split(model.module)
    config = TrainConfig(algorithm=algorithm, optimizer="adamw", **FEW)
    memory = train_memory(config, definition, params)
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    assert memory.policy == memory.ref == memory.gradients == held
    assert memory.round == (held if algorithm == "inpo" else 0)
    state = optimizers.initial_state(optimizers.build(config), params)
    assert memory.optimizer == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state)) == size(state)
    assert (memory.cache > 0) == (algorithm != "offline-dpo")
    assert memory.temporaries > 0
    larger = train_memory(
        TrainConfig(algorithm=algorithm, optimizer="adamw", **FEW | {"batch_size": 64}), definition, params
    )
    assert larger.temporaries > memory.temporaries
    assert memory.total == memory.policy + memory.ref + memory.round + memory.optimizer + max(
        memory.cache, memory.temporaries
    )
