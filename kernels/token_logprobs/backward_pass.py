"""The TPU kernel of both gradients: logits are made again, tile by tile, and used for both.

A tile of the weight stays while blocks of rows pass: the weight's gradient is summed in VMEM and written once, and
float32 sums of the hidden gradient go to memory and back. The other way round it would be V rows that go instead of N.
"""

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
    read_logits,
    read_states,
    read_weight,
    row_spec,
    rows_of,
    scalar_memory,
    states_spec,
    units_at_once,
    weight_block,
    weight_bytes,
    weight_spec,
)
from ..vmem import (
    CHUNK,
    UNIT,
    product,
    tile_bytes,
    turned,
    unit_ids,
)

_VOCAB_TILES = (1024, UNIT)


def backward_bytes(head: Head, tiles: Tiles) -> int:
    """VMEM of the backward pass.

    Hidden states both ways round and the weight twice each; the weight's gradient twice, and its float32 sums; two
    buffers of float32 sums of the hidden gradient; gradients of the logits both ways round; one unit of logits.
    """
    dtype, rows, tokens, width = head.weight.dtype, tiles.rows, tiles.tokens, head.width
    states = 2 * (tile_bytes(rows, width, dtype) + tile_bytes(width, rows, dtype))
    weights = 4 * weight_bytes(head, tokens, dtype) + weight_bytes(head, tokens, jnp.float32)
    gradients = tile_bytes(rows, tokens, dtype) + tile_bytes(tokens, rows, dtype)
    return (
        states
        + weights
        + gradients
        + 2 * tile_bytes(rows, width, jnp.float32)
        + 2 * tile_bytes(UNIT, tiles.unit(head), jnp.float32)
    )


def backward_tiles(head: Head, rows: int) -> Tiles:
    """Tiles of the backward pass: 1024 tokens, which halve what goes to memory and back."""
    return choose(partial(backward_bytes, head), rows, _VOCAB_TILES, 512)


def backward(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, " N"],
    lse: Float[Array, " N"],
    coefficients: Float[Array, " N"],
    count: Int[Array, ""],
    tiles: Tiles,
    interpret: Any,
) -> tuple[Float[Array, "N D"], Array]:
    """Gradients of Σ coefficient · log-prob in the hidden states, float32 over this device's slice, and in the weight.

    Args:
      hidden: states; N a multiple of `tiles.rows`.
      head: the map to logits.
      targets: ids counted from the beginning of the slice.
      lse: log-sum-exps over the whole vocabulary; anything finite for rows that do not count.
      coefficients: 0 for rows that do not count.
      count: rows that count. Gradients of blocks without any are anything.
      tiles: the blocks.
      interpret: Pallas's.
    """
    total, vocab, width, dtype = targets.shape[0], head.slice_size, head.width, head.weight.dtype
    steps, blocks = -(-vocab // tiles.tokens), total // tiles.rows
    unit_rows, columns = tiles.unit(head), columns_of(width, tiles)
    lane_blocks = tiles.rows // unit_rows
    units = tiles.tokens // UNIT * lane_blocks
    side = units_at_once(head, units)

    def kernel(
        scalars: Any, states: Any, states_turned: Any, weight: Any, target: Any, row_lse: Any, coefficient: Any,
        hidden_out: Any, weight_out: Any,
        buffers: Any, gradient: Any, by_token: Any, weight_sum: Any, hidden_sum: Any, reads: Any, writes: Any,
    ) -> None:  # fmt: skip
        step, block = pl.program_id(0), pl.program_id(1)
        active = scalars[ZEROS]
        alone = active == 1
        visit = step * active + block
        slot = jnp.where(alone, 0, visit % 2)
        last = (step == steps - 1) & (block == active - 1)

        def read(block: Any, slot: Any) -> Any:
            return pltpu.make_async_copy(hidden_out.at[rows_of(block, tiles.rows)], hidden_sum.at[slot], reads.at[slot])

        def write(block: Any, slot: Any) -> Any:
            return pltpu.make_async_copy(
                hidden_sum.at[slot], hidden_out.at[rows_of(block, tiles.rows)], writes.at[slot]
            )

        def unit(masked: bool, number: Any, place: int) -> None:
            lanes, logits = rows_of(number % lane_blocks, unit_rows), buffers.at[place]
            first = pl.multiple_of(number // lane_blocks * UNIT, UNIT)
            wanted = (target[0, 0:1, lanes] - (step * tiles.tokens + first)).reshape(1, 1, unit_rows)
            lses = row_lse[0, 0:1, lanes].reshape(1, 1, unit_rows)
            scales = coefficient[0, 0:1, lanes].reshape(1, 1, unit_rows)
            ids = unit_ids(unit_rows)
            product(
                head,
                weight,
                first,
                read_states(head, tiles, states_turned if head.vocab_axis == 0 else states, lanes, scalars),
                logits,
            )
            for chunk in range(0, UNIT, CHUNK):
                values = read_logits(head, logits, scalars[0], chunk)
                probability = jnp.exp(values - lses)
                if masked:
                    inside = ids + chunk < vocab - (step * tiles.tokens + first)
                    probability = jnp.where(inside, probability, 0.0)
                one = scales * ((ids + chunk == wanted).astype(jnp.float32) - probability)
                one = head.product_gradient(one, jnp.where(inside, values, 0.0) if masked else values)
                by_token[pl.ds(first + chunk, CHUNK), lanes] = one.reshape(CHUNK, unit_rows).astype(dtype)
            gradient[lanes, pl.ds(first, UNIT)] = turned(by_token[pl.ds(first, UNIT), lanes])

        def add_weight(number: Any, carry: Any) -> Any:
            part = rows_of(number, columns)
            if head.vocab_axis == 0:
                weight_sum[:, part] += jnp.dot(by_token[...], states[:, part], preferred_element_type=jnp.float32)
            else:
                weight_sum[part, :] += jnp.dot(
                    states_turned[part, :], gradient[...], preferred_element_type=jnp.float32
                )
            return carry

        def add_hidden(masked: bool, number: Any, carry: Any) -> Any:
            part = rows_of(number, columns)
            for cut, rows in enumerate(cuts(tiles)):
                tile = read_weight(head, weight, part, scalars[cut], masked, vocab - step * tiles.tokens, dtype)
                dimensions = (((1,), (head.vocab_axis,)), ((), ()))
                hidden_sum[slot, rows, part] += jax.lax.dot_general(
                    gradient[rows, :], tile, dimensions, preferred_element_type=jnp.float32
                )
            return carry

        @pl.when(block < active)
        def _active() -> None:
            by_tile(step, vocab, tiles.tokens, lambda masked: by_unit(units, side, partial(unit, masked)))

            # Sums of the hidden gradient rest in memory between tiles of the vocabulary. Those of the next block are
            # fetched while this one is worked on, into the buffer that the block before has just left.
            @pl.when(jnp.logical_not(alone) & (visit > 0))
            def _left() -> None:
                write(jnp.where(block == 0, active, block) - 1, 1 - slot).wait()

            following = jnp.where(block + 1 < active, block + 1, 0)
            begun = (step > 0) | (block + 1 == active)

            @pl.when(jnp.logical_not(alone | last) & begun)
            def _fetch() -> None:
                read(following, 1 - slot).start()

            @pl.when(block == 0)
            def _clear_weight() -> None:
                weight_sum[...] = jnp.zeros(weight_sum.shape, jnp.float32)

            loop(width // columns, add_weight)

            @pl.when(jnp.logical_not(alone) & (step > 0))
            def _fetched() -> None:
                read(block, slot).wait()

            @pl.when(step == 0)
            def _clear_hidden() -> None:
                hidden_sum[slot] = jnp.zeros(hidden_sum.shape[1:], jnp.float32)

            by_tile(step, vocab, tiles.tokens, lambda masked: loop(width // columns, partial(add_hidden, masked)))

            @pl.when(jnp.logical_not(alone) | last)
            def _leave() -> None:
                write(block, slot).start()

            @pl.when(last)
            def _end() -> None:
                write(block, slot).wait()

            @pl.when(block == active - 1)
            def _finish() -> None:
                weight_out[...] = weight_sum[...].astype(dtype)

    weight_tile = weight_spec(head, tiles.tokens, lambda j, i: j)
    row = row_spec(1, tiles, lambda j, i: i)
    by_block = [array.reshape(blocks, 1, tiles.rows) for array in (targets, lse, coefficients)]
    gradients: tuple[Array, Array] = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps, blocks),
            in_specs=[
                states_spec(False, head, tiles, lambda j, i: i),
                states_spec(True, head, tiles, lambda j, i: i),
                weight_tile, row, row, row,
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), weight_tile],
            scratch_shapes=[
                pltpu.VMEM((side, UNIT, unit_rows), jnp.float32),
                pltpu.VMEM((tiles.rows, tiles.tokens), dtype),
                pltpu.VMEM((tiles.tokens, tiles.rows), dtype),
                pltpu.VMEM(weight_block(head, tiles.tokens), jnp.float32),
                pltpu.VMEM((2, tiles.rows, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            result_shape((total, width), jnp.float32, head),
            result_shape(head.weight.shape, dtype, head),
        ],
        compiler_params=parameters(),
        interpret=interpret,
        name="fastpref_logprobs_backward",
    )(scalar_memory(count, tiles), hidden, turned(hidden), head.weight, *by_block)  # fmt: skip
    return gradients
