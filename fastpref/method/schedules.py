"""Settings that change over training steps."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from fastpref.method.errors import require


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value that goes from `start` to `end` in the first `steps` steps, then stays or begins again.

    Args:
      start: value at step 0, or at the end of the warm-up.
      end: value from step `steps` on.
      steps: length of the change, in training steps, at least 1.
      kind: "linear", or "cosine" for half a cosine wave.
      warmup: this share of `steps` goes from 0 to `start` first, in a line; in [0, 1). INPO's is 0.03 (appendix B).
      repeat: begin again after every `steps`, as a schedule of rounds does.

    Raises:
      ConfigError: steps below 1, an unknown kind, a value that is not finite, or a warm-up outside [0, 1).
    """

    start: float
    end: float
    steps: int
    kind: str = "linear"
    warmup: float = 0.0
    repeat: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            require(math.isfinite(getattr(self, name)), f"{name} must be finite", getattr(self, name), "Give a number.")
        require(self.steps >= 1, "steps of a schedule must be at least 1", self.steps, "Give the length of the change.")
        require(
            self.kind in ("linear", "cosine"), "kind must be 'linear' or 'cosine'", self.kind, "Choose one of them."
        )
        require(0 <= self.warmup < 1, "warmup must lie in [0, 1)", self.warmup, "It is a share of steps, such as 0.03.")

    def __call__(self, step: int | Array) -> Array:
        """The value at `step`, a float32 scalar; `step` may be traced."""
        at = jnp.asarray(step % self.steps if self.repeat else step, jnp.float32) / self.steps
        progress = jnp.clip((at - self.warmup) / (1 - self.warmup), 0.0, 1.0)
        if self.kind == "cosine":
            progress = (1 - jnp.cos(jnp.pi * progress)) / 2
        value = self.start + (self.end - self.start) * progress
        return jnp.where(at < self.warmup, self.start * at / self.warmup, value) if self.warmup else value

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value taken."""
        values = (self.start, self.end, 0.0) if self.warmup else (self.start, self.end)
        return min(values), max(values)


Value = float | Schedule
"""A constant, or a schedule over training steps."""


def value_at(value: Value, step: int) -> float:
    """The value at a training step, as a Python float."""
    return float(value(step)) if isinstance(value, Schedule) else float(value)


def bounds(value: Value) -> tuple[float, float]:
    """Smallest and largest value taken over a run."""
    return value.bounds if isinstance(value, Schedule) else (value, value)
