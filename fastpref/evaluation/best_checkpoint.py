"""Choosing a checkpoint: all of a run, or of several, are compared with one baseline (IPO-MD paper, section 6.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.data import files, read_prompts
from fastpref.data.sources import Source
from fastpref.evaluation.side_by_side import draw, kept
from fastpref.evaluation.win_rates import WinRate, check_prompts, win_rate
from fastpref.judging.positions import check_positions
from fastpref.judging.protocol import Judge
from fastpref.method.choices import OnBadRecord, TruncationSide
from fastpref.models import LanguageModel
from fastpref.runs import checkpoints, terminal
from fastpref.runs.read_model import Model, locate, read_model, read_tokenizer, step_directory


@dataclass(frozen=True)
class Candidate:
    """One checkpoint and how it did.

    Args:
      name: its path, or "model 0", "model 1", … for models that were passed.
      run: the run directory, or None.
      step: the step of the run, or None.
      source: where it is read from.
      win_rate: against the baseline.
    """

    name: str
    run: str | None
    step: int | None
    source: Model
    win_rate: WinRate


@dataclass(frozen=True)
class Ranking:
    """Checkpoints by their win rate against one baseline, the best first.

    The best of many is partly the luckiest: measure it again on other prompts before its win rate is reported.
    """

    candidates: Sequence[Candidate]

    @property
    def best(self) -> Candidate:
        """The one with the highest win rate; of equals, the one that was given first."""
        return self.candidates[0]

    def table(self) -> None:
        """Print the ranking."""
        terminal.table(
            f"Win rate against the baseline, {len(self.best.win_rate.prompts)} prompts",
            ["checkpoint", "win rate", "95 % interval"],
            [
                [one.name, f"{one.win_rate.value:.3f}", f"{one.win_rate.low:.3f} to {one.win_rate.high:.3f}"]
                for one in self.candidates
            ],
        )

    def plot(self, path: str | Path) -> Path:
        """Draw win rate against step to a PNG file, a line for each run.

        Raises:
          ValueError: no candidate is a checkpoint of a run.
        """
        from fastpref.runs import plots

        runs = sorted({one.run for one in self.candidates if one.run is not None})
        if not runs:
            raise ValueError(
                f"a plot against steps needs checkpoints of a run, but received {len(self.candidates)} models. "
                "Pass run directories."
            )
        curves = []
        for run in runs:
            steps = {one.step: one.win_rate for one in self.candidates if one.run == run and one.step is not None}
            curves.append(
                plots.Curve(
                    label=run,
                    x=sorted(steps),
                    y=[steps[step].value for step in sorted(steps)],
                    low=[steps[step].low for step in sorted(steps)],
                    high=[steps[step].high for step in sorted(steps)],
                )
            )
        return plots.plot_curves(
            Path(path),
            curves,
            x_label="optimiser steps",
            y_label="win rate",
            title="Win rate against the baseline, 95 % intervals",
            line=0.5,
            logarithmic=False,
        )

    def save(self, directory: str | Path) -> None:
        """Write `ranking.csv`, `records.jsonl` and, where there are runs, `ranking.png`, over what is there."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        columns = ["checkpoint", "run", "step", "win_rate", "low", "high", "prompts"]
        ranked = [
            (each.name, each.run, each.step, rate.value, rate.low, rate.high, len(rate.prompts))
            for each in self.candidates
            for rate in [each.win_rate]
        ]
        files.write_csv(folder / "ranking.csv", columns, ranked)
        files.write_jsonl(
            folder / "records.jsonl",
            ({"checkpoint": each.name, **record} for each in self.candidates for record in each.win_rate.records()),
        )
        if any(one.run is not None for one in self.candidates):
            self.plot(folder / "ranking.png")


def select_checkpoint(
    runs: Model | Sequence[Model],
    baseline: Model,
    prompts: Source,
    judge: Judge,
    *,
    like: Model | None = None,
    max_new_tokens: int,
    max_prompt_tokens: int = 512,
    truncation_side: TruncationSide = "right",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_bad_record: OnBadRecord = "raise",
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    save: str | Path | None = None,
) -> Ranking:
    """Compare every checkpoint with one baseline and rank them, as the IPO-MD paper chooses its checkpoints.

    The baseline writes once. All checkpoints draw with the same noise, and all intervals share their resamples of the
    prompts, so that differences between checkpoints vary less than each win rate. A run keeps its last
    `keep_checkpoints` checkpoints: set that as large as the number that are to be compared.

    Args:
      runs: a run directory, of which every checkpoint is taken; or several of those, checkpoint directories, Hugging
        Face directories and `LanguageModel`s.
      baseline: what all are compared with; the paper takes a finished run of another method.
      prompts: P prompts of a validation split, at least 2, in any form that `train` takes; see `evaluate`. A function
        that judges reads messages as the baseline's chat template writes them.
      judge: says p(first ≻ second).
      like: a model of the architecture of the checkpoints; None for their run's final model or, where that is not yet
        written, the baseline.
      max_new_tokens: longest completion, EOS included.
      max_prompt_tokens: longest prompt; a longer chat loses its oldest turns, a text is cut, and a warning says so.
      truncation_side: where a text is cut: "right" keeps its first tokens, "left" its last.
      chat_template_kwargs: options of the models' chat templates, such as `enable_thinking`.
      on_bad_record: what becomes of bad records, as for `fastpref.data.read_records`.
      temperature: of the draws.
      seed: of the draws.
      batch_size: prompts decoded at once.
      save: a folder that keeps what the judge says; see `evaluate`.

    Returns:
      `Ranking`.

    Raises:
      ValueError: fewer than 2 prompts, an empty one, no checkpoint, or one that is given twice.
      FileNotFoundError: a run or checkpoint is not there.
      CheckpointError: a checkpoint is damaged, or does not fit `like`.
      ModelError: a model that judges has too few positions for what it would read.
      JudgeError: see `judging.protocol.ask`.

    Warns:
      DropWarning: records were dropped, or hold columns that are not used.
    """
    check_prompts(prompts)
    options: dict[str, Any] = {"on_bad_record": on_bad_record, "chat_template_kwargs": chat_template_kwargs}
    texts = read_prompts(prompts, read_tokenizer(baseline), **options)
    check_prompts(texts)
    found = _candidates([runs] if isinstance(runs, LanguageModel | str | Path) else list(runs))
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "truncation_side": truncation_side,
        "chat_template_kwargs": chat_template_kwargs,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    check_positions(judge, texts, max_new_tokens)
    against = read_model(baseline)
    theirs = draw(against, texts, stream=f"{seed} baseline", **settings)
    ranked = []
    with kept(judge, save) as asked:
        for name, run, step, source in found:
            model = read_model(source, like=like if like is not None or _finished(run) else against)
            ours = draw(model, texts, stream=f"{seed} policy", **settings)
            ranked.append(Candidate(name, run, step, source, win_rate(texts, ours, theirs, asked)))
    return Ranking(sorted(ranked, key=lambda one: -one.win_rate.value))


def _finished(run: str | None) -> bool:
    return run is not None and any((Path(run) / name).is_dir() for name in ("policy", "model"))


def _candidates(sources: Sequence[Model]) -> list[tuple[str, str | None, int | None, Model]]:
    """Name, run directory, step and source of each, all known to be there."""
    found: list[tuple[str, str | None, int | None, Model]] = []
    for number, source in enumerate(sources):
        if isinstance(source, LanguageModel):
            found.append((f"model {number}", None, None, source))
        elif steps := checkpoints.steps(Path(source) / "checkpoints"):
            places = [(step, step_directory(source, step)) for step in steps]
            found += [(str(place), str(source), step, place) for step, place in places]
        else:
            place = locate(source)
            is_checkpoint = (place / "manifest").is_file()
            run, step = (str(place.parent.parent), int(place.name)) if is_checkpoint else (None, None)
            found.append((str(source), run, step, place))
    names = [name for name, *_ in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"a checkpoint must be given once, but {twice[0]!r} is given {names.count(twice[0])} times.")
    if not found:
        raise ValueError(
            "a ranking needs at least one checkpoint, but received an empty list. Give a run directory, for one."
        )
    return found
