"""What a step with adapters needs of one TPU v5e, counted by its compiler. The chip is not there: nothing is timed.

    python bench/one_chip.py --write

writes bench/results/one_chip.json and .md: memory of writing, and of learning by the settings `remat` and
`gradient_accumulation`.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import machine
import tpu_compiler
from flax import nnx

from fastpref import AdapterConfig, LanguageModel, TrainConfig
from fastpref.learning import optimizers, update
from fastpref.learning.memory import size, update_arguments
from fastpref.models import DecoderConfig
from fastpref.models.adapters import Base, adapted_shapes
from fastpref.models.huggingface import abstract_module
from fastpref.models.int8 import quantized_params
from fastpref.models.lowrank import in_dtype
from fastpref.models.rope import RopeScaling
from fastpref.sampling.generate import generate_jit

sys.path.append(str(Path(__file__).parent.parent / "tests"))
MODEL = DecoderConfig(
    vocab_size=128256, width=2048, hidden=8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied=True,
    rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
)  # fmt: skip
ADAPTER = AdapterConfig(rank=16)
HBM = 15.75
"""GiB of a v5e that a program may use."""
REMATS = ("none", "layers", "all")


class Batch(NamedTuple):
    """Sizes of a step."""

    prompts: int
    completions: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.prompts} prompts of {self.prompt_tokens} tokens × {self.completions} × {self.new_tokens}"


BATCH = Batch(32, 2, 512, 128)


def parts(config: DecoderConfig, base_dtype: str = "bfloat16") -> tuple[Any, Base, Any]:
    """GraphDef, base and adapters of a model, as shapes: products in bfloat16, and the base in `base_dtype`."""
    from small import tokenizer

    def read(params: Any) -> Any:
        params = in_dtype(params, jnp.bfloat16)
        return quantized_params(params) if base_dtype == "int8" else params

    module = abstract_module(config)
    base, adapters = adapted_shapes(LanguageModel(module, tokenizer()), ADAPTER)
    return nnx.graphdef(module), replace(base, params=jax.eval_shape(read, base.params)), adapters


def counted(function: Any, *shapes: Any) -> dict[str, Any]:
    """Bytes of a program on one chip; the temporaries alone where they do not fit."""
    import tpu_compile

    try:
        compiled = tpu_compile.one_chip(function, *shapes)
    except jax.errors.JaxRuntimeError as error:
        if (needed := re.search(r"HLO temporaries \(([\d.]+)G\)", str(error))) is None:
            raise
        return {"temporaries": int(float(needed[1]) * 2**30)}
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
    }


def fits(row: Mapping[str, Any]) -> bool:
    """Whether the program that `counted` speaks of fits on the chip."""
    return "arguments" in row and row["arguments"] + row["temporaries"] <= HBM * 2**30


def writing(definition: Any, base: Base, adapters: Any, batch: Batch) -> dict[str, Any]:
    """π = base + A and π_ref = base write, their rows in one pass."""
    shape, rows = jax.ShapeDtypeStruct, (batch.prompts, batch.completions)

    def draw(params: Any, adapters: Any, tokens: Any, lengths: Any, beta: Any, key: Any, ids: Any) -> Any:
        both = replace(base, params=params).adapted(adapters, None)
        return generate_jit(
            definition, both, None, None, tokens, lengths, beta, jax.random.wrap_key_data(key), ids,
            eos_id=1, max_new_tokens=batch.new_tokens, num_valid_tokens=None, temperature=1.0, stacked=True,
        )  # fmt: skip

    return counted(
        draw, base.params, adapters, shape((batch.prompts, batch.prompt_tokens), jnp.int32),
        shape((batch.prompts,), jnp.int32), shape(rows, jnp.float32), shape((2,), jnp.uint32), shape(rows, jnp.int32),
    )  # fmt: skip


def learning(definition: Any, base: Base, adapters: Any, remat: Any, accumulation: int) -> dict[str, Any]:
    """An update of the adapters."""
    config = TrainConfig(
        algorithm="ipo-md", batch_size=BATCH.prompts, max_prompt_tokens=BATCH.prompt_tokens,
        max_new_tokens=BATCH.new_tokens, optimizer="adamw", adapter=ADAPTER, dtype="bfloat16", remat=remat,
        gradient_accumulation=accumulation,
    )  # fmt: skip
    optimizer = optimizers.build(config)
    opt_state = jax.eval_shape(lambda x: optimizers.initial_state(optimizer, x), adapters)
    arguments, settings = update_arguments(config, definition, adapters, opt_state, base, base.params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), arguments[3:])

    def step(params: Any, adapters: Any, opt_state: Any, pairs: Any, scale: Any) -> Any:
        here = settings | {"base": replace(base, params=params)}
        return update.update(definition, adapters, opt_state, pairs, scale, **here)

    return counted(step, base.params, adapters, opt_state, *shapes)


def text(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# A step with adapters on one TPU v5e, compiled",
        "",
        f"`{report['command']}` on {report['machine']}.",
        "",
        "Llama-3.2-1B, rank-16 adapters on all kernels of the layers, AdamW, products in bfloat16:",
        f"{BATCH}.",
        f"A program may use {HBM} GiB. Where it does not fit, the arguments are the parameters alone and the",
        "temporaries what the compiler asked for.",
        "",
        "| Program | arguments, GiB | temporaries, GiB | fits |",
        "| --- | --- | --- | --- |",
    ]
    for row in report["programs"]:
        arguments = row.get("arguments", report["held"])
        cells = f"{arguments / 2**30:.2f} | {row['temporaries'] / 2**30:.2f}"
        lines.append(f"| {row['program']} | {cells} | {'yes' if fits(row) else 'no'} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update bench/results/one_chip.md and .json")
    options = parser.parse_args()
    tpu_compiler.prepare()
    definition, base, adapters = parts(MODEL)
    programs = [{"program": "writing, π and π_ref in one pass"} | writing(definition, base, adapters, BATCH)]
    for remat in REMATS:
        for accumulation in (1, 4):
            whole = "" if accumulation == 1 else f", the batch in {accumulation} parts"
            row = {"program": f'learning, remat = "{remat}"{whole}'}
            programs.append(row | learning(definition, base, adapters, remat, accumulation))
    report = {
        "command": "python bench/one_chip.py --write",
        "machine": machine.name("jax", "libtpu"),
        "held": size(base.params),
        "programs": programs,
    }
    print(text(report))
    if options.write:
        machine.record("one_chip", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
