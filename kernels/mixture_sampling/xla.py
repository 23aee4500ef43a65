"""The draw for CPUs and GPUs: two products and a few passes over their logits, noise for two levels only.

Logits lie as [V, B]: the product is faster that way round where B is far below V, and sums over the vocabulary run
down columns. Log-sum-exps are taken over blocks whose size divides both V and 512, so no copy of the logits cuts
them into groups.
"""

import math

import jax
import jax.numpy as jnp
from fastpref.kernels.head import Head
from fastpref.kernels.mixture_sampling.sample import GROUP_SIZE, MixtureSample, groups_of, mix
from fastpref.kernels.noise import GROUP_STREAM, TOKEN_STREAM, gumbel, row_keys
from jax import Array
from jaxtyping import Float, Int

_MIN_BLOCK = 32
"""Blocks smaller than this cost more than a padded copy of the logits."""
_MIN_ROWS = 8
"""A bfloat16 product of fewer rows runs 15 to 40 times slower on a CPU."""


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
) -> MixtureSample:
    """`fastpref.kernels.mixture_sample` for every backend."""
    rows = policy_hidden.shape[0]
    policy, ref = _both_logits(policy_hidden, policy_head, ref_hidden, ref_head)
    vocab = policy.shape[0]
    mixture = mix(policy, ref, mixture_beta[None, :], temperature)
    if num_valid_tokens < vocab:
        mixture = jnp.where(jnp.arange(vocab)[:, None] < num_valid_tokens, mixture, -jnp.inf)

    group_lse = _group_lse(mixture)
    if temperature == 0:
        scores, noise = _group_max(mixture), jnp.zeros((rows, GROUP_SIZE))
    else:
        keys = row_keys(key, row_ids, step)
        scores = group_lse + gumbel(keys, GROUP_STREAM, jnp.arange(groups_of(vocab))).T
        noise = gumbel(keys, TOKEN_STREAM, jnp.arange(GROUP_SIZE))
    group = jnp.argmax(scores, axis=0)
    ids = group[:, None] * GROUP_SIZE + jnp.arange(GROUP_SIZE)[None, :]
    candidates = jnp.take_along_axis(mixture, ids.T, axis=0, mode="fill", fill_value=-jnp.inf).T
    token = jnp.minimum(group * GROUP_SIZE + jnp.argmax(candidates + noise, axis=1), vocab - 1)

    def logp(logits: Float[Array, "V B"], lse: Float[Array, " B"]) -> Float[Array, " B"]:
        return jnp.take_along_axis(logits, token[None, :], axis=0)[0] - lse

    mixture_lse = jax.nn.logsumexp(group_lse, axis=0)
    finite = jnp.isfinite(mixture_lse)
    mixture_logp = jnp.zeros_like(mixture_lse) if temperature == 0 else logp(mixture, mixture_lse)
    nan = jnp.full_like(mixture_lse, jnp.nan)
    return MixtureSample(
        token=jnp.where(finite, token, -1).astype(jnp.int32),
        policy_logp=jnp.where(finite, logp(policy, jax.nn.logsumexp(policy, axis=0)), nan),
        ref_logp=jnp.where(finite, logp(ref, jax.nn.logsumexp(ref, axis=0)), nan),
        mixture_logp=jnp.where(finite, mixture_logp, nan),
    )


def _both_logits(
    policy_hidden: Float[Array, "B Dp"], policy_head: Head, ref_hidden: Float[Array, "B Dr"], ref_head: Head
) -> tuple[Float[Array, "V B"], Float[Array, "V B"]]:
    """Logits of both models; a weight that they share is read once, for twice the rows."""
    rows = policy_hidden.shape[0]
    if policy_head.weight is ref_head.weight and policy_head.vocab_axis == ref_head.vocab_axis:
        raw = policy_head.product_by_token(_enough_rows(jnp.concatenate([policy_hidden, ref_hidden])))
        return policy_head.shape_logits(raw[:, :rows]), ref_head.shape_logits(raw[:, rows : 2 * rows])
    policy = policy_head.product_by_token(_enough_rows(policy_hidden))[:, :rows]
    ref = ref_head.product_by_token(_enough_rows(ref_hidden))[:, :rows]
    return policy_head.shape_logits(policy), ref_head.shape_logits(ref)


def _enough_rows(hidden: Float[Array, "B D"]) -> Float[Array, "C D"]:
    missing = 0 if hidden.dtype == jnp.float32 else max(0, _MIN_ROWS - hidden.shape[0])
    return jnp.pad(hidden, ((0, missing), (0, 0))) if missing else hidden


def _blocks(logits: Float[Array, "V B"]) -> Float[Array, "M S B"]:
    """The logits in blocks that never straddle a group; a copy only where V has no useful common divisor with 512."""
    size = math.gcd(logits.shape[0], GROUP_SIZE)
    if size < _MIN_BLOCK:
        size = GROUP_SIZE
        logits = jnp.pad(logits, ((0, -logits.shape[0] % size), (0, 0)), constant_values=-jnp.inf)
    return logits.reshape(-1, size, logits.shape[1])


def _group(blocks: Float[Array, "M B"], size: int, fill: float) -> Float[Array, "G S B"]:
    """One row per group from one per block, `size` tokens each."""
    per_group = GROUP_SIZE // size
    padded = jnp.pad(blocks, ((0, -blocks.shape[0] % per_group), (0, 0)), constant_values=fill)
    return padded.reshape(-1, per_group, blocks.shape[1])


def _group_lse(logits: Float[Array, "V B"]) -> Float[Array, "G B"]:
    blocks = _blocks(logits)
    top = jnp.max(blocks, axis=1)
    safe = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.sum(jnp.exp(blocks - safe[:, None, :]), axis=1)
    return jax.nn.logsumexp(_group(safe + jnp.log(total), blocks.shape[1], -jnp.inf), axis=1)


def _group_max(logits: Float[Array, "V B"]) -> Float[Array, "G B"]:
    blocks = _blocks(logits)
    return jnp.max(_group(jnp.max(blocks, axis=1), blocks.shape[1], -jnp.inf), axis=1)
