"""Compile time of whole programs by the number of layers: one loop over layers, and layer after layer.

    python bench/bench_compile.py --write

writes bench/results/compile_cpu.json and .md. Nothing is run: the models are shapes of SmolLM2-135M's sizes. Sides take
turns, each compilation in a fresh cache.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import machine
import numpy as np
from flax import nnx

from fastpref import AdapterConfig, LanguageModel, TrainConfig
from fastpref.demo.smollm2 import checkpoint
from fastpref.learning.memory import train_memory
from fastpref.models.adapters import adapted_shapes
from fastpref.models.huggingface import Description, abstract_module, describe, read_tokenizer
from fastpref.sampling.generate import generate_jit

LAYERS, ROUNDS, LIMIT = (4, 36), 3, 1.5
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 48
SIDES = ("one loop", "layer after layer")

Program = Callable[[], Any]


def programs(described: Description, layers: int) -> dict[str, Program]:
    """Compilations of what a step runs, of a model with so many layers."""
    config: Any = described.config
    module = abstract_module(replace(config, layers=layers))
    definition, params = nnx.split(module)
    settings: dict[str, Any] = {
        "batch_size": PROMPTS,
        "max_prompt_tokens": PROMPT_TOKENS,
        "max_new_tokens": NEW_TOKENS,
    }
    shape, rows = jax.ShapeDtypeStruct, (PROMPTS, 2)
    drawn = (
        shape((PROMPTS, PROMPT_TOKENS), jnp.int32),
        shape((PROMPTS,), jnp.int32),
        shape(rows, jnp.float32),
        jax.eval_shape(lambda: jax.random.key(0)),
        shape(rows, jnp.int32),
    )
    how: dict[str, Any] = {
        "eos_id": 2, "max_new_tokens": NEW_TOKENS, "num_valid_tokens": None, "temperature": 1.0,
    }  # fmt: skip
    adapter = AdapterConfig(rank=16)
    parts = adapted_shapes(LanguageModel(module, read_tokenizer(described)), adapter)
    return {
        "generate": lambda: generate_jit.lower(definition, params, definition, params, *drawn, **how).compile(),
        "update of all parameters, Adafactor": lambda: train_memory(TrainConfig(**settings), definition, params),
        "update of an adapter, AdamW": lambda: train_memory(
            TrainConfig(**settings, optimizer="adamw", adapter=adapter), definition, params, parts
        ),
    }


def compiled(program: Program, side: str) -> float:
    """Seconds of one compilation."""
    whole = mock.patch("jax.lax.scan", partial(jax.lax.scan, unroll=True)) if side == SIDES[1] else nullcontext()
    jax.clear_caches()
    with whole:
        start = time.perf_counter()
        program()
        return time.perf_counter() - start


def measure(layers: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of every compilation, in turn."""
    described = describe(checkpoint())
    made = {count: programs(described, count) for count in layers}
    rows = []
    for name in made[layers[0]]:
        cases = [(side, count) for side in SIDES for count in layers]
        seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        for _ in range(rounds):
            for side, count in cases:
                seconds[side, count].append(compiled(made[count][name], side))
        for side in SIDES:
            few, many = (sorted(seconds[side, count]) for count in layers)
            rows.append(
                {
                    "program": name,
                    "side": side,
                    "seconds": {str(count): seconds[side, count] for count in layers},
                    "ratio": float(np.median(many) / np.median(few)),
                }
            )
    return rows


def text(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    few, many = report["layers"]
    lines = [
        "# Compile time by the number of layers",
        "",
        f"`{report['command']}` on {report['machine']} ({machine.described(report)}).",
        "",
        f"Sizes of SmolLM2-135M, {PROMPTS} prompts × 2 × {NEW_TOKENS} tokens; medians of {report['rounds']} in turn,",
        f"with the range. One loop over layers may take {LIMIT} times as long with {many} as with {few}.",
        "",
        f"| Program | Layers are | {few} layers, s | {many} layers, s | Ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in report["programs"]:
        cells = [
            f"{np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in row["seconds"].values()
        ]
        lines.append(f"| {row['program']} | {row['side']} | {' | '.join(cells)} | {row['ratio']:.2f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update bench/results/compile_cpu.md and .json")
    options = parser.parse_args()
    before = machine.require_quiet() if options.write else {}
    report = {
        "command": "python bench/bench_compile.py --write",
        "machine": machine.name("jax", "jaxlib", "flax"),
        "before": before,
        "layers": LAYERS,
        "rounds": ROUNDS,
        "programs": measure(LAYERS, ROUNDS),
    }
    print(text(report))
    if options.write:
        machine.record("compile_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
