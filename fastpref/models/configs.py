"""`config.json` of each supported kind of checkpoint, to our configurations and back."""

from collections.abc import Mapping
from typing import Any

from fastpref.models.decoder import DecoderConfig, RopeScaling
from fastpref.models.t5 import T5Config

SUPPORTED = ("llama", "mistral", "mt5", "qwen2", "t5")

PROJECTIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True), "gated-silu": ("silu", True)}
"""T5's `feed_forward_proj` to its activation and whether it is gated."""

UNUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "layer_types": (),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "use_sliding_window": (False,),
}
"""Options of `config.json` that change the model in ways not written here, and the values under which they do not."""


def read_config(raw: Mapping[str, Any], *, tied: bool) -> T5Config | DecoderConfig:
    """The configuration that a `config.json` describes.

    Args:
      raw: its contents.
      tied: whether the head is the embedding, which some versions say by the tensors alone.

    Returns:
      A `T5Config` or a `DecoderConfig`.

    Raises:
      ValueError: the kind of model or one of its options is not supported, or an entry is missing.
    """
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        raise ValueError(f"model_type is one of {', '.join(SUPPORTED)}, not {kind!r}: convert or choose another model")
    for option, neutral in UNUSED.items():
        value = raw.get(option)
        full = option == "layer_types" and value is not None and set(value) == {"full_attention"}
        if value is not None and value not in neutral and not full:
            raise unsupported(kind, option, value, neutral)
    return read_t5(raw, tied=tied) if kind in ("t5", "mt5") else read_decoder(raw, tied=tied)


def read_t5(raw: Mapping[str, Any], *, tied: bool) -> T5Config:
    """The configuration in the `config.json` of a T5."""
    projection = raw.get("feed_forward_proj", "relu")
    if projection not in PROJECTIONS:
        raise unsupported(raw["model_type"], "feed_forward_proj", projection, tuple(PROJECTIONS))
    activation, gated = PROJECTIONS[projection]
    start = raw.get("decoder_start_token_id", raw.get("pad_token_id"))
    if not isinstance(start, int):
        raise ValueError(
            f"decoder_start_token_id is an id, not {start!r}: set it in config.json (T5 uses its padding, 0)"
        )
    # Tied checkpoints are scaled. Newer files say so by themselves, for they call every T5 tied.
    scaled = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True) is not False)
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
        buckets=raw.get("relative_attention_num_buckets", 32),
        max_distance=raw.get("relative_attention_max_distance", 128),
        norm_eps=raw.get("layer_norm_epsilon", 1e-6),
        initial_factor=raw.get("initializer_factor", 1.0),
    )


def read_decoder(raw: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    """The configuration in the `config.json` of a Llama, Mistral or Qwen2."""
    kind = raw["model_type"]
    if kind == "mistral" and raw.get("sliding_window") is not None:
        raise unsupported(kind, "sliding_window", raw["sliding_window"], (None,))
    width, heads = entry(raw, "hidden_size"), entry(raw, "num_attention_heads")
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    theta, scaling = read_rope(raw)
    bias = bool(raw.get("attention_bias", False)) if kind == "llama" else False
    return DecoderConfig(
        vocab_size=entry(raw, "vocab_size"),
        width=width,
        hidden=entry(raw, "intermediate_size"),
        layers=entry(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tied=tied,
        attention_bias=bias or kind == "qwen2",
        output_bias=bias,
        initial_std=raw.get("initializer_range", 0.02),
    )


def read_rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, from the older entries or from the newer single one."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise unsupported(raw["model_type"], "partial_rotary_factor", rope["partial_rotary_factor"], (1,))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(entry(rope, "factor")))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, positions = (entry(rope, name) for name in names)
        return theta, RopeScaling("llama3", float(factor), float(low), float(high), int(positions))
    raise unsupported(raw["model_type"], "rope_type", kind, ("default", "linear", "llama3"))


def write_config(config: T5Config | DecoderConfig, *, eos_id: int, pad_id: int) -> dict[str, Any]:
    """The `config.json` of a model that was made here; `read_config` reads it back.

    Args:
      config: the model's configuration.
      eos_id: ends its completions.
      pad_id: fills its rows.

    Raises:
      ValueError: no supported kind of checkpoint has these options.
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
        raise ValueError(
            f"the projection of a T5 checkpoint is {' or '.join(PROJECTIONS)}, not {config.activation} with {gate}: "
            "change activation or gated"
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


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The entries that only the Llama family has."""
    if config.output_bias and not config.attention_bias:
        raise ValueError("output_bias without attention_bias is in no kind of checkpoint: set both, or neither")
    qwen = config.attention_bias and not config.output_bias
    scaling = config.rope_scaling
    rope: dict[str, Any] = {}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope or None,
        "initializer_range": config.initial_std,
        "attention_bias": config.output_bias,
    }


def entry(raw: Mapping[str, Any], name: str) -> Any:
    """An entry that must be there."""
    if raw.get(name) is None:
        raise ValueError(f"config.json holds {name}, but this one does not: copy it again")
    return raw[name]


def unsupported(kind: object, option: str, value: object, allowed: tuple[Any, ...]) -> ValueError:
    """The error for an option that changes the model in a way not written here."""
    choices = " or ".join(repr(choice) for choice in allowed) if allowed else "left out"
    return ValueError(f"{option} of a {kind} is {choices} here, not {value!r}: convert or choose another checkpoint")
