"""Sums over a vocabulary, or a part of it, from which KL and entropy follow.

With a = z − max z of the policy's logits, b = z_ref − max z_ref of the reference's, and E the mean under π,

    KL(π ‖ π_ref) = E[a − b] + log(Σ eᵇ / Σ eᵃ),    entropy of π = log Σ eᵃ − E[a].

Where π is near π_ref, KL is of second order in their distance and a difference of log-sum-exps is not: its rounding, a
few 10⁻⁷ of log V and of the largest logit, would drown it. So the ratio is one plus Σ (eᵇ − eᵃ) / Σ eᵃ, summed term by
term, and a − b comes from z − z_ref, which is exact for near logits. Both then are small, and so are their roundings:
equal logits give exactly 0. Entropy is a sum of two numbers that are never negative.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..head import Head
from ..slices import max_over_slices, sum_over_slices
from ..vmem import finite_or_zero


class Divergence(NamedTuple):
    """Distance and spread of next-token distributions, in nats, float32; 0 for ignored rows."""

    kl: Float[Array, "..."]
    """KL(π ‖ π_ref), never negative; exactly 0 where both models have equal logits."""
    entropy: Float[Array, "..."]
    """Entropy of π, never negative."""


class Sums(NamedTuple):
    """What is known of a row once all logits of some tokens have been seen. Tokens without probability add nothing."""

    top: Float[Array, "..."]
    """Largest logit of the policy; −inf before the first."""
    ref_top: Float[Array, "..."]
    """Largest logit of the reference."""
    mass: Float[Array, "..."]
    """Σ eᵃ."""
    ref_mass: Float[Array, "..."]
    """Σ eᵇ."""
    excess: Float[Array, "..."]
    """Σ (eᵇ − eᵃ)."""
    gap: Float[Array, "..."]
    """Σ eᵃ (a − b)."""
    depth: Float[Array, "..."]
    """Σ eᵃ a."""


FIELDS = len(Sums._fields)


def terms(
    policy: Float[Array, "..."], ref: Float[Array, "..."], top: Float[Array, "..."], ref_top: Float[Array, "..."]
) -> tuple[Array, Array, Array, Array, Array]:
    """What each token adds to the sums behind the largest logits, given finite ones."""
    depth = policy - top
    mass, ref_mass = jnp.exp(depth), jnp.exp(ref - ref_top)
    # Equal logits are told apart by no rounding: XLA contracts the scaling of one, and not of the other, with a minus.
    gap = jnp.where(policy == ref, 0.0, policy - ref) - (top - ref_top)
    likely = mass > 0
    return mass, ref_mass, ref_mass - mass, jnp.where(likely, mass * gap, 0.0), jnp.where(likely, mass * depth, 0.0)


def of_logits(policy: Float[Array, "N V"], ref: Float[Array, "N V"]) -> Sums:
    """Sums of all logits at once."""
    top, ref_top = jnp.max(policy, axis=1), jnp.max(ref, axis=1)
    parts = terms(policy, ref, finite_or_zero(top)[:, None], finite_or_zero(ref_top)[:, None])
    return Sums(top, ref_top, *(jnp.sum(part, axis=1) for part in parts))


def moved(sums: Sums, top: Float[Array, "..."], ref_top: Float[Array, "..."]) -> Sums:
    """The same sums relative to larger largest logits."""
    shift, ref_shift = sums.top - finite_or_zero(top), sums.ref_top - finite_or_zero(ref_top)
    shrink, ref_shrink = jnp.exp(shift), jnp.exp(ref_shift)
    mass = shrink * sums.mass
    likely = mass > 0
    return Sums(
        top,
        ref_top,
        mass,
        ref_shrink * sums.ref_mass,
        ref_shrink * sums.excess + (ref_shrink - shrink) * sums.mass,
        jnp.where(likely, shrink * sums.gap + (shift - ref_shift) * mass, 0.0),
        jnp.where(likely, shrink * sums.depth + shift * mass, 0.0),
    )


def over_parts(sums: Sums) -> Sums:
    """One of several parts, which lie along the first axis."""
    top, ref_top = (jnp.max(tops, axis=0, keepdims=True) for tops in sums[:2])
    whole = moved(sums, top, ref_top)
    return Sums(top[0], ref_top[0], *(jnp.sum(parts, axis=0) for parts in whole[2:]))


def over_slices(head: Head, sums: Sums) -> Sums:
    """The sums over the whole vocabulary, from those over the slices."""
    if head.mesh_axis is None:
        return sums
    whole = moved(sums, *(max_over_slices(head, tops) for tops in sums[:2]))
    return Sums(whole.top, whole.ref_top, *(sum_over_slices(head, parts) for parts in whole[2:]))


def finish(sums: Sums) -> Divergence:
    """KL, up to a rounding that may be negative, and entropy, from the sums over the whole vocabulary."""
    excess = sums.excess / sums.mass
    # A reference with far less mass, as from one sharp peak, leaves no digits in the difference.
    ratio = jnp.where(jnp.abs(excess) < 0.5, jnp.log1p(excess), jnp.log(sums.ref_mass / sums.mass))
    return Divergence(sums.gap / sums.mass + ratio, jnp.log(sums.mass) - sums.depth / sums.mass)
