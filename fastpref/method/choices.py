"""Words that several settings and functions choose from."""

from typing import Literal

Overlong = Literal["drop", "truncate", "raise"]
OnBadRecord = Literal["raise", "skip", "warn"]
