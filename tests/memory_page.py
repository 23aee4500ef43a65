"""The table of the guide to memory, counted from shapes: `python tests/memory_page.py` in the project's folder."""

import functools
import re
from pathlib import Path
from typing import Any

from flax import nnx
from small import tokenizer

from fastpref.learning.memory import TrainMemory, train_memory
from fastpref.method.adapter import AdapterConfig
from fastpref.method.config import TrainConfig
from fastpref.models import DecoderConfig, LanguageModel
from fastpref.models.adapters import adapted_shapes as of_adapters
from fastpref.models.huggingface import abstract_module

PAGE = Path(__file__).parent.parent / "docs" / "fit_in_memory.md"

MODELS = {
    "SmolLM2-135M": DecoderConfig(
        vocab_size=49152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3, head_dim=64, tied=True
    ),
    "Llama-3.2-1B": DecoderConfig(
        vocab_size=128256, width=2048, hidden=8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied=True
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
    "adapters, AdamW, bfloat16, int8 base": {
        "optimizer": "adamw",
        "dtype": "bfloat16",
        "base_dtype": "int8",
        "adapter": AdapterConfig(),
    },
}


def memory(name: str, settings: dict[str, Any]) -> TrainMemory:
    """Memory of a run of a model with some settings."""
    config = TrainConfig(**settings)
    definition, params = nnx.split(shapes(name))
    parts = None if config.adapter is None else adapted_shapes(name, config.adapter)
    return train_memory(config, definition, params, parts, peak=False)


@functools.cache
def shapes(name: str) -> Any:
    """The module with shapes in the place of arrays."""
    return abstract_module(MODELS[name])


@functools.cache
def adapted_shapes(name: str, config: AdapterConfig) -> Any:
    """Base and adapters of a model of shapes."""
    return of_adapters(LanguageModel(shapes(name), tokenizer()), config)


def table() -> str:
    """Rows of settings, columns of models."""
    lines = [f"| settings | {' | '.join(MODELS)} |", f"| --- |{' --- |' * len(MODELS)}"]
    for settings, values in SETTINGS.items():
        cells = " | ".join(f"{memory(name, values).held / 2**30:.2f}" for name in MODELS)
        lines.append(f"| {settings} | {cells} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table counted anew."""
    return re.sub(r"(<!-- counted -->\n).*?(<!-- end -->)", rf"\g<1>{table()}\n\g<2>", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
