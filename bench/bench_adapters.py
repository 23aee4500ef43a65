"""Training an adapter beside training all parameters, on the demo's chat model: steps, decoding, checkpoints.

    python bench/bench_adapters.py --write

writes bench/results/adapters_cpu.json and .md. Steps are those of bench_peers.py: every side is a process of its own,
and the sides take turns. Decoding and saving take turns too, in one process.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
from bench_peers import COMPLETIONS, SIDE, Match, Side, played, require_same_work, spread, summary
from flax import nnx
from peers_side import MAX_GRAD_NORM, MIXTURE_BETA, QUESTIONS, TAU

from fastpref import AdapterConfig, LanguageModel, TrainConfig, load
from fastpref.data import ChatTemplate
from fastpref.demo.smollm2 import checkpoint
from fastpref.learning import optimizers
from fastpref.models.adapters import adapt
from fastpref.runs import checkpoints
from fastpref.sampling.generate import padded_width, sample

RANK = 16
MATCH = Match(
    "chat",
    8,
    48,
    1e-5,
    warmup=1,
    rounds=5,
    sides=(
        Side("all parameters", "ours", "ipo-md", "mixture, mixture"),
        *(
            Side(
                f"adapter of rank {RANK}{f', the batch in {parts} parts' if parts > 1 else ''}",
                "ours",
                "ipo-md",
                "mixture, mixture",
                rank=RANK,
                parts=parts,
            )
            for parts in (1, 2, 4)
        ),
    ),
)
ROWS, NEW_TOKENS, ROUNDS, SAVES = (8, 16, 32), 48, 5, 5
RANKS = (8, RANK)
"""Of the adapters whose checkpoints are measured."""
LIMITS = {
    "step": 0.55,
    "peak memory, GB": 0.4 * 5.5,
    "decoding": {"8": 1.6, "16": 1.5, "32": 1.3},
    "checkpoint bytes": 0.03,
    "seconds of a save": 0.3,
}
"""What is asked of adapters: ratios, and figures where a unit stands."""


def noise_like(tree: Any, seed: int) -> Any:
    """A tree of random numbers of the same shapes: zeros would be compressed, and models with zero adapters alike."""
    random, (leaves, structure) = np.random.default_rng(seed), jax.tree.flatten(tree)

    def drawn(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(0.02 * random.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree.unflatten(structure, [drawn(leaf) for leaf in leaves])


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round, after a first call that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def steps(match: Match) -> dict[str, Any]:
    """A training step of every side, and the peak memory of each."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / match.model
        subprocess.run([sys.executable, str(SIDE), match.model, str(folder)], check=True)
        sides = played(match, {"ours": sys.executable}, folder)
    require_same_work(match, sides)
    laps = [[step["laps"] for step in side["steps"][match.warmup :]] for side in sides]
    made = summary(match, sides)
    for side, each in zip(made["sides"], laps, strict=True):
        side["laps"] = {name: spread([lap[name] for lap in each]) for name in each[0]}
    return made


def decoding(model: LanguageModel, rows: int, rates: Mapping[str, float]) -> dict[str, Any]:
    """Seconds in which policy and reference write, stacked and apart; of the steps of decoding alone, and of all.

    The floor is that of products and weights alone: the larger of flops and bytes over the machine's rates.
    """
    base, adapters = adapt(model, AdapterConfig(rank=RANK), seed=0)
    definition, params = nnx.graphdef(model.module), base.adapted(noise_like(adapters, 0))
    template, prompts = ChatTemplate.of(model.tokenizer), rows // COMPLETIONS
    texts = [template.prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    encoded = model.tokenizer.encode_prompts([texts[number % len(texts)] for number in range(prompts)])
    tokens = np.zeros((prompts, padded_width(encoded, 512)), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    shape = (prompts, COMPLETIONS)

    def write(reference: Any, new_tokens: int) -> Any:
        return sample(
            definition,
            params,
            definition,
            reference,
            tokens,
            np.asarray(list(map(len, encoded)), np.int32),
            np.full(shape, MIXTURE_BETA, np.float32),
            jax.random.key(0),
            np.arange(rows, dtype=np.int32).reshape(shape),
            eos_id=None,
            max_new_tokens=new_tokens,
            num_valid_tokens=None,
            temperature=1.0,
        )

    # Arrays of its own are what keeps a reference from being stacked.
    references = {"stacked": base.params, "apart": jax.tree.map(jnp.copy, base.params)}
    runs = {
        f"{name}, {new_tokens}": partial(write, reference, new_tokens)
        for new_tokens in (1, NEW_TOKENS)
        for name, reference in references.items()
    }
    drawn = [np.asarray(runs[f"{name}, {NEW_TOKENS}"]().lengths) for name in references]
    assert all((lengths == NEW_TOKENS).all() for lengths in drawn)
    seconds = in_turn(runs, ROUNDS)
    size = sum(leaf.size for leaf in jax.tree.leaves(base.params)) * (NEW_TOKENS - 1)
    flops = 2 * size * 2 * rows / rates["float32_flops"]
    floor = {
        name: max(flops, 4 * size * times / rates["bytes_per_second"]) for name, times in (("stacked", 1), ("apart", 2))
    }
    entry: dict[str, Any] = {"rows": rows, "prompt tokens": int(tokens.shape[1]), "floor": floor}
    for what, subtracted in (("decoding", 1), ("with the prompts", None)):
        each = {
            name: [
                full - (0 if subtracted is None else first)
                for full, first in zip(seconds[f"{name}, {NEW_TOKENS}"], seconds[f"{name}, 1"], strict=True)
            ]
            for name in references
        }
        entry[what] = {name: spread(values) | {"each": values} for name, values in each.items()}
        entry[what]["ratio"] = spread(
            [apart / both for apart, both in zip(each["apart"], each["stacked"], strict=True)]
        )
    return entry


def saving(model: LanguageModel) -> list[dict[str, Any]]:
    """Bytes and seconds of a checkpoint of each side: what is trained, and the state of AdamW."""
    optimizer = optimizers.build(TrainConfig(optimizer="adamw", max_grad_norm=MAX_GRAD_NORM))
    trained = {"all parameters": nnx.state(model.module)}
    for rank in RANKS:
        trained[f"adapter of rank {rank}"] = adapt(model, AdapterConfig(rank=rank), seed=0)[1]
    entries = []
    for name, params in trained.items():
        arrays = noise_like((params, optimizers.initial_state(optimizer, params), ()), 1)
        with tempfile.TemporaryDirectory() as folder:
            save = partial(checkpoints.save, folder, arrays=arrays, extra={}, fingerprint={}, keep=1)
            numbers = count(1)
            seconds = in_turn({name: lambda save=save, numbers=numbers: save(step=next(numbers))}, SAVES)[name]
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        entries.append({"name": name, "bytes": size, "seconds": spread(seconds) | {"each": seconds}})
    return entries


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def shown(values: Mapping[str, Any], digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} ({values['least']:.{digits}f} to {values['most']:.{digits}f})"


def text(report: Mapping[str, Any]) -> str:
    steps, limits, rates = report["steps"], report["limits"], report["rates"]
    whole, *_ = steps["sides"]
    laps = [name for name in ("time/generate", "time/learn") if name in whole["laps"]]
    parts = ("decoding", "with the prompts")
    heaviest = report["checkpoints"][0]["bytes"]
    return "\n".join(
        [
            "# Adapters beside all parameters on a CPU",
            "",
            f"`{report['command']}` on {report['machine']}; {machine.described(report)}.",
            "",
            f"SmolLM2-135M-Instruct in float32, {steps['prompts']} questions in its chat template "
            f"({steps['prompt_tokens']} tokens together), {COMPLETIONS} × {steps['new_tokens']} new tokens each; "
            f"adapters on every kernel of the layers. `ipo-md`, τ = {TAU}, weight of the reference {MIXTURE_BETA}, "
            f"AdamW, gradients clipped to norm {MAX_GRAD_NORM:g}. Sides take turns; medians, with least and most.",
            "",
            f"**A training step**, {steps['rounds']} of them after {steps['warmup']} that do not count; each side in a "
            "process of its own, whose peak memory is that of all it did, compiling included. Asked for: at most "
            f"{limits['step']} of the seconds, and at most {limits['peak memory, GB']:.1f} GB.",
            "",
            *table(
                ["what is trained", "s a step", "of the first row", *laps, "CPU s", "first step, s", "peak memory, GB"],
                [
                    [
                        side["name"],
                        shown(side["seconds"]),
                        # Recorded the other way round: the first row's seconds over the side's.
                        f"{1 / side['ratio']['median']:.2f}",
                        *(shown(side["laps"][name]) for name in laps),
                        f"{side['cpu_seconds']['median']:.1f}",
                        f"{side['first_seconds']:.0f}",
                        f"{side['peak_rss_bytes'] / 1e9:.2f}",
                    ]
                    for side in steps["sides"]
                ],
            ),
            f"**Decoding by policy and reference**, {NEW_TOKENS} tokens of each row: the rows of both in every product "
            "with a weight of the base, and two passes one after the other. Decoding alone is the difference to a call "
            "that writes one token; the other ratio is of the whole call, whose prompts are read by products that have "
            "rows enough either way. The floor is the larger of flops and bytes of the weights, over the machine's "
            f"rates ({rates['float32_flops'] / 1e9:.0f} Gflop/s, {rates['bytes_per_second'] / 1e9:.0f} GB/s): where "
            "flops decide, no pass that is saved could make both sides differ.",
            "",
            *table(
                [
                    "rows",
                    "asked for",
                    "floor: stacked, s",
                    "floor: apart, s",
                    *(f"{part}: {what}" for part in parts for what in ("stacked, s", "apart, s", "ratio")),
                ],
                [
                    [
                        str(entry["rows"]),
                        str(limits["decoding"][str(entry["rows"])]),
                        *(f"{entry['floor'][name]:.2f}" for name in ("stacked", "apart")),
                        *(shown(entry[part][name]) for part in parts for name in ("stacked", "apart", "ratio")),
                    ]
                    for entry in report["decoding"]
                ],
            ),
            f"**Checkpoints**: what is trained with the state of AdamW, random numbers in all of it; {SAVES} saves. "
            f"Asked for: at most {limits['checkpoint bytes']:.0%} of the bytes, in under "
            f"{limits['seconds of a save']} s.",
            "",
            *table(
                ["what is trained", "bytes", "of the first row", "s a save"],
                [
                    [
                        entry["name"],
                        f"{entry['bytes']:,}".replace(",", " "),
                        f"{entry['bytes'] / heaviest:.1%}",
                        shown(entry["seconds"], 3),
                    ]
                    for entry in report["checkpoints"]
                ],
            ),
        ]
    )


def main() -> int:
    """Time all sides; record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="write bench/results/adapters_cpu.json and .md")
    choice.add_argument("--smoke", action="store_true", help="few tokens and one step, to see that it runs")
    options = parser.parse_args()
    before = machine.require_quiet() if options.write else machine.use()
    smaller = {"prompts": 4, "new_tokens": 4, "warmup": 0, "rounds": 1} if options.smoke else {}
    made = steps(MATCH._replace(**smaller))
    model, rates = load(checkpoint()), machine.rates()
    report = {
        "command": " ".join(["python bench/bench_adapters.py", *sys.argv[1:]]),
        "machine": machine.name("jax", "jaxlib", "flax", "optax", "numpy"),
        "before": before,
        "limits": LIMITS,
        "rates": rates,
        "steps": made,
        "decoding": [decoding(model, rows, rates) for rows in (ROWS[:1] if options.smoke else ROWS)],
        "checkpoints": saving(model),
        "after": machine.use(),
    }
    print(text(report))
    if options.write:
        machine.record("adapters_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
