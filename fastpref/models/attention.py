"""Attention: the keys and values that are read, in two layouts, and one function for every mask.

Shape letters: P prompts, K completions of each, T tokens of a stream (S for prompts), N key-value heads, G query heads
per key-value head, H head width, U keys.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from fastpref.models.masks import Distances, Mask, Masks, Places, Spans, block_size, padding_mask, window_size


class Shared(NamedTuple):
    """Keys and values of a prompt, read by all K completions of it."""

    keys: Float[Array, "P N H S"]
    values: Float[Array, "P N S H"]

    @classmethod
    def of(cls, keys: Float[Array, "P 1 S N H"], values: Float[Array, "P 1 S N H"]) -> "Shared":
        """Store the heads of single streams."""
        return cls(keys[:, 0].transpose(0, 2, 3, 1), values[:, 0].transpose(0, 2, 1, 3))

    def scores(self, queries: Float[Array, "P N K G T H"]) -> Float[Array, "P N K G T S"]:
        """Products of queries and keys."""
        return product("...mh,...hs->...ms", queries, self.keys)

    def cut(self, start: Int[Array, ""], size: int) -> "Shared":
        """The keys and values from `start` on."""
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        return Shared(cut(self.keys, axis=3), cut(self.values, axis=2))


class Own(NamedTuple):
    """Keys and values of each completion, read by itself alone."""

    keys: Float[Array, "P N K T H"]
    values: Float[Array, "P N K T H"]

    @classmethod
    def of(cls, keys: Float[Array, "P K T N H"], values: Float[Array, "P K T N H"]) -> "Own":
        """Store the heads of completions."""
        return cls(keys.transpose(0, 3, 1, 2, 4), values.transpose(0, 3, 1, 2, 4))

    def scores(self, queries: Float[Array, "P N K G T H"]) -> Float[Array, "P N K G T U"]:
        """Products of queries and keys."""
        return product("...mh,...uh->...mu", queries, self.keys)


class Room(NamedTuple):
    """Where a layer keeps keys and values of completions: its part of the arrays of all layers.

    A layer of a loop writes its tokens into them in place, where a cache of its own would be copied at every step.
    """

    stored: Own
    """Of all layers, [layers, P, N, K, T, H]."""
    layer: Int[Array, ""]

    def write(self, new: Own, slot: Int[Array, ""] | int) -> "Room":
        """The room with `new` stored from token `slot` on."""
        start = (self.layer, 0, 0, 0, slot, 0)
        arrays = zip(self.stored, new, strict=True)
        return self._replace(stored=Own(*(jax.lax.dynamic_update_slice(old, x[None], start) for old, x in arrays)))

    def read(self) -> Own:
        """What is stored of the layer."""
        return Own(*(jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False) for array in self.stored))


def product(axes: str, rows: Float[Array, "P N K G T _"], stored: Array) -> Float[Array, "P N K G T _"]:
    """Product of queries or weights with what is stored, in float32: with a prompt for all its completions at once."""
    flat = rows.reshape(*stored.shape[:-2], -1, rows.shape[-1])
    return jnp.einsum(axes, flat, stored, preferred_element_type=jnp.float32).reshape(*rows.shape[:-1], -1)


class Cache(NamedTuple):
    """What a model of either family has read: prompts once each, completions row by row."""

    prompts: Shared
    """Of the layers of the decoder, which are the first axis."""
    completions: Own | None
    """Of the layers of the decoder, likewise; None where completions are not kept."""
    lengths: Int[Array, " P"]
    """Keys of each prompt that completions attend to."""
    begin: Int[Array, " P"]
    """Position of the first token that is read of a completion."""

    @classmethod
    def of(
        cls,
        prompts: Shared,
        lengths: Int[Array, " P"],
        begin: Int[Array, " P"],
        *,
        completions: int,
        slots: int,
    ) -> "Cache":
        """The cache of prompts that have been read, with room for `slots` tokens of each completion."""

        def room() -> Own:
            layers, p, n, h, _ = prompts.keys.shape
            shape = (layers, p, n, completions, slots, h)
            # Copies of what has been read, so that a compiler makes the room after reading and not beside it.
            keys, values = prompts.keys[:, :, :, None, None, :, 0], prompts.values[:, :, :, None, None, 0]
            return Own(jnp.broadcast_to(keys, shape), jnp.broadcast_to(values, shape))

        return cls(prompts, room() if slots else None, lengths, begin)

    def reading(self, size: int, step: Int[Array, ""] | int) -> tuple[Int[Array, "P 1 T"], Masks]:
        """Positions of `size` tokens of every completion from number `step` on, and what they attend to."""
        tokens = (step + jnp.arange(size))[None, None]
        slots = size if self.completions is None else self.completions.values.shape[4]
        own = Mask(Places(tokens), Places(jnp.arange(slots)[None, None]))
        prompt = padding_mask(self.lengths, self.prompts.values.shape[3])
        return self.begin[:, None, None] + tokens, Masks(own, prompt)


def attend(
    queries: Float[Array, "P N K G T H"], *parts: tuple[Shared | Own, Mask], cap: float | None = None
) -> Float[Array, "P N K G T H"]:
    """Softmax attention of every query to the keys that masks let it see, of all parts under one softmax.

    Scores, softmax and sums are float32; the products take their operands as they are. Queries come scaled. A single
    part whose mask has spans is taken in blocks of queries.

    Args:
      queries: scaled queries, shape [P, N, K, G, T, H].
      parts: keys with their values, and the mask of each: the prompt's, each completion's own, or both.
      cap: soft bound of the scores, cap · tanh(score / cap), before the mask (Gemma 2); None for none.

    Returns:
      The attended values, shape [P, N, K, G, T, H], in the dtype of the queries.
    """
    if len(parts) == 1 and isinstance(parts[0][0], Shared) and parts[0][1].spans is not None:
        return attend_in_blocks(queries, parts[0][0], parts[0][1], parts[0][1].spans, cap)

    def capped(scores: Array) -> Array:
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    scores = [
        capped(stored.scores(queries)) + mask.bias(queries.shape[4], stored.values.shape[-2]) for stored, mask in parts
    ]
    peak = jax.lax.stop_gradient(reduce(jnp.maximum, (score.max(-1, keepdims=True) for score in scores)))
    weights = [jnp.exp(score - peak) for score in scores]
    total = reduce(jnp.add, (weight.sum(-1, keepdims=True) for weight in weights))
    # The division comes last: it costs H numbers a query where normalised weights would cost S + U.
    mixed = [
        product("...mu,...uh->...mh", weight.astype(queries.dtype), stored.values)
        for (stored, _), weight in zip(parts, weights, strict=True)
    ]
    return (reduce(jnp.add, mixed) / total).astype(queries.dtype)


def attend_in_blocks(
    queries: Float[Array, "R N 1 G T H"], stored: Shared, mask: Mask, spans: Spans, cap: float | None = None
) -> Float[Array, "R N 1 G T H"]:
    """`attend` within long packed rows, a block of queries at a time.

    A block reads a window of three blocks of keys where that is all it attends to, in every row, and the whole row
    elsewhere: with pairs up to a quarter of a row, time grows with the length of a row and not with its square. Scores
    and mask of a block are made again for its gradient, so memory does too.
    """
    size, keys = queries.shape[4], stored.values.shape[2]
    length, window = block_size(size), window_size(size, keys)
    rest = -size % length

    def padded(x: Array, axis: int) -> Array:
        return x if x.shape[axis] == 1 else jnp.pad(x, [(0, rest if at == axis else 0) for at in range(x.ndim)])

    places = Places(*(padded(jnp.asarray(x), 2) for x in mask.queries))
    values = None if mask.distances is None else jnp.pad(mask.distances.values, ((0, 0), (rest, rest)))
    split = padded(queries, 4).reshape(*queries.shape[:4], -1, length, queries.shape[5])

    def block(of: tuple[Array, Array, Array, Array]) -> Array:
        queries, begin, first, last = of
        start = jnp.minimum(first, keys - window)

        def near(queries: Array) -> Array:
            return some(queries, stored.cut(start, window), mask.keys.cut(start, window), begin - start)

        def whole(queries: Array) -> Array:
            return some(queries, stored, mask.keys, begin)

        def some(queries: Array, stored: Shared, keys: Places, offset: Array) -> Array:
            distances = None if values is None else Distances(values, offset)
            return attend(queries, (stored, Mask(places.cut(begin, length), keys, distances, mask.window)), cap=cap)

        attended: Array = jax.lax.cond(last < start + window, near, whole, queries)
        return attended

    begins = length * jnp.arange(split.shape[4])
    each = (jnp.moveaxis(split, 4, 0), begins, *spans)
    attended = jnp.moveaxis(jax.lax.map(jax.checkpoint(block, prevent_cse=False), each), 0, 4)
    return attended.reshape(*queries.shape[:4], -1, queries.shape[5])[:, :, :, :, :size]
