"""What a run is asked to do: frozen, validated, and written to the run directory as JSON."""

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from fastpref.method.algorithms import ALGORITHMS, Algorithm
from fastpref.method.errors import nearest, require
from fastpref.method.schedules import Schedule, Value, bounds, value_at

OPTIMIZERS = ("adafactor", "adamw")


def _check_optimizer(config: "TrainConfig | SupervisedConfig") -> None:
    require(
        config.optimizer in OPTIMIZERS,
        f"optimizer must be one of {', '.join(OPTIMIZERS)}",
        config.optimizer,
        "For any other, pass an optax.GradientTransformation as the `optimizer` argument of the function.",
    )
    require(
        bounds(config.learning_rate)[0] >= 0,
        "learning_rate must not be negative",
        config.learning_rate,
        "The paper's is 1e-4.",
    )
    require(
        config.max_grad_norm is None or config.max_grad_norm > 0,
        "max_grad_norm must be above 0, or None for no clipping",
        config.max_grad_norm,
        "Leave it out to switch clipping off.",
    )


def _check_policies(config: "TrainConfig | SupervisedConfig") -> None:
    require(
        config.overlong in ("drop", "truncate", "raise"),
        "overlong must be 'drop', 'truncate' or 'raise'",
        config.overlong,
        "Choose what happens to prompts above max_prompt_tokens.",
    )
    require(
        config.on_bad_record in ("raise", "skip", "warn"),
        "on_bad_record must be 'raise', 'skip' or 'warn'",
        config.on_bad_record,
        "Choose what happens to records that cannot be used.",
    )


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        received = getattr(config, name)
        require(
            isinstance(received, int) and received >= 1,
            f"{name} must be a whole number of at least 1",
            received,
            f"Set {name} to 1 or more.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `fastpref.train`. Defaults are those of the IPO-MD paper (section 6) where it names them.

    Args:
      algorithm: a name in `fastpref.ALGORITHMS`.
      tau: τ > 0, strength of the regularisation towards the reference; a number or a `Schedule`. Where η is the
        strength of the loss, τ = 0 takes the reference out of it ("INPO without KL").
      eta: η ≥ τ, INPO's and SPPO's pull towards π_t; a number or a `Schedule`; None for 3τ (INPO, appendix B).
      mixture_beta: β in [0, 1], weight of the reference in the sampling mixture; a number or a `Schedule`.
        Read only by algorithms that sample from the mixture.
      mixture_partner: "ref", or "behaviour": the mixture is then π^(1−β)·μ^β with the model passed as `behaviour`.
      completions: K, of algorithms that choose a pair from K completions; None for the algorithm's own number.
      rounds: T, of algorithms that sample from π_t: so many times, at even distances, π_t becomes π.
      baseline: of algorithms with a reward: "none", or "batch" to subtract the mean reward of the batch's other
        completions, which changes the variance alone.
      steps: optimiser updates.
      batch_size: prompts per update; each gives one pair, or one completion where only that is learned from.
      gradient_accumulation: the learner sees the batch in this many parts, whose gradients are averaged over pairs;
        must divide batch_size.
      max_prompt_tokens: longer prompts are handled as `overlong` says.
      overlong: "drop" (counted), "truncate" (keeps the first tokens) or "raise".
      on_bad_record: "raise", "skip" (counted) or "warn" (counted, one warning); `fastpref.data.read_records` says what
        is bad.
      max_shapes: at most so many padded prompt widths, each of which is compiled once.
      row_tokens: places of a row, in which the learner packs whole pairs; None for twice the longest.
      prompt_row_tokens: the same of the encoder's rows, for encoder-decoder models.
      max_new_tokens: T, longest completion, EOS included; longer recorded ones are handled as `overlong` says.
      temperature: of the draw; the losses assume 1.
      optimizer: "adafactor" (decay 0.8) or "adamw".
      learning_rate: a number or a `Schedule`.
      max_grad_norm: clip the global gradient norm to this; None for no clipping.
      length_normalize: use averages of token log-probs instead of sums, which is not the paper; τ then means about
        |y| times more. For contrastive losses only.
      rescore_reference: score completions by a forward pass of the reference instead of using what sampling collected.
      seed: of prompt order and noise.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      keep_checkpoints: how many are kept.
      sample_every: steps between entries of samples.jsonl.
      eval_every: steps between held-out evaluations against the reference; 0 for none.
      eval_prompts: at most this many held-out prompts are used.
      judge_timeout: seconds that a call of the judge may take before the run stops, its state saved; None for any.

    Raises:
      ConfigError: a setting breaks its rule.
    """

    algorithm: str = "ipo-md"
    tau: Value = 1.0
    eta: Value | None = None
    mixture_beta: Value = 0.125
    mixture_partner: str = "ref"
    completions: int | None = None
    rounds: int = 3
    baseline: str = "none"
    steps: int = 1000
    batch_size: int = 32
    gradient_accumulation: int = 1
    max_prompt_tokens: int = 512
    overlong: str = "drop"
    on_bad_record: str = "raise"
    max_shapes: int = 4
    row_tokens: int | None = None
    prompt_row_tokens: int | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0
    optimizer: str = "adafactor"
    learning_rate: Value = 1e-4
    max_grad_norm: float | None = None
    length_normalize: bool = False
    rescore_reference: bool = False
    seed: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    sample_every: int = 10
    eval_every: int = 0
    eval_prompts: int = 256
    judge_timeout: float | None = None

    def __post_init__(self) -> None:
        require(
            self.algorithm in ALGORITHMS,
            f"algorithm must be one of {', '.join(ALGORITHMS)}",
            self.algorithm,
            nearest(self.algorithm, ALGORITHMS),
        )
        _check_strength(self)
        low, high = bounds(self.mixture_beta)
        require(
            low >= 0 and high <= 1,
            "mixture_beta must lie in [0, 1]",
            self.mixture_beta,
            "0 samples from the policy, 1 from the reference; the paper's default is 0.125.",
        )
        _check_positive(
            self,
            "rounds",
            "steps",
            "batch_size",
            "gradient_accumulation",
            "max_prompt_tokens",
            "max_shapes",
            "max_new_tokens",
            "checkpoint_every",
            "keep_checkpoints",
            "sample_every",
            "eval_prompts",
        )
        _check_positive(
            self, *(name for name in ("row_tokens", "prompt_row_tokens") if getattr(self, name) is not None)
        )
        require(
            self.batch_size % self.gradient_accumulation == 0,
            f"gradient_accumulation must divide batch_size ({self.batch_size})",
            self.gradient_accumulation,
            "Choose a divisor, so that every part has the same shape.",
        )
        _check_policies(self)
        _check_algorithm(self)
        require(self.temperature > 0, "temperature must be above 0", self.temperature, "The losses assume 1.")
        require(self.eval_every >= 0, "eval_every must not be negative", self.eval_every, "0 switches it off.")
        require(
            self.judge_timeout is None or 0 < self.judge_timeout < threading.TIMEOUT_MAX,
            f"judge_timeout must be in (0, {threading.TIMEOUT_MAX:g}) seconds, or None",
            self.judge_timeout,
            "Set the seconds that the slowest call may take, or leave it out.",
        )
        _check_optimizer(self)

    @property
    def row(self) -> Algorithm:
        """The algorithm that is named."""
        return ALGORITHMS[self.algorithm]

    @property
    def num_completions(self) -> int:
        """K, completions drawn for each prompt."""
        return len(self.row.writers) if self.completions is None else self.completions

    @property
    def round_steps(self) -> int:
        """Steps of a round; the last may have fewer."""
        return -(-self.steps // self.rounds)

    def strengths(self, step: int) -> tuple[float, float]:
        """τ and η at a training step."""
        tau = value_at(self.tau, step)
        return tau, 3 * tau if self.eta is None else value_at(self.eta, step)


def _check_strength(config: TrainConfig) -> None:
    low, high = bounds(config.tau)
    if config.row.strength == "tau":
        require(
            low > 0,
            "tau must be above 0",
            config.tau,
            "It is the strength of the pull towards the reference; the paper's default is 1.",
        )
        return
    require(low >= 0, "tau must not be negative", config.tau, "0 leaves the reference out of the loss.")
    least = low if config.eta is None else bounds(config.eta)[0]
    require(least > 0, "eta must be above 0", config.eta, "Set it where tau is 0; left out, it is 3 tau.")
    require(
        config.row.anchor != "both" or config.eta is None or high <= least,
        f"eta must not be below tau ({config.tau!r}), so that no exponent of {config.algorithm} is negative",
        config.eta,
        "Raise eta or lower tau; INPO's tau is a third of eta.",
    )


def _check_algorithm(config: TrainConfig) -> None:
    row, name = config.row, config.algorithm
    if config.completions is not None:
        require(
            row.selects or config.completions == len(row.writers),
            f"{name} draws {len(row.writers)} completions a prompt",
            config.completions,
            "Leave completions out; only algorithms that choose a pair from K of them read it.",
        )
        require(
            config.completions >= 2 or not row.selects,
            f"{name} chooses a pair, so completions must be at least 2",
            config.completions,
            "INPO's is 8.",
        )
    require(
        config.mixture_partner in ("ref", "behaviour"),
        "mixture_partner must be 'ref' or 'behaviour'",
        config.mixture_partner,
        "Choose the model that the policy is mixed with.",
    )
    require(
        config.mixture_partner == "ref" or "mixture" in row.writers,
        f"mixture_partner must be 'ref' for {name}, which samples from no mixture",
        config.mixture_partner,
        "Leave it out, or choose ipo-md or nash-md-pg.",
    )
    require(
        config.baseline in ("none", "batch"),
        "baseline must be 'none' or 'batch'",
        config.baseline,
        "Choose one of them.",
    )
    require(
        config.baseline == "none" or row.judged_by == "reward",
        f"baseline must be 'none' for {name}, which has no reward",
        config.baseline,
        "Leave it out, or choose rl.",
    )
    require(
        config.baseline == "none" or config.batch_size >= 2,
        "batch_size must be at least 2 for a baseline of the batch's other completions",
        config.batch_size,
        "Raise it or leave the baseline out.",
    )
    require(
        not row.in_rounds or config.rounds <= config.steps,
        f"rounds must not exceed steps ({config.steps})",
        config.rounds,
        "A round has at least one step.",
    )
    require(
        not config.length_normalize or row.contrastive,
        f"length_normalize must be False for {name}, whose loss is of single completions",
        config.length_normalize,
        "Leave it out.",
    )


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Settings of `fastpref.sft`, `fit_preference_model` and `fit_reward_model`.

    Args:
      steps: optimiser updates.
      batch_size: examples per update.
      max_prompt_tokens: longer prompts are handled as `overlong` says; a preference model shortens them.
      max_completion_tokens: longer completions, EOS included, are dropped and counted.
      overlong: "drop" (counted), "truncate" (keeps the first tokens) or "raise".
      on_bad_record: "raise", "skip" (counted) or "warn" (counted, one warning); `fastpref.data.read_records` says what
        is bad.
      max_shapes: at most so many padded shapes, each of which is compiled once.
      optimizer: "adafactor" or "adamw".
      learning_rate: a number or a `Schedule`.
      max_grad_norm: clip the global gradient norm to this; None for no clipping.
      seed: of the order.
      eval_every: steps between held-out evaluations; the best by the selection criterion is what is returned.
      checkpoint_every: steps between checkpoints, when a run directory is given; the last step is always saved.
      keep_checkpoints: how many are kept.

    Raises:
      ConfigError: a setting breaks its rule.
    """

    steps: int = 1000
    batch_size: int = 32
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 64
    overlong: str = "drop"
    on_bad_record: str = "raise"
    max_shapes: int = 2
    optimizer: str = "adafactor"
    learning_rate: Value = 1e-3
    max_grad_norm: float | None = None
    seed: int = 0
    eval_every: int = 100
    checkpoint_every: int = 500
    keep_checkpoints: int = 1

    def __post_init__(self) -> None:
        _check_positive(
            self,
            "steps",
            "batch_size",
            "max_prompt_tokens",
            "max_shapes",
            "max_completion_tokens",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
        )
        _check_policies(self)
        _check_optimizer(self)


Config = TypeVar("Config", TrainConfig, SupervisedConfig)


def from_mapping(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """Build a config from a mapping such as a TOML table; a table with `start`, `end`, `steps` is a `Schedule`.

    Raises:
      ConfigError: an unknown key, with the nearest known one; a value of the wrong type; a broken rule.
    """
    known = {entry.name: entry.default for entry in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    values = {}
    for key, value in settings.items():
        require(key in known, f"{kind.__name__} has no setting of that name", key, nearest(key, known))
        values[key] = _parse(key, value, get_args(hints[key]) or (hints[key],), known[key])
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
    if float in kinds and type(value) is int:
        return float(value)
    wanted = " or ".join(kind.__name__ for kind in kinds if kind not in (Schedule, type(None)))
    require(type(value) in kinds, f"{key} must be of type {wanted}", value, f"Its default is {default!r}.")
    return value


def to_json(config: TrainConfig | SupervisedConfig) -> dict[str, Any]:
    """The config as plain JSON values; `from_mapping` reads it back."""
    return dataclasses.asdict(config)
