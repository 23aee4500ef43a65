"""Entries of `config.json`: their rules, and the words for those that break them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastpref.method.errors import ModelError

REMEDIES = {
    "quantization_config": "Save the weights unquantized: load them with transformers, then model.dequantize() and "
    "model.save_pretrained(...).",
}
"""Ways out of an option that is not supported, where there are any."""

MANY = 2**31 - 1


class Entry(NamedTuple):
    """The rule of an entry of `config.json`: its type and range, or None where it may be left out."""

    kind: type
    low: float = 0
    high: float = MANY
    optional: bool = False

    def check(self, name: str, value: object) -> None:
        """Raise ModelError unless the value keeps the rule."""
        if value is None and self.optional:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is int:
            rule, holds = f"a whole number from {self.low:.0f} to {self.high:.0f}", isinstance(value, int) and number
        elif self.kind is float:
            rule, holds = f"a number above {self.low:g} and at most {self.high:g}", number
        else:
            rule, holds = {bool: "true or false", str: "text"}[self.kind], isinstance(value, self.kind)
        if holds and isinstance(value, int | float) and number:
            # NaN compares false.
            holds = value <= self.high and (value >= self.low if self.kind is int else value > self.low)
        if not holds:
            raise ModelError(f"{name} of config.json must be {rule}, but received {value!r}. Copy the file again.")


SIZE, OPTIONAL_SIZE = Entry(int, 1), Entry(int, 1, optional=True)
SMALL, POSITIVE = Entry(float, 0, 1, optional=True), Entry(float, 0, 1e12, optional=True)
FLAG = Entry(bool, optional=True)


def check_entries(raw: Mapping[str, Any], schema: Mapping[str, Entry]) -> None:
    """Raise ModelError for the first entry that is missing or breaks its rule; entries left out keep their defaults."""
    for name, rule in schema.items():
        if name in raw or not rule.optional:
            rule.check(name, raw.get(name))


def entry_or(raw: Mapping[str, Any], name: str, default: Any) -> Any:
    """An entry, or its default where it is left out or null."""
    return default if raw.get(name) is None else raw[name]


def entry(raw: Mapping[str, Any], name: str) -> Any:
    """An entry that must be there."""
    if raw.get(name) is None:
        raise ModelError(f"config.json must hold {name}, but received one without. Copy it again.")
    return raw[name]


def unsupported(kind: object, option: str, value: object, allowed: tuple[Any, ...]) -> ModelError:
    """The error for an option that changes the model in a way not written here."""
    choices = " or ".join(repr(choice) for choice in allowed) if allowed else "left out"
    remedy = REMEDIES.get(option, "Choose another checkpoint: the weights were trained with this.")
    return ModelError(f"{option} of a {kind} must be {choices}, but received {value!r}. {remedy}")
