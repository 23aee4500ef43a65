"""`config.json` of decoders: read by the table of families into one configuration, and written from it."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any

from fastpref.method.errors import ModelError
from fastpref.models.decoder import DecoderConfig
from fastpref.models.entries import check_entries, unsupported
from fastpref.models.families import FAMILIES, SCHEMA, Family
from fastpref.models.layers import ACTIVATIONS
from fastpref.models.rope_entries import read_rope, write_rope

UNUSED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (None,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "residual_multiplier": (1,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_bidirectional_attention": (False,),
    "use_sliding_window": (False,),
}
"""Options that change a model of those families that read them; the others are read under these values alone."""

NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads", "head_dim")
"""Entries whose null is a value of its own; other nulls mean what an entry left out means."""


def read_decoder(raw: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    """The configuration in the `config.json` of a family of `FAMILIES`."""
    kind = raw["model_type"]
    family = FAMILIES[kind]
    check_entries(raw, family.schema)
    ours = {theirs: name for name, theirs in family.entries.items()}
    described = dict(family.defaults) | {
        ours.get(name, name): value
        for name, value in raw.items()
        if name not in family.entries and (value is not None or name in NULLABLE)
    }
    for option, neutral in UNUSED.items():
        value = raw.get(option)
        if option not in family.reads and value is not None and not any(value == choice for choice in neutral):
            raise unsupported(kind, option, value, neutral)
    sizes = read_sizes(described, family)
    unrotated = read_unrotated(described, kind, sizes["layers"])
    window, local = read_windows(described, kind, sizes["layers"], unrotated)
    activation = described.get("hidden_act", "silu")
    # Gemma's first files say gelu and mean its approximation.
    activation = "gelu_pytorch_tanh" if kind == "gemma" and activation == "gelu" else activation
    if activation not in ACTIVATIONS:
        raise unsupported(kind, family.entries.get("hidden_act", "hidden_act"), activation, tuple(ACTIVATIONS))
    bias = "attention_bias" in family.reads and bool(described.get("attention_bias"))

    def number(name: str, default: float | None = None) -> Any:
        value = described.get(name, default)
        return None if value is None else float(value)

    scale = number("attention_multiplier") if "attention_multiplier" in family.reads else None
    if "query_pre_attn_scalar" in family.reads:
        scale = described["query_pre_attn_scalar"] ** -0.5
    if "scale_attn_weights" in family.reads and not described["scale_attn_weights"]:
        scale = 1.0
    options: dict[str, Any] = {
        "norm_eps": number("rms_norm_eps", 1e-6),
        "tied": tied,
        "attention_bias": bias,
        "output_bias": bias,
        "initial_std": number("initializer_range", 0.02),
        "feed_forward_bias": bool(described.get("mlp_bias", False)),
        "activation": activation,
        "window": window,
        "local": local,
        "unrotated": unrotated,
        "embedding_scale": math.sqrt(sizes["width"]) if family.scaled else number("embedding_multiplier", 1.0),
        "residual_scale": number("residual_multiplier", 1.0),
        "attention_scale": scale,
        "attention_cap": number("attn_logit_softcapping"),
        "logit_scale": 1.0 / number("logits_scaling", 1.0),
        "logit_cap": number("final_logit_softcapping"),
    }
    if family.ropes:
        by_layer = "rope_local_base_freq" in family.reads
        options |= read_rope(described, family.ropes, sizes["head_dim"], by_layer=by_layer)
    else:
        options["max_positions"] = described["max_position_embeddings"]
    return DecoderConfig(**(sizes | options | dict(family.options)))


def read_sizes(described: Mapping[str, Any], family: Family) -> dict[str, int]:
    """The sizes of a `DecoderConfig`."""
    width, heads = described["hidden_size"], described["num_attention_heads"]
    kv_heads = None if "num_key_value_heads" in family.without else described.get("num_key_value_heads")
    head_dim = None if "head_dim" in family.without else described.get("head_dim")
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim = width // heads if head_dim is None else head_dim
    if heads % kv_heads or not head_dim or (head_dim % 2 and family.ropes):
        raise ModelError(
            f"num_attention_heads must be a multiple of num_key_value_heads, and head_dim even, but received {heads}, "
            f"{kv_heads} and {head_dim}. Copy config.json again."
        )
    hidden = described["intermediate_size"]
    return {
        "vocab_size": described["vocab_size"],
        "width": width,
        "hidden": 4 * width if hidden is None else hidden,
        "layers": described["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }


def read_unrotated(described: Mapping[str, Any], kind: str, layers: int) -> tuple[int, ...]:
    """Numbers of the layers without rotary positions."""
    if "no_rope_layers" not in FAMILIES[kind].reads:
        return ()
    interval = described["no_rope_layer_interval"]
    flags = described.get("no_rope_layers", [int((number + 1) % interval != 0) for number in range(layers)])
    if not isinstance(flags, list) or len(flags) < layers or any(flag not in (0, 1) for flag in flags):
        raise ModelError(
            f"no_rope_layers of config.json must list 0 or 1 for each of {layers} layers, but received {flags!r}. "
            "Copy the file again."
        )
    return tuple(number for number in range(layers) if not flags[number])


def read_windows(
    described: Mapping[str, Any], kind: str, layers: int, unrotated: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """The positions that a query of a local layer attends to, and the numbers of the local layers."""
    rule, reads = FAMILIES[kind].windows, FAMILIES[kind].reads
    window = described.get("sliding_window") if "sliding_window" in reads else None
    if "use_sliding_window" in reads and not described.get("use_sliding_window"):
        window = None
    local: tuple[int, ...] = ()
    if rule == "pattern":
        named = described if "sliding_window_pattern" in reads else FAMILIES[kind].defaults
        local = tuple(number for number in range(layers) if (number + 1) % named["sliding_window_pattern"])
    elif window is not None:
        first = described["max_window_layers"] if rule == "late" else 0
        local = unrotated if rule == "unrotated" else tuple(range(first, layers))
    types = described.get("layer_types")
    if types is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(name not in kinds for name in types):
            if "layer_types" not in reads:
                raise unsupported(kind, "layer_types", types, ())
            raise ModelError(
                f"layer_types of config.json must list {' or '.join(kinds)} for each of {layers} layers, but received "
                f"{types!r}. Convert or choose another checkpoint."
            )
        listed = tuple(number for number in range(layers) if types[number] == "sliding_attention")
        if "layer_types" not in reads and listed != local:
            raise unsupported(kind, "layer_types", types, ())
        local = listed
    if local and window is None:
        unused = " without use_sliding_window" if "use_sliding_window" in reads else ""
        raise ModelError(
            f"sliding_window of a {kind} must be a whole number where layers are local, but received "
            f"{described.get('sliding_window')!r}{unused}. Copy config.json again."
        )
    return (window, local) if local else (None, ())


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The entries of `config.json` that only decoders have, of the first family that has these options.

    Raises:
      ModelError: no family has them together.
    """
    scale = config.attention_scale
    entries = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_positions or 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initial_std,
        "attention_bias": config.output_bias,
        "mlp_bias": config.feed_forward_bias,
        "use_sliding_window": bool(config.local),
        "sliding_window": config.window,
        "layer_types": [
            "sliding_attention" if number in config.local else "full_attention" for number in range(config.layers)
        ],
        "no_rope_layers": [int(number not in config.unrotated) for number in range(config.layers)],
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": scale,
        "logits_scaling": 1 / config.logit_scale,
        "query_pre_attn_scalar": None if scale is None else round(scale**-2),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "partial_rotary_factor": 1.0 if config.rotary_dim is None else config.rotary_dim / config.head_dim,
        "rope_local_base_freq": config.local_rope_theta,
        "scale_attn_weights": scale is None,
    }
    for kind, family in FAMILIES.items():
        written = {name: value for name, value in entries.items() if name in SCHEMA or name in family.reads}
        raw = {family.entries.get(name, name): value for name, value in written.items() if name not in family.without}
        raw |= {"architectures": [family.architecture], "model_type": kind}
        with suppress(ModelError, ValueError):
            raw |= write_rope(config.rope_theta, config.rope_scaling) if family.ropes else {}
            if read_decoder(raw, tied=config.tied) == config:
                return raw
    unusual = {
        option.name: getattr(config, option.name)
        for option in fields(config)
        if option.default is not MISSING and getattr(config, option.name) != option.default
    }
    raise ModelError(
        f"the options of a Decoder must be those of one family ({', '.join(FAMILIES)}) to be saved, but received "
        f"{unusual}. Change them, or save the parameters yourself."
    )
