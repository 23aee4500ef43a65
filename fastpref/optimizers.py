"""Optimisers by name. Any other optax transformation can be passed as an object instead."""

from collections.abc import Callable

import optax

from fastpref.config import SupervisedConfig, TrainConfig, Value


def build(config: TrainConfig | SupervisedConfig) -> optax.GradientTransformation:
    """The optimiser that the config names.

    "adafactor" has the IPO-MD paper's settings (section 6): decay 0.8, no momentum, updates relative to the scale of
    each parameter. "adamw" has β₁ = 0.9, β₂ = 0.999 and no weight decay.
    """
    rate: Value = config.learning_rate
    schedule: float | Callable[..., object] = rate
    makers = {
        "adafactor": lambda: optax.adafactor(schedule, decay_rate=0.8),
        "adamw": lambda: optax.adamw(schedule, weight_decay=0.0),
    }
    optimizer: optax.GradientTransformation = makers[config.optimizer]()
    if config.max_grad_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
