"""Padded batches from the native padded batcher against the same batches from Python and NumPy collators, in one run.

    python bench/bench_padded.py

times everything and writes bench/results/padded_cpu.json and .md. Every round assembles batches that no round before
had, out of more data than the caches hold, as training does.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref.data import PaddedPairBatcher, PromptBatcher, Ragged, _native

RECORDS, BATCH_SIZE, BATCHES, ROUNDS, WARMUP = 40_000, 64, 25, 22, 2
WORKLOAD = (
    "Lengths are synthetic: sequences lognormal(5.9, 0.7) clipped to [16, 2048]; pairs with prompts lognormal(5, 0.8) "
    "and completions lognormal(5.5, 0.7) and lognormal(5.45, 0.7) clipped to [4, 1024]. One round assembles the next "
    f"{BATCHES} batches of {BATCH_SIZE} out of {RECORDS} records, the same for all; a rate counts real tokens, not "
    "padding. All sides are given the plan, which is timed apart."
)
RESULTS = Path(__file__).parent / "results"
MODELS = {
    "prompts": (((5.9, 0.7), 16, 2048),),
    "pairs": (((5.0, 0.8), 4, 1024), ((5.5, 0.7), 4, 1024), ((5.45, 0.7), 4, 1024)),
}
Plan = list[tuple[list[int], list[int]]]
"""Records and widths of each batch."""


def columns(kind: str) -> list[Ragged]:
    random = np.random.default_rng(0)
    ragged = []
    for law, low, high in MODELS[kind]:
        lengths = random.lognormal(*law, RECORDS).clip(low, high).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ragged.append(Ragged(random.integers(0, 32_000, offsets[-1], dtype=np.int32), offsets))
    return ragged


def batcher(kind: str, ragged: list[Ragged]) -> Any:
    if kind == "prompts":
        return PromptBatcher(ragged[0], batch_size=BATCH_SIZE, max_tokens=2048)
    prompts, chosen, rejected = ragged
    limits: dict[str, Any] = {"max_prompt_tokens": 1024, "max_completion_tokens": 1024}
    return PaddedPairBatcher(prompts, chosen, rejected, batch_size=BATCH_SIZE, **limits)


def widths(batch: Any) -> list[int]:
    """Padded tokens of each column of a batch."""
    if hasattr(batch, "tokens"):
        return [batch.tokens.shape[1]]
    return [batch.prompt_tokens.shape[1], *[batch.completion_tokens.shape[2]] * 2]


def python_lists(rows: list[list[list[int]]], plan: Plan) -> None:
    """Pad lists, then make an array of them."""
    for ids, sides in plan:
        for column, width in zip(rows, sides, strict=True):
            picked = [column[i] for i in ids]
            np.asarray([tokens + [0] * (width - len(tokens)) for tokens in picked], np.int32)
            np.asarray([len(tokens) for tokens in picked], np.int32)


def numpy_rows(rows: list[list[np.ndarray]], plan: Plan) -> None:
    """Copy each row, an array already, into zeros."""
    for ids, sides in plan:
        for column, width in zip(rows, sides, strict=True):
            tokens, lengths = np.zeros((len(ids), width), np.int32), np.empty(len(ids), np.int32)
            for at, i in enumerate(ids):
                row = column[i]
                tokens[at, : len(row)] = row
                lengths[at] = len(row)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    ragged = columns(request.param)
    planner = batcher(request.param, ragged)
    lengths = [np.diff(column.offsets) for column in ragged]
    plans: list[Plan] = []
    for _ in range(WARMUP + ROUNDS):
        plans.append([(batch.ids.tolist(), widths(batch)) for batch in islice(planner, BATCHES)])
    real = [sum(int(column[ids].sum()) for ids, _ in plan for column in lengths) for plan in plans]
    padded = [sum(len(ids) * sum(sides) for ids, sides in plan) for plan in plans]
    info = {"case": request.param, "shapes": len(planner.shapes), "waste": 1 - sum(real) / sum(padded)}
    return {"kind": request.param, "ragged": ragged, "plans": plans, "real": real, "padded": padded, "info": info}


def measure(benchmark: Any, case: dict[str, Any], what: str, run: Callable[[int], None]) -> None:
    """Time `run(round)` for each round and note its rate in real tokens a second."""
    turn = count()
    benchmark.pedantic(run, setup=lambda: ((next(turn),), {}), rounds=ROUNDS, warmup_rounds=WARMUP)
    info = case["info"] | {"what": what}
    if benchmark.enabled:
        # A set-up that also runs for calibration would shift the rounds; the last ones are those measured.
        real = case["real"][-ROUNDS:]
        rates = [tokens / time for tokens, time in zip(real, benchmark.stats.stats.data, strict=True)]
        low, median, high = np.percentile(rates, [25, 50, 75]).tolist()
        info |= {"tokens_per_s": median, "quartiles": [low, high]}
    benchmark.extra_info.update(info)


def test_native(case: dict[str, Any], benchmark: Any) -> None:
    native = batcher(case["kind"], case["ragged"])
    start = native.state()
    next(native)
    # The plan is kept, the first batch is handed out again.
    native.restore(start)

    def run(_: int) -> None:
        for _batch in islice(native, BATCHES):
            pass

    measure(benchmark, case, "native", run)


def test_numpy_rows(case: dict[str, Any], benchmark: Any) -> None:
    rows = [[column[i] for i in range(RECORDS)] for column in case["ragged"]]
    measure(benchmark, case, "NumPy rows", lambda turn: numpy_rows(rows, case["plans"][turn]))


def test_python_lists(case: dict[str, Any], benchmark: Any) -> None:
    # One object for each id, as it cannot be in practice, keeps memory small and is kind to this side.
    ids = list(range(32_000))
    rows = [[[ids[token] for token in column[i].tolist()] for i in range(RECORDS)] for column in case["ragged"]]
    measure(benchmark, case, "Python lists", lambda turn: python_lists(rows, case["plans"][turn]))


def test_copy_floor(case: dict[str, Any], benchmark: Any) -> None:
    """Writing as many bytes to fresh memory from elsewhere: no assembly can be faster."""
    ends = np.cumsum(case["padded"])
    source = np.ones(ends[-1], np.int32)

    def run(turn: int) -> None:
        source[ends[turn] - case["padded"][turn] : ends[turn]].copy()

    measure(benchmark, case, "floor: a copy of the padded bytes", run)


def test_plan_of_a_million_records(benchmark: Any) -> None:
    shape_of = np.random.default_rng(0).integers(0, 4, 1_000_000).astype(np.int32)
    benchmark.extra_info.update(what="plan of one epoch of a million records")
    arguments: dict[str, Any] = {"num_shapes": 4, "batch_size": 64, "seed": 0, "epoch": 1}
    benchmark.pedantic(_native.plan_epoch, (shape_of,), arguments, rounds=10, warmup_rounds=1)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(entries: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | what | real tokens/s (quartiles) | median of a round | padding |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        low, high = (value / 1e6 for value in entry.get("quartiles", (0, 0)))
        rate = f"{entry['tokens_per_s'] / 1e6:.0f} M ({low:.0f} to {high:.0f})" if high else ""
        waste = f"{entry['waste']:.1%} in {entry['shapes']} shapes" if high else ""
        lines.append(
            f"| {entry.get('case', '')} | {entry['what']} | {rate} | {entry['median_s'] * 1e3:.2f} ms | {waste} |"
        )
    for kind in MODELS:
        rates = {entry["what"]: entry["tokens_per_s"] for entry in entries if entry.get("case") == kind}
        ratios = [f"{rates['native'] / rates[other]:.1f} times that of {other}" for other in rates if other != "native"]
        lines += ["", f"On {kind} the native rate is {', '.join(ratios)}."]
    return lines


def main() -> int:
    """Time everything and write the results."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        # The project's own options check types at every call, which would be timed too.
        arguments = [__file__, "-q", "-o", "addopts=", f"--benchmark-json={raw}"]
        code = subprocess.run([sys.executable, "-m", "pytest", *arguments]).returncode
        if code:
            return code
        entries = [
            entry["extra_info"] | {"median_s": entry["stats"]["median"], "iqr_s": entry["stats"]["iqr"]}
            for entry in json.loads(raw.read_text())["benchmarks"]
        ]
    command = "python bench/bench_padded.py"
    machine = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}"
    report = {
        "command": command,
        "machine": machine,
        "load_before": load,
        "workload": WORKLOAD,
        "rounds": ROUNDS,
        "benchmarks": entries,
    }
    (RESULTS / "padded_cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    head = [
        "# Assembly of padded batches on a CPU",
        "",
        f"`{command}` on {machine}, one thread, load average {load:.1f} before.",
        "",
        WORKLOAD,
        "",
    ]
    (RESULTS / "padded_cpu.md").write_text("\n".join([*head, *table(entries)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
