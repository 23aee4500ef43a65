"""The cases that every kernel's tests share, and the truth they are compared with: float64, in NumPy.

An implementation passes if its error is at most twice that of ordinary JAX (the reference implementation) on the same
numbers, plus ROUNDING: what one rounding of the result in that dtype may cost.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastpref.kernels import Head

ROUNDING = {"float32": 2.0**-20, "bfloat16": 2.0**-8}
IMPLEMENTATIONS = ["reference", "xla", "tpu"]


@dataclass(frozen=True)
class Case:
    vocab: int
    rows: int = 24
    width: int = 16
    vocab_axis: int = 0
    scale: float = 1.0
    soft_cap: float | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        layout = "VD" if self.vocab_axis == 0 else "DV"
        return f"V{self.vocab}-N{self.rows}-{layout}-x{self.scale}-cap{self.soft_cap}-{self.dtype}"


SMALL = [
    Case(17),
    Case(17, rows=1, vocab_axis=1, dtype="bfloat16"),
    Case(512, vocab_axis=1, scale=0.25),
    Case(513, soft_cap=3.0),
    Case(513, rows=3, dtype="bfloat16"),
    Case(1000, vocab_axis=1, scale=2.0, soft_cap=5.0),
    Case(1000, vocab_axis=1, scale=0.5, soft_cap=5.0, dtype="bfloat16"),
]
LARGE = [
    Case(32128, rows=6, width=8, scale=512**-0.5 * 8),
    Case(50257, rows=5, width=8, vocab_axis=1),
    Case(128256, rows=4, width=8, dtype="bfloat16"),
]
every_case = pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_fast_one = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
interpreted_tpu = pytest.mark.usefixtures("interpreted_tpu")
"""For modules in which "tpu" means the kernels in Pallas's interpreter."""


def normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def make_head(case: Case, seed: int = 0) -> Head:
    shape = (case.vocab, case.width) if case.vocab_axis == 0 else (case.width, case.vocab)
    return Head(normal(shape, 100 + seed).astype(case.dtype), case.vocab_axis, case.scale, case.soft_cap)


def make_hidden(case: Case, seed: int = 0) -> jax.Array:
    return normal((case.rows, case.width), 200 + seed).astype(case.dtype)


def make_targets(case: Case) -> jax.Array:
    return jnp.asarray(np.random.default_rng(300).integers(0, case.vocab, case.rows), jnp.int32)


def float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


def true_logits(hidden: jax.Array, head: Head) -> np.ndarray:
    weight = float64(head.weight)
    logits = head.scale * (float64(hidden) @ (weight.T if head.vocab_axis == 0 else weight))
    return logits if head.soft_cap is None else head.soft_cap * np.tanh(logits / head.soft_cap)


def true_log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def true_gradients(
    hidden: jax.Array, head: Head, targets: jax.Array, coefficients: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of Σ coefficient · log-prob in the hidden states and in the weight."""
    logits = true_logits(hidden, head)
    gradient = -np.exp(true_log_softmax(logits))
    gradient[np.arange(len(targets)), np.asarray(targets)] += 1
    gradient *= coefficients[:, None] * head.scale
    if head.soft_cap is not None:
        gradient *= 1 - (logits / head.soft_cap) ** 2
    weight, states = float64(head.weight), float64(hidden)
    if head.vocab_axis == 0:
        return gradient @ weight, gradient.T @ states
    return gradient @ weight.T, states.T @ gradient


def error(value: jax.Array, truth: np.ndarray) -> float:
    """Largest difference, relative to the largest true value."""
    assert value.shape == truth.shape
    difference = np.abs(float64(value) - truth).max(initial=0.0)
    return float(difference / max(np.abs(truth).max(initial=0.0), 1e-30))


def assert_as_exact(value: jax.Array, ordinary: jax.Array, truth: np.ndarray, dtype: str) -> None:
    """The bar that the module's first lines state; ordinary JAX itself is held to sixteen roundings."""
    assert error(ordinary, truth) <= 16 * ROUNDING[dtype]
    assert error(value, truth) <= 2 * error(ordinary, truth) + ROUNDING[dtype]


def products(function: object, *arguments: object) -> int:
    """Matrix products in a traced function, each loop body counted once."""
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general[")
