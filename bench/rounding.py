"""What becomes of small updates of parameters in bfloat16, rounded to nearest and stochastically: of a real model.

    python bench/rounding.py

makes 32 updates of each kernel of SmolLM2-135M-Instruct, of the size of a learning rate and of one direction a
parameter, as AdamW's are while gradients agree, and writes bench/results/rounding.json and .md. Nothing is timed.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
from flax import nnx

from fastpref.demo.smollm2 import checkpoint
from fastpref.learning.optimizers import apply
from fastpref.models import load
from fastpref.models.int8 import KERNELS

RATES, UPDATES = (1e-6, 1e-5, 1e-4), 32
HOW = {"nearest": False, "stochastic": True}


def measure(kernels: dict[str, jax.Array], rate: float, stochastic: bool) -> dict[str, float]:
    """Share of parameters that moved at all, and share of the updates' sum that arrived."""
    chain = optax.sgd(rate)

    @jax.jit
    def updated(params: Any, directions: Any, state: Any, key: jax.Array) -> Any:
        return apply(chain, directions, state, params, key=key if stochastic else None)[0]

    moved = arrived = entries = 0.0
    for number, kernel in enumerate(kernels.values()):
        key = jax.random.fold_in(jax.random.key(0), number)
        start = {"kernel": kernel.astype(jnp.bfloat16)}
        directions = {"kernel": jax.random.rademacher(key, kernel.shape, jnp.float32)}
        params, state = start, chain.init(start)
        for step in range(UPDATES):
            params = updated(params, directions, state, jax.random.fold_in(key, step))
        before, after, way = (np.asarray(x["kernel"], np.float64) for x in (start, params, directions))
        moved += (before != after).sum()
        arrived += ((before - after) * way).sum()
        entries += before.size
    return {"moved": moved / entries, "arrived": arrived / entries / (rate * UPDATES)}


def text(report: dict[str, Any]) -> str:
    lines = [
        "# Updates of parameters in bfloat16",
        "",
        f"`{report['command']}` on {report['machine']}. {report['updates']} updates of the size of the learning rate, "
        f"each parameter in one direction, of the {report['kernels']} kernels of SmolLM2-135M-Instruct.",
        "",
        "| Learning rate | Rounding | Parameters that moved | Share of the updates that arrived |",
        "| --- | --- | --- | --- |",
    ]
    for case in report["cases"]:
        lines.append(f"| {case['rate']:g} | {case['rounding']} | {case['moved']:.1%} | {case['arrived']:.1%} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Measure and record."""
    params = nnx.to_flat_state(nnx.state(load(checkpoint()).module))
    kernels = {str(path): variable[...] for path, variable in params if path[-1] in (*KERNELS, "embedding")}
    cases = [
        {"rate": rate, "rounding": name} | measure(kernels, rate, stochastic)
        for rate in RATES
        for name, stochastic in HOW.items()
    ]
    report = {
        "command": "python bench/rounding.py",
        "machine": machine.name("jax", "jaxlib", "optax"),
        "updates": UPDATES,
        "kernels": sum(len(kernel) if kernel.ndim == 3 else 1 for kernel in kernels.values()),
        "cases": cases,
    }
    machine.record("rounding", report, text(report))
    print(text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
