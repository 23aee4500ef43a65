"""Figures of tabular experiments: paths on the simplex, and learning curves with bands."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from fastpref.runs.plots import COLOURS, GRID, INK, MUTED

CORNERS = np.array([[0.5, 3**0.5 / 2], [0.0, 0.0], [1.0, 0.0]])
"""Where all mass is on the first, second and third action."""

BETWEEN = LinearSegmentedColormap.from_list("between", [COLOURS[0], "#b9b4b0", COLOURS[1]])
"""From blue to orange by way of grey: ends that every reader can tell apart."""


@dataclass(frozen=True)
class SimplexPanel:
    """Paths of policies over three actions, the first to the last in colour from blue to orange.

    Args:
      title: the panel's title.
      paths: policies, shape [B, T, 3].
      ends: where each path should end, shape [B, 3].
      zoom: show the surroundings of the paths instead of the whole simplex.
    """

    title: str
    paths: Float[np.ndarray, "B T 3"]
    ends: Float[np.ndarray, "B 3"]
    zoom: bool = False


@dataclass(frozen=True)
class BandPanel:
    """Probabilities of actions over steps.

    Args:
      title: the panel's title.
      steps: shape [T].
      mean: shape [T, A].
      reach: half the width of the band around the mean, shape [T, A].
      lines: values to compare with, dashed, shape [A], if any.
    """

    title: str
    steps: Int[np.ndarray, " T"]
    mean: Float[np.ndarray, "T A"]
    reach: Float[np.ndarray, "T A"]
    lines: Float[np.ndarray, " A"] | None = None


def simplices(path: Path, title: str, panels: Sequence[SimplexPanel], values: Float[np.ndarray, " B"]) -> Path:
    """Draw panels of paths, two a row, with a colour bar for `values`; returns the PNG file."""
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(9.6, 4.1 * height + 0.6), layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes = [figure.add_subplot(height, 2, place) for place in range(1, len(panels) + 1)]
    for one, panel in zip(axes, panels, strict=True):
        _simplex(one, panel, values)
    scale = ScalarMappable(Normalize(values[0], values[-1]), BETWEEN)
    bar = figure.colorbar(scale, ax=axes, shrink=0.55, aspect=28, pad=0.02)
    bar.set_label("β, the reference's weight in the sampler", fontsize=9, color=MUTED)
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    bar.outline.set_visible(False)
    return _write(figure, path)


def _simplex(axes: Axes, panel: SimplexPanel, values: Float[np.ndarray, " B"]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10.5, color=INK)
    axes.set_aspect("equal")
    axes.axis("off")
    outline = np.vstack([CORNERS, CORNERS[:1]])
    axes.plot(*outline.T, color=MUTED, linewidth=1.2, zorder=1)
    for share in np.linspace(0.1, 0.9, 9):
        for corner in range(3):
            one, other = np.delete(np.eye(3), corner, 0)
            line = np.stack([share * np.eye(3)[corner] + (1 - share) * end for end in (one, other)]) @ CORNERS
            axes.plot(*line.T, color=GRID, linewidth=0.7, zorder=0)
    span = Normalize(values[0], values[-1])
    for value, policies in zip(values, panel.paths, strict=True):
        axes.plot(*(policies @ CORNERS).T, color=BETWEEN(span(value)), linewidth=1.3, zorder=2, solid_capstyle="round")
    ends = panel.ends @ CORNERS
    axes.plot(*ends.T, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3)
    size = 7 if panel.zoom else 5
    start = panel.paths[0, 0] @ CORNERS
    axes.plot(*start, "o", color="white", markeredgecolor=INK, markersize=size, zorder=4)
    axes.plot(*ends[0], "o", color=COLOURS[0], markeredgecolor="white", markersize=size + 1, zorder=5)
    axes.plot(*ends[-1], "s", color=COLOURS[1], markeredgecolor="white", markersize=size, zorder=5)
    if panel.zoom:
        points = np.concatenate([panel.paths.reshape(-1, 3) @ CORNERS, ends])
        low, high = points.min(0), points.max(0)
        middle, reach = (low + high) / 2, 0.75 * (high - low).max()
        axes.set_xlim(middle[0] - reach, middle[0] + reach)
        axes.set_ylim(middle[1] - reach, middle[1] + reach)
        # Offsets keep the words off the lines.
        _note(axes, r"start: π$_\mathrm{ref}$", start, (36, 6))
        _note(axes, "online IPO: Nash", ends[0], (2, 14))
        _note(axes, "offline IPO", ends[-1], (36, 2))
    else:
        for number, (corner, side) in enumerate(zip(CORNERS, ((0, 8), (-6, -12), (6, -12)), strict=True), 1):
            _note(axes, f"$y_{number}$", corner, side, size=10.0)


def _note(axes: Axes, text: str, place: Float[np.ndarray, " 2"], offset: tuple[int, int], size: float = 8.5) -> None:
    where = (float(place[0]), float(place[1]))
    axes.annotate(
        text, where, xytext=offset, textcoords="offset points", ha="center", fontsize=size, color=INK, zorder=6
    )


def bands(path: Path, title: str, rows: Sequence[tuple[str, Sequence[BandPanel]]], names: Sequence[str]) -> Path:
    """Draw rows of learning curves, a colour per action; a row's label stands before its titles. Returns the PNG."""
    width = max(len(panels) for _, panels in rows)
    figure = Figure(figsize=(3.3 * width + 0.4, 2.45 * len(rows) + 0.9), layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    place = 0
    for label, panels in rows:
        for column, panel in enumerate(panels):
            place += 1
            axes = figure.add_subplot(len(rows), width, place)
            text = f"{panel.title} ({label})" if label else panel.title
            _bands(axes, text, panel, names)
            if column == 0:
                axes.set_ylabel("probability", fontsize=9, color=MUTED)
            if place > width * (len(rows) - 1):
                axes.set_xlabel("optimiser steps", fontsize=9, color=MUTED)
            if place == 1:
                handles = axes.get_legend_handles_labels()[0]
                figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=9.5)
    return _write(figure, path)


def _bands(axes: Axes, title: str, panel: BandPanel, names: Sequence[str]) -> None:
    for action, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        mean, reach = panel.mean[:, action], panel.reach[:, action]
        axes.plot(panel.steps, mean, color=colour, linewidth=1.8, label=name, zorder=3)
        axes.fill_between(panel.steps, mean - reach, mean + reach, color=colour, alpha=0.2, linewidth=0, zorder=2)
        if panel.lines is not None:
            axes.axhline(panel.lines[action], color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.5, 1])
    last = int(panel.steps[-1])
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.set_xticks([0, last // 3, 2 * last // 3, last])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\N{THIN SPACE}")))
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _write(figure: Figure, path: Path) -> Path:
    """Save with a palette of 128 colours: a third of the bytes, and nothing that the eye misses."""
    pixels = BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(pixels, format="png", dpi=144, facecolor="white")
    with Image.open(pixels) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
