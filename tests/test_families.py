"""The table of families: an entry is read as `transformers` reads it or refused; what is written is read again."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families_page import PAGE, page
from flax import nnx
from safetensors.numpy import load_file, save_file

from fastpref.data.tokenizer import Tokenizer
from fastpref.method.errors import ModelError
from fastpref.models import Decoder, DecoderConfig, LanguageModel, RopeScaling, load, save
from fastpref.models.configs import is_tied, read_config, text_config, write_config
from fastpref.models.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
FAMILY_OF = {
    path.stem: json.loads((GOLDEN / path.stem / "config.json").read_text())["model_type"]
    for path in sorted(GOLDEN.glob("*_[0-9].safetensors"))
    if not path.stem.startswith("t5")
}


def raw_of(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def decoder(raw: dict[str, Any]) -> DecoderConfig:
    config = read_config(raw, tied=is_tied(raw))
    assert isinstance(config, DecoderConfig)
    return config


def copied(name: str, path: Path, **changes: Any) -> Path:
    folder = Path(shutil.copytree(GOLDEN / name, path / name))
    (folder / "config.json").write_text(json.dumps(raw_of(name, **changes)))
    return folder


def test_the_page_of_families_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_family_has_three_goldens() -> None:
    assert {kind: min(3, list(FAMILY_OF.values()).count(kind)) for kind in FAMILIES} == dict.fromkeys(FAMILIES, 3)


@pytest.mark.parametrize("name", [name for name in FAMILY_OF if name not in ("llama_3", "phi3_3")])
def test_a_model_made_here_is_written_as_its_family_writes_it(name: str, tmp_path: Path) -> None:
    """Names and shapes of tensors are those of the original where it is of the family that is found first."""
    config = decoder(raw_of(name))
    written = write_config(config, eos_id=1, pad_id=0)
    assert read_config(written, tied=config.tied) == config
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    module = nnx.merge(graph, jax.tree.map(lambda abstract: np.ones(abstract.shape, np.float32), state))
    save(LanguageModel(module, Tokenizer.load(GOLDEN / name)), tmp_path / "made")
    if written["model_type"] == FAMILY_OF[name]:
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "made", GOLDEN / name))
        assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}
    else:
        assert FAMILY_OF[name] in ("phi3", "qwen2")
    again = load(tmp_path / "made").module
    assert isinstance(again, Decoder)
    assert again.config == config


def test_factors_of_long_contexts_are_not_made_up() -> None:
    with pytest.raises(ModelError, match=r"options of a Decoder must be those of one family .*longrope"):
        write_config(decoder(raw_of("phi3_3")), eos_id=1, pad_id=0)


@pytest.mark.filterwarnings("ignore:.*tensors of images")
@pytest.mark.parametrize("before", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_gemma_with_images_is_read_and_saved_alone(before: str, tmp_path: Path) -> None:
    folder = copied("gemma3_images", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    moved = {name.replace("model.language_model.", before): tensor for name, tensor in tensors.items()}
    save_file(moved, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"the language model is read, without \d+ tensors of images"):
        model = load(folder)
    save(model, tmp_path / "text")
    raw = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    again = load(tmp_path / "text")
    save(again, tmp_path / "again")
    for file in (tmp_path / "text").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    kept = load_file(tmp_path / "text" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("model.language_model."):
            np.testing.assert_array_equal(kept[name.replace("model.language_model.", "model.")], tensor)
    assert all(name.startswith("model.") for name in kept)


def test_what_a_nested_file_leaves_out_has_the_meaning_of_its_family() -> None:
    """As published: the text of Gemma 3 4B."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    raw = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106], "vision_config": {}}
    config = decoder(raw)
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.window, config.local[:7]) == (1024, (0, 1, 2, 3, 4, 6, 7))
    assert (config.rope_theta, config.local_rope_theta, config.rope_scaling) == (1e6, 1e4, RopeScaling("linear", 8.0))
    assert config.tied
    assert text_config(raw)["eos_token_id"] == [1, 106]
    with pytest.raises(ModelError, match="text_config of a gemma3 must be an object, but received None"):
        read_config({"model_type": "gemma3"}, tied=True)


def test_names_of_the_first_gpt2_files_are_read(tmp_path: Path) -> None:
    folder = copied("gpt2_1", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    save_file(older, folder / "model.safetensors")
    save(load(folder), tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("name", [name for name in FAMILY_OF if FAMILY_OF[name] != "gpt2"])
def test_older_entries_of_positions_mean_the_same(name: str) -> None:
    raw = raw_of(name)
    rope = raw.pop("rope_parameters")
    if FAMILY_OF[name] == "gemma3_text":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        raw["rope_local_base_freq"] = local["rope_theta"]
    older = raw | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope.pop("rope_type")}}
    assert decoder(older) == decoder(raw_of(name))


def test_windows_follow_the_older_entries_where_layers_are_not_named() -> None:
    def local(name: str, **changes: Any) -> tuple[int | None, tuple[int, ...]]:
        raw = {key: value for key, value in raw_of(name, **changes).items() if key != "layer_types"}
        config = decoder(raw)
        return config.window, config.local

    assert local("qwen2_1") == (6, (1, 2))
    assert local("qwen2_1", max_window_layers=3) == (None, ())
    assert local("qwen2_1", use_sliding_window=False) == (None, ())
    assert local("gemma2_1") == (5, (0, 2))
    assert local("gemma3_1", sliding_window_pattern=2) == (5, (0, 2))
    assert local("smollm3_3") == (5, (1,))
    assert local("mistral_1", sliding_window=None) == (None, ())
    raw = {key: value for key, value in raw_of("mistral_1").items() if key != "sliding_window"}
    assert decoder(raw).window == 4096
    assert decoder({**raw, "sliding_window": None}).window is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2_1", {"layer_types": ["local"] * 3}, "layer_types of config.json must list full_attention or"),
        ("gemma2_1", {"layer_types": ["full_attention"]}, "for each of 3 layers, but received"),
        ("gemma2_1", {"sliding_window": None}, "sliding_window of a gemma2 must be a whole number where layers are"),
        ("gemma2_1", {"sliding_window": 0}, "sliding_window of config.json must be a whole number from 1"),
        ("gemma2_1", {"attn_logit_softcapping": -1}, "attn_logit_softcapping of config.json must be a number above 0"),
        ("gemma2_1", {"use_bidirectional_attention": True}, "use_bidirectional_attention of a gemma2 must be False"),
        ("gemma3_1", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping of a gemma3_text must be None"),
        ("gemma3_1", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters of a gemma3_text must be"),
        (
            "gemma3_1",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type of sliding_attention of a gemma3_text must be 'default', but received 'linear'",
        ),
        ("llama_1", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention of a llama must be"),
        ("qwen3_1", {"layer_types": ["sliding_attention"] * 3}, "received .* without use_sliding_window"),
        ("mistral_1", {"layer_types": ["full_attention"] * 3}, "layer_types of a mistral must be left out"),
        (
            "smollm3_1",
            {"no_rope_layers": [1, 0]},
            "no_rope_layers of config.json must list 0 or 1 for each of 4 layers",
        ),
        ("granite_1", {"logits_scaling": 0}, "logits_scaling of config.json must be a number above 0"),
        ("llama_1", {"logits_scaling": 2.0}, "logits_scaling of a llama must be 1, but received 2.0"),
        (
            "phi3_2",
            {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "linear"}},
            "rope_type of a phi3 must",
        ),
        ("phi3_2", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "must leave an even part of head_dim, 8"),
        (
            "phi3_3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            r"short_factor of config.json must list 3 numbers above 0, but received \[1.0\]",
        ),
        (
            "gpt2_1",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx of a gpt2 must be False",
        ),
        ("gpt2_1", {"n_embd": 0}, "n_embd of config.json must be a whole number from 1"),
        ("gpt2_1", {"activation_function": "tanh"}, "activation_function of a gpt2 must be .*, but received 'tanh'"),
        ("qwen2_3", {"quantization_config": {}}, "quantization_config of a qwen2 must be left out"),
    ],
)
def test_what_a_family_does_not_have_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decoder(raw_of(name, **changes))


def test_ties_left_out_are_those_of_the_family() -> None:
    for kind, tied in {
        "llama": False,
        "gemma2": True,
        "gemma3_text": True,
        "gpt2": True,
        "smollm3": True,
        "t5": True,
    }.items():
        assert is_tied({"model_type": kind}) == tied
        assert not is_tied({"model_type": kind, "tie_word_embeddings": False})


def test_the_head_has_the_scale_and_the_bound_of_the_file() -> None:
    granite, gemma = load(GOLDEN / "granite_1").module.head(), load(GOLDEN / "gemma2_1").module.head()
    assert (granite.scale, granite.soft_cap) == (1 / 1.6, None)
    assert (gemma.scale, gemma.soft_cap) == (1.0, 3.0)


def test_a_prompt_beyond_the_first_context_is_refused() -> None:
    module = load(GOLDEN / "phi3_3").module
    assert isinstance(module, Decoder)
    assert module.config.max_positions == 40
    tokens = jnp.ones((1, 30), jnp.int32)
    jax.eval_shape(lambda: module.prefill(tokens, tokens > 0, max_new_tokens=11))
    with pytest.raises(ModelError, match=r"at most 40 tokens together, .* but received room for 41"):
        module.prefill(tokens, tokens > 0, max_new_tokens=12)
