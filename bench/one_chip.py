"""What a step with adapters needs of one TPU v5e, counted by its compiler. The chip is not there: nothing is timed.

    python bench/one_chip.py --write

writes bench/results/one_chip.json and .md: memory of writing, and of learning by the settings `remat` and
`gradient_accumulation`.
"""

import argparse
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
from flax import nnx

from fastpref import AdapterConfig, LanguageModel, TrainConfig
from fastpref.learning import optimizers, update
from fastpref.learning.memory import size, update_arguments
from fastpref.models import DecoderConfig
from fastpref.models.adapters import Base, adapt
from fastpref.models.huggingface import abstract_module
from fastpref.models.lowrank import in_dtype
from fastpref.models.rope import RopeScaling
from fastpref.sampling.generate import generate_jit

sys.path.append(str(Path(__file__).parent.parent / "tests"))
MODEL = DecoderConfig(
    vocab_size=128256, width=2048, hidden=8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied=True,
    rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
)  # fmt: skip
PROMPTS, COMPLETIONS, PROMPT_TOKENS, NEW_TOKENS = 32, 2, 512, 128
HBM = 15.75
"""GiB of a v5e that a program may use."""
REMATS = ("none", "layers", "all")


def parts() -> tuple[Any, Base, Any]:
    """GraphDef, base and adapters of the model, as shapes in the dtypes of a run."""
    from small import tokenizer

    module = abstract_module(MODEL)
    definition, params = nnx.split(module)
    bases: list[Base] = []

    def initial() -> Any:
        base, adapters = adapt(LanguageModel(module, tokenizer()), AdapterConfig(rank=16), seed=0)
        bases.append(base)
        return adapters

    adapters = jax.eval_shape(initial)
    return definition, replace(bases[0], params=jax.eval_shape(lambda x: in_dtype(x, jnp.bfloat16), params)), adapters


def counted(function: Any, *shapes: Any) -> dict[str, Any]:
    """Bytes and flops of a program on one chip, or the bytes that it lacks."""
    import tpu_compile

    try:
        compiled = tpu_compile.one_chip(function, *shapes)
    except jax.errors.JaxRuntimeError as error:
        if (needed := re.search(r"HLO temporaries \(([\d.]+)G\)", str(error))) is None:
            raise
        return {"temporaries": int(float(needed[1]) * 2**30)}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
    }


def writing(definition: Any, base: Base, adapters: Any) -> dict[str, Any]:
    shape, rows = jax.ShapeDtypeStruct, (PROMPTS, COMPLETIONS)

    def draw(params: Any, adapters: Any, tokens: Any, lengths: Any, beta: Any, key: Any, ids: Any) -> Any:
        both = replace(base, params=params).adapted(adapters, None)
        return generate_jit(
            definition, both, None, None, tokens, lengths, beta, jax.random.wrap_key_data(key), ids,
            eos_id=1, max_new_tokens=NEW_TOKENS, num_valid_tokens=None, temperature=1.0, stacked=True,
        )  # fmt: skip

    return counted(
        draw, base.params, adapters, shape((PROMPTS, PROMPT_TOKENS), jnp.int32), shape((PROMPTS,), jnp.int32),
        shape(rows, jnp.float32), shape((2,), jnp.uint32), shape(rows, jnp.int32),
    )  # fmt: skip


def learning(definition: Any, base: Base, adapters: Any, remat: Any, accumulation: int) -> dict[str, Any]:
    config = TrainConfig(
        algorithm="ipo-md", batch_size=PROMPTS, max_prompt_tokens=PROMPT_TOKENS, max_new_tokens=NEW_TOKENS,
        optimizer="adamw", adapter=AdapterConfig(rank=16), dtype="bfloat16", remat=remat,
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
        f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens × {COMPLETIONS} × {NEW_TOKENS}.",
        f"A program may use {HBM} GiB. Where it does not fit, the arguments are the parameters alone and the",
        "temporaries what the compiler asked for. It counts one turn of each loop, so that no time is derived",
        "from its flops and bytes.",
        "",
        "| Program | arguments, GiB | temporaries, GiB | fits |",
        "| --- | --- | --- | --- |",
    ]
    for row in report["programs"]:
        arguments = row.get("arguments", report["held"])
        fits = "flops" in row and arguments + row["temporaries"] <= HBM * 2**30
        cells = f"{arguments / 2**30:.2f} | {row['temporaries'] / 2**30:.2f}"
        lines.append(f"| {row['program']} | {cells} | {'yes' if fits else 'no'} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update bench/results/one_chip.md and .json")
    options = parser.parse_args()
    sys.path.append(str(Path(sys.prefix) / "libtpu"))
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    definition, base, adapters = parts()
    programs = [{"program": "writing, π and π_ref in one pass"} | writing(definition, base, adapters)]
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
