"""What a run is asked to do: frozen, validated, and written to the run directory as JSON."""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastpref.method.adapter import AdapterConfig
from fastpref.method.algorithms import ALGORITHMS, Algorithm
from fastpref.method.choices import BaseDtype, Dtype, OnBadRecord, Overlong, ParamDtype, Remat, TruncationSide
from fastpref.method.errors import nearest, require
from fastpref.method.schedules import Schedule, Value, bounds, value_at

Optimizer = Literal["adafactor", "adamw", "lion"]

COUNTS = frozenset(
    {
        *("steps", "rounds", "batch_size", "gradient_accumulation", "max_prompt_tokens", "max_completion_tokens"),
        *("max_new_tokens", "max_shapes", "row_tokens", "prompt_row_tokens", "checkpoint_every", "keep_checkpoints"),
        *("sample_every", "eval_prompts"),
    }
)
"""Settings that are whole numbers of at least 1."""

Rule = tuple[str, Callable[[Any], bool], str, str]
"""A setting, whether its value keeps the rule, the rule in words, and the remedy."""


def _are_betas(values: Any) -> bool:
    numbers = isinstance(values, tuple | list) and all(isinstance(beta, int | float) for beta in values)
    return numbers and len(values) == 2 and all(0 <= beta < 1 for beta in values)


RULES: tuple[Rule, ...] = (
    ("learning_rate", lambda x: bounds(x)[0] >= 0, "must not be negative", "The paper's is 1e-4."),
    (
        "max_grad_norm",
        lambda x: x is None or x > 0,
        "must be above 0, or None for no clipping",
        "Leave it out to switch clipping off.",
    ),
    ("warmup_steps", lambda x: type(x) is int and x >= 0, "must be a whole number of at least 0", "0 is no warm-up."),
    ("weight_decay", lambda x: 0 <= x < math.inf, "must be a finite number of at least 0", "Recipes have 0 to 0.1."),
    (
        "betas",
        lambda x: x is None or _are_betas(x),
        "must be two numbers in [0, 1), or None for the optimizer's own",
        "AdamW's are 0.9 and 0.999, Lion's 0.9 and 0.99.",
    ),
    (
        "mixture_beta",
        lambda x: bounds(x)[0] >= 0 and bounds(x)[1] <= 1,
        "must lie in [0, 1]",
        "0 samples from the policy, 1 from the reference; the paper's default is 0.125.",
    ),
    ("temperature", lambda x: x > 0, "must be above 0", "The losses assume 1."),
    ("eval_every", lambda x: x >= 0, "must not be negative", "0 switches it off."),
    ("max_lost", lambda x: 0 <= x <= 1, "must lie in [0, 1]", "It is the share of records that a run may lose."),
    (
        "missing_eos_penalty",
        lambda x: x is None or 0 < x < math.inf,
        "must be a finite number above 0, or None for no penalty",
        "It is subtracted from the reward of a completion that was cut off.",
    ),
    (
        "judge_timeout",
        lambda x: x is None or 0 < x < threading.TIMEOUT_MAX,
        f"must be in (0, {threading.TIMEOUT_MAX:g}) seconds, or None",
        "Set the seconds that the slowest call may take, or leave it out.",
    ),
)
"""Rules of single settings; those of several settings are functions below."""

CHOICES = {
    "overlong": "Choose what happens to records above a limit.",
    "truncation_side": "Choose the side on which a text that is too long is cut.",
    "on_bad_record": "Choose what happens to records that cannot be used.",
    "optimizer": "For any other, pass an optax.GradientTransformation as the `optimizer` argument of the function.",
    "dtype": "Leave it out for the one that suits the device.",
    "param_dtype": "Leave it out, or choose bfloat16 where float32 does not fit in memory.",
    "base_dtype": "Choose how the frozen models are held; int8 takes half of the memory of bfloat16.",
    "remat": "Choose what is computed again to save memory.",
    "lr_schedule": "Set warmup_steps for a warm-up before it; for any other course, let learning_rate be a Schedule.",
    "mixture_partner": "Choose the model that the policy is mixed with.",
    "baseline": "Choose one of them.",
}
"""Remedies of settings with a few values; their types list these."""


def _check(config: "Settings") -> None:
    """Every rule of a single setting."""
    hints = get_type_hints(type(config))
    for name, hint in hints.items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            words = [repr(word) for word in get_args(hint)]
            rule = f"{name} must be {', '.join(words[:-1])} or {words[-1]}"
            require(value in get_args(hint), rule, value, CHOICES[name])
        elif name in COUNTS and not (value is None and type(None) in get_args(hint)):
            rule = f"{name} must be a whole number of at least 1"
            require(isinstance(value, int) and value >= 1, rule, value, f"Set {name} to 1 or more.")
    for name, holds, rule, remedy in RULES:
        if name in hints:
            require(holds(getattr(config, name)), f"{name} {rule}", getattr(config, name), remedy)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that every training has; see `TrainConfig` and `SupervisedConfig` for their meaning and defaults."""

    steps: int = 1000
    batch_size: int = 32
    max_prompt_tokens: int = 512
    overlong: Overlong = "drop"
    truncation_side: TruncationSide = "right"
    on_bad_record: OnBadRecord = "raise"
    max_lost: float = 0.5
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_shapes: int = 4
    optimizer: Optimizer = "adafactor"
    learning_rate: Value = 1e-4
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    max_grad_norm: float | None = None
    adapter: AdapterConfig | None = None
    remat: Remat = "none"
    dtype: Dtype = "auto"
    param_dtype: ParamDtype = "float32"
    base_dtype: BaseDtype = "auto"
    seed: int = 0
    eval_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _check(self)
        _check_optimizer(self)


def _check_optimizer(config: Settings) -> None:
    """Rules of the optimiser and its learning rate together."""
    rules: list[tuple[bool, str, Any, str]] = [
        (
            config.betas is None or config.optimizer != "adafactor",
            "betas must be None for adafactor, which has no momentum",
            config.betas,
            "Leave betas out, or choose adamw or lion.",
        ),
        (
            not isinstance(config.learning_rate, Schedule)
            or (config.warmup_steps, config.lr_schedule) == (0, "constant"),
            "learning_rate must be a number where warmup_steps or lr_schedule is set",
            config.learning_rate,
            "Leave those two out, or give the number that they start from.",
        ),
        (
            config.warmup_steps < config.steps,
            f"warmup_steps must be below steps ({config.steps})",
            config.warmup_steps,
            "With so long a warm-up no update has the whole learning_rate.",
        ),
    ]
    for rule in rules:
        require(*rule)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of `fastpref.train`. Defaults are those of the IPO-MD paper (section 6) where it names them.

    When a run goes on, these may have changed, and it says so: `steps`, `rounds` as far as rounds stay as long,
    `learning_rate`, `warmup_steps`, `lr_schedule`, `max_grad_norm`, `eval_every` from one number to another,
    `sample_every`, `checkpoint_every`, `keep_checkpoints` and `judge_timeout`. Any other change is refused. A rate that
    decays ends at the new `steps`: from where the run goes on, it is what a run of so many steps has there.

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
      batch_size: prompts per update; each gives one pair, or one completion where only that is learned from. Offline,
        pairs per update.
      gradient_accumulation: the learner takes the rows of a batch in this many parts, whose gradients are averaged over
        pairs: memory for time.
      max_prompt_tokens: longer prompts are handled as `overlong` says.
      overlong: "drop" (counted), "truncate" (counted: a chat loses its oldest turns, a text is cut) or "raise".
      truncation_side: where a text is cut: "right" keeps its first tokens, "left" its last.
      on_bad_record: "raise", "skip" (counted) or "warn" (counted, one warning); `fastpref.data.read_records` says what
        is bad.
      max_lost: a run that would lose a larger share of its records, dropped for whatever reason, does not begin.
      chat_template_kwargs: options of the chat template, such as {"enable_thinking": False}; those of a record, in a
        column of this name, come before them.
      max_shapes: at most so many padded prompt widths, or numbers of rows of recorded pairs, each of which is compiled
        once.
      row_tokens: places of a row, in which the learner packs whole pairs; None for twice the longest, or, offline, for
        once the longest where that leaves fewer places empty.
      prompt_row_tokens: the same of the encoder's rows, for encoder-decoder models.
      max_new_tokens: T, longest completion, EOS included; longer recorded ones are handled as `overlong` says.
      temperature: of the draw; the losses assume 1.
      optimizer: "adafactor" (decay 0.8), "adamw" or "lion".
      learning_rate: a number, or a `Schedule` of any course.
      warmup_steps: the learning rate goes from 0 to `learning_rate` in so many updates first, in a line.
      lr_schedule: "constant", or from `learning_rate` to 0 at `steps`: "linear", or "cosine" for half a cosine wave.
      weight_decay: each update subtracts learning rate × this × parameter, from matrices and embeddings alone: never
        from biases and norm scales.
      betas: (β₁, β₂) of "adamw" or "lion"; None for their usual ones, (0.9, 0.999) and (0.9, 0.99).
      max_grad_norm: clip the global gradient norm to this; None for no clipping.
      adapter: train low-rank adapters on the frozen model, which then serves as reference as well; None trains all
        parameters. A model with an adapter goes on with it; this is then left out or says the same.
      remat: what is kept of each layer for the gradient: "none" keeps products with kernels and what attention read,
        "layers" its input and those products, "all" its input alone; the rest is computed again. Memory for time.
      dtype: of products and activations: "float32", "bfloat16", or "auto" for the one that suits the device, float32 on
        a CPU and bfloat16 elsewhere.
      param_dtype: of what is trained, whatever the model came in. In "bfloat16", updates are rounded stochastically,
        and the optimiser computes and keeps its state in float32 still.
      base_dtype: of the matrices of frozen models, those that layers and head multiply with: "auto" for `dtype`, or
        "int8" with a scale for each output, for the base of the adapter, the reference and the behaviour model. Only
        where an adapter is trained.
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
      missing_eos_penalty: subtracted from the reward of a completion that was cut off at `max_new_tokens`, as TRL does;
        None for nothing. It needs rewards: a `RewardModel`, as the judge of any algorithm. Held-out comparisons are
        made without it.

    Raises:
      ConfigError: a setting breaks its rule.
    """

    algorithm: str = "ipo-md"
    tau: Value = 1.0
    eta: Value | None = None
    mixture_beta: Value = 0.125
    mixture_partner: Literal["ref", "behaviour"] = "ref"
    completions: int | None = None
    rounds: int = 3
    baseline: Literal["none", "batch"] = "none"
    gradient_accumulation: int = 1
    row_tokens: int | None = None
    prompt_row_tokens: int | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0
    length_normalize: bool = False
    rescore_reference: bool = False
    sample_every: int = 10
    eval_prompts: int = 256
    judge_timeout: float | None = None
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        require(
            self.algorithm in ALGORITHMS,
            f"algorithm must be one of {', '.join(ALGORITHMS)}",
            self.algorithm,
            nearest(self.algorithm, ALGORITHMS),
        )
        _check_strength(self)
        super().__post_init__()
        _check_method(self)

    @property
    def method(self) -> Algorithm:
        """The entry of the table that `algorithm` names."""
        return ALGORITHMS[self.algorithm]

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
    if config.method.strength == "tau":
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
        config.method.anchor != "both" or config.eta is None or high <= least,
        f"eta must not be below tau ({config.tau!r}), so that no exponent of {config.algorithm} is negative",
        config.eta,
        "Raise eta or lower tau; INPO's tau is a third of eta.",
    )


def _check_method(config: TrainConfig) -> None:
    """Rules of a setting and the method together."""
    method, name = config.method, config.algorithm
    writers, completions = len(method.writers), config.completions
    rules: list[tuple[bool, str, Any, str]] = [
        (
            completions is None or method.selects or completions == writers,
            f"completions must be {writers} for {name}, which draws so many for each prompt",
            completions,
            "Leave completions out; only algorithms that choose a pair from K of them read it.",
        ),
        (
            completions is None or not method.selects or completions >= 2,
            f"completions must be at least 2 for {name}, which chooses a pair",
            completions,
            "INPO's is 8.",
        ),
        (
            config.mixture_partner == "ref" or "mixture" in method.writers,
            f"mixture_partner must be 'ref' for {name}, which samples from no mixture",
            config.mixture_partner,
            "Leave it out, or choose ipo-md or nash-md-pg.",
        ),
        (
            config.baseline == "none" or method.judged_by == "reward",
            f"baseline must be 'none' for {name}, which has no reward",
            config.baseline,
            "Leave it out, or choose rl.",
        ),
        (
            config.baseline == "none" or config.batch_size >= 2,
            "batch_size must be at least 2 for a baseline of the batch's other completions",
            config.batch_size,
            "Raise it or leave the baseline out.",
        ),
        (
            not method.in_rounds or config.rounds <= config.steps,
            f"rounds must not exceed steps ({config.steps})",
            config.rounds,
            "A round has at least one step.",
        ),
        (
            not config.length_normalize or method.contrastive,
            f"length_normalize must be False for {name}, whose loss is of single completions",
            config.length_normalize,
            "Leave it out.",
        ),
    ]
    for rule in rules:
        require(*rule)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(Settings):
    """Settings of `fastpref.sft`, `fit_preference_model` and `fit_reward_model`.

    When a run goes on, `steps`, `learning_rate`, `warmup_steps`, `lr_schedule`, `max_grad_norm`, `eval_every`,
    `checkpoint_every` and `keep_checkpoints` may have changed, and it says so. Any other change is refused.

    Args:
      steps: optimiser updates.
      batch_size: examples per update.
      max_prompt_tokens: longer prompts are handled as `overlong` says; a preference model shortens them.
      max_completion_tokens: longer completions, EOS included, are handled as `overlong` says.
      overlong: "drop" (counted), "truncate" (counted: a chat loses its oldest turns, a text is cut) or "raise". A
        preference model, which reads text, cannot cut completions and refuses "truncate".
      truncation_side: where a text is cut: "right" keeps its first tokens, "left" its last.
      on_bad_record: "raise", "skip" (counted) or "warn" (counted, one warning); `fastpref.data.read_records` says what
        is bad.
      max_lost: a run that would lose a larger share of its records does not begin.
      chat_template_kwargs: options of the chat template, such as {"enable_thinking": False}.
      max_shapes: at most so many padded shapes, each of which is compiled once.
      optimizer: "adafactor", "adamw" or "lion"; this and the next five as in `TrainConfig`.
      learning_rate: a number, or a `Schedule` of any course.
      warmup_steps: updates in which the learning rate goes from 0 to `learning_rate`.
      lr_schedule: "constant", "linear" or "cosine".
      weight_decay: of matrices and embeddings.
      betas: (β₁, β₂) of "adamw" or "lion"; None for their usual ones.
      max_grad_norm: clip the global gradient norm to this; None for no clipping.
      adapter, remat, dtype, param_dtype, base_dtype: as in `TrainConfig`.
      seed: of the order.
      eval_every: steps between held-out evaluations; the best by the selection criterion is what is returned.
      checkpoint_every: steps between checkpoints, when a run directory is given; the last step is always saved.
      keep_checkpoints: how many are kept.

    Raises:
      ConfigError: a setting breaks its rule.
    """

    max_completion_tokens: int = 64
    max_shapes: int = 2
    learning_rate: Value = 1e-3
    eval_every: int = 100
    checkpoint_every: int = 500
    keep_checkpoints: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eval_every >= 1, "eval_every must be at least 1", self.eval_every, "Leave held_out out for none.")
