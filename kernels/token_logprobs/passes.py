"""The three TPU kernels behind token log-probs: forward, backward, and both at once for a frozen head.

Rows are compacted before they come here: the first `count` of them count, and blocks of rows behind those are skipped.
What binds each, compiled for a v5e, is the matrix unit: elementwise work on a unit's logits lies under its product
(see `fastpref.kernels.vmem`).

Tried and rejected: a block of rows as the outer loop of the backward pass, where the weight's float32 gradient is what
goes to memory and back (V rows instead of N); products of 512 columns, whose sums fill the registers (200 to 700
spills each, none at 128); a tile size that divides V, which V = 251 · 128 would make 128: the last tile overhangs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from fastpref.kernels.head import Head
from fastpref.kernels.slices import result_shape
from fastpref.kernels.vmem import (
    CHUNK,
    LANES,
    NEVER,
    PARTS,
    SUBLANES,
    UNIT,
    as_registers,
    finite_or_zero,
    log_of_sum,
    opaque_zeros,
    over_sublanes,
    product,
    tile_bytes,
    unit_ids,
    vmem_limit,
)
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

_ZEROS = max(PARTS)
_ROW_BLOCKS = (1024, 512, 256, LANES)
_VOCAB_TILES = (1024, UNIT)
_COLUMNS = 128
"""Columns of D that one product of a gradient makes."""
_NARROW = 2048
"""Below this D a unit's product is too short to cover the work on its logits."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks that a kernel works on."""

    rows: int
    """Rows of hidden states: a multiple of 128."""
    tokens: int
    """Rows of the head: a multiple of 512."""


def forward_bytes(head: Head, tiles: Tiles) -> int:
    """VMEM of the forward pass: hidden states and weights twice each, one unit of logits, running results."""
    dtype = head.weight.dtype
    blocks = 2 * tile_bytes(head.width, tiles.rows, dtype) + 2 * _weight_bytes(head, tiles.tokens, dtype)
    return blocks + 2 * tile_bytes(UNIT, LANES, jnp.float32) + tile_bytes(3 * SUBLANES, tiles.rows, jnp.float32)


def backward_bytes(head: Head, tiles: Tiles) -> int:
    """VMEM of the backward pass.

    Hidden states both ways round and the weight twice each; the weight's gradient twice, and its float32 sums; two
    buffers of float32 sums of the hidden gradient; gradients of the logits both ways round; one unit of logits.
    """
    dtype, rows, tokens, width = head.weight.dtype, tiles.rows, tiles.tokens, head.width
    states = 2 * (tile_bytes(rows, width, dtype) + tile_bytes(width, rows, dtype))
    weights = 4 * _weight_bytes(head, tokens, dtype) + _weight_bytes(head, tokens, jnp.float32)
    gradients = tile_bytes(rows, tokens, dtype) + tile_bytes(tokens, rows, dtype)
    return (
        states
        + weights
        + gradients
        + 2 * tile_bytes(rows, width, jnp.float32)
        + 2 * tile_bytes(UNIT, LANES, jnp.float32)
    )


def frozen_bytes(head: Head, tiles: Tiles) -> int:
    """VMEM of the frozen form: hidden states, weights and means twice each, probabilities, two columns of logits."""
    dtype, rows, tokens, width = head.weight.dtype, tiles.rows, tiles.tokens, head.width
    blocks = 2 * (tile_bytes(width, rows, dtype) + _weight_bytes(head, tokens, dtype))
    outputs = 2 * tile_bytes(rows, width, jnp.float32) + tile_bytes(rows, LANES, jnp.float32)
    column = tile_bytes(tokens, LANES, jnp.float32) + tile_bytes(tokens, LANES, dtype)
    scratch = 2 * column + tile_bytes(rows, tokens, dtype)
    return blocks + outputs + scratch + tile_bytes(3 * SUBLANES, rows, jnp.float32)


def choose(bytes_of: Any, head: Head, rows: int, tokens: tuple[int, ...], largest: int) -> Tiles:
    """The largest tiles that the VMEM at hand holds, more tokens before more rows, no larger than the problem."""
    needed = -(-rows // LANES) * LANES
    for tile in tokens:
        for block in _ROW_BLOCKS:
            tiles = Tiles(min(block, needed), tile)
            if block <= largest and bytes_of(head, tiles) <= vmem_limit():
                return tiles
    return Tiles(LANES, UNIT)


def forward_tiles(head: Head, rows: int) -> Tiles:
    """Tiles of the forward pass: one unit of tokens, since a step costs little beside eight units of rows."""
    return choose(forward_bytes, head, rows, (UNIT,), 1024)


def backward_tiles(head: Head, rows: int) -> Tiles:
    """Tiles of the backward pass: 1024 tokens, which halve what goes to memory and back."""
    return choose(backward_bytes, head, rows, _VOCAB_TILES, 512)


def frozen_tiles(head: Head, rows: int) -> Tiles:
    """Tiles of the frozen form."""
    return choose(frozen_bytes, head, rows, _VOCAB_TILES, 512)


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
    steps, blocks, units = -(-vocab // tiles.tokens), total // tiles.rows, tiles.rows // LANES
    side = _side(head, units)

    def kernel(scalars: Any, states: Any, weight: Any, target: Any, out: Any, buffers: Any, state: Any) -> None:
        block, step = pl.program_id(0), pl.program_id(1)

        def unit(masked: bool, number: Any, place: int) -> None:
            lanes, logits = _lanes(number), buffers.at[place]
            wanted = (target[0, 0:1, lanes] - step * UNIT).reshape(1, 1, LANES)
            ids = unit_ids(LANES)
            product(head, weight, 0, _read(head, states, lanes, scalars), logits)

            def values(again: int, chunk: int) -> Array:
                shaped = _logits(head, logits, scalars[again], chunk)
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

        @pl.when(block < scalars[_ZEROS])
        def _active() -> None:
            @pl.when(step == 0)
            def _start() -> None:
                state[:, 0] = jnp.full((units, SUBLANES, LANES), NEVER, jnp.float32)
                state[:, 1:] = jnp.zeros((units, 2, SUBLANES, LANES), jnp.float32)

            _by_tile(step, vocab, UNIT, lambda masked: _by_side(units, side, partial(unit, masked)))

            @pl.when(step == steps - 1)
            def _finish() -> None:
                def one(number: Any, carry: Any) -> Any:
                    lanes = _lanes(number)
                    out[0, 0:1, lanes] = log_of_sum(*over_sublanes(state[number, 0], state[number, 1]))
                    out[0, 1:2, lanes] = jnp.sum(state[number, 2], axis=0, keepdims=True)
                    return carry

                _loop(units, one)

    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, steps),
            in_specs=[
                _states_spec(head.vocab_axis == 0, head, tiles, lambda i, j: i),
                _weight_spec(head, tiles.tokens, lambda i, j: j),
                _row_spec(1, tiles, lambda i, j: i),
            ],
            out_specs=_row_spec(2, tiles, lambda i, j: i),
            scratch_shapes=[
                pltpu.VMEM((side, UNIT, LANES), jnp.float32),
                pltpu.VMEM((units, 3, SUBLANES, LANES), jnp.float32),
            ],
        ),
        out_shape=result_shape((blocks, 2, tiles.rows), jnp.float32, head),
        compiler_params=_parameters(),
        interpret=interpret,
        name="fastpref_logprobs_forward",
    )(_scalars(count, tiles), hidden, head.weight, targets.reshape(blocks, 1, tiles.rows))
    lse, picked = jnp.moveaxis(out, 1, 0).reshape(2, total)
    return lse, picked


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
    lane_blocks, columns = tiles.rows // LANES, _columns(width)
    units = tiles.tokens // UNIT * lane_blocks
    side = _side(head, units)

    def kernel(
        scalars: Any, states: Any, turned: Any, weight: Any, target: Any, row_lse: Any, coefficient: Any,
        hidden_out: Any, weight_out: Any,
        buffers: Any, gradient: Any, by_token: Any, weight_sum: Any, hidden_sum: Any, reads: Any, writes: Any,
    ) -> None:  # fmt: skip
        step, block = pl.program_id(0), pl.program_id(1)
        active = scalars[_ZEROS]
        alone = active == 1
        visit = step * active + block
        slot = jnp.where(alone, 0, visit % 2)
        last = (step == steps - 1) & (block == active - 1)

        def read(block: Any, slot: Any) -> Any:
            return pltpu.make_async_copy(hidden_out.at[_rows(block, tiles.rows)], hidden_sum.at[slot], reads.at[slot])

        def write(block: Any, slot: Any) -> Any:
            return pltpu.make_async_copy(hidden_sum.at[slot], hidden_out.at[_rows(block, tiles.rows)], writes.at[slot])

        def unit(masked: bool, number: Any, place: int) -> None:
            lanes, logits = _lanes(number % lane_blocks), buffers.at[place]
            first = pl.multiple_of(number // lane_blocks * UNIT, UNIT)
            wanted = (target[0, 0:1, lanes] - (step * tiles.tokens + first)).reshape(1, 1, LANES)
            lses = row_lse[0, 0:1, lanes].reshape(1, 1, LANES)
            scales = coefficient[0, 0:1, lanes].reshape(1, 1, LANES)
            ids = unit_ids(LANES)
            product(
                head, weight, first, _read(head, turned if head.vocab_axis == 0 else states, lanes, scalars), logits
            )
            for chunk in range(0, UNIT, CHUNK):
                values = _logits(head, logits, scalars[0], chunk)
                probability = jnp.exp(values - lses)
                if masked:
                    inside = ids + chunk < vocab - (step * tiles.tokens + first)
                    probability = jnp.where(inside, probability, 0.0)
                one = scales * ((ids + chunk == wanted).astype(jnp.float32) - probability)
                one = head.product_gradient(one, jnp.where(inside, values, 0.0) if masked else values)
                by_token[pl.ds(first + chunk, CHUNK), lanes] = one.reshape(CHUNK, LANES).astype(dtype)
            gradient[lanes, pl.ds(first, UNIT)] = by_token[pl.ds(first, UNIT), lanes].T

        def add_weight(number: Any, carry: Any) -> Any:
            part = _rows(number, columns)
            if head.vocab_axis == 0:
                weight_sum[:, part] += jnp.dot(by_token[...], states[:, part], preferred_element_type=jnp.float32)
            else:
                weight_sum[part, :] += jnp.dot(turned[part, :], gradient[...], preferred_element_type=jnp.float32)
            return carry

        def add_hidden(masked: bool, number: Any, carry: Any) -> Any:
            part = _rows(number, columns)
            for half, rows in enumerate(_halves(tiles.rows)):
                tile = _weight_part(head, weight, part, scalars[half], masked, vocab - step * tiles.tokens)
                dimensions = (((1,), (head.vocab_axis,)), ((), ()))
                hidden_sum[slot, rows, part] += jax.lax.dot_general(
                    gradient[rows, :], tile, dimensions, preferred_element_type=jnp.float32
                )
            return carry

        @pl.when(block < active)
        def _active() -> None:
            _by_tile(step, vocab, tiles.tokens, lambda masked: _by_side(units, side, partial(unit, masked)))

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

            _loop(width // columns, add_weight)

            @pl.when(jnp.logical_not(alone) & (step > 0))
            def _fetched() -> None:
                read(block, slot).wait()

            @pl.when(step == 0)
            def _clear_hidden() -> None:
                hidden_sum[slot] = jnp.zeros(hidden_sum.shape[1:], jnp.float32)

            _by_tile(step, vocab, tiles.tokens, lambda masked: _loop(width // columns, partial(add_hidden, masked)))

            @pl.when(jnp.logical_not(alone) | last)
            def _leave() -> None:
                write(block, slot).start()

            @pl.when(last)
            def _end() -> None:
                write(block, slot).wait()

            @pl.when(block == active - 1)
            def _finish() -> None:
                weight_out[...] = weight_sum[...].astype(dtype)

    weight_block = _weight_spec(head, tiles.tokens, lambda j, i: j)
    row = _row_spec(1, tiles, lambda j, i: i)
    by_block = [array.reshape(blocks, 1, tiles.rows) for array in (targets, lse, coefficients)]
    gradients: tuple[Array, Array] = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps, blocks),
            in_specs=[
                _states_spec(False, head, tiles, lambda j, i: i),
                _states_spec(True, head, tiles, lambda j, i: i),
                weight_block, row, row, row,
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), weight_block],
            scratch_shapes=[
                pltpu.VMEM((side, UNIT, LANES), jnp.float32),
                pltpu.VMEM((tiles.rows, tiles.tokens), dtype),
                pltpu.VMEM((tiles.tokens, tiles.rows), dtype),
                pltpu.VMEM(_weight_block(head, tiles.tokens), jnp.float32),
                pltpu.VMEM((2, tiles.rows, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            result_shape((total, width), jnp.float32, head),
            result_shape(head.weight.shape, dtype, head),
        ],
        compiler_params=_parameters(),
        interpret=interpret,
        name="fastpref_logprobs_backward",
    )(_scalars(count, tiles), hidden, hidden.T, head.weight, *by_block)  # fmt: skip
    return gradients


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
    total, vocab, width, dtype = targets.shape[0], head.slice_size, head.width, head.weight.dtype
    steps, blocks = -(-vocab // tiles.tokens), total // tiles.rows
    units, columns = tiles.rows // LANES, _columns(width)
    side = _side(head, units)

    def kernel(
        scalars: Any, states: Any, weight: Any, target: Any, out: Any, mean: Any,
        buffers: Any, by_tokens: Any, probability: Any, decay: Any, state: Any,
    ) -> None:  # fmt: skip
        block, step = pl.program_id(0), pl.program_id(1)

        def unit(masked: bool, number: Any, place: int) -> None:
            lanes, logits, by_token = _lanes(number), buffers.at[place], by_tokens.at[place]
            wanted = (target[0, 0:1, lanes] - step * tiles.tokens).reshape(1, 1, LANES)
            ids = unit_ids(LANES)
            for first in range(0, tiles.tokens, UNIT):
                buffer = logits.at[first : first + UNIT, :]
                product(head, weight, first, _read(head, states, lanes, scalars), buffer)

            def values(again: int, chunk: int) -> Array:
                shaped = _logits(head, logits, scalars[again], chunk)
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
                by_token[pl.ds(chunk, CHUNK), :] = weights.reshape(CHUNK, LANES).astype(dtype)
            for first in range(0, tiles.tokens, UNIT):
                probability[lanes, first : first + UNIT] = by_token[first : first + UNIT, :].T
            decay[lanes, :] = jnp.broadcast_to(shrink[0:1], (LANES, LANES)).T
            state[number, 0], state[number, 1], state[number, 2] = top, sums, picked

        def add_mean(masked: bool, number: Any, carry: Any) -> Any:
            part = _rows(number, columns)
            for half, rows in enumerate(_halves(tiles.rows)):
                tile = _weight_part(head, weight, part, scalars[half], masked, vocab - step * tiles.tokens)
                dimensions = (((1,), (head.vocab_axis,)), ((), ()))
                added = jax.lax.dot_general(probability[rows, :], tile, dimensions, preferred_element_type=jnp.float32)
                mean[rows, part] = mean[rows, part] * _column(decay[rows, :], columns) + added
            return carry

        @pl.when(block < scalars[_ZEROS])
        def _active() -> None:
            @pl.when(step == 0)
            def _start() -> None:
                state[:, 0] = jnp.full((units, SUBLANES, LANES), NEVER, jnp.float32)
                state[:, 1:] = jnp.zeros((units, 2, SUBLANES, LANES), jnp.float32)
                mean[...] = jnp.zeros(mean.shape, jnp.float32)

            _by_tile(step, vocab, tiles.tokens, lambda masked: _by_side(units, side, partial(unit, masked)))
            _by_tile(step, vocab, tiles.tokens, lambda masked: _loop(width // columns, partial(add_mean, masked)))

            @pl.when(step == steps - 1)
            def _finish() -> None:
                def one(number: Any, carry: Any) -> Any:
                    lanes = _lanes(number)
                    top, sums = over_sublanes(state[number, 0], state[number, 1])
                    out[0, 0:1, lanes] = log_of_sum(top, sums)
                    out[0, 1:2, lanes] = jnp.sum(state[number, 2], axis=0, keepdims=True)
                    decay[lanes, :] = jnp.broadcast_to(1.0 / sums, (LANES, LANES)).T
                    return carry

                def scale(number: Any, carry: Any) -> Any:
                    part = _rows(number, columns)
                    mean[:, part] *= _column(decay[...], columns)
                    return carry

                _loop(units, one)
                _loop(width // columns, scale)

    out, mean = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, steps),
            in_specs=[
                _states_spec(head.vocab_axis == 0, head, tiles, lambda i, j: i),
                _weight_spec(head, tiles.tokens, lambda i, j: j),
                _row_spec(1, tiles, lambda i, j: i),
            ],
            out_specs=[_row_spec(2, tiles, lambda i, j: i), _states_spec(False, head, tiles, lambda i, j: i)],
            scratch_shapes=[
                pltpu.VMEM((side, tiles.tokens, LANES), jnp.float32),
                pltpu.VMEM((side, tiles.tokens, LANES), dtype),
                pltpu.VMEM((tiles.rows, tiles.tokens), dtype),
                pltpu.VMEM((tiles.rows, LANES), jnp.float32),
                pltpu.VMEM((units, 3, SUBLANES, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            result_shape((blocks, 2, tiles.rows), jnp.float32, head),
            result_shape((total, width), jnp.float32, head),
        ],
        compiler_params=_parameters(),
        interpret=interpret,
        name="fastpref_logprobs_frozen",
    )(_scalars(count, tiles), hidden, head.weight, targets.reshape(blocks, 1, tiles.rows))
    lse, picked = jnp.moveaxis(out, 1, 0).reshape(2, total)
    return lse, picked, mean


def _weight_bytes(head: Head, tokens: int, dtype: Any) -> int:
    return tile_bytes(*_weight_block(head, tokens), dtype)


def _columns(width: int) -> int:
    return _COLUMNS if width % _COLUMNS == 0 else width


def _halves(rows: int) -> list[slice]:
    """Rows in two parts: the sums of one product are then 32 registers."""
    return [slice(0, rows // 2), slice(rows // 2, rows)]


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit())


def _scalars(count: Int[Array, ""], tiles: Tiles) -> Int[Array, " S"]:
    """Zeros, and the number of blocks with rows that count."""
    active = jnp.maximum(-(-count // tiles.rows), 1)
    return jnp.concatenate([opaque_zeros(_ZEROS), active[None]])


def _clamp(block: Any, scalars: Any) -> Any:
    """Blocks that are skipped ask for the last one that is not, which is there already."""
    return jnp.minimum(block, scalars[_ZEROS] - 1)


def _states_spec(turned: bool, head: Head, tiles: Tiles, block: Any) -> pl.BlockSpec:
    if turned:
        return pl.BlockSpec((head.width, tiles.rows), lambda *at: (0, _clamp(block(*at[:2]), at[2])))
    return pl.BlockSpec((tiles.rows, head.width), lambda *at: (_clamp(block(*at[:2]), at[2]), 0))


def _row_spec(fields: int, tiles: Tiles, block: Any) -> pl.BlockSpec:
    return pl.BlockSpec((1, fields, tiles.rows), lambda *at: (_clamp(block(*at[:2]), at[2]), 0, 0))


def _weight_block(head: Head, tokens: int) -> tuple[int, int]:
    return (tokens, head.width) if head.vocab_axis == 0 else (head.width, tokens)


def _weight_spec(head: Head, tokens: int, tile: Any) -> pl.BlockSpec:
    def at(*index: Any) -> tuple[Any, Any]:
        number = tile(*index[:2])
        return (number, 0) if head.vocab_axis == 0 else (0, number)

    return pl.BlockSpec(_weight_block(head, tokens), at)


def _lanes(number: Any) -> Any:
    return _rows(number, LANES)


def _rows(number: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(number * size, size), size)


def _loop(count: int, body: Any) -> None:
    jax.lax.fori_loop(0, count, body, None)


def _side(head: Head, units: int) -> int:
    """Units that stand in one straight piece of code, each product beside the work on the logits before it."""
    return 2 if head.width < _NARROW and units % 2 == 0 else 1


def _by_side(units: int, side: int, unit: Any) -> None:
    """Call `unit(number, place)` for every unit, `side` of them at a time, each place with buffers of its own."""

    def several(number: Any, carry: Any) -> Any:
        for place in range(side):
            unit(number * side + place, place)
        return carry

    _loop(units // side, several)


def _by_tile(step: Any, vocab: int, tokens: int, work: Any) -> None:
    """Do `work(masked)`: masked in a last tile that overhangs the vocabulary."""
    steps = -(-vocab // tokens)
    if steps > 1 or vocab % tokens == 0:
        pl.when(step < vocab // tokens)(partial(work, False))
    if vocab % tokens:
        pl.when(step == steps - 1)(partial(work, True))


def _read(head: Head, states: Any, lanes: Any, scalars: Any) -> list[Array]:
    """LANES rows of hidden states, read anew for every part of a unit's product."""
    if head.vocab_axis == 0:
        return [states[pl.ds(pl.multiple_of(scalars[part], LANES), head.width), lanes] for part in range(PARTS[0])]
    return [states[pl.ds(pl.multiple_of(lanes.start + scalars[part], LANES), LANES), :] for part in range(PARTS[1])]


def _logits(head: Head, logits: Any, again: Any, chunk: int) -> Array:
    return head.shape_logits(as_registers(logits[pl.ds(pl.multiple_of(again, UNIT) + chunk, CHUNK), :]))


def _weight_part(head: Head, weight: Any, part: Any, again: Any, masked: bool, limit: Any) -> Array:
    """These columns of the tile, read anew; rows at and past the limit are zero, whatever lies there."""
    again = pl.multiple_of(again, LANES)
    tile: Array
    if head.vocab_axis == 0:
        tile = weight[pl.ds(again, weight.shape[0]), part]
    else:
        tile = weight[pl.ds(pl.multiple_of(part.start + again, SUBLANES), part.size), :]
    if masked:
        ids = jax.lax.broadcasted_iota(jnp.int32, tile.shape, head.vocab_axis)
        tile = jnp.where(ids < limit, tile, jnp.zeros_like(tile))
    return tile


def _column(by_row: Array, columns: int) -> Array:
    """One number per row, to multiply `columns` columns: as it lies where that is a register's width."""
    return by_row if columns == LANES else by_row[:, 0:1]
