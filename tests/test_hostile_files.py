"""Files that strangers wrote: refused in our words, whatever is in them."""

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from small import language_model, tokenizer

from fastpref.data import ChatTemplate, read_records
from fastpref.data.tokenizer import Rendered, Tokenizer
from fastpref.method.errors import ChatError, DataError, FastprefError, ModelError
from fastpref.models import load, save

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    save(language_model("decoder"), path)
    return path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    shutil.copytree(saved, target)
    # What was changed on purpose is no damage.
    for manifest in target.glob("*manifest*"):
        manifest.unlink()
    return target


def edit(path: Path, **changed: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


WRONG = ["many", True, None, -1, 0, 1.5, [], {}, 1e300]


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"])
@pytest.mark.parametrize("value", [value for value in WRONG if value is not None], ids=str)
def test_a_size_is_a_whole_number(checkpoint: Path, name: str, value: Any) -> None:
    edit(checkpoint, **{name: value})
    with pytest.raises(
        ModelError,
        match=rf"{name} of config.json must be a whole number from 1 to 2147483647, but "
        rf"rec",
    ):
        load(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_theta", 0), ("rope_theta", -1.0), ("rope_theta", "many"), ("rms_norm_eps", -1.0), ("rms_norm_eps", "x"),
        ("rms_norm_eps", 2), ("tie_word_embeddings", "no"), ("attention_bias", 1), ("num_key_value_heads", 0),
    ],
)  # fmt: skip
def test_an_entry_out_of_range_is_refused(checkpoint: Path, name: str, value: Any) -> None:
    edit(checkpoint, **{name: value})
    with pytest.raises(ModelError, match=rf"{name} of config.json must be .*, but received .*\. Copy the file again"):
        load(checkpoint)


@pytest.mark.parametrize(
    "rope", ["linear", {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": "x"}]
)
def test_a_scaling_of_positions_is_checked(checkpoint: Path, rope: Any) -> None:
    edit(checkpoint, rope_scaling=rope)
    with pytest.raises(ModelError, match=r"of config.json must be .*, but received"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim"])
def test_sizes_beyond_the_weights_are_refused_at_once(checkpoint: Path, name: str) -> None:
    edit(checkpoint, **{name: 10**6})
    with pytest.raises(ModelError, match=r"of config.json must be at most the \d+ that the weights can hold, but rec"):
        load(checkpoint)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/model.safetensors", "a/b.safetensors"])
def test_shards_are_names_within_the_directory(checkpoint: Path, shard: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "model.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(ModelError, match=r"must name files of its own directory, but received '.*' in"):
        load(checkpoint)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_weights_are_floating_point(checkpoint: Path, dtype: Any) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(dtype)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(
        ModelError,
        match=r"a tensor must be of type F16, BF16, F32, F64, F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ, but received "
        r"model.norm.weight",
    ):
        load(checkpoint)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_are_finite_unless_asked(checkpoint: Path, value: float) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], value)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ModelError, match=r"weights must be finite, but received model.norm.weight of .*finite=False"):
        load(checkpoint)
    load(checkpoint, finite=False)


TOKENIZERS: list[Any] = [
    "{}", "[]", "null", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "not json", '"text"',
]  # fmt: skip


@pytest.mark.parametrize("content", TOKENIZERS)
def test_a_broken_tokenizer_is_refused_in_our_words(checkpoint: Path, content: str) -> None:
    (checkpoint / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer.json must be a tokenizer, but received one in .* that fails"):
        Tokenizer.load(checkpoint)


@pytest.mark.parametrize("config", [{"eos_token": 3}, {"eos_token": {"content": 3}}, {"chat_template": 3}, []])
def test_a_broken_tokenizer_config_is_never_a_traceback(checkpoint: Path, config: Any) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(FastprefError):
        Tokenizer.load(checkpoint)


def test_a_post_processor_keeps_the_text(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "</s>", "type_id": 0}}]
    eos = tokenizer().eos_id
    name = tokenizer().backend.id_to_token(eos)
    pieces[0]["SpecialToken"]["id"] = name
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [eos], "tokens": [name]}},
    }
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ModelError,
        match=r"post-processor must keep the text's own tokens, but received one that "
        r"makes",
    ):
        Tokenizer.load(checkpoint)


def test_special_tokens_in_a_text_are_text_unless_asked() -> None:
    shared = tokenizer()
    backend = tokenizers.Tokenizer.from_str(shared.backend.to_str())
    ours = Tokenizer(backend, eos_id=shared.eos_id, pad_id=shared.pad_id)
    eos = ours.backend.id_to_token(ours.eos_id)
    text = f"w1 {eos} w2"
    assert ours.eos_id not in ours.encode_prompts([text])[0][:-1]
    assert ours.eos_id not in ours.encode_completions([text])[0][:-1]
    assert ours.eos_id in ours.encode_prompts([Rendered(text)])[0]
    ours.special_text = True
    assert ours.eos_id in ours.encode_completions([text])[0][:-1]


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adding": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "lists": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "replacing": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x|replace('a', 'aa') %}{% endfor %}",  # noqa: E501
    "method": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",  # noqa: E501
    "multiplying": "{{ 'x' * 10**9 }}",
    "powers": "{{ 10 ** (10 ** 9) }}",
    "width": "{{ '%999999999d' % 1 }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "centring": "{{ 'x'|center(999999999) }}",
    "justifying": "{{ 'x'.ljust(999999999) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_bounded(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(ChatError, match=r"the chat template refuses the conversation|a chat template must"):
        ChatTemplate(TEMPLATES[name]).prompt(HI)
    # The limit is not a measurement: without one it would not end.
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("text", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "x" * (2**20 + 1)])
def test_templates_are_of_bounded_size(text: str) -> None:
    with pytest.raises(ChatError, match="a chat template must"):
        ChatTemplate(text)


def test_bounded_templates_write_what_others_do() -> None:
    text = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else ',' }}{{ m.content ~ '!' }}"
        "{% endfor %}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ 'x' * 3 + 'y' }}"
        "{{ 'a b'.split()|join('-') }}"
    )
    assert ChatTemplate(text).prompt([*HI, *HI]) == "1/2,hi!2/2hi!a1xxxya-b"


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pa.parquet.write_table(table, tmp_path / "two.parquet")
    with pytest.raises(
        DataError,
        match=r"two.parquet must be a whole Parquet file with one column of each name, but "
        r"rec",
    ):
        read_records(tmp_path / "two.parquet", columns=("prompt",), on_bad_record="skip")


def test_a_missing_file_is_no_bad_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.parquet"):
        read_records([tmp_path / "missing.parquet"], columns=("prompt",), on_bad_record="skip")
