"""The TPU kernel of a frozen head: log-probs and the mean row under the softmax in one pass over the weight."""

from functools import partial
from typing import Any

import jax
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
    columns_of,
    cuts,
    loop,
    parameters,
    per_row,
    read_logits,
    read_states,
    read_weight,
    row_spec,
    rows_of,
    scalar_memory,
    states_spec,
    units_at_once,
    weight_spec,
)
from ..vmem import (
    CHUNK,
    LANES,
    NEVER,
    SUBLANES,
    UNIT,
    as_registers,
    finite_or_zero,
    log_of_sum,
    over_sublanes,
    product,
    tile_bytes,
    unit_ids,
)

_VOCAB_TILES = (1024, UNIT)


def frozen_bytes(head: Head, dtype: Any, tiles: Tiles) -> int:
    """VMEM of the frozen form: hidden states, weights and means twice each, probabilities, two columns of logits."""
    rows, tokens, width, unit = tiles.rows, tiles.tokens, head.width, tiles.unit(head)
    blocks = 2 * tile_bytes(width, rows, dtype) + stream_bytes(head, tokens, unit)
    outputs = 2 * tile_bytes(rows, width, jnp.float32) + tile_bytes(rows, LANES, jnp.float32)
    column = tile_bytes(tokens, unit, jnp.float32) + tile_bytes(tokens, unit, dtype)
    scratch = 2 * column + tile_bytes(rows, tokens, dtype)
    return blocks + outputs + scratch + tile_bytes(3 * SUBLANES, rows, jnp.float32)


def frozen_tiles(head: Head, dtype: Any, rows: int) -> Tiles:
    """Tiles of the frozen form."""
    return choose(partial(frozen_bytes, head, dtype), rows, _VOCAB_TILES, 512)


def frozen(
    hidden: Float[Array, "..."],
    head: Head,
    targets: Int[Array, " N"],
    count: Int[Array, ""],
    tiles: Tiles,
    interpret: Any,
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, "N D"]]:
    """What `forward` returns, and E[w], float32: the mean row of the slice under the slice's softmax.

    It is attention with the head's rows as keys and values. Each row of the head counts with the slope of its logit in
    the product, 1 unless the head scales or caps. Arguments as in `forward`.
    """
    total, vocab, width, dtype = targets.shape[0], head.slice_size, head.width, hidden.dtype
    steps, blocks = -(-vocab // tiles.tokens), total // tiles.rows
    unit_rows, columns = tiles.unit(head), columns_of(width, tiles)
    units = tiles.rows // unit_rows
    side = units_at_once(head, units)

    def kernel(
        scalars: Any, states: Any, tile: Streamed, target: Any, out: Any, mean: Any,
        buffers: Any, by_tokens: Any, probability: Any, decay: Any, state: Any, scales: Any,
    ) -> None:  # fmt: skip
        block, step = pl.program_id(0), pl.program_id(1)

        def unit(masked: bool, number: Any, place: int) -> None:
            lanes, logits, by_token = rows_of(number, unit_rows), buffers.at[place], by_tokens.at[place]
            wanted = (target[0, 0:1, lanes] - step * tiles.tokens).reshape(1, 1, unit_rows)
            ids = unit_ids(unit_rows)
            for first in range(0, tiles.tokens, UNIT):
                buffer = logits.at[first : first + UNIT, :]
                product(head, tile.weight, first, read_states(head, tiles, states, lanes, scalars), buffer, scales)

            def values(again: int, chunk: int) -> Array:
                shaped = read_logits(head, logits, scalars[again], chunk)
                return jnp.where(ids + chunk < vocab - step * tiles.tokens, shaped, NEVER) if masked else shaped

            old_top, picked = state[number, 0], state[number, 2]
            top = old_top
            for chunk in range(0, tiles.tokens, CHUNK):
                one = values(0, chunk)
                top = jnp.maximum(top, jnp.max(one, axis=0))
                picked += jnp.sum(jnp.where(ids + chunk == wanted, one, 0.0), axis=0)
            # One maximum for a row: its exponentials become one row of the next product.
            top = jnp.broadcast_to(jnp.max(top, axis=0, keepdims=True), top.shape)
            base = finite_or_zero(top)
            shrink = jnp.exp(old_top - base)
            sums = state[number, 1] * shrink
            for chunk in range(0, tiles.tokens, CHUNK):
                one = values(1, chunk)
                weights = jnp.exp(one - base[None])
                sums += jnp.sum(weights, axis=0)
                weights = head.product_gradient(weights, finite_or_zero(one))
                if head.scales is not None:
                    weights *= as_registers(scales[pl.ds(chunk, CHUNK), :])
                by_token[pl.ds(chunk, CHUNK), :] = weights.reshape(CHUNK, unit_rows).astype(dtype)
            for first in range(0, tiles.tokens, UNIT):
                probability[lanes, first : first + UNIT] = by_token[first : first + UNIT, :].T
            decay[lanes, :] = jnp.broadcast_to(shrink[0:1], (LANES, unit_rows)).T
            state[number, 0], state[number, 1], state[number, 2] = top, sums, picked

        def add_mean(masked: bool, number: Any, carry: Any) -> Any:
            part = rows_of(number, columns)
            for cut, rows in enumerate(cuts(tiles)):
                limit = vocab - step * tiles.tokens
                weight = read_weight(head, tile.weight, part, scalars[cut], masked, limit, dtype)
                dimensions = (((1,), (head.vocab_axis,)), ((), ()))
                added = jax.lax.dot_general(
                    probability[rows, :], weight, dimensions, preferred_element_type=jnp.float32
                )
                mean[rows, part] = mean[rows, part] * per_row(decay[rows, :], columns) + added
            return carry

        @pl.when(block < scalars[ZEROS])
        def _active() -> None:
            @pl.when(step == 0)
            def _start() -> None:
                state[:, 0] = jnp.full((units, SUBLANES, unit_rows), NEVER, jnp.float32)
                state[:, 1:] = jnp.zeros((units, 2, SUBLANES, unit_rows), jnp.float32)
                mean[...] = jnp.zeros(mean.shape, jnp.float32)

            turn_scales(tile, scales)
            by_tile(step, vocab, tiles.tokens, lambda masked: by_unit(units, side, partial(unit, masked)))
            by_tile(step, vocab, tiles.tokens, lambda masked: loop(width // columns, partial(add_mean, masked)))

            @pl.when(step == steps - 1)
            def _finish() -> None:
                def one(number: Any, carry: Any) -> Any:
                    lanes = rows_of(number, unit_rows)
                    top, sums = over_sublanes(state[number, 0], state[number, 1])
                    out[0, 0:1, lanes] = log_of_sum(top, sums)
                    out[0, 1:2, lanes] = jnp.sum(state[number, 2], axis=0, keepdims=True)
                    decay[lanes, :] = jnp.broadcast_to(1.0 / sums, (LANES, unit_rows)).T
                    return carry

                def scale(number: Any, carry: Any) -> Any:
                    part = rows_of(number, columns)
                    mean[:, part] *= per_row(decay[...], columns)
                    return carry

                loop(units, one)
                loop(width // columns, scale)

    out, mean = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, steps),
            in_specs=[
                states_spec(head.vocab_axis == 0, head, tiles, lambda i, j: i),
                specs(head, weight_spec(head, tiles.tokens, lambda i, j: j), tiles.tokens, lambda i, j: j),
                row_spec(1, tiles, lambda i, j: i),
            ],
            out_specs=[row_spec(2, tiles, lambda i, j: i), states_spec(False, head, tiles, lambda i, j: i)],
            scratch_shapes=[
                pltpu.VMEM((side, tiles.tokens, unit_rows), jnp.float32),
                pltpu.VMEM((side, tiles.tokens, unit_rows), dtype),
                pltpu.VMEM((tiles.rows, tiles.tokens), dtype),
                pltpu.VMEM((tiles.rows, LANES), jnp.float32),
                pltpu.VMEM((units, 3, SUBLANES, unit_rows), jnp.float32),
                scratch(head, tiles.tokens, unit_rows),
            ],
        ),
        out_shape=[
            result_shape((blocks, 2, tiles.rows), jnp.float32, head),
            result_shape((total, width), jnp.float32, head),
        ],
        compiler_params=parameters(),
        interpret=interpret,
        name="fastpref_logprobs_frozen",
    )(scalar_memory(count, tiles), hidden, arrays(head, tiles.tokens), targets.reshape(blocks, 1, tiles.rows))
    lse, picked = jnp.moveaxis(out, 1, 0).reshape(2, total)
    return lse, picked, mean
