"""Reward models in the hub's layout, random and small, made from a seed: by the tests and by the script of their truth.

Needs numpy, tokenizers and safetensors alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ system if loop.first }}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
END, START, STOP, BEGIN = range(4)
WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 16, 24, 4, 2, 2

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"pad": END, "eos": STOP, "template": CHATML},
    "qwen2": {"pad": STOP, "eos": STOP, "template": CHATML},
    "mistral": {"pad": None, "eos": END, "template": ZEPHYR},
    "value_head": {"pad": END, "eos": STOP, "template": CHATML},
    "gemma": {"pad": END, "eos": STOP, "template": GEMMA},
    "gemma2": {"pad": END, "eos": STOP, "template": GEMMA},
    "gemma3_text": {"pad": STOP, "eos": STOP, "template": GEMMA},
    "gemma3": {"pad": END, "eos": STOP, "template": GEMMA},
}
"""Ids and template of each. The padding of "qwen2" and "gemma3_text" is EOS; "value_head" is a Llama in TRL's layout.
"gemma" and the text of "gemma3" name no padding, and have that of their class."""

ARCHITECTURES = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "value_head": "LlamaForCausalLM",
    "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "gemma3": "Gemma3ForSequenceClassification",
}
LOCAL = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 10, "sliding_window": 8}
BY_LAYER = LOCAL | {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "sliding_window_pattern": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "head_dim": WIDTH // HEADS},
    "gemma2": LOCAL | {"head_dim": WIDTH // HEADS, "attn_logit_softcapping": 5.0},
    "gemma3_text": BY_LAYER | {"head_dim": WIDTH // HEADS},
    "gemma3": BY_LAYER | {"head_dim": WIDTH // HEADS},
}
"""Entries of `config.json` beside those that all have."""

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Where is the mill?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What rose?"}],
    [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Who closed it, and why?"},
    ],
]
REPLIES = ["By the river.", "The river, three feet", "No one:\nit closed itself"]


def write_tokenizer(path: Path, kind: str) -> None:
    ids = KINDS[kind]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[ids["eos"]],
        "pad_token": SPECIAL[END if ids["pad"] is None else ids["pad"]],
        "chat_template": ids["template"],
    }
    if ids["template"] != CHATML:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
        config["bos_token"] = "<s>"
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(path: Path, kind: str, *, labels: int = 1, seed: int = 5, **changes: Any) -> Path:
    """Write the directory of a kind; `changes` are made to its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path, kind)
    vocabulary, ids = 264, KINDS[kind]
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": "llama" if kind == "value_head" else kind,
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **({} if kind in ("gemma", "gemma3") else {"pad_token_id": ids["pad"]}),
        "eos_token_id": ids["eos"],
        "bos_token_id": BEGIN,
        "id2label": {str(at): f"LABEL_{at}" for at in range(labels)},
        **OPTIONS.get(kind, {}),
    }
    if kind == "gemma3":
        outer = {name: config.pop(name) for name in ("architectures", "id2label", "tie_word_embeddings")}
        # What stands outside is not that of the text.
        outer |= {"model_type": kind, "pad_token_id": STOP, "vision_config": VISION, "mm_tokens_per_image": 4}
        config = outer | {"text_config": config | {"model_type": "gemma3_text"}}
    (path / "config.json").write_text(json.dumps(config | changes))
    draw = np.random.default_rng(seed)
    body = "model.language_model" if kind == "gemma3" else "model"
    head_dim, kv = WIDTH // HEADS, WIDTH // HEADS * KV_HEADS
    shapes = {f"{body}.embed_tokens.weight": (vocabulary, WIDTH), "score.weight": (labels, WIDTH)}
    if kind == "value_head":
        shapes |= {"lm_head.weight": (vocabulary, WIDTH), "v_head.summary.weight": (1, WIDTH)}
        shapes |= {"v_head.summary.bias": (1,)}
        del shapes["score.weight"]
    for layer in range(LAYERS):
        for name, sides in {"q": (WIDTH, WIDTH), "k": (kv, WIDTH), "v": (kv, WIDTH), "o": (WIDTH, WIDTH)}.items():
            shapes[f"{body}.layers.{layer}.self_attn.{name}_proj.weight"] = sides
            if kind == "qwen2" and name != "o":
                shapes[f"{body}.layers.{layer}.self_attn.{name}_proj.bias"] = sides[:1]
        for name, sides in {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}.items():
            shapes[f"{body}.layers.{layer}.mlp.{name}_proj.weight"] = sides
    weights = {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = ["input", "post_attention"]
    norms += ["pre_feedforward", "post_feedforward"] * (kind in ("gemma2", "gemma3_text", "gemma3"))
    layers = [f"layers.{layer}.{name}" for layer in range(LAYERS) for name in norms]
    sizes = dict.fromkeys([f"{body}.norm.weight", *(f"{body}.{name}_layernorm.weight" for name in layers)], WIDTH)
    if kind in ("gemma3_text", "gemma3"):
        sizes |= {f"{body}.layers.{n}.self_attn.{x}_norm.weight": head_dim for n in range(LAYERS) for x in "qk"}
    for name, size in sizes.items():
        weights[name] = (1 + draw.normal(0, 0.2, size)).astype(np.float32)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
