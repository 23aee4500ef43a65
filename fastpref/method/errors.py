"""Every exception and warning of this package, and the one way in which a setting that breaks its rule is refused.

`FastprefError` is the base of all exceptions: what the command line answers with one line instead of a traceback. A
message says the rule, the value received, and the remedy.
"""

import difflib
from collections.abc import Iterable, Mapping


class FastprefError(Exception):
    """Base of every exception that this package raises for what a user can mend."""


class ConfigError(FastprefError, ValueError):
    """A setting breaks its rule."""


class DataError(FastprefError, ValueError):
    """Data that cannot be used; the message says where it is."""


class ClosedError(FastprefError, ValueError):
    """A batcher that was closed is asked for more."""


class ChatError(FastprefError, ValueError):
    """A conversation that cannot be written as prompt and completions."""


class ModelError(FastprefError, ValueError):
    """A model directory that cannot be read, or whose parts do not belong together."""


class JudgeError(FastprefError, RuntimeError):
    """A judge raised, or answered with something that is not one probability, or reward, for each prompt.

    Args:
      message: the rule, the value received, and the remedy.
      answered: answers that the call had before it failed, by position; the log keeps them.
    """

    def __init__(self, message: str, answered: Mapping[int, float] | None = None) -> None:
        super().__init__(message)
        self.answered: Mapping[int, float] = answered or {}


class JudgementsError(FastprefError, RuntimeError):
    """The log of judgements could not be written, or is damaged."""


class CheckpointError(FastprefError, RuntimeError):
    """A checkpoint could not be written, or none that fits could be read."""


class OwnerError(FastprefError, RuntimeError):
    """A run directory belongs to another process."""


class WriteError(FastprefError, OSError):
    """A file or directory could not be written; what was there before is as it was."""


class UnavailableError(FastprefError, RuntimeError):
    """Something that is installed on first use could not be had."""


class DivergedError(FastprefError, RuntimeError):
    """Several updates in a row, or the logits of a model that writes, were not finite."""


class StopSignal(SystemExit):
    """A run ended after TERM or HUP; it exits with 128 and the signal's number, as a shell reports it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ModelWarning(UserWarning):
    """A model is read in a way that its files leave open, or otherwise than they say."""


class CacheWarning(UserWarning):
    """A damaged cache of tokens was thrown away and made anew."""


class CutWarning(UserWarning):
    """Prompts were cut to a limit."""


class DropWarning(UserWarning):
    """Records were dropped, or columns of theirs not used, where no report is returned that says so."""


class JudgeWarning(UserWarning):
    """A judge cannot be told from another: what it said is not used again."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


class RunWarning(UserWarning):
    """A part of a run directory that no run needs to go on is damaged, or could not be written."""


def require(holds: bool, rule: str, received: object, remedy: str) -> None:
    """Raise `ConfigError` with the rule, the value received and the remedy, unless the rule holds."""
    if not holds:
        raise ConfigError(f"{rule}, but received {received!r}. {remedy}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the known one that is most like it, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
