"""What a TPU program does, from the schedule that its compiler dumps: its regions, how often each runs, what it moves.

A schedule has a vector part, whose slots are counted, and a scalar part, which holds the loops, the conditions and the
sizes of the copies. The scalar part depends on shapes and a few scalar operands, so it can be run: that tells how often
each region runs and how many bytes go to and from HBM, with no model of the kernel.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, prod
from pathlib import Path
from typing import NamedTuple

SLOTS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
GRANULE = 32
"""Bytes in the unit of a copy's size."""
_DELAY = 4
"""Bundles after a branch that run before it is taken."""
_MASK, _SIGN = 0xFFFFFFFF, 0x80000000


class Region(NamedTuple):
    """Bundles that run together, from a branch or its target to the next."""

    start: int
    bundles: int
    depth: int
    """Loops around it."""
    runs: int
    rows: int
    """Rows that go through the MXUs, each of them counted alone."""
    slots: dict[str, int]
    """Uses of each kind of slot in one run."""


class Rates(NamedTuple):
    """What a chip does in a cycle; an endless rate takes no time."""

    rows: float = inf
    """Through all its MXUs together."""
    bytes: float = inf
    """Copied from and to HBM."""


class Schedule(NamedTuple):
    """One run of a fusion or kernel."""

    regions: list[Region]
    capacity: dict[str, int]
    """Slots of each kind in a bundle."""
    cycles: float
    """Until it ends. A region takes its bundles or its rows, whichever is more; copies go one after the other at the
    full rate, and who waits for one waits."""
    read: int
    """Bytes copied from HBM."""
    written: int
    guesses: int
    """Branches and copies whose condition or size nobody knows. Such a branch is not taken: what it skips runs."""


class TooLong(Exception):
    """The scalar program outlasts its limit."""


class _Instruction(NamedTuple):
    target: str
    kind: str
    operands: list[list[str]]
    """Terms of each operand's sum: registers, predicates and constants."""
    condition: str | None
    wanted: int
    old: str | None
    """Register whose value is kept where the condition does not hold."""
    label: str | None


class _Bundle(NamedTuple):
    depth: int
    labels: list[str]
    steps: list[_Instruction]
    rows: int
    slots: list[int]


@dataclass
class _Machine:
    values: dict[str, int | None]
    """Registers by both of their names, the virtual and the real one; predicates are 0 or 1; constants by their text.
    None is what came from a vector."""
    memory: dict[int, int | None]
    rates: Rates
    clock: float = 0
    copied: float = 0
    """When the last of the copies is done."""
    arrivals: dict[int | None, float] = field(default_factory=dict)
    """When the last copy is done that raises a flag."""
    read: int = 0
    written: int = 0
    guesses: int = 0


_ADDRESS = r" *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:"
_BUNDLE = re.compile(r" *([0-9a-fx]+) +(?:[A-Z]{2})? *: *(>*) *\{(.*)", re.S)
_NOISE = re.compile(r"/\*.*?\*/|\[(?:resolvable|thread):\$?\w+\]|[{}]", re.S)
_INSTRUCTION = re.compile(r"\s*%(\S+) = (\S+) *(?:\((!?)%(\w+)(?:, %(\w+))?\),? *)?(.*)", re.S)
_KEPT = re.compile(r"[sp]\d+_\w+ |\d+ (?:sbr|sst|dma\.)")
_CORE = re.compile(r"sld \[smem:\[(#allocation\d+)\]\][^;/]*/\*[^*]*\bcore id\b")
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")


def _signed(value: int) -> int:
    return (value ^ _SIGN) - _SIGN


def _compare(test: Callable[[int, int], bool]) -> Callable[[int, int], int]:
    return lambda left, right: int(test(_signed(left), _signed(right)))


_OPERATIONS: dict[str, Callable[..., int]] = {
    "sadd": lambda a, b: a + b & _MASK,
    "ssub": lambda a, b: a - b & _MASK,
    "smul": lambda a, b: a * b & _MASK,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda a, b: a << b & _MASK,
    "sshrl": operator.rshift,
    "sshra": lambda a, b: _signed(a) >> b & _MASK,
    "smin.u32": min,
    "smax.u32": max,
    "smin.s32": lambda a, b: min(a, b, key=_signed),
    "smax.s32": lambda a, b: max(a, b, key=_signed),
    "scalar_lea": lambda a, b: a + b & _MASK,
    "scalar_select": lambda flag, a, b: a if flag else b,
    "pneg": lambda a: 1 - a,
    "por": operator.or_,
    "pand": operator.and_,
    "pnand": lambda a, b: 1 - (a & b),
    **dict.fromkeys(("smov", "pmov", "sphi", "int_to_ptr", "inlined_call_operand"), lambda a: a),
    **{f"scmp.{test}.s32": _compare(getattr(operator, test)) for test in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"scmp.{test}.u32": getattr(operator, test) for test in ("eq", "ne", "lt", "le", "gt", "ge")},
}


def run(
    bundles: str,
    utilization: str,
    operands: Mapping[int, Sequence[int]] | None = None,
    rates: Rates | None = None,
    limit: int = 1_000_000,
) -> Schedule:
    """Run the scalar part of a schedule.

    Args:
      bundles: text of `*-final_bundles.txt`.
      utilization: text of the same program's `*-final_hlo-static-per-bundle-utilization.txt`.
      operands: contents of the scalar operands, by their place in the call.
      rates: of the chip; None for the defaults of `Rates`.
      limit: regions to run, after which it is given up.

    Raises:
      ValueError: if the texts are not of one program.
      TooLong: if the limit is passed.
    """
    rates = Rates() if rates is None else rates
    program, capacity = _parse(bundles, utilization)
    labels = {label: place for place, bundle in reversed(list(enumerate(program))) for label in bundle.labels}
    jumps = [(place, step.label) for place, bundle in enumerate(program) for step in bundle.steps if step.label]
    # A region without a start lies behind the end.
    goals = {label: labels.get(label, len(program)) for _, label in jumps}
    cuts = {0, len(program), *goals.values(), *(min(place + 1 + _DELAY, len(program)) for place, _ in jumps)}
    blocks = dict(pairwise(sorted(cuts)))
    live = _live([step for bundle in program for step in bundle.steps])
    steps = {
        first: [
            (place, step)
            for place, bundle in enumerate(program[first:last])
            for step in bundle.steps
            if step.target in live
        ]
        for first, last in blocks.items()
    }
    regions = {first: _region(program[first:last], first) for first, last in blocks.items()}
    cores = _CORE.findall(bundles)
    machine = _start([step for block in steps.values() for _, step in block], operands or {}, cores, rates)
    runs, here = Counter[int](), 0
    while here in blocks:
        if (limit := limit - 1) < 0:
            raise TooLong
        region, after = regions[here], blocks[here]
        runs[here] += 1
        for place, step in steps[here]:
            if (label := _execute(step, machine, place)) is not None:
                after = goals[label]
        machine.clock += max(region.bundles, region.rows / rates.rows)
        here = after
    return Schedule(
        [region._replace(runs=runs[first]) for first, region in regions.items()],
        capacity,
        machine.clock,
        machine.read * GRANULE,
        machine.written * GRANULE,
        machine.guesses,
    )


def _parse(bundles: str, utilization: str) -> tuple[list[_Bundle], dict[str, int]]:
    head, _, body = utilization.partition("== UTILIZATION:\n")
    slots = [[int(number) for number in line.split()] for line in body.splitlines()]
    # Comments span lines: a bundle goes on until the next address.
    found = [match for text in re.split(rf"\n(?={_ADDRESS})", bundles) if (match := _BUNDLE.fullmatch(text))]
    if [int(match[1], 16) for match in found] != list(range(len(slots))):
        raise ValueError(f"{len(found)} bundles and {len(slots)} lines of slots are not of one program")
    capacity = dict(zip(SLOTS, map(int, head.splitlines()[-1].split()), strict=True))
    return [_bundle(match, use) for match, use in zip(found, slots, strict=True)], capacity


def _bundle(match: re.Match[str], slots: list[int]) -> _Bundle:
    found = [part for text in _NOISE.sub("", match[3]).split(";;") if (part := _INSTRUCTION.match(text))]
    steps = [_instruction(part) for part in found if _KEPT.match(f"{part[1]} {part[2]}")]
    # What reads a phi may be written before it in the same bundle.
    steps.sort(key=lambda step: step.kind != "sphi")
    # A register holds 8 rows of float32, 16 of bfloat16.
    rows = sum(8 if ".f32." in part[2] else 16 for part in found if part[2].startswith("vmatmul"))
    return _Bundle(len(match[2]), _LABEL.findall(match[3]), steps, rows, slots)


def _instruction(found: re.Match[str]) -> _Instruction:
    target, name, negated, condition, old, rest = found.groups()
    kind, *suffixes = name.split(".")
    label = None
    if kind in ("scmp", "smin", "smax", "dma"):
        kind = ".".join([kind, *suffixes[:2]])
    elif kind == "sbr":
        label, rest = rest.split("$region")[1].strip(), ""
    elif kind == "inlined_call_operand":
        rest = ("#value" if "<no" in suffixes else "#operand") + re.findall(r"index: (-?\d+)", rest)[0]
    elif kind == "sst":
        rest = rest.replace("]] ", "]], ")
    elif kind == "sld" and (behind := re.search(r"\((!?)%(\w+)\)\s*$", rest)):
        negated, condition, rest = *behind.groups(), rest[: behind.start()]
    operands = [re.findall(r"[^\s+%\[\]]+", text.replace("[smem:", "")) for text in rest.split(",")]
    return _Instruction(target, kind, operands, condition, 0 if negated else 1, old, label)


def _live(steps: list[_Instruction]) -> set[str]:
    """Targets of the instructions that branches, copies and memory depend on."""
    sources = {
        step.target: [step.condition, step.old, *(term for terms in step.operands for term in terms)] for step in steps
    }
    live, waiting = set[str](), [step.target for step in steps if step.kind.startswith(("sbr", "sst", "sld", "dma"))]
    while waiting:
        if (name := waiting.pop()) in sources and name not in live:
            live.add(name)
            waiting += [source for source in sources[name] if source]
    return live


def _start(
    steps: list[_Instruction], operands: Mapping[int, Sequence[int]], cores: list[str], rates: Rates
) -> _Machine:
    """Constants, addresses and the contents of scalar memory."""
    texts = {term for step in steps for terms in step.operands for term in terms}
    numbers = {text for text in texts if re.fullmatch(r"\$0x[0-9a-f]+|\d+", text)}
    values: dict[str, int | None] = {text: int(text.lstrip("$"), 0) & _MASK for text in numbers}
    values |= {text: _operand(int(text[8:])) for text in texts if text.startswith("#operand")}
    # A lone number is passed by value, in no memory.
    values |= {f"#value{place}": row[0] & _MASK for place, row in operands.items() if len(row) == 1}
    allocations = sorted(text for text in texts if text.startswith("#allocation"))
    values |= {text: (1 << 30) + (place << 18) for place, text in enumerate(allocations)}
    memory: dict[int, int | None] = {}
    for place, row in operands.items():
        memory |= {_operand(place) + index: value & _MASK for index, value in enumerate(row)}
    # On a chip of two cores, the first is run. It does at least as much as the other.
    memory |= {place: 0 for text in cores if (place := values.get(text)) is not None}
    return _Machine(values, memory, rates)


def _operand(place: int) -> int:
    """An address that tells operands apart, also after a shift by 4."""
    return (1 << 24) + (place << 12)


def _execute(step: _Instruction, machine: _Machine, place: int) -> str | None:
    """Run one instruction, so many bundles into its region; the label to go to, if it is a branch that is taken."""
    values = machine.values
    flag = step.wanted if step.condition is None else values.get(step.condition)
    machine.guesses += flag is None and step.kind.startswith(("sbr", "dma"))
    if step.label is not None:
        return step.label if flag == step.wanted else None
    if flag == step.wanted or (flag is None and step.old is None):
        result = _result(step, machine, place)
    elif step.old is None:
        return None
    else:
        result = None if flag is None else values.get(step.old)
    if register := _register(step):
        values[step.target] = values[register] = result
    return None


def _register(step: _Instruction) -> str:
    """The real register that it writes, if it writes one: the others have a bare number for a name."""
    return step.target.partition("_")[2]


def _result(step: _Instruction, machine: _Machine, place: int) -> int | None:
    """The value of an instruction that has one; of others, the effect."""
    values, memory = machine.values, machine.memory
    if step.kind == "sphi":
        # Registers have been allocated: whichever value arrives is in the phi's own register.
        return values.get(_register(step))
    terms = [[values.get(term) for term in terms] for terms in step.operands]
    arguments = [None if None in parts else sum(part or 0 for part in parts) for parts in terms]
    first, *others = arguments
    if step.kind == "dma.done.wait":
        machine.clock = max(machine.clock, machine.arrivals.get(first, 0) - place)
    elif step.kind.startswith("dma"):
        _copy(step.kind, arguments, machine, place)
    elif first is None or None in others:
        return None
    elif step.kind == "sld":
        return memory.get(first)
    elif step.kind == "sst":
        memory[first] = others[0]
    elif step.kind in _OPERATIONS:
        return _OPERATIONS[step.kind](*arguments)
    return None


def _copy(kind: str, arguments: list[int | None], machine: _Machine, place: int) -> None:
    source, size, goal, flag = arguments[:4]
    machine.guesses += size is None
    granules = size or 0
    machine.read += granules * ("hbm_to" in kind)
    machine.written += granules * ("to_hbm" in kind)
    if "hbm" in kind:
        machine.copied = max(machine.copied, machine.clock + place) + granules * GRANULE / machine.rates.bytes
        machine.arrivals[flag] = machine.copied
    if kind.endswith("_to_smem") and source is not None and goal is not None:
        start = source if source in machine.memory else source >> 4
        words = range(granules * GRANULE // 4)
        machine.memory |= {goal + index: machine.memory.get(start + index) for index in words}


def _region(bundles: list[_Bundle], start: int) -> Region:
    totals = map(sum, zip(*(bundle.slots for bundle in bundles), strict=True))
    rows = sum(bundle.rows for bundle in bundles)
    return Region(start, len(bundles), bundles[0].depth, 0, rows, dict(zip(SLOTS, totals, strict=True)))


class Operation(NamedTuple):
    """An operation of a compiled program."""

    name: str
    shape: str
    code: str
    rest: str


_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_NUMBER = re.compile(r"\d+(?=\))")
_OPERATION = re.compile(r" +(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)")


def operations(hlo: str) -> Iterator[tuple[Operation, int]]:
    """Every operation of the program, and how often it runs: once in a loop whose length it does not say."""
    computations: dict[str, list[Operation]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            entry = name if found[1] else entry
            computations[name] = []
        elif name and (found := _OPERATION.match(line)):
            computations[name].append(Operation(*found.groups()))

    def trips(loop: Operation) -> int:
        # Loops of JAX count from 0 to a bound, the one constant of their condition.
        condition = computations[re.findall(r"condition=%([\w.-]+)", loop.rest)[0]]
        bounds = [int(found[0]) for one in condition if one.code == "constant" and (found := _NUMBER.match(one.rest))]
        return bounds[0] if len(bounds) == 1 else 1

    def walk(name: str, runs: int) -> Iterator[tuple[Operation, int]]:
        for operation in computations[name]:
            yield operation, runs
            if operation.code in ("while", "call", "conditional"):
                times = trips(operation) if operation.code == "while" else 1
                for called in re.findall(r"(?:body|to_apply|_computation)=%([\w.-]+)", operation.rest):
                    yield from walk(called, runs * times)

    return walk(entry, 1)


_KINDS = {
    "final_bundles": "bundles",
    "final_hlo-static-per-bundle-utilization": "utilization",
    "post-scalar-select-transform": "allocations",
}
PASSES = "|".join(("final_", "post-scalar-select", "deduplication"))
"""Of the compiler, which write what is read here."""


def schedules(folder: Path) -> dict[str, dict[str, Path]]:
    """Files of each operation in a dump, by kind: bundles, their utilization and allocations."""
    found: dict[str, dict[str, Path]] = {}
    for path in folder.iterdir():
        if match := re.fullmatch(rf"\d+-(.+)-\d+-({'|'.join(_KINDS)})\.txt", path.name):
            found.setdefault(match[1], {})[_KINDS[match[2]]] = path
    for path in folder.glob("*deduplication-map.txt"):
        for group in path.read_text().split("key:")[1:]:
            key, *others = (line.strip() for line in group.splitlines())
            found = dict.fromkeys(others, found.get(key, {})) | found
    return found


def vmem(allocations: str) -> int:
    """Bytes of VMEM that an operation allocates, spills included."""
    sizes = dict(re.findall(r"#(allocation\w+) \[.*? space=vmem, size = (0x[0-9a-f]+)", allocations))
    return sum(int(size, 16) for size in sizes.values())


def moved(operation: Operation) -> int:
    """Bytes that an asynchronous copy takes from or to HBM: the memory without a number."""
    shapes = re.findall(r"([a-z]+)(\d+)\[([\d,]*)\](\{[^}]*\})?", operation.shape)[:2]
    sizes = [int(bits) // 8 * prod(int(size) for size in dims.split(",") if size) for _, bits, dims, _ in shapes]
    return min(sizes, default=0) * sum("S(" not in layout for *_, layout in shapes)
