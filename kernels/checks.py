"""What the public functions refuse, in words: the rule, the value received and the remedy."""

import jax
import numpy as np
from jax import Array

from .head import Head


def check_rows(hidden: Array, head: Head, owner: str = "hidden") -> None:
    """Hidden states that fit their head: [N, D] with the head's width and dtype."""
    if hidden.ndim != 2:
        raise ValueError(f"{owner} has one row per token, [N, D], but its shape is {hidden.shape}: reshape it")
    if hidden.shape[1] != head.width:
        raise ValueError(
            f"{owner} is as wide as its head, but has D = {hidden.shape[1]} for a head of D = {head.width} and "
            f"V = {head.vocab_size}: check vocab_axis"
        )
    if hidden.dtype != head.weight.dtype:
        raise ValueError(
            f"{owner} and its head's weight have one dtype, but are {hidden.dtype} and {head.weight.dtype}: "
            "convert one of them with astype"
        )


def check_heads(head: Head, ref_head: Head) -> None:
    """Two heads of one vocabulary, which lies on the devices alike."""
    if ref_head.mesh_axis != head.mesh_axis:
        raise ValueError(
            f"both heads are split alike, but their mesh axes are {head.mesh_axis!r} and {ref_head.mesh_axis!r}: "
            "split both over one axis, or none"
        )
    if ref_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"both heads have one vocabulary, but V is {head.vocab_size} and {ref_head.vocab_size}: pad the smaller"
        )


def check_length(name: str, array: Array, shape: tuple[int, ...], meaning: str) -> None:
    """An array of exactly this shape."""
    if array.shape != shape:
        raise ValueError(f"{name} has {meaning}, shape {shape}, but its shape is {array.shape}")


def check_fraction(name: str, value: float | Array) -> None:
    """A number, or every entry of an array whose values are known, in [0, 1]. Traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    known = np.asarray(value)
    if not ((known >= 0) & (known <= 1)).all():
        low, high = known.min(), known.max()
        raise ValueError(f"{name} lies in [0, 1], but is between {low} and {high}: it is a weight or a probability")
