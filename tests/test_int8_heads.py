"""Heads in int8: every kernel gives what it gives for the head that they stand for."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import PartitionSpec as P
from kernel_cases import (
    LARGE,
    SMALL,
    Case,
    assert_as_exact,
    error,
    every_fast_one,
    every_implementation,
    float64,
    interpreted_tpu,
    make_head,
    make_hidden,
    make_targets,
    normal,
    true_gradients,
    true_log_softmax,
    true_logits,
)

from fastpref import losses
from fastpref.kernels import Head, divergence, mixture_sample, preference_loss, quantize, token_logprobs

pytestmark = interpreted_tpu
KEY = jax.random.key(3)
CASES = [SMALL[1], SMALL[3], SMALL[6], LARGE[0], Case(1100, rows=140, width=24), Case(700, 140, vocab_axis=1)]
some_cases = pytest.mark.parametrize("case", CASES, ids=str)


def in_int8(head: Head) -> Head:
    weight, scales = quantize(head.weight, 1 - head.vocab_axis)
    return replace(head, weight=weight, scales=scales)


def in_float(head: Head, dtype: str = "float32") -> Head:
    """The head that an int8 one stands for, float32: entries have 7 bits, scales 24."""
    scales = np.expand_dims(np.asarray(head.scales), 1 - head.vocab_axis)
    return replace(head, weight=jnp.asarray(np.asarray(head.weight, np.float32) * scales, dtype), scales=None)


def true_head(head: Head) -> Head:
    """The same in float64, for NumPy."""
    scales = np.expand_dims(float64(head.scales), 1 - head.vocab_axis)
    return Exact(float64(head.weight) * scales, head.vocab_axis, head.scale, head.soft_cap)  # type: ignore[return-value]


class Exact:
    """A head whose weight `float64` takes as it is."""

    def __init__(self, weight: np.ndarray, vocab_axis: int, scale: float, soft_cap: float | None) -> None:
        self.vocab_axis, self.scale, self.soft_cap = vocab_axis, scale, soft_cap
        self.weight = _Exact(weight)


class _Exact:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def astype(self, _: object) -> np.ndarray:
        return self.values


@some_cases
def test_logits_are_within_half_a_scale_of_the_float_head(case: Case) -> None:
    """|x W − x Ŵ| ≤ Σ |x| · scale / 2, for each token."""
    plain = replace(make_head(case), scale=1.0, soft_cap=None)
    head, hidden = in_int8(plain), make_hidden(case)
    apart = np.abs(true_logits(hidden, true_head(head)) - true_logits(hidden, plain))
    bound = np.abs(float64(hidden)).sum(1)[:, None] * float64(head.scales)[None] / 2
    assert np.all(apart <= bound * (1 + 1e-5))
    assert apart.max() > bound.max() / 50
    exact = true_logits(hidden, true_head(head))
    for logits in (head.logits(hidden), head.product_by_token(hidden).T):
        assert error(logits, exact) < 2.0**-20


def test_entries_are_rounded_to_even_and_keep_zeros() -> None:
    weight = jnp.asarray([[127.0, 0.0, -0.5], [0.5, 0.0, 0.25], [-2.5, 0.0, 0.125], [1.5, 0.0, 0.0]])
    entries, scales = quantize(weight, 0)
    assert scales.tolist() == [1.0, 1.0, pytest.approx(0.5 / 127)]
    assert entries[:, 0].tolist() == [127, 0, -2, 2]
    assert not np.any(entries[:, 1])
    assert entries[:, 2].tolist() == [-127, 64, 32, 0]
    tiny = jnp.full((2, 3), 2.0**-126 * 1.5)
    for array in (tiny, tiny.astype(jnp.bfloat16), jnp.full((2, 3), 3e38)):
        entries, scales = quantize(array, 1)
        assert np.all(np.abs(entries) <= 127)
        np.testing.assert_allclose(
            entries.astype(jnp.float32) * scales[:, None], array.astype(jnp.float32), atol=float(scales[0]) / 2
        )
    stacked = normal((3, 5, 4), 1)
    entries, scales = quantize(stacked, -2)
    assert (entries.shape, scales.shape) == ((3, 5, 4), (3, 4))
    np.testing.assert_array_equal(entries[1], quantize(stacked[1], 0)[0])


@partial(jax.jit, static_argnames="implementation")
def scored(hidden: Array, head: Head, targets: Array, weights: Array, implementation: str) -> tuple[Array, Array]:
    def total(hidden: Array) -> tuple[Array, Array]:
        logps = token_logprobs(hidden, head, targets, frozen_head=True, implementation=implementation)
        return jnp.sum(logps * weights), logps

    (_, logps), states = jax.value_and_grad(total, has_aux=True)(hidden)
    return logps, states


@every_implementation
@some_cases
def test_log_probs_and_gradients_are_those_of_its_float_head(case: Case, implementation: str) -> None:
    hidden, head, targets = make_hidden(case), in_int8(make_head(case)), make_targets(case)
    weights = normal((case.rows,), 7)
    truth = true_head(head)
    logps = true_log_softmax(true_logits(hidden, truth))[np.arange(case.rows), np.asarray(targets)]
    states, _ = true_gradients(hidden, truth, targets, float64(weights))
    ordinary = scored(hidden, in_float(head, case.dtype), targets, weights, "reference")
    ours = scored(hidden, head, targets, weights, implementation)
    for value, expected, exact, dtype in zip(ours, ordinary, (logps, states), ("float32", case.dtype), strict=True):
        if case.dtype == "float32":
            assert_as_exact(value, expected, exact, dtype)
        else:  # The float head itself is rounded.
            assert error(value, exact) <= (2.0**-18 if dtype == "float32" else 3 * 2.0**-8)


@every_implementation
@some_cases
def test_draws_are_those_of_its_float_head(case: Case, implementation: str) -> None:
    heads = [in_int8(make_head(case, seed)) for seed in (0, 1)]
    hidden = [make_hidden(case, seed) for seed in (0, 1)]
    keywords = {
        "mixture_beta": jnp.linspace(0, 1, case.rows), "key": KEY, "row_ids": jnp.arange(case.rows), "step": 2,
    }  # fmt: skip
    expected = mixture_sample(
        hidden[0].astype(jnp.float32), in_float(heads[0]), hidden[1].astype(jnp.float32), in_float(heads[1]),
        implementation="reference", **keywords,
    )  # fmt: skip
    ours = mixture_sample(hidden[0], heads[0], hidden[1], heads[1], implementation=implementation, **keywords)
    np.testing.assert_array_equal(ours.token, expected.token)
    for value, other in zip(ours[1:], expected[1:], strict=True):
        np.testing.assert_allclose(value, other, rtol=2e-5, atol=2e-5)


@every_implementation
def test_an_int8_policy_may_stand_beside_a_float_reference(implementation: str) -> None:
    case = Case(1000, rows=20, width=16)
    wide = Case(1000, rows=20, width=32, vocab_axis=1, dtype="bfloat16")
    models = make_hidden(case), in_int8(make_head(case)), make_hidden(wide, 1), make_head(wide, 1)
    floats = models[0], in_float(models[1]), *models[2:]
    keywords = {"mixture_beta": 0.3, "key": KEY, "row_ids": jnp.arange(20), "step": 0}
    draws = [mixture_sample(*each, implementation=implementation, **keywords) for each in (models, floats)]
    np.testing.assert_array_equal(draws[0].token, draws[1].token)
    apart = [divergence(*each, implementation=implementation) for each in (models, floats)]
    for value, expected in zip(*apart, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@every_implementation
@pytest.mark.parametrize("case", [SMALL[3], SMALL[6], Case(1100, rows=140, width=24)], ids=str)
def test_divergences_are_those_of_its_float_head(case: Case, implementation: str) -> None:
    heads = [in_int8(make_head(case, seed)) for seed in (0, 1)]
    hidden = [make_hidden(case, seed) for seed in (0, 1)]
    ours = divergence(hidden[0], heads[0], hidden[1], heads[1], implementation=implementation)
    wide = [states.astype(jnp.float32) for states in hidden]
    expected = divergence(wide[0], in_float(heads[0]), wide[1], in_float(heads[1]), implementation="reference")
    for value, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-5)
    same = divergence(hidden[0], heads[0], hidden[0], heads[0], implementation=implementation)
    np.testing.assert_array_equal(same.kl, 0)


@every_implementation
def test_the_loss_is_that_of_its_float_head(implementation: str) -> None:
    case = Case(600, rows=60, width=16, soft_cap=5.0)
    head, hidden, targets = in_int8(make_head(case)), make_hidden(case), make_targets(case)
    segments = jnp.arange(60) // 15
    rest = (targets, segments, jnp.zeros((2, 2)), jnp.asarray([0.8, 0.1]))

    @partial(jax.jit, static_argnames="implementation")
    def run(hidden: Array, head: Head, implementation: str) -> tuple[Array, Array]:
        def loss(hidden: Array) -> Array:
            bound = losses.bind(losses.ipo, tau=0.1)
            return preference_loss(
                hidden, head, *rest, loss=bound, frozen_head=True, implementation=implementation
            ).loss

        return jax.value_and_grad(loss)(hidden)

    ours, expected = run(hidden, head, implementation), run(hidden, in_float(head), "reference")
    for value, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=2e-4, atol=2e-4 * float(jnp.abs(other).max()))


@every_fast_one
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_a_split_head_is_the_whole_one(implementation: str, vocab_axis: int) -> None:
    case = Case(2 * 700, rows=10, width=16, vocab_axis=vocab_axis)
    head, ref_head = in_int8(make_head(case)), in_int8(make_head(case, 1))
    hidden, ref_hidden, targets, weights = make_hidden(case), make_hidden(case, 1), make_targets(case), normal((10,), 4)
    mesh = jax.make_mesh((2,), ("vocab",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    keywords = {"mixture_beta": 0.3, "key": KEY, "row_ids": jnp.arange(10), "step": 0, "implementation": implementation}
    sides = ("vocab", None)[:: 1 - 2 * vocab_axis]

    def everything(head: Head, ref_head: Head) -> tuple[Array, ...]:
        def total(hidden: Array) -> tuple[Array, Array]:
            logps = token_logprobs(hidden, head, targets, frozen_head=True, implementation=implementation)
            return jnp.sum(logps * weights), logps

        (_, logps), states = jax.value_and_grad(total, has_aux=True)(hidden)
        drawn = mixture_sample(hidden, head, ref_hidden, ref_head, **keywords)
        apart = divergence(hidden, head, ref_hidden, ref_head, implementation=implementation)
        return logps, states, *drawn, *apart

    def of_slices(*arrays: Array) -> tuple[Array, ...]:
        heads = [Head(w, vocab_axis, mesh_axis="vocab", scales=s) for w, s in (arrays[:2], arrays[2:])]
        return everything(*heads)

    specs = (P(*sides), P("vocab")) * 2
    split = jax.jit(jax.shard_map(of_slices, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    ours = split(head.weight, head.scales, ref_head.weight, ref_head.scales)
    for value, expected in zip(ours, jax.jit(everything)(head, ref_head), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


HEAD = in_int8(make_head(Case(17)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Head(HEAD.weight), "scales of a head must come with an int8 weight, but received None"),
        (lambda: Head(make_head(Case(17)).weight, scales=HEAD.scales), "must be None for a floating-point weight"),
        (lambda: Head(HEAD.weight, scales=HEAD.scales[1:]), r"for each token, \[17\], but received float32"),
        (lambda: Head(HEAD.weight, 1, scales=HEAD.scales), r"one float32 for each token, \[16\]"),
        (lambda: Head(HEAD.weight.astype(jnp.int32), scales=HEAD.scales), "floating point or int8, but received int32"),
        (
            lambda: token_logprobs(make_hidden(Case(17)), HEAD, make_targets(Case(17))),
            "frozen_head must be True for a head in int8, to which no gradient goes, but received False. Pass froz",
        ),
        (
            lambda: preference_loss(
                make_hidden(Case(17)), HEAD, make_targets(Case(17)), jnp.zeros(24, jnp.int32), jnp.zeros((1, 2)),
                jnp.ones(1), loss=losses.bind(losses.dpo, tau=1.0),
            ),
            "frozen_head must be True for a head in int8",
        ),
    ],
    ids=range(7),
)  # fmt: skip
def test_errors_say_rule_value_and_remedy(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
