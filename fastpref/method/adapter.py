"""Settings of low-rank adapters (LoRA: Hu et al., 2021)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpref.method.errors import nearest, require

ALL_LINEAR = "all-linear"
"""The target that stands for every kernel of the layers: all but embedding and head."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters, which are trained in the place of a model's own parameters.

    A kernel W computes x W + s·(x A) B with A [in, rank], B [rank, out] and s = alpha / rank.

    Args:
      rank: r, columns of A and rows of B.
      alpha: s · rank. Learning rates of adapters are about ten times those of all parameters.
      targets: "all-linear" for every kernel of the layers; a list of names of modules in Hugging Face's layout, such as
        ["q_proj", "v_proj"], each of which may be the end of a longer one; or a regular expression of whole names. The
        head, "lm_head", is adapted where it is named, unless it is the embedding.
      dropout: probability that an entry of x does not reach A while the policy is learned.
      rslora: s = alpha / √rank (Kalajdzievski, 2023).
      init: the factor that is zero at the start, so that the model is its base: "zero-b" (Hu et al.: A uniform within
        1/√in) or "zero-a" (B uniform within 1/√rank).

    Raises:
      ConfigError: a setting breaks its rule.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | Sequence[str] = ALL_LINEAR
    dropout: float = 0.0
    rslora: bool = False
    init: str = "zero-b"

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        require(
            whole and self.rank >= 1,
            "rank of an adapter must be a whole number of at least 1",
            self.rank,
            "Set 16, say.",
        )
        require(
            0 < self.alpha < float("inf"),
            "alpha of an adapter must be a finite number above 0",
            self.alpha,
            "Set it to the rank for s = 1.",
        )
        require(0 <= self.dropout < 1, "dropout of an adapter must lie in [0, 1)", self.dropout, "0 switches it off.")
        require(
            self.init in ("zero-b", "zero-a"),
            "init of an adapter must be 'zero-b' or 'zero-a'",
            self.init,
            "Choose the factor that is zero at the start.",
        )
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        names = (self.targets,) if isinstance(self.targets, str) else self.targets
        require(
            isinstance(names, tuple) and bool(names) and all(isinstance(name, str) and name for name in names),
            "targets of an adapter must be 'all-linear', names of modules or a regular expression",
            self.targets,
            "Leave targets out for every kernel of the layers.",
        )
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                require(
                    False,
                    f"targets of an adapter as one text must be a regular expression ({error})",
                    self.targets,
                    "Write a list of names to match their ends.",
                )

    @property
    def scale(self) -> float:
        """s, the factor of A B."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "AdapterConfig":
        """The settings in a table of a file.

        Raises:
          ConfigError: an unknown key, a value of the wrong type, or a broken rule.
        """
        hints: dict[str, tuple[type, ...]] = {
            "rank": (int,),
            "alpha": (int, float),
            "targets": (str, list, tuple),
            "dropout": (int, float),
            "rslora": (bool,),
            "init": (str,),
        }
        defaults = {entry.name: entry.default for entry in dataclasses.fields(cls)}
        for key, value in table.items():
            require(key in hints, "an adapter has no setting of that name", key, nearest(key, hints))
            kinds = " or ".join(kind.__name__ for kind in hints[key])
            require(
                type(value) in hints[key],
                f"{key} of an adapter must be of type {kinds}",
                value,
                f"Its default is {defaults[key]!r}.",
            )
        values: dict[str, Any] = {
            key: float(value) if key in ("alpha", "dropout") else value for key, value in table.items()
        }
        return cls(**values)
