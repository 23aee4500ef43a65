"""Directories with only SentencePiece's files, and tokens that only other files have: ids are those of transformers."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from fastpref.data.tokenizer import Tokenizer
from fastpref.method.errors import ModelError

HERE = Path(__file__).parent / "sentencepiece"
CASES: dict[str, dict[str, Any]] = json.loads((HERE / "ids.json").read_text())["cases"]


def directory(path: Path, case: dict[str, Any]) -> Path:
    (path / case["file"]).write_bytes((HERE / case["model"]).read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps(case["tokenizer_config"]))
    (path / "config.json").write_text(json.dumps(case["config"]))
    return path


@pytest.mark.parametrize("name", sorted(CASES))
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    case = CASES[name]
    tokenizer = Tokenizer.load(directory(tmp_path, case))
    assert tokenizer.eos_id == case["eos"]
    tokenizer.backend.encode_special_tokens = False
    for (text, whole, bare), decoded in zip(case["ids"], case["decoded"], strict=True):
        assert tokenizer.backend.encode(text).ids == whole, text
        assert tokenizer.backend.encode(text, add_special_tokens=False).ids == bare, text
        assert tokenizer.backend.decode(whole) == decoded, text


@pytest.mark.parametrize("name", ["t5", "llama chat"])
def test_what_was_converted_is_saved_in_the_fast_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "slow").mkdir()
    first = Tokenizer.load(directory(tmp_path / "slow", CASES[name]))
    first.save(tmp_path / "fast")
    shutil.copy(tmp_path / "slow" / "config.json", tmp_path / "fast")
    for module in ("sentencepiece", "sentencepiece.sentencepiece_model_pb2"):
        monkeypatch.setitem(sys.modules, module, None)
    second = Tokenizer.load(tmp_path / "fast")
    texts = [text for text, _, _ in CASES[name]["ids"]]
    assert first.encode_completions(texts) == second.encode_completions(texts)
    assert (first.eos_id, first.pad_id, first.vocab_size) == (second.eos_id, second.pad_id, second.vocab_size)
    assert second.files == first.files


def test_a_missing_extra_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sentencepiece", "sentencepiece.sentencepiece_model_pb2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ModelError, match=r"spiece.model must be read with .*Do pip install 'fastpref\[sentencepiece\]'"
    ):
        Tokenizer.load(directory(tmp_path, CASES["t5"]))


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    directory(tmp_path, CASES["llama"])
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match=r"tokenizer.model must be a .*model"):
        Tokenizer.load(tmp_path)


# Tokens that only other files have ----------------------------------------------------------------------------------


def entry(content: str, **flags: bool) -> dict[str, Any]:
    known = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **known, **flags}


def written(path: Path, **files: Any) -> Path:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_bytes(orjson.dumps(content))
    return path


def test_an_end_that_only_the_decoder_of_added_tokens_has_is_added(tmp_path: Path) -> None:
    config = {"eos_token": "<turn>", "added_tokens_decoder": {"4": entry("<x>"), "5": entry("<turn>")}}
    tokenizer = Tokenizer.load(written(tmp_path, tokenizer_config=config, generation_config={"eos_token_id": 1}))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (5, 6)
    assert tokenizer.encode_completions(["a b"]) == [[2, 3, 5]]
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").eos_id == 5


def test_a_named_end_that_no_file_numbers_follows_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(
        written(tmp_path, tokenizer_config={"eos_token": "<turn>"}, generation_config={"eos_token_id": 1})
    )
    assert tokenizer.eos_id == 4


def test_added_tokens_of_the_older_file_are_added(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(
        written(tmp_path, tokenizer_config={"eos_token": "<t>"}, added_tokens={"c": 4, "<t>": 5})
    )
    assert tokenizer.eos_id == 5
    assert tokenizer.encode_prompts(["a c <t>"]) == [[2, 4, 0]]


def test_an_added_token_with_another_number_is_refused(tmp_path: Path) -> None:
    config = {"eos_token": "<turn>", "added_tokens_decoder": {"9": entry("<turn>")}}
    with pytest.raises(ModelError, match=r"id that follows the vocabulary, 4, but received 9 for '<turn>'"):
        Tokenizer.load(written(tmp_path, tokenizer_config=config))
    with pytest.raises(ModelError, match=r"added tokens must be ids and texts with flags, but received files"):
        Tokenizer.load(written(tmp_path, tokenizer_config={"added_tokens_decoder": {"4": {"text": "<turn>"}}}))
