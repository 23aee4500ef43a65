"""Tokenizers of each kind that people have, small: byte-level, SentencePiece with its three prefix blanks, unigram."""

from pathlib import Path
from typing import Any

import orjson
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = "abcdefghijklmnopqrstuvwxyzABP?.:,<>|/_0123456789\n"


def _bpe(alphabet: list[str], merges: list[tuple[str, str]], **more: Any) -> models.BPE:
    tokens = [*alphabet, *(a + b for a, b in merges)]
    return models.BPE({token: index for index, token in enumerate(tokens)}, merges, **more)


def byte_level(*special: str) -> tokenizers.Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(_bpe(letters, [("Ġ", "y"), ("e", "s"), ("Ġy", "es"), ("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special or MARKS))
    return backend


def sentencepiece(blank: str) -> tokenizers.Tokenizer:
    """Llama-2's kind; `blank` says who puts it before a text: "normalizer", "first" or "always"."""
    alphabet = ["<unk>", "<s>", "</s>", "▁", *LETTERS]
    merges = [("P", "a"), ("▁", "Pa"), ("r", "i"), ("▁", "i"), ("▁i", "s"), ("i", "s"), ("a", "b")]
    backend = tokenizers.Tokenizer(_bpe(alphabet, merges, unk_token="<unk>", fuse_unk=True))
    if blank == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=blank, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram() -> tokenizers.Tokenizer:
    """T5's kind, which ends what it reads with </s>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0), *((letter, -4.0) for letter in LETTERS)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def directory(path: Path, backend: tokenizers.Tokenizer, settings: dict[str, Any], /, **files: Any) -> Path:
    """Write a tokenizer's directory; `files` are further ones, of JSON, by their names without the ending."""
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    for name, content in ({"tokenizer_config": settings} | files).items():
        (path / f"{name}.json").write_bytes(orjson.dumps(content))
    return path
