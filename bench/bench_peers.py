"""One step of online preference training by TRL and by fastpref: same prompts, judge, lengths, weights, optimiser.

    python bench/bench_peers.py --write

makes an environment with TRL (build/peers), times both on two models and writes bench/results/peers_cpu.json and .md.
Every side is a process that waits while the others make their step, one after the other, in the same order each round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

import machine
from peers_side import MAX_GRAD_NORM, MIXTURE_BETA, TAU, THREADS

PEERS = Path(__file__).parent.parent / "build" / "peers"
REQUIREMENTS = (
    "torch==2.13.0",
    "trl==1.13.0",
    "transformers==5.24.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "requests==2.34.2",
)
"""TRL's next release has no Nash-MD. It imports requests, and does not ask for it."""
UNCACHED = (
    "TRL's Nash-MD runs without a key-value cache: with one, the forward of its mixture hands the same cache to the "
    "policy and then to the reference, both append their keys to it, and the draw is from another distribution."
)
SIDE = Path(__file__).with_name("peers_side.py")
COMPLETIONS = 2


class Side(NamedTuple):
    name: str
    program: str
    method: str
    writers: str
    rank: int = 0
    """Of the adapter that is trained; 0 for all parameters."""
    parts: int = 1
    """That the gradient of a batch is taken in."""


class Match(NamedTuple):
    """Sides that take turns; the first is the peer.

    Args:
      model: a program of peers_side.py that makes it.
      rounds: that count, after `warmup` that do not.
    """

    model: str
    prompts: int
    new_tokens: int
    learning_rate: float
    warmup: int
    rounds: int
    sides: tuple[Side, ...]


MIXED = (
    Side("TRL Nash-MD, uncached", "trl", "nash-md", "policy, mixture"),
    Side("fastpref `nash-md-pg`", "ours", "nash-md-pg", "policy, mixture"),
    Side("fastpref `ipo-md`", "ours", "ipo-md", "mixture, mixture"),
)
ONLINE = (
    Side("TRL Online DPO, `ipo` loss, cached", "trl", "online-ipo", "policy, policy"),
    Side("fastpref `online-ipo`", "ours", "online-ipo", "policy, policy"),
)
ADAPTER = (
    Side("fastpref `ipo-md`, adapter of rank 16", "ours", "ipo-md", "mixture, mixture", rank=16),
    Side("fastpref `online-ipo`, adapter of rank 16", "ours", "online-ipo", "policy, policy", rank=16),
)
MODELS = {
    "random": "a random Llama of 4.46 M parameters, prompts of 32 random words",
    "chat": "SmolLM2-135M-Instruct (135 M parameters), questions in its chat template",
}
MATCHES = (
    Match("random", 8, 64, 1e-4, warmup=1, rounds=7, sides=MIXED),
    Match("random", 8, 64, 1e-4, warmup=2, rounds=20, sides=ONLINE),
    Match("chat", 8, 48, 1e-5, warmup=1, rounds=2, sides=(*MIXED, ADAPTER[0])),
    Match("chat", 8, 48, 1e-5, warmup=1, rounds=4, sides=(*ONLINE, ADAPTER[1])),
)


def environment() -> Path:
    """The interpreter that has TRL, in an environment that is made where it is not there or holds other versions."""
    python, note = PEERS / "venv" / "bin" / "python", PEERS / "installed.txt"
    wanted = "\n".join(REQUIREMENTS)
    if note.exists() and note.read_text() == wanted:
        return python
    make = [sys.executable, "-m", "venv", "--clear", str(python.parent.parent)]
    install = [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS]
    for command in (make, install):
        if subprocess.run(command).returncode:
            raise SystemExit(
                f"The environment of the peers must hold {', '.join(REQUIREMENTS)}, but received an error from "
                f"`{' '.join(command[:4])} ...`. Mend what it says above, and start the benchmark again."
            )
    note.write_text(wanted)
    return python


class Process:
    """A side that runs: it is ready when made, and waits for `step`.

    Args:
      name: for messages.
      command: see peers_side.py.
      log: receives what it prints.
    """

    def __init__(self, name: str, command: Sequence[str], log: IO[str]) -> None:
        self.name, self._log = name, log
        quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": str(THREADS)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | quiet
        )
        self.ready = self._read()

    def step(self) -> dict[str, Any]:
        """Make a step, and tell what it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            tail = "\n".join(self._log.read().splitlines()[-20:])
            raise SystemExit(
                f"{self.name} must make its steps, but received exit status {self._process.wait()} and\n{tail}\n"
                "Mend that, and start the benchmark again."
            )
        message: dict[str, Any] = json.loads(line)
        return message

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        # The end of its input ends it.
        self._process.communicate()


def played(match: Match, interpreters: Mapping[str, str], folder: Path) -> list[dict[str, Any]]:
    """Every side of a match with its steps, in the order of the match."""
    with ExitStack() as stack:
        processes = []
        for side in match.sides:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [interpreters[side.program], str(SIDE), side.program, side.method, str(folder)]
            command.append(json.dumps(match._asdict() | {"sides": None, "rank": side.rank, "parts": side.parts}))
            processes.append(stack.enter_context(Process(side.name, command, log)))
        steps: list[list[dict[str, Any]]] = [[] for _ in processes]
        for number in range(match.warmup + match.rounds):
            for process, made in zip(processes, steps, strict=True):
                made.append(process.step())
                print(f"{match.model}, step {number}, {process.name}: {made[-1]['seconds']:.2f} s", flush=True)
        return [
            side._asdict() | process.ready | {"steps": made}
            for side, process, made in zip(match.sides, processes, steps, strict=True)
        ]


def require_same_work(match: Match, sides: Sequence[Mapping[str, Any]]) -> None:
    """Raise where the sides did not do the same.

    Raises:
      SystemExit: they read other tokens, wrote other numbers of them, or an IPO loss does not begin at (1/2τ)².
    """
    tokens = match.prompts * COMPLETIONS * match.new_tokens
    for side in sides:
        first, *_ = steps = side["steps"]
        checks = {
            "the tokens of the prompts": (sides[0]["prompts"], side["prompts"]),
            "the tokens written in each step": ([tokens] * len(steps), [step["tokens"] for step in steps]),
        }
        if "ipo" in side["method"]:
            # A margin of rounding only: policy and reference are the same, and labels are hard.
            checks["the loss at step 0, to a decimal,"] = (round((0.5 / TAU) ** 2, 1), round(first["loss"], 1))
        for what, (wanted, received) in checks.items():
            if wanted != received:
                raise SystemExit(
                    f"On every side {what} must be {wanted}, but received {received} from {side['name']}. "
                    "Compare the settings of both sides in bench/peers_side.py."
                )


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def summary(match: Match, sides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A match as it is recorded. Ratios are of steps of one round: the peer's seconds over the side's."""

    def timed(side: Mapping[str, Any], what: str) -> list[float]:
        return [step[what] for step in side["steps"][match.warmup :]]

    peer, entries = timed(sides[0], "seconds"), []
    for side in sides:
        first, *_ = side["steps"]
        seconds = timed(side, "seconds")
        entries.append(
            {name: side[name] for name in Side._fields}
            | {
                "versions": side["versions"],
                "seconds": spread(seconds) | {"each": seconds},
                "ratio": spread([theirs / own for theirs, own in zip(peer, seconds, strict=True)]),
                "cpu_seconds": spread(timed(side, "cpu_seconds")),
                "first_seconds": first["seconds"],
                "tokens": first["tokens"],
                "tokens_per_second": first["tokens"] / median(seconds),
                "loss_at_0": first["loss"],
                "nats_at_0": first["nats"],
                "peak_rss_bytes": max(step["peak_rss_bytes"] for step in side["steps"]),
            }
        )
    settings = {name: value for name, value in match._asdict().items() if name != "sides"}
    pair = "mixture" if match.sides[0] is MIXED[0] else "policy"
    return {**settings, "pair": pair, "prompt_tokens": sum(map(len, sides[0]["prompts"])), "sides": entries}


def table(match: Mapping[str, Any]) -> list[str]:
    lines = [
        f"**{MODELS[match['model']]}**: {match['prompts']} prompts, {match['prompt_tokens']} tokens together, "
        f"{COMPLETIONS} × {match['new_tokens']} new tokens each; AdamW at {match['learning_rate']:g}; "
        f"steps timed: {match['rounds']}, after {match['warmup']} that do not count",
        "",
        "| side | who writes | s a step, median (least to most) | the peer's over it | first step | tokens/s "
        "| peak memory | tokens a step | loss at step 0 | −log π a token at step 0 |",
        f"|{' --- |' * 10}",
    ]
    for side in match["sides"]:
        seconds, ratio = side["seconds"], side["ratio"]
        cells = [
            side["name"],
            side["writers"],
            f"{seconds['median']:.2f} ({seconds['least']:.2f} to {seconds['most']:.2f})",
            f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})",
            f"{side['first_seconds']:.1f} s",
            f"{side['tokens_per_second']:.0f}",
            f"{side['peak_rss_bytes'] / 1e6:.0f} MB",
            str(side["tokens"]),
            f"{side['loss_at_0']:.2f}",
            f"{side['nats_at_0']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def text(report: Mapping[str, Any]) -> str:
    peer = ", ".join(f"{package} {version}" for package, version in report["peer_versions"].items())
    lines = [
        "# One step of online preference training on a CPU: TRL and fastpref",
        "",
        f"`{report['command']}` on {report['machine']}; the peer: {peer}; {machine.described(report)}.",
        "",
        f"One run, in which the sides make their steps in turn, with {THREADS} threads and in float32, from the same "
        f"checkpoint directory. τ = {TAU} (TRL's `beta`), weight of the reference in the mixture {MIXTURE_BETA}, "
        f"temperature 1, AdamW without weight decay, gradients clipped to norm {MAX_GRAD_NORM:g}. All prompts are in "
        "every step. The end token of both sides is one that the models have no logit for, so that every completion is "
        "full. The judge is one Python function: it counts different words, and its labels are hard.",
        "",
        f"{UNCACHED} Both completions are drawn with the same settings, so that the policy's own is uncached as well. "
        "This trainer asks a reward model and no function; here its `_compute_rewards` asks the judge.",
        "",
        "Both sides do the same work, or the run is refused: they read the same tokens, write the same number of them, "
        f"and an IPO loss begins at (1/2τ)² = {(0.5 / TAU) ** 2:g}. A policy gradient's begins at the mean of "
        "−(p − ½)·log π(y), whose sign is the judge's. −log π of a token is that of the tokens that were drawn, by the "
        "policy where it writes: at step 0 it differs by the draw alone. A first step has what is compiled or "
        "allocated once. Peak memory is that of the process.",
        "",
    ]
    for match in report["matches"]:
        lines += table(match)
    return "\n".join(lines)


def main() -> int:
    """Time the sides; record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="write bench/results/peers_cpu.json and .md")
    choice.add_argument("--smoke", action="store_true", help="one step of few tokens on each side, to see that it runs")
    options = parser.parse_args()
    before = machine.require_quiet() if options.write else machine.use()
    interpreters = {"ours": sys.executable, "trl": str(environment())}
    if hasattr(os, "sched_setaffinity"):
        # Neither JAX nor its compiler has a setting for it; the sides inherit this one.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    matches: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for model in MODELS:
            subprocess.run([sys.executable, str(SIDE), model, f"{temporary}/{model}"], check=True)
        for match in MATCHES:
            if options.smoke:
                match = match._replace(prompts=2, new_tokens=4, warmup=0, rounds=1)
            sides = played(match, interpreters, Path(temporary) / match.model)
            require_same_work(match, sides)
            matches.append(summary(match, sides))
    report = {
        "command": " ".join(["python bench/bench_peers.py", *sys.argv[1:]]),
        "machine": machine.name("jax", "jaxlib", "flax", "optax", "numpy"),
        "peer_versions": matches[0]["sides"][0]["versions"],
        "before": before,
        "matches": matches,
        "after": machine.use(),
    }
    print(text(report))
    if options.write:
        machine.record("peers_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
