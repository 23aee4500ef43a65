"""Kernels and their XLA counterparts, compiled for TPUs that are not there, and what the schedules say.

    python bench/tpu_lab.py --chip v5e --only 'mixture.*T5-L' --write

needs `libtpu`, not a TPU. Nothing here is measured: every figure is read from what the compiler made.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from fastpref.kernels import Head
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from rich.progress import track
from tpu_schedule import PASSES, Rates, Region, Schedule, TooLong, moved, operations, run, schedules, vmem

from fastpref import losses

RESULTS = Path(__file__).parent / "results"
DUMP = Path(tempfile.gettempdir()) / f"tpu_lab_{os.getpid()}"
PAIRS = 16


@dataclass(frozen=True)
class Chip:
    topology: str
    flops: float
    """bfloat16, per second."""
    bandwidth: float
    """Bytes per second."""
    mxu: int
    """Rows and columns of an MXU."""
    rows: float = 4
    """Rows that the MXUs of a core take in a cycle: 4 MXUs of one, or the 2 of v6e, of two."""
    cores: int = 1
    """Cores that JAX sees as one device. A sequential grid runs on one, with its share of the bandwidth."""

    @property
    def clock(self) -> float:
        return self.flops / (2 * self.mxu**2 * self.rows * self.cores)

    @property
    def rate(self) -> float:
        """Bytes per second of one core."""
        return self.bandwidth / self.cores


CHIPS = {
    "v5e": Chip("v5e:1x1", 197e12, 819e9, 128),
    "v6e": Chip("v6e:1x1", 918e12, 1640e9, 256),
    "v5p": Chip("v5p:2x2x1", 459e12, 2765e9, 128, cores=2),
}


@dataclass(frozen=True)
class Model:
    name: str
    width: int
    vocab: int
    soft_cap: float | None = None


T5_L, LLAMA_1B, LLAMA_8B = (
    Model("T5-L", 1024, 32128),
    Model("Llama-3.2-1B", 2048, 128256),
    Model("Llama-3-8B", 4096, 128256),
)
MODELS = [T5_L, Model("T5-XL", 2048, 32128), LLAMA_1B, LLAMA_8B, Model("Gemma", 2560, 262144, 30.0)]
FORWARD, BACKWARD, FROZEN = "forward", "forward + backward", "frozen head"
"""A frozen head is forward and backward too."""


@dataclass(frozen=True)
class Case:
    kernel: str
    model: Model
    rows: int
    mode: str = FORWARD
    dtype: str = "bfloat16"
    vocab_axis: int = 0
    shared: bool = False

    @property
    def sampler(self) -> bool:
        return self.kernel == "mixture_sample"

    @property
    def name(self) -> str:
        rows = f"B = {self.rows}" if self.sampler else f"N = {self.rows}, {self.mode}"
        marks = [self.dtype] * (self.dtype != "bfloat16") + ["[D, V]"] * self.vocab_axis + ["one head"] * self.shared
        return ", ".join([self.kernel, self.model.name, rows, *marks])

    @property
    def flops(self) -> int:
        products = 2 if self.sampler else {FORWARD: 1, BACKWARD: 4, FROZEN: 2}[self.mode]
        return 2 * products * self.rows * self.model.vocab * self.model.width

    @property
    def bytes(self) -> int:
        """Least that must move: heads and states read once, their gradients written once."""
        states, weight = self.rows * self.model.width, self.model.vocab * self.model.width
        heads = 2 if self.sampler and not self.shared else 1
        written = {FORWARD: 0, BACKWARD: states + weight, FROZEN: states}[self.mode]
        return jnp.dtype(self.dtype).itemsize * (heads * weight + (2 if self.sampler else 1) * states + written)

    def floor(self, chip: Chip) -> float:
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


CASES = [
    *(Case("mixture_sample", model, rows) for model in MODELS for rows in (8, 64, 128, 256)),
    Case("mixture_sample", LLAMA_1B, 64, shared=True),
    Case("mixture_sample", LLAMA_1B, 64, vocab_axis=1),
    Case("mixture_sample", LLAMA_1B, 64, dtype="float32"),
    *(
        Case("token_logprobs", model, rows, mode)
        for model in MODELS
        for rows in (2048, 16384)
        for mode in (FORWARD, BACKWARD, FROZEN)
    ),
    Case("preference_loss", LLAMA_1B, 16384, BACKWARD),
    *(Case("tokamax", model, 16384, mode, vocab_axis=1) for model in (T5_L, LLAMA_8B) for mode in (FORWARD, BACKWARD)),
]

Work = tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]


def work(case: Case, side: str) -> Work:
    """The function of one side of a case, and the shapes of its arguments."""
    model, shape = case.model, jax.ShapeDtypeStruct
    hidden = shape((case.rows, model.width), case.dtype)
    weight = shape((model.vocab, model.width)[:: 1 - 2 * case.vocab_axis], case.dtype)
    ids, values = shape((case.rows,), jnp.int32), shape((case.rows,), jnp.float32)
    if case.kernel == "tokamax":
        return tokamax(case), [hidden, weight, ids]
    folder = "mixture_sampling" if case.sampler else case.kernel
    call = import_module(f"fastpref.kernels.{folder}").IMPLEMENTATIONS[side].call

    def head(weight: jax.Array) -> Head:
        return Head(weight, case.vocab_axis, soft_cap=model.soft_cap)

    def sample(hidden: Any, ref_hidden: Any, beta: Any, key: Any, row_ids: Any, step: Any, *weights: Any) -> Any:
        heads = [head(weight) for weight in weights]
        options: dict[str, Any] = {"temperature": 1.0, "num_valid_tokens": model.vocab}
        options |= {"block": case.rows} if side == "xla" else {}
        draw = {"mixture_beta": beta, "key": key, "row_ids": row_ids, "step": step}
        return call(hidden, heads[0], ref_hidden, heads[-1], **draw, **options)

    def scored(hidden: Any, weight: Any, targets: Any, values: Any) -> Any:
        def value(hidden: Any, weight: Any) -> Any:
            options: dict[str, Any] = {"frozen_head": case.mode == FROZEN}
            if case.kernel == "token_logprobs":
                return call(hidden, head(weight), targets, where=jnp.ones(case.rows, bool), **options)
            segments = jnp.repeat(jnp.arange(2 * PAIRS), case.rows // (2 * PAIRS))
            pairs = segments, values[: 2 * PAIRS].reshape(PAIRS, 2), jnp.full(PAIRS, 0.5)
            options |= {"loss": losses.bind(losses.ipo, tau=0.1), "where": jnp.ones(PAIRS, bool)}
            return call(hidden, head(weight), targets, *pairs, **options).loss

        if case.mode == FORWARD:
            return value(hidden, weight)
        wanted = (hidden,) if case.mode == FROZEN else (hidden, weight)
        result, pull = jax.vjp(lambda *wanted: value(*wanted, *(hidden, weight)[len(wanted) :]), *wanted)
        return result, pull(values if result.ndim else jnp.ones(()))

    if not case.sampler:
        return scored, [hidden, weight, ids, values]
    scalars = [values, shape((2,), jnp.uint32), ids, shape((), jnp.int32)]
    return sample, [hidden, hidden, *scalars, *[weight] * (1 if case.shared else 2)]


def tokamax(case: Case) -> Callable[..., Any]:
    """A peer, where it can be imported: its kernels, with the tiles of its own heuristics in their names."""
    name = "linear_softmax_cross_entropy_loss"
    kernel = import_module(f"tokamax._src.ops.{name}.pallas_mosaic_tpu_kernel")

    def loss(hidden: Any, weight: Any, targets: Any) -> Any:
        sizes, dtype = (case.rows, case.model.width, case.model.vocab), jnp.dtype(case.dtype)
        forward, backward = (
            asdict(choose(*sizes, dtype=dtype))
            for choose in (kernel.get_heuristic_fwd_config, kernel.get_heuristic_bwd_config)
        )
        del forward["buffer_count"]
        value, lse = getattr(kernel, f"{name}_fwd_pallas_mosaic_tpu")(hidden, targets, weight, **forward)
        if case.mode == FORWARD:
            return value
        call = getattr(kernel, f"{name}_bwd_pallas_mosaic_tpu")
        return value, call(jnp.ones(()), lse, hidden, targets, weight, **backward)

    return loss


@dataclass
class Kernel:
    """A Pallas kernel in a compiled program, run once. Times in seconds."""

    name: str
    seconds: float
    compute: float
    """Every region at its bundles or its rows, whichever takes longer; no copies."""
    matmul: float
    """The rows alone."""
    copies: float
    """Bytes over bandwidth."""
    bytes: int
    busy: dict[str, float]
    """Share of the slots in the loops that is used, by kind."""
    spills: list[tuple[int, int, int]]
    """Runs, and spills and fills in one run, of the regions in loops that have any."""
    regions: list[tuple[int, float, int]]
    """Bundles, cycles of the MXUs and runs of the regions that take a hundredth of the time or more."""
    guesses: int
    vmem: int


@dataclass
class Program:
    """One compiled side of a case. Times in seconds."""

    optimal: float | None
    """`cost_analysis()["optimal_seconds"]`, unless it is negative or there are loops, which it counts as one turn."""
    temporary: int
    code: int
    seconds: float = 0.0
    unread: float = 0.0
    """Part of it for which the compiler's own estimate of cycles stands in."""
    bytes: int = 0
    kernels: list[Kernel] = field(default_factory=list)


def compiled(job: Work, device: Any) -> Any:
    shutil.rmtree(DUMP, ignore_errors=True)
    DUMP.mkdir()
    function, shapes = job
    place = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def scalars(job: Work) -> dict[str, dict[int, list[int]]]:
    """The whole numbers that each kernel is passed, by place, when arguments are zero: all but the kernels is run."""
    found: dict[str, dict[int, list[int]]] = {}

    def recorder(*_: Any, name: str, out_shape: Any, **options: Any) -> Callable[..., Any]:
        def record(numbers: dict[int, Any]) -> None:
            found[name] = {place: np.ravel(array).tolist() for place, array in numbers.items()}

        def call(*arguments: jax.Array) -> Any:
            whole = {place: array for place, array in enumerate(arguments) if array.dtype == jnp.int32}
            jax.debug.callback(record, {place: array for place, array in whole.items() if array.size < 1 << 16})
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out_shape)

        return call

    function, shapes = job
    jax.clear_caches()
    with mock.patch.object(pl, "pallas_call", recorder):
        jax.jit(lambda: (function(*(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)), None)[1])()
        jax.effects_barrier()
    jax.clear_caches()
    return found


def kernel(name: str, schedule: Schedule, memory: int, chip: Chip) -> Kernel:
    loops = [region for region in schedule.regions if region.depth and region.runs]

    def cycles(region: Region) -> float:
        return region.runs * max(region.bundles, region.rows / chip.rows)

    compute = sum(map(cycles, schedule.regions))
    used = Counter[str]()
    for region in loops:
        used.update({slot: region.runs * count for slot, count in region.slots.items()})
    bundles = sum(region.runs * region.bundles for region in loops)
    moves = schedule.read + schedule.written
    return Kernel(
        name,
        seconds=schedule.cycles / chip.clock,
        compute=compute / chip.clock,
        matmul=sum(region.runs * region.rows for region in schedule.regions) / chip.rows / chip.clock,
        copies=moves / chip.rate,
        bytes=moves,
        busy={slot: used[slot] / (schedule.capacity[slot] * bundles) for slot in used},
        spills=[(r.runs, r.slots["SPILL"], r.slots["FILL"]) for r in loops if r.slots["SPILL"] or r.slots["FILL"]],
        regions=[(r.bundles, r.rows / chip.rows, r.runs) for r in schedule.regions if 100 * cycles(r) >= compute],
        guesses=schedule.guesses,
        vmem=memory,
    )


def program(job: Work, chip: Chip) -> Program:
    """Compile one side of a case and read what came out."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    # Kernels that ask what chip they run on are told of the one that is not there.
    kind = AbstractDevice(platform="tpu", device_kind=device.device_kind, num_cores=chip.cores)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        known, result = scalars(job), compiled(job, device)
    files, memory, rates = schedules(DUMP), result.memory_analysis(), Rates(chip.rows, chip.rate / chip.clock)
    optimal = result.cost_analysis()["optimal_seconds"]
    found = Program(optimal if optimal > 0 else None, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes)
    copied, arrivals = 0.0, dict[str, float]()
    # JAX cannot read every program of this compiler, whose own text of it has the same form.
    for operation, runs in operations(next(DUMP.glob("*-TLP-hlo.txt")).read_text()):
        found.optimal = None if operation.code == "while" else found.optimal
        pallas = operation.code == "custom-call" and "tpu_custom_call" in operation.rest
        name = next((name for name in known if name in operation.name), operation.name.partition(".")[0])
        schedule = None
        texts = {kind: path.read_text() for kind, path in files.get(operation.name, {}).items()}
        if {"bundles", "utilization"} <= set(texts):
            with suppress(TooLong):
                schedule = run(
                    texts["bundles"], texts["utilization"], known.get(name), rates, 10_000_000 if pallas else 100_000
                )
        if operation.code.endswith("-start"):
            found.bytes += runs * moved(operation)
            copied = arrivals[operation.name] = max(copied, found.seconds) + runs * moved(operation) / chip.rate
        elif operation.code.endswith("-done"):
            found.seconds = max(found.seconds, arrivals.get(operation.rest[1:].partition(")")[0], 0.0))
        elif schedule is not None:
            found.seconds += runs * schedule.cycles / chip.clock
            found.bytes += runs * (schedule.read + schedule.written)
            found.kernels += [kernel(name, schedule, vmem(texts.get("allocations", "")), chip)] * pallas
        elif cycles := re.search(r'"estimated_cycles":"(\d+)"', operation.rest):
            found.seconds += runs * int(cycles[1]) / chip.clock
            found.unread += runs * int(cycles[1]) / chip.clock
    found.seconds = max(found.seconds, found.bytes / chip.rate)
    return found


def row(case: Case, name: str) -> dict[str, Any]:
    """One case on one chip: our side, then XLA's, in chunks where all logits at once do not compile."""
    chip, sides = CHIPS[name], dict[str, Any]()
    for side in ("tokamax",) if case.kernel == "tokamax" else ("tpu", "reference", "xla"):
        if side == "xla" and "error" not in sides["reference"]:
            break
        try:
            sides[side] = asdict(program(work(case, side), chip))
        except ImportError as error:
            sides[side] = {"error": f"not here: {error}"}
        except Exception as error:
            # Whatever stops the compiler is a result.
            sides[side] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    versions = {package: version(package) for package in ("jax", "libtpu")}
    return {"chip": name, "case": case.name, "floor": case.floor(chip), **versions, "sides": sides}


def share(case: Case, found: dict[str, Any], ours: dict[str, Any]) -> float:
    """Fraction of the floor: of a sampler the kernel alone, of a loss the whole call."""
    return float(found["floor"] / (ours["kernels"][0]["seconds"] if case.sampler else ours["seconds"]))


def asked(case: Case, found: dict[str, Any]) -> dict[str, bool]:
    """What a case has to reach on v5e, and whether it does."""
    ours = found["sides"].get("tpu", {"error": "not ours"})
    if found["chip"] != "v5e" or "error" in ours:
        return {}
    reached, kernels = share(case, found, ours), ours["kernels"]
    results = {"no spills": not any(kernel["spills"] for kernel in kernels)}
    if case.sampler and case.rows <= 128:
        results["HBM binds"] = kernels[0]["copies"] >= kernels[0]["compute"]
        results["≤ 1.05 floor"] = reached >= 1 / 1.05
    elif case.sampler:
        results["≤ 1.15 matmul"] = kernels[0]["seconds"] <= 1.15 * case.flops / CHIPS[found["chip"]].flops
    else:
        gradient = case.model.width if case.mode != FORWARD else 0
        results["memory"] = ours["temporary"] <= 4 * case.rows * (0.05 * case.model.vocab + gradient)
    if case.kernel == "token_logprobs" and case.rows == 16384 and case.model in (T5_L, LLAMA_8B):
        least = 0.92 if case.model == LLAMA_8B and case.mode != FROZEN else 0.85
        results[f"≥ {least:.0%}"] = reached >= least
    for name, side in found["sides"].items():
        if name != "tpu" and "error" not in side:
            results[f"≤ {name}'s schedule"] = ours["seconds"] <= side["seconds"]
            if side["optimal"] is not None:
                results[f"≤ {name}'s estimate"] = ours["seconds"] <= side["optimal"]
    return results


def binds(kernel: dict[str, Any]) -> str:
    """What a kernel waits for: memory, or the slots that are fullest."""
    shares = {slot: share for slot, share in kernel["busy"].items() if slot not in ("MATMUL", "FILL", "SPILL")}
    shares["MXU"] = kernel["matmul"] / kernel["compute"]
    fullest = sorted(shares, key=lambda slot: -shares[slot])[:2]
    memory = ["HBM"] * (kernel["copies"] >= kernel["compute"])
    return ", ".join([*memory, *(f"{slot} {shares[slot]:.0%}" for slot in fullest)])


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"


def fault(error: str) -> str:
    memory = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", error)
    return f"does not fit: {memory[1]} GiB of temporaries, {memory[2]} GiB of HBM" if memory else error


def cells(case: Case, found: dict[str, Any]) -> list[str]:
    """One line of a table: our side, the others, what is asked."""
    (_, ours), *others = found["sides"].items()
    start = [case.name.partition(", ")[2], duration(found["floor"])]
    theirs = "<br>".join(
        f"{other}: {fault(side['error'])}"
        if "error" in side
        else f"{other}: {duration(side['seconds'])}, {duration(side['optimal'])}, {mebibytes(side['temporary'])}"
        for other, side in others
    )
    if "error" in ours:
        return [*start, fault(ours["error"]), *[""] * 7, theirs, ""]
    kernels, limits = ours["kernels"], asked(case, found)
    spills = [f"{one} + {two}, {runs}×" for kernel in kernels for runs, one, two in kernel["spills"]]
    return [
        *start,
        " + ".join(duration(kernel["seconds"]) for kernel in kernels),
        duration(ours["seconds"]),
        f"{share(case, found, ours):.1%}",
        "<br>".join(map(binds, kernels)),
        "<br>".join(spills) or "0",
        " + ".join(mebibytes(kernel["vmem"]) for kernel in kernels),
        mebibytes(ours["temporary"]),
        mebibytes(ours["code"]),
        theirs,
        "<br>".join(f"{'✓' if holds else '✗'} {text}" for text, holds in limits.items()),
    ]


COLUMNS = (
    *("case", "floor", "kernels", "whole call", "of the floor", "binds", "spills + fills, runs", "VMEM"),
    *("temporary HBM", "code", "XLA: by its schedule, by its own estimate, temporary HBM", "asked on v5e"),
)


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    cases, lines = {case.name: case for case in CASES}, list[str]()
    for name in dict.fromkeys(found["chip"] for found in rows):
        chip, ours = CHIPS[name], [found for found in rows if found["chip"] == name]
        cores = f", {chip.cores} cores as one device" if chip.cores > 1 else ""
        lines += [f"## {name}", ""]
        lines += [
            f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s, {chip.clock / 1e9:.2f} GHz{cores}."
        ]
        limits = [item for found in ours for item in asked(cases[found["case"]], found).items()]
        for text in dict.fromkeys(text for text, _ in limits):
            results = [holds for other, holds in limits if other == text]
            lines += [""] * (text == limits[0][0]) + [f"- {text}: {sum(results)} of {len(results)}"]
        for kernel in dict.fromkeys(cases[found["case"]].kernel for found in ours):
            chosen = [found for found in ours if cases[found["case"]].kernel == kernel]
            table = [COLUMNS, ["---"] * len(COLUMNS), *(cells(cases[found["case"]], found) for found in chosen)]
            lines += ["", f"### {kernel}", "", *(f"| {' | '.join(line)} |" for line in table)]
        lines += ["", "<details><summary>Bundles / MXU cycles × runs of each region</summary>", ""]
        for found in ours:
            for kernel in next(iter(found["sides"].values())).get("kernels", []):
                parts = ", ".join(f"{bundles} / {matmul:.0f} × {runs}" for bundles, matmul, runs in kernel["regions"])
                guesses = f"; {kernel['guesses']} guesses" if kernel["guesses"] else ""
                lines.append(f"- {found['case']}, `{kernel['name']}`: {parts}{guesses}")
        lines += ["", "</details>", ""]
    return lines


def write(rows: list[dict[str, Any]]) -> None:
    """Put the rows in the place of older ones; where a peer is missing, its older row stays."""
    data = RESULTS / "tpu_compiled.json"
    kept = {(old["chip"], old["case"]): old for old in (json.loads(data.read_text()) if data.exists() else [])}
    for new in rows:
        place = new["chip"], new["case"]
        if place not in kept or "not here" not in new["sides"].get("tokamax", {}).get("error", ""):
            kept[place] = new
    ordered = [kept[name, case.name] for name in CHIPS for case in CASES if (name, case.name) in kept]
    data.write_text(json.dumps(ordered, indent=1) + "\n")
    programs = [side for found in ordered for side in found["sides"].values() if "error" not in side]
    preface = PREFACE.format(unread=sum(side["unread"] > 0 for side in programs), programs=len(programs))
    (RESULTS / "tpu_compiled.md").write_text("\n".join([preface, *markdown(ordered)]).rstrip() + "\n")


PREFACE = """\
# Kernels compiled for TPUs

`python bench/tpu_lab.py --write`, with the compiler of `libtpu` and no TPU: **compiled**, never measured. bfloat16,
weights [V, D] and two heads unless a case says otherwise; of a loss, no row is ignored.

**Kernels.** The compiler's final schedule is cut into regions at branches and their targets. Its scalar instructions
are run, with the numbers that the kernel is passed, which tells how often each region runs and every copy from and to
HBM with its size. A region takes its bundles or the cycles for which its rows occupy the MXUs, whichever is more:
bundles alone undercount, since the hardware waits for an MXU that is not free. Copies go one after the other, in the
order of their start, at the full bandwidth; who waits for a copy waits. *Kernels* is the time until the last
instruction, with the first copies that nothing hides; *whole call* adds the operations of XLA around them.

**Floor.** The products' flops over the peak, or the least bytes (heads and states read once, gradients written once)
over the bandwidth, whichever takes longer. Products: two for a sampler, one forward (2NDV), four forward and backward
(8NDV), two with a frozen head (4NDV). *Of the floor* is for the kernel of a sampler and the whole call of a loss.

**Binds.** HBM where copies take longer than regions, then the two fullest kinds of slot in the loops; for the MXU, its
share of the regions' time. **Spills** are vector registers to and from memory in one run of a region in a loop, and how
often it runs. **VMEM** is what the kernel allocates, spills included; temporary HBM and code are the whole call's.

**XLA.** `reference` is ordinary JAX with all logits at once, for the same chip; where those do not compile, `xla`, in
chunks. Of its schedule: each operation's schedule is run in the same way, operations follow one another, and
asynchronous copies overlap with them. Less certain than for kernels: where a size or a condition depends on data the
branch is taken to run, copies of unknown size count for nothing, and a loop of unknown length for one turn, all of
which flatters XLA; for an operation whose schedule is too long to be run ({unread} of the {programs} programs have one)
the compiler's own estimate of its cycles stands in. The next figure is `cost_analysis()["optimal_seconds"]`: none where
it is negative, or the program has loops, whose bodies it counts once.

**Uncertain for both.** No latency of a copy, no stall of the vector units, no conflict of banks: real times are longer,
most where a schedule has no slack. For six loops of XLA's sampler (T5-L, B = 128, v5e) the compiler's own static
profile has 6 to 28 % more cycles than are counted here.

**Chips.** Clocks follow from the peak and the MXUs. The two 256 × 256 MXUs of a v6e are taken to accept two rows a
cycle, as its peak and the pace of its schedules imply. A v5p has two cores that JAX sees as one device: a sequential
grid runs on one of them, here with half the bandwidth, while floors are those of both.

**Asked on v5e.** B ≤ 128: HBM binds, at most 1.05 of the floor; B = 256: at most 1.15 of the matmul time. N = 16384: of
the floor at least 92 % at Llama-3-8B and 85 % at T5-L and with a frozen head. No spills in any loop. Memory: temporary
HBM at most 5 % of 4NV bytes plus the gradient of the hidden states in float32. Not slower than XLA by either estimate:
out of reach, forward and backward, where XLA has room to keep the logits, since it then needs three products for the
four that it takes to compute them again.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="may be given more than once")
    parser.add_argument("--only", default="", help="regular expression that the name of a case must match")
    parser.add_argument("--write", action="store_true", help="update bench/results/tpu_compiled.md and .json")
    options = parser.parse_args()
    sys.path.append(str(Path(sys.prefix) / "libtpu"))
    if find_spec("libtpu") is None:
        parser.error("libtpu, the TPU's compiler, is missing: `make test` installs it, or install it with pip")
    jax.config.update("jax_platforms", "cpu")
    flags = [f"dump_to={DUMP}", "dump_llo_text=true", f"dump_llo_pass_label_regex={PASSES}"]
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(f"--xla_jf_{flag}" for flag in flags),
    }
    jobs = [(case, name) for name in options.chip or CHIPS for case in CASES if re.search(options.only, case.name)]
    rows = [row(*job) for job in track(jobs, "Compiling")]
    shutil.rmtree(DUMP, ignore_errors=True)
    print("\n".join(markdown(rows)))
    if options.write:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
