"""What an int8 base costs and saves: its distance from the float one, and decoding 8B on one TPU chip, compiled.

    python bench/int8_distance.py --write

Distances are those of next-token distributions of a real chat model along English text, exact over the vocabulary. The
chip is not there: bytes are the compiler's (`libtpu`), and nothing is timed.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
from flax import nnx

from fastpref.demo import smollm2
from fastpref.kernels import divergence
from fastpref.learning.learner import cast_once
from fastpref.method.adapter import AdapterConfig
from fastpref.models import DecoderConfig, LanguageModel, load, quantized
from fastpref.models.adapters import Base, adapt
from fastpref.models.huggingface import abstract_module
from fastpref.models.int8 import quantized_params
from fastpref.models.lowrank import in_dtype
from fastpref.models.policy import hidden_states
from fastpref.sampling.generate import generate_jit

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
LLAMA_8B = DecoderConfig(vocab_size=128256, width=4096, hidden=14336, layers=32, heads=32, kv_heads=8, head_dim=128)
PROMPTS, COMPLETIONS, PROMPT_TOKENS, TOKENS = 8, 2, 512, 128
BANDWIDTH, HBM = 819e9, 15.75
"""Of a v5e: bytes per second, and GiB that a program may use."""


def distances(texts: int = 16, length: int = 128) -> list[dict[str, Any]]:
    """Mean and largest KL from the float32 model, and how often the likeliest token is another."""
    model = load(smollm2.checkpoint())
    ids = np.array(model.tokenizer.encode_prompts([(ROOT / "LICENSE").read_text()])[0][: texts * length], np.int32)
    tokens = jnp.asarray(ids.reshape(texts, 1, length))

    @jax.jit
    def states(params: Any) -> jax.Array:
        policy = nnx.merge(nnx.graphdef(model.module), params)
        start = tokens[:, 0, :1]
        return hidden_states(policy, start, jnp.ones(start.shape, bool), tokens[:, :, 1:]).reshape(-1, width)

    width = model.module.head().width
    exact, head = states(nnx.state(model.module)), model.module.head()
    rows = []
    for name, changed, dtype in (
        ("bfloat16", model, "bfloat16"),
        ("int8, float32 products", quantized(model), "float32"),
        ("int8, bfloat16 products", quantized(model), "bfloat16"),
    ):
        params = cast_once(nnx.state(changed.module), dtype=dtype)
        other = nnx.merge(nnx.graphdef(model.module), params)
        hidden, other_head = states(params), other.head()
        kl = divergence(exact, head, hidden, other_head).kl
        best = [jnp.argmax(each.logits(x), axis=1) for x, each in ((exact, head), (hidden, other_head))]
        rows.append(
            {
                "base": name,
                "mean KL": float(kl.mean()),
                "largest KL": float(kl.max()),
                "other token": float((best[0] != best[1]).mean()),
            }
        )
    return rows


def decoding(base_dtype: str) -> dict[str, Any]:
    """Bytes of the program that lets π = base + A and π_ref = base write, their rows in one pass, on one v5e."""
    import tpu_compile
    from small import tokenizer

    module = abstract_module(LLAMA_8B)
    definition, params = nnx.split(module)
    bases: list[Base] = []

    def initial() -> Any:
        base, adapters = adapt(LanguageModel(module, tokenizer()), AdapterConfig(), seed=0)
        bases.append(base)
        return adapters

    def both(params: Any, adapters: Any) -> Any:
        params = in_dtype(params, jnp.bfloat16)
        params = quantized_params(params) if base_dtype == "int8" else params
        return replace(bases[0], params=params).adapted(adapters, None)

    shapes = jax.eval_shape(both, params, jax.eval_shape(initial))
    shape, rows = jax.ShapeDtypeStruct, (PROMPTS, COMPLETIONS)

    def draw(both: Any, tokens: Any, lengths: Any, beta: Any, key: Any, ids: Any) -> Any:
        return generate_jit(
            definition, both, None, None, tokens, lengths, beta, jax.random.wrap_key_data(key), ids,
            eos_id=1, max_new_tokens=TOKENS, num_valid_tokens=None, temperature=1.0, stacked=True,
        )  # fmt: skip

    arguments = (
        shape((PROMPTS, PROMPT_TOKENS), jnp.int32), shape((PROMPTS,), jnp.int32), shape(rows, jnp.float32),
        shape((2,), jnp.uint32), shape(rows, jnp.int32),
    )  # fmt: skip
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    embedding = LLAMA_8B.vocab_size * LLAMA_8B.width * 2
    row = {"base": base_dtype, "held": held, "read": held - embedding}
    try:
        memory = tpu_compile.one_chip(draw, shapes, *arguments).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return row | {"error": str(error).partition("HLO module")[0].strip()}
    return row | {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}


def text(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# int8 base",
        "",
        f"`{report['command']}` on {report['machine']}.",
        "",
        "Distance of next-token distributions from the float32 model, SmolLM2-135M-Instruct along 2032 tokens of",
        "English text; a scale for each output of each kernel and for each token of the tied embedding.",
        "",
        "| base | mean KL, nats | largest KL | another likeliest token |",
        "| --- | --- | --- | --- |",
    ]
    for row in report["distances"]:
        lines.append(f"| {row['base']} | {row['mean KL']:.2e} | {row['largest KL']:.2e} | {row['other token']:.2%} |")
    lines += [
        "",
        f"Llama-3.1-8B with rank-16 adapters, π and π_ref in one pass, {PROMPTS} prompts of {PROMPT_TOKENS} tokens ×",
        f"{COMPLETIONS} × {TOKENS} tokens, compiled for one v5e ({HBM} GiB); products in bfloat16. The weights alone",
        "take so long a token to read.",
        "",
        "| base | parameters, GiB | temporaries, GiB | fits | weights over bandwidth, ms a token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in report["decoding"]:
        used = f"{row['temporaries'] / 2**30:.2f} | yes" if "error" not in row else f"– | no: {row['error']}"
        lines.append(f"| {row['base']} | {row['held'] / 2**30:.2f} | {used} | {1e3 * row['read'] / BANDWIDTH:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update bench/results/int8.md and .json")
    options = parser.parse_args()
    sys.path.append(str(Path(sys.prefix) / "libtpu"))
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    report = {
        "command": "python bench/int8_distance.py --write",
        "machine": machine.name("jax", "libtpu"),
        "distances": distances(),
        "decoding": [decoding(base) for base in ("bfloat16", "int8")],
    }
    print(text(report))
    if options.write:
        machine.record("int8", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
