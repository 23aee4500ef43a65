"""Records of text, and the count of what became of each: delivered, or dropped with its reason."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastpref.method.choices import OnBadRecord
from fastpref.method.errors import DataError


class BadRecord(Exception):
    """One record that cannot be used: `reason` is counted, `detail` is shown; `size` is that of one over a limit."""

    def __init__(self, reason: str, detail: str, size: int = 0) -> None:
        super().__init__(detail)
        self.reason = reason
        self.size = size


IDENTICAL = "identical completions"
"""The reason of a pair that teaches nothing."""


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its K recorded completions: none, one (supervised) or two (chosen, then rejected)."""

    id: int
    """Position in the source, from 0, bad records counted too."""
    prompt: str
    """A `Rendered` one where a chat template wrote it."""
    completions: tuple[str, ...] = ()
    preference: float = 1.0
    """Probability that completion 0 beats completion 1."""


@dataclass(frozen=True, slots=True)
class DropReport:
    """What became of every record that was read: `delivered` and the sum of `dropped` are `read`.

    Raises:
      ValueError: they are not.
    """

    read: int
    delivered: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Records by the reason they were dropped for."""
    truncated: int = 0
    """Records among the delivered that were cut to a limit."""
    longest: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Tokens of the longest prompt or completion by the reason that it was dropped for."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Names of columns of the source that nothing was read from."""

    def __post_init__(self) -> None:
        if self.delivered + sum(self.dropped.values()) != self.read:
            raise ValueError(
                f"delivered and dropped records must add up to those read, but received {self.delivered} and "
                f"{dict(self.dropped)} of {self.read}. Count each record once."
            )

    def __str__(self) -> str:
        text = f"{self.read} records read, {self.delivered} delivered, {self.read - self.delivered} dropped"
        if self.dropped:
            reasons = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
            text += f" ({', '.join(f'{count} {reason}' for reason, count in reasons)})"
        if self.truncated:
            text += f", {self.truncated} truncated"
        return text + (f"; columns not used: {', '.join(self.unused)}" if self.unused else "")

    @property
    def shares(self) -> str:
        """Shares lost and cut, in per cent; "" where neither is."""
        shares = ((self.read - self.delivered, "lost"), (self.truncated, "cut"))
        return ", ".join(f"{share(part, self.read)} {word}" for part, word in shares if part)

    def then(self, later: "DropReport") -> "DropReport":
        """This report and that of a later stage, which read what this one delivered, as one.

        Raises:
          ValueError: the later stage read another number of records.
        """
        if later.read != self.delivered:
            raise ValueError(
                f"a later stage must read the {self.delivered} records that this one delivered, but received "
                f"{later.read}. Join reports in the order of their stages."
            )
        dropped = dict(Counter(self.dropped) + Counter(later.dropped))
        longest = dict(Counter(self.longest) | Counter(later.longest))
        unused = tuple(sorted({*self.unused, *later.unused}))
        return DropReport(self.read, later.delivered, dropped, self.truncated + later.truncated, longest, unused)


def share(part: int, whole: int) -> str:
    """A share in per cent, rounded away from none and all."""
    return f"{min(max(round(100 * part / whole), 1), 100 if part == whole else 99)} %"


class Ledger:
    """Counts the records of one stage and deals with the bad ones as `on_bad_record` says."""

    def __init__(self, source: str, on_bad_record: OnBadRecord) -> None:
        if on_bad_record not in ("raise", "skip", "warn"):
            raise ValueError(
                f"on_bad_record must be 'raise', 'skip' or 'warn', but received {on_bad_record!r}. Choose one of them."
            )
        self.source = source
        self.on_bad_record = on_bad_record
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self.longest: Counter[str] = Counter()
        self.first = ""
        self.unused: set[str] = set()

    def drop(self, place: str, bad: BadRecord, *, counted: bool | None = None) -> None:
        """Count a bad record; raise DataError instead if the policy, or `counted=False`, says so."""
        if not (self.on_bad_record != "raise" if counted is None else counted):
            setting = "on_bad_record='skip'" if counted is None else "overlong='drop'"
            raise DataError(
                f"{place}: {bad} [{bad.reason}]. Repair it, or have such records dropped and counted: {setting}."
            ) from None
        self.first = self.first or f"{place}: {bad}"
        self.dropped[bad.reason] += 1
        if bad.size:
            self.longest[bad.reason] = max(self.longest[bad.reason], bad.size)

    def account(self) -> DropReport:
        """The account so far."""
        delivered = self.read - sum(self.dropped.values())
        unused = tuple(sorted(self.unused))
        return DropReport(self.read, delivered, dict(self.dropped), self.truncated, dict(self.longest), unused)

    def close(self) -> None:
        """Warn, once for all, if that is the policy and a record was dropped."""
        if self.on_bad_record == "warn" and self.dropped:
            warnings.warn(f"{self.source}: {self.account()}; the first: {self.first}", UserWarning, stacklevel=4)
