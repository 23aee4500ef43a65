"""The papers' figures and tables again, one command each: `fastpref reproduce NAME --out DIR`.

An experiment is a row of `EXPERIMENTS`: what it shows, and a function that writes its PNG and CSV files to a folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastpref.method.errors import require
from fastpref.reproduce import ipo_figures, simplex, studies


@dataclass(frozen=True)
class Experiment:
    """A figure or table of a paper.

    Args:
      text: what it shows, in a line.
      run: writes its files into a folder, which exists, and returns them.
    """

    text: str
    run: Callable[[Path], list[Path]]


def _study(make: Callable[[studies.Lab], list[Path]], folder: Path) -> list[Path]:
    return make(studies.Lab(folder))


EXPERIMENTS: dict[str, Experiment] = {
    "ipo-md-figure-6": Experiment(
        "IPO-MD, Figure 6: online, offline and MD variants of IPO on a game of three actions", simplex.figure_6
    ),
    "ipo-figure-1": Experiment("IPO, Figure 1: IPO and DPO on a total order of three actions", ipo_figures.figure_1),
    "ipo-figure-2": Experiment("IPO, Figure 2: IPO and DPO where an action never wins", ipo_figures.figure_2),
    **{name: Experiment(text, partial(_study, make)) for name, (text, make) in studies.STUDIES.items()},
}


def reproduce(name: str, out: Path | str) -> list[Path]:
    """Run one experiment.

    Args:
      name: a name of `EXPERIMENTS`.
      out: the folder that its files are written to; made if it is not there.

    Returns:
      The files.

    Raises:
      ConfigError: no experiment has that name.
    """
    require(name in EXPERIMENTS, "name must be one of " + ", ".join(EXPERIMENTS), name, "Choose one of them.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    return EXPERIMENTS[name].run(folder)
