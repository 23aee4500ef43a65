"""The algorithms as data: who writes the completions, what judges them, which of them are learned from, and how.

An entry is a *method*. A new one is `ALGORITHMS["name"] = Algorithm(...)`, often `dataclasses.replace` of another.
Papers: IPO-MD is "Human Alignment of Large Language Models through Online Preference Optimisation" (its Table 1 is the
beginning of this one), IPO "A General Theoretical Paradigm to Understand Learning from Human Preferences", INPO
"Iterative Nash Policy Optimization".
"""

from dataclasses import dataclass
from typing import Literal

from fastpref.method import losses
from fastpref.method.errors import require

Writer = Literal["data", "policy", "round", "mixture"]
"""The recorded data; π; π_t, which is π as it was when the round began; π^(1−β)·π_ref^β, one token at a time."""
Oracle = Literal["labels", "preference", "reward"]
Pairs = Literal["both", "first", "tournament", "win rates"]
Anchor = Literal["ref", "round", "both"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A method: one entry of the table.

    Args:
      writers: who writes each of the K completions of a prompt.
      judged_by: "labels" that came with the data, a "preference" model, or a "reward" model.
      pairs: what is learned from. "both": the two completions. "first": the first alone; where there is a second, it is
        only its opponent. "tournament": best against worst of K by 3K/2 − 1 comparisons, left out where the worst wins
        the last of them (INPO section 4.1). "win rates": best against worst of K by K(K − 1)/2 comparisons, and how
        often each of the two wins.
      loss: of `method.losses`: contrastive, elementwise in ρ; or of single completions, where `contrastive` is False.
      contrastive: the form of `loss`.
      anchor: what log π is compared with: log π_ref; log π_t; or "both", (τ/η)·log π_ref + (1 − τ/η)·log π_t.
      strength: which setting `loss` is given as its `tau`: "tau" or "eta".
      fixed_point: where the expected update stops, in words.
      source: paper and equation.

    Raises:
      ConfigError: the parts do not fit together.
    """

    writers: tuple[Writer, ...]
    judged_by: Oracle
    loss: losses.Loss
    fixed_point: str
    source: str
    pairs: Pairs = "both"
    contrastive: bool = True
    anchor: Anchor = "ref"
    strength: Literal["tau", "eta"] = "tau"

    def __post_init__(self) -> None:
        require(
            ("data" in self.writers) == (self.judged_by == "labels"),
            "labels and completions come from the data together",
            (self.writers, self.judged_by),
            "Let judged_by='labels' stand with writers=('data', 'data') and with no others.",
        )
        require(
            self.judged_by != "labels" or (self.writers == ("data", "data") and self.pairs == "both"),
            "recorded pairs are learned from as they are",
            (self.writers, self.pairs),
            "Use writers=('data', 'data') and pairs='both'.",
        )
        require(
            (self.judged_by == "reward") == (len(self.writers) == 1),
            "a reward judges one completion, a preference two or more",
            (self.judged_by, self.writers),
            "Use one writer with judged_by='reward' and no other. A reward model can be asked for preferences too.",
        )
        require(
            self.pairs != "both" or len(self.writers) == 2,
            "pairs='both' learns from two completions",
            self.writers,
            "Name two writers, or choose the pair by pairs='tournament'.",
        )
        require(
            self.pairs == "first" or len(self.writers) >= 2,
            f"pairs={self.pairs!r} learns from two completions",
            self.writers,
            "Repeat the writer, such as ('round',) * 8, or use pairs='first'.",
        )
        require(
            "round" not in self.writers or set(self.writers) == {"round"},
            "one model writes all completions of a step",
            self.writers,
            "Use 'round' for all of them or for none.",
        )
        require(
            not self.contrastive or self.pairs != "first",
            "a contrastive loss needs both completions",
            self.pairs,
            "Set contrastive=False with a loss of single completions, or another `pairs`.",
        )
        require(
            self.contrastive or self.pairs in ("first", "win rates"),
            "a loss of single completions needs a score for each",
            self.pairs,
            "Use pairs='first' or 'win rates', which give them.",
        )

    @property
    def offline(self) -> bool:
        """Whether nothing is sampled."""
        return self.judged_by == "labels"

    @property
    def selects(self) -> bool:
        """Whether a pair is chosen from K completions, K being free."""
        return self.pairs in ("tournament", "win rates")

    @property
    def in_rounds(self) -> bool:
        """Whether π_t, frozen within a round, has a part."""
        return "round" in self.writers or self.anchor != "ref"

    @property
    def objective(self) -> losses.Objective:
        """What the learner computes."""
        return losses.Objective(self.loss, self.contrastive, self.pairs == "first")

    def mixture_betas(self, mixture_beta: float, completions: int | None = None) -> tuple[float, ...]:
        """Weight of the partner in the sampler of each of the K completions."""
        writers = self.writers
        if completions is not None and completions != len(writers):
            writers = writers[:1] * completions
        return tuple(mixture_beta if writer == "mixture" else 0.0 for writer in writers)

    def anchor_weights(self, tau: float, eta: float) -> tuple[float, float]:
        """Weights of log π_ref and log π_t in the anchor; "both" is INPO's h_t (section 3.2)."""
        share = {"ref": 1.0, "round": 0.0, "both": tau / eta}[self.anchor]
        return share, 1.0 - share


def _offline(loss: losses.Loss, fixed_point: str, source: str) -> Algorithm:
    return Algorithm(writers=("data", "data"), judged_by="labels", loss=loss, fixed_point=fixed_point, source=source)


def _online(loss: losses.Loss, fixed_point: str, source: str) -> Algorithm:
    return Algorithm(
        writers=("policy", "policy"), judged_by="preference", loss=loss, fixed_point=fixed_point, source=source
    )


NASH = "Nash equilibrium of the regularised preference game"
EQUATION_13 = "best response to the mixture of itself and the reference"

ALGORITHMS: dict[str, Algorithm] = {
    "ipo-md": Algorithm(
        writers=("mixture", "mixture"),
        judged_by="preference",
        loss=losses.ipo,
        fixed_point=EQUATION_13,
        source="IPO-MD section 5, eq. 13",
    ),
    "online-ipo": _online(losses.ipo, NASH, "IPO-MD section 4, eqs. 11 and 12"),
    "online-dpo": _online(
        losses.dpo,
        "not the Nash equilibrium; under Bradley-Terry preferences, that of `rl`",
        "IPO-MD sections 2.3 and 4.3, theorems F.6 and F.7",
    ),
    "online-slic": _online(losses.slic, "none known", "IPO-MD sections 2.4 and 4.3"),
    "nash-md-pg": Algorithm(
        writers=("policy", "mixture"),
        judged_by="preference",
        pairs="first",
        loss=losses.policy_gradient,
        contrastive=False,
        fixed_point=EQUATION_13,
        source="IPO-MD sections 2.6 and 5.2",
    ),
    "self-play": Algorithm(
        writers=("policy", "policy"),
        judged_by="preference",
        pairs="first",
        loss=losses.policy_gradient,
        contrastive=False,
        fixed_point=NASH,
        source="IPO-MD sections 2.6 and 4.2, proposition 4.2",
    ),
    "rl": Algorithm(
        writers=("policy",),
        judged_by="reward",
        pairs="first",
        loss=losses.policy_gradient,
        contrastive=False,
        fixed_point="π_ref·exp(r/τ), normalised",
        source="IPO-MD section 2.2, eqs. 2 and 3, and section 6",
    ),
    "inpo": Algorithm(
        writers=("round",) * 8,
        judged_by="preference",
        pairs="tournament",
        loss=losses.ipo,
        anchor="both",
        strength="eta",
        fixed_point=f"{NASH}, as rounds go on, for pairs as they are drawn",
        source="INPO algorithm 1, eq. 8, and section 4.1",
    ),
    "iterative-dpo": Algorithm(
        writers=("round",) * 8,
        judged_by="preference",
        pairs="tournament",
        loss=losses.dpo,
        fixed_point="none known",
        source="INPO section 4.1 and appendix B, after Dong et al. (2024)",
    ),
    "sppo": Algorithm(
        writers=("round",) * 8,
        judged_by="preference",
        pairs="win rates",
        loss=losses.sppo,
        contrastive=False,
        anchor="round",
        strength="eta",
        fixed_point="Nash equilibrium without regularisation, on average over rounds",
        source="INPO section 3.4 and appendix B, after Wu et al. (2024)",
    ),
    "offline-ipo": _offline(
        losses.ipo, "π_ref·exp(p(y ≻ μ)/τ), normalised, for data of μ", "IPO eqs. 9 and 17, IPO-MD eqs. 7 and 8"
    ),
    "offline-dpo": _offline(
        losses.dpo, "that of `rl`, with the reward that fits the labels by Bradley-Terry", "IPO-MD section 2.3, eq. 4"
    ),
    "offline-slic": _offline(losses.slic, "none known", "IPO-MD section 2.4, eq. 5"),
}

_WRITTEN_BY = {"data": "data", "policy": "π", "round": "π_t", "mixture": "π̂_β"}
_JUDGES = {"labels": "recorded labels", "preference": "preference model", "reward": "reward model"}
_LEARNED = {
    "both": "both",
    "first": "y alone",
    "tournament": "best and worst, by tournament",
    "win rates": "best and worst, by win rate",
}
_LOSSES = {losses.ipo: "IPO", losses.dpo: "DPO", losses.slic: "SLiC", losses.policy_gradient: "policy gradient"}
_ANCHORS = {"ref": "π_ref", "round": "π_t", "both": "π_ref^(τ/η)·π_t^(1−τ/η)"}


def table() -> str:
    """The algorithms as a Markdown table, a line each."""
    head = ("name", "y, y', ... ~", "judged by", "learns from", "loss", "against", "fixed point")
    rows = [head, ("---",) * len(head)]
    for name, method in ALGORITHMS.items():
        writers = ", ".join(_WRITTEN_BY[writer] for writer in method.writers)
        if len(method.writers) > 2 and len(set(method.writers)) == 1:
            writers = f"{len(method.writers)} × {_WRITTEN_BY[method.writers[0]]}"
        rows.append(
            (
                f"`{name}`",
                writers,
                _JUDGES[method.judged_by],
                _LEARNED[method.pairs],
                _LOSSES.get(method.loss, method.loss.__name__.upper()),
                _ANCHORS[method.anchor],
                method.fixed_point,
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"
