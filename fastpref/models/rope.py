"""Rotary positions (Su et al., 2021): frequencies of every kind of scaling, and the turning of heads by them."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those first trained on.

    `linear` divides every frequency by `factor`. `llama3` divides the low ones, keeps the high ones and interpolates
    between; its three further numbers say where (Llama 3.1). `yarn` interpolates by `beta_fast` and `beta_slow` turns
    within `original_max_positions`, and multiplies the turned heads by `attention_factor` (Peng et al., 2023).
    `dynamic` and `longrope` have other frequencies for every length, or for all beyond the first context. Keys that
    are kept cannot follow, so that they are written here for sequences within the first context alone, where
    `dynamic` changes nothing and `longrope` divides each frequency by its own `short_factors` (Ding et al., 2024).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the two ends of `yarn`'s ramp are whole numbers."""
    short_factors: tuple[float, ...] = ()
    """One for each frequency."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"rope scaling must be one of {', '.join(KINDS)}, but received {self.kind!r}. Use a checkpoint with "
                "one of them."
            )


def inverse_frequencies(size: int, theta: float, scaling: RopeScaling | None) -> Float[np.ndarray, " half"]:
    """Radians that each pair of the turned part of a head turns per position.

    Args:
      size: entries of a head that are turned.
      theta: base of the frequencies.
      scaling: how they are stretched.

    Returns:
      The frequencies, shape [size / 2], float32.
    """
    frequency = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    if scaling is None or scaling.kind == "dynamic":
        stretched = frequency
    elif scaling.kind == "linear":
        stretched = frequency / scaling.factor
    elif scaling.kind == "longrope":
        stretched = frequency / np.asarray(scaling.short_factors, np.float64)
    else:
        keep = llama3_share(frequency, scaling) if scaling.kind == "llama3" else yarn_share(size, theta, scaling)
        stretched = keep * frequency + (1 - keep) * frequency / scaling.factor
    return stretched.astype(np.float32)


def llama3_share(frequency: Float[np.ndarray, " half"], scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """The share of each frequency that Llama 3.1 keeps: all of those with many turns in the first context."""
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def yarn_share(size: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """The share of each frequency that YaRN keeps: a ramp over the index of the frequency."""

    def place(turns: float) -> float:
        """Index of the frequency that turns so often in the first context."""
        return size * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = 0.001 if low == high else high - low
    ramp: np.ndarray = np.clip((np.arange(size // 2) - low) / width, 0.0, 1.0)
    return 1 - ramp


class Rotation(NamedTuple):
    """Cosines and sines of the tokens of streams."""

    cos: Float[Array, "#P #K T half"]
    sin: Float[Array, "#P #K T half"]

    @classmethod
    def of(
        cls, positions: Int[Array, "#P #K T"], size: int, theta: float, scaling: RopeScaling | None = None
    ) -> "Rotation":
        """The rotation of tokens at these positions, by the frequencies of `inverse_frequencies`."""
        angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(size, theta, scaling)[None, None, None]
        rotation = cls(jnp.cos(angles), jnp.sin(angles))
        if scaling is None or scaling.attention_factor == 1:
            return rotation
        return cls(*(scaling.attention_factor * table for table in rotation))

    def until(self, positions: Int[Array, "#P #K T"], limit: int) -> "Rotation":
        """The rotation below a position; from there on it is no number, so that it cannot go unseen."""
        return Rotation(*(jnp.where((positions < limit)[..., None], table, jnp.nan) for table in self))

    def chosen(self, local: Bool[Array, ""], near: "Rotation") -> "Rotation":
        """`near` where `local` is true; else this one."""
        return Rotation(*(jnp.where(local, first, second) for first, second in zip(near, self, strict=True)))

    def off(self, where: Bool[Array, ""]) -> "Rotation":
        """The rotation that leaves every head as it is, bit for bit, where `where` is true; else this one."""
        return Rotation(jnp.where(where, 1.0, self.cos), jnp.where(where, 0.0, self.sin))

    def turn(self, heads: Float[Array, "P K T *heads H"]) -> Float[Array, "P K T *heads H"]:
        """Rotate the two halves of the first entries of every head, in float32; entries behind them stay."""
        cos, sin = (jnp.expand_dims(table, tuple(range(3, heads.ndim - 1))) for table in self)
        half = cos.shape[-1]
        first, second, rest = jnp.split(heads.astype(jnp.float32), (half, 2 * half), axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
        return turned.astype(heads.dtype)
