"""Attention masks, kept as integers of every place, from which any block of a mask is made when it is needed.

A query attends to a key of its own segment that is no later, and that is shared by the streams of the segment or
belongs to the query's own; in layers with windows, only to the nearest. Prompts padded on the right, decoding and
packed rows are all cases of this rule.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from fastpref.data.batches import PackedPairs, token_mask

MASKED = -1e30
"""Added to a score that must not count: finite, so that no gradient is NaN."""

LEAST, MOST = 64, 512
"""Fewest and most queries of a packed row that are taken at once."""

ALL_POSITIONS = 1 << 30
"""A window that leaves out no position."""

ANYWHERE = np.zeros((1, 1, 1), np.int32)


def block_size(queries: int) -> int:
    """Queries of a row that are taken at once: an eighth of the row, as a power of two from `LEAST` to `MOST`."""
    return max(LEAST, min(MOST, 1 << max(0, queries.bit_length() - 4)))


def window_size(queries: int, keys: int) -> int:
    """Keys that a block of queries reads if it attends to no others: as much of the row as three blocks are."""
    return min(keys, -(-3 * block_size(queries) * keys // max(1, queries)))


class Places(NamedTuple):
    """The tokens of streams as masks read them. A field that is left out does not matter."""

    positions: Int[Array | np.ndarray, "#P #K #T"] = ANYWHERE
    """A query attends to no key of a higher position."""
    segments: Int[Array | np.ndarray, "#P #K #T"] = ANYWHERE
    """A query attends to keys of its own segment alone; −1 at padding."""
    streams: Int[Array | np.ndarray, "#P #K #T"] = ANYWHERE
    """0: attended to by all streams of the segment; else by its own."""

    def cut(self, start: Int[Array, ""], size: int) -> "Places":
        """The places from `start` on."""
        return Places(*(x if x.shape[2] == 1 else jax.lax.dynamic_slice_in_dim(x, start, size, 2) for x in self))


class Distances(NamedTuple):
    """Relative positions as they are added to scores."""

    values: Float[Array, "N W"]
    """Entry W / 2 − 1 + d is added where the key lies d places after the query."""
    first: Int[Array, ""] | int = 0
    """Place of the first query, counted from that of the first key."""

    def bias(self, queries: int, keys: int) -> Float[Array, "1 N 1 1 T U"]:
        """Bias of each head for every query and key."""
        start = self.values.shape[1] // 2 - queries - self.first
        values = jax.lax.dynamic_slice_in_dim(self.values, start, queries + keys, axis=1)
        return toeplitz(values, queries)[None, :, None, None]


class Spans(NamedTuple):
    """The keys that blocks of queries attend to, in any row."""

    first: Int[Array, " blocks"]
    last: Int[Array, " blocks"]
    """−1 where they attend to none."""


class Mask(NamedTuple):
    """The keys that queries attend to, and what else is added to their scores."""

    queries: Places = Places()
    keys: Places = Places()
    distances: Distances | None = None
    window: int | Int[Array, ""] | None = None
    """Positions that a query attends to, back from its own; None for all."""
    spans: Spans | None = None
    """Of blocks of `block_size` queries; None where all queries are taken at once."""

    @property
    def dense(self) -> Bool[Array, "#P #K #T #U"]:
        """Whether each query attends to each key."""
        position, segment, stream = (jnp.asarray(x)[..., :, None] for x in self.queries)
        key_position, key_segment, key_stream = (jnp.asarray(x)[..., None, :] for x in self.keys)
        own = (key_stream == 0) | (key_stream == stream)
        seen = (key_segment == segment) & (key_segment >= 0) & own & (key_position <= position)
        return seen if self.window is None else seen & (key_position > position - self.window)

    def bias(self, queries: int, keys: int) -> Float[Array, "#P #N #K 1 #T #U"]:
        """What is added to the scores of so many queries and keys."""
        bias = jnp.where(self.dense, 0.0, MASKED)[:, None, :, None]
        return bias if self.distances is None else bias + self.distances.bias(queries, keys)

    def within(self, window: int) -> "Mask":
        """The mask of a layer whose queries attend to so many positions, back from their own."""
        local = self._replace(window=window)
        return local if self.spans is None else in_blocks(local)

    def chosen(self, local: Bool[Array, ""], near: "Mask") -> "Mask":
        """`near`, the mask within a window, where `local` is true; else this one."""
        window = jnp.where(local, jnp.asarray(near.window), ALL_POSITIONS)
        if self.spans is None or near.spans is None:
            return self._replace(window=window)
        spans = Spans(*(jnp.where(local, first, second) for first, second in zip(near.spans, self.spans, strict=True)))
        return self._replace(window=window, spans=spans)


class Masks(NamedTuple):
    """What the tokens of streams attend to."""

    own: Mask
    """In their own stream."""
    prompt: Mask = Mask()
    """In the prompt that the streams share."""

    def within(self, window: int) -> "Masks":
        """The masks of a layer whose queries attend to so many positions, back from their own."""
        return Masks(self.own.within(window), self.prompt.within(window))

    def chosen(self, local: Bool[Array, ""], near: "Masks") -> "Masks":
        """The masks of a layer, of two kinds of layers: `near` where `local` is true."""
        return Masks(self.own.chosen(local, near.own), self.prompt.chosen(local, near.prompt))


def causal_mask(size: int) -> Mask:
    """Every token of a stream attends to itself and to those before it."""
    places = Places(jnp.arange(size)[None, None])
    return Mask(places, places)


def padding_mask(lengths: Int[Array, " P"], size: int) -> Mask:
    """Every query attends to the first `lengths` keys of its prompt."""
    return Mask(keys=Places(segments=jnp.where(token_mask(lengths, size), 0, -1)[:, None]))


def packed_mask(batch: PackedPairs) -> Mask:
    """Place i of a row attends to place j of the same pair, not later, and shared or of the same completion.

    pairs[i] == pairs[j] ≥ 0, j ≤ i, streams[j] ∈ {0, streams[i]}. An empty place attends to nothing, and nothing to it.
    `packed_mask(batch).dense[:, 0]` is the array [R, L, L], for a model of your own.
    """
    # The tokens of a sequence lie in the order of their positions.
    places = Places(*(x[:, None] for x in (batch.positions, batch.pairs, batch.streams)))
    return in_blocks(Mask(places, places))


def prompt_mask(batch: PackedPairs) -> Mask:
    """Place i of the encoder stream attends to place j of it that holds the prompt of the same pair."""
    places = Places(segments=batch.prompt_pairs[:, None])
    return in_blocks(Mask(places, places))


def cross_mask(batch: PackedPairs) -> Mask:
    """Place i of the decoder stream attends to place j of the encoder stream that holds the prompt of its pair."""
    queries, keys = Places(segments=batch.pairs[:, None]), Places(segments=batch.prompt_pairs[:, None])
    return in_blocks(Mask(queries, keys))


def in_blocks(mask: Mask) -> Mask:
    """The mask of packed rows; with spans where the rows are long enough for blocks of queries."""
    size, keys_size = mask.queries.segments.shape[2], mask.keys.segments.shape[2]
    if window_size(size, keys_size) == keys_size:
        return mask
    block = block_size(size)
    seen = jnp.pad(mask.dense.any((0, 1)), ((0, -size % block), (0, 0))).reshape(-1, block, keys_size).any(1)
    place = jnp.arange(keys_size)[None, :]
    return mask._replace(spans=Spans(jnp.where(seen, place, keys_size).min(-1), jnp.where(seen, place, -1).max(-1)))


def toeplitz(by_distance: Float[Array, "N W"], rows: int) -> Float[Array, "N T U"]:
    """The matrix of T rows whose entry (i, j) is `by_distance[j - i + T - 1]`, with U = W − T.

    Rows are shifted by laying copies end to end and cutting them one short: no gather, and no scatter in the gradient.
    """
    heads, wide = by_distance.shape
    laid = jnp.broadcast_to(by_distance[:, None, :], (heads, rows, wide)).reshape(heads, rows * wide)
    return laid[:, rows - 1 : rows * wide - 1].reshape(heads, rows, wide - 1)[:, :, : wide - rows]
