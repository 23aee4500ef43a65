"""The definition of a draw, with plain `jax.random`."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..head import Head
from ..noise import GROUP_STREAM, TOKEN_STREAM, gumbel_from_bits
from .sample import GROUP_SIZE, MixtureSample, groups_of, mix


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
    """`fastpref.kernels.mixture_sample`, one row at a time, all logits at once, the whole head on every device."""
    policy = policy_head.whole().logits(policy_hidden)
    ref = ref_head.whole().logits(ref_hidden)
    valid = jnp.arange(policy.shape[1])[None, :] < num_valid_tokens
    mixture = jnp.where(valid, mix(policy, ref, mixture_beta[:, None], temperature), -jnp.inf)

    def draw(row: Int[Array, ""], logits: Float[Array, " V"]) -> Int[Array, ""]:
        if temperature == 0:
            return jnp.argmax(logits)
        groups = groups_of(logits.shape[0])
        padded = jnp.pad(logits, (0, groups * GROUP_SIZE - logits.shape[0]), constant_values=-jnp.inf)
        padded = padded.reshape(groups, GROUP_SIZE)
        row_key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), row), step)
        group_bits = jax.random.bits(jax.random.fold_in(row_key, GROUP_STREAM), (groups,), jnp.uint32)
        token_bits = jax.random.bits(jax.random.fold_in(row_key, TOKEN_STREAM), (GROUP_SIZE,), jnp.uint32)
        group = jnp.argmax(jax.nn.logsumexp(padded, axis=1) + gumbel_from_bits(group_bits))
        return group * GROUP_SIZE + jnp.argmax(padded[group] + gumbel_from_bits(token_bits))

    with jax.threefry_partitionable(True):
        token = jax.vmap(draw)(row_ids, mixture)

    def logp(logits: Float[Array, "B V"]) -> Float[Array, " B"]:
        return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]

    finite = jnp.isfinite(jnp.max(mixture, axis=1)) & ~jnp.isnan(mixture).any(axis=1)
    nan = jnp.full_like(mixture_beta, jnp.nan)
    greedy = jnp.zeros_like(mixture_beta)
    return MixtureSample(
        token=jnp.where(finite, token, -1).astype(jnp.int32),
        policy_logp=jnp.where(finite, logp(policy), nan),
        ref_logp=jnp.where(finite, logp(ref), nan),
        mixture_logp=jnp.where(finite, greedy if temperature == 0 else logp(mixture), nan),
    )
