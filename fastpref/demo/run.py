"""The demo: on two CPU cores, in minutes, a small model learns to summarise docstrings and is then aligned by IPO-MD.

1. Harvest docstrings: the body is the article, the first line its summary (`docstrings.py`).
2. Train a tokenizer and fine-tune a small T5 from scratch: the SFT model, which is also the reference.
3. Let the SFT model write two summaries of each preference article; the gold judge (`gold.py`) labels them.
4. Fit a preference model to those labels. From here on the gold judge is not consulted until the end.
5. Align the SFT model with IPO-MD against the preference model.
6. On held-out articles, let the gold judge compare the aligned policy with the SFT model.

Every stage writes to its own folder of the run directory and goes on from there when the demo is started again.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from flax import nnx
from rich.console import Console

from fastpref.data import files
from fastpref.data.tokenizer import Tokenizer
from fastpref.demo import docstrings
from fastpref.demo.gold import GoldJudge
from fastpref.evaluation.side_by_side import compare
from fastpref.evaluation.win_rates import WinRate
from fastpref.judging.models import PreferenceModel
from fastpref.learning.supervised import fit_preference_model, sft
from fastpref.learning.train import train
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.schedules import Schedule
from fastpref.models import T5, LanguageModel, T5Config
from fastpref.runs import owner, terminal
from fastpref.sampling.generate import write

VOCAB_SIZE = 3072
MAX_PROMPT_TOKENS = 64
MAX_NEW_TOKENS = 24
PAIRS_PER_PROMPT = 4
SAMPLES = 10

T5_CONFIG = T5Config(
    vocab_size=VOCAB_SIZE,
    width=128,
    hidden=256,
    encoder_layers=2,
    decoder_layers=2,
    heads=4,
    head_dim=32,
    tied=True,
    scaled_output=True,
)

SFT = SupervisedConfig(
    steps=700,
    batch_size=16,
    max_prompt_tokens=MAX_PROMPT_TOKENS,
    max_completion_tokens=32,
    overlong="truncate",
    optimizer="adamw",
    learning_rate=Schedule(start=2e-3, end=2e-4, steps=700, kind="cosine"),
    max_grad_norm=1.0,
    max_shapes=1,
    eval_every=100,
)
PREFERENCE = SupervisedConfig(
    steps=700,
    batch_size=16,
    max_prompt_tokens=MAX_PROMPT_TOKENS,
    overlong="truncate",
    optimizer="adamw",
    learning_rate=Schedule(start=1e-3, end=1e-4, steps=700, kind="cosine", warmup=0.1),
    max_grad_norm=1.0,
    max_shapes=1,
    eval_every=100,
)
IPO_MD = TrainConfig(
    algorithm="ipo-md",
    tau=0.03,
    mixture_beta=0.125,
    steps=150,
    batch_size=32,
    max_prompt_tokens=MAX_PROMPT_TOKENS,
    overlong="truncate",
    max_shapes=1,
    max_new_tokens=MAX_NEW_TOKENS,
    row_tokens=64,
    prompt_row_tokens=128,
    optimizer="adamw",
    learning_rate=4e-4,
    max_grad_norm=1.0,
    eval_every=50,
    eval_prompts=128,
)

DEMO_PROMPT = "{prompt} 1: {first} 2: {second}"
"""Short, and ends where the second summary ends: a model of this size finds no answer far from what it is about."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Args:
      win_rate: gold judge, aligned policy against SFT model, on held-out articles.
      agreement: held-out agreement of the preference model with the gold judge.
      seconds: of each stage.
    """

    win_rate: WinRate
    agreement: float | None
    seconds: dict[str, float]


def _pairs(examples: list[docstrings.Example]) -> list[dict[str, str]]:
    return [{"prompt": example.prompt, "completion": example.summary} for example in examples]


class Prepared(NamedTuple):
    """What alignment starts from."""

    parts: docstrings.Splits
    reference: LanguageModel
    """The SFT model."""
    pairs: list[dict[str, Any]]
    """Pairs of its summaries, labelled by the gold judge: `prompt`, `chosen`, `rejected`, `preference`."""
    judge: PreferenceModel
    agreement: float | None
    """Held-out agreement of the preference model with the gold judge."""


def learned_and_held_out(pairs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Labelled pairs to learn from, and the eighth of them that is held out."""
    held_back = len(pairs) // 8
    return pairs[held_back:], pairs[:held_back]


def run(run_dir: Path | str, *, seed: int = 0, quiet: bool = False) -> DemoResult:
    """Run the demo, or go on with one that was stopped.

    Args:
      run_dir: where everything is written.
      seed: of the initial weights, orders and draws.
      quiet: print nothing.

    Returns:
      `DemoResult`.

    Raises:
      OwnerError: another process is writing this demo.
    """
    folder = Path(run_dir) / f"seed-{seed}"
    with owner.hold(folder):
        return _run(folder, seed, quiet)


def _run(folder: Path, seed: int, quiet: bool) -> DemoResult:
    console = Console(quiet=quiet)
    stages = _Stages(console)
    ready = prepare(folder, stages, seed=seed, quiet=quiet)

    with stages("5. IPO-MD"):
        aligned = train(
            ready.reference,
            [example.prompt for example in ready.parts.online],
            ready.judge,
            dataclasses.replace(IPO_MD, seed=seed),
            run_dir=folder / "ipo-md",
            eval_prompts=[example.prompt for example in ready.parts.preference],
            quiet=quiet,
        ).policy

    with stages("6. Side by side, by the gold judge"):
        compared = compare(
            aligned,
            ready.reference,
            [example.prompt for example in ready.parts.held_out],
            GoldJudge(),
            max_new_tokens=MAX_NEW_TOKENS,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            seed=seed,
        )
        files.write_jsonl(folder / "side_by_side.jsonl", compared.records())

    _show(compared, ready.parts.held_out, console)
    result = DemoResult(compared, ready.agreement, stages.seconds)
    _summarise(result, folder, console)
    return result


class _Stages:
    """Names stages as they begin, and keeps how long they took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self.console.rule(name)
        yield
        self.seconds[name] = time.perf_counter() - began


def prepare(folder: Path, stages: "_Stages | None" = None, *, seed: int = 0, quiet: bool = False) -> Prepared:
    """The stages before alignment, or what they left when they ran before.

    Args:
      folder: where they write.
      stages: told of each stage.
      seed: of the initial weights, orders and draws.
      quiet: show no progress.
    """
    stages = _Stages(Console(quiet=quiet)) if stages is None else stages
    with stages("1. Harvest docstrings"):
        harvest = docstrings.harvest()
        parts = docstrings.splits(harvest.examples)
        stages.console.print(
            f"{len(harvest.examples)} examples from {harvest.files} files of {len(harvest.counts())} libraries: "
            + ", ".join(f"{len(part)} {name}" for name, part in parts._asdict().items())
        )

    with stages("2. Supervised fine-tuning"):
        backend = docstrings.train_tokenizer(
            (text for example in parts.sft for text in (example.prompt, example.summary)), VOCAB_SIZE
        )
        tokenizer = Tokenizer(backend, eos_id=1, pad_id=0)
        blank = LanguageModel(T5(T5_CONFIG, rngs=nnx.Rngs(seed)), tokenizer)
        reference: LanguageModel = sft(
            blank,
            _pairs(parts.sft),
            dataclasses.replace(SFT, seed=seed),
            held_out=_pairs(parts.preference[:128]),
            run_dir=folder / "sft",
            quiet=quiet,
        ).model

    with stages("3. Let the gold judge label pairs of sampled summaries"):
        labelled = folder / "pairs.jsonl"
        if not labelled.exists():
            prompts = [example.prompt for example in parts.preference] * PAIRS_PER_PROMPT
            written = write(
                reference,
                prompts,
                seed=seed,
                completions=2,
                max_new_tokens=MAX_NEW_TOKENS,
                max_prompt_tokens=MAX_PROMPT_TOKENS,
            ).texts
            first, second = ([pair[which] for pair in written] for which in (0, 1))
            labels = GoldJudge()(prompts, first, second)
            files.write_jsonl(
                labelled,
                (
                    {"prompt": prompt, "chosen": one, "rejected": two, "preference": p}
                    for prompt, one, two, p in zip(prompts, first, second, labels, strict=True)
                    if one != two and one.strip() and two.strip()
                ),
            )
        pairs = [orjson.loads(line) for line in labelled.read_bytes().splitlines()]

    with stages("4. Preference model"):
        learned, held_out = learned_and_held_out(pairs)
        fitted = fit_preference_model(
            reference,
            learned,
            dataclasses.replace(PREFERENCE, seed=seed),
            held_out=held_out,
            template=DEMO_PROMPT,
            run_dir=folder / "preference",
            quiet=quiet,
        )
        stages.console.print(f"held-out agreement with the gold judge: {fitted.held_out or 0:.3f}")
    return Prepared(parts, reference, pairs, fitted.model, fitted.held_out)


def _show(compared: WinRate, examples: list[docstrings.Example], console: Console) -> None:
    """Ten held-out articles, spread evenly, with what both models wrote."""
    every = max(1, len(examples) // SAMPLES)
    terminal.samples_table(
        "Held-out articles",
        [
            {"prompt": record["prompt"], "before": record["baseline"], "after": record["policy"]}
            for record in compared.records()[::every][:SAMPLES]
        ],
        console=console,
    )


def _summarise(result: DemoResult, folder: Path, console: Console) -> None:
    rate = result.win_rate
    files.write_json(
        folder / "result.json",
        {
            "win_rate": rate.value,
            "win_rate_low": rate.low,
            "win_rate_high": rate.high,
            "prompts": len(rate.prompts),
            "preference_model_agreement": result.agreement,
            "seconds": result.seconds,
        },
    )
    terminal.table(
        "The demo",
        ["stage", "seconds"],
        [[name, f"{value:.0f}"] for name, value in result.seconds.items()]
        + [["all", f"{sum(result.seconds.values()):.0f}"]],
        console=console,
    )
    terminal.table(
        "IPO-MD against SFT, by the gold judge",
        ["win rate", "95 % interval", "articles", "agreement of the preference model"],
        [
            [
                f"{rate.value:.3f}",
                f"{rate.low:.3f} to {rate.high:.3f}",
                str(len(rate.prompts)),
                f"{result.agreement or 0:.3f}",
            ]
        ],
        console=console,
    )
    console.print(f"Metrics, samples, models and plots are in {folder}; begin with ipo-md/plots/overview.png.")
