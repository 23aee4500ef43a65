"""From sequence log-probs to the loss and back: what every implementation shares."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

Loss = Callable[[Array, Array], Array]
"""`loss(log_ratio [P], preference [P]) -> [P]`, elementwise, and a pytree."""


class PreferenceLoss(NamedTuple):
    """The loss and what it was made of, float32. Gradients flow through `loss` alone."""

    loss: Float[Array, ""]
    """Mean of `per_pair` over the pairs that count; 0 where none does."""
    per_pair: Float[Array, " P"]
    """Loss of each pair; 0 for those that do not count."""
    policy_logps: Float[Array, "P 2"]
    """Sum of log π over each completion."""
    log_ratio: Float[Array, " P"]
    """ρ = (log π − log π_ref)(y) − (log π − log π_ref)(y')."""


def sequence_sums(logps: Float[Array, " N"], segment_ids: Int[Array, " N"], pairs: int) -> Float[Array, "P 2"]:
    """Sum over each segment; rows with an id outside [0, 2P) are left out."""
    ids = jnp.where(segment_ids < 0, 2 * pairs, segment_ids)
    return jnp.zeros(2 * pairs, jnp.float32).at[ids].add(logps, mode="drop").reshape(pairs, 2)


def objective(
    policy_logps: Float[Array, "P 2"],
    ref_logps: Float[Array, "P 2"],
    preference: Float[Array, " P"],
    where: Bool[Array, " P"],
    loss: Loss,
) -> PreferenceLoss:
    """The loss of finished sequences."""
    log_ratio = log_ratios(policy_logps, ref_logps)
    # Selecting on both sides of the loss keeps a pair that does not count, NaN included, out of its gradient.
    per_pair = jnp.where(where, loss(jnp.where(where, log_ratio, 0.0), preference), 0.0)
    count = jnp.maximum(jnp.sum(where), 1).astype(jnp.float32)
    return PreferenceLoss(jnp.sum(per_pair) / count, per_pair, policy_logps, log_ratio)


def log_ratios(policy_logps: Float[Array, "P 2"], ref_logps: Float[Array, "P 2"]) -> Float[Array, " P"]:
    """ρ of each pair."""
    margins = policy_logps - ref_logps
    return margins[:, 0] - margins[:, 1]


def sequence_gradients(
    policy_logps: Float[Array, "P 2"],
    ref_logps: Float[Array, "P 2"],
    preference: Float[Array, " P"],
    where: Bool[Array, " P"],
    loss: Loss,
) -> Float[Array, "P 2"]:
    """Gradient of the mean loss in the sequence log-probs. The two of a pair are exact opposites.

    Right for every pair whose sequences are finished, whatever the others hold, since the loss is elementwise.
    """
    ratio = jnp.where(where, log_ratios(policy_logps, ref_logps), 0.0)
    slope = jax.vjp(lambda ratio: loss(ratio, preference), ratio)[1](jnp.ones_like(ratio))[0]
    count = jnp.maximum(jnp.sum(where), 1).astype(jnp.float32)
    slope = jnp.where(where, slope / count, 0.0)
    return jnp.stack([slope, -slope], axis=1)


class Problem(NamedTuple):
    """What no gradient flows to."""

    targets: Int[Array, " N"]
    segments: Int[Array, " N"]
    """Segment of each row; 2P for the ignored."""
    ref_logps: Float[Array, "P 2"]
    preference: Float[Array, " P"]
    where: Bool[Array, " P"]
    loss: Loss

    @classmethod
    def of(
        cls,
        targets: Int[Array, " N"],
        segment_ids: Int[Array, " N"],
        ref_logps: Float[Array, "P 2"],
        preference: Float[Array, " P"],
        where: Bool[Array, " P"],
        loss: Loss,
    ) -> "Problem":
        """The problem of these arguments of `preference_loss`."""
        pairs = preference.shape[0]
        ignored = (segment_ids < 0) | (segment_ids >= 2 * pairs)
        return cls(targets, jnp.where(ignored, 2 * pairs, segment_ids), ref_logps, preference, where, loss)

    @property
    def pairs(self) -> int:
        """P."""
        return int(self.preference.shape[0])

    @property
    def counted(self) -> Bool[Array, " N"]:
        """True for rows that belong to a sequence."""
        return self.segments < 2 * self.pairs

    def rows_of(self, pairs: Bool[Array, " P"]) -> Bool[Array, " N"]:
        """True for the rows of these pairs."""
        return jnp.pad(pairs, (0, 1))[self.segments // 2]

    def value(self, policy_logps: Float[Array, "P 2"]) -> PreferenceLoss:
        """The loss of finished sequences."""
        return objective(policy_logps, self.ref_logps, self.preference, self.where, self.loss)

    def coefficients(self, policy_logps: Float[Array, "P 2"], segments: Int[Array, " M"]) -> Float[Array, " M"]:
        """Gradient of the loss in the log-prob of rows of these segments; 0 for segment 2P."""
        slopes = sequence_gradients(policy_logps, self.ref_logps, self.preference, self.where, self.loss)
        return jnp.pad(slopes.reshape(-1), (0, 1))[segments]
