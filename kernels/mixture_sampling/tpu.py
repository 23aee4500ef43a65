"""The draw for TPUs: both heads stream through VMEM once, and logits never leave it.

What binds it, compiled for a v5e: the stream of weights up to B = 128 at every width, the products from B = 256 on; of
heads in int8, which are half of the bytes, the products at every B for [V, D] and the stream up to B = 64 for [D, V].
The noise is made outside, since grouping leaves V/512 + 512 numbers a row, and the noise within a group is the same
array for all groups. Everything between the two products and the running results is elementwise in the layout of
`fastpref.kernels.vmem`, and lies under the products.

Tried and rejected: logits as [rows, tokens], whose maxima and sums go across lanes; all of a unit's logits in
registers (500 spills a tile); the work on one tile beside the products of the next, in two scratch buffers (10 % more
instructions, 240 spills); hidden states as [rows, D], which the matrix unit must transpose while it loads them.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from ..head import Head
from ..noise import gumbel, row_keys
from ..slices import result_shape, vary_alike
from ..streams import Streamed, arrays, scratch, specs
from ..vmem import (
    LANES,
    PARTS,
    SUBLANES,
    UNIT,
    opaque_zeros,
    vmem_limit,
)
from .layout import Layout, layout_of
from .sample import GROUP_SIZE, MixtureSample, Part, finish
from .shards import Edges, edge_noise, merge
from .tpu_kernel import FIELDS, Refs, Scalars, run


def mixture_sample(
    policy_hidden: Float[Array, "B Dp"],
    policy_head: Head,
    ref_hidden: Float[Array, "B Dr"],
    ref_head: Head,
    *,
    mixture_beta: Float[Array, " B"],
    key: Array,
    row_ids: Int[Array, " B"],
    step: Int[Array, ""],
    temperature: float,
    num_valid_tokens: int,
    groups: int | None = None,
    interpret: Any = False,
) -> MixtureSample:
    """`fastpref.kernels.mixture_sample`; `groups` overrides the groups of a tile, `interpret` is Pallas's."""
    shared, beta, edge_keys = policy_head.same_map(ref_head), mixture_beta, row_keys(key, row_ids, step)
    policy_hidden, policy_head, ref_hidden, ref_head, mixture_beta, key, row_ids, step = vary_alike(
        policy_hidden, policy_head, ref_hidden, ref_head, mixture_beta, key, row_ids, step
    )
    ref_head = policy_head if shared else ref_head
    rows, slice_size = policy_hidden.shape[0], policy_head.slice_size
    layout = layout_of(rows, policy_head, ref_head, policy_hidden.dtype, temperature, num_valid_tokens, groups)
    if layout.vmem_bytes > vmem_limit() and layout.blocks > 1:
        # More rows than fit: the weights are read once for each part of them.
        half = layout.blocks // 2 * layout.block
        parts = [
            mixture_sample(
                policy_hidden[cut],
                policy_head,
                ref_hidden[cut],
                ref_head,
                mixture_beta=mixture_beta[cut],
                key=key,
                row_ids=row_ids[cut],
                step=step,
                temperature=temperature,
                num_valid_tokens=num_valid_tokens,
                groups=groups,
                interpret=interpret,
            )
            for cut in (slice(half), slice(half, None))
        ]
        return MixtureSample(*(jnp.concatenate(pair) for pair in zip(*parts, strict=True)))
    padded = layout.blocks * layout.block

    def pad(array: Array) -> Array:
        return jnp.pad(array, ((0, padded - rows),) + ((0, 0),) * (array.ndim - 1))

    def by_block(array: Array) -> Array:
        return pad(array).reshape(layout.blocks, layout.block, *array.shape[1:])

    first_id = policy_head.first_id
    low = first_id % GROUP_SIZE
    origin = first_id - low
    drawn = jnp.clip(num_valid_tokens - first_id, 0, slice_size)
    start = (UNIT - low) if layout.shifted else jnp.zeros_like(low)
    scalars = Scalars(
        start=start,
        start_again=start,
        low=low,
        high=low + slice_size,
        drawn=low + drawn,
        first_masked=jnp.zeros_like(low) if layout.shifted else drawn // layout.tile,
        last_group=(low + slice_size - 1) // GROUP_SIZE,
        zeros=opaque_zeros(max(PARTS)),
    )
    keys = row_keys(key, pad(row_ids), step)
    counters = origin // GROUP_SIZE + jnp.arange(layout.steps * layout.groups)
    group_noise, token_noise = gumbel(keys, counters, jnp.arange(GROUP_SIZE))
    hidden = [
        by_block(states).transpose(0, 2, 1) if head.vocab_axis == 0 else by_block(states)
        for states, head in ((policy_hidden, policy_head), (ref_hidden, ref_head))
    ]
    token, results, edges = _call(
        layout,
        jnp.concatenate([jnp.atleast_1d(scalar) for scalar in scalars]),
        hidden,
        by_block(mixture_beta)[:, None, :],
        group_noise.reshape(layout.blocks, layout.block, layout.steps, layout.groups).transpose(2, 0, 3, 1),
        token_noise.reshape(layout.blocks, layout.block, GROUP_SIZE).transpose(0, 2, 1),
        interpret,
    )

    def by_row(array: Array) -> Array:
        return jnp.moveaxis(array, 0, -2).reshape(*array.shape[1:-1], padded)[..., :rows]

    policy_lse, ref_lse, mixture_lse, score, policy, ref = by_row(results)
    part = Part(policy_lse, ref_lse, mixture_lse, score, origin + by_row(token)[0], policy, ref)
    if policy_head.mesh_axis is not None:
        lse, leader, place, policy, ref = by_row(edges).reshape(2, FIELDS, rows).transpose(1, 0, 2)
        group = jnp.stack([origin, jnp.where(scalars.last_group > 0, origin + scalars.last_group * GROUP_SIZE, -1)])
        group = jnp.broadcast_to(group[:, None], (2, rows))
        pieces = Edges(
            jnp.where(group < 0, -1, group // GROUP_SIZE), lse, leader, group + place.astype(jnp.int32), policy, ref
        )
        part = merge(part, pieces, policy_head.mesh_axis, edge_noise(edge_keys) if temperature else None)
    return finish(part, beta, temperature)


def _call(
    layout: Layout,
    scalars: Array,
    hidden: list[Array],
    beta: Array,
    group_noise: Array,
    token_noise: Array,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    block, blocks = layout.block, layout.blocks
    last_tile, last_step = layout.tiles - 1, layout.steps - 1
    units, width = layout.groups * len(layout.lanes), min(block, LANES)

    def resident(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i, j, *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))

    def tile(i: Any, _: Any) -> Any:
        return jnp.minimum(i, last_tile)

    def streamed(head: Head) -> Streamed:
        if head.vocab_axis == 0:
            weight = pl.BlockSpec((layout.tile, head.width), lambda i, j, *_: (tile(i, j), 0))
        else:
            weight = pl.BlockSpec((head.width, layout.tile), lambda i, j, *_: (0, tile(i, j)))
        return specs(head, weight, layout.tile, tile)

    def result(*shape: int) -> pl.BlockSpec:
        # Results of a block are complete at the last step; before it their window rests.
        def at(i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
            return jnp.where(i == last_step, j, 0), *(0 for _ in shape)

        return pl.BlockSpec((1, *shape), at)

    def unit(size: int) -> list[Any]:
        return [pltpu.VMEM((size, width), jnp.float32) for _ in range(units)]

    def kernel(*refs: Any) -> None:
        scalars, policy, ref, *rest = refs
        *rest, scales = rest
        named = Scalars._make(
            [*(scalars[number] for number in range(7)), [scalars[7 + part] for part in range(max(PARTS))]]
        )
        heads = len(layout.heads)
        run(layout, Refs(named, policy, ref, rest[:heads], scales, *rest[heads:]))

    buffer = UNIT * (1 + layout.shifted)
    edges = 2 * FIELDS if layout.split else 1
    out: tuple[Array, Array, Array] = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.steps, blocks),
            in_specs=[
                *(resident(states) for states in hidden),
                *(streamed(head) for head in layout.heads),
                resident(beta),
                pl.BlockSpec((1, 1, layout.groups, block), lambda i, j, *_: (i, j, 0, 0)),
                resident(token_noise),
            ],
            out_specs=[result(1, block), result(6, block), result(edges, block)],
            scratch_shapes=[
                unit(buffer),
                unit(buffer),
                unit(UNIT),
                pltpu.VMEM((blocks, 4, SUBLANES, block), jnp.float32),
                pltpu.VMEM((blocks, 2, block), jnp.float32),
                pltpu.VMEM((blocks, 3, block), jnp.float32),
                pltpu.VMEM((blocks, 1, block), jnp.int32),
                pltpu.VMEM((blocks, edges, block), jnp.float32),
                [scratch(head, layout.tile, width) for head in layout.heads],
            ],
        ),
        out_shape=[
            result_shape((blocks, 1, block), jnp.int32, scalars),
            result_shape((blocks, 6, block), jnp.float32, scalars),
            result_shape((blocks, edges, block), jnp.float32, scalars),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        interpret=interpret,
        name="fastpref_mixture_sample",
    )(scalars, *hidden, *(arrays(head, layout.tile) for head in layout.heads), beta, group_noise, token_noise)
    return out
