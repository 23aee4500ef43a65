"""The demo from an empty folder, as a visitor runs it: win rate and time, for each of three seeds.

    python bench/bench_demo.py --write

runs `fastpref demo` once for each seed, one after the other, and writes bench/results/demo_cpu.json and .md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine

SEEDS = (0, 1, 2)


def run(seed: int) -> dict[str, Any]:
    """One demo in a process of its own, with nothing kept of an earlier one: the harvest is timed too."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        program = Path(sys.executable).with_name("fastpref")
        command = [program, "demo", "--seed", str(seed), "--run-dir", f"{folder}/demo"]
        subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}, check=True)
        total = time.perf_counter() - start
        result = json.loads((Path(folder) / "demo" / f"seed-{seed}" / "result.json").read_text())
    return {"seed": seed, **result, "total_seconds": total}


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| seed | win rate | 95 % interval | held-out articles | agreement of the preference model | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in runs:
        seconds = f"{result['total_seconds']:.0f}" if "total_seconds" in result else "not timed"
        lines.append(
            f"| {result['seed']} | {result['win_rate']:.3f} | {result['win_rate_low']:.3f} to "
            f"{result['win_rate_high']:.3f} | {result['prompts']} | {result['preference_model_agreement']:.3f} | "
            f"{seconds} |"
        )
    return lines


def text(report: dict[str, Any]) -> str:
    lines = [
        "# The demo on a CPU",
        "",
        "; ".join(part for part in (f"`{report['command']}` on {report['machine']}", machine.described(report)) if part)
        + ".",
        *(["", report["note"]] if "note" in report else []),
        "",
        "Win rate of the aligned policy over the SFT policy by the gold judge, both orders of every pair. The gold "
        "judge labelled the pairs that the preference model learned from; the policy was aligned against that model "
        "alone. The articles compared on were seen by none of them. Agreement is that of the preference model with the "
        "gold judge on pairs it was not fitted to.",
        "",
        *table(report["runs"]),
        "",
        "A model of this size does not write good summaries: what it gains is form (it begins as a summary begins, "
        "ends with a stop, keeps its length), which a reader of the samples sees at once, and not knowledge of the "
        "article.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the demos; record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/results/demo_cpu.json and .md")
    options = parser.parse_args()
    report = {
        "command": "python bench/bench_demo.py --write",
        "machine": machine.name("jax", "jaxlib", "flax", "optax"),
        "before": machine.require_quiet() if options.write else machine.use(),
        "runs": [run(seed) for seed in SEEDS],
        "after": machine.use(),
    }
    print(text(report))
    if options.write:
        machine.record("demo_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
