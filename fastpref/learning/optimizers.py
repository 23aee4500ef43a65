"""Optimisers by name, their learning rate over the steps of a run, and the parameters that weight decay applies to."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from fastpref.method.config import Settings
from fastpref.method.errors import require
from fastpref.method.schedules import Schedule, Value, value_at
from fastpref.models.layers import layers_in
from fastpref.models.lowrank import in_dtype

READ = ("optimizer", "learning_rate", "warmup_steps", "lr_schedule", "weight_decay", "betas", "max_grad_norm")
"""Settings that `build` reads, and that an optimiser which is passed as an object does not."""


def build(config: Settings, given: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
    """The optimiser that the config names, behind a clip of the global gradient norm; or the object that is given.

    "adafactor" has the IPO-MD paper's settings (section 6): decay 0.8, no momentum, updates relative to the scale of
    each parameter (Shazeer and Stern, 2018). "adamw" has β₁ = 0.9, β₂ = 0.999 (Loshchilov and Hutter, 2019), "lion"
    0.9 and 0.99 (Chen et al., 2023), unless `betas` says otherwise. In all three, weight decay subtracts
    rate × `weight_decay` × parameter at every update, from the parameters that `decays` is true of.

    Args:
      config: the settings.
      given: any optax transformation, instead of the one that the config names. Of layers it is given one array with an
        axis of layers in front; one that computes something over a whole parameter belongs in `layer_by_layer`.

    Raises:
      ConfigError: an object is given, and a setting that it does not read is not at its default.
    """
    if given is None:
        betas = None if config.betas is None else (config.betas[0], config.betas[1])
        return _build(config.optimizer, rate(config), config.max_grad_norm, config.weight_decay, betas)
    for entry in dataclasses.fields(config):
        if entry.name in READ:
            require(
                getattr(config, entry.name) == entry.default,
                f"{entry.name} must be left out where an optimizer is passed as an object, which does not read it",
                getattr(config, entry.name),
                "Make it part of that object, or name an optimizer in the settings instead.",
            )
    return given


# The compiled update belongs to the optimiser as an object: one for each setting, so that runs share it.
@functools.cache
def _build(
    name: str, rate: Value, max_grad_norm: float | None, weight_decay: float, betas: tuple[float, float] | None
) -> optax.GradientTransformation:
    # Always a schedule and always a clip: a run may go on with another rate or limit, so its state has one structure.
    schedule = rate if isinstance(rate, Schedule) else optax.constant_schedule(rate)
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    mask = _decaying if weight_decay else None
    if name == "adafactor":
        # As `optax.adafactor` is made, but layer by layer; and that does not multiply the decay by the rate.
        decayed = optax.add_decayed_weights(lambda count: weight_decay * schedule(count), mask)
        decay = decayed if weight_decay else optax.identity()
        chosen = optax.chain(
            layer_by_layer(optax.chain(optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0))),
            optax.scale_by_learning_rate(schedule, flip_sign=False),
            layer_by_layer(optax.scale_by_param_block_rms()),
            decay,
            optax.scale(-1.0),
        )
    else:
        options: dict[str, float] = {} if betas is None else {"b1": betas[0], "b2": betas[1]}
        maker = {"adamw": optax.adamw, "lion": optax.lion}[name]
        chosen = maker(schedule, weight_decay=weight_decay, mask=mask, **options)
    return optax.chain(clip, chosen)


def layer_by_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation that treats each parameter by itself, and of layers that lie in one array each layer's.

    What it computes over a parameter, such as the scale of its entries, is so that of one matrix, as it was made for.
    """

    def of(path: tuple[Any, ...], function: Any) -> Any:
        return jax.vmap(function) if in_layers(path) else function

    def init(params: Any) -> Any:
        return tuple(of(path, transformation.init)(leaf) for path, leaf in jax.tree.leaves_with_path(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        (leaves, structure), values = jax.tree.flatten_with_path(updates), jax.tree.leaves(params)
        each = [
            of(path, transformation.update)(leaf, own, value)
            for (path, leaf), own, value in zip(leaves, state, values, strict=True)
        ]
        return jax.tree.unflatten(structure, [new for new, _ in each]), tuple(own for _, own in each)

    return optax.GradientTransformation(init, update)


def in_layers(path: tuple[Any, ...]) -> bool:
    """True of a parameter or an adapter whose first axis is that of layers.

    Args:
      path: keys of the parameter in its tree, as `jax.tree_util` gives them.
    """
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return layers_in(names) is not None or any("{}" in name for name in names)


def decays(path: tuple[Any, ...], leaf: Any) -> bool:
    """True of a parameter that weight decay applies to: matrices and stacks of them, embeddings and adapters too.

    Vectors never decay, nor do norm scales and biases by their names, T5's `position_bias` among them, however many
    layers are stacked in an array. This is what `transformers.Trainer` decays, but for a reward head, a vector here.

    Args:
      path: keys of the parameter in its tree, as `jax.tree_util` gives them.
      leaf: the parameter, or its shape.
    """
    # The array of an NNX variable lies under the variable's name.
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").rpartition("/")[2]
    return leaf.ndim >= 2 and not re.fullmatch(r"(\w*_)?(bias|scale)", name)


def _decaying(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(decays, params)


def rate(config: Settings) -> Value:
    """Learning rate over the updates of a run: `learning_rate` itself, or with the warm-up and decay that are set.

    From 0 at the first update to `learning_rate` after `warmup_steps`, in a line; then constant, or to 0 at `steps`, in
    a line or half a cosine wave: the formulas of `get_scheduler` in `transformers`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if isinstance(peak, Schedule) or (config.lr_schedule == "constant" and not warmup):
        return peak
    if config.lr_schedule == "constant":
        # Without `steps`: a run that goes on for longer has the same rates, bit for bit.
        return Schedule(start=peak, end=peak, steps=2 * warmup, warmup=0.5)
    return Schedule(start=peak, end=0.0, steps=config.steps, kind=config.lr_schedule, warmup=warmup / config.steps)


def learning_rate(config: Settings, opt_state: Any) -> float:
    """Step size that the next update of `build(config)` is made with: skipped updates do not move its schedule."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    return value_at(rate(config), int(counts[-1][1]))


def initial_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The optimiser's state at step 0, of float32 whatever the parameters are."""
    # Optax mixes dtypes in its counters, which a process with strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.init(in_dtype(params, jnp.float32))


def apply(
    optimizer: optax.GradientTransformation, gradients: Any, state: Any, params: Any, *, key: Array | None = None
) -> tuple[Any, Any]:
    """Parameters and optimiser state after one update, which is computed in float32.

    Args:
      optimizer: an optax transformation.
      gradients: of the parameters.
      state: of the optimiser.
      params: float32, or bfloat16, to which the results are rounded.
      key: of stochastic rounding; None for rounding to nearest.
    """
    with jax.numpy_dtype_promotion("standard"):
        wide = in_dtype(params, jnp.float32)
        updates, state = optimizer.update(in_dtype(gradients, jnp.float32), state, wide)
        new = optax.apply_updates(wide, updates)
    if key is None:
        return jax.tree.map(lambda old, x: x.astype(old.dtype), params, new), state
    leaves, structure = jax.tree.flatten(params)
    rounded = [
        stochastically_rounded(x, jax.random.fold_in(key, number)) if old.dtype == jnp.bfloat16 else x
        for number, (old, x) in enumerate(zip(leaves, jax.tree.leaves(new), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded), state


def stochastically_rounded(x: Float[Array, "*shape"], key: Array) -> Float[Array, "*shape"]:
    """A float32 array in bfloat16: the next number below or above, whose mean is x (Gupta et al., 2015, section 3)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The lower half of the bits is the distance from the number below, as a share of the gap.
    carried = (bits + (jax.random.bits(key, x.shape, jnp.uint32) >> 16)) & jnp.uint32(0xFFFF0000)
    # A carry would turn a NaN into a number; infinities have nothing to carry from.
    kept = jnp.where(jnp.isnan(x), bits, carried)
    return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)
