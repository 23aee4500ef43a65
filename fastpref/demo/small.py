"""The small demo: a T5 of a million parameters learns to summarise docstrings and is then aligned by IPO-MD.

It needs no network, and is what the studies of the papers start from.

1. Harvest docstrings: the body is the article, the first line its summary (`docstrings.py`).
2. Train a tokenizer and fine-tune a small T5 from scratch: the SFT model, which is also the reference.
3. Let the SFT model write two summaries of each preference article; the gold judge (`gold.py`) labels them.
4. Fit a preference model to those labels. From here on the gold judge is not consulted until the end.
5. Align the SFT model with IPO-MD against the preference model.
6. On held-out articles, let the gold judge compare the aligned policy with the SFT model.

Every stage writes to its own folder of the run directory and goes on from there when the demo is started again.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from flax import nnx
from rich.console import Console

from fastpref.data import files
from fastpref.data.tokenizer import Tokenizer
from fastpref.demo import docstrings
from fastpref.demo.gold import GoldJudge
from fastpref.demo.stages import DemoResult, Stages, harvest, learned_and_held_out, summarise
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


def run(run_dir: Path | str, *, seed: int = 0, quiet: bool = False) -> DemoResult:
    """Run the small demo, or go on with one that was stopped.

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
    stages = Stages(console)
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
    return summarise(
        compared,
        ready.agreement,
        stages,
        folder,
        title="IPO-MD against SFT, by the gold judge",
        details={"model": "a T5 of a million parameters", "seed": seed},
    )


def prepare(folder: Path, stages: Stages | None = None, *, seed: int = 0, quiet: bool = False) -> Prepared:
    """The stages before alignment, or what they left when they ran before.

    Args:
      folder: where they write.
      stages: told of each stage.
      seed: of the initial weights, orders and draws.
      quiet: show no progress.
    """
    stages = Stages(Console(quiet=quiet)) if stages is None else stages
    with stages("1. Harvest docstrings"):
        parts = docstrings.splits(harvest(stages))

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
