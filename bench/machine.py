"""The machine under a benchmark: its name, the rates that floors are drawn from, and whether it is quiet.

    python bench/machine.py

prints its use, and fails while a benchmark would refuse to record.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
LOAD, OTHERS = "load average", "cores in use by other processes"
LIMITS = {LOAD: 0.5, OTHERS: 0.2}
"""Most of each with which a result may be recorded. The load, a mean of a minute, remembers what has just ended."""
STAT, WINDOW = Path("/proc/stat"), 2.0
Use = dict[str, float]


def busy_seconds() -> float:
    """CPU seconds of all processes since the machine began, time that a host took away included."""
    user, nice, system, _, _, *interrupts = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    return float(user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def use() -> Use:
    """Load average of the last minute and, where /proc tells, cores that other processes use for two seconds."""
    load = {LOAD: os.getloadavg()[0]}
    if not STAT.exists():
        return load
    start, everyone, own = time.perf_counter(), busy_seconds(), time.process_time()
    time.sleep(WINDOW)
    passed, others = time.perf_counter() - start, busy_seconds() - everyone - (time.process_time() - own)
    return load | {OTHERS: max(0.0, others / passed)}


def require_quiet() -> Use:
    """The use of a machine that is quiet enough to record on.

    Raises:
      SystemExit: other processes are at work, or were a moment ago.
    """
    measured = use()
    for what, most in LIMITS.items():
        if measured.get(what, 0.0) > most:
            raise SystemExit(
                f"The {what} of a machine that records must be at most {most}, but received {measured[what]:.2f}. "
                "Stop other programs, wait a minute or two, and start the benchmark again."
            )
    return measured


def described(report: Mapping[str, Any]) -> str:
    """The use of the machine `before` and `after` the timings of a report, as far as it was recorded."""
    return "; ".join(
        f"{when}: {', '.join(f'{what} {value:.2f}' for what, value in report[when].items())}"
        for when in ("before", "after")
        if when in report
    )


def name(*packages: str) -> str:
    """Processor, cores, and the versions that a timing depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    parts = [processor or platform.machine(), f"{os.cpu_count()} cores", f"Python {platform.python_version()}"]
    return ", ".join(parts + [f"{package} {version(package)}" for package in packages])


def rates() -> dict[str, float]:
    """The largest rates of the plainest programs: flops of one square product, bytes of one long dot product."""
    # Whoever waits for a quiet machine asks again and again, and should not load JAX for it.
    import jax
    import jax.numpy as jnp

    square = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 2048), np.float32))
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    one, two = np.ones(1 << 26, np.float32), np.ones(1 << 26, np.float32)

    def fastest(run: Any, times: int) -> float:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return {
        "float32_flops": 2 * 2048**3 / fastest(lambda: jax.block_until_ready(product(square, square)), 10),
        "bytes_per_second": 2 * one.nbytes / fastest(lambda: np.dot(one, two), 7),
    }


def record(result: str, report: Any, text: str) -> None:
    """Write a result and its text side by side."""
    (RESULTS / f"{result}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (RESULTS / f"{result}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    print(", ".join(f"{what} {value:.2f}" for what, value in require_quiet().items()))
