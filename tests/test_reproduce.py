"""The papers' tabular figures: what their data say, that the committed ones are these, and the command."""

import csv
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from fastpref import reproduce
from fastpref.cli import main
from fastpref.method.errors import ConfigError
from fastpref.reproduce import ipo_figures, simplex
from fastpref.theory.games import PreferenceGame

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
PAPERS = FIGURES.parent / "papers.md"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def figure_6(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("figures") / "new"
    before = signal.getsignal(signal.SIGTERM)
    assert main(["reproduce", "ipo-md-figure-6", "--out", str(out)]) == 0
    signal.signal(signal.SIGTERM, before)
    return out / "ipo-md-figure-6.png", out / "ipo-md-figure-6.csv"


def test_figure_6_has_21_paths_that_end_at_their_fixed_points(figure_6: tuple[Path, Path]) -> None:
    image, table = figure_6
    assert image.read_bytes().startswith(b"\x89PNG")
    last = {(row["matrix"], row["start"], row["mixture_beta"]): row for row in rows_of(table)}
    assert len(last) == 2 * 2 * 21
    for (matrix, _, beta), row in last.items():
        game = PreferenceGame(simplex.matrices()[matrix], simplex.REF, simplex.TAU)
        end = [float(row[name]) for name in ("y1", "y2", "y3")]
        np.testing.assert_allclose(end, game.nash(float(beta)), atol=1e-4)


def test_the_committed_figure_6_is_what_the_command_makes(figure_6: tuple[Path, Path]) -> None:
    new, kept = (rows_of(path) for path in (figure_6[1], FIGURES / "ipo-md-figure-6.csv"))
    assert len(new) == len(kept)
    for one, other in zip(new, kept, strict=True):
        assert one["matrix"] == other["matrix"]
        for name in ("step", "mixture_beta", "y1", "y2", "y3"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=2e-5)


def test_the_page_of_figures_shows_each_and_names_commands_that_exist() -> None:
    text, images = PAPERS.read_text(encoding="utf-8"), sorted(FIGURES.glob("*.png"))
    named = set(re.findall(r"`fastpref reproduce ([a-z0-9-]+)`", text))
    assert named == set(reproduce.EXPERIMENTS)
    assert {image.name for image in images} == set(re.findall(r"figures/([a-z0-9-]+\.png)", text))
    for image in images:
        assert image.stat().st_size < 200_000, image.name


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both figures of the IPO paper after a ninth of their steps."""
    out = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo_figures, "STEPS", 1980)
        for name in ("ipo-figure-1", "ipo-figure-2"):
            image, table = reproduce.reproduce(name, out)
            assert image.read_bytes().startswith(b"\x89PNG")
            assert table.exists()
    return out


def final(path: Path, data: str, loss: str, tau: str) -> np.ndarray:
    rows = [row for row in rows_of(path) if (row["data"], row["loss"], row["tau"]) == (data, loss, tau)]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    for row in last:
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    return np.array([float(row["mean"]) for row in last])


@pytest.mark.parametrize("tau", ["0.1", "0.5", "1.0"])
@pytest.mark.parametrize("short", [True, False])
def test_dpo_becomes_deterministic_and_ipo_stays_at_its_optimum(short_runs: Path, tau: str, short: bool) -> None:
    one = (short_runs if short else FIGURES) / "ipo-figure-1.csv"
    assert final(one, "D1", "DPO", tau)[0] > 0.97
    np.testing.assert_allclose(
        final(one, "D1", "IPO", tau), ipo_figures.optimum(ipo_figures.ORDER, float(tau)), atol=0.02
    )


@pytest.mark.parametrize("tau", ["0.1", "0.5", "1.0"])
@pytest.mark.parametrize("short", [True, False])
def test_dpo_drops_an_action_that_never_wins_but_d3_as_printed_has_none(
    short_runs: Path, tau: str, short: bool
) -> None:
    two = (short_runs if short else FIGURES) / "ipo-figure-2.csv"
    assert final(two, "D3 and b ≻ c", "DPO", tau)[2] < 0.01
    wanted = ipo_figures.optimum(ipo_figures.NEVER_WINS, float(tau))
    assert final(two, "D3 and b ≻ c", "IPO", tau)[2] == pytest.approx(wanted[2], abs=0.02)
    for loss in ("IPO", "DPO"):
        assert final(two, "D3 as printed", loss, tau)[2] == pytest.approx(1 / 3, abs=0.01)


def test_the_optimum_of_a_total_order_is_a_third_of_one_over_tau_apart() -> None:
    policy = ipo_figures.optimum(ipo_figures.ORDER, 0.5)
    np.testing.assert_allclose(-np.diff(np.log(policy)), 1 / (3 * 0.5))


def test_an_unknown_experiment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"name must be one of ipo-md-figure-6, .*but received 'figure'. Choose one"):
        reproduce.reproduce("figure", tmp_path)
    with pytest.raises(SystemExit):
        main(["reproduce", "figure"])
    assert "ipo-md-figure-6" in capsys.readouterr().err
