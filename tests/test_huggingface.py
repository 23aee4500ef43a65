"""Checkpoints in and out: what is read is written again byte for byte, and what is broken is named."""

import json
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import xxhash
from flax import nnx
from safetensors.numpy import load_file, save_file

from fastpref.data import files
from fastpref.data.tokenizer import Tokenizer
from fastpref.method.errors import ModelError, ModelWarning, WriteError
from fastpref.models import (
    T5,
    Decoder,
    DecoderConfig,
    LanguageModel,
    RopeScaling,
    T5Config,
    huggingface,
    load,
    save,
)
from fastpref.models.configs import read_config, write_config

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = ("make_goldens.py", "manifest.json", "make_smollm2.py", "smollm2.json", "compare_templates.py")
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))

SMALL = DecoderConfig(vocab_size=97, width=12, hidden=20, layers=1, heads=2, kv_heads=1, head_dim=6)
SMALL_T5 = T5Config(vocab_size=97, width=12, hidden=20, encoder_layers=1, decoder_layers=2, heads=2, head_dim=6)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the manifest, which is ours alone."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != files.MANIFEST}


def copied(name: str, path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, path / name))


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def make(config: Any, dtype: Any = jnp.float32) -> LanguageModel:
    kind = T5 if isinstance(config, T5Config) else Decoder
    return LanguageModel(kind(config, dtype=dtype, rngs=nnx.Rngs(0)), Tokenizer.load(GOLDEN / "t5_v1_1"))


def arrays(model: LanguageModel) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model.module))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_the_goldens_are_those_of_the_committed_script() -> None:
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    assert xxhash.xxh3_64_hexdigest((GOLDEN / "make_goldens.py").read_bytes()) == manifest["script"]
    ours = {GOLDEN / name for name in SCRIPTS}
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    hashes = {
        str(path.relative_to(GOLDEN)): xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in files if path not in ours
    }
    assert hashes == manifest["files"]
    assert {"torch", "transformers", "tokenizers", "safetensors", "python"} == set(manifest["versions"])
    assert sum(path.stat().st_size for path in files) < 6_000_000


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("llama_sharded", "gemma3_images")])
def test_saving_what_was_loaded_writes_the_original_bytes(name: str, tmp_path: Path) -> None:
    dtype = jnp.bfloat16 if name.endswith("bfloat16") else jnp.float32
    save(load(GOLDEN / name, dtype=dtype), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(GOLDEN / name)


def test_shards_are_written_read_and_written_again(tmp_path: Path) -> None:
    first = load(GOLDEN / "llama_sharded")
    save(first, tmp_path / "one", max_shard_bytes=60_000)
    save(load(tmp_path / "one"), tmp_path / "two", max_shard_bytes=60_000)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    shards = [name for name in one if name.endswith(".safetensors")]
    assert len(shards) >= 3
    tensors = {name: load_file(tmp_path / "one" / name) for name in shards}
    assert all(sum(x.nbytes for x in shard.values()) <= 60_000 for shard in tensors.values())
    index = json.loads(one["model.safetensors.index.json"])
    assert index["weight_map"] == {key: name for name, shard in tensors.items() for key in shard}
    assert index["metadata"]["total_size"] == sum(x.nbytes for shard in tensors.values() for x in shard.values())
    save(first, tmp_path / "one")
    assert {name for name in contents(tmp_path / "one") if "safetensors" in name} == {"model.safetensors"}


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, tied=True, attention_bias=True, output_bias=True, rope_scaling=LLAMA3),
        replace(SMALL, attention_bias=True, rope_theta=500.0, rope_scaling=RopeScaling("linear", 2.0), norm_eps=1e-5),
        SMALL_T5,
        replace(SMALL_T5, activation="relu", gated=False, tied=True, scaled_output=True, start_id=3, buckets=8),
        replace(SMALL_T5, activation="silu", initial_factor=0.5),
    ],
)
def test_models_made_here_survive_saving(config: Any, tmp_path: Path) -> None:
    model = make(config)
    save(model, tmp_path / "one")
    loaded = load(tmp_path / "one")
    assert isinstance(loaded.module, T5 | Decoder)
    assert loaded.module.config == config
    saved, read = arrays(model), arrays(loaded)
    assert saved.keys() == read.keys()
    for path, array in saved.items():
        np.testing.assert_array_equal(read[path], array)
    save(loaded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_dtype_is_the_callers_and_the_saved_one_is_declared(tmp_path: Path) -> None:
    model = load(GOLDEN / "llama_grouped_tied", dtype=jnp.bfloat16)
    assert {array.dtype for array in arrays(model).values()} == {jnp.dtype(jnp.bfloat16)}
    save(model, tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    wide = load(tmp_path / "narrow")
    for path, array in arrays(wide).items():
        np.testing.assert_array_equal(array, arrays(model)[path].astype(np.float32))


def test_trained_weights_are_saved(tmp_path: Path) -> None:
    model = load(GOLDEN / "t5_original")
    graph, state = nnx.split(model.module)
    trained = replace(model, module=nnx.merge(graph, jax.tree.map(lambda x: x + 1, state)))
    save(trained, tmp_path / "trained")
    again = arrays(load(tmp_path / "trained"))
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(again[path], array + 1)


def test_copies_of_the_embedding_are_dropped_and_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    folder = copied("t5_original", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    names = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    save_file(tensors | dict.fromkeys(names, tensors["shared.weight"]), folder / "model.safetensors")
    assert arrays(load(folder)).keys() == arrays(load(GOLDEN / "t5_original")).keys()
    save_file(tensors | {"lm_head.weight": tensors["shared.weight"] + 1}, folder / "model.safetensors")
    module = load(folder).module
    assert isinstance(module, T5)
    assert not module.config.tied
    np.testing.assert_array_equal(module.head().weight.T, tensors["shared.weight"] + 1)
    assert module.head().scale == 36**-0.5


def test_tensors_that_no_model_reads_are_ignored(tmp_path: Path) -> None:
    folder = copied("llama_grouped_tied", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    save_file(tensors | extra, folder / "model.safetensors")
    assert arrays(load(folder)).keys() == arrays(load(GOLDEN / "llama_grouped_tied")).keys()


def test_older_config_files_mean_the_same() -> None:
    llama = json.loads((GOLDEN / "llama3_rope" / "config.json").read_text())
    rope = llama.pop("rope_parameters")
    older = llama | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert read_config(older, tied=False) == read_config(
        llama | {"rope_parameters": rope | {"rope_theta": 500.0}}, tied=False
    )
    older["rope_scaling"] = {"type": "linear", "factor": 2}
    config = read_config(older, tied=False)
    assert isinstance(config, DecoderConfig)
    assert config.rope_scaling == RopeScaling("linear", 2.0)
    t5 = json.loads((GOLDEN / "t5_v1_1" / "config.json").read_text())
    older = {key: value for key, value in t5.items() if key != "scale_decoder_outputs"} | {"tie_word_embeddings": False}
    assert read_config(older, tied=False) == read_config(t5, tied=False)
    older["tie_word_embeddings"] = True
    config = read_config(older, tied=True)
    assert isinstance(config, T5Config)
    assert config.scaled_output
    assert read_config(t5 | {"model_type": "mt5"}, tied=False) == read_config(t5, tied=False)


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def rename_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"strange.weight": np.ones(3, np.float32)}, folder / "model.safetensors")


def grow_vocabulary(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"word{number}" for number in range(10)])
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "a checkpoint must be a directory, but received"),
        (
            lambda folder: (folder / "config.json").unlink(),
            FileNotFoundError,
            "must hold config.json, but received .* without",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "config.json must be JSON"),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            ValueError,
            "config.json must be a JSON object, but received list",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            FileNotFoundError,
            "must hold model.safetensors or model.safetensors.index.json, but received .* with neither",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            FileNotFoundError,
            "must hold tokenizer.json, but received .* without",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            ValueError,
            "tokenizer.json must be a tokenizer, but received one in",
        ),
        (truncate, ValueError, "model.safetensors must be a whole safetensors file, but received"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50),
            ValueError,
            "must be a whole safetensors file",
        ),
        (
            rename_tensor,
            ValueError,
            "must hold the tensors that its config.json asks for, but received it without 1, first model.norm.weight",
        ),
        (
            add_tensor,
            ValueError,
            "only tensors that its config.json has a place for, but received 1 others, first strange.weight",
        ),
        (grow_vocabulary, ValueError, "must fit the model's vocabulary of 97, but received that of .* with 105"),
    ],
)
def test_broken_directories_are_named(
    break_it: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = copied("llama_grouped_tied", tmp_path)
    break_it(folder)
    with pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type must be one of gemma, .*, smollm3, t5, but received 'mamba'"),
        ({"model_type": "umt5"}, "model_type must be one of .*, but received 'umt5'"),
        ({"hidden_size": None}, "hidden_size of config.json must be a whole number"),
        ({"hidden_act": "relu2"}, "hidden_act of a llama must be 'gelu' or .*, but received 'relu2'"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias of a mistral must be False, but received True"),
        (
            {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}},
            "rope_type of a llama must be .*, but received 'mrope'",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "config.json must hold factor"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor of a llama must be 1, but received 0.5",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config of a llama must be left out"),
        (
            {"use_sliding_window": True},
            "use_sliding_window of a llama must be False, but received True",
        ),
        ({"layer_types": ["sliding_attention"]}, "layer_types of a llama must be left out"),
        (
            {"intermediate_size": 50},
            r"mlp.gate_proj.weight must have shape \(50, 48\) by config.json, but received \(52, 48\)",
        ),
    ],
)
def test_unsupported_configurations_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copied("llama_grouped_tied", tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feed_forward_proj": "gated-tanh"},
            "feed_forward_proj of a t5 must be 'relu' or .*, but received 'gated-tanh'",
        ),
        (
            {"decoder_start_token_id": None, "pad_token_id": None},
            "decoder_start_token_id must be an id below \\d+, but received None",
        ),
    ],
)
def test_unsupported_t5s_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copied("t5_v1_1", tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_missing_shard_and_a_broken_index_are_named(tmp_path: Path) -> None:
    folder = copied("llama_sharded", tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"index.json must name files that are there, but received model-00002-of-00003.safetensors",
    ):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index.json must map tensors to files, but received one in .* that does not"):
        load(folder)


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(SMALL)
    save(model, tmp_path / "checkpoint")
    before = contents(tmp_path / "checkpoint")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(make(SMALL_T5), tmp_path / "checkpoint")
    assert contents(tmp_path / "checkpoint") == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_a_flipped_bit_in_what_was_saved_here_is_found_and_named(tmp_path: Path) -> None:
    """Whoever reads it: as a judge, a policy or a tokenizer. Data of tensors is most of a file, and has no checksum."""
    save(make(SMALL), tmp_path / "model")
    whole = {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json", files.MANIFEST} <= {file.name for file in whole}
    rng = random.Random(0)
    for file, content in whole.items():
        for _ in range(8):
            flipped = bytearray(content)
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises((ModelError, ModelWarning), match=f"{tmp_path / 'model'}/"):
                load(tmp_path / "model")
            if file.name == "tokenizer.json":
                with pytest.raises(ModelError, match=r"tokenizer.json must be as it was written"):
                    Tokenizer.load(tmp_path / "model")
        file.write_bytes(content)
    load(tmp_path / "model")


def test_an_edited_config_is_read_with_a_word_and_without_once_the_manifest_is_deleted(tmp_path: Path) -> None:
    save(make(SMALL), tmp_path / "model")
    edit(tmp_path / "model" / "config.json", comment="mine")
    with pytest.warns(
        ModelWarning, match=r"config.json is not as it was written, .* delete .*fastpref_manifest.json\."
    ):
        load(tmp_path / "model")
    (tmp_path / "model" / files.MANIFEST).unlink()
    load(tmp_path / "model")


def test_a_save_killed_between_two_renames_is_brought_back_on_reading(tmp_path: Path) -> None:
    save(make(SMALL), tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".old-model")  # where a system cannot exchange two directories at once
    load(tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_while_saving_is_one_error_with_the_path(tmp_path: Path) -> None:
    model = make(SMALL)
    save(model, tmp_path / "model")
    before = contents(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(WriteError, match=rf"{tmp_path / 'model'} must be writable, but received .*File too large"):
            save(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "model") == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_directory_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(FileExistsError, match=r"a directory of its own, but received .* with metrics.jsonl"):
        save(make(SMALL), tmp_path)
    with pytest.raises(FileExistsError, match=r"with metrics.jsonl. Choose another path"):
        save(make(SMALL), tmp_path / "metrics.jsonl")


def test_only_what_a_checkpoint_can_hold_is_saved(tmp_path: Path) -> None:
    model = make(SMALL)
    with pytest.raises(ValueError, match="the config of a LanguageModel must describe its module"):
        save(replace(model, config=load(GOLDEN / "llama_sharded").config), tmp_path / "a")
    message = r"options of a Decoder must be those of one family .*, but received {'output_bias': True}. Change them"
    with pytest.raises(ValueError, match=message):
        write_config(replace(SMALL, output_bias=True), eos_id=1, pad_id=0)
    with pytest.raises(ValueError, match=r"projection of a T5 checkpoint must be .*, but received silu with no gate"):
        write_config(replace(SMALL_T5, activation="silu", gated=False), eos_id=1, pad_id=0)

    names = ("vocab_size", "decoder_start", "prefill", "decode", "packed_hidden_states", "head")
    other: Any = type("Other", (), dict.fromkeys(names, len))()
    with pytest.raises(TypeError, match="must be a T5 or a Decoder to be saved, but received a Other"):
        save(replace(model, module=other), tmp_path / "a")
    assert not (tmp_path / "a").exists()
