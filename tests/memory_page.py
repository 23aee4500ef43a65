"""The guide to memory, its table counted from shapes: `python tests/memory_page.py` in the project's folder."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from small import tokenizer

from fastpref.learning.memory import TrainMemory, train_memory
from fastpref.method.adapter import AdapterConfig
from fastpref.method.config import TrainConfig
from fastpref.models import DecoderConfig, LanguageModel, T5Config
from fastpref.models.adapters import adapt
from fastpref.models.huggingface import abstract_module

PAGE = Path(__file__).parent.parent / "docs" / "fit_in_memory.md"

MODELS: dict[str, DecoderConfig | T5Config] = {
    "SmolLM2-135M": DecoderConfig(
        vocab_size=49152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3, head_dim=64, tied=True
    ),
    "Llama-3.2-1B": DecoderConfig(
        vocab_size=128256, width=2048, hidden=8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied=True
    ),
    "T5 v1.1 XL": T5Config(
        vocab_size=32128, width=2048, hidden=5120, encoder_layers=24, decoder_layers=24, heads=32, head_dim=64
    ),
    "Qwen3-4B": DecoderConfig(
        vocab_size=151936,
        width=2560,
        hidden=9728,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        tied=True,
        qk_norm="head",
    ),
    "Llama-3.1-8B": DecoderConfig(
        vocab_size=128256, width=4096, hidden=14336, layers=32, heads=32, kv_heads=8, head_dim=128
    ),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "all parameters, AdamW, float32": {"optimizer": "adamw", "dtype": "float32"},
    "all parameters, Adafactor, float32": {"optimizer": "adafactor", "dtype": "float32"},
    "all parameters, Adafactor, bfloat16": {"optimizer": "adafactor", "dtype": "bfloat16"},
    "adapters, AdamW, float32": {"optimizer": "adamw", "dtype": "float32", "adapter": AdapterConfig()},
    "adapters, AdamW, bfloat16": {"optimizer": "adamw", "dtype": "bfloat16", "adapter": AdapterConfig()},
}

TEXT = """# Fit it in memory

A run holds the policy π, the reference π_ref, for some methods the policy of the round π_t, and the state of the optimiser
all the time; keys and values while it writes; activations and gradients while it learns. What to change, in the order of
what it saves:

1. **Train an adapter.** `adapter = { rank = 16 }` trains low-rank differences to the kernels (LoRA); the model itself is
   held once, for π, π_t and π_ref together, and is read once for the rows of both models while they write. Only the adapter
   has gradients, optimiser state and checkpoints.
2. **`dtype = "bfloat16"`**, the default on a TPU or GPU: products, activations and frozen weights in two bytes. What is
   trained stays float32. Both sides of ρ then come from one pass, so that ρ is exactly 0 where the policy is the reference.
3. **`remat = "layers"` or `"all"`**: of each layer the learner keeps its input and the products with kernels, or its input
   alone, and computes the rest again.
4. **`gradient_accumulation = n`**: the learner takes the rows of a batch in n parts.
5. Shorter `max_prompt_tokens`, `max_new_tokens` and `row_tokens`; a smaller `batch_size`.

<!-- test: memory -->
```python
import fastpref

config = fastpref.TrainConfig(
    steps=100,
    max_new_tokens=16,
    adapter=fastpref.AdapterConfig(rank=16, alpha=32),  # targets, dropout, rslora, init
    optimizer="adamw",
    learning_rate=3e-4,  # about ten times that of all parameters
    remat="layers",
)
result = fastpref.train("checkpoints/sft", "prompts.jsonl", judge, config, run_dir="runs/adapter")
fastpref.models.save(fastpref.models.merged(result.policy), "checkpoints/aligned")
```

`runs/adapter/policy` is a directory in PEFT's layout, which names its base: `fastpref.load`, PEFT and `train` open it, and
`fastpref merge runs/adapter checkpoints/aligned` writes the whole model. A run may start from such a directory: it goes on
with that adapter, and its reference is the model as it was given. `ref="checkpoints/sft"` takes the base itself as the
reference. `sft`, `fit_preference_model` and `fit_reward_model` take the same settings.

`fastpref check DIR adapter.rank=16 dtype=bfloat16` compiles the update of your own model and settings, and says what it
needs at the peak.

## What is held all the time

Counted from shapes, IPO-MD, rank {rank} on all kernels of the layers, GiB; activations, keys and values come on top.

{table}
"""


def memory(name: str, settings: dict[str, Any]) -> TrainMemory:
    """Memory of a run of a model with some settings."""
    config, module = TrainConfig(**settings), abstract_module(MODELS[name])
    definition, params = nnx.split(module)
    parts = None if config.adapter is None else adapted_shapes(LanguageModel(module, tokenizer()), config.adapter)
    return train_memory(config, definition, params, parts, compiled=False)


def adapted_shapes(model: LanguageModel, config: AdapterConfig) -> Any:
    """Base and adapters of a model of shapes."""
    bases: list[Any] = []

    def made() -> Any:
        base, adapters = adapt(model, config, seed=0)
        bases.append(base)
        return adapters

    adapters = jax.eval_shape(made)
    return bases[0], adapters


def table() -> str:
    """Rows of settings, columns of models."""
    lines = [f"| settings | {' | '.join(MODELS)} |", f"| --- |{' --- |' * len(MODELS)}"]
    for settings, values in SETTINGS.items():
        cells = " | ".join(f"{memory(name, values).held / 2**30:.2f}" for name in MODELS)
        lines.append(f"| {settings} | {cells} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    return TEXT.replace("{rank}", str(AdapterConfig().rank)).replace("{table}", table())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
