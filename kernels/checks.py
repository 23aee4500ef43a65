"""What the public functions refuse, in words: the rule, the value received and the remedy."""

import jax
import numpy as np
from jax import Array

from .head import Head


def check_rows(hidden: Array, head: Head, owner: str = "hidden") -> None:
    """Hidden states that fit their head: [N, D] with the head's width and dtype."""
    if hidden.ndim != 2:
        raise ValueError(f"{owner} must have one row per token, [N, D], but received shape {hidden.shape}. Reshape it.")
    if hidden.shape[1] != head.width:
        raise ValueError(
            f"{owner} must be as wide as its head, but received D = {hidden.shape[1]} for a head of D = {head.width} "
            f"and V = {head.vocab_size}. Check vocab_axis."
        )
    if not head.frozen and hidden.dtype != head.weight.dtype:
        raise ValueError(
            f"{owner} and its head's weight must have one dtype, but received {hidden.dtype} and "
            f"{head.weight.dtype}. Convert one of them with astype."
        )


def check_frozen(head: Head, frozen_head: bool) -> None:
    """A head in int8, which has no gradient, is frozen."""
    if head.frozen and not frozen_head:
        raise ValueError(
            "frozen_head must be True for a head in int8, to which no gradient goes, but received False. Pass "
            "frozen_head=True, or train a head in floating point."
        )


def check_heads(head: Head, ref_head: Head) -> None:
    """Two heads of one vocabulary, which lies on the devices alike."""
    if ref_head.mesh_axis != head.mesh_axis:
        raise ValueError(
            f"both heads must be split alike, but received mesh axes {head.mesh_axis!r} and {ref_head.mesh_axis!r}. "
            "Split both over one axis, or none."
        )
    if ref_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"both heads must have one vocabulary, but received V = {head.vocab_size} and {ref_head.vocab_size}. "
            "Pad the smaller."
        )


def check_length(name: str, array: Array, shape: tuple[int, ...], meaning: str) -> None:
    """An array of exactly this shape."""
    if array.shape != shape:
        raise ValueError(
            f"{name} must have {meaning}, shape {shape}, but received shape {array.shape}. Flatten both alike."
        )


def check_fraction(name: str, value: float | Array) -> None:
    """A number, or every entry of an array whose values are known, in [0, 1]. Traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    known = np.asarray(value)
    if not ((known >= 0) & (known <= 1)).all():
        low, high = known.min(), known.max()
        raise ValueError(
            f"{name} must lie in [0, 1], but received values between {low} and {high}. Pass a weight or a probability."
        )
