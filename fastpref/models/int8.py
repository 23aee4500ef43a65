"""Models whose frozen matrices are in int8: half of the memory of bfloat16, a quarter of float32.

Kernels of layers have a scale for each output, as `int-quantized` weights of the compressed-tensors format have by
channel: symmetric, round to nearest. So has the head, which is the embedding where both are one; its rows are then
converted as they are read. All else stays as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from fastpref.kernels import quantize
from fastpref.method.errors import ModelError
from fastpref.models.decoder import Decoder
from fastpref.models.huggingface import LanguageModel
from fastpref.models.lowrank import Adapted, Kernel, Quantized, weight_of
from fastpref.models.t5 import T5

KERNELS = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
"""Last names in the paths of parameters that layers and head multiply with."""

_quantize = jax.jit(quantize, static_argnames="axis")


def quantized(model: LanguageModel) -> LanguageModel:
    """The model with its kernels in int8, to be read and to train adapters on; adapters stay as they are.

    A product differs from that of the model by at most Σ|x|·scale/2 for each output, a scale being the largest size of
    that output's weights over 127. The arrays of the model as it is given are not changed.

    Raises:
      ModelError: the module is not of this package.
    """
    if not isinstance(model.module, T5 | Decoder):
        raise ModelError(
            f"a model in int8 must be a T5 or a Decoder, but received a {type(model.module).__name__}. Leave "
            "base_dtype out."
        )
    params = quantized_params(nnx.state(model.module))
    return replace(model, module=nnx.merge(nnx.graphdef(model.module), params))


def all_quantized(models: Sequence[LanguageModel]) -> list[LanguageModel]:
    """Models in int8, in their order; those that are one object stay one."""
    made = {id(model): quantized(model) for model in {id(model): model for model in models}.values()}
    return [made[id(model)] for model in models]


def quantized_params(params: Any) -> Any:
    """Parameters of a module with its kernels in int8."""
    flat = dict(nnx.to_flat_state(params))
    tied = not any(path[-1] == "lm_head" for path in flat)
    for path, variable in flat.items():
        axis = -2 if path[-1] in KERNELS else -1 if tied and path[-1] == "embedding" else None
        if axis is not None:
            flat[path] = variable.replace(_in_int8(variable[...], axis))
    return nnx.from_flat_state(flat.items())


def _in_int8(kernel: Kernel, axis: int) -> Kernel:
    weight = weight_of(kernel)
    if not isinstance(weight, Quantized):
        entries, scale = _quantize(weight, axis=axis)
        weight = Quantized(entries, scale, axis, weight.dtype.name)
    return replace(kernel, weight=weight) if isinstance(kernel, Adapted) else weight
