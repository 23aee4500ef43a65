"""The online side and ingest: log of judgements, tournament, tokens from text and from the cache, and their floors.

    python bench/bench_pairs.py

times everything and writes bench/results/pairs_cpu.json and .md.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import machine
import numpy as np
import orjson
import pytest
import tokenizers
import xxhash
from tokenizers import models, pre_tokenizers

from fastpref.data.cache import tokenized
from fastpref.data.tokenizer import Tokenizer
from fastpref.judging import tournament
from fastpref.judging.identity import Identity
from fastpref.judging.judgements import FILE, Judgements

PAIRS, CHARACTERS, LOG_STEPS, PROMPTS, K, RECORDS, ROUNDS = 32, 1024, 500, 256, 8, 20_000, 10
WORKLOAD = (
    f"A step judges {PAIRS} pairs of two completions of {CHARACTERS} characters; the log that is replayed holds "
    f"{LOG_STEPS} "
    f"steps. Tournaments of {PROMPTS} prompts with {K} completions, answered from a table. {RECORDS} preference pairs "
    "as JSON lines of 40, 60 and 60 words out of 1000, one token each."
)
Timed = Callable[..., None]


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """`timed(what, unit, amount, run)`: `run(round)` takes care of `amount` units."""

    def measure(what: str, unit: str, amount: float, run: Callable[[int], object], rounds: int = ROUNDS) -> None:
        turn = count()
        benchmark.extra_info.update(what=what, unit=unit, amount=amount)
        benchmark.pedantic(run, setup=lambda: ((next(turn),), {}), rounds=rounds, warmup_rounds=1)

    return measure


WHO = Identity("judge", {}, None, "judge")


def completions(seed: int) -> list[str]:
    letters = np.random.default_rng(seed).integers(97, 123, (PAIRS, CHARACTERS), np.uint8)
    return [row.tobytes().decode() for row in letters]


def judged(log: Judgements, step: int, first: list[str], second: list[str]) -> None:
    half = np.full(PAIRS, 0.5, np.float32)
    log.answers(WHO, "training", step, [f"prompt {at}" for at in range(PAIRS)], first, second, answer=lambda _: half)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / FILE
    with Judgements(path) as written:
        for step in range(LOG_STEPS):
            judged(written, step, completions(step), completions(step + 1))
    return path


def test_writing_a_step(timed: Timed, tmp_path: Path) -> None:
    first, second = completions(0), completions(1)
    with Judgements(tmp_path / FILE) as written:
        what = "write a step's judgements to the log and the disk"
        timed(what, "pairs/s", PAIRS, lambda turn: judged(written, turn, first, second))


def test_floor_of_writing(timed: Timed, tmp_path: Path) -> None:
    content = bytes(PAIRS * 2 * CHARACTERS)

    def run(_: int) -> None:
        os.write(file, content)
        os.fsync(file)

    file = os.open(tmp_path / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    timed("floor: write and fsync as many bytes", "pairs/s", PAIRS, run)
    os.close(file)


def test_opening_a_log(timed: Timed, log: Path) -> None:
    what = "open a log: check every row, index every answer"
    timed(what, "B/s", log.stat().st_size, lambda _: Judgements(log).close())


def test_floor_of_opening(timed: Timed, log: Path) -> None:
    what = "floor: read the file and hash it with XXH3"
    timed(what, "B/s", log.stat().st_size, lambda _: xxhash.xxh3_64_intdigest(log.read_bytes()))


def test_tournaments(timed: Timed) -> None:
    table = np.random.default_rng(0).random((PROMPTS, K, K), np.float32)
    ids = np.arange(PROMPTS)
    timed(
        "tournaments, the judge's time left out",
        "prompts/s",
        PROMPTS,
        lambda turn: tournament.run(lambda p, a, b: table[p, a, b], PROMPTS, K, ids, turn, 0),
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("records") / "pairs.jsonl"
    with path.open("wb") as file:
        for _ in range(RECORDS):
            words = [f"w{word}" for word in random.integers(0, 1000, 160)]
            row = {"prompt": words[:40], "chosen": words[40:100], "rejected": words[100:]}
            file.write(orjson.dumps({name: " ".join(part) for name, part in row.items()}) + b"\n")
    return path


def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0} | {f"w{i}": i + 1 for i in range(1000)}, "</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, eos_id=0)


def ingest(records: Path, cache: Path) -> None:
    tokenized(
        records,
        tokenizer(),
        cache=cache,
        columns=("prompt", "chosen", "rejected"),
        max_prompt_tokens=64,
        max_completion_tokens=64,
    )


def test_text_to_cache(timed: Timed, records: Path, tmp_path: Path) -> None:
    what = "tokenise JSON lines into a new cache"
    timed(what, "tokens/s", RECORDS * 162, lambda turn: ingest(records, tmp_path / f"{turn}"), rounds=3)


def test_tokens_from_cache(timed: Timed, records: Path, tmp_path: Path) -> None:
    ingest(records, tmp_path)
    timed("map the cache, every byte checked", "tokens/s", RECORDS * 162, lambda _: ingest(records, tmp_path))


def text(report: dict[str, Any]) -> str:
    lines = [
        "# Pair log, tournament and ingest on a CPU",
        "",
        f"`{report['command']}` on {report['machine']}; {machine.described(report)}.",
        "",
        report["workload"],
        "",
        "| what | median of a round (quartile range) | rate |",
        "| --- | --- | --- |",
    ]
    for entry in report["benchmarks"]:
        rate = entry["amount"] / entry["median_s"]
        spread = f"{entry['median_s'] * 1e3:.2f} ms ({entry['iqr_s'] * 1e3:.2f})"
        lines.append(f"| {entry['what']} | {spread} | {rate:.3g} {entry['unit']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Time everything and write the results."""
    before = machine.require_quiet()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        arguments = [__file__, "-q", "-o", "addopts=", f"--benchmark-json={raw}"]
        code = subprocess.run([sys.executable, "-m", "pytest", *arguments]).returncode
        if code:
            return code
        entries = [
            entry["extra_info"] | {"median_s": entry["stats"]["median"], "iqr_s": entry["stats"]["iqr"]}
            for entry in json.loads(raw.read_text())["benchmarks"]
        ]
    report = {
        "command": "python bench/bench_pairs.py",
        "machine": machine.name("numpy"),
        "before": before,
        "workload": WORKLOAD,
        "rounds": ROUNDS,
        "benchmarks": entries,
        "after": machine.use(),
    }
    machine.record("pairs_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
