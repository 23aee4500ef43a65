"""The demo: a chat model of 135 million parameters is aligned by IPO-MD to sum up documentation in one line.

1. Have the model (`smollm2.py`) and docstrings (`docstrings.py`): the body is the article, the first line is left out.
2. The model, as it came, writes several summaries of each article of one part; the gold judge (`gold.py`) labels the
   pairs of them.
3. Fit a reward model to those labels (`scalar_head.py`): the first layers of the same model, as they came, and a scalar
   head. From here on the gold judge is not consulted until the end.
4. Align the chat model with IPO-MD against the reward model, on articles of another part: a low-rank adapter is
   trained, and the model that came is its base and the reference.
5. On held-out articles, which nobody has seen, let the gold judge compare the aligned model with the one that came.

Every stage writes to the run directory and goes on from there when the demo is started again.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from fastpref.data import files
from fastpref.data.chat import ChatTemplate
from fastpref.demo import docstrings, smollm2
from fastpref.demo.gold import GoldJudge
from fastpref.demo.scalar_head import fit_head
from fastpref.demo.stages import DemoResult, Stages, harvest, learned_and_held_out, summarise
from fastpref.evaluation.win_rates import win_rate
from fastpref.judging.models import RewardModel
from fastpref.learning.train import train
from fastpref.method.adapter import AdapterConfig
from fastpref.method.config import TrainConfig
from fastpref.models import LanguageModel, load
from fastpref.runs import owner, terminal
from fastpref.sampling.generate import write

SYSTEM = "You write one-line summaries."
REQUEST = "Summarize in one short sentence: "


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo.

    Args:
      article_tokens: longer articles are left out; the chat template and the request come on top.
      labelled: articles whose summaries the gold judge labels.
      completions: summaries of each of them, every two of which are a pair.
      reward_layers: of the model, that are the body of the reward model.
      ridge: of its scalar head.
      align: how the chat model is aligned.
      held_out: articles of the comparison at the end.
      shown: articles among them whose summaries are shown.
    """

    article_tokens: int = 56
    labelled: int = 160
    completions: int = 4
    reward_layers: int = 9
    ridge: float = 300.0
    align: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            algorithm="ipo-md",
            tau=0.03,
            mixture_beta=0.125,
            steps=24,
            batch_size=8,
            gradient_accumulation=2,
            max_prompt_tokens=88,
            max_shapes=1,
            max_new_tokens=28,
            optimizer="adamw",
            learning_rate=3e-4,
            adapter=AdapterConfig(rank=16),
            max_grad_norm=1.0,
            sample_every=4,
            checkpoint_every=8,
            keep_checkpoints=1,
        )
    )
    held_out: int = 64
    shown: int = 8

    @property
    def limits(self) -> dict[str, Any]:
        """Longest prompt and summary."""
        return {"max_prompt_tokens": self.align.max_prompt_tokens, "max_new_tokens": self.align.max_new_tokens}


def conversation(article: str) -> list[dict[str, str]]:
    """The messages that ask for a summary."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": REQUEST + article}]


def gold_judge(template: ChatTemplate) -> GoldJudge:
    """The gold judge of prompts as the template writes them."""
    before, after = template.prompt(conversation("{article}")).split("{article}")
    return GoldJudge.of_chat((before, after))


def run(start: Path, folder: Path, *, seed: int = 0, plan: Plan | None = None, quiet: bool = False) -> DemoResult:
    """Run the demo, or go on with one that was stopped.

    Args:
      start: directory of the chat model's checkpoint.
      folder: where everything is written.
      seed: of the orders and draws.
      plan: sizes.
      quiet: print nothing.

    Raises:
      OwnerError: another process is writing this demo.
    """
    with owner.hold(folder):
        return _run(start, folder, seed, Plan() if plan is None else plan, quiet)


def _run(start: Path, folder: Path, seed: int, plan: Plan, quiet: bool) -> DemoResult:
    stages = Stages(Console(quiet=quiet))
    with stages("1. The chat model and docstrings"):
        reference = load(start)
        template = ChatTemplate.of(reference.tokenizer)
        gold = gold_judge(template)
        labelled, online, held_out = articles(reference, harvest(stages), plan)
        stages.console.print(
            f"{len(labelled)} articles for labels, {len(online)} for alignment, {len(held_out)} held out"
        )

    with stages("2. Let the gold judge label pairs of the model's summaries"):
        kept = folder / "pairs.jsonl"
        if not kept.exists():
            files.write_jsonl(kept, _label(reference, labelled, template, gold, stages, seed=seed, plan=plan))
        pairs = [orjson.loads(line) for line in kept.read_bytes().splitlines()]

    with stages("3. Reward model"):
        judge, agreement = _reward(start, folder / "reward", pairs, template, stages, plan)
        stages.console.print(f"held-out agreement with the gold judge: {agreement:.3f}")

    with stages("4. IPO-MD"):
        aligned = train(
            reference,
            [{"prompt": conversation(article)} for article in online],
            judge,
            dataclasses.replace(plan.align, seed=seed),
            run_dir=folder / "ipo-md",
            quiet=quiet,
        ).policy

    with stages("5. Side by side, by the gold judge"):
        prompts = [template.prompt(conversation(article)) for article in held_out]
        # The two draw with different noise.
        after = _write(aligned, prompts, "after", stages, plan, seed=2 * seed)
        before = _write(reference, prompts, "before", stages, plan, seed=2 * seed + 1)
        compared = win_rate(prompts, after, before, gold)
        files.write_jsonl(folder / "side_by_side.jsonl", compared.records())
        shown = range(min(plan.shown, len(held_out)))
        greedy = {
            name: _write(model, [prompts[i] for i in shown], f"{name}, greedy", stages, plan, temperature=0.0)
            for name, model in (("before", reference), ("after", aligned))
        }
        samples = [
            {
                "article": held_out[i],
                "before": f"greedy: {greedy['before'][place]}\n\ndrawn: {before[i]}",
                "after": f"greedy: {greedy['after'][place]}\n\ndrawn: {after[i]}",
            }
            for place, i in enumerate(shown)
        ]
        files.write_jsonl(folder / "samples.jsonl", samples)

    terminal.samples_table("Held-out articles", samples, columns=("article", "before", "after"), console=stages.console)
    stages.console.print(
        f"The gold judge labelled {len(pairs)} pairs of summaries of {len(labelled)} articles, which the reward model "
        f"was fitted to and checked on, and compared the summaries of {len(held_out)} held-out articles. "
        "The alignment heard the reward model alone."
    )
    stages.console.print(
        f"What was trained is an adapter, in {folder / 'ipo-md' / 'policy'}; `fastpref merge` writes the whole model.",
        soft_wrap=True,
    )
    return summarise(
        compared,
        agreement,
        stages,
        folder,
        title="Aligned by IPO-MD against the chat model as it came, by the gold judge",
        details={"model": start.name, "seed": seed},
    )


def articles(
    model: LanguageModel, examples: list[docstrings.Example], plan: Plan
) -> tuple[list[str], list[str], list[str]]:
    """Articles to label, to align on and to compare on, which share no docstring; the same for every seed."""
    texts = [example.prompt.removeprefix(docstrings.PREFIX) for example in examples]
    lengths = [len(tokens) for tokens in model.tokenizer.encode_prompts(texts)]
    short = [example for example, length in zip(examples, lengths, strict=True) if length <= plan.article_tokens]
    parts = docstrings.splits(short)
    labelled, online, held_out = (
        [example.prompt.removeprefix(docstrings.PREFIX) for example in part]
        for part in (parts.preference, parts.online, parts.held_out)
    )
    # Examples come in the order of libraries.
    drawn = random.Random(0)
    labelled, held_out = (
        drawn.sample(part, min(count, len(part)))
        for part, count in ((labelled, plan.labelled), (held_out, plan.held_out))
    )
    return labelled, online, held_out


def _label(
    model: LanguageModel,
    labelled: list[str],
    template: ChatTemplate,
    gold: GoldJudge,
    stages: Stages,
    *,
    seed: int,
    plan: Plan,
) -> list[dict[str, Any]]:
    """Every pair of a model's summaries of each article, with the gold judge's preference."""
    prompts = [template.prompt(conversation(article)) for article in labelled]
    with stages.progress(len(prompts), "summaries") as bar:
        written = write(
            model,
            prompts,
            seed=seed,
            completions=plan.completions,
            **plan.limits,
            batch_size=16,
            progress=bar.update,
        ).texts
    pairs = [
        (i, first, second)
        for i, texts in enumerate(written)
        for first, second in combinations(texts, 2)
        if first != second and first.strip() and second.strip()
    ]
    preferences = gold(
        [prompts[i] for i, _, _ in pairs], [first for _, first, _ in pairs], [second for _, _, second in pairs]
    )
    return [
        {"prompt": conversation(labelled[i]), "chosen": first, "rejected": second, "preference": preference}
        for (i, first, second), preference in zip(pairs, preferences, strict=True)
    ]


def _reward(
    start: Path,
    folder: Path,
    pairs: list[dict[str, Any]],
    template: ChatTemplate,
    stages: Stages,
    plan: Plan,
) -> tuple[RewardModel, float]:
    """The reward model of the labelled pairs, or the one that was fitted before, and its held-out agreement."""
    record = folder / "held_out.json"
    if not record.exists():
        written = [pair | {"prompt": template.prompt(pair["prompt"])} for pair in pairs]
        learned, checks = learned_and_held_out(written)
        body = smollm2.first_layers(start, plan.reward_layers)
        with stages.progress(len({pair["prompt"] for pair in written}), "reading the pairs") as bar:
            fitted = fit_head(
                body,
                learned,
                checks,
                ridge=plan.ridge,
                max_prompt_tokens=plan.align.max_prompt_tokens,
                batch_size=2 * plan.align.batch_size,
                progress=bar.update,
            )
        fitted.judge.save(folder / "model")
        files.write_json(record, {"agreement": fitted.held_out})
    judge = dataclasses.replace(RewardModel.load(folder / "model"), batch_size=2 * plan.align.batch_size)
    return judge, orjson.loads(record.read_bytes())["agreement"]


def _write(
    model: LanguageModel,
    prompts: Sequence[str],
    name: str,
    stages: Stages,
    plan: Plan,
    *,
    seed: int = 0,
    temperature: float = 1.0,
) -> list[str]:
    """One summary of each prompt."""
    with stages.progress(len(prompts), name) as bar:
        written = write(
            model,
            prompts,
            seed=seed,
            **plan.limits,
            temperature=temperature,
            batch_size=min(32, len(prompts)),
            progress=bar.update,
        ).texts
    return [text for (text,) in written]
