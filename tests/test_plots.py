"""Plots of a run show the numbers of its log, and every metric in them is documented."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastpref.method.errors import RunWarning
from fastpref.runs import plots
from fastpref.runs.log import Run
from fastpref.runs.metrics import METRICS
from fastpref.runs.plots import plot_run, plot_supervised
from fastpref.runs.terminal import SHOWN


def test_every_metric_that_is_shown_or_plotted_is_documented() -> None:
    panels = plots.RUN_PANELS + plots.SUPERVISED_PANELS
    plotted = {name for panel in panels for name, _ in panel.series} | {n for panel in panels for n in panel.band or ()}
    assert (plotted | set(SHOWN)) <= set(METRICS)
    assert all(metric.formula and metric.better in ("higher", "lower", "") for metric in METRICS.values())
    assert all(METRICS[name].unit == "s" for name in METRICS if name.startswith("time/"))


def online_run(directory: Path, steps: int = 60) -> Path:
    rng = np.random.default_rng(0)
    with Run(directory, tensorboard=False) as run:
        for step in range(1, steps + 1):
            metrics = {"loss": float(rng.normal()), "objective/kl": step / 10, "completions/mean_length": 9.0}
            if step % 20 == 0:
                metrics |= {"eval/win_rate": 0.6, "eval/win_rate_low": 0.55, "eval/win_rate_high": 0.65}
            run.log(step, metrics | {"grad_norm": math.nan if step == 5 else 1.0})
    return directory


def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    def keep(figure: Figure, path: Path) -> Path:
        figures[path.stem] = figure
        return path

    monkeypatch.setattr(plots, "_write", keep)
    return figures


def test_a_run_is_plotted_to_images(tmp_path: Path) -> None:
    written = plot_run(online_run(tmp_path / "ipo-md"))
    assert [path.name for path in written] == [
        f"{name}.png" for name in ("overview", "loss", "win_rate", "kl", "lengths", "grad_norm")
    ]
    for path in written:
        assert path.parent == tmp_path / "ipo-md" / "plots"
        with Image.open(path) as image:
            assert min(image.size) > 500
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_plots_show_the_numbers_with_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    plot_run(online_run(tmp_path / "ipo-md"))
    assert figures["overview"].get_suptitle() == "ipo-md"
    assert len(figures["overview"].axes) == 5
    assert all(
        axes.get_title(loc="left") and axes.get_xlabel() and axes.get_ylabel() for axes in figures["overview"].axes
    )
    (kl,) = figures["kl"].axes
    assert kl.get_ylabel() == "KL (nats per completion)"
    points, smooth = kl.lines
    assert points.get_xydata().tolist() == [[step, step / 10] for step in range(1, 61)]
    np.testing.assert_allclose(smooth.get_ydata()[4:-4], np.arange(5, 57) / 10)
    (grad_norm,) = figures["grad_norm"].axes
    assert 5 not in grad_norm.lines[0].get_xdata()
    (win_rate,) = figures["win_rate"].axes
    assert win_rate.lines[0].get_ydata() == [0.5, 0.5]
    (band,) = win_rate.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.55, 0.65)


def test_supervised_training_is_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run(tmp_path, tensorboard=False) as run:
        for step in range(1, 5):
            run.log(step, {"loss": 2.0, **({"eval/loss": 2.5, "eval/accuracy": 0.7} if step == 4 else {})})
    figures = drawn(monkeypatch)
    plot_supervised(tmp_path)
    assert list(figures) == ["overview", "loss", "accuracy"]
    (loss,) = figures["loss"].axes
    legend = loss.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training", "held out"]


def test_smoothing_keeps_short_and_straight_series() -> None:
    noise = np.random.default_rng(1).normal(size=400)
    np.testing.assert_allclose(plots._smooth(noise[:39]), noise[:39])
    np.testing.assert_allclose(plots._smooth(np.arange(400.0))[10:-10], np.arange(10.0, 390.0))
    np.testing.assert_allclose(plots._smooth(noise)[200], noise[190:211].mean())


def test_long_runs_are_thinned_and_a_single_step_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    monkeypatch.setattr(plots, "MOST_POINTS", 20)
    plot_run(online_run(tmp_path / "long"))
    assert [len(line.get_xdata()) for line in figures["kl"].axes[0].lines] == [20, 20]
    plot_run(online_run(tmp_path / "one", steps=1))
    assert figures["loss"].axes[0].lines[0].get_xdata().tolist() == [1.0]


def test_a_run_with_nothing_to_plot_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"metrics.jsonl must hold at least one finite metric .*; it is not there. Run"
    ):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="it has None"):
        plot_supervised(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1,"loss":null,"tau":1.0}\n{"step":2,"lo')
    with pytest.raises(ValueError, match=r"it has \['loss', 'step', 'tau'\]"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1,"loss":0.5}\n{"step":2,"lo\n')
    with pytest.warns(RunWarning, match=r"metrics.jsonl must hold .* but lines 2 do not. They stay out"):
        assert plot_run(tmp_path)


def test_plots_leave_the_global_pyplot_alone() -> None:
    code = "import sys, fastpref.runs.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
