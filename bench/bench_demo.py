"""The demo from an empty folder, as a visitor runs it: win rate, times and samples, for each of three seeds.

    python bench/bench_demo.py --write
    python bench/bench_demo.py --small --write

runs `fastpref demo` once for each seed, one after the other, and writes bench/results/demo_cpu.json and .md, or
demo_small_cpu.json and .md for `fastpref demo --small`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine

SEEDS = (0, 1, 2)
REFERENCE = {False: "the chat model as it came", True: "the SFT policy"}
FITTED = {False: "reward model", True: "preference model"}
SMALL_REMARK = [
    "A model of this size does not write good summaries: what it gains is form (it begins as a summary begins, ends "
    "with a stop, keeps its length), which a reader of the samples sees at once, and not knowledge of the article."
]


def run(seed: int, small: bool) -> dict[str, Any]:
    """One demo in a process of its own, with nothing kept of an earlier one: download and harvest are timed too."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(sys.executable).with_name("fastpref")
        command = [program, "demo", "--seed", str(seed), "--run-dir", f"{folder}/demo", *(["--small"] if small else [])]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}, check=True)
        total, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        written = Path(folder) / "demo" / ("small" if small else "smollm2") / f"seed-{seed}"
        if not (written / "result.json").exists():
            raise SystemExit("The chat model must be there to be recorded, but received the small demo: see above.")
        result = json.loads((written / "result.json").read_text())
        samples = written / "samples.jsonl"
        shown = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    memory = after.ru_maxrss / 2**20
    return {
        "seed": seed,
        **result,
        "total_seconds": total,
        "total_cpu_seconds": cores,
        "peak_gib": memory,
        "samples": shown,
    }


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| seed | win rate | 95 % interval | held-out articles | agreement | seconds | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in runs:
        seconds = f"{result['total_seconds']:.0f}" if "total_seconds" in result else "not timed"
        cores = f"{result['total_cpu_seconds']:.0f}" if "total_cpu_seconds" in result else "not timed"
        lines.append(
            f"| {result['seed']} | {result['win_rate']:.3f} | {result['win_rate_low']:.3f} to "
            f"{result['win_rate_high']:.3f} | {result['prompts']} | {result['preference_model_agreement']:.3f} | "
            f"{seconds} | {cores} |"
        )
    return lines


def samples(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Held-out articles of the first seed, with what the model wrote before and after: all that the demo shows."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n\n", "<br>").replace("\n", " ")

    lines = ["| article | before | after |", "| --- | --- | --- |"]
    return lines + [
        f"| {' | '.join(cell(sample[key]) for key in ('article', 'before', 'after'))} |"
        for sample in runs[0].get("samples", [])
    ]


def text(report: dict[str, Any]) -> str:
    small = report["small"]
    lines = [
        "# The demo on a CPU",
        "",
        "; ".join(part for part in (f"`{report['command']}` on {report['machine']}", machine.described(report)) if part)
        + ".",
        *(["", report["note"]] if "note" in report else []),
        "",
        f"Win rate of the aligned policy over {REFERENCE[small]} by the gold judge, both orders of every pair. The "
        f"gold judge labelled the pairs that the {FITTED[small]} was fitted to and checked on; the policy was aligned "
        "against that model alone. The articles compared on were seen by none of them. Agreement is that of the fitted "
        "model with the gold judge on pairs it was not fitted to.",
        "",
        *table(report["runs"]),
        "",
        *(SMALL_REMARK if small else ["Samples of the first seed, greedy and drawn:", "", *samples(report["runs"])]),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the demos; record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/results/demo_cpu.json and .md")
    parser.add_argument("--small", action="store_true", help="the small demo; its result is called demo_small_cpu")
    options = parser.parse_args()
    report = {
        "command": f"python bench/bench_demo.py{' --small' if options.small else ''} --write",
        "machine": machine.name("jax", "jaxlib", "flax", "optax"),
        "before": machine.require_quiet() if options.write else machine.use(),
        "small": options.small,
        "runs": [run(seed, options.small) for seed in SEEDS],
        "after": machine.use(),
    }
    print(text(report))
    if options.write:
        machine.record("demo_small_cpu" if options.small else "demo_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
