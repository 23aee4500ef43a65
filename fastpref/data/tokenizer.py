"""Text to token ids and back, by the tokenizer of a checkpoint."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

import orjson
import tokenizers
import xxhash

from fastpref.data.backends import SENTENCEPIECE, read_backend, tokenizer_file
from fastpref.data.chat import ChatTemplate
from fastpref.data.controls import Controls
from fastpref.data.files import check_manifest
from fastpref.data.rendered import Rendered, Span, Unfinished, alike, is_finished, unended
from fastpref.data.token_files import (
    APART,
    FILES,
    FOLDER,
    content_of,
    is_encoder_decoder,
    listed_ids,
    read_json,
    special_ids,
    templates_of,
    to_json,
)
from fastpref.method.errors import DataError, ModelError

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's blank."""


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows which tokens end a completion, and its chat template.

    Prompts get the special tokens of the checkpoint's own post-processor, a decoder's no EOS; completions get none, and
    end with EOS. A prompt and its completions are cut out of the tokens of the whole text. Nothing is padded or
    truncated here. Special tokens that a text names are text, unless a template wrote them (the text is `Rendered`, or
    is recognised as what the template of `files` writes) or `special_text` says otherwise.

    Args:
      backend: the tokenizer; its padding and truncation are switched off.
      eos_id: ends a completion of plain text.
      pad_id: fills rows; `eos_id` if None. Lengths say what is real, so it needs no id of its own.
      files: contents by name of the files of `FILES` that it came from. None writes them from `backend`.
      special_text: read special tokens that a plain text or a message names as the control tokens themselves.
      stop_ids: tokens that end a completion besides `eos_id` and those that `files` list.
      encoder_decoder: whether an encoder reads prompts apart from completions. None where nobody knows: it does where
        texts end with EOS and begin with nothing, as T5's do, and the tokens are no merges, as decoders' are.

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
        stop_ids: Sequence[int] = (),
        encoder_decoder: bool | None = None,
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
        listed = [*stop_ids, *listed_ids(files or {})]
        known = dict.fromkeys([eos_id, *(number for number in listed if backend.id_to_token(number) is not None)])
        self.stop_ids: tuple[int, ...] = tuple(known)
        """Tokens that end a completion, `eos_id` first."""
        self._ends = {str(backend.id_to_token(number)): number for number in self.stop_ids}
        # As Hugging Face does on loading: else text would keep the markers, and decoding would show them.
        backend.add_special_tokens(list(dict.fromkeys([*names.values(), *self._ends])))
        self.files = dict(files) if files is not None else {"tokenizer.json": backend.to_str(pretty=True).encode()}
        if files is None and len(self.stop_ids) > 1:
            self.files["generation_config.json"] = to_json({"eos_token_id": list(self.stop_ids)})
        if special_ids(self.files, backend) != (self.eos_id, self.pad_id):
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **read_json(self.files, "tokenizer_config.json")}
            self.files["tokenizer_config.json"] = to_json(config | names)
        self._encoder_decoder = encoder_decoder
        self._found: dict[bool, ChatTemplate | None] = {}

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template of the directory, or None."""
        if self.special_text not in self._found:
            config = read_json(self.files, "special_tokens_map.json")
            config |= read_json(self.files, "tokenizer_config.json")
            # Some checkpoints number their end of sequence and do not name it.
            tokens = {"eos_token": self.backend.id_to_token(self.eos_id) or ""}
            for name, value in config.items():
                if name.endswith("_token") and (content := content_of(value)) is not None:
                    tokens[name] = content
            named = templates_of(self.files, config)
            self._found[self.special_text] = None
            if named:
                self._found[self.special_text] = ChatTemplate(
                    named.get("default"),
                    tokens,
                    named={name: text for name, text in named.items() if name != "default"},
                    special=() if self.special_text else self._controls.ids,
                    ends=tuple(self._ends),
                )
        return self._found[self.special_text]

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads prompts, apart from their completions."""
        if self._encoder_decoder is None:
            begin, end = self._affixes
            return not begin and self.eos_id in end and not isinstance(self.backend.model, tokenizers.models.BPE)
        return self._encoder_decoder

    def apart(self) -> "Tokenizer":
        """The tokenizer of an encoder-decoder model."""
        made = copy(self)
        made._encoder_decoder = True
        return made

    @cached_property
    def turn_end_id(self) -> int:
        """The token that ends the answer in a conversation: the one of `stop_ids` that the template closes it with."""
        frame = None if self.template is None else self.template.frame
        return self.eos_id if frame is None else self._ends.get(frame.closing, self.eos_id)

    @cached_property
    def _controls(self) -> Controls:
        return Controls(self.backend, self._ends)

    @cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and behind a text."""
        whole = self.backend.encode(self._sample, add_special_tokens=True)
        mask = whole.special_tokens_mask
        begin = next((at for at, added in enumerate(mask) if not added), len(mask))
        end = next((at for at, added in enumerate(mask[begin:][::-1]) if not added), 0)
        return whole.ids[:begin], whole.ids[len(mask) - end :]

    @property
    def affixes(self) -> tuple[int, int]:
        """Tokens that a plain prompt begins and ends with whatever its text is: they stay where it is cut."""
        begin, end = self._affixes
        return len(begin), len(end) if self.encoder_decoder or not self._closes else 0

    @property
    def _closes(self) -> bool:
        """Whether the post-processor ends texts as completions are ended."""
        return bool({*self.stop_ids} & {*self._affixes[1]})

    @cached_property
    def _bos(self) -> str:
        """The token that begins every text, or ""."""
        config = read_json(self.files, "special_tokens_map.json") | read_json(self.files, "tokenizer_config.json")
        named = content_of(config.get("bos_token"))
        if named is None and (begin := self._affixes[0]):
            named = self.backend.id_to_token(begin[0])
        return "" if named is None or named in self._ends or named not in self._controls.ids else named

    def recognised(self, text: str) -> str:
        """A text that a template wrote as `Rendered`, also where it came back from a file; any other as it is.

        A text is what a template wrote where it begins as the tokenizer's template begins conversations and opens an
        answer as that does; or where it begins with BOS, which it then does once, and no template says otherwise.

        Raises:
          DataError: it begins with BOS, or as the template's texts do with a special token, and goes on otherwise.
        """
        if isinstance(text, Rendered):
            return text
        begun = bool(self._bos) and text.startswith(self._bos)
        while begun and text.startswith(self._bos, len(self._bos)):
            text = text.removeprefix(self._bos)
        frame = None if self.template is None else self.template.frame
        if frame is not None and text.startswith(frame.openings) and frame.wrote(text, self._controls.places(text)):
            return Rendered(text)
        if begun and frame is not None and not self.special_text and len(self._controls.places(text)) > 1:
            raise DataError(
                f"a prompt that begins with {self._bos!r} must be what the chat template writes, or name no other "
                f"special token, but received {text!r:.60}. Give its messages, or take the token out."
            )
        return Rendered(text) if begun else text

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, with the special tokens that the post-processor adds; `Rendered` ones get none.

        A decoder's prompt does not end with EOS, and none begins with BOS twice.

        Raises:
          DataError: as `recognised` does.
        """
        known = [self.recognised(text) for text in texts]
        kept = self.affixes[1] > 0
        if kept and self._closes:
            known = [text if isinstance(text, Rendered) else unended(text, self._ends)[0] for text in known]
        return [self._tidy(text, ids, kept) for text, ids in zip(known, self._encode(known, True), strict=True)]

    def _tidy(self, text: str, ids: list[int], kept: bool) -> list[int]:
        """Tokens of a text, without what the post-processor puts behind it unless that is kept."""
        end = 0 if isinstance(text, Rendered) or kept else len(self._affixes[1])
        return ids[:-end] if end else ids

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; a `Rendered` one gets no special tokens."""
        written = [text for text in texts if isinstance(text, Rendered)]
        plain = [text for text in texts if not isinstance(text, Rendered)]
        clean = [text for text in written if self.special_text or not text.literals]
        encode = self._controls.encode
        mixed = (self._controls.encode_mixed(text, text.literals) for text in written if text.literals)
        bare = iter(encode(clean, as_text=False, add_special_tokens=False))
        full = iter(encode(plain, as_text=not self.special_text, add_special_tokens=add_special_tokens))
        rows = []
        for text in texts:
            lettered = isinstance(text, Rendered) and bool(text.literals) and not self.special_text
            rows.append(next(mixed if lettered else bare if isinstance(text, Rendered) else full))
        return self._embedded(rows)

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

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each completion alone, without special tokens, followed by EOS, also where it holds that.

        One that was cut off, `Unfinished` say, has no EOS behind it.
        """
        closed = [self._closed(text, self.eos_id) for text in texts]
        bodies = self._encode([body for body, _ in closed], False)
        tidy = [self._tidy(text, ids, True) for text, ids in zip(texts, bodies, strict=True)]
        ended = zip(texts, tidy, closed, strict=True)
        return [[*ids, end] if is_finished(text) else ids for text, ids, (_, end) in ended]

    def _closed(self, text: str, otherwise: int) -> tuple[str, int]:
        """A completion without the token that ends it, and that token."""
        body, end = unended(text, self._ends)
        if isinstance(text, Rendered):
            return Rendered(body, literals=text.literals), self._ends.get(text.end or end, otherwise)
        return body, self._ends.get(end, otherwise)

    def encode_records(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each prompt and of its completions, one after the other, cut out of those of the whole texts.

        Where a token of the whole crosses the seam, the prompt ends before it. A completion ends with EOS: the token
        that its text ends with, or the one that ends answers of the template that wrote the prompt, or `eos_id`. An
        encoder reads a prompt alone, and so is it encoded.

        Args:
          prompts: N texts.
          completions: K texts for each.

        Raises:
          DataError: as `recognised` does.
        """
        known = [self.recognised(text) for text in prompts]
        heads = self.encode_prompts(known)
        closed = [
            [self._closed(text, self.turn_end_id if isinstance(prompt, Rendered) else self.eos_id) for text in row]
            for prompt, row in zip(known, completions, strict=True)
        ]
        apart = self.encoder_decoder
        wholes = [
            body if apart else self.joined(prompt, body)
            for prompt, row in zip(known, closed, strict=True)
            for body, _ in row
        ]
        encoded = iter(
            self._tidy(text, ids, apart) for text, ids in zip(wholes, self._encode(wholes, not apart), strict=True)
        )
        records = []
        for head, row in zip(heads, closed, strict=True):
            tails = [next(encoded) for _ in row]
            cut = 0 if apart else min([len(head), *(alike(head, tail) for tail in tails)])
            if not apart and row and not cut:
                # One token from the text's start across the seam: nothing would be left of the prompt.
                tails = self._encode([body for body, _ in row], False)
            pairs = zip(tails, row, strict=True)
            records.append([head[: cut or None], *([*tail[cut:], end] for tail, (_, end) in pairs)])
        return records

    def joined(self, prompt: str, body: str) -> str:
        """Prompt and completion as one text, special tokens of a plain completion as letters.

        `encode_completions` ends it as `encode_records` ends the completion.
        """
        prompt, finished = self.recognised(prompt), is_finished(body)
        if not isinstance(prompt, Rendered):
            return str(prompt) + str(body) if finished else Unfinished(str(prompt) + str(body))
        closing = body.end if isinstance(body, Rendered) else ""
        literals: Sequence[Span] = ()
        if not self.special_text:
            literals = body.literals if isinstance(body, Rendered) else self._controls.places(body)
        moved = [(start + len(prompt), end + len(prompt)) for start, end in literals]
        end = closing or str(self.backend.id_to_token(self.turn_end_id))
        return Rendered(str(prompt) + str(body), literals=[*prompt.literals, *moved], end=end, finished=finished)

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that differ for tokenizers that may encode differently: XXH3-128 of all that they encode by."""
        template = None if self.template is None else self.template.identity
        settings = [self.stop_ids, self.pad_id, self.special_text, self.encoder_decoder, self._bos, template]
        return xxhash.xxh3_128_digest(self.backend.to_str().encode() + orjson.dumps(settings))

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids; special tokens are dropped."""
        return self.backend.decode_batch([list(map(int, row)) for row in rows], skip_special_tokens=True)

    def decode_completions(self, rows: Sequence[Sequence[int]], prompts: Sequence[str]) -> list[str]:
        """Text of each completion, special tokens dropped: of a message its content, of a text what follows the prompt.

        SentencePiece has no blank before a text; what follows another keeps the one that it begins with.
        """
        texts = self.decode(rows)
        if self.encoder_decoder:
            return texts
        for at, (ids, prompt) in enumerate(zip(rows, prompts, strict=True)):
            answers = isinstance(prompt, Rendered) and prompt.conversation is not None
            first = "" if answers or not len(ids) else str(self.backend.id_to_token(int(ids[0])))
            if first.startswith(BLANK) and not texts[at].startswith(" "):
                texts[at] = f" {texts[at]}"
        return texts

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into `directory`, which is made if needed."""
        files = dict(self.files)
        if self._encoder_decoder is None and self.encoder_decoder:
            # Read again beside a model, prompts are encoded as they are now.
            files["tokenizer_config.json"] = to_json(read_json(files, "tokenizer_config.json") | {APART: True})
        for name, content in files.items():
            target = Path(directory) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    @staticmethod
    def load(directory: str | Path, *, special_text: bool = False) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face directory.

        EOS and padding are, in this order, those named in `tokenizer_config.json` or `special_tokens_map.json`, those
        numbered in `generation_config.json`, those numbered in `config.json`, of several the first. Sampling ends at
        each EOS that any of them lists. A missing padding token is the EOS. Tokens that only `tokenizer_config.json`
        has (`added_tokens_decoder`, a named EOS) are added, as transformers does.

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
        check_manifest(source, lambda name: name in FILES or name.startswith(FOLDER))
        names = [*FILES, *(f"{FOLDER}{path.name}" for path in sorted((source / FOLDER).glob("*.jinja")))]
        files = {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
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
            tokenizer = Tokenizer(
                backend,
                eos_id=eos_id,
                pad_id=pad_id,
                files=files,
                special_text=special_text,
                stop_ids=listed_ids(config),
                encoder_decoder=is_encoder_decoder(files | config),
            )
            tokenizer.probe()
        except (ModelError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library panics with one, and raises no narrower type than Exception
            raise ModelError(
                f"{tokenizer_file(files)} must be a tokenizer, but received one in {source} that fails: "
                f"{type(error).__name__}: {error}. Copy it again."
            ) from error
        return tokenizer

    @property
    def _sample(self) -> str:
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=False).values())
        tokens = vocabulary[:: max(len(vocabulary) // 16, 1)][:16]
        return self.backend.decode(tokens, skip_special_tokens=True)

    def probe(self) -> None:
        """Raise ModelError unless a text survives being encoded and decoded.

        A post-processor may add special tokens to a text; the text's own tokens must still be there.
        """
        text = self._sample
        ((bare,), (whole,)) = self._encode([Rendered(text)], False), self._encode([text], True)
        at = range(len(whole) - len(bare) + 1)
        if not bare or not any(whole[start : start + len(bare)] == bare for start in at):
            raise ModelError(
                "a tokenizer's post-processor must keep the text's own tokens, but received one that makes "
                f"{text!r} the ids {whole}. Mend post_processor in tokenizer.json."
            )
        self.decode([whole])
