"""The benchmark of adapters: what it writes is what it measured, and its sides differ in what is trained alone."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))
bench_adapters, bench_peers = map(import_module, ("bench_adapters", "bench_peers"))


def side(made: Any, seconds: float, peak: float) -> dict[str, Any]:
    laps = {"time/generate": seconds / 2, "time/learn": seconds / 2, "time/judge": 0.0}
    step = {"seconds": seconds, "cpu_seconds": 2 * seconds, "peak_rss_bytes": peak, "tokens": 768, "loss": 25.0}
    return made._asdict() | {"prompts": [[1]], "versions": {}, "steps": [step | {"nats": 1.0, "laps": laps}] * 3}


def test_the_text_shows_what_was_asked_for_and_what_was_measured() -> None:
    match = bench_adapters.MATCH._replace(rounds=2)
    measured = ((14.0, 5.5e9), (7.0, 2e9), (6.0, 1.5e9), (8.0, 1e9))
    sides = [side(made, *of) for made, of in zip(match.sides, measured, strict=True)]
    steps = bench_peers.summary(match, sides)
    for made in steps["sides"]:
        made["laps"] = {name: bench_peers.spread([made["seconds"]["median"] / 2]) for name in ("time/generate",)}
    timed = {name: bench_peers.spread([value]) for name, value in (("stacked", 2.0), ("apart", 3.0), ("ratio", 1.5))}
    entry = {"rows": 8, "floor": {"stacked": 0.5, "apart": 1.0}, "decoding": timed, "with the prompts": timed}
    saved = [
        {"name": name, "bytes": size, "seconds": bench_peers.spread([0.25])}
        for name, size in (("all", 1000), ("r", 30))
    ]
    report = {
        "command": "python bench/bench_adapters.py --write",
        "machine": "a machine",
        "limits": bench_adapters.LIMITS,
        "rates": {"float32_flops": 2e11, "bytes_per_second": 3e10},
        "steps": steps,
        "decoding": [entry],
        "checkpoints": saved,
    }
    text = bench_adapters.text(report)
    assert "at most 0.55 of the seconds, and at most 2.2 GB" in text
    assert "| adapter of rank 16 | 7.00 (7.00 to 7.00) | 0.50 | 3.50 (3.50 to 3.50) | 14.0 | 7 | 2.00 |" in text
    assert "| 8 | 1.6 | 0.50 | 1.00 | 2.00 (2.00 to 2.00) | 3.00 (3.00 to 3.00) | 1.50 (1.50 to 1.50) |" in text
    assert "| r | 30 | 3.0% | 0.250 (0.250 to 0.250) |" in text


def test_the_sides_differ_in_what_is_trained_and_in_parts_alone() -> None:
    same = {(made.program, made.method, made.writers) for made in bench_adapters.MATCH.sides}
    assert same == {("ours", "ipo-md", "mixture, mixture")}
    assert [(made.rank, made.parts) for made in bench_adapters.MATCH.sides] == [(0, 1), (16, 1), (16, 2), (16, 4)]


def test_noise_has_the_shapes_of_a_tree_and_leaves_counters() -> None:
    tree = {"w": jnp.zeros((3, 2), jnp.bfloat16), "count": jnp.asarray(4)}
    noise = bench_adapters.noise_like(tree, 0)
    assert (noise["w"].shape, noise["w"].dtype, int(noise["count"])) == ((3, 2), jnp.bfloat16, 4)
    assert np.asarray(noise["w"], np.float32).all()


def test_runs_take_turns_and_the_first_does_not_count() -> None:
    log: list[str] = []
    seconds = bench_adapters.in_turn({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, 2)
    assert log == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
