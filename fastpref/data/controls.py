"""Special tokens of a tokenizer: control tokens where a template wrote them, letters where a user did."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import tokenizers

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
        self._backend.encode_special_tokens = as_text
        return [
            found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        ]

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
        taken, pieces, at = set(literals), [], 0
        for start, end in self.places(text):
            if not any(low < end and start < high for low, high in taken):
                pieces += [text[at:start], _ALIAS.format(self.ids[text[start:end]])]
                at = end
        backend, ids = self._aliased
        found = backend.encode_batch_fast(["".join([*pieces, text[at:]])], add_special_tokens=False)[0].ids
        return [ids.get(number, number) for number in found]

    @cached_property
    def _aliased(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The tokenizer with a second name for each control token, by which alone it is found; and their ids."""
        written = self._backend.to_str()
        backend = tokenizers.Tokenizer.from_str(written)
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens(list(self.ids))
        sides = {token["content"]: token for token in json.loads(written)["added_tokens"]}
        aliases = {
            _ALIAS.format(number): tokenizers.AddedToken(
                _ALIAS.format(number),
                lstrip=text in sides and sides[text]["lstrip"],
                rstrip=text in sides and sides[text]["rstrip"],
                normalized=False,
            )
            for text, number in self.ids.items()
        }
        # Added tokens that are not special are found even where special ones are text.
        backend.add_tokens(list(aliases.values()))
        backend.encode_special_tokens = True
        ids = {_ALIAS.format(number): number for number in self.ids.values()}
        return backend, {backend.token_to_id(alias): number for alias, number in ids.items()}
