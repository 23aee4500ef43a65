"""The algorithms as data: who samples y and y', what judges them, which loss (IPO-MD paper, Table 1)."""

from dataclasses import dataclass
from typing import Literal

from fastpref import losses

Sampler = Literal["policy", "mixture"]


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Args:
      first: who writes y: the policy π, or the one-token-at-a-time mixture π̂ of π and π_ref with weight β.
      second: who writes y'.
      loss: elementwise contrastive loss of `fastpref.losses`.
      fixed_point: where the expected update stops, in words.
      source: paper and equation.
    """

    first: Sampler
    second: Sampler
    loss: losses.Loss
    fixed_point: str
    source: str

    def mixture_betas(self, mixture_beta: float) -> tuple[float, float]:
        """Weight of the reference in the sampler of y and of y'."""
        return (
            mixture_beta if self.first == "mixture" else 0.0,
            mixture_beta if self.second == "mixture" else 0.0,
        )


ALGORITHMS: dict[str, Algorithm] = {
    "ipo-md": Algorithm(
        first="mixture",
        second="mixture",
        loss=losses.ipo,
        fixed_point="best response to the geometric mixture of itself and the reference (eq. 13)",
        source="IPO-MD, section 5",
    ),
    "online-ipo": Algorithm(
        first="policy",
        second="policy",
        loss=losses.ipo,
        fixed_point="Nash equilibrium of the regularised preference game (eq. 12)",
        source="IPO-MD, section 4",
    ),
    "online-dpo": Algorithm(
        first="policy",
        second="policy",
        loss=losses.dpo,
        fixed_point="not the Nash equilibrium, except under Bradley-Terry preferences (theorems F.6 and F.7)",
        source="IPO-MD, sections 2.3 and 4.3",
    ),
    "online-slic": Algorithm(
        first="policy",
        second="policy",
        loss=losses.slic,
        fixed_point="none known",
        source="IPO-MD, sections 2.4 and 4.3",
    ),
}
