"""Directories that others wrote: files that contradict each other, types, prefixes, ties, adapters, padding rows."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file
from small import PROMPTS, language_model, prefers_w1, tokenizer

from fastpref.data.tokenizer import Rendered
from fastpref.learning.train import train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import DataError, ModelError, ModelWarning
from fastpref.models import T5, Decoder, DecoderConfig, LanguageModel, T5Config, load, save, tensors
from fastpref.models.configs import read_config
from fastpref.models.rows import shared_rows
from fastpref.sampling.generate import write

GOLDEN = Path(__file__).parent / "golden"
LLAMA, T5_TIED = "llama_grouped_tied", "t5_original"


def copied(name: str, path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, path / name))


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(content))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_file(folder / "model.safetensors"))


def store(folder: Path, weights: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
    save_file({key: np.array(value, order="C") for key, value in weights.items()}, folder / name)


def arrays(model: LanguageModel) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model.module))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(one: LanguageModel, other: LanguageModel) -> None:
    first, second = arrays(one), arrays(other)
    assert first.keys() == second.keys()
    for path, array in first.items():
        np.testing.assert_array_equal(array, second[path])


# Types and parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_weights_of_every_type_are_read_exactly(kind: Any, tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    stored = {name: value.astype(kind) for name, value in weights(folder).items()}
    store(folder, stored)
    plain = copied(LLAMA, tmp_path / "plain")
    store(plain, {name: value.astype(np.float32) for name, value in stored.items()})
    assert_same(load(folder), load(plain))
    narrow = arrays(load(folder, dtype=jnp.bfloat16))
    for path, array in arrays(load(plain)).items():
        np.testing.assert_array_equal(narrow[path], array.astype(ml_dtypes.bfloat16))


def test_a_number_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    store(folder, weights(folder) | {"model.norm.weight": np.full(48, 1e5, np.float32)})
    load(folder, dtype=jnp.bfloat16)
    with pytest.raises(
        ModelError, match=r"must be finite, but received model.norm.weight of .* with NaN or infinity in float16"
    ):
        load(folder, dtype=jnp.float16)


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_parts_of_a_tensor_make_the_whole(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(GOLDEN / "t5_v1_1")
    monkeypatch.setattr(tensors, "PART", size)
    assert_same(load(GOLDEN / "t5_v1_1"), whole)


@pytest.mark.parametrize("turned", [False, True])
def test_a_part_of_a_tensor_is_read(turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.arange(63, dtype=np.float32).reshape(9, 7)
    store(tmp_path, {"a": value, "b": value[0], "c": value[:0], "d": value[0, 0].reshape(())})
    held = tensors.open_tensors(tmp_path)
    for size in (1, 60, 10_000):
        monkeypatch.setattr(tensors, "PART", size)
        read = tensors.read_tensor(held["a"], jnp.float32, turned=turned, rows=slice(2, 8), columns=slice(1, 4))
        np.testing.assert_array_equal(read, value[2:8, 1:4].T if turned else value[2:8, 1:4])
        np.testing.assert_array_equal(tensors.read_tensor(held["b"], jnp.float32, rows=slice(3, 5)), value[0, 3:5])
        assert tensors.read_tensor(held["c"], jnp.float32, turned=turned).shape == ((7, 0) if turned else (0, 7))
        assert tensors.read_tensor(held["d"], jnp.float32).shape == ()


# T5 and mT5 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "entries", "scaled"),
    [
        ("mt5", {"tie_word_embeddings": True}, False),
        ("mt5", {"tie_word_embeddings": False}, False),
        ("mt5", {}, False),
        ("mt5", {"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
        ("t5", {"tie_word_embeddings": True}, True),
        ("t5", {"tie_word_embeddings": False}, False),
        ("t5", {}, True),
        ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
    ],
)
def test_logits_are_scaled_as_transformers_5_does(kind: str, entries: dict[str, bool], scaled: bool) -> None:
    raw = json.loads((GOLDEN / "t5_v1_1" / "config.json").read_text())
    for name in ("tie_word_embeddings", "scale_decoder_outputs"):
        raw.pop(name, None)
    config = read_config(raw | {"model_type": kind} | entries, tied=False)
    assert isinstance(config, T5Config)
    assert config.scaled_output is scaled


def test_an_mt5_has_its_own_defaults() -> None:
    raw = json.loads((GOLDEN / "t5_v1_1" / "config.json").read_text())
    for name in ("feed_forward_proj", "decoder_start_token_id", "pad_token_id"):
        raw.pop(name, None)
    config = read_config(raw | {"model_type": "mt5"}, tied=False)
    assert isinstance(config, T5Config)
    assert (config.activation, config.gated, config.start_id) == ("gelu_new", True, 0)


@pytest.mark.parametrize("names", [["encoder.embed_tokens"], ["decoder.embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_a_t5_whose_embedding_has_another_name_is_read(names: list[str], tied: bool, tmp_path: Path) -> None:
    """transformers 5 ties all names of a T5's embedding to the one that is stored, whatever the file says."""
    folder = copied(T5_TIED, tmp_path)
    edit(folder, tie_word_embeddings=tied, scale_decoder_outputs=True)
    held = weights(folder)
    shared = held.pop("shared.weight")
    store(folder, held | {f"{name}.weight": shared for name in names})
    model = load(folder)
    assert_same(model, load(GOLDEN / T5_TIED))
    assert isinstance(model.module, T5)
    assert model.module.config.tied


def test_encoder_and_decoder_with_embeddings_of_their_own_are_refused(tmp_path: Path) -> None:
    folder = copied(T5_TIED, tmp_path)
    held = weights(folder)
    store(folder, held | {"decoder.embed_tokens.weight": held["shared.weight"] + 1})
    with pytest.raises(
        ModelError, match=r"read with one embedding, but received decoder.embed_tokens.weight that diff"
    ):
        load(folder)


def test_a_tied_decoder_of_which_only_the_head_is_stored_is_read(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    held = weights(folder)
    store(folder, held | {"lm_head.weight": held.pop("model.embed_tokens.weight")})
    assert_same(load(folder), load(GOLDEN / LLAMA))
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"without 1, first model.embed_tokens.weight"):
        load(folder)
    store(folder, held | {"model.embed_tokens.weight": weights(GOLDEN / LLAMA)["model.embed_tokens.weight"]})
    with pytest.raises(ModelError, match=r"without 1, first lm_head.weight"):
        load(folder)


# Names and files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("model.layers.", "model._orig_mod.layers."),
    ],
)
def test_prefixes_of_wrappers_are_taken_off_and_said(rename: Callable[[str], str], tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    store(folder, {rename(name): value for name, value in weights(folder).items()})
    with pytest.warns(ModelWarning, match="are read without a wrapper's prefix, such as"):
        model = load(folder)
    assert_same(model, load(GOLDEN / LLAMA))


def test_a_wrapped_and_a_bare_tensor_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    held = weights(folder)
    store(folder, held | {"module.model.norm.weight": held["model.norm.weight"]})
    with pytest.raises(
        ModelError, match=r"must differ by more than a wrapper's prefix, but received module.model.norm"
    ):
        load(folder)


def test_a_body_that_was_saved_alone_is_read(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    store(folder, {name.removeprefix("model."): value for name, value in weights(folder).items()})
    assert_same(load(folder), load(GOLDEN / LLAMA))


def test_a_whole_file_counts_before_an_index_and_it_is_said(tmp_path: Path) -> None:
    folder = copied("llama_sharded", tmp_path)
    whole = {name: value + 1 for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    store(folder, whole)
    with pytest.warns(ModelWarning, match=r"model.safetensors is read, as transformers does; .*index.json beside it"):
        model = load(folder)
    for path, array in arrays(load(GOLDEN / "llama_sharded")).items():
        np.testing.assert_array_equal(arrays(model)[path], array + 1)
    index = {"weight_map": dict.fromkeys(whole, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = copied("llama_sharded", tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    store(folder, dict(load_file(second)) | {name: load_file(first)[name] + 1}, second.name)
    with pytest.raises(
        ModelError, match=f"must lie in one shard, but received {re.escape(name)} of .* in {second.name}"
    ):
        load(folder)


def test_weights_in_another_format_are_named_with_a_way_out(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"")
    message = r"and pytorch_model.bin, a pickle, which may hold code and is not read. Write model.safetensors beside it"
    with pytest.raises(FileNotFoundError, match=message):
        load(folder)
    (folder / "pytorch_model.bin").rename(folder / "tf_model.h5")
    (folder / "training_args.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"and tf_model.h5, which is not read. Save its weights as safetensors"):
        load(folder)
    shutil.rmtree(folder)
    folder = copied("llama_sharded", tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"with neither. Copy model.safetensors.index.json too: model-00001"):
        load(folder)


def test_a_folder_of_checkpoints_names_the_last_of_them(tmp_path: Path) -> None:
    """As trainers write them, and as the hub's cache keeps them."""
    for inner in ("checkpoint-5", "snapshots/abc"):
        outer = tmp_path / inner.partition("/")[0].partition("-")[0]
        (outer / inner).mkdir(parents=True)
        (outer / inner / "config.json").write_text("{}")
        with pytest.raises(FileNotFoundError, match=rf"without. Name a folder in it, such as {outer / inner}"):
            load(outer)


def test_an_adapter_is_named_with_its_base_and_the_way_to_merge_it(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    store(tmp_path, {"base_model.model.x.lora_A.weight": np.zeros((8, 32), np.float32)}, "adapter_model.safetensors")
    merge = r"base of an adapter .* received 'some/base' .* or merge the adapter into its base .*merge_and_unload"
    with pytest.raises(FileNotFoundError, match=merge):
        load(tmp_path)
    folder = copied(LLAMA, tmp_path)
    shutil.copy(tmp_path / "adapter_config.json", folder)
    with pytest.raises(ModelError, match=r"Delete adapter_config.json if model.safetensors is the whole model"):
        load(folder)
    (folder / "adapter_config.json").unlink()
    store(folder, weights(folder) | {"model.norm.lora_A.weight": np.zeros((8, 32), np.float32)})
    with pytest.raises(ModelError, match=r"with 1 tensors of an adapter in it, first model.norm.lora_A.weight"):
        load(folder)


# Tokens past the embedding ------------------------------------------------------------------------------------------


def test_a_padding_token_without_a_row_is_usable_until_a_text_holds_it(tmp_path: Path) -> None:
    save(_short(33), tmp_path / "model")
    folder = tmp_path / "model"
    (folder / "fastpref_manifest.json").unlink()
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["[PAD]"])
    backend.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", pad_token="[PAD]")
    model = load(folder)
    assert (model.tokenizer.pad_id, model.tokenizer.vocab_size, model.module.vocab_size) == (33, 34, 33)
    written = write(model, PROMPTS[:3], seed=0, max_new_tokens=3)
    assert written.tokens.max() < 33
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").tokenizer.pad_id == 33
    with pytest.raises(DataError, match=r"below 33, the rows of the embedding, but received '\[PAD\]', which is 33"):
        model.tokenizer.encode_prompts([Rendered("w1 [PAD]")])
    backend.add_tokens(["word"])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"vocabulary of 33, but received that of .* with 35, such as 'word'"):
        load(folder)


def _short(rows: int, seed: int = 0, **options: Any) -> LanguageModel:
    config = DecoderConfig(vocab_size=rows, width=16, hidden=24, layers=1, heads=2, kv_heads=1, head_dim=8, **options)
    return LanguageModel(Decoder(config, rngs=nnx.Rngs(seed)), replace_tokenizer())


def replace_tokenizer() -> Any:
    from fastpref.data.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer.from_str(tokenizer().backend.to_str())
    return Tokenizer(backend, eos_id=1, pad_id=0)


# Padding rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_larger_of_two_heads_is_cut_to_the_rows_that_both_have(tied: bool) -> None:
    small, large = _short(36, tied=tied), _short(40, seed=1, tied=tied)
    with pytest.warns(ModelWarning, match=r"heads of 40 and 36 rows are read as 36: .*ids below 33"):
        first, second, third = shared_rows([small, large, large])
    assert first is small
    assert second is third
    assert second.module.vocab_size == 36
    np.testing.assert_array_equal(second.module.head().weight[..., :36], large.module.head().weight[..., :36]) if (
        not tied
    ) else np.testing.assert_array_equal(second.module.head().weight, large.module.head().weight[:36])
    assert large.module.vocab_size == 40


def test_models_with_as_many_rows_stay_the_same_objects() -> None:
    one, other = language_model(), _short(36)
    assert all(a is b for a, b in zip(shared_rows([one, other]), [one, other], strict=True))


def test_a_cut_that_would_take_a_token_is_refused() -> None:
    with pytest.raises(ModelError, match=r"heads of as many rows, but received 40 and 32, with a tokenizer of 33 ids"):
        shared_rows([_short(40), _short(32)])


@pytest.mark.parametrize("larger", ["policy", "ref"])
def test_training_with_padded_vocabularies_cuts_says_and_saves(larger: str, tmp_path: Path) -> None:
    """The run is the one that models without the further rows have."""
    sizes = {"policy": (40, 36), "ref": (36, 40)}[larger]
    config = TrainConfig(algorithm="ipo-md", steps=1, batch_size=4, max_new_tokens=3, optimizer="adamw")
    policy, ref = _short(sizes[0]), _short(sizes[1], seed=1)
    with pytest.warns(ModelWarning, match="heads of 40 and 36 rows are read as 36"):
        result = train(policy, PROMPTS[:4], prefers_w1, config, ref=ref, run_dir=tmp_path / "run", quiet=True)
    with pytest.warns(ModelWarning):
        policy, ref = shared_rows([policy, ref])
    again = train(policy, PROMPTS[:4], prefers_w1, config, ref=ref, quiet=True)
    assert result.metrics[0]["loss"] == again.metrics[0]["loss"]
    saved = load(tmp_path / "run" / "policy")
    assert saved.module.vocab_size == 36
    assert_same(saved, again.policy)


def test_writing_beside_a_padded_reference_is_possible() -> None:
    with pytest.warns(ModelWarning, match="heads of 40 and 36 rows"):
        written = write(_short(36), PROMPTS[:2], seed=0, max_new_tokens=3, ref=_short(40))
    assert np.isfinite(written.ref_logps).all()


def test_a_cut_model_describes_itself(tmp_path: Path) -> None:
    save(_short(40), tmp_path / "large")
    with pytest.warns(ModelWarning):
        cut = shared_rows([load(tmp_path / "large"), _short(36)])[0]
    save(cut, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["vocab_size"] == 36
    assert_same(load(tmp_path / "cut"), cut)
    assert replace(cut.module.config, vocab_size=40) == load(tmp_path / "large").module.config  # type: ignore[attr-defined]
