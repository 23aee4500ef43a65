"""Heat maps and curves show the numbers that they are given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastpref.runs import plots
from fastpref.runs.plots import Curve, heat_map, plot_curves


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    drawn: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        drawn.append(figure)
        return path

    monkeypatch.setattr(plots, "_write", keep)
    return drawn


def test_a_heat_map_writes_every_entry(figures: list[Figure]) -> None:
    value = np.array([[0.5, 0.6, 0.9], [0.4, 0.5, 0.7], [0.1, 0.3, 0.5]])
    deviation = np.array([[0, 0.01, np.nan], [0.01, 0, 0.02], [np.nan, 0.02, 0]])
    assert heat_map(Path("x.png"), ["a", "b", "a name that is long"], value, deviation) == Path("x.png")
    axes, bar = figures[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == [
        *("0.500", "0.600\n± 0.010", "0.900"),
        *("0.400\n± 0.010", "0.500", "0.700\n± 0.020"),
        *("0.100", "0.300\n± 0.020", "0.500"),
    ]
    np.testing.assert_array_equal(axes.images[0].get_array(), value)
    assert axes.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "a name that is long"]
    assert bar.get_yticklabels()
    red, green, blue, _ = plots.WIN_COLOURS(0.5)
    assert min(red, green, blue) > 0.99


def curve(x: list[Any], y: list[float], label: str = "") -> Curve:
    return Curve(label, x, y, [value - 0.1 for value in y], [value + 0.2 for value in y])


def test_curves_have_their_values_bars_and_scale(figures: list[Figure]) -> None:
    plot_curves(
        Path("x.png"),
        [curve([0.1, 1.0, 10.0], [0.4, np.nan, 0.6], "a"), curve([0.1, 1.0], [0.1, 0.2], "b")],
        x_label="tau", y_label="win rate", title="Sweep", line=0.5,
    )  # fmt: skip
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("tau", "win rate", "Sweep")
    first, second = axes.containers
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[0.1, 0.4], [10, 0.6]])
    np.testing.assert_allclose(second.lines[0].get_xydata(), [[0.1, 0.1], [1, 0.2]])
    (bars,) = first.lines[2]
    np.testing.assert_allclose(bars.get_segments()[0], [[0.1, 0.3], [0.1, 0.6]])
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert axes.lines[0].get_ydata() == [0.5, 0.5]


def test_names_stand_side_by_side_and_steps_stay_linear(figures: list[Figure]) -> None:
    settings: dict[str, Any] = {"x_label": "", "y_label": "", "title": ""}
    plot_curves(Path("x.png"), [curve(["ipo", "dpo"], [0.5, 0.6])], **settings)
    plot_curves(Path("x.png"), [curve([1, 100], [0.5, 0.6])], logarithmic=False, **settings)
    names, steps = (figure.axes[0] for figure in figures)
    assert [label.get_text() for label in names.get_xticklabels()] == ["ipo", "dpo"]
    assert steps.get_xscale() == "linear"
    assert names.get_legend() is None


def test_many_curves_differ(figures: list[Figure]) -> None:
    plot_curves(
        Path("x.png"), [curve([1, 2], [0.5, 0.6], str(number)) for number in range(9)], x_label="", y_label="", title=""
    )
    looks = {(line.lines[0].get_color(), line.lines[0].get_linestyle()) for line in figures[0].axes[0].containers}
    assert len(looks) == 9
