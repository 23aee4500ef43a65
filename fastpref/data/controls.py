"""Special tokens of a tokenizer: control tokens where a template wrote them, letters where a user did."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import tokenizers
from tokenizers import models

from fastpref.data.rendered import Span
from fastpref.method.errors import ChatError

_ALIAS = "\ufdd4{}\ufdd5"
"""Stands for a control token in a text where the same letters are also text."""


class Controls:
    """Encodes texts whose special tokens are control tokens, letters, or both in one text.

    Args:
      backend: the tokenizer; what it holds when this is made is what is encoded by.
      further: ids of tokens that are special though they are not added as such, by text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, further: Mapping[str, int]) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        named = {str(token.content): number for number, token in added.items() if token.special}
        self.ids: dict[str, int] = named | dict(further)
        """Of the special tokens, by text."""
        longest = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")

    def places(self, text: str) -> list[Span]:
        """Where a text holds special tokens."""
        return [match.span() for match in self._pattern.finditer(text)]

    def encode(self, texts: Sequence[str], *, as_text: bool, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of texts, their special tokens all letters (`as_text`) or all control tokens."""
        # A model that takes pieces whole, as T5's does, would find the special ones among them.
        whole = as_text and not isinstance(self._backend.model, models.BPE) and any(map(self.places, texts))
        backend = self._renamed[0] if whole else self._backend
        backend.encode_special_tokens = as_text and not whole
        try:
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        finally:
            # As others who hold the backend expect.
            backend.encode_special_tokens = False
        return [found.ids for found in encoded]

    def encode_mixed(self, text: str, literals: Sequence[Span]) -> list[int]:
        """Token ids of a text whose special tokens are letters at `literals`, and control tokens elsewhere.

        Raises:
          ChatError: the text holds characters by which control tokens are kept apart here.
        """
        if any(character in text for character in _ALIAS.split("{}")):
            raise ChatError(
                "a text that names special tokens must not hold the noncharacters U+FDD4 and U+FDD5, but received one "
                "that does. Take them out."
            )
        backend, names = self._renamed
        pieces, at = [], 0
        for start, end in self.places(text):
            if text[start:end] in names and not any(low < end and start < high for low, high in literals):
                pieces += [text[at:start], names[text[start:end]]]
                at = end
        renamed = "".join([*pieces, text[at:]])
        ids: list[int] = backend.encode_batch_fast([renamed], add_special_tokens=False)[0].ids
        return ids

    @cached_property
    def _renamed(self) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
        """The tokenizer with other names for its special tokens, so that no letters are taken for one; and these."""
        described = json.loads(self._backend.to_str())
        model = described["model"]
        merged = {
            "".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", ())
        }
        # What letters are merged to is no special token, though a file may number it as one.
        names = {text: _ALIAS.format(number) for text, number in self.ids.items() if text not in merged}
        for token in described["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return tokenizers.Tokenizer.from_str(json.dumps(described)), names
