"""Settings as plain values, in and out: TOML tables, JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fastpref.method.adapter import AdapterConfig
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import nearest, require
from fastpref.method.schedules import Schedule

Config = TypeVar("Config", TrainConfig, SupervisedConfig)


def from_mapping(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """Build a config from a mapping such as a TOML table; a table with `start`, `end`, `steps` is a `Schedule`.

    Raises:
      ConfigError: an unknown key, with the nearest known one; a value of the wrong type; a broken rule.
    """
    known = to_json(kind())
    hints = get_type_hints(kind)
    values = {}
    for key, value in settings.items():
        require(key in known, f"{kind.__name__} has no setting of that name", key, nearest(key, known))
        hint = hints[key]
        parts = (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
        kinds = tuple(get_origin(part) or part for part in parts)
        if isinstance(known[key], Mapping):
            kinds = (dict,)
        values[key] = _parse(key, value, kinds, known[key])
    return kind(**values)


def _parse(key: str, value: Any, kinds: tuple[type, ...], default: Any) -> Any:
    if isinstance(value, Mapping) and Schedule in kinds:
        names = {entry.name for entry in dataclasses.fields(Schedule)}
        require(
            set(value) <= names and {"start", "end", "steps"} <= set(value),
            f"{key} as a table must have start, end and steps, and may have kind, warmup and repeat",
            dict(value),
            "For a constant, write a number.",
        )
        return Schedule(**{**value, "start": float(value["start"]), "end": float(value["end"])})
    if isinstance(value, Mapping) and AdapterConfig in kinds:
        return AdapterConfig.of(value)
    if float in kinds and type(value) is int:
        return float(value)
    if isinstance(value, list | tuple) and tuple in kinds:
        return tuple(float(each) if type(each) is int else each for each in value)
    words = ["list" if kind is tuple else kind.__name__ for kind in kinds if kind not in (Schedule, type(None))]
    wanted = " or ".join(words)
    require(type(value) in kinds, f"{key} must be of type {wanted}", value, f"Its default is {default!r}.")
    return value


def to_json(config: TrainConfig | SupervisedConfig) -> dict[str, Any]:
    """The config as plain JSON values; `from_mapping` reads it back."""
    return dataclasses.asdict(config)
