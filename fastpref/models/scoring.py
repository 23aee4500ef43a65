"""Teacher-forced log-probs of packed pairs: what every loss, every reference and every comparison is computed from."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from fastpref.data.batches import PackedPairs
from fastpref.kernels import token_logprobs
from fastpref.kernels.preference_loss.objective import sequence_sums
from fastpref.models.policy import Policy


class Scored(NamedTuple):
    """Places of a batch as every loss reads them: N of them flat, in any order."""

    hidden: Float[Array, "N D"]
    """States that predict the targets."""
    targets: Int[Array, " N"]
    segments: Int[Array, " N"]
    """2i at a token of y of pair i, 2i + 1 at one of y', −1 where nothing is scored."""


def scored(policy: Policy, batch: PackedPairs) -> Scored:
    """Teacher-forced states of the places of a batch. Every loss goes through here. Differentiable."""
    hidden = policy.packed_hidden_states(batch)
    targets, segments = (jnp.asarray(places).reshape(-1) for places in (batch.targets, batch.sequences))
    return Scored(hidden.reshape(-1, hidden.shape[-1]), targets, segments)


def sequence_logps(policy: Policy, batch: PackedPairs, *, frozen_head: bool = False) -> Float[Array, "P 2"]:
    """Teacher-forced log π(y | x) of both completions, sums over tokens, shape [P, 2]. Differentiable.

    With `frozen_head`, no gradient goes to the head.
    """
    hidden, targets, segments = scored(policy, batch)
    head = policy.head()
    logps = token_logprobs(hidden, head, targets, where=segments >= 0, frozen_head=frozen_head or head.frozen)
    return sequence_sums(logps, segments, batch.where.shape[0])


def repeated(batch: PackedPairs, times: int) -> PackedPairs:
    """The rows of a batch, over and over: for models that share a base, whose rows lie one after the other."""
    pairs = batch.where.shape[0]
    copies: PackedPairs = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(x)] * times), batch)
    first = jnp.repeat(2 * pairs * jnp.arange(times, dtype=jnp.int32), batch.sequences.shape[0])
    return copies._replace(sequences=jnp.where(copies.sequences < 0, -1, copies.sequences + first[:, None]))


@partial(jax.jit, static_argnames=("definition",))
def score(definition: Any, params: Any, batch: PackedPairs) -> Float[Array, "P 2"]:
    """`sequence_logps` of a split NNX module, compiled."""
    return sequence_logps(nnx.merge(definition, params), batch)
