"""`config.json` of each supported kind of checkpoint, to our configurations and back."""

from collections.abc import Mapping
from typing import Any

from fastpref.method.errors import ModelError
from fastpref.models.decoder import DecoderConfig
from fastpref.models.decoder_entries import read_decoder, write_decoder
from fastpref.models.entries import (
    FLAG,
    OPTIONAL_SIZE,
    POSITIVE,
    SIZE,
    SMALL,
    Entry,
    check_entries,
    entry,
    entry_or,
    unsupported,
)
from fastpref.models.families import FAMILIES
from fastpref.models.t5 import T5Config

SUPPORTED = tuple(sorted({*FAMILIES, "gemma3", "mt5", "t5"}))

PROJECTIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True), "gated-silu": ("silu", True)}
"""T5's `feed_forward_proj` to its activation and whether it is gated."""

T5_SCHEMA = {
    "vocab_size": SIZE,
    "d_model": SIZE,
    "d_ff": SIZE,
    "d_kv": SIZE,
    "num_heads": SIZE,
    "num_layers": SIZE,
    "num_decoder_layers": OPTIONAL_SIZE,
    "feed_forward_proj": Entry(str, optional=True),
    "tie_word_embeddings": FLAG,
    "scale_decoder_outputs": FLAG,
    "relative_attention_num_buckets": Entry(int, 2, optional=True),
    "relative_attention_max_distance": Entry(int, 2, optional=True),
    "layer_norm_epsilon": SMALL,
    "initializer_factor": POSITIVE,
}


def check_sizes(config: T5Config | DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError where a configuration asks for more than its weights can hold, before memory is taken for it.

    Args:
      config: the configuration.
      shapes: of every tensor of the checkpoint, by name.
    """
    longest = max((side for shape in shapes.values() for side in shape), default=0)
    layers = config.encoder_layers + config.decoder_layers if isinstance(config, T5Config) else config.layers
    sizes = {
        "number of layers": (layers, len(shapes)),
        "vocabulary": (config.vocab_size, longest),
        "width": (config.width, longest),
        "hidden width": (config.hidden, longest),
        "width of all heads": (config.heads * config.head_dim, longest),
    }
    for name, (size, most) in sizes.items():
        if size > most:
            raise ModelError(
                f"the {name} of config.json must be at most the {most} that the weights can hold, but received {size}. "
                "Use the config.json that belongs to these weights."
            )


def read_config(raw: Mapping[str, Any], *, tied: bool) -> T5Config | DecoderConfig:
    """The configuration that a `config.json` describes.

    Args:
      raw: its contents.
      tied: whether the head is the embedding, which some versions say by the tensors alone.

    Returns:
      A `T5Config` or a `DecoderConfig`.

    Raises:
      ModelError: the kind of model or one of its options is not supported, or an entry is missing.
    """
    raw = text_config(raw)
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        raise ModelError(
            f"model_type must be one of {', '.join(SUPPORTED)}, but received {kind!r}. Choose one of these."
        )
    if raw.get("quantization_config") is not None:
        raise unsupported(kind, "quantization_config", raw["quantization_config"], ())
    return read_t5(raw, tied=tied) if kind in ("t5", "mt5") else read_decoder(raw, tied=tied)


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the language model alone, also where it lies in that of a model of images (Gemma 3)."""
    if raw.get("model_type") != "gemma3":
        return dict(raw)
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping):
        raise ModelError(f"text_config of a gemma3 must be an object, but received {inner!r}. Copy the file again.")
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
    outer = {name: raw[name] for name in kept if name in raw}
    kind = {"model_type": "gemma3_text", "architectures": [FAMILIES["gemma3_text"].architecture]}
    return dict(inner) | outer | kind


def architectures_of(raw: Mapping[str, Any]) -> str:
    """The architectures that a `config.json` names, in words."""
    named = raw.get("architectures")
    return ", ".join(map(str, named)) if isinstance(named, list) and named else "no architecture named"


def is_tied(raw: Mapping[str, Any]) -> bool:
    """Whether the file says that the head is the embedding; left out, it means what the family means by that."""
    raw = text_config(raw)
    kind = raw.get("model_type")
    default = FAMILIES[kind].defaults.get("tie_word_embeddings", False) if kind in FAMILIES else kind in ("t5", "mt5")
    return bool(raw.get("tie_word_embeddings", default))


def read_t5(raw: Mapping[str, Any], *, tied: bool) -> T5Config:
    """The configuration in the `config.json` of a T5."""
    check_entries(raw, T5_SCHEMA)
    multilingual = raw["model_type"] == "mt5"
    projection = entry_or(raw, "feed_forward_proj", "gated-gelu" if multilingual else "relu")
    if projection not in PROJECTIONS:
        raise unsupported(raw["model_type"], "feed_forward_proj", projection, tuple(PROJECTIONS))
    activation, gated = PROJECTIONS[projection]
    start = raw.get("decoder_start_token_id", raw.get("pad_token_id", 0 if multilingual else None))
    if not isinstance(start, int) or not 0 <= start < raw["vocab_size"]:
        raise ModelError(
            f"decoder_start_token_id must be an id below {raw['vocab_size']}, but received {start!r}. Set it in "
            "config.json (T5 uses its padding, 0)."
        )
    # A tied T5 is scaled, an mT5 never. Newer files say so by themselves, for they call every T5 tied.
    tied_flag = raw.get("tie_word_embeddings", True) is not False
    scaled = raw.get("scale_decoder_outputs", tied_flag and not multilingual)
    layers = entry(raw, "num_layers")
    decoder_layers = raw.get("num_decoder_layers")
    return T5Config(
        vocab_size=entry(raw, "vocab_size"),
        width=entry(raw, "d_model"),
        hidden=entry(raw, "d_ff"),
        encoder_layers=layers,
        decoder_layers=layers if decoder_layers is None else decoder_layers,
        heads=entry(raw, "num_heads"),
        head_dim=entry(raw, "d_kv"),
        start_id=start,
        activation=activation,
        gated=gated,
        tied=tied,
        scaled_output=bool(scaled),
        buckets=entry_or(raw, "relative_attention_num_buckets", 32),
        max_distance=entry_or(raw, "relative_attention_max_distance", 128),
        norm_eps=entry_or(raw, "layer_norm_epsilon", 1e-6),
        initial_factor=entry_or(raw, "initializer_factor", 1.0),
    )


def write_config(config: T5Config | DecoderConfig, *, eos_id: int, pad_id: int) -> dict[str, Any]:
    """The `config.json` of a model that was made here; `read_config` reads it back.

    Args:
      config: the model's configuration.
      eos_id: ends its completions.
      pad_id: fills its rows.

    Raises:
      ModelError: no supported kind of checkpoint has these options.
    """
    specific = write_t5(config) if isinstance(config, T5Config) else write_decoder(config)
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    return specific | common


def write_t5(config: T5Config) -> dict[str, Any]:
    """The entries that only T5 has."""
    projections = {value: name for name, value in PROJECTIONS.items()}
    if (config.activation, config.gated) not in projections:
        gate = "a gate" if config.gated else "no gate"
        raise ModelError(
            f"the projection of a T5 checkpoint must be {' or '.join(PROJECTIONS)}, but received {config.activation} "
            f"with {gate}. "
            "Change activation or gated."
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "d_model": config.width,
        "d_ff": config.hidden,
        "d_kv": config.head_dim,
        "num_heads": config.heads,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "feed_forward_proj": projections[config.activation, config.gated],
        "decoder_start_token_id": config.start_id,
        "scale_decoder_outputs": config.scaled_output,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": config.initial_factor,
        "dropout_rate": 0.0,
    }
