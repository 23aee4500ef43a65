"""Optimisers by name. Any other optax transformation can be passed as an object instead."""

import functools
from typing import Any

import jax
import optax

from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.schedules import Value


def build(config: TrainConfig | SupervisedConfig) -> optax.GradientTransformation:
    """The optimiser that the config names.

    "adafactor" has the IPO-MD paper's settings (section 6): decay 0.8, no momentum, updates relative to the scale of
    each parameter. "adamw" has β₁ = 0.9, β₂ = 0.999 and no weight decay.
    """
    return _build(config.optimizer, config.learning_rate, config.max_grad_norm)


# The compiled update belongs to the optimiser as an object: one for each setting, so that runs share it.
@functools.cache
def _build(name: str, learning_rate: Value, max_grad_norm: float | None) -> optax.GradientTransformation:
    makers = {
        "adafactor": lambda: optax.adafactor(learning_rate, decay_rate=0.8),
        "adamw": lambda: optax.adamw(learning_rate, weight_decay=0.0),
    }
    optimizer: optax.GradientTransformation = makers[name]()
    if max_grad_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def initial_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The optimiser's state at step 0."""
    # Optax mixes dtypes in its counters, which a process with strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.init(params)


def apply(optimizer: optax.GradientTransformation, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Parameters and optimiser state after one update."""
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state
