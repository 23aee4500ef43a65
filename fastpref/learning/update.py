"""The update of a policy from judged pairs: sequence log-probs, loss, gradient, optimiser, gate."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from fastpref.data.batches import PackedPairs
from fastpref.kernels import preference_loss, token_logprobs
from fastpref.kernels.preference_loss.objective import sequence_sums
from fastpref.learning.learner import Anchors, compared_logps, dtype_of, module_of, update_key
from fastpref.learning.optimizers import apply, build, learning_rate
from fastpref.method import losses
from fastpref.method.choices import Remat
from fastpref.method.config import TrainConfig
from fastpref.models.adapters import Base
from fastpref.models.policy import Policy
from fastpref.models.scoring import scored
from fastpref.runs.metrics import pair_metrics

Metrics = dict[str, Array]

ROUNDING = 2**31 - 1
"""Folded into the key of an update for the rounding of parameters; its parts fold in their numbers."""


def learn(
    config: TrainConfig,
    step: int,
    definition: Any,
    params: Any,
    opt_state: Any,
    pairs: PackedPairs,
    *,
    optimizer: optax.GradientTransformation | None = None,
    base: Base | None = None,
    anchors: Anchors | None = None,
) -> tuple[Any, Any, dict[str, float]]:
    """`update` as the config says, at a training step.

    Args:
      config: the settings.
      step: updates done, for τ and η.
      definition: GraphDef of the policy.
      params: its parameters, or adapters; donated.
      opt_state: state of the optimiser; donated.
      pairs: judged pairs, anchored.
      optimizer: an optax transformation, instead of the one that the config names.
      base: the frozen model that `params` are the adapters of; None where they are all parameters.
      anchors: the frozen models that π is compared with, where the pairs are not anchored.

    Returns:
      New parameters, new optimiser state, and metrics: those of the update, and the strengths it was made with.
    """
    method = config.method
    tau, eta = config.strengths(step)
    # Read first: the update takes the buffers of the state.
    rate = {} if optimizer is not None else {"learning_rate": learning_rate(config, opt_state)}
    params, opt_state, measured = update(
        definition,
        params,
        opt_state,
        pairs,
        np.float32(eta if method.strength == "eta" else tau),
        optimizer=build(config, optimizer),
        objective=method.objective,
        gradient_accumulation=config.gradient_accumulation,
        length_normalize=config.length_normalize,
        base=base,
        key=update_key(config, step, base),
        remat=config.remat,
        dtype=dtype_of(config),
        anchors=anchors,
    )
    metrics = {name: float(value) for name, value in measured.items()}
    if method.anchor != "ref":
        # Rewards are τ·(log π − log π_ref); here it is η and another anchor.
        metrics = {name.replace("rewards/", "anchor/"): value for name, value in metrics.items()}
    metrics |= rate | {"tau": tau} | ({"eta": eta} if method.strength == "eta" else {})
    return params, opt_state, metrics


def batch_loss(
    policy: Policy,
    batch: PackedPairs,
    *,
    objective: losses.Objective,
    tau: Float[Array, ""],
    length_normalize: bool = False,
    frozen_head: bool = False,
) -> tuple[Float[Array, ""], Float[Array, "P 2"]]:
    """Mean loss of a batch of judged pairs, and the policy's sequence log-probs.

    Args:
      policy: π.
      batch: P judged pairs in rows; those with `where` False have no part in the mean. A loss of single completions
        is averaged over the completions of a pair first.
      objective: the loss, and how it reads the batch.
      tau: the loss's strength, τ or η, a scalar; may be traced.
      length_normalize: ρ from averages of token log-probs instead of sums.
      frozen_head: no gradient goes to the head.

    Returns:
      The loss, a scalar, and log π(y), log π(y') as sums, shape [P, 2].
    """
    bound = losses.bind(objective.loss, tau=tau)
    ref_logps, preference, where = map(jnp.asarray, (batch.ref_logps, batch.preference, batch.where))
    hidden, targets, segments = scored(policy, batch)
    if objective.contrastive and not length_normalize:
        result = preference_loss(
            hidden,
            policy.head(),
            targets,
            segments,
            ref_logps,
            preference,
            loss=bound,
            where=where,
            frozen_head=frozen_head,
        )
        return result.loss, result.policy_logps
    logps = token_logprobs(hidden, policy.head(), targets, where=segments >= 0, frozen_head=frozen_head)
    policy_logps = sequence_sums(logps, segments, where.shape[0])
    return logps_loss(policy_logps, batch, objective, bound, length_normalize=length_normalize), policy_logps


def logps_loss(
    policy_logps: Float[Array, "P 2"],
    batch: PackedPairs,
    objective: losses.Objective,
    bound: Callable[..., Array],
    *,
    length_normalize: bool = False,
) -> Float[Array, ""]:
    """Mean loss of a batch of judged pairs from the policy's sequence log-probs."""
    ref_logps, preference, where = map(jnp.asarray, (batch.ref_logps, batch.preference, batch.where))
    lengths = jnp.asarray(batch.lengths, jnp.float32)
    # Selecting on both sides of the loss keeps a pair that does not count, NaN included, out of its gradient.
    counted = jnp.where(where[:, None], policy_logps, 0.0)
    if objective.contrastive:
        margins = (counted - ref_logps) / (jnp.maximum(lengths, 1.0) if length_normalize else jnp.ones_like(lengths))
        per_pair = bound(margins[:, 0] - margins[:, 1], preference)
    else:
        each = jnp.where(lengths > 0, bound(counted, ref_logps, batch.scores), 0.0)
        per_pair = each.sum(1) / jnp.maximum((lengths > 0).sum(1), 1).astype(jnp.float32)
    count = jnp.maximum(where.sum(), 1).astype(jnp.float32)
    return jnp.where(where, per_pair, 0.0).sum() / count


@partial(
    jax.jit,
    static_argnames=(
        "definition",
        "optimizer",
        "objective",
        "gradient_accumulation",
        "length_normalize",
        "remat",
        "dtype",
    ),
    donate_argnames=("params", "opt_state"),
)
def update(
    definition: Any,
    params: Any,
    opt_state: Any,
    batch: PackedPairs,
    tau: Float[Array, ""],
    *,
    optimizer: optax.GradientTransformation,
    objective: losses.Objective,
    gradient_accumulation: int = 1,
    length_normalize: bool = False,
    base: Base | None = None,
    key: Array | None = None,
    remat: Remat = "none",
    dtype: str = "float32",
    anchors: Anchors | None = None,
) -> tuple[Any, Any, Metrics]:
    """One optimiser step on a batch of judged pairs.

    The gradient is the mean over the pairs with `where` True, however many parts the batch is taken in. See
    `apply_gated` for what is not finite.

    Args:
      definition: GraphDef of the policy.
      params: its parameters, or adapters; donated.
      opt_state: state of the optimiser; donated.
      batch: P judged pairs in R rows.
      tau: the loss's strength, τ or η, a scalar.
      optimizer: an optax transformation.
      objective: the loss, and how it reads the batch.
      gradient_accumulation: parts of the batch; divides R.
      length_normalize: ρ from averages of token log-probs instead of sums.
      base: the frozen model that `params` are the adapters of; None where they are all parameters.
      key: of the adapters' dropout, and of the rounding of parameters in bfloat16.
      remat: what is kept of each layer for the gradient.
      dtype: of products and activations.
      anchors: the frozen models whose log-probs π's are compared with, where those in the batch are not to be used.

    Returns:
      New parameters, new optimiser state, metrics.
    """
    total = jnp.maximum(batch.where.sum(), 1).astype(jnp.float32)

    def part_loss(parameters: Any, part: PackedPairs, number: Array | int) -> tuple[Array, Array]:
        noise = None if key is None else jax.random.fold_in(key, number)
        frozen_head = base is not None and base.frozen_head
        how: dict[str, Any] = {"base": base, "key": noise, "remat": remat, "dtype": dtype}
        if anchors is not None:
            logps, ref_logps = compared_logps(definition, parameters, part, anchors, frozen_head=frozen_head, **how)
            part = part._replace(ref_logps=ref_logps)
            bound = losses.bind(objective.loss, tau=tau)
            value = logps_loss(logps, part, objective, bound, length_normalize=length_normalize)
        else:
            value, logps = batch_loss(
                module_of(definition, parameters, **how),
                part,
                objective=objective,
                tau=tau,
                length_normalize=length_normalize,
                frozen_head=frozen_head,
            )
        logps = jnp.stack([logps, jnp.asarray(part.ref_logps)])
        return value * part.where.sum().astype(jnp.float32) / total, logps

    value_and_grad = jax.value_and_grad(part_loss, has_aux=True)
    if gradient_accumulation == 1:
        (value, compared), gradients = value_and_grad(params, batch, 0)
    else:
        parts = _cut(batch, gradient_accumulation)

        def add(carry: tuple[Array, Any], numbered: tuple[Array, PackedPairs]) -> tuple[tuple[Array, Any], Array]:
            number, part = numbered
            (value, logps), gradients = value_and_grad(params, part, number)
            summed = jax.tree.map(lambda total, leaf: total + leaf.astype(jnp.float32), carry[1], gradients)
            return (carry[0] + value, summed), logps

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        (value, gradients), stacked = jax.lax.scan(
            add, (jnp.zeros((), jnp.float32), zeros), (jnp.arange(gradient_accumulation), parts)
        )
        compared = jnp.moveaxis(stacked, 1, 0).reshape(2, -1, 2)
    params, opt_state, metrics = apply_gated(optimizer, value, gradients, opt_state, params, key=key)
    if not objective.alone:
        preference, where = jnp.asarray(batch.preference), jnp.asarray(batch.where)
        metrics |= pair_metrics(compared[0], compared[1], preference, where, tau)
    return params, opt_state, metrics


def _cut(batch: PackedPairs, number: int) -> PackedPairs:
    """Equal parts of a batch, one after another on a new first axis, each numbering its own pairs."""
    parts: PackedPairs = jax.tree.map(lambda x: x.reshape(number, x.shape[0] // number, *x.shape[1:]), batch)
    first = 2 * jnp.arange(number, dtype=jnp.int32) * parts.where.shape[1]
    sequences = jnp.where(parts.sequences < 0, -1, parts.sequences - first[:, None, None])
    return parts._replace(sequences=sequences)


def apply_gated(
    optimizer: optax.GradientTransformation,
    loss: Float[Array, ""],
    gradients: Any,
    opt_state: Any,
    params: Any,
    *,
    key: Array | None = None,
) -> tuple[Any, Any, Metrics]:
    """`apply`, unless the loss, the gradient or what would become of parameters and state is not finite.

    Returns:
      Parameters and optimiser state, as they were if the update is skipped; and `loss`, `grad_norm` and
      `updates/skipped`, which is then 1.
    """
    norm = optax.tree.norm(gradients)
    rounding = None if key is None else jax.random.fold_in(key, ROUNDING)
    new_params, new_opt_state = apply(optimizer, gradients, opt_state, params, key=rounding)
    # A state may begin with an infinity (the best loss so far, say); none may come into it.
    sound = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new_params)]
    sound += [
        (jnp.isfinite(new) | ~jnp.isfinite(old)).all()
        for new, old in zip(jax.tree.leaves(new_opt_state), jax.tree.leaves(opt_state), strict=True)
        if jnp.issubdtype(new.dtype, jnp.inexact)
    ]
    healthy = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.stack(sound).all()
    metrics = {"loss": loss, "grad_norm": norm, "updates/skipped": (~healthy).astype(jnp.float32)}
    # Not a selection leaf by leaf: XLA fuses `healthy` into each, and compile time grows with the square of the leaves.
    params, opt_state = jax.lax.cond(
        healthy, lambda new, old: new, lambda new, old: old, (new_params, new_opt_state), (params, opt_state)
    )
    return params, opt_state, metrics
