"""Language models small enough for every test, with a tokenizer of whole words."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers, processors

from fastpref.data.tokenizer import Tokenizer
from fastpref.models import T5, Decoder, DecoderConfig, LanguageModel, T5Config

WORDS = ["<pad>", "</s>", "<unk>", "1", "2", *(f"w{number}" for number in range(28))]
PROMPTS = [" ".join(f"w{(start * step) % 28}" for step in range(1, 3 + start % 5)) for start in range(1, 25)]


@functools.cache
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return Tokenizer(backend, eos_id=1, pad_id=0)


def language_model(family: str = "decoder", seed: int = 0) -> LanguageModel:
    """A T5 or a decoder with a vocabulary of 33 words; its head has three rows more."""
    # One for each, however it is called for: another one, compiled otherwise, may differ in the last bit. Its weights
    # are concrete even where the first call is made while something is traced.
    with jax.ensure_compile_time_eval():
        return _language_model(family, seed)


@functools.cache
def _language_model(family: str, seed: int) -> LanguageModel:
    rngs = nnx.Rngs(seed)
    module: Any
    if family == "t5":
        module = T5(
            T5Config(
                vocab_size=36, width=16, hidden=24, encoder_layers=1, decoder_layers=2, heads=2, head_dim=8, tied=True
            ),
            rngs=rngs,
        )
    else:
        module = Decoder(
            DecoderConfig(vocab_size=36, width=16, hidden=24, layers=2, heads=4, kv_heads=2, head_dim=8), rngs=rngs
        )
    return LanguageModel(module, tokenizer())


def prefers_w1(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that likes the word w1."""
    difference = [a.split().count("w1") - b.split().count("w1") for a, b in zip(first, second, strict=True)]
    return [0.5 + 0.5 * max(-1, min(1, count)) for count in difference]
