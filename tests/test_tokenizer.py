"""Text to ids and back, and which tokens end and fill a row."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from fastpref.data.tokenizer import Tokenizer
from fastpref.method.errors import ModelError

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["the model likes a summary", "a winner, or neither", ""]


def words() -> tokenizers.Tokenizer:
    vocabulary = {"<unk>": 0, "<end>": 1, "<fill>": 2, "a": 3, "b": 4, "<stop>": 5}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def write(folder: Path, **files: Any) -> Path:
    words().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["t5_v1_1", "llama_sharded"])
def test_special_tokens_are_added_and_dropped_as_each_family_does(name: str) -> None:
    tokenizer = Tokenizer.load(GOLDEN / name)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, 95)
    prompts, completions = tokenizer.encode_prompts(TEXTS), tokenizer.encode_completions(TEXTS)
    for prompt, completion in zip(prompts, completions, strict=True):
        plain = completion[:-1]
        assert completion[-1] == 1
        assert not {0, 1, 2, 3} & set(plain)
        assert prompt == ([*plain, 1] if name.startswith("t5") else [3, *plain])
    assert tokenizer.decode(prompts) == tokenizer.decode(completions) == TEXTS


def test_the_backends_padding_and_truncation_are_switched_off() -> None:
    backend = words()
    backend.enable_padding(length=9)
    backend.enable_truncation(2)
    tokenizer = Tokenizer(backend, eos_id=1)
    assert tokenizer.encode_prompts(["a b a b", "a"]) == [[3, 4, 3, 4], [3]]


def test_completions_get_no_special_tokens_but_one_end() -> None:
    backend = words()
    backend.post_processor = processors.TemplateProcessing(single="<fill> $A", special_tokens=[("<fill>", 2)])
    tokenizer = Tokenizer(backend, eos_id=1)
    assert tokenizer.encode_prompts(["a b"]) == [[2, 3, 4]]
    assert tokenizer.encode_completions(["a b", ""]) == [[3, 4, 1], [1]]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "<stop>", "pad_token": "<fill>"}, "config": {"eos_token_id": 1}}, (5, 2)),
        ({"tokenizer_config": {"eos_token": {"content": "<stop>"}}, "config": {"pad_token_id": 2}}, (5, 2)),
        ({"special_tokens_map": {"eos_token": "<stop>", "pad_token": {"content": "<fill>"}}}, (5, 2)),
        ({"generation_config": {"eos_token_id": [5, 1]}, "config": {"eos_token_id": 1}}, (5, 5)),
        ({"config": {"eos_token_id": [1, 5], "pad_token_id": None}}, (1, 1)),
        # As transformers 5 does: what the tokenizer names is added to it.
        ({"tokenizer_config": {"eos_token": "<absent>"}, "config": {"eos_token_id": 5, "pad_token_id": 0}}, (6, 0)),
    ],
)
def test_the_end_and_the_padding_come_from_the_files_in_order(
    files: dict[str, Any], expected: tuple[int, int], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, **files))
    assert (tokenizer.eos_id, tokenizer.pad_id) == expected
    tokenizer.save(tmp_path / "alone")
    again = Tokenizer.load(tmp_path / "alone")
    assert (again.eos_id, again.pad_id) == expected
    again.save(tmp_path / "twice")
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


def test_markers_are_special_even_where_the_backend_does_not_say_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(words(), eos_id=1, pad_id=2)
    assert tokenizer.decode([[3, 4, 1, 2, 2], [1]]) == ["a b", ""]
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).decode([[3, 4, 1, 2, 2]]) == ["a b"]


def test_what_is_no_id_of_the_vocabulary_names_no_token(tmp_path: Path) -> None:
    """Files write -1 for none, and number a padding that another tokenizer had."""
    write(tmp_path, config={"eos_token_id": 1, "pad_token_id": -1}, generation_config={"eos_token_id": ["1", True, -1]})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 1, (1,))
    write(tmp_path, config={"eos_token_id": [99, 5], "pad_token_id": 6}, generation_config={})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (5, 5, (5,))
    write(tmp_path, config={"eos_token_id": 99})
    with pytest.raises(ModelError, match=r"eos_token must be in the vocabulary, ids 0 to 5, but received id 99"):
        Tokenizer.load(tmp_path)
    write(tmp_path, config={"eos_token_id": "1"})
    with pytest.raises(ModelError, match=r"must name its end-of-sequence token, but received .*, where no file does"):
        Tokenizer.load(tmp_path)


def test_a_directory_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must name its end-of-sequence token, but received .*, where no file does"):
        Tokenizer.load(write(tmp_path))


def test_broken_json_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must be JSON, but received one that cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("eos_id", "pad_id", "name"), [(6, 0, "eos_token"), (-1, 0, "eos_token"), (1, 9, "pad_token")])
def test_ids_outside_the_vocabulary_are_refused(eos_id: int, pad_id: int, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{name} must be in the vocabulary, ids 0 to 5, but received id -?\d. Add it first"
    ):
        Tokenizer(words(), eos_id=eos_id, pad_id=pad_id)
