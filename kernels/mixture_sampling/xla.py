"""The draw for CPUs and GPUs: two products and a few passes over their logits, noise for two levels only.

Log-sum-exps are taken over blocks whose size divides both V and 512, so no copy of the logits cuts them into groups.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..head import Head
from ..noise import gumbel, row_keys
from .sample import GROUP_SIZE, MixtureSample, Part, finish, groups_of, mix
from .shards import Edges, edge_noise, merge

_MIN_BLOCK = 32
"""Blocks smaller than this cost more than a padded copy of the logits."""
_MIN_ROWS = 8
"""A bfloat16 product of fewer rows runs 15 to 40 times slower on a CPU."""
_CPU_ROWS = 64
"""Rows that are drawn together on a CPU: logits of more leave its caches, and a draw of 256 takes a third longer."""


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
    block: int | None = None,
    vocab_axis: int | None = None,
) -> MixtureSample:
    """`fastpref.kernels.mixture_sample` for every backend.

    For tests, `block` overrides the rows that are drawn together, `vocab_axis` the layout of their logits.
    """
    rows = policy_hidden.shape[0]
    block = block or (_CPU_ROWS if jax.default_backend() == "cpu" else max(rows, 1))
    count = max(-(-rows // block), 1)
    block = -(-rows // count)
    axis = _vocab_axis(block, policy_head, ref_head) if vocab_axis is None else vocab_axis

    def draw(states: Array, ref_states: Array, beta: Array, ids: Array) -> MixtureSample:
        logits = _Logits.of(states, policy_head, ref_states, ref_head, axis)
        if policy_head.mesh_axis is not None:
            return _draw_of_slice(
                logits, policy_head, policy_head.mesh_axis, beta, key, ids, step, temperature, num_valid_tokens
            )
        return _draw(logits, beta, key, ids, step, temperature, num_valid_tokens)

    arguments = (policy_hidden, ref_hidden, mixture_beta, row_ids)
    if count == 1:
        return draw(*arguments)
    missing = count * block - rows
    blocks = [
        jnp.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1)).reshape(count, block, *array.shape[1:])
        for array in arguments
    ]
    results: MixtureSample = jax.lax.map(lambda arrays: draw(*arrays), tuple(blocks))
    return MixtureSample(*(array.reshape(-1)[:rows] for array in results))


class _Logits(NamedTuple):
    """Logits of both models with the vocabulary along `axis`, and their log-sum-exps."""

    policy: Float[Array, "..."]
    ref: Float[Array, "..."]
    policy_lse: Float[Array, " B"]
    ref_lse: Float[Array, " B"]
    axis: int

    @classmethod
    def of(cls, states: Array, head: Head, ref_states: Array, ref_head: Head, axis: int) -> "_Logits":
        """A weight that both models share is read once, for twice the rows."""
        if not head.same_map(ref_head):
            policy, ref = _logits(states, head, axis), _logits(ref_states, ref_head, axis)
            return cls(policy, ref, jax.nn.logsumexp(policy, axis=axis), jax.nn.logsumexp(ref, axis=axis), axis)
        both = _logits(jnp.concatenate([states, ref_states]), head, axis)
        policy, ref = jnp.split(both, 2, axis=1 - axis)
        policy_lse, ref_lse = jnp.split(jax.nn.logsumexp(both, axis=axis), 2)
        return cls(policy, ref, policy_lse, ref_lse, axis)


def _draw(
    logits: _Logits,
    beta: Float[Array, " B"],
    key: Array,
    row_ids: Int[Array, " B"],
    step: Int[Array, ""],
    temperature: float,
    num_valid_tokens: int,
) -> MixtureSample:
    """One token per row."""
    axis, rows, vocab = logits.axis, beta.shape[0], logits.policy.shape[logits.axis]
    mixture = mix(logits.policy, logits.ref, jnp.expand_dims(beta, axis), temperature)
    if num_valid_tokens < vocab:
        valid = jnp.expand_dims(jnp.arange(vocab) < num_valid_tokens, 1 - axis)
        mixture = jnp.where(valid, mixture, -jnp.inf)
    group_lse = _group_lse(mixture, axis)
    if temperature == 0:
        scores, noise = _group_max(mixture, axis), jnp.zeros((rows, GROUP_SIZE))
    else:
        keys = row_keys(key, row_ids, step)
        group_noise, noise = gumbel(keys, jnp.arange(groups_of(vocab)), jnp.arange(GROUP_SIZE))
        scores = group_lse + group_noise
    group = jnp.argmax(scores, axis=1)[:, None]
    candidates = _pick(mixture, axis, group * GROUP_SIZE + jnp.arange(GROUP_SIZE)[None, :])
    token = group * GROUP_SIZE + jnp.argmax(candidates + noise, axis=1)[:, None]
    part = Part(
        policy_lse=logits.policy_lse,
        ref_lse=logits.ref_lse,
        mixture_lse=jax.nn.logsumexp(group_lse, axis=1),
        score=jnp.max(scores, axis=1),
        token=token[:, 0],
        policy=_pick(logits.policy, axis, token)[:, 0],
        ref=_pick(logits.ref, axis, token)[:, 0],
    )
    return finish(part, beta, temperature)


def _draw_of_slice(
    logits: _Logits,
    head: Head,
    mesh_axis: str,
    beta: Float[Array, " B"],
    key: Array,
    row_ids: Int[Array, " B"],
    step: Int[Array, ""],
    temperature: float,
    num_valid_tokens: int,
) -> MixtureSample:
    """One token per row, from a slice of the vocabulary on each device, vocabulary last."""
    rows, size = beta.shape[0], head.slice_size
    low = head.first_id % GROUP_SIZE
    origin = head.first_id - low
    mixture = mix(logits.policy, logits.ref, beta[:, None], temperature)
    ids = head.first_id + jnp.arange(size)
    mixture = jnp.where(ids[None, :] < num_valid_tokens, mixture, -jnp.inf)
    # The slice, moved to where its groups begin at multiples of their size.
    count = (size + GROUP_SIZE - 2) // GROUP_SIZE + 1
    groups = jnp.pad(mixture, ((0, 0), (0, count * GROUP_SIZE - size)), constant_values=-jnp.inf)
    groups = jnp.roll(groups, low, axis=1).reshape(rows, count, GROUP_SIZE)
    counters = origin // GROUP_SIZE + jnp.arange(count)
    keys = row_keys(key, row_ids, step)
    group_noise, noise = gumbel(keys, counters, jnp.arange(GROUP_SIZE))
    group_lse = jax.nn.logsumexp(groups, axis=2)
    if temperature == 0:
        scores, noise = jnp.max(groups, axis=2), jnp.zeros_like(noise)
    else:
        scores = group_lse + group_noise
    last = (low + size - 1) // GROUP_SIZE
    number = jnp.arange(count)
    scores = jnp.where(((number == 0) | (number >= last))[None, :], -jnp.inf, scores)

    def leader(group: Int[Array, "B 1"]) -> tuple[Array, Array, Array, Array]:
        noisy = jnp.take_along_axis(groups, group[:, :, None], axis=1)[:, 0] + noise
        place = group * GROUP_SIZE + jnp.argmax(noisy, axis=1)[:, None]
        policy, ref = (_pick(one, 1, place - low)[:, 0] for one in (logits.policy, logits.ref))
        return jnp.max(noisy, axis=1), origin + place[:, 0], policy, ref

    best = jnp.argmax(scores, axis=1)[:, None]
    _, token, policy, ref = leader(best)
    part = Part(
        policy_lse=logits.policy_lse,
        ref_lse=logits.ref_lse,
        mixture_lse=jax.nn.logsumexp(group_lse, axis=1),
        score=jnp.max(scores, axis=1),
        token=token,
        policy=policy,
        ref=ref,
    )
    edges = []
    for edge, here in ((jnp.zeros_like(last), low >= 0), (last, last > 0)):
        group = jnp.broadcast_to(edge, (rows, 1))
        name = jnp.broadcast_to(jnp.where(here, origin // GROUP_SIZE + edge, -1), (rows,))
        edges.append(Edges(name, jnp.take_along_axis(group_lse, group, axis=1)[:, 0], *leader(group)))
    pieces: Edges = jax.tree.map(lambda *both: jnp.stack(both), *edges)
    merged = merge(part, pieces, mesh_axis, edge_noise(keys) if temperature else None)
    return finish(merged, beta, temperature)


def _pick(array: Float[Array, "..."], axis: int, ids: Int[Array, "B C"]) -> Float[Array, "B C"]:
    """Entries of each row, −inf outside the vocabulary."""
    row = jnp.arange(ids.shape[0])[:, None]
    ids = jnp.where(ids < 0, array.shape[axis], ids)
    return array.at[(ids, row) if axis == 0 else (row, ids)].get(mode="fill", fill_value=-jnp.inf)


def _vocab_axis(rows: int, policy_head: Head, ref_head: Head) -> int:
    """Where the vocabulary lies in the logits: the order of axes in which XLA's products are fastest on a CPU.

    For [V, D] weights that is [V, B], by a third, except for few rows; for [D, V] weights it is [B, V], by two thirds.
    """
    if policy_head.mesh_axis is not None:
        return 1
    few = 1 if policy_head.weight.dtype == jnp.float32 else _MIN_ROWS
    return 0 if policy_head.vocab_axis == ref_head.vocab_axis == 0 and rows > few else 1


def _logits(hidden: Float[Array, "B D"], head: Head, axis: int) -> Float[Array, "..."]:
    """Logits with the vocabulary along `axis`."""
    rows = hidden.shape[0]
    missing = 0 if hidden.dtype == jnp.float32 else max(0, _MIN_ROWS - rows)
    padded = jnp.pad(hidden, ((0, missing), (0, 0))) if missing else hidden
    logits = head.logits(padded) if axis == 1 else head.shape_logits(head.product_by_token(padded))
    return jax.lax.slice_in_dim(logits, 0, rows, axis=1 - axis)


def _blocks(logits: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The logits in blocks that never straddle a group, blocks along `axis` and their tokens along the next one.

    A copy only where V has no useful common divisor with 512.
    """
    vocab = logits.shape[axis]
    size = math.gcd(vocab, GROUP_SIZE)
    if size < _MIN_BLOCK:
        size = GROUP_SIZE
        widths = [(0, 0), (0, 0)]
        widths[axis] = (0, -vocab % size)
        logits = jnp.pad(logits, widths, constant_values=-jnp.inf)
    return logits.reshape(*logits.shape[:axis], -1, size, *logits.shape[axis + 1 :])


def _by_group(blocks: Float[Array, "..."], axis: int, size: int) -> Float[Array, "B G S"]:
    """One row per row, one column per group, from one value per block of `size` tokens."""
    per_group = GROUP_SIZE // size
    by_row = blocks.T if axis == 0 else blocks
    padded = jnp.pad(by_row, ((0, 0), (0, -by_row.shape[1] % per_group)), constant_values=-jnp.inf)
    return padded.reshape(by_row.shape[0], -1, per_group)


def _group_lse(logits: Float[Array, "..."], axis: int) -> Float[Array, "B G"]:
    blocks = _blocks(logits, axis)
    top = jnp.max(blocks, axis=axis + 1)
    safe = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.sum(jnp.exp(blocks - jnp.expand_dims(safe, axis + 1)), axis=axis + 1)
    return jax.nn.logsumexp(_by_group(safe + jnp.log(total), axis, blocks.shape[axis + 1]), axis=2)


def _group_max(logits: Float[Array, "..."], axis: int) -> Float[Array, "B G"]:
    blocks = _blocks(logits, axis)
    return jnp.max(_by_group(jnp.max(blocks, axis=axis + 1), axis, blocks.shape[axis + 1]), axis=2)
