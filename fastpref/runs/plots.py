"""Plots of a run, from its `metrics.jsonl`."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastpref.runs import log

Columns = dict[str, np.ndarray]
"""Each metric's values, float64 [N], NaN where a step lacks it."""

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e7eb"
COLOURS = ("#2563a8", "#d1662b", "#3a8a5f")
"""Blue, orange and green that readers who do not tell red from green can tell apart."""

THEME = ("ink", "muted", "grid", "blue", "orange", "green")
"""Names of these colours in a style sheet."""

LINES = ("solid", "dashed", "dotted")

WIN_COLOURS = LinearSegmentedColormap.from_list("win rate", [COLOURS[1], "#ffffff", COLOURS[0]])
"""Orange for defeat, white for ½, blue for victory."""

MOST_POINTS = 1500
"""Points that a series shows; of longer ones every n-th."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: some metrics against the step."""

    name: str
    title: str
    y_label: str
    series: tuple[tuple[str, str], ...]
    """Metrics, and what the legend calls them."""
    band: tuple[str, str] | None = None
    """Metrics of the lower and upper end of an interval around the first series."""
    line: float | None = None
    """A value to compare with, dashed."""
    percent: bool = False


RUN_PANELS = (
    Panel("loss", "Loss", "loss", (("loss", "loss"),)),
    Panel(
        "win_rate",
        "Win rate against the reference, held-out prompts",
        "win rate",
        (("eval/win_rate", "win rate, 95 % interval"),),
        band=("eval/win_rate_low", "eval/win_rate_high"),
        line=0.5,
        percent=True,
    ),
    Panel(
        "kl",
        "Distance from the reference",
        "KL (nats per completion)",
        (("objective/kl", "training prompts"), ("eval/kl", "held-out prompts"), ("eval/kl_exact", "held out, exact")),
    ),
    Panel(
        "writer_kl",
        r"What the mixture or π$_t$ wrote, by log(π / π$_\mathrm{ref}$)",
        "nats per completion",
        (("objective/writer_kl", "training prompts"),),
    ),
    Panel(
        "lengths",
        "Completion length",
        "mean length (tokens)",
        (("completions/mean_length", "training prompts"), ("eval/mean_length", "held-out prompts")),
    ),
    Panel(
        "preference",
        "Preference between the two completions",
        "probability",
        (("preference/mean", "mean p(first ≻ second)"), ("preference/confidence", "mean |p − ½|")),
        line=0.5,
    ),
    Panel(
        "rewards",
        r"Implicit reward, τ·log(π / π$_\mathrm{ref}$)",
        "reward (nats)",
        (("rewards/chosen", "preferred"), ("rewards/rejected", "other"), ("rewards/margins", "margin")),
    ),
    Panel(
        "anchor",
        "Distance from the anchor, η·log(π / anchor)",
        "nats",
        (("anchor/chosen", "preferred"), ("anchor/rejected", "other"), ("anchor/margins", "margin")),
    ),
    Panel(
        "accuracy",
        "Pairs ranked as the judge ranks them",
        "share of pairs",
        (
            ("rewards/accuracies", "training pairs"),
            ("anchor/accuracies", "training pairs, above the anchor"),
            ("eval/agreement", "held-out pairs"),
        ),
        line=0.5,
        percent=True,
    ),
    Panel(
        "entropy",
        "Entropy of the policy",
        "nats per token",
        (
            ("objective/entropy", "training prompts"),
            ("objective/writer_entropy", "training prompts, of what another wrote"),
            ("eval/entropy", "held-out prompts"),
        ),
    ),
    Panel("grad_norm", "Gradient norm", "norm", (("grad_norm", "before clipping"),)),
)

SUPERVISED_PANELS = (
    Panel("loss", "Loss", "loss (nats)", (("loss", "training"), ("eval/loss", "held out"))),
    Panel(
        "accuracy",
        "Agreement with held-out labels",
        "accuracy",
        (("eval/accuracy", "held out"),),
        line=0.5,
        percent=True,
    ),
    Panel("grad_norm", "Gradient norm", "norm", (("grad_norm", "before clipping"),)),
)


def plot_run(run_dir: Path | str) -> list[Path]:
    """Plot an online run: loss, win rate, KL, lengths, preferences, rewards.

    Args:
      run_dir: a run directory with `metrics.jsonl`.

    Returns:
      The PNG files, `plots/overview.png` first. A plot whose metrics the run does not have is left out.

    Raises:
      ValueError: there is no metric to plot; the message names the file.
    """
    return _plot(Path(run_dir), RUN_PANELS)


def plot_supervised(run_dir: Path | str) -> list[Path]:
    """Plot supervised training, of a policy, preference model or reward model: loss and held-out accuracy.

    Args:
      run_dir: a run directory with `metrics.jsonl`.

    Returns:
      The PNG files, `plots/overview.png` first. A plot whose metrics the run does not have is left out.

    Raises:
      ValueError: there is no metric to plot; the message names the file.
    """
    return _plot(Path(run_dir), SUPERVISED_PANELS)


def heat_map(
    path: Path, names: Sequence[str], value: Float[np.ndarray, "M M"], deviation: Float[np.ndarray, "M M"]
) -> Path:
    """Draw a matrix of win rates, each entry with its number, and its deviation where that is finite and not 0.

    Args:
      path: the PNG file.
      names: of the M policies.
      value: win rate of the row over the column, shape [M, M], in [0, 1].
      deviation: of each entry, shape [M, M].

    Returns:
      The file.
    """
    count = len(names)
    longest = max(len(name) for name in names)
    figure = Figure(figsize=(1.9 + 0.08 * longest + 1.05 * count, 1.6 + 0.85 * count), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(value, cmap=WIN_COLOURS, vmin=0, vmax=1)
    for row, column in np.ndindex(count, count):
        spread = deviation[row, column]
        below = f"\n± {spread:.3f}" if np.isfinite(spread) and row != column else ""
        dark = abs(value[row, column] - 0.5) > 0.33
        axes.text(
            column,
            row,
            f"{value[row, column]:.3f}{below}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if dark else INK,
        )
    axes.set_xticks(range(count), names, rotation=0 if longest < 11 else 30, ha="center" if longest < 11 else "right")
    axes.set_yticks(range(count), names)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_title("Win rate of the row over the column", loc="left", fontsize=10.5, color=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, format=PercentFormatter(1, decimals=0))
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    bar.outline.set_visible(False)
    return _write(figure, path)


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot of measured values, with their uncertainty."""

    label: str
    x: Sequence[int | float | str]
    """Numbers, or names that are placed side by side."""
    y: Sequence[float]
    low: Sequence[float]
    """Lower ends of the error bars."""
    high: Sequence[float]


def plot_curves(
    path: Path,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    title: str,
    line: float | None = None,
    logarithmic: bool | None = None,
) -> Path:
    """Draw measured values with error bars against one quantity, a line for each curve.

    Args:
      path: the PNG file.
      curves: the lines; values that are not finite are left out.
      x_label: the quantity.
      y_label: what was measured.
      title: above the plot.
      line: a value to compare with, dashed.
      logarithmic: the x axis; None for logarithmic where all values are above 0 and span a factor of 8 or more.

    Returns:
      The file.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    places = list(dict.fromkeys(x for curve in curves for x in curve.x))
    numbers = [x for x in places if not isinstance(x, str)]
    numeric = len(numbers) == len(places)
    if line is not None:
        axes.axhline(line, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for number, curve in enumerate(curves):
        y, low, high = (np.asarray(values, np.float64) for values in (curve.y, curve.low, curve.high))
        x = np.array([x if numeric else places.index(x) for x in curve.x], np.float64)
        known = np.isfinite(y)
        bars = np.nan_to_num(np.stack([y - low, high - y])[:, known])
        axes.errorbar(
            x[known],
            y[known],
            np.maximum(bars, 0),
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number // len(COLOURS) % len(LINES)],
            marker="o",
            markersize=4,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=3,
            label=curve.label,
            zorder=3,
        )
    if not numeric:
        axes.set_xticks(range(len(places)), [str(place) for place in places])
    elif min(numbers) > 0 and max(numbers) >= 8 * min(numbers) if logarithmic is None else logarithmic:
        axes.set_xscale("log")
        axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axes.minorticks_off()
    _frame(axes, title, x_label, y_label)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    return _write(figure, path)


def _plot(run_dir: Path, panels: Sequence[Panel]) -> list[Path]:
    path = run_dir / "metrics.jsonl"
    columns = _columns(log.read_metrics(path))
    present = [panel for panel in panels if any(_has(columns, name) for name, _ in panel.series)]
    if not present:
        raise ValueError(
            f"{path} must hold at least one finite metric to plot; "
            f"it {'is not there' if not path.exists() else f'has {sorted(columns) or None}'}. Run some steps first."
        )
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    width = min(len(present), 3)
    height = -(-len(present) // width)
    spacing = ConstrainedLayoutEngine(hspace=0.06, wspace=0.04)
    overview = Figure(figsize=(4.6 * width, 3.3 * height + 0.5), layout=spacing)
    overview.suptitle(run_dir.resolve().name, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    for place, panel in enumerate(present, 1):
        _draw(overview.add_subplot(height, width, place), panel, columns)
    written = [_write(overview, folder / "overview.png")]
    for panel in present:
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        _draw(figure.add_subplot(), panel, columns)
        written.append(_write(figure, folder / f"{panel.name}.png"))
    return written


def svgs(records: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> list[tuple[Panel, str]]:
    """The panels whose metrics some records have, each as an SVG element for an HTML page.

    Its colours are CSS variables (`--ink`, `--muted`, `--grid`, `--blue`, `--orange`, `--green`), its text is text in
    the page's font, and its ids begin with the panel's name.

    Args:
      records: lines of a `metrics.jsonl`.
      panels: the plots.
    """
    columns = _columns(records)
    drawn = []
    for panel in [panel for panel in panels if any(_has(columns, name) for name, _ in panel.series)]:
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        _draw(figure.add_subplot(), panel, columns)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.name}):
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        text = buffer.getvalue()
        text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :].replace("xlink:href", "href"))
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{panel.name}-", text)
        for colour, name in zip((INK, MUTED, GRID, *COLOURS), THEME, strict=True):
            text = text.replace(colour, f"var(--{name})")
        drawn.append((panel, text))
    return drawn


def _columns(records: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: np.array([record.get(name) for record in records], np.float64) for name in names}


def _has(columns: Columns, name: str) -> bool:
    return name in columns and bool(np.isfinite(columns[name]).any())


def _draw(axes: Axes, panel: Panel, columns: Columns) -> None:
    series = [(name, label) for name, label in panel.series if _has(columns, name)]
    if panel.line is not None:
        axes.axhline(panel.line, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for (name, label), colour in zip(series, COLOURS, strict=False):
        known = np.isfinite(columns[name])
        steps, values = columns["step"][known], columns[name][known]
        few = len(values) <= 30
        thin = slice(None, None, -(-len(values) // MOST_POINTS))
        if not few:
            axes.plot(
                steps[thin], values[thin], ".", color=colour, alpha=0.3, markersize=3.5, markeredgewidth=0, zorder=2
            )
        axes.plot(
            steps[thin],
            _smooth(_smooth(values))[thin],
            color=colour,
            linewidth=1.8,
            marker="o" if few else "",
            markersize=4,
            label=label,
            zorder=3,
        )
    if panel.band is not None and all(_has(columns, name) for name in panel.band):
        low, high = (columns[name] for name in panel.band)
        known = np.isfinite(low) & np.isfinite(high)
        steps = columns["step"][known]
        axes.fill_between(steps, low[known], high[known], color=COLOURS[0], alpha=0.18, linewidth=0, zorder=1)
    _frame(axes, panel.title, "optimiser steps", panel.y_label)
    last = max(columns["step"].max(), 1.0)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(series) > 1 or panel.band is not None:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)


def _frame(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel(x_label, fontsize=9, color=MUTED)
    axes.set_ylabel(y_label, fontsize=9, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _smooth(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Mean over a centred window of a twentieth of the points; short series stay as they are."""
    reach = len(values) // 40
    padded = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    means: Float[np.ndarray, " N"] = (padded[high] - padded[low]) / (high - low)
    return means


def _write(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=144, facecolor="white")
    return path
