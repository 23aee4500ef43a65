"""What an int8 base costs and saves: its distance from the float one, and decoding 8B on one TPU chip, compiled.

    python bench/int8_distance.py --write

Distances are those of next-token distributions of a real chat model along English text, exact over the vocabulary. The
chip is not there: bytes are the compiler's (`libtpu`), and nothing is timed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import tpu_compiler
from flax import nnx
from one_chip import HBM, Batch, fits, parts, writing

from fastpref.demo import smollm2
from fastpref.kernels import divergence
from fastpref.learning.learner import cast_once
from fastpref.learning.memory import size
from fastpref.models import DecoderConfig, load, quantized
from fastpref.models.policy import hidden_states

ROOT = Path(__file__).parent.parent
LLAMA_8B = DecoderConfig(vocab_size=128256, width=4096, hidden=14336, layers=32, heads=32, kv_heads=8, head_dim=128)
BATCH = Batch(8, 2, 512, 128)
BANDWIDTH = 819e9
"""Of a v5e: bytes per second."""


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
    definition, base, adapters = parts(LLAMA_8B, base_dtype)
    held = size((base.params, adapters))
    embedding = LLAMA_8B.vocab_size * LLAMA_8B.width * 2
    row = {"base": base_dtype, "held": held, "read": held - embedding}
    return row | writing(definition, base, adapters, BATCH)


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
        f"Llama-3.1-8B with rank-16 adapters, π and π_ref in one pass, {BATCH} tokens,",
        f"compiled for one v5e ({HBM} GiB); products in bfloat16. The weights alone take so long a token to read.",
        "",
        "| base | parameters, GiB | temporaries, GiB | fits | weights over bandwidth, ms a token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in report["decoding"]:
        used = f"{row['temporaries'] / 2**30:.2f} | {'yes' if fits(row) else 'no'}"
        lines.append(f"| {row['base']} | {row['held'] / 2**30:.2f} | {used} | {1e3 * row['read'] / BANDWIDTH:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update bench/results/int8.md and .json")
    options = parser.parse_args()
    tpu_compiler.prepare()
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
