"""`config.json` of each supported kind of checkpoint, to our configurations and back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastpref.method.errors import ModelError
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


REMEDIES = {
    "quantization_config": "Save the weights unquantized: load them with transformers, then model.dequantize() and "
    "model.save_pretrained(...).",
    "sliding_window": "Set it to null in config.json if no text is longer than the window: nothing else changes.",
    "use_sliding_window": "Set it to false in config.json if no text is longer than sliding_window: nothing else "
    "changes.",
}
"""Ways out of an option that is not supported, where there are any."""

MANY = 2**31 - 1


class Entry(NamedTuple):
    """The rule of an entry of `config.json`: its type and range, or None where it may be left out."""

    kind: type
    low: float = 0
    high: float = MANY
    optional: bool = False

    def check(self, name: str, value: object) -> None:
        """Raise ModelError unless the value keeps the rule."""
        if value is None and self.optional:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is int:
            rule, holds = f"a whole number from {self.low:.0f} to {self.high:.0f}", isinstance(value, int) and number
        elif self.kind is float:
            rule, holds = f"a number above {self.low:g} and at most {self.high:g}", number
        else:
            rule, holds = {bool: "true or false", str: "text"}[self.kind], isinstance(value, self.kind)
        if holds and isinstance(value, int | float) and number:
            # NaN compares false.
            holds = value <= self.high and (value >= self.low if self.kind is int else value > self.low)
        if not holds:
            raise ModelError(f"{name} of config.json must be {rule}, but received {value!r}. Copy the file again.")


_SIZE, _OPTIONAL_SIZE = Entry(int, 1), Entry(int, 1, optional=True)
_SMALL, _POSITIVE = Entry(float, 0, 1, optional=True), Entry(float, 0, 1e12, optional=True)
_FLAG = Entry(bool, optional=True)

T5_SCHEMA = {
    "vocab_size": _SIZE,
    "d_model": _SIZE,
    "d_ff": _SIZE,
    "d_kv": _SIZE,
    "num_heads": _SIZE,
    "num_layers": _SIZE,
    "num_decoder_layers": _OPTIONAL_SIZE,
    "feed_forward_proj": Entry(str, optional=True),
    "tie_word_embeddings": _FLAG,
    "scale_decoder_outputs": _FLAG,
    "relative_attention_num_buckets": Entry(int, 2, optional=True),
    "relative_attention_max_distance": Entry(int, 2, optional=True),
    "layer_norm_epsilon": _SMALL,
    "initializer_factor": _POSITIVE,
}
DECODER_SCHEMA = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _OPTIONAL_SIZE,
    "head_dim": _OPTIONAL_SIZE,
    "rope_theta": _POSITIVE,
    "rms_norm_eps": _SMALL,
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "initializer_range": _POSITIVE,
}
ROPE_SCHEMA = {
    "rope_theta": _POSITIVE,
    "factor": Entry(float, 0, 1e6, optional=True),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _OPTIONAL_SIZE,
}


def check_entries(raw: Mapping[str, Any], schema: Mapping[str, Entry]) -> None:
    """Raise ModelError for the first entry that is missing or breaks its rule; entries left out keep their defaults."""
    for name, rule in schema.items():
        if name in raw or not rule.optional:
            rule.check(name, raw.get(name))


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
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        raise ModelError(
            f"model_type must be one of {', '.join(SUPPORTED)}, but received {kind!r}. Choose one of these."
        )
    for option, neutral in UNUSED.items():
        value = raw.get(option)
        full = option == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value)
        if value is not None and not any(value == choice for choice in neutral) and not full:
            raise unsupported(kind, option, value, neutral)
    return read_t5(raw, tied=tied) if kind in ("t5", "mt5") else read_decoder(raw, tied=tied)


def read_t5(raw: Mapping[str, Any], *, tied: bool) -> T5Config:
    """The configuration in the `config.json` of a T5."""
    check_entries(raw, T5_SCHEMA)
    multilingual = raw["model_type"] == "mt5"
    projection = _or(raw, "feed_forward_proj", "gated-gelu" if multilingual else "relu")
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
        buckets=_or(raw, "relative_attention_num_buckets", 32),
        max_distance=_or(raw, "relative_attention_max_distance", 128),
        norm_eps=_or(raw, "layer_norm_epsilon", 1e-6),
        initial_factor=_or(raw, "initializer_factor", 1.0),
    )


def read_decoder(raw: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    """The configuration in the `config.json` of a Llama, Mistral or Qwen2."""
    check_entries(raw, DECODER_SCHEMA)
    kind = raw["model_type"]
    if kind == "mistral" and raw.get("sliding_window") is not None:
        raise unsupported(kind, "sliding_window", raw["sliding_window"], (None,))
    width, heads = entry(raw, "hidden_size"), entry(raw, "num_attention_heads")
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim = width // heads if head_dim is None else head_dim
    if heads % kv_heads or head_dim % 2 or not head_dim:
        raise ModelError(
            f"num_attention_heads must be a multiple of num_key_value_heads, and head_dim even, but received {heads}, "
            f"{kv_heads} and {head_dim}. Copy config.json again."
        )
    theta, scaling = read_rope(raw)
    bias = bool(raw.get("attention_bias", False)) if kind == "llama" else False
    return DecoderConfig(
        vocab_size=entry(raw, "vocab_size"),
        width=width,
        hidden=entry(raw, "intermediate_size"),
        layers=entry(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_or(raw, "rms_norm_eps", 1e-6),
        tied=tied,
        attention_bias=bias or kind == "qwen2",
        output_bias=bias,
        initial_std=_or(raw, "initializer_range", 0.02),
    )


def read_rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, from the older entries or from the newer single one."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"rope_scaling of config.json must be an object, but received {rope!r}. Copy the file again.")
    check_entries(rope, ROPE_SCHEMA)
    theta = float(_or(rope, "rope_theta", _or(raw, "rope_theta", 10_000.0)))
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


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The entries that only the Llama family has."""
    if config.output_bias and not config.attention_bias:
        raise ModelError("output_bias must come with attention_bias, but received it alone. Set both, or neither.")
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


def _or(raw: Mapping[str, Any], name: str, default: Any) -> Any:
    """An entry, or its default where it is left out or null."""
    return default if raw.get(name) is None else raw[name]


def entry(raw: Mapping[str, Any], name: str) -> Any:
    """An entry that must be there."""
    if raw.get(name) is None:
        raise ModelError(f"config.json must hold {name}, but received one without. Copy it again.")
    return raw[name]


def unsupported(kind: object, option: str, value: object, allowed: tuple[Any, ...]) -> ModelError:
    """The error for an option that changes the model in a way not written here."""
    choices = " or ".join(repr(choice) for choice in allowed) if allowed else "left out"
    remedy = REMEDIES.get(option, "Choose another checkpoint: the weights were trained with this.")
    return ModelError(f"{option} of a {kind} must be {choices}, but received {value!r}. {remedy}")
