"""Sampler, loss and divergence against the same work in ordinary JAX, and against its products alone, in one run.

    python bench/bench_kernels.py

times everything and writes bench/results/kernels_cpu.json and .md. Every round times each side once, one after the
other, so that a ratio compares neighbours in time; medians and quartiles are those of the rounds.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from cases import DIVERGENCE, LOSS, SAMPLER, VOCAB, WIDTH, DivergenceCase, LossCase, SamplerCase

from fastpref.kernels import Head, divergence, mixture_sample, preference_loss
from fastpref.method import losses

ROUNDS, WARMUP = {"sampler": 41, "loss": 11, "divergence": 11}, 1
Sides = dict[str, tuple[Any, tuple[Any, ...]]]
"""Compiled function and arguments of each contender; the first is ours."""


def normal(shape: tuple[int, ...], seed: int, dtype: str) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * shape[-1] ** -0.5
    return jnp.asarray(values).astype(dtype)


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Any, tuple[Any, ...]]:
    return jax.jit(function).lower(*arguments).compile(), arguments


def sampler_sides(case: SamplerCase) -> Sides:
    shape = (VOCAB, WIDTH) if case.vocab_axis == 0 else (WIDTH, VOCAB)
    weights = [normal(shape, seed, case.dtype) for seed in (0, 1)]
    hidden = [normal((case.rows, WIDTH), seed, case.dtype) * 20 for seed in (2, 3)]
    arguments = (*hidden, weights[0]) if case.shared else (*hidden, *weights)
    contract = 1 - case.vocab_axis

    def ours(policy: jax.Array, ref: jax.Array, weight: jax.Array, *other: jax.Array) -> Any:
        head = Head(weight, case.vocab_axis)
        ref_head = Head(other[0], case.vocab_axis) if other else head
        rows = jnp.arange(case.rows)
        return mixture_sample(
            policy, head, ref, ref_head, mixture_beta=0.125, key=jax.random.key(0), row_ids=rows, step=0
        )

    def logits(states: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.dot_general(states, weight, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32)

    def by_token(states: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.dot_general(weight, states, (((contract,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def both(product: Callable[..., jax.Array], policy: jax.Array, ref: jax.Array, *weights: jax.Array) -> Any:
        return product(policy, weights[0]), product(ref, weights[-1])

    def ordinary(product: Callable[..., jax.Array], axis: int, *arguments: jax.Array) -> Any:
        one, two = (jax.nn.log_softmax(array, axis) for array in both(product, *arguments))
        token = jax.random.categorical(jax.random.key(0), 0.875 * one + 0.125 * two, axis)
        return token, *(jnp.take_along_axis(logps, jnp.expand_dims(token, axis), axis) for logps in (one, two))

    return {
        "mixture_sample": compiled(ours, *arguments),
        "two products": compiled(partial(both, logits), *arguments),
        "two products, vocabulary first": compiled(partial(both, by_token), *arguments),
        "ordinary JAX": compiled(partial(ordinary, logits, 1), *arguments),
        "ordinary JAX, vocabulary first": compiled(partial(ordinary, by_token, 0), *arguments),
    }


def segments_of(case: LossCase) -> jax.Array:
    if case.lengths == "equal":
        return jnp.repeat(jnp.arange(2 * case.pairs), case.rows // (2 * case.pairs))
    random = np.random.default_rng(4)
    share = random.dirichlet(np.full(2 * case.pairs, 4.0))
    ids = np.sort(random.choice(2 * case.pairs, case.rows, p=share))
    return jnp.asarray(np.where(random.random(case.rows) < 0.25, -1, ids))


def loss_sides(case: LossCase) -> Sides:
    weight, hidden = normal((VOCAB, WIDTH), 0, case.dtype), normal((case.rows, WIDTH), 1, case.dtype) * 20
    targets = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, case.rows))
    segments, pairs = segments_of(case), case.pairs
    ref_logps, preference = jnp.full((pairs, 2), -600.0), jnp.full((pairs,), 0.7)
    ipo = losses.bind(losses.ipo, tau=0.1)

    def ordinary(hidden: jax.Array, weight: jax.Array, targets: jax.Array, segments: jax.Array) -> jax.Array:
        logits = jax.lax.dot_general(hidden, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
        sums = jax.ops.segment_sum(jnp.where(segments < 0, 0.0, logps), segments, 2 * pairs).reshape(pairs, 2)
        margin = sums - ref_logps
        return jnp.mean(ipo(margin[:, 0] - margin[:, 1], preference))

    def ours(hidden: jax.Array, weight: jax.Array, targets: jax.Array, segments: jax.Array) -> jax.Array:
        return preference_loss(
            hidden, Head(weight), targets, segments, ref_logps, preference, loss=ipo, frozen_head=case.frozen_head
        ).loss

    wanted = 0 if case.frozen_head else (0, 1)
    arguments = (hidden, weight, targets, segments)
    return {
        "preference_loss": compiled(jax.value_and_grad(ours, wanted), *arguments),
        "ordinary JAX": compiled(jax.value_and_grad(ordinary, wanted), *arguments),
    }


def divergence_sides(case: DivergenceCase) -> Sides:
    weights = [normal((VOCAB, WIDTH), seed, case.dtype) for seed in (0, 1)]
    hidden = [normal((case.rows, WIDTH), seed, case.dtype) * 20 for seed in (2, 3)]
    where = jnp.asarray(np.random.default_rng(4).random(case.rows) >= case.ignored)

    def ours(hidden: jax.Array, ref_hidden: jax.Array, where: jax.Array, *weights: jax.Array) -> Any:
        heads = [Head(weight) for weight in weights]
        return divergence(hidden, heads[0], ref_hidden, heads[-1], where=where)

    def logps(states: jax.Array, weight: jax.Array) -> jax.Array:
        product = jax.lax.dot_general(states, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(product)

    def ordinary(hidden: jax.Array, ref_hidden: jax.Array, where: jax.Array, *weights: jax.Array) -> Any:
        policy, ref = logps(hidden, weights[0]), logps(ref_hidden, weights[-1])
        probability = jnp.exp(policy)
        kl, entropy = (probability * (policy - ref)).sum(1), -(probability * policy).sum(1)
        return jnp.where(where, kl, 0.0), jnp.where(where, entropy, 0.0)

    arguments = (*hidden, where, *weights[: 1 if case.shared else 2])
    return {"divergence": compiled(ours, *arguments), "ordinary JAX": compiled(ordinary, *arguments)}


def timed(function: Any, arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def measure(benchmark: Any, sides: Sides, rounds: int, info: dict[str, Any]) -> None:
    """Time our side by the benchmark's clock, and in each round's set-up every other side."""
    (ours, (function, arguments)), *others = sides.items()
    for side in sides.values():
        timed(*side)
    times: dict[str, list[float]] = {name: [] for name, _ in others}

    def setup() -> None:
        for name, side in others:
            times[name].append(timed(*side))

    benchmark.pedantic(
        lambda: jax.block_until_ready(function(*arguments)), setup=setup, rounds=rounds, warmup_rounds=WARMUP
    )
    info["temporary_bytes"] = {name: side.memory_analysis().temp_size_in_bytes for name, (side, _) in sides.items()}
    if benchmark.enabled:
        kept = {ours: list(benchmark.stats.stats.data)} | {name: values[-rounds:] for name, values in times.items()}
        info["seconds"] = {name: np.percentile(values, [25, 50, 75]).tolist() for name, values in kept.items()}
        info["ratio"] = {
            name: np.percentile(np.divide(kept[ours], kept[name]), [25, 50, 75]).tolist() for name in times
        }
    benchmark.extra_info.update(info)


@pytest.mark.parametrize("case", SAMPLER, ids=lambda case: case.name)
def test_sampler(case: SamplerCase, benchmark: Any) -> None:
    heads = 1 if case.shared else 2
    read = heads * VOCAB * WIDTH * jnp.dtype(case.dtype).itemsize
    info = {"kernel": "mixture_sample", "case": case.name, "bytes": read}
    measure(benchmark, sampler_sides(case), ROUNDS["sampler"], info | {"flops": 4 * case.rows * VOCAB * WIDTH})


@pytest.mark.parametrize("case", LOSS, ids=lambda case: case.name)
def test_loss(case: LossCase, benchmark: Any) -> None:
    products = 2 if case.frozen_head else 3
    scored = int((segments_of(case) >= 0).sum())
    info = {"kernel": "preference_loss", "case": case.name, "bytes": 2 * VOCAB * WIDTH * 4}
    info |= {"flops": products * 2 * scored * VOCAB * WIDTH}
    measure(benchmark, loss_sides(case), ROUNDS["loss"], info)


@pytest.mark.parametrize("case", DIVERGENCE, ids=lambda case: case.name)
def test_divergence(case: DivergenceCase, benchmark: Any) -> None:
    scored, heads = round(case.rows * (1 - case.ignored)), 1 if case.shared else 2
    read = heads * VOCAB * WIDTH * jnp.dtype(case.dtype).itemsize
    info = {"kernel": "divergence", "case": case.name, "bytes": read, "flops": 4 * scored * VOCAB * WIDTH}
    measure(benchmark, divergence_sides(case), ROUNDS["divergence"], info)


def milliseconds(quartiles: list[float]) -> str:
    low, median, high = (1e3 * value for value in quartiles)
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def against(ratio: list[float], limit: float) -> str:
    low, median, high = ratio
    return f"{median:.2f} ({low:.2f} to {high:.2f}) | {verdict(median, limit)}"


def verdict(value: float, limit: float) -> str:
    return f"{'yes' if value <= limit else 'no'}, at most {limit:.2f}"


def table(
    entries: list[dict[str, Any]], cases: Sequence[SamplerCase | LossCase | DivergenceCase], rates: dict[str, float]
) -> list[str]:
    limits = {case.name: case for case in cases}
    lines = []
    for entry in entries:
        case = limits[entry["case"]]
        floor = max(entry["flops"] / rates["float32_flops"], entry["bytes"] / rates["bytes_per_second"])
        lines += [
            f"**{entry['case']}**",
            "",
            "| what | ms, median (quartiles) | kernel's time over this | within the limit | temporary memory |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, seconds in entry["seconds"].items():
            ratio = against(entry["ratio"][name], case.limits[name]) if name in entry["ratio"] else " | "
            memory = entry["temporary_bytes"][name]
            share = ""
            if isinstance(case, LossCase) and name not in entry["ratio"]:
                share = memory / entry["temporary_bytes"]["ordinary JAX"]
                share = f", {share:.2f} of ordinary JAX: {verdict(share, case.memory_limit)}"
            lines.append(f"| {name} | {milliseconds(seconds)} | {ratio} | {memory / 1e6:.1f} MB{share} |")
        lines += [f"| floor in float32 | {1e3 * floor:.1f} | | | |", ""]
    return lines


def text(report: dict[str, Any]) -> str:
    entries, rates = report["results"], report["rates"]
    lines = [
        "# Kernels on a CPU",
        "",
        f"`{report['command']}` on {report['machine']}; {machine.described(report)}. A square float32 product of 2048 "
        f"reaches {rates['float32_flops'] / 1e9:.0f} GF/s, a dot product of two long vectors reads "
        f"{rates['bytes_per_second'] / 1e9:.0f} GB/s: floors are flops or bytes over these. Limits are those of "
        "`bench/cases.py`.",
        "",
        f"## mixture_sample, D = {WIDTH}, V = {VOCAB}",
        "",
        "Ordinary JAX: two log-softmaxes, their mixture, `jax.random.categorical`, two gathers. The kernel returns the "
        "mixture's log-prob as well. Two products: the logits alone, in float32, nothing drawn from them. Logits are "
        "[B, V] or, vocabulary first, [V, B].",
        "",
        *table([entry for entry in entries if entry["kernel"] == "mixture_sample"], SAMPLER, rates),
        f"## preference_loss, forward and backward, D = {WIDTH}, V = {VOCAB}",
        "",
        "Ordinary JAX: log-softmax of all logits, gather, segment sums, IPO, differentiated. Memory is what the "
        "compiler sets aside beside arguments and results.",
        "",
        *table([entry for entry in entries if entry["kernel"] == "preference_loss"], LOSS, rates),
    ]
    if apart := [entry for entry in entries if entry["kernel"] == "divergence"]:
        lines += [
            f"## divergence, D = {WIDTH}, V = {VOCAB}",
            "",
            "Ordinary JAX: two log-softmaxes of all logits, KL and entropy from them, ignored rows like the others.",
            "",
            *table(apart, DIVERGENCE, rates),
        ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Time everything and write the results."""
    before = machine.require_quiet()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        # The project's own options check types at every call, which would be timed too.
        arguments = [__file__, "-q", "-o", "addopts=", f"--benchmark-json={raw}"]
        code = subprocess.run([sys.executable, "-m", "pytest", *arguments]).returncode
        if code:
            return code
        entries = [entry["extra_info"] for entry in json.loads(raw.read_text())["benchmarks"]]
    report = {
        "command": "python bench/bench_kernels.py",
        "machine": machine.name("jax", "jaxlib", "numpy"),
        "before": before,
        "rates": machine.rates(),
        "results": entries,
        "after": machine.use(),
    }
    machine.record("kernels_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
