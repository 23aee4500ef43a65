"""The tensors of a checkpoint in Hugging Face's layout, and the parameters that each holds.

A tensor is of one layer; layers of one kind lie in one parameter here, along its first axis.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastpref.models.decoder import DecoderConfig
from fastpref.models.families import FAMILIES
from fastpref.models.layers import layers_in
from fastpref.models.t5 import T5Config


def t5_names(gated: bool) -> dict[str, str]:
    """Our parameter paths, with {} for a layer number, to tensor names of T5."""
    projections = {name: f"{name}.weight" for name in "qkvo"}
    inner = {"gate": "wi_0.weight", "up": "wi_1.weight" if gated else "wi.weight", "down": "wo.weight"}
    names = {"embedding": "shared.weight", "lm_head": "lm_head.weight"}
    for stack in ("encoder", "decoder"):
        names[f"{stack}.norm.scale"] = f"{stack}.final_layer_norm.weight"
        names[f"{stack}.position_bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for ours, theirs, block, kernels in (
        ("encoder.layers.{}.attention", "encoder.block.{}.layer.0", "SelfAttention", projections),
        ("encoder.layers.{}.feed_forward", "encoder.block.{}.layer.1", "DenseReluDense", inner),
        ("decoder.layers.{}.attention", "decoder.block.{}.layer.0", "SelfAttention", projections),
        ("cross.{}", "decoder.block.{}.layer.1", "EncDecAttention", projections),
        ("decoder.layers.{}.feed_forward", "decoder.block.{}.layer.2", "DenseReluDense", inner),
    ):
        names[f"{ours}.norm.scale"] = f"{theirs}.layer_norm.weight"
        names |= {f"{ours}.{name}": f"{theirs}.{block}.{kernel}" for name, kernel in kernels.items()}
    return names


KEPT_AS_IS = ("embedding", "positions", "position_bias")
"""Matrices that are not kernels: both layouts are the same. Every other matrix is [out, in] on disk, [in, out] here."""


class Leaf(NamedTuple):
    """A parameter, or one layer's part of it."""

    path: tuple[Any, ...]
    """In the module."""
    variable: nnx.Variable[Any]
    layer: int | None
    """None of a parameter that no layers share."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape without an axis of layers."""
        shape = tuple(self.variable.shape)
        return shape if self.layer is None else shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * int(jnp.dtype(self.variable.dtype).itemsize)

    @property
    def array(self) -> np.ndarray:
        """Its numbers."""
        whole = self.variable[...]
        # By a number that is no part of the program: one for all layers.
        part = whole if self.layer is None else jax.lax.dynamic_index_in_dim(whole, self.layer, keepdims=False)
        return np.asarray(part)


class Stored(NamedTuple):
    """A tensor on disk, and the parameters that lie in it one after the other."""

    pattern: str
    """Its name, with {} for the number of a layer."""
    leaves: tuple[Leaf, ...]
    turned: bool
    """Whether it is [out, in] on disk and [in, out] here."""

    @property
    def sides(self) -> list[tuple[int, ...]]:
        """The shape on disk of each parameter."""
        shapes = [leaf.shape for leaf in self.leaves]
        return [shape[::-1] for shape in shapes] if self.turned else shapes

    @property
    def axis(self) -> int:
        """The axis on disk along which the parameters lie."""
        return 0 if self.turned else len(self.sides[0]) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape on disk of the whole."""
        whole, axis = list(self.sides[0]), self.axis
        whole[axis] = sum(side[axis] for side in self.sides)
        return tuple(whole)

    @property
    def parts(self) -> list[dict[str, slice]]:
        """Where each parameter lies on disk, in the words of `Part`."""
        if len(self.leaves) == 1:
            return [{}]
        ends = np.cumsum([side[self.axis] for side in self.sides]).tolist()
        word = "columns" if self.axis else "rows"
        return [{word: slice(start, end)} for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def tensor(self) -> np.ndarray:
        """The tensor to write."""
        arrays = [leaf.array for leaf in self.leaves]
        arrays = [array.T for array in arrays] if self.turned else arrays
        return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=self.axis))


def stored_tensors(config: T5Config | DecoderConfig, raw: Mapping[str, Any], state: Any) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name on disk, with the parameters that it holds."""
    family = FAMILIES.get(raw["model_type"])
    names = t5_names(config.gated) if isinstance(config, T5Config) else FAMILIES[raw["model_type"]].names
    as_is = KEPT_AS_IS if family is None else (*KEPT_AS_IS, *family.as_is)
    order = {pattern: number for number, pattern in enumerate(names)}

    def pattern(path: tuple[Any, ...]) -> str:
        at = layers_in(path)
        return ".".join(path if at is None else (*path[: at + 1], "{}", *path[at + 1 :]))

    tensors: dict[str, Stored] = {}
    for path, variable in sorted(nnx.to_flat_state(state), key=lambda leaf: order[pattern(leaf[0])]):
        theirs = names[pattern(path)]
        numbers = [None] if layers_in(path) is None else range(variable.shape[0])
        for leaf in (Leaf(path, variable, number) for number in numbers):
            name = theirs.format(leaf.layer)
            before = tensors[name].leaves if name in tensors else ()
            turned = len(leaf.shape) == 2 and path[-1] not in as_is
            tensors[name] = Stored(theirs, (*before, leaf), turned)
    return tensors
