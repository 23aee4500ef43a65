"""Figures of recorded results: where each stands, how it is shown, and the tables and sentences made of them."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS, CURVES = ROOT / "bench" / "results", ROOT / "docs" / "figures"


class MissingError(LookupError):
    """A result that was not recorded, or that holds nothing at a path."""


class Figure(NamedTuple):
    """A value of a result.

    Args:
      result: name of a JSON file of bench/results, or of a CSV file of docs/figures.
      path: keys and positions; a dict stands for the only record that has these values, "*" for all that have the rest.
      shown: the text of the value.
    """

    result: str
    path: tuple[Any, ...]
    shown: Callable[[Any], str]

    def __str__(self) -> str:
        return self.shown(value(read(self.result), self.path, f"{self.result}: {self.path}"))


Cell = tuple[str | Figure, ...]


class Row(NamedTuple):
    what: str
    cells: Sequence[Cell]
    later: bool = False
    """Left out while its result is not recorded."""


class Table(NamedTuple):
    columns: tuple[str, ...]
    rows: Sequence[Row]


class Prose(NamedTuple):
    parts: Cell


def read(result: str) -> Any:
    """The content of a result: records of a CSV file, or whatever the JSON file holds."""
    if (table := CURVES / f"{result}.csv").exists():
        with table.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if not (path := RESULTS / f"{result}.json").exists():
        raise MissingError(f"bench/results/{result}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def value(content: Any, path: Sequence[Any], where: str) -> Any:
    """What stands at a path of a result; `where` is for the message if nothing does."""
    for place, key in enumerate(path):
        rest = path[place + 1 :]
        if key == "*":
            return [value(record, rest, where) for record in content if rest[0] in record]
        try:
            if isinstance(key, Mapping):
                (content,) = (record for record in content if key.items() <= record.items())
            else:
                content = content[key]
        except (LookupError, ValueError):
            raise MissingError(where) from None
    return content


def decimals(places: int, unit: str = "", scale: float = 1.0) -> Callable[[Any], str]:
    """The form of a number: scaled, with so many decimals, and its unit."""
    return lambda number: f"{scale * float(number):.{places}f}{unit}"


def listed(shown: Callable[[Any], str]) -> Callable[[Sequence[Any]], str]:
    """All of some values, in their order."""

    def text(values: Sequence[Any]) -> str:
        *most, last = map(shown, values)
        return f"{', '.join(most)} and {last}" if most else last

    return text


def spread(shown: Callable[[Any], str]) -> Callable[[Sequence[Any]], str]:
    """The least and the most of some values, or the only one."""
    return lambda values: " to ".join(dict.fromkeys(shown(end) for end in (min(values), max(values))))


milliseconds, seconds = decimals(1, " ms", 1e3), decimals(2, " s")
megabytes, rate, percent = decimals(0, " MB", 1e-6), decimals(0, " M/s", 1e-6), decimals(1, " %", 100)
