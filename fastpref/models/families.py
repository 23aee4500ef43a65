"""Families of decoder-only checkpoints: for each, its tensors, and the entries of `config.json` that it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpref.models.entries import FLAG, OPTIONAL_SIZE, POSITIVE, SIZE, SMALL, Entry

SCHEMA = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": OPTIONAL_SIZE,
    "head_dim": OPTIONAL_SIZE,
    "hidden_act": Entry(str, optional=True),
    "max_position_embeddings": OPTIONAL_SIZE,
    "rope_theta": POSITIVE,
    "rms_norm_eps": SMALL,
    "tie_word_embeddings": FLAG,
    "initializer_range": POSITIVE,
}
"""Entries of every family, with their rules; a family may call one by another name, or do without."""

OPTIONS = {
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "sliding_window": OPTIONAL_SIZE,
    "use_sliding_window": FLAG,
    "max_window_layers": Entry(int, 0, optional=True),
    "sliding_window_pattern": OPTIONAL_SIZE,
    "no_rope_layer_interval": OPTIONAL_SIZE,
    "embedding_multiplier": POSITIVE,
    "residual_multiplier": POSITIVE,
    "attention_multiplier": POSITIVE,
    "logits_scaling": POSITIVE,
    "query_pre_attn_scalar": POSITIVE,
    "attn_logit_softcapping": POSITIVE,
    "final_logit_softcapping": POSITIVE,
    "partial_rotary_factor": SMALL,
    "rope_local_base_freq": POSITIVE,
    "original_max_position_embeddings": OPTIONAL_SIZE,
    "scale_attn_weights": FLAG,
}
"""Entries that some families read, with their rules; those that are lists have checks of their own."""


def layer_names(outer: Mapping[str, str], inner: Mapping[str, str], prefix: str) -> dict[str, str]:
    """A table of tensors from the tensors outside layers and those of a layer."""
    return dict(outer) | {f"layers.{{}}.{ours}": f"{prefix}.{{}}.{theirs}" for ours, theirs in inner.items()}


PROJECTIONS = {f"attention.{name}": f"self_attn.{name}_proj.weight" for name in "qkvo"} | {
    f"feed_forward.{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")
}
BIASES = {f"{ours}_bias": theirs.replace("weight", "bias") for ours, theirs in PROJECTIONS.items()}
HEAD_NORMS = {f"attention.{name}_norm.scale": f"self_attn.{name}_norm.weight" for name in "qk"}
OUTER = {"embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "lm_head": "lm_head.weight"}
BEFORE = {
    "attention.norm.scale": "input_layernorm.weight",
    "feed_forward.norm.scale": "post_attention_layernorm.weight",
}
AFTER = {
    "attention.after.scale": "post_attention_layernorm.weight",
    "feed_forward.after.scale": "post_feedforward_layernorm.weight",
}
BOTH = AFTER | {
    "attention.norm.scale": "input_layernorm.weight",
    "feed_forward.norm.scale": "pre_feedforward_layernorm.weight",
}
MIDDLE = PROJECTIONS | BIASES | HEAD_NORMS

LLAMA = layer_names(OUTER, MIDDLE | BEFORE, "model.layers")
GEMMA = layer_names(OUTER, MIDDLE | BOTH, "model.layers")
OLMO = layer_names(OUTER, MIDDLE | AFTER, "model.layers")
PHI = LLAMA | {
    "layers.{}.attention.q": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers.{}.attention.k": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers.{}.attention.v": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers.{}.feed_forward.gate": "model.layers.{}.mlp.gate_up_proj.weight",
    "layers.{}.feed_forward.up": "model.layers.{}.mlp.gate_up_proj.weight",
}
GPT = layer_names(
    {
        "embedding": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "norm.scale": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "lm_head": "lm_head.weight",
    },
    {
        f"{ours}{end}": f"{theirs}.{'bias' if end else 'weight'}"
        for end in ("", "_bias")
        for ours, theirs in {
            **{f"attention.{name}": "attn.c_attn" for name in "qkv"},
            "attention.o": "attn.c_proj",
            "feed_forward.up": "mlp.c_fc",
            "feed_forward.down": "mlp.c_proj",
        }.items()
    }
    | {
        f"{block}.norm.{ours}": f"ln_{number}.{theirs}"
        for block, number in (("attention", 1), ("feed_forward", 2))
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    },
    "transformer.h",
)


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of `config.json`."""

    architecture: str
    names: Mapping[str, str]
    """Our parameter paths, with {} for a layer number, to names of tensors. A tensor that several paths name holds them
    one after the other, in this order."""
    reads: tuple[str, ...] = ()
    """Entries beside those of `SCHEMA` that its models differ by."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The meaning of entries that are left out."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `DecoderConfig` that all its models share."""
    windows: str | None = None
    """The layers with windows, where `layer_types` does not say: "all", "late", "unrotated", "pattern" or None."""
    scaled: bool = False
    """Whether embeddings are multiplied by the square root of the width."""
    ropes: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    """Kinds of rotary positions."""
    entries: Mapping[str, str] = field(default_factory=dict)
    """Entries of `SCHEMA` that it calls by another name."""
    without: tuple[str, ...] = ()
    """Entries of `SCHEMA` that it does not have."""
    as_is: tuple[str, ...] = ()
    """Kernels that are stored [in, out] on disk, as here; all others are stored [out, in]."""

    @property
    def schema(self) -> dict[str, Entry]:
        """The rule of every entry, by its name in the file."""
        known = {name: rule for name, rule in SCHEMA.items() if name not in self.without}
        known |= {name: OPTIONS[name] for name in self.reads if name in OPTIONS}
        left_out = self.defaults.keys()
        return {
            self.entries.get(name, name): rule._replace(optional=True) if name in left_out else rule
            for name, rule in known.items()
        }


WINDOWS = ("sliding_window", "layer_types")
SOME = ("use_sliding_window", "max_window_layers", *WINDOWS)
GELU = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256, "pad_token_id": 0}
LATER_GEMMA = ("attention_bias", *WINDOWS, "query_pre_attn_scalar", "final_logit_softcapping")
LATER_GELU = GELU | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
LATER_NORMS = {"norm": "rms+1", "norms": "both"}
QWEN = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", LLAMA, ("attention_bias", "mlp_bias"), {"max_position_embeddings": 2048}),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA, SOME, QWEN, {"attention_bias": True}, windows="late"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA,
        ("attention_bias", *SOME),
        QWEN | {"head_dim": 128},
        {"qk_norm": "head"},
        windows="late",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        ("sliding_window",),
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        windows="all",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        LLAMA,
        ("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", "use_sliding_window", *WINDOWS),
        {
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "pad_token_id": 128004,
        },
        windows="unrotated",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        LLAMA,
        (
            "attention_bias",
            "mlp_bias",
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
        ),
        {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        OLMO,
        ("attention_bias",),
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "pad_token_id": 1},
        {"norms": "after", "qk_norm": "width"},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        LLAMA,
        ("attention_bias",),
        GELU | {"num_key_value_heads": 16, "max_position_embeddings": 8192},
        {"norm": "rms+1"},
        scaled=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA,
        (*LATER_GEMMA, "attn_logit_softcapping"),
        LATER_GELU
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
            "max_position_embeddings": 8192,
        },
        LATER_NORMS,
        windows="pattern",
        scaled=True,
        entries={"hidden_act": "hidden_activation"},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA,
        (*LATER_GEMMA, "sliding_window_pattern", "rope_local_base_freq"),
        LATER_GELU
        | {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "max_position_embeddings": 131072,
        },
        LATER_NORMS | {"qk_norm": "head"},
        windows="pattern",
        scaled=True,
        entries={"hidden_act": "hidden_activation"},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        PHI,
        ("sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
        },
        windows="all",
        ropes=("default", "longrope"),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        GPT,
        ("scale_attn_weights",),
        {
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "scale_attn_weights": True,
            "intermediate_size": None,
        },
        {
            "norm": "layer",
            "gated": False,
            "learned_positions": True,
            "attention_bias": True,
            "output_bias": True,
            "feed_forward_bias": True,
        },
        ropes=(),
        entries={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "hidden_act": "activation_function",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        without=("num_key_value_heads", "head_dim", "rope_theta"),
        as_is=("q", "k", "v", "o", "up", "down"),
    ),
}
"""Every family of decoder-only checkpoints that is read and written, by its `model_type`."""
