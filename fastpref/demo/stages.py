"""What both demos share: named stages, the division of labelled pairs, and the tables at the end."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastpref.data import files
from fastpref.demo import docstrings
from fastpref.evaluation.win_rates import WinRate
from fastpref.runs import terminal


@dataclass(frozen=True)
class DemoResult:
    """What a demo measured.

    Args:
      win_rate: gold judge, aligned policy against the reference, on held-out articles.
      agreement: held-out agreement of the preference or reward model with the gold judge.
      seconds: of each stage, on the clock.
      cpu_seconds: of each stage, summed over cores.
    """

    win_rate: WinRate
    agreement: float | None
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]


class Stages:
    """Names stages as they begin, and keeps how long they took.

    Args:
      console: where the names are printed.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as the stage of that name."""
        began, cpu_began = time.perf_counter(), time.process_time()
        self.console.rule(name)
        yield
        self.seconds[name] = time.perf_counter() - began
        self.cpu_seconds[name] = time.process_time() - cpu_began

    def progress(self, total: int, description: str) -> AbstractContextManager[terminal.Bar]:
        """A progress bar of this console; none where it is quiet."""
        enabled = False if self.console.quiet else None
        return terminal.progress(total, description=description, enabled=enabled, console=self.console)


def harvest(stages: Stages) -> list[docstrings.Example]:
    """The docstrings of what is installed, with a bar where they are read for the first time."""
    with ExitStack() as stack:
        bars: list[terminal.Bar] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(stages.progress(total, "reading docstrings")))
            bars[0].update()

        found = docstrings.harvest(progress=progress)
    parts = docstrings.splits(found.examples)
    stages.console.print(
        f"{len(found.examples)} examples from {found.files} files of {len(found.counts())} libraries: "
        + ", ".join(f"{len(part)} {name}" for name, part in parts._asdict().items())
    )
    return found.examples


def learned_and_held_out(pairs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Labelled pairs to learn from, and the eighth of them that is held out."""
    held_back = len(pairs) // 8
    return pairs[held_back:], pairs[:held_back]


def summarise(
    compared: WinRate,
    agreement: float | None,
    stages: Stages,
    folder: Path,
    *,
    title: str,
    details: Mapping[str, Any],
) -> DemoResult:
    """Write `result.json` and print the tables of times and of the win rate.

    Args:
      compared: the aligned policy against the reference.
      agreement: of the preference or reward model with the gold judge.
      stages: what was done.
      folder: of the run.
      title: of the comparison.
      details: more entries of `result.json`.
    """
    result = DemoResult(compared, agreement, stages.seconds, stages.cpu_seconds)
    files.write_json(
        folder / "result.json",
        {
            **details,
            "win_rate": compared.value,
            "win_rate_low": compared.low,
            "win_rate_high": compared.high,
            "prompts": len(compared.prompts),
            "preference_model_agreement": agreement,
            "seconds": stages.seconds,
            "cpu_seconds": stages.cpu_seconds,
        },
    )
    rows = [[name, f"{value:.0f}"] for name, value in stages.seconds.items()]
    terminal.table(
        "The demo",
        ["stage", "seconds"],
        [*rows, ["all", f"{sum(stages.seconds.values()):.0f}"]],
        console=stages.console,
    )
    terminal.table(
        title,
        ["win rate", "95 % interval", "articles", "agreement of the preference model"],
        [
            [
                f"{compared.value:.3f}",
                f"{compared.low:.3f} to {compared.high:.3f}",
                str(len(compared.prompts)),
                f"{agreement or 0:.3f}",
            ]
        ],
        console=stages.console,
    )
    stages.console.print(f"Metrics, samples, models and plots are in {folder}; begin with ipo-md/plots/overview.png.")
    return result
