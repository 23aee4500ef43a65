"""The tokens that a tokenizer's files add to it, and models of SentencePiece as fast tokenizers."""

import importlib
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastpref.data.token_files import content_of, read_json, to_json
from fastpref.method.errors import ModelError

SENTENCEPIECE = ("spiece.model", "tokenizer.model")
"""Files that hold a model of SentencePiece: T5's and Llama's."""

BLANK = "▁"
"""SentencePiece's blank."""

UNIGRAM, BPE = 1, 2
"""Kinds of models in `TrainerSpec.ModelType`."""
CONTROL, USER_DEFINED = 3, 4
"""Kinds of pieces in `ModelProto.SentencePiece.Type`."""

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTED = ("extra_special_tokens", "additional_special_tokens")
"""Entries of `tokenizer_config.json` that name special tokens."""

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
"""Entries of a token of `added_tokens_decoder` beside its text."""

DEFAULTS = {
    UNIGRAM: {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    BPE: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
"""Special tokens of T5 and Llama, where `tokenizer_config.json` names none."""


def tokenizer_file(files: Mapping[str, bytes]) -> str:
    """The name of the file that a tokenizer is read from."""
    return next(name for name in ("tokenizer.json", *SENTENCEPIECE) if name in files)


def read_backend(files: Mapping[str, bytes]) -> tuple[Tokenizer, dict[str, bytes]]:
    """The tokenizer that files hold, with the tokens that they add to it; and the files with `tokenizer.json`."""
    name, kept = tokenizer_file(files), dict(files)
    config = read_json(files, "tokenizer_config.json")
    settings, numbered = read_json(files, "special_tokens_map.json") | config, read_json(files, "added_tokens.json")
    if name == "tokenizer.json":
        backend = Tokenizer.from_str(files[name].decode())
        add_tokens(backend, settings, numbered)
        return backend, kept
    backend, defaults = convert(files[name], name, settings, numbered)
    kept["tokenizer.json"] = backend.to_str(pretty=True).encode()
    if defaults:
        kept["tokenizer_config.json"] = to_json(defaults | config)
    return backend, kept


def convert(
    content: bytes, name: str, settings: Mapping[str, Any], numbered: Mapping[str, Any]
) -> tuple[Tokenizer, dict[str, Any]]:
    """A SentencePiece model as a fast tokenizer, as `T5Tokenizer` and `LlamaTokenizer` of transformers 5 read it.

    Args:
      content: of `spiece.model` or `tokenizer.model`.
      name: of the file.
      settings: of `tokenizer_config.json`: special tokens, `extra_ids`, `legacy`, `add_bos_token`, `add_eos_token`,
        `add_prefix_space`.
      numbered: see `add_tokens`.

    Returns:
      The tokenizer with its added tokens, and the special tokens that `settings` leave out.

    Raises:
      ModelError: the extra is not installed, the file is no such model, or the model is neither unigram nor BPE.
    """
    try:
        proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    except ImportError as error:
        raise ModelError(
            f"{name} must be read with the packages sentencepiece and protobuf, but received an install without "
            f"{error.name}. Do pip install 'fastpref[sentencepiece]', or save the tokenizer in the fast format."
        ) from error
    try:
        proto.ParseFromString(content)
    except Exception as error:  # DecodeError, of a package that may be another's
        raise ModelError(
            f"{name} must be a model of SentencePiece, but received one that cannot be read ({error}). Copy it again, "
            "or save the tokenizer in the fast format (tokenizer.json)."
        ) from error
    kind = proto.trainer_spec.model_type
    if kind not in DEFAULTS or not proto.pieces:
        raise ModelError(
            f"{name} must be a unigram or BPE model, but received one of kind {kind} with {len(proto.pieces)} pieces. "
            "Save the tokenizer in the fast format (tokenizer.json)."
        )
    defaults = {key: token for key, token in DEFAULTS[kind].items() if settings.get(key) is None}
    named = {key: content_of(token) for key, token in {**settings, **defaults}.items() if key.endswith("_token")}
    backend, sentinels, template = (unigram if kind == UNIGRAM else bpe)(proto, settings)
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    add_tokens(backend, {**settings, **defaults}, numbered)
    special = [text for text in (*named.values(), *sentinels) if text is not None]
    backend.add_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    around = [named.get(part) or part for part in template]
    if len(around) > 1:
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(part, backend.token_to_id(part)) for part in {*around} - {"$A"}]
        )
    return backend, defaults


Converted = tuple[Tokenizer, list[str], list[str]]
"""A tokenizer, further special tokens, and what is put around a text, $A, by names of settings."""


def unigram(proto: Any, settings: Mapping[str, Any]) -> Converted:
    """T5's kind: the sentinels behind the pieces, and EOS behind every text."""
    sentinels = [f"<extra_id_{number}>" for number in range(settings.get("extra_ids", 100))]
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    vocabulary += [(sentinel, 0.0) for sentinel in reversed(sentinels)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(BLANK, "always", True)]
    )
    backend.decoder = decoders.Metaspace(BLANK, "always", True)
    return backend, sentinels, ["$A", "eos_token"]


def bpe(proto: Any, settings: Mapping[str, Any]) -> Converted:
    """Llama's kind: bytes for unknown letters, a blank before a text's first word."""
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True))
    prefix = settings.get("add_prefix_space")
    prefix = proto.normalizer_spec.add_dummy_prefix if prefix is None else prefix
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    begin, end = ([key] if settings.get(f"add_{key}") else [] for key in ("bos_token", "eos_token"))
    return backend, [], [*begin, "$A", *end]


def add_tokens(backend: Tokenizer, settings: Mapping[str, Any], numbered: Mapping[str, Any]) -> None:
    """Add the tokens that a tokenizer's other files have and the tokenizer lacks, as transformers does on loading.

    Args:
      backend: the tokenizer.
      settings: of `special_tokens_map.json` and `tokenizer_config.json`, whose `added_tokens_decoder` numbers tokens.
      numbered: the ids by text of `added_tokens.json`, which counts where there is no `added_tokens_decoder`.

    Raises:
      ModelError: a token cannot be given the id that a file has for it.
    """
    entries = settings.get("added_tokens_decoder")
    wanted: dict[int, AddedToken] = {}
    try:
        if isinstance(entries, Mapping):
            wanted = {
                int(number): AddedToken(token["content"], **{flag: token[flag] for flag in FLAGS if flag in token})
                for number, token in entries.items()
            }
        else:
            special = {content_of(token) for key, token in settings.items() if key.endswith("_token")}
            wanted = {
                int(number): AddedToken(text, normalized=text not in special, special=text in special)
                for text, number in numbered.items()
            }
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"added tokens must be ids and texts with flags, but received files that are not ({error!r}). Copy them "
            "again."
        ) from error
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for number, token in sorted(wanted.items()):
        if token.content in present:
            continue
        new = backend.token_to_id(token.content) is None
        backend.add_tokens([token])
        if new and (given := backend.token_to_id(token.content)) != number:
            raise ModelError(
                f"an added token must have the id that follows the vocabulary, {given}, but received {number} for "
                f"{token.content!r}. Save the tokenizer again in the fast format, so that tokenizer.json holds it."
            )
    named = {key: content_of(settings.get(key)) for key in NAMED}
    further = [token for key in LISTED for token in _listed(settings.get(key))]
    # Others stand in no text that is read here: where the vocabulary lacks them they need no id of their own.
    read = ("bos_token", "eos_token")
    needed = [text for key, text in named.items() if key in read or backend.token_to_id(text or "") is not None]
    texts = [text for text in (*needed, *map(content_of, further)) if text and text not in present]
    backend.add_tokens([AddedToken(text, normalized=False, special=True) for text in texts])


def _listed(tokens: object) -> list[object]:
    if isinstance(tokens, Mapping):
        return list(tokens.values())
    return list(tokens) if isinstance(tokens, list) else []
