"""What a run is asked to do: frozen, validated, and written to the run directory as JSON."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array

from fastpref.algorithms import ALGORITHMS

OPTIMIZERS = ("adafactor", "adamw")


class ConfigError(ValueError):
    """A setting breaks its rule. The message says the rule, what was received, and the remedy."""


def _require(holds: bool, rule: str, received: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{rule}, but received {received!r}. {remedy}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value that goes from `start` to `end` in the first `steps` steps, then stays.

    Args:
      start: value at step 0.
      end: value from step `steps` on.
      steps: length of the change, in training steps, at least 1.
      kind: "linear", or "cosine" for half a cosine wave.

    Raises:
      ConfigError: steps below 1, an unknown kind, or a value that is not finite.
    """

    start: float
    end: float
    steps: int
    kind: str = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _require(
                math.isfinite(getattr(self, name)), f"{name} must be finite", getattr(self, name), "Give a number."
            )
        _require(
            self.steps >= 1, "steps of a schedule must be at least 1", self.steps, "Give the length of the change."
        )
        _require(
            self.kind in ("linear", "cosine"), "kind must be 'linear' or 'cosine'", self.kind, "Choose one of them."
        )

    def __call__(self, step: int | Array) -> Array:
        """The value at `step`, a float32 scalar; `step` may be traced."""
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / self.steps, 0.0, 1.0)
        if self.kind == "cosine":
            progress = (1 - jnp.cos(jnp.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value taken."""
        return min(self.start, self.end), max(self.start, self.end)


Value = float | Schedule
"""A constant, or a schedule over training steps."""


def value_at(value: Value, step: int) -> float:
    """The value at a training step, as a Python float."""
    return float(value(step)) if isinstance(value, Schedule) else float(value)


def bounds(value: Value) -> tuple[float, float]:
    """Smallest and largest value taken over a run."""
    return value.bounds if isinstance(value, Schedule) else (value, value)


def _check_optimizer(config: "TrainConfig | SupervisedConfig") -> None:
    _require(
        config.optimizer in OPTIMIZERS,
        f"optimizer must be one of {', '.join(OPTIMIZERS)}",
        config.optimizer,
        "For any other, pass an optax.GradientTransformation as the `optimizer` argument of the function.",
    )
    _require(
        bounds(config.learning_rate)[0] >= 0,
        "learning_rate must not be negative",
        config.learning_rate,
        "The paper's is 1e-4.",
    )
    _require(
        config.max_grad_norm is None or config.max_grad_norm > 0,
        "max_grad_norm must be above 0, or None for no clipping",
        config.max_grad_norm,
        "Leave it out to switch clipping off.",
    )


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        received = getattr(config, name)
        _require(
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
      tau: τ > 0, strength of the regularisation towards the reference; a number or a `Schedule`.
      mixture_beta: β in [0, 1], weight of the reference in the sampling mixture; a number or a `Schedule`.
        Read only by algorithms that sample from the mixture.
      steps: optimiser updates.
      batch_size: prompts per update; each gives one pair.
      gradient_accumulation: the learner sees the batch in this many parts, whose gradients are averaged over pairs;
        must divide batch_size.
      max_prompt_tokens: longer prompts are handled as `overlong` says.
      overlong: "drop" (counted), "truncate" (keeps the first tokens) or "raise".
      max_shapes: at most so many padded prompt widths, each of which is compiled once.
      max_new_tokens: T, longest completion, EOS included.
      temperature: of the draw; the losses assume 1.
      optimizer: "adafactor" (decay 0.8) or "adamw".
      learning_rate: a number or a `Schedule`.
      max_grad_norm: clip the global gradient norm to this; None for no clipping.
      length_normalize: use averages of token log-probs instead of sums, which is not the paper; τ then means about
        |y| times more.
      rescore_reference: score completions by a forward pass of the reference instead of using what sampling collected.
      seed: of prompt order and noise.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      keep_checkpoints: how many are kept.
      sample_every: steps between entries of samples.jsonl.
      eval_every: steps between held-out evaluations against the reference; 0 for none.
      eval_prompts: at most this many held-out prompts are used.

    Raises:
      ConfigError: a setting breaks its rule.
    """

    algorithm: str = "ipo-md"
    tau: Value = 1.0
    mixture_beta: Value = 0.125
    steps: int = 1000
    batch_size: int = 32
    gradient_accumulation: int = 1
    max_prompt_tokens: int = 512
    overlong: str = "drop"
    max_shapes: int = 4
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

    def __post_init__(self) -> None:
        _require(
            self.algorithm in ALGORITHMS,
            f"algorithm must be one of {', '.join(ALGORITHMS)}",
            self.algorithm,
            _nearest(self.algorithm, ALGORITHMS),
        )
        _require(
            bounds(self.tau)[0] > 0,
            "tau must be above 0",
            self.tau,
            "It is the strength of the pull towards the reference; the paper's default is 1.",
        )
        low, high = bounds(self.mixture_beta)
        _require(
            low >= 0 and high <= 1,
            "mixture_beta must lie in [0, 1]",
            self.mixture_beta,
            "0 samples from the policy, 1 from the reference; the paper's default is 0.125.",
        )
        _check_positive(
            self,
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
        _require(
            self.batch_size % self.gradient_accumulation == 0,
            f"gradient_accumulation must divide batch_size ({self.batch_size})",
            self.gradient_accumulation,
            "Choose a divisor, so that every part has the same shape.",
        )
        _require(
            self.overlong in ("drop", "truncate", "raise"),
            "overlong must be 'drop', 'truncate' or 'raise'",
            self.overlong,
            "Choose what happens to prompts above max_prompt_tokens.",
        )
        _require(self.temperature > 0, "temperature must be above 0", self.temperature, "The losses assume 1.")
        _require(self.eval_every >= 0, "eval_every must not be negative", self.eval_every, "0 switches it off.")
        _check_optimizer(self)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Settings of `fastpref.sft`, `fit_preference_model` and `fit_reward_model`.

    Args:
      steps: optimiser updates.
      batch_size: examples per update.
      max_prompt_tokens: longer prompts are handled as `overlong` says; a preference model shortens them.
      max_completion_tokens: longer completions, EOS included, are dropped and counted.
      overlong: "drop" (counted), "truncate" (keeps the first tokens) or "raise".
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
        _require(
            self.overlong in ("drop", "truncate", "raise"),
            "overlong must be 'drop', 'truncate' or 'raise'",
            self.overlong,
            "Choose what happens to prompts above max_prompt_tokens.",
        )
        _check_optimizer(self)


Config = TypeVar("Config", TrainConfig, SupervisedConfig)


def from_mapping(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """Build a config from a mapping such as a TOML table; a table with `start`, `end`, `steps` is a `Schedule`.

    Raises:
      ConfigError: an unknown key, with the nearest known one; a value of the wrong type; a broken rule.
    """
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    values = {}
    for key, value in settings.items():
        _require(key in known, f"{kind.__name__} has no setting of that name", key, _nearest(key, known))
        values[key] = _parse(key, value, known[key].default)
    return kind(**values)


def _parse(key: str, value: Any, default: Any) -> Any:
    if isinstance(value, Mapping):
        names = {entry.name for entry in dataclasses.fields(Schedule)}
        _require(
            set(value) <= names and {"start", "end", "steps"} <= set(value),
            f"{key} as a table must have start, end and steps, and may have kind",
            dict(value),
            "For a constant, write a number.",
        )
        return Schedule(**{**value, "start": float(value["start"]), "end": float(value["end"])})
    wanted = type(default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is not None:
        _require(
            type(value) is wanted, f"{key} must be of type {wanted.__name__}", value, f"Its default is {default!r}."
        )
    return value


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def to_json(config: TrainConfig | SupervisedConfig) -> dict[str, Any]:
    """The config as plain JSON values; `from_mapping` reads it back."""
    return dataclasses.asdict(config)
