"""Objectives of the supervised trainings: maximum likelihood, cross-entropy of answers, Bradley-Terry of rewards."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fastpref.data.batches import token_mask
from fastpref.judging.models import answer_margins, rewards
from fastpref.kernels import token_logprobs
from fastpref.learning import update
from fastpref.learning.learner import module_of
from fastpref.method.choices import Remat
from fastpref.method.losses import bradley_terry
from fastpref.models.adapters import Base
from fastpref.models.policy import hidden_states

Batch = dict[str, Array]
Objective = Callable[[Any, Batch], tuple[Array, Array]]
"""A module and a batch to the sum of its losses and their number, two scalars."""


def token_loss(module: Any, batch: Batch, *, frozen_head: bool = False) -> tuple[Array, Array]:
    """Sum of −log π over completion tokens, and how many there are: maximum likelihood."""
    tokens = batch["completion_tokens"]
    real = token_mask(batch["completion_lengths"], tokens.shape[-1])
    prompts = batch["prompt_tokens"]
    hidden = hidden_states(module, prompts, token_mask(batch["prompt_lengths"], prompts.shape[1]), tokens)
    head = module.head()
    logps = token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        tokens.reshape(-1),
        where=real.reshape(-1),
        frozen_head=frozen_head or head.frozen,
    )
    return -logps.sum(), real.sum().astype(jnp.float32)


def token_loss_with_frozen_head(module: Any, batch: Batch) -> tuple[Array, Array]:
    """`token_loss`, of which no gradient goes to the head."""
    return token_loss(module, batch, frozen_head=True)


def answer_loss(module: Any, batch: Batch) -> tuple[Array, Array]:
    """Sum of the cross-entropy of the answers with the recorded preferences, and the number of answers.

    Completions 0 and 1 are the readings of a pair in its two orders. Where `symmetric` is true they give one answer.
    """
    margins = answer_margins(module, batch["answers"], *_readings(batch))
    preference = batch["preference"]
    apart = bradley_terry(margins[:, 0], preference) + bradley_terry(-margins[:, 1], preference)
    together = 2 * bradley_terry((margins[:, 0] - margins[:, 1]) / 2, preference)
    losses = jnp.where(batch["symmetric"], together, apart)
    return losses.sum(), jnp.asarray(2 * losses.size, jnp.float32)


def reward_loss(module: Any, batch: Batch) -> tuple[Array, Array]:
    """Sum of the Bradley-Terry cross-entropy of the reward difference, and the number of pairs."""
    scores = rewards(module, *_readings(batch))
    losses = bradley_terry(scores[:, 0] - scores[:, 1], batch["preference"])
    return losses.sum(), jnp.asarray(losses.size, jnp.float32)


def _readings(batch: Batch) -> tuple[Array, Array, Array, Array]:
    return batch["prompt_tokens"], batch["prompt_lengths"], batch["completion_tokens"], batch["completion_lengths"]


@partial(
    jax.jit,
    static_argnames=("definition", "objective", "optimizer", "remat", "dtype"),
    donate_argnames=("params", "opt_state"),
)
def learn(
    definition: Any,
    params: Any,
    opt_state: Any,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: Any,
    base: Base | None = None,
    key: Array | None = None,
    remat: Remat = "none",
    dtype: str = "float32",
) -> tuple[Any, Any, dict[str, Array]]:
    """An optimiser step on the mean of an objective: new parameters, state, metrics; what is not finite is skipped.

    With a `base`, `params` are the adapters on it, and `key` that of their dropout. Parameters in
    bfloat16 are rounded by the key, too.
    """

    def mean_loss(parameters: Any) -> Array:
        total, count = objective(module_of(definition, parameters, base, key, remat, dtype), batch)
        return total / jnp.maximum(count, 1.0)

    loss, gradients = jax.value_and_grad(mean_loss)(params)
    return update.apply_gated(optimizer, loss, gradients, opt_state, params, key=key)


@partial(jax.jit, static_argnames=("definition", "objective"))
def measure(definition: Any, params: Any, batch: Batch, *, objective: Objective) -> tuple[Array, Array]:
    """The objective of a split NNX module, compiled."""
    return objective(nnx.merge(definition, params), batch)
