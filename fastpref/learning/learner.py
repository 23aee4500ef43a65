"""The module that a gradient is taken of, in its precision, and the frozen models beside it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from fastpref.data.batches import PackedPairs
from fastpref.method.choices import Remat
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import ConfigError, require
from fastpref.models import LanguageModel
from fastpref.models.adapters import Adapters, Base, on_base
from fastpref.models.lowrank import in_dtype
from fastpref.models.scoring import repeated, sequence_logps


class Frozen(NamedTuple):
    """A model that is only read: GraphDef and parameters of its module."""

    definition: Any
    params: Any


class Anchors(NamedTuple):
    """Frozen models that π is compared with, scored beside it in the update.

    In low precision the two sides of ρ may not come from two programs: their rounding would differ by more than ρ does
    (DESIGN, section 6).
    """

    weights: Float[Array, " A"]
    """Of the log-probs of each; they sum to 1."""
    models: tuple[Any, ...]
    """All parameters of each; or its adapters on the base of the policy, None for the base itself."""

    def shared(self, base: Base | None) -> bool:
        """Whether the models are adapters on that base."""
        return base is not None and all(model is None or isinstance(model, dict) for model in self.models)


def module_of(definition: Any, params: Any, base: Base | None, key: Array | None, remat: Remat, dtype: str) -> Any:
    """The module that a gradient is taken of, from its parameters or its adapters on a base."""
    return rematerialising(nnx.merge(definition, _parameters(params, base, (), key, dtype)), remat)


def _parameters(params: Any, base: Base | None, others: tuple[Any, ...], key: Array | None, dtype: str) -> Any:
    return in_dtype(params if base is None else base.adapted(params, *others, key=key), dtype)


def rematerialising(module: Any, remat: Remat) -> Any:
    """The module, set to compute again for the gradient what `remat` does not keep.

    Raises:
      ConfigError: the module is of another package.
    """
    if remat != "none":
        body = getattr(module, "policy", module)
        if not hasattr(body, "remat"):
            raise ConfigError(
                f"remat must be 'none' for a module of another package, but received {remat!r} for a "
                f"{type(body).__name__}. Leave it out, and use jax.checkpoint inside the module."
            )
        body.remat = remat
    return module


def compared_logps(
    definition: Any,
    params: Any,
    batch: PackedPairs,
    anchors: Anchors,
    *,
    base: Base | None,
    key: Array | None,
    remat: Remat,
    dtype: str,
    frozen_head: bool,
) -> tuple[Float[Array, "P 2"], Float[Array, "P 2"]]:
    """log π of both completions, and what they are compared with, from one pass. Differentiable in `params`.

    Models on one base run as the rows of one module, so that each weight is read once; others, which must be of the
    policy's architecture, one after the other.
    """
    if base is None or not anchors.shared(base):
        modules = [module_of(definition, params, base, key, remat, dtype)]
        modules += [
            nnx.merge(definition, _parameters(model, base if isinstance(model, dict) else None, (), None, dtype))
            for model in anchors.models
        ]
        logps = jnp.stack([sequence_logps(module, batch, frozen_head=frozen_head) for module in modules])
    else:
        models = jax.lax.stop_gradient(anchors.models)
        module = rematerialising(nnx.merge(definition, _parameters(params, base, models, key, dtype)), remat)
        rows = repeated(batch, 1 + len(models))
        logps = sequence_logps(module, rows, frozen_head=frozen_head).reshape(1 + len(models), -1, 2)
    frozen = jax.lax.stop_gradient(logps)
    # By differences, each of which is exactly 0 where the models are one.
    apart = jnp.tensordot(anchors.weights, frozen[:1] - frozen[1:], axes=1)
    return logps[0], frozen[0] - apart


def update_key(config: TrainConfig | SupervisedConfig, step: int, base: Base | None) -> Array | None:
    """The key of an update's noise: dropout of adapters, rounding of parameters; None where there is neither."""
    if config.param_dtype == "float32" and (base is None or not base.dropout):
        return None
    # The key without the last fold is the sampler's.
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), 1)


def dtype_of(config: TrainConfig | SupervisedConfig) -> str:
    """The dtype of products and activations on this machine's device."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclass(frozen=True)
class Learner:
    """The policy as it is trained, and its reference, in the dtype of products.

    Args:
      definition: GraphDef of the policy.
      base: the frozen model that adapters are trained on; None where all parameters are trained.
      ref: π_ref.
      ref_adapters: those of π_ref on the base, where `shared`; None for the base itself.
      shared: π_ref is on the base.
      dtype: of products and activations.
    """

    definition: Any
    base: Base | None
    ref: Frozen
    ref_adapters: Adapters | None
    shared: bool
    dtype: str

    @classmethod
    def of(cls, policy: LanguageModel, base: Base | None, ref: LanguageModel, config: TrainConfig) -> "Learner":
        """The policy on its base, if it has one, beside the reference: on the same arrays where it holds the same.

        Raises:
          ConfigError: in low precision, the reference is of another architecture.
        """
        dtype, own = dtype_of(config), nnx.graphdef(policy.module)
        definition, ref_params = nnx.split(ref.module)
        require(
            dtype == "float32" or definition == own,
            "ref must be of the policy's architecture in bfloat16, where both are scored by one program",
            type(ref.module).__name__,
            'Set dtype="float32", or choose another reference.',
        )
        shared, ref_adapters = (False, None) if base is None else on_base(ref, base)
        if base is not None:
            base = replace(base, params=cast_once(base.params, dtype=dtype))
        if base is not None and shared:
            ref_params = base.params if ref_adapters is None else base.adapted(ref_adapters)
        frozen = Frozen(definition, cast_once(ref_params, dtype=dtype))
        return cls(own, base, frozen, ref_adapters, shared, dtype)

    def model(self, trained: Any) -> Frozen:
        """The model of trained parameters or adapters; of () that of no round."""
        whole = self.base is None or not trained
        params = trained if whole else cast(Base, self.base).adapted(trained)
        return Frozen(self.definition, cast_once(params, dtype=self.dtype))

    def scores_itself(self, config: TrainConfig) -> bool:
        """Whether the update scores what π is compared with: in low precision, and recorded pairs on a shared base."""
        return self.dtype != "float32" or (self.shared and config.method.offline)

    def anchors(self, config: TrainConfig, step: int, round_params: Any) -> Anchors:
        """The frozen models that π is compared with at a step."""
        weights = config.method.anchor_weights(*config.strengths(step))
        models = (self.ref_adapters if self.shared else self.ref.params, round_params)
        used = [(weight, model) for weight, model in zip(weights, models, strict=True) if weight]
        return Anchors(jnp.asarray([weight for weight, _ in used], jnp.float32), tuple(model for _, model in used))


@partial(jax.jit, static_argnames="dtype")
def _cast(params: Any, *, dtype: str) -> Any:
    return in_dtype(params, dtype)


def cast_once(params: Any, *, dtype: str) -> Any:
    """Parameters in a dtype: the same arrays where they are in it already."""
    wanted = jax.eval_shape(partial(in_dtype, dtype=dtype), params)
    (leaves, structure), (likes, like) = (jax.tree.flatten(tree) for tree in (params, wanted))
    same = len({structure, like}) == 1 and all(leaf.dtype == x.dtype for leaf, x in zip(leaves, likes, strict=True))
    return params if same else _cast(params, dtype=dtype)
