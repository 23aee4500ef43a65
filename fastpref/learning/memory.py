"""Memory of a run of `train`, from shapes alone: counted where it is an array, compiled where it is a temporary."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastpref.data.packing import pack_pairs
from fastpref.data.ragged import Ragged
from fastpref.learning import learner, optimizers, update
from fastpref.learning.row_plan import plan_rows
from fastpref.method.config import TrainConfig
from fastpref.models.adapters import Adapters, Base, without_adapter
from fastpref.models.int8 import quantized_params
from fastpref.models.lowrank import in_dtype


@dataclass(frozen=True)
class TrainMemory:
    """Bytes that a run of `train` needs at its peak on its device, without what JAX and the program take themselves."""

    policy: int
    """What is trained of π, parameters or adapters, counted."""
    ref: int
    """Parameters of π_ref, counted: the policy as it was given, of which the run learns a copy, or the base of its
    adapters."""
    round: int
    """π_t, as much as is trained of π, counted; 0 in methods without rounds."""
    copy: int
    """Copy of π in the dtype of products, with which it writes, counted; 0 where it is trained in that dtype."""
    optimizer: int
    """State of the optimiser, counted."""
    cache: int
    """Keys and values of both models while they write, counted; 0 offline."""
    temporaries: int
    """Temporaries of the update, gradients among them, as the compiler lays them out on this machine."""
    gradients: int
    """Gradients, counted; they are part of `temporaries`."""

    @property
    def total(self) -> int:
        """The peak: sampling and the update do not overlap."""
        return self.held + max(self.cache, self.temporaries)

    @property
    def held(self) -> int:
        """What is held all the time."""
        return self.policy + self.ref + self.round + self.copy + self.optimizer


def train_memory(
    config: TrainConfig,
    definition: Any,
    params: Any,
    parts: tuple[Base, Adapters] | None = None,
    *,
    peak: bool = True,
) -> TrainMemory:
    """Memory of a run at its longest prompts and completions.

    Args:
      config: the settings.
      definition: GraphDef of the policy.
      params: its parameters, or their shapes; nothing is computed with them.
      parts: the base of its adapters and these, or their shapes, where they are trained alone.
      peak: count keys and values too, and compile the update for its temporaries; else these are 0.

    Returns:
      `TrainMemory`.

    Raises:
      ConfigError: the settings contradict each other or the model.
    """
    params = _shapes(params)
    base, trained = (None, params) if parts is None else _shapes(parts)
    if config.base_dtype == "int8":
        if parts is None:
            raise without_adapter()
        params = jax.eval_shape(quantized_params, params)
    read = jax.eval_shape(partial(in_dtype, dtype=learner.dtype_of(config)), params)
    base = None if base is None else replace(base, params=read)
    trained = jax.eval_shape(partial(in_dtype, dtype=config.param_dtype), trained)
    optimizer, method = optimizers.build(config), config.method
    opt_state = jax.eval_shape(partial(optimizers.initial_state, optimizer), trained)
    temporaries = 0
    if peak:
        temporaries = _temporaries(*update_arguments(config, definition, trained, opt_state, base, read))
    cache = 0
    if peak and not method.offline:
        shape = (config.batch_size, config.max_prompt_tokens)

        def prefill(state: Any) -> Any:
            return nnx.merge(definition, state).prefill(
                jnp.zeros(shape, jnp.int32),
                jnp.ones(shape, bool),
                completions=len(method.mixture_betas(0.5, config.completions)),
                max_new_tokens=config.max_new_tokens,
            )[1]

        cache = 2 * size(jax.eval_shape(prefill, read))
    return TrainMemory(
        policy=size(trained),
        ref=size(read),
        round=size(trained) if method.in_rounds else 0,
        copy=0 if base is not None or size(read) == size(trained) else size(read),
        optimizer=size(opt_state),
        cache=cache,
        temporaries=temporaries,
        gradients=size(trained),
    )


def _temporaries(arguments: tuple[Any, ...], settings: dict[str, Any]) -> int:
    """Bytes that the compiled update sets aside, on this machine."""
    compiled = update.update.lower(*arguments, **settings).compile()
    measured: Any = compiled.memory_analysis()
    # Results that take the place of arguments are counted with the arguments.
    fresh = max(0, measured.output_size_in_bytes - measured.alias_size_in_bytes)
    return int(measured.temp_size_in_bytes + fresh)


def update_arguments(
    config: TrainConfig, definition: Any, trained: Any, opt_state: Any, base: Base | None, ref: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `update.update` is called with at the longest prompts and completions.

    Args:
      config: the settings.
      definition: GraphDef of the policy.
      trained: its trained parameters, or their shapes.
      opt_state: of the optimiser that the settings name.
      base: of adapters.
      ref: the parameters of π_ref.
    """
    method, dtype = config.method, learner.dtype_of(config)
    optimizer, module = optimizers.build(config), nnx.merge(definition, ref)
    completions = 1 if method.pairs == "first" else 2
    prompts, longest, tokens = config.batch_size, config.max_prompt_tokens, config.max_new_tokens
    plan = plan_rows(
        config, decoder_start=module.decoder_start, prompts=Ragged.from_rows([np.zeros(longest, np.int32)])
    )
    pairs, _ = pack_pairs(
        np.zeros((prompts, longest), np.int32),
        np.full(prompts, longest, np.int32),
        np.zeros((prompts, completions, tokens), np.int32),
        np.full((prompts, completions), tokens, np.int32),
        counts=plan.counts,
        **plan.shape,
    )
    scores_itself = dtype != "float32" or (base is not None and method.offline)
    anchors = None
    if scores_itself:
        weights = [weight for weight in method.anchor_weights(*config.strengths(0)) if weight]
        models = tuple(ref if base is None else None for _ in weights)
        anchors = learner.Anchors(jnp.ones(len(weights), jnp.float32), models)
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "objective": method.objective,
        "gradient_accumulation": config.gradient_accumulation,
        "length_normalize": config.length_normalize,
        "base": base,
        "key": learner.update_key(config, 0, base),
        "remat": config.remat,
        "dtype": dtype,
        "anchors": anchors,
    }
    return (definition, trained, opt_state, pairs, np.float32(1)), settings


def _shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree))


def size(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of those that its shapes stand for."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
