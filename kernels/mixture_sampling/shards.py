"""One draw from the parts that the slices of a vocabulary know.

A slice need not begin or end with a group. What it knows of its first and of its last group is therefore kept apart,
as edges: the pieces of a group that lies on several slices become one before it is scored.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

from ..noise import gumbel
from ..slices import gather
from .sample import Part

_NO_TOKEN = 2**31 - 1


class Edges(NamedTuple):
    """Pieces of groups: E of them on a device, twice that times the devices after they were gathered."""

    group: Int[Array, "E B"]
    """Number of the group; −1 for no piece."""
    lse: Float[Array, "E B"]
    """Log-sum-exp of the piece's mixture logits."""
    leader: Float[Array, "E B"]
    """Largest mixture logit plus noise; without noise when greedy."""
    token: Int[Array, "E B"]
    """Where that is."""
    policy: Float[Array, "E B"]
    """Its logit."""
    ref: Float[Array, "E B"]


def merge(
    part: Part,
    edges: Edges,
    mesh_axis: str,
    noise: Callable[[Int[Array, "E B"]], Float[Array, "E B"]] | None,
) -> Part:
    """What all devices along the axis know together, the same on each; it moves O(B) numbers.

    Args:
      part: log-sum-exps over the whole slice, and the best of its groups that are not edges.
      edges: the others.
      mesh_axis: the axis over which the vocabulary is split.
      noise: of the groups; None when greedy.
    """
    parts = gather(part, mesh_axis)
    joined = _join(jax.tree.map(lambda entry: entry.reshape(-1, entry.shape[-1]), gather(edges, mesh_axis)))
    scores = joined.leader if noise is None else joined.lse + noise(joined.group)
    scores = jnp.concatenate([parts.score, jnp.where(joined.group >= 0, scores, -jnp.inf)])
    tokens = jnp.concatenate([parts.token, joined.token])
    best = jnp.max(scores, axis=0)
    # Ties go to the lowest id.
    token = jnp.min(jnp.where(scores == best[None, :], tokens, _NO_TOKEN), axis=0)
    first = jnp.argmax((scores == best[None, :]) & (tokens == token[None, :]), axis=0)[None, :]

    def of_best(values: Float[Array, "E B"]) -> Float[Array, " B"]:
        return jnp.take_along_axis(values, first, axis=0)[0]

    return Part(
        policy_lse=jax.nn.logsumexp(parts.policy_lse, axis=0),
        ref_lse=jax.nn.logsumexp(parts.ref_lse, axis=0),
        mixture_lse=jax.nn.logsumexp(parts.mixture_lse, axis=0),
        score=best,
        token=token,
        policy=of_best(jnp.concatenate([parts.policy, joined.policy])),
        ref=of_best(jnp.concatenate([parts.ref, joined.ref])),
    )


def edge_noise(keys: UInt32[Array, "B 2"]) -> Callable[[Int[Array, "E B"]], Float[Array, "E B"]]:
    """Noise of groups by their numbers, for rows with these keys."""

    def one(key: UInt32[Array, " 2"], group: Int[Array, ""]) -> Float[Array, ""]:
        return gumbel(key[None, :], group[None], jnp.zeros(1, jnp.int32))[0][0, 0]

    def noise(group: Int[Array, "E B"]) -> Float[Array, "E B"]:
        result: Float[Array, "E B"] = jax.vmap(jax.vmap(one), in_axes=(None, 0))(keys, group)
        return result

    return noise


def _join(edges: Edges) -> Edges:
    """Pieces of one group as one, in the place of the first of them; the places of the others are empty."""
    same = (edges.group[:, None, :] == edges.group[None, :, :]) & (edges.group >= 0)[None, :, :]
    leaders = jnp.where(same, edges.leader[None, :, :], -jnp.inf)
    # Pieces are in the order of their tokens, so the first largest has the lowest id.
    chosen = jnp.argmax(leaders, axis=1)
    first = jnp.argmax(same, axis=1) == jnp.arange(edges.group.shape[0])[:, None]

    def of_chosen(values: Array) -> Array:
        return jnp.take_along_axis(values, chosen, axis=0)

    return Edges(
        group=jnp.where(first, edges.group, -1),
        lse=jax.nn.logsumexp(jnp.where(same, edges.lse[None, :, :], -jnp.inf), axis=1),
        leader=of_chosen(edges.leader),
        token=of_chosen(edges.token),
        policy=of_chosen(edges.policy),
        ref=of_chosen(edges.ref),
    )
