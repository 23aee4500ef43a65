"""Write the golden checkpoints and the logits that the original implementation computes from them.

Needs `torch`, `transformers` and `xxhash`, which the project itself does not depend on. Run it in this folder:
`python make_goldens.py [NAME ...]` makes all of them, or those named. The versions that made the committed files are in
`manifest.json`.
"""

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
import transformers
import xxhash
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers.models.phi3 import modeling_phi3

HERE = Path(__file__).parent
SEED = 20240607
VOCABULARY = 97
PROMPT_LENGTHS, FEWER_LENGTHS = (23, 9, 1), (23, 2)
COMPLETIONS, TOKENS = 2, 13
TEXT = (
    "a preference is a choice between two answers",
    "the model writes a summary and another model says which one it likes",
    "every pair of answers has a winner, a loser, or neither",
    "the mixture stays close to the reference while the policy improves",
)

T5_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 36,
    "d_kv": 8,
    "d_ff": 52,
    "num_heads": 3,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
DECODER_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
}
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
}
TIED, DEEP = {"tie_word_embeddings": True}, {"num_hidden_layers": 4}
BIASED = {"attention_bias": True, "mlp_bias": True}
LOCAL, FULL = "sliding_attention", "full_attention"
SCALED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, **SCALED}


def rope(kind: str, theta: float = 100.0, **entries: object) -> dict[str, object]:
    """Rotary positions of a kind, in the entry of newer files."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **entries}}


def families() -> dict[str, transformers.PretrainedConfig]:
    """Three goldens or more of every family, by name: windows shorter than prompts, tied heads, kinds of rotations."""
    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=16)
    linear = rope("linear", factor=3.0)
    dynamic = rope("dynamic", factor=2.0)
    short, long = [1.0, 1.3, 1.9], [2.0, 3.0, 5.0]
    longrope = {"short_factor": short, "long_factor": long}
    some = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    mixed = {"use_sliding_window": True, "sliding_window": 4, "layer_types": [LOCAL, FULL, LOCAL]}
    multipliers = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.6,
    }
    gemma2 = {"query_pre_attn_scalar": 10, "sliding_window": 5}
    capped = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}
    uncapped = dict.fromkeys(capped)
    by_layer = {LOCAL: {"rope_type": "default", "rope_theta": 30.0}, FULL: linear["rope_parameters"]}
    images = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": 20, "n_layer": 2, "n_head": 4, "n_positions": 40}
    gpt2 |= {name: TINY[name] for name in ("initializer_range", "pad_token_id", "eos_token_id", "bos_token_id")}
    own = {  # those of class defaults that a golden of this family leaves out
        "phi3": {name: value for name, value in TINY.items() if name != "head_dim"} | {"rms_norm_eps": 1e-5},
    }
    several = {
        "llama": (
            transformers.LlamaConfig,
            BIASED | TIED | {"hidden_act": "gelu"} | yarn,
            {"mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"} | dynamic,
            {"attention_bias": True} | rope("longrope", original_max_position_embeddings=40, factor=2.0, **longrope),
            rope(
                "yarn", factor=4.0, original_max_position_embeddings=20, truncate=False, mscale=0.7, mscale_all_dim=0.4
            ),
        ),
        "qwen2": (transformers.Qwen2Config, some | TIED, mixed | linear, dynamic | {"num_key_value_heads": 1}),
        "qwen3": (transformers.Qwen3Config, TIED, some | {"attention_bias": True}, mixed | yarn | {"head_dim": 8}),
        "mistral": (
            transformers.MistralConfig,
            {"sliding_window": 7},
            TIED | {"sliding_window": 3, "head_dim": 8} | rope("llama3", 500.0, **SCALED),
            {"sliding_window": 30, "num_key_value_heads": 4} | yarn,
        ),
        "smollm3": (
            transformers.SmolLM3Config,
            TIED | DEEP,
            BIASED | {"no_rope_layers": [0, 1, 0]},
            {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2},
        ),
        "granite": (
            transformers.GraniteConfig,
            multipliers,
            TIED | BIASED | {"embedding_multiplier": 0.5, "logits_scaling": 0.25},
            multipliers | linear | {"attention_multiplier": 1.0},
        ),
        "olmo2": (
            transformers.Olmo2Config,
            {"num_key_value_heads": 4},
            TIED | {"attention_bias": True, "num_key_value_heads": 1},
            yarn,
        ),
        "gemma": (transformers.GemmaConfig, TIED, {"attention_bias": True}, TIED | linear | {"num_key_value_heads": 1}),
        "gemma2": (
            transformers.Gemma2Config,
            gemma2 | TIED | capped,
            gemma2 | uncapped | {"layer_types": [FULL, LOCAL, LOCAL], "attention_bias": True},
            gemma2 | DEEP | linear | {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0, "head_dim": 8},
        ),
        "gemma3": (
            transformers.Gemma3TextConfig,
            gemma2 | TIED | {"rope_parameters": by_layer, "layer_types": [LOCAL, LOCAL, FULL]},
            gemma2 | DEEP | {"sliding_window_pattern": 2, "attention_bias": True},
            gemma2 | TIED | {"final_logit_softcapping": 4.0, "sliding_window": 3, "num_hidden_layers": 6},
        ),
        "phi3": (
            transformers.Phi3Config,
            own["phi3"] | {"hidden_size": 32},
            own["phi3"] | {"sliding_window": 6, "hidden_size": 32} | rope("default", partial_rotary_factor=0.75),
            own["phi3"] | TIED | {"original_max_position_embeddings": 40} | rope("longrope", **longrope),
        ),
        "gpt2": (
            transformers.GPT2Config,
            gpt2,
            gpt2 | {"n_inner": 24, "scale_attn_weights": False, "tie_word_embeddings": False},
            gpt2 | {"n_layer": 3, "n_head": 2, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        ),
    }
    made = {}
    for family, (kind, *variants) in several.items():
        for number, variant in enumerate(variants, 1):
            made[f"{family}_{number}"] = kind(**variant if family in ("phi3", "gpt2") else TINY | variant)
    made["gemma3_images"] = transformers.Gemma3Config(
        text_config=TINY | TIED | gemma2,
        vision_config=images | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        initializer_range=0.3,
        **{name: TINY[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id")},
    )
    return made


def large() -> dict[str, transformers.PretrainedConfig]:
    """Models whose logits have a standard deviation of 3 to 4: single precision errs by more than 1e-4."""
    sizes = {name: value for name, value in TINY.items() if name != "head_dim"} | {"rms_norm_eps": 1e-5}
    sizes |= {"num_hidden_layers": 8, "initializer_range": 0.7}
    variants = ({}, {"sliding_window": 9}, rope("default", theta=10000.0, partial_rotary_factor=0.75))
    return {f"phi3_large{n}": transformers.Phi3Config(**sizes | more) for n, more in enumerate(variants, 1)}


def configurations() -> dict[str, transformers.PretrainedConfig]:
    """Every golden by its name."""
    t5, llama, qwen2 = transformers.T5Config, transformers.LlamaConfig, transformers.Qwen2Config
    linear = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
    small = DECODER_SIZES | {"hidden_size": 40, "num_hidden_layers": 1}
    return {
        "t5_v1_1": t5(**T5_SIZES, num_decoder_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "t5_original": t5(**T5_SIZES, feed_forward_proj="relu", tie_word_embeddings=True),
        "llama_sharded": llama(**DECODER_SIZES),
        "llama_grouped_tied": llama(**DECODER_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
        "llama3_rope": llama(**DECODER_SIZES, num_key_value_heads=1, head_dim=10, rope_parameters=LLAMA3),
        "llama_linear_rope_bias": llama(**small, rope_parameters=linear, attention_bias=True),
        "qwen2_bfloat16": qwen2(**DECODER_SIZES, num_key_value_heads=2),
        "mistral": transformers.MistralConfig(**small, num_key_value_heads=2, sliding_window=None),
        **families(),
        "mt5": transformers.MT5Config(**T5_SIZES, feed_forward_proj="gated-gelu"),
        **large(),
    }


def make_tokenizer(appends_eos: bool) -> transformers.PreTrainedTokenizerFast:
    """A BPE tokenizer of at most `VOCABULARY` ids: T5's ends prompts with EOS, Llama's begins them with BOS."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    template, special = ("$A </s>", ("</s>", 1)) if appends_eos else ("<s> $A", ("<s>", 3))
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


def make_model(config: transformers.PretrainedConfig, generator: torch.Generator) -> transformers.PreTrainedModel:
    """A random model whose norms and biases are random too, so that none of them can be left out unseen."""
    if config.is_encoder_decoder:
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        if not getattr(config, "scale_decoder_outputs", False):
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, config.d_model))
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def expected_logits(model: transformers.PreTrainedModel, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    """Logits that predict each token of one completion of one prompt, neither of them padded."""
    prompts, completions = torch.tensor(prompt)[None], torch.tensor(completion)[None]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = torch.full((1, 1), model.config.decoder_start_token_id)
            inputs = torch.cat([start, completions[:, :-1]], dim=1)
            return model(input_ids=prompts, decoder_input_ids=inputs).logits[0].numpy()
        logits = model(input_ids=torch.cat([prompts, completions[:, :-1]], dim=1)).logits
        return logits[0, len(prompt) - 1 :].numpy()


def logits_of(folder: Path, dtype: torch.dtype, rows: list[tuple[np.ndarray, int, np.ndarray]]) -> np.ndarray:
    """Logits of every completion of every prompt, read in a type."""
    encoder_decoder = transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder
    family = transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
    model = family.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    return np.array([[expected_logits(model, x[:size], y) for y in several] for x, size, several in rows])


class Double:
    """The module `torch`, whose single precision is double."""

    def __getattr__(self, name: str) -> object:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@contextmanager
def double() -> Iterator[None]:
    """Lets Phi-3 compute what it always computes in single precision in double: norms, softmax and frequencies."""
    modeling_phi3.torch = Double()
    try:
        yield
    finally:
        modeling_phi3.torch = torch


def main(*wanted: str) -> None:
    """Make every golden anew, or those that are wanted, and the manifest."""
    generator = torch.Generator().manual_seed(SEED)
    random = np.random.default_rng(SEED)
    names = configurations()
    for name, config in names.items():
        torch.manual_seed(SEED + len(name))
        folder = HERE / name
        model = make_model(config, generator)
        few = name in families() or name in large()
        lengths, count = (FEWER_LENGTHS, 1) if few else (PROMPT_LENGTHS, COMPLETIONS)
        prompts = np.zeros((len(lengths), max(lengths)), np.int32)
        for row, length in zip(prompts, lengths, strict=True):
            row[:length] = random.integers(4, VOCABULARY, length)
        completions = random.integers(4, VOCABULARY, (len(lengths), count, TOKENS), dtype=np.int32)
        if wanted and name not in wanted:
            continue

        if name.endswith("bfloat16"):
            model = model.to(torch.bfloat16)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size="60KB" if name.endswith("sharded") else "1GB")
        make_tokenizer(config.is_encoder_decoder).save_pretrained(folder)
        rows = list(zip(prompts, lengths, completions, strict=True))
        arrays = {
            "prompt_tokens": prompts,
            "prompt_lengths": np.array(lengths, np.int32),
            "completion_tokens": completions,
            "logits": logits_of(folder, torch.float32, rows),
        }
        if name in large():
            with double():
                exact = logits_of(folder, torch.float64, rows)
            arrays |= {"logits": exact, "float32_error": np.array([np.abs(arrays["logits"] - exact).max()])}
        save_file(arrays, HERE / f"{name}.safetensors")

    files = sorted(path for name in names for path in [*(HERE / name).iterdir(), HERE / f"{name}.safetensors"])
    manifest = {
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (torch, transformers, tokenizers, safetensors)},
        },
        "script": xxhash.xxh3_64_hexdigest(Path(__file__).read_bytes()),
        "files": {str(path.relative_to(HERE)): xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in files},
    }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
