"""The draw for TPUs: both heads stream through VMEM once, and logits never leave it.

What binds it, compiled for a v5e: the stream of weights up to B = 128 at every width, the products from B = 256 on.
The noise is made outside, since grouping leaves V/512 + 512 numbers a row, and the noise within a group is the same
array for all groups. Everything between the two products and the running results is elementwise in the layout of
`fastpref.kernels.vmem`, and lies under the products.

Tried and rejected: logits as [rows, tokens], whose maxima and sums go across lanes; all of a unit's logits in
registers (500 spills a tile); the work on one tile beside the products of the next, in two scratch buffers (10 % more
instructions, 240 spills); hidden states as [rows, D], which the matrix unit must transpose while it loads them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from fastpref.kernels.head import Head
from fastpref.kernels.mixture_sampling.sample import GROUP_SIZE, MixtureSample, Part, finish, mix
from fastpref.kernels.mixture_sampling.shards import Edges, edge_noise, merge
from fastpref.kernels.noise import gumbel, row_keys
from fastpref.kernels.slices import result_shape, vary_alike
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

_ROW_MULTIPLE = 16
"""Rows of a bfloat16 register."""
_MAX_GROUPS = 4
"""Groups of a tile: more make long programs and stream no better."""
_TILE_BYTES = 4 << 20
"""Weights of one head that a grid step streams, about: 5 µs on a v5e, far above what a step costs to start."""
_FIELDS = 5
"""Rows of an edge: log-sum-exp, leader, its place, and its two logits."""


@dataclass(frozen=True)
class Layout:
    """How the work is cut: all that is known before the kernel runs."""

    policy_head: Head
    ref_head: Head
    shared: bool
    """Both heads are one: its tiles are read once."""
    temperature: float
    split: bool
    """The vocabulary is split over devices: the first and the last group are edges."""
    shifted: bool
    """Slices do not begin with a group, so groups straddle tiles of one group each."""
    groups: int
    """Groups of a tile."""
    whole_tiles: int | None
    """Tiles before the first that is masked; None where that depends on the device."""
    block: int
    """Rows of hidden states that one grid step takes."""
    blocks: int
    """Steps that share a tile of the weights."""

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.groups * GROUP_SIZE

    @property
    def tiles(self) -> int:
        """Tiles of the weights."""
        return -(-self.policy_head.slice_size // self.tile)

    @property
    def steps(self) -> int:
        """Grid steps over the vocabulary. Shifted groups end a tile later."""
        return self.tiles + self.shifted

    @property
    def lanes(self) -> list[slice]:
        """Cuts of a block into units."""
        return [slice(start, min(start + LANES, self.block)) for start in range(0, self.block, LANES)]

    @property
    def heads(self) -> list[Head]:
        """The heads that are streamed."""
        return [self.policy_head] if self.shared else [self.policy_head, self.ref_head]

    @property
    def vmem_bytes(self) -> int:
        """VMEM of the kernel's blocks and scratch."""
        width, dtype = min(self.block, LANES), self.policy_head.weight.dtype
        weights = sum(
            2 * tile_bytes(*((self.tile, head.width) if head.vocab_axis == 0 else (head.width, self.tile)), dtype)
            for head in self.heads
        )
        hidden = sum(
            self.blocks
            * tile_bytes(*((head.width, self.block) if head.vocab_axis == 0 else (self.block, head.width)), dtype)
            for head in (self.policy_head, self.ref_head)
        )
        units = self.groups * len(self.lanes)
        logits = units * (2 * (1 + self.shifted) + 1) * tile_bytes(GROUP_SIZE, width, jnp.float32)
        by_row = GROUP_SIZE + 4 * SUBLANES + 4 * SUBLANES
        state = self.blocks * tile_bytes(by_row, self.block, jnp.float32)
        return weights + hidden + logits + state


class _Scalars(NamedTuple):
    """What is known only when the kernel runs, in the order of its scalar memory.

    Places count from the beginning of the first group that has tokens here, which is before the slice where slices
    are shifted.
    """

    start: Any
    """Where a group's logits begin in their buffer."""
    start_again: Any
    """The same number, so that they are read again."""
    low: Any
    """First place that is in the slice."""
    high: Any
    """One past the last."""
    drawn: Any
    """One past the last place that may be drawn."""
    first_masked: Any
    """First tile with places that are not in the slice, or may not be drawn."""
    last_group: Any
    """Number of the last group with tokens here."""
    zeros: Any
    """First of the zeros."""


class _Refs(NamedTuple):
    """What the kernel reads and writes, in the order of the call."""

    scalars: _Scalars
    policy_hidden: Any
    ref_hidden: Any
    weights: Any
    beta: Any
    group_noise: Any
    token_noise: Any
    token: Any
    results: Any
    edges: Any
    policy_logits: Any
    ref_logits: Any
    mixture: Any
    sums: Any
    """Maxima and sums of the policy, and of the reference, one per sublane."""
    mixture_sums: Any
    """Maximum and sum over the groups so far."""
    best: Any
    """Score of the best group so far, and both logits of its token."""
    best_token: Any
    """The place of its token."""
    pieces: Any
    """Both edges."""


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
    layout = _layout(rows, policy_head, ref_head, temperature, num_valid_tokens, groups)
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
    scalars = _Scalars(
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
        lse, leader, place, policy, ref = by_row(edges).reshape(2, _FIELDS, rows).transpose(1, 0, 2)
        group = jnp.stack([origin, jnp.where(scalars.last_group > 0, origin + scalars.last_group * GROUP_SIZE, -1)])
        group = jnp.broadcast_to(group[:, None], (2, rows))
        pieces = Edges(
            jnp.where(group < 0, -1, group // GROUP_SIZE), lse, leader, group + place.astype(jnp.int32), policy, ref
        )
        part = merge(part, pieces, policy_head.mesh_axis, edge_noise(edge_keys) if temperature else None)
    return finish(part, beta, temperature)


def _layout(
    rows: int, policy_head: Head, ref_head: Head, temperature: float, num_valid_tokens: int, groups: int | None
) -> Layout:
    """Blocks as wide as rows go, and tiles of as many groups as their width allows."""
    block = -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    if block > LANES:
        block = LANES if -(-rows // LANES) % 2 else 2 * LANES
    split = policy_head.mesh_axis is not None
    shifted = split and policy_head.slice_size % GROUP_SIZE != 0
    width = max(policy_head.width, ref_head.width) * policy_head.weight.dtype.itemsize
    groups = 1 if shifted else groups or min(max(_TILE_BYTES // (width * GROUP_SIZE), 1), _MAX_GROUPS)
    return Layout(
        policy_head=policy_head,
        ref_head=ref_head,
        shared=policy_head.same_map(ref_head),
        temperature=temperature,
        split=split,
        shifted=shifted,
        whole_tiles=None if split else num_valid_tokens // (groups * GROUP_SIZE),
        groups=groups,
        block=block,
        blocks=-(-rows // block),
    )


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

    def streamed(head: Head) -> pl.BlockSpec:
        if head.vocab_axis == 0:
            return pl.BlockSpec((layout.tile, head.width), lambda i, j, *_: (jnp.minimum(i, last_tile), 0))
        return pl.BlockSpec((head.width, layout.tile), lambda i, j, *_: (0, jnp.minimum(i, last_tile)))

    def result(*shape: int) -> pl.BlockSpec:
        # Results of a block are complete at the last step; before it their window rests.
        at = lambda i, j, *_: (jnp.where(i == last_step, j, 0),) + (0,) * len(shape)  # noqa: E731
        return pl.BlockSpec((1, *shape), at)

    def unit(size: int) -> list[Any]:
        return [pltpu.VMEM((size, width), jnp.float32) for _ in range(units)]

    def kernel(*refs: Any) -> None:
        scalars, policy, ref, *rest = refs
        named = _Scalars._make(
            [*(scalars[number] for number in range(7)), [scalars[7 + part] for part in range(max(PARTS))]]
        )
        heads = len(layout.heads)
        _kernel(layout, _Refs(named, policy, ref, rest[:heads], *rest[heads:]))

    buffer = UNIT * (1 + layout.shifted)
    edges = 2 * _FIELDS if layout.split else 1
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
    )(scalars, *hidden, *(head.weight for head in layout.heads), beta, group_noise, token_noise)
    return out


def _kernel(layout: Layout, refs: _Refs) -> None:
    tile, block = pl.program_id(0), pl.program_id(1)

    @pl.when(tile == 0)
    def _start() -> None:
        width = (SUBLANES, layout.block)
        for model in (0, 2):
            refs.sums[block, model] = jnp.full(width, NEVER, jnp.float32)
            refs.sums[block, model + 1] = jnp.zeros(width, jnp.float32)
        row = (1, layout.block)
        refs.mixture_sums[block, 0:1] = jnp.full(row, NEVER, jnp.float32)
        refs.mixture_sums[block, 1:2] = jnp.zeros(row, jnp.float32)
        refs.best[block, 0:1] = jnp.full(row, NEVER, jnp.float32)
        refs.best[block, 1:3] = jnp.zeros((2, layout.block), jnp.float32)
        refs.best_token[block] = jnp.zeros(row, jnp.int32)
        if layout.split:
            empty = jnp.full((_FIELDS, layout.block), NEVER, jnp.float32)
            field = jax.lax.broadcasted_iota(jnp.int32, empty.shape, 0)
            empty = jnp.where(field < 2, empty, 0.0)
            refs.pieces[block, 0:_FIELDS] = empty
            refs.pieces[block, _FIELDS:] = empty

    # Few tiles hold places that are masked, and masks cost a third of the elementwise work.
    whole = tile < refs.scalars.first_masked
    if layout.whole_tiles != 0:
        pl.when(whole)(partial(_tile, layout, refs, tile, block, False))
    if layout.whole_tiles != layout.steps:
        pl.when(jnp.logical_not(whole))(partial(_tile, layout, refs, tile, block, True))

    @pl.when(tile == layout.steps - 1)
    def _finish() -> None:
        refs.token[0] = refs.best_token[block]
        for model in (0, 2):
            lse = log_of_sum(*over_sublanes(refs.sums[block, model], refs.sums[block, model + 1]))
            refs.results[0, model // 2 : model // 2 + 1] = lse
        refs.results[0, 2:3] = log_of_sum(refs.mixture_sums[block, 0:1], refs.mixture_sums[block, 1:2])
        refs.results[0, 3:6] = refs.best[block]
        if layout.split:
            refs.edges[0] = refs.pieces[block]


def _tile(layout: Layout, refs: _Refs, tile: Any, block: Any, masked: bool) -> None:
    for group in range(layout.groups):
        for number, lanes in enumerate(layout.lanes):
            unit = group * len(layout.lanes) + number
            _products(layout, refs, group, block, lanes, unit)
            _group(layout, refs, tile, group, block, lanes, unit, masked)


def _products(layout: Layout, refs: _Refs, group: int, block: Any, lanes: slice, unit: int) -> None:
    """Logits of both models, for one group of tokens and up to LANES rows."""
    for head, hidden, weight, logits in (
        (layout.policy_head, refs.policy_hidden, refs.weights[0], refs.policy_logits[unit]),
        (layout.ref_head, refs.ref_hidden, refs.weights[-1], refs.ref_logits[unit]),
    ):
        if layout.shifted:
            logits[:UNIT, :] = logits[UNIT:, :]
            logits = logits.at[UNIT:, :]
        states = []
        for zero in refs.scalars.zeros[: PARTS[head.vocab_axis]]:
            if head.vocab_axis == 0:
                states.append(hidden[block, pl.ds(pl.multiple_of(zero, LANES), head.width), lanes])
            else:
                start = pl.multiple_of(lanes.start + zero, _ROW_MULTIPLE)
                states.append(hidden[block, pl.ds(start, lanes.stop - lanes.start), :])
        product(head, weight, group * GROUP_SIZE, states, logits)


def _group(
    layout: Layout, refs: _Refs, tile: Any, group: int, block: Any, lanes: slice, unit: int, masked: bool
) -> None:
    """Take one group of tokens into the running results of up to LANES rows."""
    scalars, width = refs.scalars, lanes.stop - lanes.start
    number = tile * layout.groups + group
    first = number * GROUP_SIZE
    beta = refs.beta[block, :, lanes].reshape(1, 1, width)
    places = first + unit_ids(width)
    again = pl.multiple_of(scalars.zeros[0], UNIT)

    def logits(head: Head, buffer: Any, start: Any, chunk: int) -> Array:
        if not layout.shifted:
            start = pl.multiple_of(start, UNIT)
        values = head.shape_logits(as_registers(buffer[pl.ds(start + chunk, CHUNK), :]))
        if not masked:
            return values
        return jnp.where((places + chunk >= scalars.low) & (places + chunk < scalars.high), values, NEVER)

    def both(start: Any, chunk: int) -> tuple[Array, Array]:
        return (
            logits(layout.policy_head, refs.policy_logits[unit], start, chunk),
            logits(layout.ref_head, refs.ref_logits[unit], start, chunk),
        )

    old_policy, old_policy_sum, old_ref, old_ref_sum = (refs.sums[block, field, :, lanes] for field in range(4))
    policy_top, ref_top = old_policy, old_ref
    top = jnp.full((SUBLANES, width), NEVER, jnp.float32)
    for chunk in range(0, UNIT, CHUNK):
        policy, ref = both(scalars.start, chunk)
        mixture = mix(policy, ref, beta, layout.temperature)
        if masked:
            drawn = (places + chunk >= scalars.low) & (places + chunk < scalars.drawn)
            mixture = jnp.where(drawn, mixture, NEVER)
        refs.mixture[unit][pl.ds(chunk, CHUNK), :] = mixture.reshape(CHUNK, width)
        policy_top = jnp.maximum(policy_top, jnp.max(policy, axis=0))
        ref_top = jnp.maximum(ref_top, jnp.max(ref, axis=0))
        top = jnp.maximum(top, jnp.max(mixture, axis=0))

    policy_base, ref_base, base = finite_or_zero(policy_top), finite_or_zero(ref_top), finite_or_zero(top)
    policy_sum = old_policy_sum * jnp.exp(old_policy - policy_base)
    ref_sum = old_ref_sum * jnp.exp(old_ref - ref_base)
    total = jnp.zeros((SUBLANES, width), jnp.float32)
    leader = jnp.full((SUBLANES, width), NEVER, jnp.float32)
    register = jnp.zeros((SUBLANES, width), jnp.int32)
    leader_policy = leader_ref = total
    for chunk in range(0, UNIT, CHUNK):
        policy, ref = both(scalars.start_again, chunk)
        mixture = as_registers(refs.mixture[unit][pl.ds(again + chunk, CHUNK), :])
        policy_sum += jnp.sum(jnp.exp(policy - policy_base[None]), axis=0)
        ref_sum += jnp.sum(jnp.exp(ref - ref_base[None]), axis=0)
        total += jnp.sum(jnp.exp(mixture - base[None]), axis=0)
        if layout.temperature > 0:
            mixture += as_registers(refs.token_noise[block, pl.ds(chunk, CHUNK), lanes])
        for place in range(CHUNK // SUBLANES):
            better = mixture[place] > leader
            leader = jnp.where(better, mixture[place], leader)
            register = jnp.where(better, chunk // SUBLANES + place, register)
            leader_policy = jnp.where(better, policy[place], leader_policy)
            leader_ref = jnp.where(better, ref[place], leader_ref)
    for field, value in enumerate((policy_top, policy_sum, ref_top, ref_sum)):
        refs.sums[block, field, :, lanes] = value

    top, total = over_sublanes(top, total)
    lse = log_of_sum(top, total)
    leading = jnp.max(leader, axis=0, keepdims=True)
    token = SUBLANES * register + jax.lax.broadcasted_iota(jnp.int32, register.shape, 0)
    winner = jnp.min(jnp.where(leader == leading, token, GROUP_SIZE), axis=0, keepdims=True)
    won = token == winner
    policy = jnp.sum(jnp.where(won, leader_policy, 0.0), axis=0, keepdims=True)
    ref = jnp.sum(jnp.where(won, leader_ref, 0.0), axis=0, keepdims=True)
    score = leading if layout.temperature == 0 else lse + refs.group_noise[0, 0, group : group + 1, lanes]
    if layout.split:
        is_first, is_last = number == 0, (number > 0) & (number == scalars.last_group)
        score = jnp.where(is_first | is_last, NEVER, score)
        for edge, here in enumerate((is_first, is_last)):
            for field, value in enumerate((lse, leading, winner.astype(jnp.float32), policy, ref)):
                row = slice(edge * _FIELDS + field, edge * _FIELDS + field + 1)
                refs.pieces[block, row, lanes] = jnp.where(here, value, refs.pieces[block, row, lanes])

    better = score > refs.best[block, 0:1, lanes]
    for field, value in enumerate((score, policy, ref)):
        row = slice(field, field + 1)
        refs.best[block, row, lanes] = jnp.where(better, value, refs.best[block, row, lanes])
    refs.best_token[block, :, lanes] = jnp.where(better, first + winner, refs.best_token[block, :, lanes])
    old_top, old_total = refs.mixture_sums[block, 0:1, lanes], refs.mixture_sums[block, 1:2, lanes]
    new_top = jnp.maximum(old_top, top)
    new_base = finite_or_zero(new_top)
    refs.mixture_sums[block, 0:1, lanes] = new_top
    refs.mixture_sums[block, 1:2, lanes] = old_total * jnp.exp(old_top - new_base) + total * jnp.exp(top - new_base)
