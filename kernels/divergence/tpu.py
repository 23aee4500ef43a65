"""KL and entropy for TPUs: a block of rows stays, both heads stream by, sums run along in the result.

What binds it, compiled for a v5e, are the products, one for each model: the exponentials and sums of a pair of units
lie under them. A result keeps one set of sums for each sublane, so that nothing crosses sublanes in the kernel; plain
JAX brings the eight together, and then those of other devices.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from ..head import Head
from ..slices import result_shape, vary_alike
from ..streams import arrays, scratch, specs, stream_bytes, turn_scales
from ..tiles import (
    ZEROS,
    Compacted,
    Tiles,
    by_tile,
    by_unit,
    choose,
    oriented,
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
from ..vmem import CHUNK, LANES, NEVER, SUBLANES, UNIT, finite_or_zero, product, tile_bytes, unit_ids
from .forward_only import forward_only
from .sums import FIELDS, Divergence, Sums, finish, moved, over_parts, over_slices, terms


@forward_only
def divergence(
    hidden: Float[Array, "N Dp"],
    head: Head,
    ref_hidden: Float[Array, "N Dr"],
    ref_head: Head,
    *,
    where: Bool[Array, " N"],
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Divergence:
    """`fastpref.kernels.divergence`; `tiles` overrides the blocks, `interpret` is Pallas's."""
    tiles = tiles or divergence_tiles(head, ref_head, (hidden.dtype, ref_hidden.dtype), hidden.shape[0])
    shared, rows = head.same_map(ref_head), Compacted.of(where, tiles.rows)
    # As in `token_logprobs`, XLA gathers, masks and transposes in one pass.
    counts = jnp.arange(rows.order.shape[0])[:, None] < rows.total
    states, ref_states = (
        oriented(jnp.where(counts, rows.take(values), 0), model)
        for values, model in ((hidden, head), (ref_hidden, ref_head))
    )
    states, head, ref_states, ref_head, count = vary_alike(states, head, ref_states, ref_head, rows.total)
    sums = divergence_sums(states, head, ref_states, head if shared else ref_head, count, tiles, interpret)
    return Divergence(*(rows.put(values) for values in finish(over_slices(head, sums))))


def streamed(head: Head, ref_head: Head) -> list[Head]:
    """The heads that are read: one where both are the same."""
    return [head] if head.same_map(ref_head) else [head, ref_head]


def unit_rows(head: Head, ref_head: Head, tiles: Tiles) -> int:
    """Rows of a unit, the same for both models."""
    return min(tiles.unit(head), tiles.unit(ref_head))


def pairs_at_once(head: Head, ref_head: Head, tiles: Tiles) -> int:
    """Pairs of units that stand in one straight piece of code."""
    units = tiles.rows // unit_rows(head, ref_head, tiles)
    return min(units_at_once(model, units) for model in (head, ref_head))


def divergence_bytes(head: Head, ref_head: Head, dtypes: tuple[Any, Any], tiles: Tiles) -> int:
    """VMEM of the kernel: hidden states, weights and results twice each, a unit of logits of each model."""
    widths, rows = (head.width, ref_head.width), unit_rows(head, ref_head, tiles)
    states = sum(tile_bytes(width, tiles.rows, dtype) for width, dtype in zip(widths, dtypes, strict=True))
    weights = sum(stream_bytes(model, tiles.tokens, rows) for model in streamed(head, ref_head))
    results = tile_bytes(FIELDS * SUBLANES, tiles.rows, jnp.float32)
    unit = tile_bytes(UNIT, rows, jnp.float32)
    return 2 * (states + results + pairs_at_once(head, ref_head, tiles) * unit) + weights


def divergence_tiles(head: Head, ref_head: Head, dtypes: tuple[Any, Any], rows: int) -> Tiles:
    """Tiles of the kernel: one unit of tokens. Heads that lie differently have only units of 128 rows in common."""
    columns = None if head.vocab_axis == ref_head.vocab_axis else LANES
    return choose(partial(divergence_bytes, head, ref_head, dtypes), rows, (UNIT,), 1024, columns)


def divergence_sums(
    hidden: Float[Array, "..."],
    head: Head,
    ref_hidden: Float[Array, "..."],
    ref_head: Head,
    count: Int[Array, ""],
    tiles: Tiles,
    interpret: Any,
) -> Sums:
    """Sums over this device's slice of the vocabulary, [N] each.

    Args:
      hidden: [D, N] for a [V, D] weight, [N, D] for a [D, V] one; N a multiple of `tiles.rows`.
      head: the policy's map to logits.
      ref_hidden: of the reference, likewise.
      ref_head: the same object where both models have one head, which is then read once.
      count: rows that count; results of the others are anything.
      tiles: the blocks.
      interpret: Pallas's.
    """
    total, vocab = hidden.shape[1 - head.vocab_axis], head.slice_size
    steps, blocks, heads = -(-vocab // UNIT), total // tiles.rows, streamed(head, ref_head)
    width, side = unit_rows(head, ref_head, tiles), pairs_at_once(head, ref_head, tiles)

    def kernel(scalars: Any, states: Any, ref_states: Any, *refs: Any) -> None:
        streams, (out, buffers, *scales) = refs[: len(heads)], refs[len(heads) :]
        block, step = pl.program_id(0), pl.program_id(1)

        def unit(masked: bool, number: Any, place: int) -> None:
            lanes, ids, logits = rows_of(number, width), unit_ids(width), buffers.at[place]
            models = (
                (head, states, streams[0].weight, logits.at[0], scales[0]),
                (ref_head, ref_states, streams[-1].weight, logits.at[1], scales[-1]),
            )
            for model, rows, weight, buffer, by_token in models:
                product(model, weight, 0, read_states(model, tiles, rows, lanes, scalars), buffer, by_token)

            def values(again: int, chunk: int) -> list[Array]:
                both = [read_logits(model, buffer, scalars[again], chunk) for model, _, _, buffer, _ in models]
                inside = ids + chunk < vocab - step * UNIT
                return [jnp.where(inside, one, NEVER) for one in both] if masked else both

            old = Sums(*(out[0, field_rows(field), lanes] for field in range(FIELDS)))
            tops = list(old[:2])
            for chunk in range(0, UNIT, CHUNK):
                tops = [jnp.maximum(top, jnp.max(one, axis=0)) for top, one in zip(tops, values(0, chunk), strict=True)]
            bases = [finite_or_zero(top)[None] for top in tops]
            # A tile is summed for itself: beside one likely token, the others of all tiles would be lost one by one.
            sums = [jnp.zeros((SUBLANES, width), jnp.float32)] * (FIELDS - 2)
            for chunk in range(0, UNIT, CHUNK):
                added = terms(*values(1, chunk), *bases)
                sums = [one + jnp.sum(part, axis=0) for one, part in zip(sums, added, strict=True)]
            before = moved(old, *tops)[2:]
            for field, value in enumerate((*tops, *(one + two for one, two in zip(before, sums, strict=True)))):
                out[0, field_rows(field), lanes] = value

        @pl.when(block < scalars[ZEROS])
        def _active() -> None:
            @pl.when(step == 0)
            def _start() -> None:
                field = jax.lax.broadcasted_iota(jnp.int32, out.shape[1:], 0) // SUBLANES
                out[0] = jnp.where(field < 2, NEVER, 0.0)

            for tile, by_token in zip(streams, scales, strict=True):
                turn_scales(tile, by_token)
            by_tile(step, vocab, UNIT, lambda masked: by_unit(tiles.rows // width, side, partial(unit, masked)))

    sums = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, steps),
            in_specs=[
                *(states_spec(model.vocab_axis == 0, model, tiles, lambda i, j: i) for model in (head, ref_head)),
                *(specs(model, weight_spec(model, UNIT, lambda i, j: j), UNIT, lambda i, j: j) for model in heads),
            ],
            out_specs=row_spec(FIELDS * SUBLANES, tiles, lambda i, j: i),
            scratch_shapes=[
                pltpu.VMEM((side, 2, UNIT, width), jnp.float32),
                *(scratch(model, UNIT, width) for model in heads),
            ],
        ),
        out_shape=result_shape((blocks, FIELDS * SUBLANES, tiles.rows), jnp.float32, head),
        compiler_params=parameters(),
        interpret=interpret,
        name="fastpref_divergence",
    )(scalar_memory(count, tiles), hidden, ref_hidden, *(arrays(model, UNIT) for model in heads))
    return over_parts(Sums(*jnp.moveaxis(sums, 1, 0).reshape(FIELDS, SUBLANES, total)))


def field_rows(field: int) -> slice:
    """Rows of the result that hold a field, one for each sublane."""
    return slice(field * SUBLANES, (field + 1) * SUBLANES)
