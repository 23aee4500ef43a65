"""The blocks of README.md and docs/papers.md: which figures each holds. Whoever records anew changes no line here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from figures import (
    Cell,
    Figure,
    Prose,
    Row,
    Table,
    decimals,
    listed,
    megabytes,
    milliseconds,
    percent,
    rate,
    read,
    seconds,
    spread,
)
from tpu_cases import CASES, CHIPS
from tpu_report import duration

from fastpref.reproduce.studies import PAPER_INPO, PAPER_TABLE_2, against_sft, matrix

# bench/results/kernels_cpu.json


def kernel(case: str, shown: Callable[[Any], str]) -> Figure:
    return Figure("kernels_cpu", ("results", {"case": case}), shown)


def ours(entry: Any) -> str:
    return milliseconds(entry["seconds"]["mixture_sample"][1])


def beside(entry: Any, side: str, text: str) -> str:
    return f"{milliseconds(entry['seconds'][side][1])} {text} ({entry['ratio'][side][1]:.2f})"


def fastest(side: str, text: str) -> Callable[[Any], str]:
    """A side in the orientation of the logits that is faster here."""
    return lambda entry: beside(
        entry, min((name for name in entry["ratio"] if side in name), key=lambda name: entry["seconds"][name][1]), text
    )


def sampler(what: str, case: str) -> Row:
    products, ordinary = fastest("two products", "the two products alone"), fastest("ordinary JAX", "ordinary JAX")
    return Row(what, [(kernel(case, ours),), (kernel(case, products), ", ", kernel(case, ordinary))])


def loss(what: str, case: str, kernel_name: str = "preference_loss", *, later: bool = False) -> Row:
    def side(name: str) -> Callable[[Any], str]:
        return lambda entry: f"{seconds(entry['seconds'][name][1])}, {megabytes(entry['temporary_bytes'][name])}"

    ratio = kernel(case, lambda entry: f" ordinary JAX ({entry['ratio']['ordinary JAX'][1]:.2f})")
    return Row(what, [(kernel(case, side(kernel_name)),), (kernel(case, side("ordinary JAX")), ratio)], later)


# bench/results/batcher.json and packing_cpu.json


def batches(side: str, text: str = "") -> Cell:
    return (Figure("batcher", ("rates", side, "cpu", 1), rate), text)


def forms(what: str, workload: str, best: str, others: Mapping[str, str]) -> Row:
    """Real tokens a second of the best packed form, and of padded ones with the time that ours takes for as many."""

    def of(name: str) -> Callable[[Any], str]:
        return lambda entry: decimals(1, " k/s", 1e-3)(entry[name]["tokens_per_s"])

    def against(name: str) -> Callable[[Any], str]:
        return lambda entry: f"({entry[name]['tokens_per_s'] / entry[best]['tokens_per_s']:.2f})"

    cell: list[str | Figure] = []
    for name, text in others.items():
        path = ("workloads", workload)
        cell += [Figure("packing_cpu", path, of(name)), f" {text} ", Figure("packing_cpu", path, against(name)), ", "]
    return Row(what, [(Figure("packing_cpu", ("workloads", workload), of(best)),), tuple(cell[:-1])])


# bench/results/peers_cpu.json


def beside_peer(what: str, model: str, pair: str, method: str) -> Row:
    """A step of ours and the peer's of the same match, the first of its sides, in turns with it."""
    sides = ("matches", {"model": model, "pair": pair}, "sides")
    ratio = (*sides, {"method": method, "program": "ours"}, "ratio", "median")
    return Row(
        what,
        [
            (Figure("peers_cpu", (*sides, {"method": method, "program": "ours"}, "seconds", "median"), seconds),),
            (
                Figure("peers_cpu", (*sides, 0, "seconds", "median"), seconds),
                Figure("peers_cpu", (*sides, 0, "name"), " {}".format),
                Figure("peers_cpu", ratio, lambda over: f" ({1 / over:.2f})"),
            ),
        ],
        later=True,
    )


STEP = ("steps", "IPO-MD", "seconds", "step", "median")
BOUNDS = {"padded to the bounds": "padded to the bounds"}
LONGEST = BOUNDS | {"padded to the longest of the batch": "to the longest of each batch"}

MEASURED = Table(
    ("what", "ours", "the other side (our time over its)"),
    [
        Row(
            "one IPO-MD step, Llama of 4.46 M, 8 prompts of 32, 2 × 64 new tokens",
            [
                (Figure("ipo_md_step_cpu", STEP, seconds),),
                (Figure("ipo_md_step_cpu", ("floor_s", "step"), seconds), " its matrix products at the machine's best"),
            ],
        ),
        beside_peer(
            "a step of `nash-md-pg` beside the peer's, the same model and judge", "random", "mixture", "nash-md-pg"
        ),
        beside_peer("the same, `ipo-md`: both completions from the mixture", "random", "mixture", "ipo-md"),
        beside_peer("the same, `online-ipo`", "random", "policy", "online-ipo"),
        beside_peer("a step of `nash-md-pg`, chat model of 135 M parameters", "chat", "mixture", "nash-md-pg"),
        beside_peer("the same, `ipo-md`", "chat", "mixture", "ipo-md"),
        beside_peer("the same, `online-ipo`", "chat", "policy", "online-ipo"),
        sampler("`mixture_sample`, B = 1, D = 512, V = 32128, two heads", "B = 1, float32, two heads [V, D]"),
        sampler("the same, B = 8", "B = 8, float32, two heads [V, D]"),
        sampler("the same, B = 64", "B = 64, float32, two heads [V, D]"),
        sampler("one head for both models, B = 64", "B = 64, float32, one shared head [V, D]"),
        sampler("bfloat16, two heads, B = 64", "B = 64, bfloat16, two heads [V, D]"),
        loss(
            "`preference_loss` and its gradients, N = 2048, 16 pairs of 128 tokens, same head",
            "N = 2048, 16 equal pairs, float32, trained head",
        ),
        loss("the same, 4 pairs of 512 tokens", "N = 2048, 4 equal pairs, float32, trained head"),
        loss("16 pairs, frozen head", "N = 2048, 16 equal pairs, float32, frozen head"),
        loss("`divergence`, N = 2048, two heads", "N = 2048, float32, two heads", "divergence"),
        Row(
            "packed pair batches, one core, real tokens; plan included in ours",
            [
                batches("fastpref, shared prompt"),
                (
                    *batches("NumPy slices, given the plan", " NumPy slices given the plan, "),
                    *batches("Python lists, padded", " padded Python lists, "),
                    *batches("grain best-fit", " grain's best-fit"),
                ),
            ],
        ),
        Row(
            "the same, every batch kept",
            [
                batches("fastpref, shared prompt, every batch held"),
                batches("NumPy slices, given the plan", " NumPy slices given the plan, dropped as they come"),
            ],
        ),
        Row(
            "places that hold no token, rows of 4096, window 1024",
            [
                (Figure("batcher", ("padding", "shared 4096 1024"), percent),),
                (
                    Figure("batcher", ("padding", "padded to the longest of 16 pairs"), percent),
                    " padded to the longest of 16 pairs, ",
                    Figure("batcher", ("padding", "padded to 1024 + 1024"), percent),
                    " to 1024 + 1024",
                ),
            ],
        ),
        forms(
            "loss and gradients, Llama of 4.46 M, lognormal lengths, real tokens",
            "the Llama of the step benchmark, lognormal lengths",
            "packed, L = 1024, shared prompts",
            LONGEST,
        ),
        forms(
            "the same, the demo's T5, docstrings not cut",
            "the demo's T5, docstrings not cut",
            "packed, L = 160, S = 256",
            LONGEST,
        ),
        forms(
            "the same, a small decoder, prompts all cut at 64",
            "a decoder of the demo's width and its lengths",
            "packed, L = 192, shared prompts",
            BOUNDS,
        ),
    ],
)


# bench/results/tpu_compiled.json


def whole(entry: Any) -> str:
    """The whole call, XLA's operations around the kernel included, and its share of the floor."""
    call = entry["sides"]["tpu"]["seconds"]
    return f"{duration(call)} ({int(100 * entry['floor'] / call)} %)"


def by_xla(entry: Any) -> str:
    reference = entry["sides"]["reference"]
    if "error" not in reference:
        gibibytes = reference["temporary"] / 2**30
        memory = f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{1024 * gibibytes:.0f} MiB"
        return f"{duration(reference['seconds'])}, {memory}"
    chunks = entry["sides"]["xla"]
    return "does not fit" + (f"; in chunks {duration(chunks['seconds'])}" if "error" not in chunks else "")


def compiled(what: str, case: str, peer: str | None = None, *, later: bool = False) -> Row:
    def at(chip: str, name: str, shown: Callable[[Any], str]) -> Figure:
        return Figure("tpu_compiled", ({"chip": chip, "case": name},), shown)

    cells: list[Cell] = []
    for chip in ("v5e", "v6e"):
        cells += [(at(chip, case, whole),), (at(chip, case, by_xla),)]
        if peer and chip == "v5e":
            call = at(chip, peer, lambda entry: duration(entry["sides"]["tokamax"]["seconds"]))
            cells[-1] = (*cells[-1], "; tokamax ", call)
    return Row(what, cells, later)


def slower(entries: Sequence[Any]) -> str:
    """Cases of each chip in which a whole call takes longer than ordinary JAX that fits."""
    counts = []
    for chip in CHIPS:
        cases = [entry["sides"] for entry in entries if entry["chip"] == chip]
        pairs = [
            [sides[side]["seconds"] for side in ("tpu", "reference")]
            for sides in cases
            if all("seconds" in sides.get(side, {}) for side in ("tpu", "reference"))
        ]
        counts.append(f"{sum(ours > theirs for ours, theirs in pairs)} of {len(pairs)} cases on a {chip}")
    return listed(str)(counts)


def shares(chip: str) -> Figure:
    """Of the floor, over the cases of the log-probs."""
    names = {case.name for case in CASES if case.kernel == "token_logprobs"}
    return Figure(
        "tpu_compiled",
        (),
        lambda entries: spread(decimals(0, " %", 100))(
            [
                entry["floor"] / entry["sides"]["tpu"]["seconds"]
                for entry in entries
                if entry["chip"] == chip and entry["case"] in names
            ]
        ),
    )


COMPILED = Table(
    ("what", "v5e (of its floor)", "ordinary JAX, v5e", "v6e (of its floor)", "ordinary JAX, v6e"),
    [
        compiled("`mixture_sample`, B = 128, T5-L, two heads", "mixture_sample, T5-L, B = 128"),
        compiled("the same, Llama-3-8B", "mixture_sample, Llama-3-8B, B = 128"),
        compiled("the same, B = 256", "mixture_sample, Llama-3-8B, B = 256"),
        compiled("Llama-3.2-1B, B = 64, one head for both", "mixture_sample, Llama-3.2-1B, B = 64, one head"),
        compiled(
            "`token_logprobs`, N = 16384, T5-L, forward",
            "token_logprobs, T5-L, N = 16384, forward",
            "tokamax, T5-L, N = 16384, forward, [D, V]",
        ),
        compiled(
            "forward and backward",
            "token_logprobs, T5-L, N = 16384, forward + backward",
            "tokamax, T5-L, N = 16384, forward + backward, [D, V]",
        ),
        compiled("the same, T5-XL", "token_logprobs, T5-XL, N = 16384, forward + backward"),
        compiled(
            "Llama-3-8B, forward",
            "token_logprobs, Llama-3-8B, N = 16384, forward",
            "tokamax, Llama-3-8B, N = 16384, forward, [D, V]",
        ),
        compiled(
            "forward and backward",
            "token_logprobs, Llama-3-8B, N = 16384, forward + backward",
            "tokamax, Llama-3-8B, N = 16384, forward + backward, [D, V]",
        ),
        compiled("frozen head", "token_logprobs, Llama-3-8B, N = 16384, frozen head"),
        compiled("`divergence`, N = 16384, Llama-3-8B", "divergence, Llama-3-8B, N = 16384", later=True),
    ],
)


# Prose


def demo(*path: Any, shown: Callable[[Any], str], result: str = "demo_cpu") -> Figure:
    return Figure(result, ("runs", "*", *path), shown)


def processor(name: str) -> str:
    """Processor and cores, of the name of a machine."""
    return ", ".join(name.split(", ")[:2])


def least(ends: Sequence[float]) -> str:
    """The least of some numbers, rounded down."""
    return f"{int(100 * min(ends)) / 100:.2f}"


SHOWN = 4


def demo_samples() -> str:
    """The first samples of the first seed, greedy, as the recorded run lists them."""
    lines = ["| article | the model as it came | aligned |", "| --- | --- | --- |"]
    for sample in read("demo_cpu")["runs"][0]["samples"][:SHOWN]:
        greedy = (sample[side].partition("\n\n")[0].removeprefix("greedy: ") for side in ("before", "after"))
        lines.append(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in (sample['article'], *greedy))} |")
    return "\n".join(lines)


def win_rate(study: str, **which: str) -> Figure:
    return Figure(study, (which, "win_rate"), decimals(2))


PREFERENCE_MODEL = ("AlpacaEval 2.0", "Arena-Hard", "MT-Bench")


def inpo_beside_the_paper() -> str:
    records = {record["policy"]: record for record in read("inpo-table") if record["baseline"] == "SFT"}
    lines = [
        f"| | against SFT, here | paper: {' | '.join(PREFERENCE_MODEL)} |",
        f"| --- | --- |{' --- |' * len(PREFERENCE_MODEL)}",
    ]
    for policy, printed in PAPER_INPO.items():
        here = "½"
        if policy in records:
            here = "{}, {} to {}".format(*(decimals(3)(records[policy][key]) for key in ("win_rate", "low", "high")))
        lines.append(f"| {policy} | {here} | {' | '.join(map(str, printed))} |")
    return "\n".join(lines)


Block = Table | Prose | Callable[[], str]
BLOCKS: dict[str, Block] = {
    "demo": Prose(
        (
            "On ",
            Figure("demo_cpu", ("machine",), processor),
            ", the aligned model wins ",
            demo("win_rate", shown=listed(decimals(2))),
            " of the comparisons with the one that came, for seeds ",
            demo("seed", shown=listed(str)),
            " (95 % intervals all above ",
            demo("win_rate_low", shown=least),
            "; ",
            demo("prompts", shown=spread(str)),
            " articles). From an empty folder, download included, that takes ",
            demo("total_seconds", shown=spread(decimals(1, scale=1 / 60))),
            " minutes and ",
            demo("peak_gib", shown=spread(decimals(1))),
            " GiB. Greedy summaries of the first articles of the comparison; drawn ones stand beside them in "
            "`bench/results/demo_cpu.md`:",
        )
    ),
    "demo-samples": demo_samples,
    "demo-small": Prose(
        (
            "The small demo ends with win rates of ",
            demo("win_rate", shown=listed(decimals(2)), result="demo_small_cpu"),
            " (95 % intervals all above ",
            demo("win_rate_low", shown=least, result="demo_small_cpu"),
            "): its T5 gains form, and no knowledge of the article.",
        )
    ),
    "measured": MEASURED,
    "machine": Prose(
        (
            "On ",
            Figure("kernels_cpu", ("machine",), processor),
            ", float32 unless it says otherwise: medians, and in brackets our time over the other side's, so that more "
            "than 1 is a loss. Spread, floors, all other cases and the use of the machine meanwhile are in "
            "`bench/results/`, each with its command. `make bench` times all again; a busy machine records nothing.",
        )
    ),
    "compiled": COMPILED,
    "compiled-losses": Prose(
        (
            "Of their floor the log-probs reach ",
            shares("v5e"),
            " on a v5e, ",
            shares("v6e"),
            " on a v6e, whose matrix units are wider beside the same vector units, and ",
            shares("v5p"),
            " on a v5p, of whose two cores ours use one. Ordinary JAX, where it has room to keep all logits, needs "
            "three products forward and backward to our four. Of all kernels, ours take longer than ordinary JAX in ",
            Figure("tpu_compiled", (), slower),
            ".",
        )
    ),
    "online-wins": Prose(
        (
            Figure(
                "ipo-md-table-2",
                (),
                lambda records: spread(decimals(2))(
                    [float(record["win_rate"]) for record in records if record["baseline"] == "SFT"]
                ),
            ),
        )
    ),
    "articles": Prose((Figure("ipo-md-table-2", (0, "prompts"), str),)),
    "table-2": lambda: "\n".join(matrix(read("ipo-md-table-2"), PAPER_TABLE_2)),
    "table-2-settings": lambda: "\n".join(against_sft(read("ipo-md-table-2"))),
    "online-offline": Prose(
        (
            "Agrees: at its best τ each online algorithm is far above its offline form against SFT, ",
            *(win_rate("ipo-md-figure-4", algorithm="online-ipo", tau="0.03"), " to "),
            *(win_rate("ipo-md-figure-4", algorithm="offline-ipo", tau="0.03"), " for IPO and "),
            *(win_rate("ipo-md-figure-4", algorithm="online-dpo", tau="0.03"), " to "),
            *(win_rate("ipo-md-figure-4", algorithm="offline-dpo", tau="0.1"), " for DPO. Offline DPO with a weak "),
            "regularisation even falls below SFT (",
            *(
                win_rate("ipo-md-figure-4", algorithm="offline-dpo", tau="0.01"),
                " at τ = 0.01). From τ = 0.1 on IPO is ",
            ),
            "as good offline as online: neither moves far.",
        )
    ),
    "inpo": lambda: "\n".join(matrix(read("inpo-table"), {})),
    "inpo-beside-the-paper": inpo_beside_the_paper,
}
"""What stands between the markers of each name, in whatever document has them."""
