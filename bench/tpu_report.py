"""What the lab found, as Markdown: one line a case, and what it has to reach."""

import re
from typing import Any

from tpu_cases import BACKWARD, CASES, CHIPS, FORWARD, FROZEN, LLAMA_8B, T5_L, Case


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
        gradients = 4 * case.rows * case.model.width if case.mode != FORWARD else 0
        gradients += 2 * case.model.vocab * case.model.width if case.mode == BACKWARD else 0
        logits = 4 * case.models * case.rows * case.model.vocab
        results["memory"] = ours["temporary"] <= 0.05 * logits + gradients
    if case.kernel in ("token_logprobs", "divergence") and case.rows == 16384 and case.model in (T5_L, LLAMA_8B):
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


PREFACE = """\
# Kernels compiled for TPUs

`python bench/tpu_lab.py --write`, with the compiler of `libtpu` and no TPU: **compiled**, never measured. bfloat16,
weights [V, D] and two heads unless a case says otherwise; of losses and divergences, no row is ignored.

**Kernels.** The compiler's final schedule is cut into regions at branches and their targets. Its scalar instructions
are run, with the numbers that the kernel is passed, which tells how often each region runs and every copy from and to
HBM with its size. A region takes its bundles or the cycles for which its rows occupy the MXUs, whichever is more:
bundles alone undercount, since the hardware waits for an MXU that is not free. Copies go one after the other, in the
order of their start, at the full bandwidth; who waits for a copy waits. *Kernels* is the time until the last
instruction, with the first copies that nothing hides; *whole call* adds the operations of XLA around them.

**Floor.** The products' flops over the peak, or the least bytes (heads and states read once, gradients written once)
over the bandwidth, whichever takes longer. Products: two for a sampler or a divergence (4NDV), one forward (2NDV), four
forward and backward (8NDV), two with a frozen head (4NDV). *Of the floor* is for the kernel of a sampler and the whole
call of everything else.

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
HBM at most 5 % of 4NV bytes, of each model, plus the gradients (of the hidden states in float32, of the head in
bfloat16). Not slower than XLA by either estimate.

**Not reached.** Spills: most elementwise parts have some, since the compiler interleaves them with the products to keep
the MXUs busy and so has more values alive than registers; loads and stores have free slots there, and what binds is the
MXU or HBM as shown. One head for both models at B = 64 reads half the bytes for as many products: the MXU binds. Not
slower than XLA, forward and backward, where XLA has room to keep the logits: it then needs three products, for the four
that it takes to compute them again.

**Other chips.** Nothing is asked of them. On a v6e, whose matrix units are wider and faster beside the same vector
units, the work on the logits takes more bundles than the products take cycles. On a v5p one of the two cores idles.

**Models.** Llama-3-8B and Gemma are shapes of heads. Nothing here says that a whole model of that size fits a chip, and
`fastpref` cannot split one over several yet.
"""


def text(rows: list[dict[str, Any]]) -> str:
    programs = [side for found in rows for side in found["sides"].values() if "error" not in side]
    preface = PREFACE.format(unread=sum(side["unread"] > 0 for side in programs), programs=len(programs))
    return "\n".join([preface, *markdown(rows)]).rstrip() + "\n"
