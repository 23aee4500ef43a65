"""What the TPU kernels stream of a head: its weight, and the scales of an int8 one.

An int8 tile is converted where it meets the matrix unit, and holds its numbers exactly there; sums of products are
multiplied by scales. Logits stand with the vocabulary along sublanes, so a tile's scales, which come along lanes, are
turned once and kept beside it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .head import Head
from .vmem import UNIT, tile_bytes


class Streamed(NamedTuple):
    """The arrays of a head, the blocks that a kernel takes of them, or their refs."""

    weight: Any
    scales: Any = ()
    """[1, V] in whole tiles, zeros behind V, of an int8 weight; a tree without leaves for others."""


def arrays(head: Head, tokens: int) -> Streamed:
    """What is streamed in tiles of this many tokens."""
    if head.scales is None:
        return Streamed(head.weight)
    return Streamed(head.weight, jnp.pad(head.scales, (0, -head.slice_size % tokens))[None])


def specs(head: Head, weight: pl.BlockSpec, tokens: int, tile: Callable[..., Any]) -> Streamed:
    """Blocks of these arrays. `tile` takes the grid's two indices."""
    if head.scales is None:
        return Streamed(weight)
    return Streamed(weight, pl.BlockSpec((1, tokens), lambda *at: (0, tile(*at[:2]))))


def scratch(head: Head, tokens: int, rows: int) -> Any:
    """Where the scales of a tile lie by token, as `vmem.product` takes them."""
    return () if head.scales is None else pltpu.VMEM((tokens, rows), jnp.float32)


def stream_bytes(head: Head, tokens: int, rows: int) -> int:
    """Bytes in VMEM of a tile, twice, and of its scales."""
    shape = (tokens, head.width) if head.vocab_axis == 0 else (head.width, tokens)
    weight = 2 * tile_bytes(*shape, head.weight.dtype)
    if head.scales is None:
        return weight
    return weight + 2 * tile_bytes(1, tokens, jnp.float32) + tile_bytes(tokens, rows, jnp.float32)


def turn_scales(tile: Streamed, by_token: Any) -> None:
    """Write the scales of a tile by token, [tokens, rows]."""
    if isinstance(tile.scales, tuple):
        return
    tokens, rows = by_token.shape
    for first in range(0, tokens, UNIT):
        unit = slice(first, first + UNIT)
        by_token[unit, :] = jnp.broadcast_to(tile.scales[0:1, unit], (rows, UNIT)).T
