"""Packed batches of preference pairs: rates against a packer and a collator in Python, padding, planning, resuming.

    python bench/bench_batcher.py --write

times everything, each side in the same run, and writes bench/results/batcher.json and .md. `make bench` times the rates
alone. grain is needed for the comparison with it: `pip install .[bench]`.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import machine
import numpy as np
import pytest
from batcher_sides import COLLATED, ROW_TOKENS, ROWS, SIDES, columns, lengths

from fastpref.data import PairBatcher, Ragged, _native, pack_pairs

PAIRS, ROUNDS = 4000, 7
WORKLOAD = (
    "Synthetic pairs: prompts lognormal(5, 0.8), completions lognormal(5.5, 0.7) and lognormal(5.45, 0.7) tokens, "
    f"clipped to [4, 1024]. Batches have {ROWS} rows of {ROW_TOKENS} places."
)
TARGETS = {
    "assembly": "at least 200 M real tokens/s on one core",
    "grain": "at least 50 times its best-fit packing",
    "lists": "at least 50 times a Python pair collator",
    "padding 256": "at most 2 % at window 256",
    "padding 1024": "at most 1.2 % at window 1024",
    "plan": "at most 2 s for 10 M pairs",
    "restore": "at most 10 ms",
    "next": "99 of 100 within 1 ms",
    "exit": "within 1 s",
}
PADDED = ("padded to 1024 + 1024", f"padded to the longest of {COLLATED} pairs")


@pytest.mark.parametrize("side", SIDES)
def test_rates(side: str, benchmark: Any) -> None:
    if side.startswith("grain"):
        pytest.importorskip("grain")
    build, layout = SIDES[side]
    run = build(columns(PAIRS // 4, 0), layout)
    benchmark.extra_info["tokens"] = benchmark.pedantic(run, rounds=3)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds, CPU seconds of the process."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def spread(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def rates() -> dict[str, Any]:
    """Every round packs pairs that no round before had, one side after the other."""
    found: dict[str, dict[str, list[float]]] = {side: {"wall": [], "cpu": [], "pairs": []} for side in SIDES}
    for turn in range(ROUNDS):
        data = columns(PAIRS, turn)
        for side, (build, layout) in SIDES.items():
            tokens, wall, cpu = timed(build(data, layout))
            found[side]["wall"].append(tokens / wall)
            found[side]["cpu"].append(tokens / cpu)
            found[side]["pairs"].append(PAIRS / cpu)
    return {side: {name: spread(values) for name, values in entry.items()} for side, entry in found.items()}


def padding() -> dict[str, float]:
    prompt, first, second = (each.astype(np.int32) for each in lengths(200_000, 1))
    sizes = {"shared": prompt - 1 + first + second, "separate": 2 * prompt - 2 + first + second}
    found = {}
    for layout, tokens in sizes.items():
        for row_tokens in (4096, 8192):
            for window in (64, 256, 1024, 4096, 65536):
                _, ends, _, _ = plan(tokens, row_tokens, window)
                found[f"{layout} {row_tokens} {window}"] = 1 - int(tokens.sum()) / (len(ends) * row_tokens)
    # Both sequences of a pair with its prompt in front, as collators of preference pairs have them.
    sequences = np.stack([prompt + first, prompt + second], 1)
    longest = sequences.reshape(-1, 2 * COLLATED).max(1)
    places = (2048.0, float(longest.mean()))
    return found | {what: 1 - float(sequences.mean()) / size for what, size in zip(PADDED, places, strict=True)}


def plan(tokens: np.ndarray, row_tokens: int, window: int, seed: int = 0) -> Any:
    return _native.plan_pairs(
        tokens,
        np.zeros(0, np.int32),
        shapes=[(ROWS, row_tokens, 0)],
        max_pairs_per_row=32,
        window=window,
        seed=seed,
        epoch=0,
    )


def planning() -> dict[str, Any]:
    tokens = np.sum(lengths(10_000_000, 2), axis=0).astype(np.int32)
    found: dict[str, Any] = {}
    for window in (256, 1024):
        walls, cpus = [], []
        for seed in range(3):
            _, wall, cpu = timed(lambda window=window, seed=seed: plan(tokens, ROW_TOKENS, window, seed))
            walls.append(wall)
            cpus.append(cpu)
        found[str(window)] = {"wall_s": spread(walls), "cpu_s": spread(cpus)}
    return found


def resuming() -> dict[str, Any]:
    """Ten million pairs of a token each: the position is what must not matter."""
    rows = Ragged(np.ones(10_000_000, np.int32), np.arange(10_000_001))
    with PairBatcher(rows, rows, rows, rows=64, row_tokens=64, prefetch=0) as batches:
        batches.batches_in(0)
        states = []
        random = np.random.default_rng(0)
        count = batches.batches_in(0)
        for at in range(count):
            if at in (0, count - 1) or random.random() < 30 / count:
                states.append(batches.state())
            next(batches)
        times = [timed(lambda state=state: batches.restore(state))[1] for state in states * 3]
        with_batch = []
        for state in states:
            _, wall, _ = timed(lambda state=state: (batches.restore(state), next(batches)))
            with_batch.append(wall)
        return {
            "positions": len(states),
            "restore_s": spread(times),
            "slowest_s": max(times),
            "with_batch_s": spread(with_batch),
            "bytes": max(map(len, states)),
        }


def waiting() -> dict[str, Any]:
    """A loop that is busy for 2 ms after each batch, over the end of epochs."""
    found = {}
    for threads, prefetch in ((1, 2), (1, 4), (2, 8)):
        with PairBatcher(
            *columns(PAIRS, 3), rows=ROWS, row_tokens=ROW_TOKENS, threads=threads, prefetch=prefetch
        ) as one:
            next(one)
            times = []
            for _ in range(2500):
                time.sleep(0.002)
                start = time.perf_counter()
                next(one)
                times.append(time.perf_counter() - start)
            low, mid, high = np.percentile(times, [50, 99, 100]).tolist()
            found[f"{threads} threads, {prefetch} ahead"] = {"p50_s": low, "p99_s": mid, "max_s": high}
    return found


def stepping() -> dict[str, float]:
    """One online step: 64 pairs of up to 64 tokens each."""
    random = np.random.default_rng(0)
    arguments: dict[str, Any] = {
        "prompt_tokens": random.integers(0, 32_000, (64, 64), dtype=np.int32),
        "prompt_lengths": random.integers(1, 65, 64).astype(np.int32),
        "completion_tokens": random.integers(0, 32_000, (64, 2, 64), dtype=np.int32),
        "completion_lengths": random.integers(1, 65, (64, 2)).astype(np.int32),
    }
    times = [timed(lambda: pack_pairs(**arguments, row_tokens=512))[1] for _ in range(200)]
    return {"median_s": statistics.median(times), "rows": len(pack_pairs(**arguments, row_tokens=512).pairs.tokens)}


def ending() -> dict[str, Any]:
    """From the last line of a program to the end of its process, while threads pack and plan ahead, and without any."""
    head = """
        import numpy as np, time
        from fastpref.data import PairBatcher, Ragged
        rows = Ragged(np.ones(3_000_000, np.int32), np.arange(3_000_001))
    """
    batcher = """
        batches = PairBatcher(rows, rows, rows, rows=64, row_tokens=64, threads=4, prefetch=64)
        next(batches)
    """
    endings = {
        "never made a batcher": ("", ""),
        "returns": (batcher, ""),
        "raises": (batcher, "raise RuntimeError('x')"),
    }
    found = {}
    for how, (body, last) in endings.items():
        times = []
        for _ in range(5):
            program = textwrap.dedent(head) + textwrap.dedent(body) + "print(time.time(), flush=True)\n" + last
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            times.append(time.time() - float(done.stdout))
        found[how] = {"median_s": statistics.median(times), "max_s": max(times)}
    return found


def measured() -> dict[str, Any]:
    parts = {
        "rates": rates, "padding": padding, "planning": planning, "resuming": resuming, "waiting": waiting,
        "stepping": stepping, "ending": ending,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, part in parts.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = part()
    return found


def text(report: dict[str, Any]) -> str:
    ours, separate = (report["rates"][f"fastpref, {layout}"] for layout in ("shared prompt", "separate"))
    lines = [
        "# Packed batches of preference pairs on a CPU",
        "",
        f"`{report['command']}` on {report['machine']}; {machine.described(report)}.",
        "",
        WORKLOAD,
        "",
        "## Rates",
        "",
        f"A round packs {PAIRS} pairs that no round before had; ours includes the plan of the epoch. {ROUNDS} rounds "
        "of all sides in turn, one thread each; medians (quartiles). A real token is a place that holds one, for each "
        "side in its own layout: padding is not counted, and the prompt twice only where it is stored twice. grain "
        "keeps pairs whole because each is given to it as one sequence; with tokens alone it does not say which "
        "completion is which. The lists have the separate layout. Batches are dropped as they come, so that one slab "
        "of memory, still in the caches, serves ours; where every batch is held, each is written to fresh memory.",
        "",
        "| side | M real tokens per CPU second | per second | thousand pairs per CPU second | ours is |",
        "| --- | --- | --- | --- | --- |",
    ]
    for side, entry in report["rates"].items():
        low, mid, high = (value / 1e6 for value in entry["cpu"])
        alike = (separate if SIDES[side][1] == "separate" else ours)["cpu"][1]
        pairs = entry["pairs"][1] / 1e3
        lines.append(
            f"| {side} | {mid:.1f} ({low:.1f} to {high:.1f}) | {entry['wall'][1] / 1e6:.1f} | {pairs:.1f} | "
            f"{alike / entry['cpu'][1]:.1f} times in tokens, {ours['pairs'][1] / entry['pairs'][1]:.1f} in "
            "pairs |"
        )
    lines += ["", "## Padding", "", "Share of places that hold no token, 200 000 pairs, at most 32 to a row.", ""]
    windows = ("64", "256", "1024", "4096", "65536")
    lines += [
        f"| layout | row | {' | '.join(f'window {w}' for w in windows)} |",
        f"| --- | --- |{' --- |' * len(windows)}",
    ]
    for layout in ("shared", "separate"):
        for row in ("4096", "8192"):
            values = [report["padding"][f"{layout} {row} {window}"] for window in windows]
            lines.append(f"| {layout} | {row} | {' | '.join(f'{value:.2%}' for value in values)} |")
    lines.append("")
    lines += [f"{what[0].upper()}{what[1:]}: {report['padding'][what]:.1%}." for what in PADDED]
    lines += ["", "## Time", "", "| what | median | spread |", "| --- | --- | --- |"]
    for window, entry in report["planning"].items():
        cpu, wall = entry["cpu_s"], entry["wall_s"]
        lines.append(
            f"| plan of 10 M pairs, window {window} | {cpu[1]:.2f} s CPU, {wall[1]:.2f} s | "
            f"{cpu[0]:.2f} to {cpu[2]:.2f} s CPU |"
        )
    resume = report["resuming"]
    lines.append(
        f"| restore, 10 M pairs, {resume['positions']} positions ({resume['bytes']} bytes of state) | "
        f"{resume['restore_s'][1] * 1e3:.3f} ms | slowest {resume['slowest_s'] * 1e3:.2f} ms; with the first batch "
        f"{resume['with_batch_s'][1] * 1e3:.2f} ms |"
    )
    for what, entry in report["waiting"].items():
        lines.append(
            f"| next(), {what} | {entry['p50_s'] * 1e3:.3f} ms | 99 % within {entry['p99_s'] * 1e3:.2f} ms, "
            f"slowest {entry['max_s'] * 1e3:.1f} ms |"
        )
    step = report["stepping"]
    lines.append(
        f"| `pack_pairs`, a step of 64 pairs into {step['rows']} rows of 512 | {step['median_s'] * 1e3:.3f} ms | |"
    )
    for how, entry in report["ending"].items():
        lines.append(f"| end of a process that {how} | {entry['median_s']:.2f} s | slowest {entry['max_s']:.2f} s |")
    lines += ["", "## Targets", "", "| target | measured | reached |", "| --- | --- | --- |"]
    for name, (value, reached) in verdicts(report).items():
        lines.append(f"| {TARGETS[name]} | {value} | {'yes' if reached else 'no'} |")
    return "\n".join(lines) + "\n"


def verdicts(report: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    side = {name: entry["cpu"][1] for name, entry in report["rates"].items()}
    ours, separate = side["fastpref, shared prompt"], side["fastpref, separate"]
    against = {"grain": ours / side["grain best-fit"], "lists": separate / side["Python lists, padded"]}
    waste = {window: report["padding"][f"shared 4096 {window}"] for window in ("256", "1024")}
    planned = report["planning"]["1024"]["wall_s"][1]
    restored = report["resuming"]["slowest_s"]
    waited = report["waiting"]["1 threads, 4 ahead"]["p99_s"]
    ended = max(report["ending"][how]["median_s"] for how in ("returns", "raises"))
    return {
        "assembly": (f"{ours / 1e6:.0f} M", ours >= 200e6),
        "grain": (f"{against['grain']:.0f} times", against["grain"] >= 50),
        "lists": (f"{against['lists']:.0f} times", against["lists"] >= 50),
        "padding 256": (f"{waste['256']:.2%}", waste["256"] <= 0.02),
        "padding 1024": (f"{waste['1024']:.2%}", waste["1024"] <= 0.012),
        "plan": (f"{planned:.2f} s", planned <= 2),
        "restore": (f"{restored * 1e3:.2f} ms", restored <= 0.01),
        "next": (f"{waited * 1e3:.2f} ms", waited <= 0.001),
        "exit": (f"{ended:.2f} s", ended <= 1),
    }


def main() -> int:
    """Time everything; record it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/results/batcher.json and .md")
    options = parser.parse_args()
    report = {
        "command": "python bench/bench_batcher.py --write",
        "machine": machine.name("numpy", "grain"),
        "before": machine.require_quiet() if options.write else machine.use(),
        **measured(),
        "after": machine.use(),
    }
    print(text(report))
    if options.write:
        machine.record("batcher", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
