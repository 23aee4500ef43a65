"""Adapter directories: those that PEFT wrote, ours for PEFT, and the ones that are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small import language_model

from fastpref.check import check
from fastpref.method.adapter import AdapterConfig
from fastpref.method.errors import ModelError
from fastpref.models import Decoder, LanguageModel, load, load_adapter, merged, save, save_adapter
from fastpref.models.adapters import adapt, split, with_adapters
from fastpref.models.masks import Masks, causal_mask
from fastpref.models.policy import hidden_states
from fastpref.runs.read_model import read_tokenizer

GOLDEN = Path(__file__).parent / "golden_peft"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def logits(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Of every place of a text, or of a completion of itself by an encoder-decoder."""
    ids, module = jnp.asarray(tokens), model.module
    if isinstance(module, Decoder):
        size = ids.shape[1]
        states = module.forward(ids[:, None], jnp.arange(size)[None, None], Masks(causal_mask(size)))[0]
    else:
        states = hidden_states(module, ids, jnp.ones(ids.shape, bool), ids[:, None])
    flat = module.head().logits(states.reshape(-1, states.shape[-1]))
    return np.asarray(flat).reshape(*tokens.shape, -1)


def test_there_are_goldens_of_each_kind() -> None:
    assert {"gemma2", "gpt2", "llama", "llama_head", "llama_some", "patterns", "phi3", "t5"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_by_peft_has_its_logits(name: str) -> None:
    known = load_file(GOLDEN / f"{name}.safetensors")
    model = load(GOLDEN / name)
    assert split(model) is not None
    np.testing.assert_allclose(logits(model, known["tokens"]), known["logits"], rtol=1e-4, atol=1e-4)
    base = load(model.source)  # type: ignore[arg-type]
    assert np.abs(logits(base, known["tokens"]) - known["logits"]).max() > 0.01
    np.testing.assert_allclose(logits(merged(model), known["tokens"]), known["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_is_saved_with_the_same_numbers(name: str, tmp_path: Path) -> None:
    model = load(GOLDEN / name)
    save(model, tmp_path / "once")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (GOLDEN / name, tmp_path / "once"))
    # PEFT writes a head that has an adapter beside it.
    theirs = {tensor: array for tensor, array in theirs.items() if "base_layer" not in tensor}
    assert theirs.keys() == ours.keys()
    for tensor, array in theirs.items():
        np.testing.assert_array_equal(array, ours[tensor])
    again = load(tmp_path / "once")
    tokens = load_file(GOLDEN / f"{name}.safetensors")["tokens"]
    np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))
    save(again, tmp_path / "twice")
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes(), file.name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A base in `base`, and an adapter on it beside."""
    save(language_model(), tmp_path / "base")
    model = load(tmp_path / "base")
    base, adapters = adapt(model, AdapterConfig(rank=2), seed=0)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    save(with_adapters(model, base, adapters), tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **entries: Any) -> None:
    (folder / "fastpref.sha256").unlink(missing_ok=True)
    for manifest in folder.glob("*manifest*"):
        manifest.unlink()
    known = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(known | entries))


def test_a_base_may_be_given_and_is_shared(saved: Path) -> None:
    base = load(saved.parent / "base")
    models = [load_adapter(saved, base=base) for _ in range(2)]
    for model in models:
        parts = split(model)
        assert parts is not None
        mine, theirs = (jax.tree.leaves(tree) for tree in (parts[0].params, nnx.state(base.module)))
        assert all(one is other for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type of an adapter must be 'LORA', but received 'IA3' in .*merge_and_unload"),
        ({"use_dora": True}, r"use_dora of an adapter must be False, but received True"),
        ({"bias": "all"}, r"bias of an adapter must be 'none', but received 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save of an adapter must be None, but received \['lm_head'\]"),
        ({"lora_alpha": 0}, r"lora_alpha of adapter_config.json must be a number above 0, but received 0"),
        ({"base_model_name_or_path": None}, r"must name its base, but received None in .*Give the base"),
    ],
)
def test_other_kinds_of_adapters_are_refused(saved: Path, entries: dict[str, Any], message: str) -> None:
    change(saved, **entries)
    with pytest.raises(ModelError, match=message):
        load(saved)


def test_a_base_that_is_not_here_is_named_with_the_ways_out(saved: Path) -> None:
    change(saved, base_model_name_or_path="some/base")
    with pytest.raises(FileNotFoundError, match=r"received 'some/base' in .*Download it and give it.*merge_and_unload"):
        load(saved)
    assert split(load_adapter(saved, base=saved.parent / "base")) is not None
    shutil.copytree(saved.parent / "base", saved / "inside")
    change(saved, base_model_name_or_path="inside")
    assert split(load(saved)) is not None


def test_an_adapter_for_another_base_is_refused(saved: Path) -> None:
    save(language_model(seed=1), saved.parent / "other")
    with pytest.raises(
        ModelError, match=r"must be read on the base that it was trained on, but received .* with another"
    ):
        load_adapter(saved, base=saved.parent / "other")
    # Of what others wrote the shapes alone tell.
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file(tensors, saved / "adapter_model.safetensors")
    change(saved)
    assert split(load_adapter(saved, base=saved.parent / "other")) is not None
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {name: np.zeros((2, 17), np.float32)}, saved / "adapter_model.safetensors")
    with pytest.raises(
        ModelError, match=r"must have shapes \(r, 16\) and \(32, r\) for this base, but received \(2, 17\)"
    ):
        load(saved)
    save_file(
        {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": tensors[name]},
        saved / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match=r"must be kernels of its base, but received model.layers.9.self_attn.q_proj"):
        load(saved)
    save_file({"base_model.model.prompt_embeddings": tensors[name]}, saved / "adapter_model.safetensors")
    with pytest.raises(
        ModelError, match=r"must be lora_A and lora_B of modules, but received base_model.model.prompt_emb"
    ):
        load(saved)


def test_an_adapter_needs_a_directory_of_its_own_and_a_base_with_a_name(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"an adapter must have a directory of its own, but received .*notes.txt"):
        save_adapter(model, tmp_path / "full")
    with pytest.raises(ModelError, match=r"must have an adapter for it to be saved alone, but received one without"):
        save_adapter(load(saved.parent / "base"), tmp_path / "new")
    memory = language_model()
    base, adapters = adapt(memory, AdapterConfig(rank=2), seed=0)
    with pytest.raises(
        ModelError, match=r"an adapter must name its base, but received one .* loaded from no directory"
    ):
        save_adapter(with_adapters(memory, base, adapters), tmp_path / "new")
    save_adapter(with_adapters(memory, base, adapters), tmp_path / "new", base="some/base")
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(saved: Path) -> None:
    for file in saved.glob("*token*"):
        file.unlink()
    change(saved)
    assert (
        read_tokenizer(saved).fingerprint == load(saved).tokenizer.fingerprint == language_model().tokenizer.fingerprint
    )


def test_check_describes_an_adapter_and_its_base(saved: Path) -> None:
    lines = dict(check(saved, {"batch_size": 2, "max_prompt_tokens": 8, "max_new_tokens": 4}))
    assert lines["rank"] == "2, scale 16.0"
    assert lines["modules"].startswith("14, which end with down_proj, gate_proj")
    assert lines["loads"].startswith("yes, on the base in ")
    assert "MiB" in lines["  policy"]
