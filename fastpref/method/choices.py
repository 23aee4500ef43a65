"""Words that several settings and functions choose from."""

from typing import Literal

Overlong = Literal["drop", "truncate", "raise"]
OnBadRecord = Literal["raise", "skip", "warn"]

TruncationSide = Literal["left", "right"]
"""Where a text that is too long is cut: "right" keeps its first tokens, "left" its last."""
