"""One grid step of the TPU sampler: a tile of tokens, a block of rows."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..head import Head
from ..streams import turn_scales
from ..vmem import (
    CHUNK,
    LANES,
    NEVER,
    PARTS,
    SUBLANES,
    UNIT,
    as_registers,
    finite_or_zero,
    log_of_sum,
    over_sublanes,
    product,
    unit_ids,
)
from .layout import ROW_MULTIPLE, Layout
from .sample import GROUP_SIZE, mix

FIELDS = 5
"""Rows of an edge: log-sum-exp, leader, its place, and its two logits."""


class Scalars(NamedTuple):
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


class Refs(NamedTuple):
    """What the kernel reads and writes, in the order of the call."""

    scalars: Scalars
    policy_hidden: Any
    ref_hidden: Any
    streams: Any
    """A tile of each head that is read."""
    scales: Any
    """Scales of these tiles by token."""
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


def run(layout: Layout, refs: Refs) -> None:
    """Take one tile of tokens into the results of one block of rows."""
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
            empty = jnp.full((FIELDS, layout.block), NEVER, jnp.float32)
            field = jax.lax.broadcasted_iota(jnp.int32, empty.shape, 0)
            empty = jnp.where(field < 2, empty, 0.0)
            refs.pieces[block, 0:FIELDS] = empty
            refs.pieces[block, FIELDS:] = empty

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


def _tile(layout: Layout, refs: Refs, tile: Any, block: Any, masked: bool) -> None:
    for stream, scales in zip(refs.streams, refs.scales, strict=True):
        turn_scales(stream, scales)
    for group in range(layout.groups):
        for number, lanes in enumerate(layout.lanes):
            unit = group * len(layout.lanes) + number
            _products(layout, refs, group, block, lanes, unit)
            _group(layout, refs, tile, group, block, lanes, unit, masked and layout.masks(group))


def _products(layout: Layout, refs: Refs, group: int, block: Any, lanes: slice, unit: int) -> None:
    """Logits of both models, for one group of tokens and up to LANES rows."""
    for head, hidden, tile, scales, logits in (
        (layout.policy_head, refs.policy_hidden, refs.streams[0], refs.scales[0], refs.policy_logits[unit]),
        (layout.ref_head, refs.ref_hidden, refs.streams[-1], refs.scales[-1], refs.ref_logits[unit]),
    ):
        if layout.shifted:
            logits[:UNIT, :] = logits[UNIT:, :]
            logits = logits.at[UNIT:, :]
        states = []
        for zero in refs.scalars.zeros[: PARTS[head.vocab_axis]]:
            if head.vocab_axis == 0:
                states.append(hidden[block, pl.ds(pl.multiple_of(zero, LANES), head.width), lanes])
            else:
                start = pl.multiple_of(lanes.start + zero, ROW_MULTIPLE)
                states.append(hidden[block, pl.ds(start, lanes.stop - lanes.start), :])
        product(head, tile.weight, group * GROUP_SIZE, states, logits, scales)


def _group(
    layout: Layout, refs: Refs, tile: Any, group: int, block: Any, lanes: slice, unit: int, masked: bool
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
                row = slice(edge * FIELDS + field, edge * FIELDS + field + 1)
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
