"""Figure 6 of the IPO-MD paper: paths of IPO-MD on the simplex, from online (β = 0) to offline IPO (β = 1).

The printed matrix breaks p + pᵀ = 1: 0.8 faces 0.1. It is drawn twice. "completed" keeps what stands above the
diagonal. "printed" takes every number as it stands: y and y' are drawn alike, so that each pair meets in both orders,
and the expected gradient is that of the game (P + 1 − Pᵀ)/2 (`docs/theory.md`).
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fastpref.data import files
from fastpref.reproduce import figures
from fastpref.theory.games import PreferenceGame

PRINTED = np.array([[0.5, 0.8, 0.1], [0.1, 0.5, 0.8], [0.9, 0.1, 0.5]])
TAU, BETAS = 0.1, np.linspace(0, 1, 21)
REF = np.full(3, 1 / 3)
STARTS = {"corner": np.array([0.90, 0.05, 0.05]), "reference": REF}
STEPS, STEP_SIZE, EVERY = 6000, 0.002, 25


def matrices() -> dict[str, Float[np.ndarray, "A A"]]:
    """The two readings of the printed matrix, each with p + pᵀ = 1."""
    upper = np.triu(PRINTED, 1)
    return {
        "completed": upper + np.tril(1 - upper.T, -1) + np.eye(3) / 2,
        "printed": (PRINTED + 1 - PRINTED.T) / 2,
    }


def paths(preferences: Float[np.ndarray, "A A"], start: Float[np.ndarray, " A"]) -> Float[np.ndarray, "B T A"]:
    """A path for each of the 21 values of β: gradient descent on IPO-MD's expected loss, in small steps."""
    game = PreferenceGame(preferences, REF, TAU)
    return np.stack(
        [
            game.trajectory(
                "ipo-md", steps=STEPS, step_size=STEP_SIZE, mixture_beta=float(beta), start=start, every=EVERY
            )
            for beta in BETAS
        ]
    )


def figure_6(out: Path) -> list[Path]:
    """Write `ipo-md-figure-6.png` and `.csv` into the folder; returns them."""
    cells: list[list[Any]] = []
    panels = []
    for reading, preferences in matrices().items():
        game = PreferenceGame(preferences, REF, TAU)
        ends = np.stack([game.nash(float(beta)) for beta in BETAS])
        for name, start in STARTS.items():
            found = paths(preferences, start)
            panels.append(figures.SimplexPanel(TITLES[reading, name], found, ends, zoom=name == "reference"))
            for beta, path in zip(BETAS, found, strict=True):
                for number in _kept(len(path)):
                    texts = [f"{probability:.5f}" for probability in path[number]]
                    cells.append([reading, name, f"{beta:.2f}", number * EVERY, *texts])
    table = files.write_csv(
        out / "ipo-md-figure-6.csv", ["matrix", "start", "mixture_beta", "step", "y1", "y2", "y3"], cells
    )
    image = figures.simplices(
        out / "ipo-md-figure-6.png", "IPO-MD from online (β = 0) to offline IPO (β = 1), τ = 0.1", panels, BETAS
    )
    return [image, table]


TITLES = {
    ("completed", "corner"): "0.8 faces 0.2 (completed)",
    ("completed", "reference"): "The same from the reference, enlarged",
    ("printed", "corner"): "0.8 faces 0.1 (as printed)",
    ("printed", "reference"): "The same from the reference, enlarged",
}


def _kept(length: int) -> list[int]:
    """Few points of a path, close together at its beginning, where it moves."""
    return sorted({int(number) for number in (length - 1) * np.linspace(0, 1, 25) ** 2})
