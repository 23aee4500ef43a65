"""Who sees whom in packed rows: the masks of `records.PackedPairs`, for our models and for anybody's."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from fastpref.models.layers import MASKED
from fastpref.records import PackedPairs


def visibility(batch: PackedPairs) -> Bool[Array, "R L L"]:
    """Whether place i of a row sees place j: same pair, not later, shared or of the same completion.

    pairs[i] == pairs[j] ≥ 0, j ≤ i, streams[j] ∈ {0, streams[i]}. An empty place sees nothing and is seen by none.
    """
    streams = jnp.asarray(batch.streams)
    own = (streams[:, None, :] == 0) | (streams[:, :, None] == streams[:, None, :])
    return same_pair(batch.pairs, batch.pairs) & own & jnp.tri(streams.shape[1], dtype=bool)[None]


def prompt_visibility(batch: PackedPairs) -> Bool[Array, "R S S"]:
    """Whether place i of the encoder stream sees place j: both hold the prompt of one pair."""
    return same_pair(batch.prompt_pairs, batch.prompt_pairs)


def cross_visibility(batch: PackedPairs) -> Bool[Array, "R L S"]:
    """Whether place i of the decoder stream sees place j of the encoder stream: the prompt of its own pair."""
    return same_pair(batch.pairs, batch.prompt_pairs)


def same_pair(queries: Int[ArrayLike, "R T"], keys: Int[ArrayLike, "R U"]) -> Bool[Array, "R T U"]:
    """Whether two places hold the same pair; empty ones hold none."""
    one, other = jnp.asarray(queries)[:, :, None], jnp.asarray(keys)[:, None, :]
    return (one == other) & (one >= 0)


def bias_of(visible: Bool[Array, "R T U"]) -> Float[Array, "R 1 1 1 T U"]:
    """0 where a query sees a key, `MASKED` elsewhere, in the layout of `layers.attend`."""
    return jnp.where(visible, 0.0, MASKED)[:, None, None, None]
