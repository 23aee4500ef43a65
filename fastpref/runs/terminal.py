"""The terminal: progress bars, tables of numbers and of samples, lines above a bar."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import rich
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

SHOWN: dict[str, Callable[[Mapping[str, float]], str]] = {
    "loss": lambda metrics: f"loss {metrics['loss']:.4g}",
    "eval/loss": lambda metrics: f"held-out loss {metrics['eval/loss']:.4g}",
    "eval/accuracy": lambda metrics: f"held-out accuracy {metrics['eval/accuracy']:.1%}",
    "eval/win_rate": lambda metrics: f"win rate {metrics['eval/win_rate']:.1%}",
    "objective/kl": lambda metrics: f"KL {metrics['objective/kl']:.3g} nats",
    "objective/writer_kl": lambda metrics: f"writer's log-ratio {metrics['objective/writer_kl']:.3g} nats",
    "tokens/generated": lambda metrics: f"{metrics['tokens/generated'] / metrics['time/step']:,.0f} tokens/s",
}
"""The metrics that fit below a progress bar, and how they are written there."""

LINE_SECONDS = 60.0
"""Where no bar can be drawn, a line is printed at each tenth of the way and at least this often."""


class Bar:
    """What `progress` gives: call `update` after each step."""

    def __init__(self, show: Callable[[int, str], None], completed: int) -> None:
        self._show = show
        self._completed = completed
        self._metrics: dict[str, Any] = {}
        self.activity = ""

    def update(self, advance: int = 1, /, **metrics: Any) -> None:
        """Move on by `advance` steps and show the metrics that are in `SHOWN`; each stays until it is given again."""
        self._completed += advance
        self._metrics |= metrics
        shown = [write(self._metrics) for name, write in SHOWN.items() if _can_show(name, self._metrics)]
        self._show(self._completed, " · ".join([*shown, *([self.activity] if self.activity else [])]))


_bars: list[Bar] = []
"""Progress bars that are shown now, the innermost last."""


@contextmanager
def doing(activity: str) -> Iterator[None]:
    """Say on the progress bar, where there is one, what is going on, such as "judging"."""
    bars = _bars[-1:]
    for bar in bars:
        bar.activity = activity
        bar.update(0)
    try:
        yield
    finally:
        for bar in bars:
            bar.activity = ""
            bar.update(0)


def _can_show(name: str, metrics: Mapping[str, Any]) -> bool:
    return name in metrics and (name != "tokens/generated" or metrics.get("time/step", 0) > 0)


@contextmanager
def progress(
    total: int,
    *,
    description: str,
    completed: int = 0,
    enabled: bool | None = None,
    console: Console | None = None,
) -> Iterator[Bar]:
    """Show how far a loop is, what its metrics are, and how long it took and will take.

    Args:
      total: steps of the whole run.
      description: what is going on, in a word or two.
      completed: steps done before, when a run continues.
      enabled: None draws a bar on a terminal and prints plain lines elsewhere; True always draws; False is quiet.
      console: where to show it; None for rich's own.
    """
    console = rich.get_console() if console is None else console
    if enabled is False:
        with _shown(Bar(lambda done, text: None, completed)) as bar:
            yield bar
    elif enabled or console.is_terminal:
        columns = (
            TextColumn("[bold]{task.description}", markup=True),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,", style="dim"),
            TimeRemainingColumn(),
            TextColumn("left", style="dim"),
        )
        with _TwoLines(*columns, console=console, refresh_per_second=4) as bars:
            task = bars.add_task(description, total=total, completed=completed, metrics="")
            with _shown(Bar(lambda done, text: bars.update(task, completed=done, metrics=text), completed)) as bar:
                yield bar
    else:
        with _shown(Bar(_lines(total, description, completed, console), completed)) as bar:
            yield bar


@contextmanager
def _shown(bar: Bar) -> Iterator[Bar]:
    _bars.append(bar)
    try:
        yield bar
    finally:
        _bars.remove(bar)


class _TwoLines(RichProgress):
    """The metrics below the bar: beside it they would push it off a narrow terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["metrics"]:
                yield Text(task.fields["metrics"], no_wrap=True, overflow="ellipsis")


def _lines(total: int, description: str, completed: int, console: Console) -> Callable[[int, str], None]:
    began = printed = time.monotonic()
    tenth = 10 * completed // max(total, 1)

    def show(done: int, text: str) -> None:
        nonlocal printed, tenth
        now = time.monotonic()
        if 10 * done // max(total, 1) == tenth and now - printed < LINE_SECONDS:
            return
        printed, tenth = now, 10 * done // max(total, 1)
        left = (now - began) / max(done - completed, 1) * max(total - done, 0)
        times = f"{_clock(now - began)} elapsed, {_clock(left)} left"
        line = " · ".join(part for part in (f"{description} {done}/{total}", text, times) if part)
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return show


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


# Tables -------------------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, console: Console | None = None) -> None:
    """Print a table. Numbers stand to the right, floats with four significant digits, None as a dash.

    Raises:
      ValueError: a row has more or fewer cells than there are columns.
    """
    rows = [[value.item() if isinstance(value, np.generic) else value for value in row] for row in rows]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"a line must have {len(columns)} cells, for {list(columns)}, but received {len(row)}: "
                f"{row}. Add or remove some."
            )
    shown = Table()
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float | None) for row in rows)
        shown.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(_cell(value)) for value in row))
    _print(title, shown, console)


def samples_table(
    title: str,
    samples: Iterable[Mapping[str, str]],
    *,
    columns: Sequence[str] = ("prompt", "before", "after"),
    limit: int = 400,
    console: Console | None = None,
) -> None:
    """Print texts side by side, wrapped, a line between samples.

    Args:
      title: above the table.
      samples: the texts of each sample, by column.
      columns: which texts, in this order; the first gets twice the width of each other.
      limit: characters of a text that are shown; the rest becomes "…".
      console: where to print; None for rich's own.
    """
    shown = Table(show_lines=True, expand=True)
    for index, name in enumerate(columns):
        shown.add_column(Text(name), ratio=1 if index else 2, overflow="fold")
    for sample in samples:
        texts = (_visible(sample[name]) for name in columns)
        shown.add_row(*(Text(text if len(text) <= limit else text[:limit].rstrip() + "…") for text in texts))
    _print(title, shown, console)


def say(text: str) -> None:
    """Print a line, above a progress bar where there is one."""
    rich.get_console().print(_visible(text), markup=False, highlight=False, soft_wrap=True)


def _print(title: str, shown: Table, console: Console | None) -> None:
    console = rich.get_console() if console is None else console
    console.print(Text(title, style="bold"))  # a table's own title is squeezed to the table's width
    console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    return _visible(str(value))


def _visible(text: str) -> str:
    """A model may write anything: control codes must not reach the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in text)
