"""How a setting that breaks its rule is refused: the rule, what was received, and the remedy."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting breaks its rule. The message says the rule, what was received, and the remedy."""


def require(holds: bool, rule: str, received: object, remedy: str) -> None:
    """Raise ConfigError with the three unless the rule holds."""
    if not holds:
        raise ConfigError(f"{rule}, but received {received!r}. {remedy}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is not known: the known one that is most like it, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
