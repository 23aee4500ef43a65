"""Entries of the files of a tokenizer's directory: the tokens that end and fill texts, and who reads prompts."""

from collections.abc import Mapping
from typing import Any

import orjson
import tokenizers

from fastpref.method.errors import ChatError, ModelError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files of a checkpoint that a tokenizer reads or keeps, byte for byte, besides the templates in `FOLDER`."""

FOLDER = "additional_chat_templates/"
"""Where a checkpoint keeps templates beside the default one, each in a file of its name."""

APART = "prompts_apart"
"""Key of `tokenizer_config.json`, written where no `config.json` could tell that prompts are encoded apart."""

ENCODER_DECODERS = ("t5", "mt5", "umt5")
"""Values of `model_type` of models whose prompts an encoder reads, where `is_encoder_decoder` is left out."""


def listed_ids(files: Mapping[str, bytes]) -> list[int]:
    """Every EOS id that `generation_config.json` and `config.json` list."""
    found: list[int] = []
    for file in ("generation_config.json", "config.json"):
        content = read_json(files, file)
        nested = content.get("text_config")
        for entries in (content, nested if isinstance(nested, dict) else {}):
            found += ids_of(entries.get("eos_token_id"))
    return found


def ids_of(entry: object) -> list[int]:
    """The ids that an entry holds, one or a list; some files write -1 for none."""
    numbers = entry if isinstance(entry, list) else [entry]
    return [number for number in numbers if isinstance(number, int) and not isinstance(number, bool) and number >= 0]


def is_encoder_decoder(files: Mapping[str, bytes]) -> bool | None:
    """Whether the model of a directory reads prompts with an encoder; None where no file says it."""
    if APART in (written := read_json(files, "tokenizer_config.json")):
        return bool(written[APART])
    if "config.json" not in files:
        return None
    config = read_json(files, "config.json")
    return bool(config.get("is_encoder_decoder", config.get("model_type") in ENCODER_DECODERS))


def content_of(token: object) -> str | None:
    """The text of a special token, as files name it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def to_json(content: Mapping[str, Any]) -> bytes:
    """JSON as these files are written here."""
    return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def special_ids(files: Mapping[str, bytes], backend: tokenizers.Tokenizer) -> tuple[int | None, int | None]:
    """Ids of EOS and padding by the files given; the padding is the EOS where they name none of the vocabulary."""
    named = read_json(files, "special_tokens_map.json") | read_json(files, "tokenizer_config.json")
    found = []
    for key in ("eos_token", "pad_token"):
        text = content_of(named.get(key))
        ids = ids_of(None if text is None else backend.token_to_id(text))
        for file in ("generation_config.json", "config.json"):
            ids += ids_of(read_json(files, file).get(f"{key}_id"))
        known = [number for number in ids if backend.id_to_token(number) is not None]
        found.append(known or ids)
    eos, pad = (next(iter(ids), None) for ids in found)
    return eos, eos if pad is None or backend.id_to_token(pad) is None else pad


def templates_of(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a directory by name, the default one as "default": its files, else its configuration's.

    Args:
      files: contents by name.
      config: what `tokenizer_config.json` holds.

    Raises:
      ChatError: a template is no text.
    """
    found: dict[str, str] = {}
    for name in sorted(files):
        if name == "chat_template.jinja" or name.startswith(FOLDER):
            known = "default" if "/" not in name else name.removeprefix(FOLDER).removesuffix(".jinja")
            try:
                found[known] = files[name].decode()
            except UnicodeDecodeError as error:
                raise ChatError(f"{name} must be UTF-8, but received {error.reason}. Copy it again.") from error
    written = config.get("chat_template")
    if found or written is None:
        return found
    named = {"default": written} if isinstance(written, str) else written
    if isinstance(named, list) and all(isinstance(item, dict) for item in named):
        named = {item.get("name"): item.get("template") for item in named}
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in (*named, *named.values())):
        raise ChatError(
            f"chat_template of tokenizer_config.json must be a text, or texts by name, but received {written!r:.80}. "
            "Copy the file again."
        )
    return named


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a file of JSON, or an empty one if there is no such file."""
    try:
        content = orjson.loads(files.get(name, b"{}"))
    except orjson.JSONDecodeError as error:
        raise ModelError(
            f"{name} must be JSON, but received one that cannot be read ({error}). Copy it again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{name} must be a JSON object, but received {type(content).__name__}. Copy it again.")
    return content
