"""Who sees whom in packed rows: the masks of `records.PackedPairs`, for our models and for anybody's."""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from fastpref.data.batches import PackedPairs
from fastpref.models.layers import MASKED, Shared, attend

LEAST, MOST = 64, 512
"""Fewest and most queries of a row that are taken at once."""


def block_size(queries: int) -> int:
    """Queries of a row that are taken at once: an eighth of the row, as a power of two from `LEAST` to `MOST`."""
    return max(LEAST, min(MOST, 1 << max(0, queries.bit_length() - 4)))


def window_size(queries: int, keys: int) -> int:
    """Keys that a block of queries reads if it sees no others: as much of the row as three blocks are."""
    return min(keys, -(-3 * block_size(queries) * keys // queries))


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


class Sight(NamedTuple):
    """What the queries of packed rows see of the keys, for all layers of a stack."""

    bias: Float[Array, "R 1 1 1 T U"]
    """0 where a query sees a key, `MASKED` elsewhere."""
    first: Int[Array, " blocks"]
    """The first key that a block of queries sees in any row."""
    last: Int[Array, " blocks"]
    """And the last one; −1 where they see none."""


def sight(visible: Bool[Array, "R T U"]) -> Sight:
    """What `attend_rows` takes, built once from a mask."""
    _, queries, keys = visible.shape
    block = block_size(queries)
    seen = jnp.pad(visible.any(0), ((0, -queries % block), (0, 0))).reshape(-1, block, keys).any(1)
    place = jnp.arange(keys)[None, :]
    first, last = jnp.where(seen, place, keys).min(-1), jnp.where(seen, place, -1).max(-1)
    return Sight(jnp.where(visible, 0.0, MASKED)[:, None, None, None], first, last)


def attend_rows(
    queries: Float[Array, "R N 1 G T H"],
    prompt: Shared,
    sight: Sight,
    position_bias: Float[Array, "1 N 1 1 T U"] | None = None,
) -> Float[Array, "R N 1 G T H"]:
    """`layers.attend` within packed rows, long ones in blocks of queries.

    A block reads a window of three blocks of keys where that is all it sees, in every row, and the whole row elsewhere:
    with pairs up to a quarter of a row, time grows with the length of a row and not with its square. Scores of a block
    are made again for its gradient, so memory does too.

    Args:
      queries: scaled queries.
      prompt: keys and values of the same rows.
      sight: what queries see of them.
      position_bias: added to the scores.

    Returns:
      The attended values, in the dtype of the queries.
    """
    biases = (sight.bias,) if position_bias is None else (sight.bias, position_bias)
    size, keys = queries.shape[4], prompt.keys.shape[-1]
    length, window = block_size(size), window_size(size, keys)
    if window == keys:
        return attend(queries, prompt, reduce(jnp.add, biases))

    def blocks(x: Array) -> Array:
        padded = jnp.pad(x, [(0, -size % length if axis == 4 else 0) for axis in range(6)])
        return jnp.moveaxis(padded.reshape(*x.shape[:4], -1, length, x.shape[5]), 4, 0)

    def whole(queries: Array, biases: tuple[Array, ...], start: Array) -> Array:
        return attend(queries, prompt, reduce(jnp.add, biases))

    def near(queries: Array, biases: tuple[Array, ...], start: Array) -> Array:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=window)
        seen = Shared(cut(prompt.keys, axis=3), cut(prompt.values, axis=2))
        return attend(queries, seen, reduce(jnp.add, (cut(bias, axis=5) for bias in biases)))

    def block(of: tuple[Array, tuple[Array, ...], Array, Array]) -> Array:
        queries, biases, first, last = of
        start = jnp.minimum(first, keys - window)
        attended: Array = jax.lax.cond(last < start + window, near, whole, queries, biases, start)
        return attended

    each = (blocks(queries), tuple(map(blocks, biases)), sight.first, sight.last)
    attended = jnp.moveaxis(jax.lax.map(jax.checkpoint(block, prevent_cse=False), each), 0, 4)
    return attended.reshape(*queries.shape[:4], -1, queries.shape[5])[:, :, :, :, :size]
