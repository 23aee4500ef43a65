"""Text to token ids and back, by the tokenizer of a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import tokenizers
import xxhash

from fastpref.data.backends import SENTENCEPIECE, add_tokens, convert
from fastpref.data.files import check_manifest
from fastpref.method.errors import DataError, ModelError

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
"""Files of a checkpoint that a tokenizer reads or keeps, byte for byte."""


class Rendered(str):
    """A prompt as a chat template wrote it: it holds its special tokens already, and is encoded without adding any."""

    __slots__ = ()


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows its end-of-sequence and padding tokens.

    Prompts get the special tokens of the checkpoint's own post-processor; completions get none, and end with EOS.
    Nothing is padded or truncated here. Special tokens that a text names are text, unless it is `Rendered` or
    `special_text` says otherwise.

    Args:
      backend: the tokenizer; its padding and truncation are switched off.
      eos_id: ends every completion.
      pad_id: fills rows; `eos_id` if None. Lengths say what is real, so it needs no id of its own.
      files: contents by name of the files of `FILES` that it came from. None writes them from `backend`.
      special_text: read special tokens that a plain text names as the control tokens themselves.

    Raises:
      ModelError: an id lies outside the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int,
        pad_id: int | None = None,
        files: Mapping[str, bytes] | None = None,
        special_text: bool = False,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """One more than the highest id."""
        self.rows: int | None = None
        """Rows of the embedding that reads the tokens; a text with a token from here on is refused. None: no limit."""
        self.special_text = special_text
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        names = {}
        for key, value in (("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            token = backend.id_to_token(value) if 0 <= value < self.vocab_size else None
            if token is None:
                raise ModelError(
                    f"{key} must be in the vocabulary, ids 0 to {self.vocab_size - 1}, but received id {value}. Add "
                    f"it first."
                )
            names[key] = token
        # As Hugging Face does on loading: else text would keep the markers, and decoding would show them.
        backend.add_special_tokens(list(dict.fromkeys(names.values())))
        self.files = dict(files) if files is not None else {"tokenizer.json": backend.to_str(pretty=True).encode()}
        if special_ids(self.files, backend) != (self.eos_id, self.pad_id):
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **read_json(self.files, "tokenizer_config.json")}
            self.files["tokenizer_config.json"] = orjson.dumps(
                config | names, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
            )

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, with the special tokens that the post-processor adds; `Rendered` ones get none."""
        return self._encode(texts, add_special_tokens=True)

    def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        rendered = [text for text in texts if isinstance(text, Rendered)]
        plain = [text for text in texts if not isinstance(text, Rendered)]
        self.backend.encode_special_tokens = False
        bare = iter(self.backend.encode_batch_fast(rendered, add_special_tokens=False))
        self.backend.encode_special_tokens = not self.special_text
        full = iter(self.backend.encode_batch_fast(plain, add_special_tokens=add_special_tokens))
        ids = [next(bare if isinstance(text, Rendered) else full).ids for text in texts]
        return self._embedded(ids)

    def _embedded(self, rows: list[list[int]]) -> list[list[int]]:
        """The ids of texts, each of which has a row of the embedding."""
        limit = self.rows
        if limit is not None and limit < self.vocab_size:
            for number in (number for ids in rows for number in ids if number >= limit):
                raise DataError(
                    f"a text must have tokens below {limit}, the rows of the embedding, but received "
                    f"{self.backend.id_to_token(number)!r}, which is {number}. Take it out of the text, or give the "
                    "weights more rows with transformers: resize_token_embeddings."
                )
        return rows

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that differ for tokenizers that may encode differently: XXH3-128 of all that they encode by."""
        settings = f"{self.eos_id} {self.pad_id} {self.special_text}"
        return xxhash.xxh3_128_digest(self.backend.to_str().encode() + settings.encode())

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each completion, without special tokens, followed by EOS."""
        return [[*ids, self.eos_id] for ids in self._encode(texts, add_special_tokens=False)]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids; special tokens are dropped."""
        return self.backend.decode_batch([list(map(int, row)) for row in rows], skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into `directory`, which is made if needed."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (target / name).write_bytes(content)

    @staticmethod
    def load(directory: str | Path, *, special_text: bool = False) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face directory.

        EOS and padding are, in this order, those named in `tokenizer_config.json` or `special_tokens_map.json`, those
        numbered in `generation_config.json`, those numbered in `config.json`. Where a file lists several EOS ids, the
        first counts: completions are written with one. A missing padding token is the EOS. Tokens that only
        `tokenizer_config.json` has (`added_tokens_decoder`, a named EOS) are added, as transformers does.

        Where there is no `tokenizer.json`, the model of SentencePiece is converted, with the extra `sentencepiece`:
        `spiece.model` of a T5 or mT5, `tokenizer.model` of a Llama. Ids are those of transformers 5.

        Args:
          directory: holds `tokenizer.json`, `spiece.model` or `tokenizer.model`.
          special_text: see `Tokenizer`.

        Returns:
          The tokenizer; `save` writes the same files again, and `tokenizer.json` where it was converted.

        Raises:
          FileNotFoundError: there is no tokenizer.
          ModelError: a file cannot be read, the extra is missing, or no file says what EOS is.
        """
        source = Path(directory)
        if not any((source / name).is_file() for name in ("tokenizer.json", *SENTENCEPIECE)):
            raise FileNotFoundError(
                f"a checkpoint must hold tokenizer.json, but received {source} without (and without "
                f"{' or '.join(SENTENCEPIECE)}). Save its tokenizer in the fast format."
            )
        check_manifest(source, lambda name: name in FILES)
        files = {name: (source / name).read_bytes() for name in FILES if (source / name).is_file()}
        try:
            backend, files = read_backend(files)
            config = (
                {"config.json": (source / "config.json").read_bytes()} if (source / "config.json").is_file() else {}
            )
            eos_id, pad_id = special_ids(files | config, backend)
            if eos_id is None:
                raise ModelError(
                    f"a tokenizer must name its end-of-sequence token, but received {source}, where no file does. "
                    "Set eos_token in tokenizer_config.json or eos_token_id in config.json."
                )
            tokenizer = Tokenizer(backend, eos_id=eos_id, pad_id=pad_id, files=files, special_text=special_text)
            tokenizer.probe()
        except (ModelError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library panics with one, and raises no narrower type than Exception
            raise ModelError(
                f"{tokenizer_file(files)} must be a tokenizer, but received one in {source} that fails: "
                f"{type(error).__name__}: {error}. Copy it again."
            ) from error
        return tokenizer

    def probe(self) -> None:
        """Raise ModelError unless a text survives being encoded and decoded.

        A post-processor may add special tokens to a text; the text's own tokens must still be there.
        """
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=False).values())
        tokens = vocabulary[:: max(len(vocabulary) // 16, 1)][:16]
        text = self.backend.decode(tokens, skip_special_tokens=True)
        ((bare,), (whole,)) = self._encode([Rendered(text)], add_special_tokens=False), self.encode_prompts([text])
        at = range(len(whole) - len(bare) + 1)
        if not bare or not any(whole[start : start + len(bare)] == bare for start in at):
            raise ModelError(
                "a tokenizer's post-processor must keep the text's own tokens, but received one that makes "
                f"{text!r} the ids {whole}. Mend post_processor in tokenizer.json."
            )
        self.decode([whole])


def tokenizer_file(files: Mapping[str, bytes]) -> str:
    """The name of the file that a tokenizer is read from."""
    return next(name for name in ("tokenizer.json", *SENTENCEPIECE) if name in files)


def read_backend(files: Mapping[str, bytes]) -> tuple[tokenizers.Tokenizer, dict[str, bytes]]:
    """The tokenizer that files hold, with the tokens that they add to it; and the files with `tokenizer.json`."""
    name, kept = tokenizer_file(files), dict(files)
    config = read_json(files, "tokenizer_config.json")
    settings, numbered = read_json(files, "special_tokens_map.json") | config, read_json(files, "added_tokens.json")
    if name == "tokenizer.json":
        backend = tokenizers.Tokenizer.from_str(files[name].decode())
        add_tokens(backend, settings, numbered)
        return backend, kept
    backend, defaults = convert(files[name], name, settings, numbered)
    kept["tokenizer.json"] = backend.to_str(pretty=True).encode()
    if defaults:
        kept["tokenizer_config.json"] = orjson.dumps(
            defaults | config, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
        )
    return backend, kept


def special_ids(files: Mapping[str, bytes], backend: tokenizers.Tokenizer) -> tuple[int | None, int | None]:
    """Ids of EOS and padding by the files given; the padding is the EOS where they name none."""
    named = read_json(files, "special_tokens_map.json") | read_json(files, "tokenizer_config.json")
    found = []
    for key in ("eos_token", "pad_token"):
        token = named.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        ids = [backend.token_to_id(text) if isinstance(text, str) else None]
        for file in ("generation_config.json", "config.json"):
            numbers = read_json(files, file).get(f"{key}_id")
            ids += numbers if isinstance(numbers, list) else [numbers]
        found.append(next((number for number in ids if number is not None), None))
    return found[0], found[0] if found[1] is None else found[1]


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
