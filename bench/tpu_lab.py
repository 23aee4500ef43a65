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
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import machine
import numpy as np
import tpu_compiler
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from rich.progress import track
from tpu_cases import CASES, CHIPS, Case, Chip, Work, work
from tpu_report import markdown, text
from tpu_schedule import PASSES, Rates, Region, Schedule, TooLong, moved, operations, run, schedules, vmem

DUMP = Path(tempfile.gettempdir()) / f"tpu_lab_{os.getpid()}"


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

        def call(*arguments: Any) -> Any:
            flat = enumerate(jax.tree.leaves(arguments))
            whole = {place: array for place, array in flat if array.dtype == jnp.int32}
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


def write(rows: list[dict[str, Any]]) -> None:
    """Put the rows in the place of older ones; where a peer is missing, its older row stays."""
    data = machine.RESULTS / "tpu_compiled.json"
    kept = {(old["chip"], old["case"]): old for old in (json.loads(data.read_text()) if data.exists() else [])}
    for new in rows:
        place = new["chip"], new["case"]
        if place not in kept or "not here" not in new["sides"].get("tokamax", {}).get("error", ""):
            kept[place] = new
    ordered = [kept[name, case.name] for name in CHIPS for case in CASES if (name, case.name) in kept]
    machine.record("tpu_compiled", ordered, text(ordered))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="may be given more than once")
    parser.add_argument("--only", default="", help="regular expression that the name of a case must match")
    parser.add_argument("--write", action="store_true", help="update bench/results/tpu_compiled.md and .json")
    options = parser.parse_args()
    flags = [f"dump_to={DUMP}", "dump_llo_text=true", f"dump_llo_pass_label_regex={PASSES}"]
    tpu_compiler.prepare(LIBTPU_INIT_ARGS=" ".join(f"--xla_jf_{flag}" for flag in flags))
    jobs = [(case, name) for name in options.chip or CHIPS for case in CASES if re.search(options.only, case.name)]
    rows = [row(*job) for job in track(jobs, "Compiling")]
    shutil.rmtree(DUMP, ignore_errors=True)
    print("\n".join(markdown(rows)))
    if options.write:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
