"""The IPO-MD and INPO papers' comparisons of algorithms, at the scale of the demo.

A study trains algorithms from the demo's SFT model on its preference (or reward) model, and lets the gold judge compare
what they write to held-out articles. The gold judge labelled the pairs that those models and the offline algorithms
learn from, and chooses τ on 256 of the articles of these pairs; the articles that policies are compared on were seen by
nobody. Everything below the folder is written once: started again, or for another study in the same folder, what is
there is used, and a run that was stopped goes on.

    demo/                      what all runs start from
    runs/ipo-md,tau=0.03,seed=0/   a run directory each
    NAME.md  NAME.csv  NAME.png    what a study found
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from fastpref.data import files
from fastpref.demo import small as demo
from fastpref.demo.gold import GoldJudge
from fastpref.demo.stages import learned_and_held_out
from fastpref.evaluation.side_by_side import compare, evaluate
from fastpref.evaluation.win_rates import WinRate
from fastpref.judging.models import RewardModel
from fastpref.learning.supervised import fit_reward_model
from fastpref.learning.train import train
from fastpref.method.algorithms import ALGORITHMS
from fastpref.method.config import TrainConfig
from fastpref.method.schedules import Schedule, bounds
from fastpref.models import LanguageModel
from fastpref.runs import plots

Settings = Mapping[str, Any]
"""Fields of `TrainConfig` that differ from the demo's."""

SEEDS = (0, 1, 2)
STEPS = 75
"""Of every run: half of the demo's, by which the win rate has all but stopped to grow."""
EVERY = 25
"""Steps between held-out evaluations: what learning curves are made of."""
TAUS = {
    "rl": (0.01, 0.03, 0.1, 0.3),
    "online-ipo": (0.01, 0.03, 0.1, 0.3),
    "online-dpo": (0.01, 0.03, 0.1, 0.3),
    "online-slic": (0.03, 0.1, 0.3),
    "ipo-md": (0.01, 0.03, 0.1),
    "nash-md-pg": (0.003, 0.01, 0.03),
}
"""Values of τ that each algorithm is tried with; τ means another strength to each."""
BETAS = (0.0, 0.125, 0.25, 0.5, 0.75)
"""Weights of the reference in the sampler of IPO-MD."""
SELECTION_PROMPTS = 256


@dataclass(frozen=True)
class Lab:
    """The folder that studies share, and what is in it.

    Args:
      folder: where everything is written.
      settings: for all runs, such as fewer steps.
      prompts: at most so many held-out articles are compared.
      quiet: show no progress.
    """

    folder: Path
    settings: Settings = field(default_factory=dict)
    prompts: int | None = None
    quiet: bool = False

    @cached_property
    def ready(self) -> demo.Prepared:
        """The demo's SFT model, labelled pairs and preference model."""
        return demo.prepare(self.folder / "demo", quiet=self.quiet)

    @cached_property
    def reward(self) -> RewardModel:
        """A reward model of the same labelled pairs."""
        learned, held_out = learned_and_held_out(self.ready.pairs)
        run_dir = self.folder / "demo" / "reward"
        fitted: RewardModel = fit_reward_model(
            self.ready.reference, learned, demo.PREFERENCE, held_out=held_out, run_dir=run_dir, quiet=self.quiet
        ).model
        return fitted

    def run(self, settings: Settings, seed: int) -> Path:
        """The directory of a finished run; it is made, or gone on with, where it is not there."""
        name = ",".join([settings["algorithm"], *(f"{key}={settings[key]}" for key in settings if key != "algorithm")])
        folder = self.folder / "runs" / f"{name},seed={seed}"
        if (folder / "policy").is_dir():
            return folder
        row = ALGORITHMS[settings["algorithm"]]
        fields = {"steps": STEPS, "eval_every": EVERY, **self.settings, **settings}
        config = dataclasses.replace(demo.IPO_MD, seed=seed, **fields)
        if row.in_rounds:
            config = dataclasses.replace(config, learning_rate=_in_rounds(config))
        judge = {
            "labels": None,
            "preference": self.ready.judge,
            "reward": self.reward if row.judged_by == "reward" else None,
        }
        train(
            self.ready.reference,
            learned_and_held_out(self.ready.pairs)[0]
            if row.offline
            else [example.prompt for example in self.ready.parts.online],
            judge[row.judged_by],
            config,
            run_dir=folder,
            eval_prompts=self.articles(selection=True)[: config.eval_prompts],
            eval_judge=GoldJudge(),
            quiet=self.quiet,
        )
        return folder

    def articles(self, *, selection: bool = False) -> list[str]:
        """Held-out articles, which nothing has seen; for selection, of those that the preference model learned from."""
        parts = self.ready.parts
        chosen = parts.preference[:SELECTION_PROMPTS] if selection else parts.held_out
        return [example.prompt for example in chosen][: self.prompts]

    def against(self, run: Path, baseline: LanguageModel | Path, *, selection: bool = False) -> WinRate:
        """Win rate of a run by the gold judge."""
        return compare(run, baseline, self.articles(selection=selection), GoldJudge(), **_writing())

    def best(self, algorithm: str, **others: Any) -> dict[str, Any]:
        """The settings with the τ that does best against SFT on the articles for selection, with seed 0."""
        tried = {
            tau: self.against(
                self.run({"algorithm": algorithm, "tau": tau, **others}, SEEDS[0]), self.ready.reference, selection=True
            ).value
            for tau in TAUS[algorithm]
        }
        return {"algorithm": algorithm, "tau": max(tried, key=lambda tau: tried[tau]), **others}


def _in_rounds(config: TrainConfig) -> Schedule:
    """In every round a cosine to 0 after 3 % of warm-up (INPO, appendix B)."""
    high = bounds(config.learning_rate)[1]
    return Schedule(start=high, end=0.0, steps=config.round_steps, kind="cosine", warmup=0.03, repeat=True)


def _writing() -> dict[str, Any]:
    return {"max_new_tokens": demo.MAX_NEW_TOKENS, "max_prompt_tokens": demo.MAX_PROMPT_TOKENS}


PAPER_TABLE_2 = {
    ("online-ipo", "ipo-md"): 0.515,
    ("online-ipo", "online-dpo"): 0.608,
    ("online-ipo", "nash-md-pg"): 0.621,
    ("online-ipo", "online-slic"): 0.608,
    ("online-ipo", "rl"): 0.791,
    ("ipo-md", "online-dpo"): 0.600,
    ("ipo-md", "nash-md-pg"): 0.608,
    ("ipo-md", "online-slic"): 0.594,
    ("ipo-md", "rl"): 0.778,
    ("online-dpo", "nash-md-pg"): 0.520,
    ("online-dpo", "online-slic"): 0.493,
    ("online-dpo", "rl"): 0.727,
    ("nash-md-pg", "online-slic"): 0.479,
    ("nash-md-pg", "rl"): 0.729,
    ("online-slic", "rl"): 0.728,
}
"""Win rates that the IPO-MD paper prints, of the first over the second."""

PAPER_INPO = {
    "inpo": (42.6, 37.8, 8.43),
    "inpo, no KL": (41.6, 36.5, 8.31),
    "sppo": (32.8, 29.2, 8.26),
    "iterative-dpo": (28.5, 29.6, 8.29),
    "SFT": (16.0, 10.2, 7.52),
}
"""What the INPO paper prints in Tables 1 and 3, preference model, 8 B: AlpacaEval 2.0, Arena-Hard, MT-Bench."""


def table_2(lab: Lab) -> list[Path]:
    """Six algorithms with the τ that does best for each, three seeds each, side by side, and against SFT."""
    order = ("online-ipo", "ipo-md", "online-dpo", "nash-md-pg", "online-slic", "rl")
    chosen = {name: lab.best(name) for name in order}
    return _matrix(lab, "ipo-md-table-2", chosen, PAPER_TABLE_2)


def inpo_table(lab: Lab, **others: Any) -> list[Path]:
    """INPO, without its pull to the reference (τ = 0), iterative DPO and SPPO, side by side, and against SFT."""
    few: dict[str, Any] = {"batch_size": 16, "rounds": 3, **others}
    chosen: dict[str, Settings] = {
        "inpo": {"algorithm": "inpo", "tau": 0.03, "eta": 0.09, **few},
        "inpo, no KL": {"algorithm": "inpo", "tau": 0.0, "eta": 0.09, **few},
        "iterative-dpo": {"algorithm": "iterative-dpo", "tau": 0.1, **few},
        "sppo": {"algorithm": "sppo", "tau": 0.0, "eta": 0.09, **few},
    }
    return _matrix(lab, "inpo-table", chosen, {})


def _matrix(lab: Lab, name: str, chosen: Mapping[str, Settings], paper: Mapping[tuple[str, str], float]) -> list[Path]:
    runs = {label: [lab.run(settings, seed) for seed in SEEDS] for label, settings in chosen.items()}
    found = evaluate({**runs, "SFT": lab.ready.reference}, lab.articles(), GoldJudge(), **_writing(), seeds=(SEEDS[0],))
    image = found.plot(lab.folder / f"{name}.png")
    records = [
        {**record, "settings": orjson.dumps(dict(chosen.get(record["policy"], {}))).decode()} for record in found.rows()
    ]
    table = _csv(lab.folder / f"{name}.csv", records)
    lines = [
        "Win rate of the row over the column by the gold judge, standard deviation between 3 × 3 runs in brackets."
    ]
    lines += ["", *matrix(records, paper), "", "Against SFT, with 95 % intervals over articles, and the settings:", ""]
    lines += against_sft(records)
    text = lab.folder / f"{name}.md"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [text, table, image]


def matrix(records: Sequence[Mapping[str, Any]], paper: Mapping[tuple[str, str], float]) -> list[str]:
    """Win rates of a study as a Markdown table.

    Args:
      records: those of its CSV file.
      paper: what the paper prints, by policy and baseline; the other half follows.
    """
    both = {**paper, **{(column, row): 1 - value for (row, column), value in paper.items()}}
    names = list(dict.fromkeys(record["policy"] for record in records))
    cells = {(name, name): "½" for name in names}
    for record in records:
        pair = record["policy"], record["baseline"]
        printed = f"; paper {both[pair]:.3f}" if pair in both else ""
        deviation = "–" if record["deviation"] in (None, "") else f"{float(record['deviation']):.3f}"
        cells[pair] = f"{float(record['win_rate']):.3f} ({deviation}{printed})"
    rows = [["p(row ≻ column)", *names], ["---"] * (len(names) + 1)]
    rows += [[policy, *(cells[policy, baseline] for baseline in names)] for policy in names]
    return [f"| {' | '.join(row)} |" for row in rows]


def against_sft(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each policy of a study: win rate over SFT, its 95 % interval over articles, and its settings."""
    return [
        f"- {record['policy']}: {float(record['win_rate']):.3f}, {float(record['low']):.3f} to "
        f"{float(record['high']):.3f}; `{record['settings']}`"
        for record in records
        if record["baseline"] == "SFT"
    ]


def _sweep(
    lab: Lab, name: str, along: str, lines: Mapping[str, Sequence[Settings]], against: str, baseline: Any, title: str
) -> list[Path]:
    """Win rates along one setting, a curve for each line; bars are 95 % intervals over articles."""
    records, curves = [], []
    for label, points in lines.items():
        rates = [lab.against(lab.run(point, SEEDS[0]), baseline) for point in points]
        x = [point[along] for point in points]
        y, low, high = ([getattr(rate, end) for rate in rates] for end in ("value", "low", "high"))
        curves.append(plots.Curve(label, x, y, low, high))
        records += [
            {"algorithm": label, along: at, "baseline": against, "win_rate": r.value, "low": r.low, "high": r.high}
            for at, r in zip(x, rates, strict=True)
        ]
    image = plots.plot_curves(
        lab.folder / f"{name}.png",
        curves,
        x_label=along,
        y_label=f"win rate against {against}",
        title=title,
        line=0.5,
        logarithmic=along == "tau",
    )
    return [_csv(lab.folder / f"{name}.csv", records), image]


def _taus(*algorithms: str) -> dict[str, list[Settings]]:
    """The same values of τ for each, so that one run serves several studies."""
    return {name: [{"algorithm": name, "tau": tau} for tau in TAUS["online-ipo"]] for name in algorithms}


def figure_1(lab: Lab) -> list[Path]:
    """Online IPO and DPO over τ, against RL."""
    rl = lab.run(lab.best("rl"), SEEDS[0])
    lines = _taus("online-ipo", "online-dpo")
    return _sweep(lab, "ipo-md-figure-1", "tau", lines, "RL", rl, "Strength of the regularisation")


def figures_3_and_4(lab: Lab) -> list[Path]:
    """Online and offline IPO and DPO over τ, against RL and against SFT."""
    rl = lab.run(lab.best("rl"), SEEDS[0])
    baselines = {"RL": rl, "SFT": lab.ready.reference}
    lines = _taus("online-ipo", "offline-ipo", "online-dpo", "offline-dpo")
    return [
        path
        for number, (against, baseline) in zip((3, 4), baselines.items(), strict=True)
        for path in _sweep(lab, f"ipo-md-figure-{number}", "tau", lines, against, baseline, "Online and offline")
    ]


def figure_5(lab: Lab) -> list[Path]:
    """IPO-MD over β, against RL."""
    rl = lab.run(lab.best("rl"), SEEDS[0])
    points = [{"algorithm": "ipo-md", "mixture_beta": beta} for beta in BETAS]
    return _sweep(lab, "ipo-md-figure-5", "mixture_beta", {"ipo-md": points}, "RL", rl, "Weight of the reference")


def figure_2(lab: Lab) -> list[Path]:
    """Online IPO while it learns, for several τ, against SFT on the articles for selection."""
    records, curves = [], []
    for settings in _taus("online-ipo")["online-ipo"]:
        lines = (lab.run(settings, SEEDS[0]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [step for step in map(orjson.loads, lines) if "eval/win_rate" in step]
        x = [step["step"] for step in steps]
        y, low, high = ([step[f"eval/win_rate{end}"] for step in steps] for end in ("", "_low", "_high"))
        curves.append(plots.Curve(f"τ = {settings['tau']:g}", x, y, low, high))
        records += [
            {"tau": settings["tau"], "step": at, "win_rate": rate, "low": one, "high": other}
            for at, rate, one, other in zip(x, y, low, high, strict=True)
        ]
    image = plots.plot_curves(
        lab.folder / "ipo-md-figure-2.png",
        curves,
        x_label="step",
        y_label="win rate against SFT",
        title="Online IPO while it learns",
        line=0.5,
        logarithmic=False,
    )
    return [_csv(lab.folder / "ipo-md-figure-2.csv", records), image]


def _csv(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    columns = list(records[0])
    return files.write_csv(path, columns, [[record[name] for name in columns] for record in records])


STUDIES: dict[str, tuple[str, Callable[[Lab], list[Path]]]] = {
    "ipo-md-table-2": ("IPO-MD, Table 2: six algorithms side by side, on the demo's task", table_2),
    "ipo-md-figure-1": ("IPO-MD, Figure 1: online IPO and DPO over τ, on the demo's task", figure_1),
    "ipo-md-figure-2": ("IPO-MD, Figure 2: learning curves of online IPO, on the demo's task", figure_2),
    "ipo-md-figures-3-4": ("IPO-MD, Figures 3 and 4: online and offline IPO and DPO over τ", figures_3_and_4),
    "ipo-md-figure-5": ("IPO-MD, Figure 5: IPO-MD over β, on the demo's task", figure_5),
    "inpo-table": ("INPO: INPO with and without KL, iterative DPO and SPPO, on the demo's task", inpo_table),
}
"""What each shows, and how it is made."""
