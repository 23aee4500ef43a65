"""Sweeps: one run for each point of a grid of settings, and a table of what came out.

sweep/tau=0.1,seed=0/            the run directory of a point
sweep/tau=0.1,seed=0/point.json  its settings and score, written once the run has finished
sweep/results.csv                every point
sweep/results.md                 mean and standard deviation over seeds
sweep/results.png                the same, against the first field of the grid
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Generic

import numpy as np
import orjson

from fastpref.data import files
from fastpref.method.errors import ConfigError, DivergedError, nearest
from fastpref.method.schedules import Schedule
from fastpref.method.tables import Config, from_mapping, to_json
from fastpref.runs import log, owner, terminal
from fastpref.runs.metrics import METRICS


@dataclass(frozen=True)
class Point:
    """One point of a grid.

    Args:
      values: the fields that the grid sets, as JSON values.
      folder: its run directory.
      score: the metric after the run; NaN where it diverged.
      error: what a run that diverged said, else None.
    """

    values: Mapping[str, Any]
    folder: Path
    score: float
    error: str | None


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` returns.

    Args:
      metric: what the scores are.
      points: every point, in the order of the grid.
    """

    metric: str
    points: Sequence[Point]

    def rows(self) -> list[dict[str, Any]]:
        """A record for each setting of the fields but `seed`: those fields, `mean`, `deviation`, `seeds`, `diverged`.

        The mean is over the seeds that did not diverge, None where all did; the deviation is their standard deviation,
        None where there are fewer than 2.
        """
        groups: dict[str, list[Point]] = {}
        for point in self.points:
            groups.setdefault(repr(_without_seed(point.values)), []).append(point)
        rows = []
        for points in groups.values():
            scores = [point.score for point in points if math.isfinite(point.score)]
            rows.append(
                {
                    **_without_seed(points[0].values),
                    "mean": float(np.mean(scores)) if scores else None,
                    "deviation": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                    "seeds": len(points),
                    "diverged": sum(point.error is not None for point in points),
                }
            )
        return rows

    def table(self) -> None:
        """Print mean and deviation over seeds."""
        columns, rows = self._cells()
        terminal.table(f"Sweep: {self.metric}", columns, rows)

    def markdown(self) -> str:
        """The same as a Markdown table."""
        columns, rows = self._cells()
        lines = [columns, ["---"] * len(columns), *rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = self.rows()
        fields = list(_without_seed(self.points[0].values))
        columns = [*fields, self.metric, "deviation", "seeds", "diverged"]
        return columns, [
            [
                *(_word(row[field]) for field in fields),
                *("–" if row[name] is None else f"{row[name]:.4g}" for name in ("mean", "deviation")),
                str(row["seeds"]),
                str(row["diverged"]),
            ]
            for row in rows
        ]

    def plot(self, path: str | Path) -> Path:
        """Draw the mean over seeds, with its deviation, against the first field; a line for each of the others."""
        from fastpref.runs import plots

        rows = self.rows()
        fields = list(_without_seed(self.points[0].values)) or ["seed"]
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            lines.setdefault(", ".join(f"{field} = {_word(row[field])}" for field in fields[1:]), []).append(row)

        def place(row: Mapping[str, Any]) -> float | str:
            value = row.get(fields[0], "all seeds")
            return value if isinstance(value, int | float) and not isinstance(value, bool) else _word(value)

        curves = []
        for label, members in lines.items():
            if all(isinstance(place(row), int | float) for row in members):
                members = sorted(members, key=lambda row: float(row[fields[0]]))
            means = [math.nan if row["mean"] is None else row["mean"] for row in members]
            spread = [row["deviation"] or 0.0 for row in members]
            curves.append(
                plots.Curve(
                    label=label,
                    x=[place(row) for row in members],
                    y=means,
                    low=[mean - deviation for mean, deviation in zip(means, spread, strict=True)],
                    high=[mean + deviation for mean, deviation in zip(means, spread, strict=True)],
                )
            )
        unit = METRICS[self.metric].unit if self.metric in METRICS else ""
        return plots.plot_curves(
            Path(path),
            curves,
            x_label=fields[0],
            y_label=f"{self.metric} ({unit})" if unit else self.metric,
            title="Sweep: mean and standard deviation over seeds",
            line=0.5 if "win_rate" in self.metric else None,
        )

    def save(self, directory: str | Path) -> None:
        """Write `results.csv`, `results.md` and `results.png`, over what is there."""
        folder = Path(directory)
        points = [
            [*map(_word, point.values.values()), point.score, point.folder.name, point.error or ""]
            for point in self.points
        ]
        files.write_csv(folder / "results.csv", [*self.points[0].values, self.metric, "run", "error"], points)
        files.write_file(folder / "results.md", self.markdown().encode())
        self.plot(folder / "results.png")


@dataclass(frozen=True)
class _Plan(Generic[Config]):
    values: dict[str, Any]
    config: Config
    folder: Path


def sweep(
    grid: Mapping[str, Any],
    base: Config,
    run: Callable[[Config, Path], object],
    *,
    run_dir: str | Path,
    metric: str | Callable[[Config, Path], float] = "eval/win_rate",
    quiet: bool = False,
) -> SweepResult:
    """Run every point of a grid, each in a directory of its own, and collect one number from each.

    Called again, points that have finished are not run again, and one that was interrupted goes on from its last
    checkpoint. A run that diverges is recorded as such, and the others go on; any other error ends the sweep.

        fastpref.sweep(
            {"tau": [0.1, 1.0], "seed": [0, 1, 2]},
            fastpref.TrainConfig(eval_every=100),
            lambda config, folder: fastpref.train(model, prompts, judge, config, run_dir=folder, eval_prompts=held_out),
            run_dir="runs/tau",
        )

    Args:
      grid: a list of values for each field of the config, at least one each; all combinations are run. Points that
        differ in `seed` alone are averaged.
      base: the settings that the grid does not name; a `TrainConfig` or `SupervisedConfig`.
      run: makes one run with the settings and the directory that it is given.
      run_dir: where the sweep is written.
      metric: a metric that the runs log, whose last value is taken; or a function of the settings and the directory
        of a finished run, such as one that measures a win rate, named by its `__name__`.
      quiet: print no line before each run.

    Returns:
      `SweepResult`, which is also written to `results.csv`, `results.md` and `results.png`.

    Raises:
      ConfigError: an empty grid, an unknown field, a value that breaks its rule or is given twice, an unknown metric,
        or one that the runs do not log.
      OwnerError: another process is writing the sweep.
    """
    folder = Path(run_dir)
    plans = _plans(grid, base, folder)
    if isinstance(metric, str):
        _check_metric(metric, plans)
    with owner.hold(folder):
        points = []
        for number, plan in enumerate(plans, 1):
            point = _recorded(plan, metric)
            if point is None:
                if not quiet:
                    terminal.say(f"{number} of {len(plans)}: {plan.folder.name}")
                point = _measured(plan, run, metric)
            points.append(point)
        result = SweepResult(metric if isinstance(metric, str) else metric.__name__, points)
        result.save(folder)
        return result


def _plans(grid: Mapping[str, Any], base: Config, folder: Path) -> list[_Plan[Config]]:
    if not grid:
        raise ConfigError("a grid needs at least one field, but received none. Add one, such as tau = [0.1, 1.0].")
    for field, values in grid.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not len(values):
            raise ConfigError(
                f"a field of a grid must have a list of at least one value, but {field} has {values!r}. "
                f"Write {field} = [...], or take it out."
            )
    settings = to_json(base)
    plans = []
    for combination in product(*grid.values()):
        given = {field: _plain(value) for field, value in zip(grid, combination, strict=True)}
        config = from_mapping(type(base), {**settings, **given})
        # As the config has them, so that 1 and 1.0 are one value and have one name.
        point = {field: _plain(getattr(config, field)) for field in given}
        name = ",".join(f"{field}={_word(value)}" for field, value in point.items())
        plans.append(_Plan(point, config, folder / re.sub(r"[^A-Za-z0-9._=,~+-]", "_", name)))
    names = [plan.folder.name for plan in plans]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"the points of a grid must differ, but {twice[0]!r} is there twice. Give each value once.")
    return plans


def _check_metric(metric: str, plans: Sequence[_Plan[Any]]) -> None:
    if metric not in METRICS:
        raise ConfigError(f"metric must be one that runs log, but received {metric!r}. {nearest(metric, METRICS)}")
    if metric.startswith("eval/") and any(plan.config.eval_every == 0 for plan in plans):
        raise ConfigError(
            f"metric {metric!r} needs held-out evaluation, but received eval_every=0. "
            "Set eval_every, and pass eval_prompts to the runs."
        )


def _recorded(plan: _Plan[Any], metric: str | Callable[..., float]) -> Point | None:
    """What is written of a point that has finished with the same settings."""
    path = plan.folder / "point.json"
    if not path.is_file():
        return None
    found = orjson.loads(path.read_bytes())
    if found["settings"] != orjson.loads(orjson.dumps(to_json(plan.config))):
        return None
    if found["error"] is not None:
        return Point(plan.values, plan.folder, math.nan, found["error"])
    name = metric if isinstance(metric, str) else metric.__name__
    score = found["scores"].get(name)
    if score is None:
        # Finished, but another metric was asked for then.
        score = _score(plan, metric)
        _record(plan, {**found["scores"], name: score}, None)
    return Point(plan.values, plan.folder, score, None)


def _measured(
    plan: _Plan[Config], run: Callable[[Config, Path], object], metric: str | Callable[[Config, Path], float]
) -> Point:
    try:
        run(plan.config, plan.folder)
    except DivergedError as error:
        _record(plan, {}, str(error))
        return Point(plan.values, plan.folder, math.nan, str(error))
    score = _score(plan, metric)
    _record(plan, {metric if isinstance(metric, str) else metric.__name__: score}, None)
    return Point(plan.values, plan.folder, score, None)


def _record(plan: _Plan[Any], scores: Mapping[str, float], error: str | None) -> None:
    content = {"values": plan.values, "settings": to_json(plan.config), "scores": scores, "error": error}
    files.write_json(plan.folder / "point.json", content)


def _score(plan: _Plan[Config], metric: str | Callable[[Config, Path], float]) -> float:
    if not isinstance(metric, str):
        return float(metric(plan.config, plan.folder))
    path = plan.folder / "metrics.jsonl"
    records = log.read_metrics(path)
    values = [record[metric] for record in records if record.get(metric) is not None]
    if not values:
        names = sorted({name for record in records for name in record})
        raise ConfigError(
            f"the runs of a sweep must log its metric {metric!r}, but {path} has {', '.join(names) or 'nothing'}. "
            "Choose one of those, or pass the run directory on to the run."
        )
    return float(values[-1])


def _without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in values.items() if field != "seed"}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Schedule) else value


def _word(value: Any) -> str:
    """A value as it stands in names and tables."""
    if isinstance(value, Mapping):
        # A schedule, which ends with what most of them leave as it is.
        parts = {name: part for name, part in value.items() if not (name in ("warmup", "repeat") and not part)}
        return "~".join(str(part) for part in parts.values())
    return str(value).lower() if isinstance(value, bool) else str(value)
