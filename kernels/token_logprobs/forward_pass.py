"""The TPU kernel that scores: a block of rows stays, the weight streams by, log-sum-exps run along."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from ..head import Head
from ..slices import result_shape
from ..streams import Streamed, arrays, scratch, specs, stream_bytes, turn_scales
from ..tiles import (
    ZEROS,
    Tiles,
    by_tile,
    by_unit,
    choose,
    loop,
    parameters,
    read_logits,
    read_states,
    row_spec,
    rows_of,
    scalar_memory,
    states_spec,
    units_at_once,
    weight_spec,
)
from ..vmem import (
    CHUNK,
    NEVER,
    SUBLANES,
    UNIT,
    finite_or_zero,
    log_of_sum,
    over_sublanes,
    product,
    tile_bytes,
    unit_ids,
)


def forward_bytes(head: Head, dtype: Any, tiles: Tiles) -> int:
    """VMEM of the forward pass: hidden states and weights twice each, one unit of logits, running results."""
    unit = tiles.unit(head)
    blocks = 2 * tile_bytes(head.width, tiles.rows, dtype) + stream_bytes(head, tiles.tokens, unit)
    return blocks + 2 * tile_bytes(UNIT, unit, jnp.float32) + tile_bytes(3 * SUBLANES, tiles.rows, jnp.float32)


def forward_tiles(head: Head, dtype: Any, rows: int) -> Tiles:
    """Tiles of the forward pass: one unit of tokens, since a step costs little beside eight units of rows."""
    return choose(partial(forward_bytes, head, dtype), rows, (UNIT,), 1024)


def forward(
    hidden: Float[Array, "..."],
    head: Head,
    targets: Int[Array, " N"],
    count: Int[Array, ""],
    tiles: Tiles,
    interpret: Any,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-sum-exp over this device's slice, and the target's logit, 0 where the target is not in the slice.

    Args:
      hidden: [D, N] for a [V, D] weight, [N, D] for a [D, V] one; N a multiple of `tiles.rows`.
      head: the map to logits.
      targets: ids counted from the beginning of the slice.
      count: rows that count; results of the others are anything.
      tiles: the blocks.
      interpret: Pallas's.
    """
    total, vocab = targets.shape[0], head.slice_size
    steps, blocks, width = -(-vocab // tiles.tokens), total // tiles.rows, tiles.unit(head)
    units = tiles.rows // width
    side = units_at_once(head, units)

    def kernel(
        scalars: Any, states: Any, tile: Streamed, target: Any, out: Any, buffers: Any, state: Any, scales: Any
    ) -> None:
        block, step = pl.program_id(0), pl.program_id(1)

        def unit(masked: bool, number: Any, place: int) -> None:
            lanes, logits = rows_of(number, width), buffers.at[place]
            wanted = (target[0, 0:1, lanes] - step * UNIT).reshape(1, 1, width)
            ids = unit_ids(width)
            product(head, tile.weight, 0, read_states(head, tiles, states, lanes, scalars), logits, scales)

            def values(again: int, chunk: int) -> Array:
                shaped = read_logits(head, logits, scalars[again], chunk)
                return jnp.where(ids + chunk < vocab - step * UNIT, shaped, NEVER) if masked else shaped

            old_top, picked = state[number, 0], state[number, 2]
            top = old_top
            for chunk in range(0, UNIT, CHUNK):
                one = values(0, chunk)
                top = jnp.maximum(top, jnp.max(one, axis=0))
                picked += jnp.sum(jnp.where(ids + chunk == wanted, one, 0.0), axis=0)
            base = finite_or_zero(top)
            sums = state[number, 1] * jnp.exp(old_top - base)
            for chunk in range(0, UNIT, CHUNK):
                sums += jnp.sum(jnp.exp(values(1, chunk) - base[None]), axis=0)
            state[number, 0], state[number, 1], state[number, 2] = top, sums, picked

        @pl.when(block < scalars[ZEROS])
        def _active() -> None:
            @pl.when(step == 0)
            def _start() -> None:
                state[:, 0] = jnp.full((units, SUBLANES, width), NEVER, jnp.float32)
                state[:, 1:] = jnp.zeros((units, 2, SUBLANES, width), jnp.float32)

            turn_scales(tile, scales)
            by_tile(step, vocab, UNIT, lambda masked: by_unit(units, side, partial(unit, masked)))

            @pl.when(step == steps - 1)
            def _finish() -> None:
                def one(number: Any, carry: Any) -> Any:
                    lanes = rows_of(number, width)
                    out[0, 0:1, lanes] = log_of_sum(*over_sublanes(state[number, 0], state[number, 1]))
                    out[0, 1:2, lanes] = jnp.sum(state[number, 2], axis=0, keepdims=True)
                    return carry

                loop(units, one)

    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, steps),
            in_specs=[
                states_spec(head.vocab_axis == 0, head, tiles, lambda i, j: i),
                specs(head, weight_spec(head, tiles.tokens, lambda i, j: j), tiles.tokens, lambda i, j: j),
                row_spec(1, tiles, lambda i, j: i),
            ],
            out_specs=row_spec(2, tiles, lambda i, j: i),
            scratch_shapes=[
                pltpu.VMEM((side, UNIT, width), jnp.float32),
                pltpu.VMEM((units, 3, SUBLANES, width), jnp.float32),
                scratch(head, tiles.tokens, width),
            ],
        ),
        out_shape=result_shape((blocks, 2, tiles.rows), jnp.float32, head),
        compiler_params=parameters(),
        interpret=interpret,
        name="fastpref_logprobs_forward",
    )(scalar_memory(count, tiles), hidden, arrays(head, tiles.tokens), targets.reshape(blocks, 1, tiles.rows))
    lse, picked = jnp.moveaxis(out, 1, 0).reshape(2, total)
    return lse, picked
