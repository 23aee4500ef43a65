"""KL and entropy, all implementations: values against float64, equal and near models, what a row depends on."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from kernel_cases import (
    LARGE,
    SMALL,
    Case,
    assert_as_exact,
    error,
    every_case,
    every_fast_one,
    every_implementation,
    float64,
    interpreted_tpu,
    make_head,
    make_hidden,
    normal,
    products,
    true_log_softmax,
    true_logits,
)

from fastpref.kernels import Divergence, Head, divergence
from fastpref.kernels.divergence import IMPLEMENTATIONS
from fastpref.kernels.divergence.xla import divergence as chunked

pytestmark = interpreted_tpu
CASE = Case(513, rows=41, soft_cap=4.0, scale=0.7)
Models = tuple[Array, Head, Array, Head]

compiled = jax.jit(divergence, static_argnames="implementation")


def models_of(case: Case) -> Models:
    return make_hidden(case), make_head(case), make_hidden(case, 1), make_head(case, 1)


def true_values(hidden: Array, head: Head, ref_hidden: Array, ref_head: Head) -> tuple[np.ndarray, np.ndarray]:
    """KL and entropy from all logits at once, float64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logps, ref = (true_log_softmax(true_logits(*model)) for model in ((hidden, head), (ref_hidden, ref_head)))
        probability = np.exp(logps)
        kl, entropy = (
            np.where(probability > 0, probability * terms, 0.0).sum(axis=1) for terms in (logps - ref, -logps)
        )
    return kl, entropy


@every_fast_one
@every_case
def test_values_are_as_exact_as_ordinary_jax(case: Case, implementation: str) -> None:
    models = models_of(case)
    ordinary, ours = (compiled(*models, implementation=name) for name in ("reference", implementation))
    for value, expected, exact in zip(ours, ordinary, true_values(*models), strict=True):
        assert value.dtype == jnp.float32
        assert_as_exact(value, expected, exact, "float32")


@every_implementation
@pytest.mark.parametrize("case", [*SMALL, LARGE[0], Case(700, rows=140, scale=0.3), Case(5, rows=7)], ids=str)
def test_equal_models_are_exactly_0_apart(case: Case, implementation: str) -> None:
    hidden, head = make_hidden(case), make_head(case)
    copy = hidden + 0, head.with_weight(head.weight + 0)

    @jax.jit
    def one_head(hidden: Array, ref_hidden: Array, head: Head) -> Divergence:
        return divergence(hidden, head, ref_hidden, head, implementation=implementation)

    for result in (one_head(hidden, copy[0], head), compiled(hidden, head, *copy, implementation=implementation)):
        np.testing.assert_array_equal(result.kl, 0)
        assert np.all(result.entropy > 0)


def exact_logits(vocab: int, rows: int, steps: int) -> Models:
    """Models whose logits float32 holds exactly, below 2⁴ in multiples of 2⁻¹⁶, and near each other."""
    rng, width = np.random.default_rng(7), 16
    weight = rng.integers(-64, 65, (vocab, width)) / 2**6
    hidden = rng.integers(-64, 65, (rows, width)) / 2**6
    ref_hidden = hidden + rng.integers(-steps, steps + 1, hidden.shape) / 2**10
    head = Head(jnp.asarray(weight, jnp.float32))
    return jnp.asarray(hidden, jnp.float32), head, jnp.asarray(ref_hidden, jnp.float32), head


@every_fast_one
@pytest.mark.parametrize("steps", [1, 8, 64])
@pytest.mark.parametrize("vocab", [17, 1000, 32128])
def test_near_models_keep_their_digits(vocab: int, steps: int, implementation: str) -> None:
    """Log-sum-exps near 10 have roundings of 10⁻⁶, which would be all of the smallest KL here.

    What is left: each token's exponentials, independent, 2⁻²³ of ‖p‖; as much of E[a − b], which is near √(2 KL); and
    the factors that bring eight parts together.
    """
    models = exact_logits(vocab, 20, steps)
    result, (kl, _) = compiled(*models, implementation=implementation), true_values(*models)
    norm = np.sqrt((np.exp(true_log_softmax(true_logits(*models[:2]))) ** 2).sum(axis=1))
    assert np.all(np.abs(float64(result.kl) - kl) <= 2.0**-24 * (1 + 4 * norm + 4 * np.sqrt(2 * kl)))


@every_implementation
def test_kl_of_near_models_is_small_on_both_sides(implementation: str) -> None:
    """Of the implementation itself: the public function cuts off what is below 0, which must be rounding."""
    case = Case(600, rows=300, width=8)
    hidden, head = make_hidden(case), make_head(case)
    measure = jax.jit(partial(IMPLEMENTATIONS[implementation].call, where=jnp.ones(case.rows, bool)))
    for scale in (1e-7, 1e-5, 1e-3):
        near = hidden + scale * normal(hidden.shape, 6)
        kl = measure(hidden, head, near, head).kl
        assert np.all(kl >= -1e-6)
        assert np.all(kl <= 1e-6 + 100 * scale**2)
        if implementation != "tpu":
            assert np.all(compiled(hidden, head, near, head, implementation=implementation).kl >= 0)


@pytest.mark.parametrize("chunk", [1, 16, 41, 1024])
def test_chunk_size_changes_nothing(chunk: int) -> None:
    models, where = models_of(CASE), jax.random.bernoulli(jax.random.key(1), 0.8, (CASE.rows,))
    expected = divergence(*models, where=where, implementation="reference")
    for value, other in zip(chunked(*models, where=where, chunk=chunk), expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=2e-6)


@every_implementation
def test_ignored_rows_may_hold_anything(implementation: str) -> None:
    hidden, head, ref_hidden, ref_head = models_of(CASE)
    where = jax.random.bernoulli(jax.random.key(2), 0.6, (CASE.rows,))
    kept = np.flatnonzero(where)
    spoiled = [jnp.where(where[:, None], states, jnp.nan) for states in (hidden, ref_hidden)]
    result = compiled(spoiled[0], head, spoiled[1], ref_head, where=where, implementation=implementation)
    alone = compiled(hidden[kept], head, ref_hidden[kept], ref_head, implementation=implementation)
    for value, other in zip(result, alone, strict=True):
        assert not np.any(value[~where])
        np.testing.assert_allclose(value[kept], other, rtol=2e-6)


@every_implementation
def test_nothing_to_measure_is_zero(implementation: str) -> None:
    hidden, head, ref_hidden, ref_head = models_of(CASE)
    nowhere = jnp.zeros(CASE.rows, bool)
    masked = compiled(hidden, head, ref_hidden, ref_head, where=nowhere, implementation=implementation)
    empty = compiled(hidden[:0], head, ref_hidden[:0], ref_head, implementation=implementation)
    assert empty.kl.shape == empty.entropy.shape == (0,)
    assert not any(np.any(array) for array in masked + empty)


@every_implementation
def test_order_of_rows_does_not_matter(implementation: str) -> None:
    hidden, head, ref_hidden, ref_head = models_of(CASE)
    order = jax.random.permutation(jax.random.key(5), CASE.rows)
    plain = compiled(hidden, head, ref_hidden, ref_head, implementation=implementation)
    turned = compiled(hidden[order], head, ref_hidden[order], ref_head, implementation=implementation)
    for value, other in zip(turned, plain, strict=True):
        np.testing.assert_allclose(value, other[order], rtol=2e-6)


@every_fast_one
def test_models_may_differ_in_width_dtype_and_orientation(implementation: str) -> None:
    narrow, wide = Case(513, rows=9, width=4), Case(513, rows=9, width=12, vocab_axis=1, dtype="bfloat16", soft_cap=2.0)
    for first, second in ((narrow, wide), (wide, narrow)):
        models = make_hidden(first), make_head(first), make_hidden(second), make_head(second)
        ordinary, ours = (compiled(*models, implementation=name) for name in ("reference", implementation))
        for value, expected, exact in zip(ours, ordinary, true_values(*models), strict=True):
            assert_as_exact(value, expected, exact, "float32")


def flat_and_sharp(vocab: int = 4096) -> Models:
    """A policy that knows nothing, and a reference with one peak: almost all of the mass is in the one."""
    head = Head(jnp.concatenate([jnp.full((1, 1), 1.0), jnp.zeros((vocab - 1, 1))]))
    return jnp.zeros((2, 1)), head, jnp.asarray([[20.0], [60.0]]), head


def sharp_and_flat() -> Models:
    hidden, head, ref_hidden, ref_head = flat_and_sharp()
    return ref_hidden, ref_head, hidden, head


@every_implementation
@pytest.mark.parametrize(
    "models",
    [flat_and_sharp(), sharp_and_flat(), models_of(Case(1000, scale=1e3)), models_of(Case(1000, rows=6, scale=1e-4))],
    ids=["flat from sharp", "sharp from flat", "large logits", "small logits"],
)
def test_extreme_logits_keep_their_digits(models: Models, implementation: str) -> None:
    result, exact = compiled(*models, implementation=implementation), true_values(*models)
    for value, truth in zip(result, exact, strict=True):
        assert np.isfinite(value).all()
        # Entropies of single tokens are a difference of numbers near 1.
        np.testing.assert_allclose(value, truth, rtol=1e-5, atol=4e-7)


@every_implementation
def test_tokens_without_probability(implementation: str) -> None:
    case = Case(600, rows=12)
    hidden, ref_hidden = (make_hidden(case, seed).at[:, 0].set(1.0) for seed in (0, 1))

    def without(seed: int, *ids: int) -> Head:
        head = make_head(case, seed)
        return head.with_weight(head.weight.at[jnp.asarray(ids, jnp.int32), 0].set(-jnp.inf))

    def apart(head: Head, ref_head: Head) -> Divergence:
        return compiled(hidden, head, ref_hidden, ref_head, implementation=implementation)

    few, more = (3, 550), (3, 8, 550, 551)
    for policy_ids, ref_ids in ((few, few), (more, few)):
        models = hidden, without(0, *policy_ids), ref_hidden, without(1, *ref_ids)
        for value, truth in zip(apart(models[1], models[3]), true_values(*models), strict=True):
            assert error(value, truth) < 1e-6
    unreachable = apart(without(0, *few), without(1, *more))
    np.testing.assert_array_equal(unreachable.kl, np.inf)
    assert np.isfinite(unreachable.entropy).all()
    # A whole tile of tokens, the first, and then all of them.
    tile = tuple(range(512))
    models = hidden, without(0, *tile), ref_hidden, without(1, *tile)
    assert error(apart(models[1], models[3]).kl, true_values(*models)[0]) < 1e-6
    np.testing.assert_array_equal(apart(without(0, *few), without(1, *tile)).kl, np.inf)
    everything = tuple(range(600))
    assert np.isnan(apart(without(0, *everything), without(1)).kl).all()
    assert np.isnan(apart(without(0, *everything), without(1)).entropy).all()
    assert np.isnan(apart(without(0), without(1, *everything)).kl).all()


@every_implementation
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_not_hidden(bad: float, implementation: str) -> None:
    hidden, head, ref_hidden, ref_head = models_of(Case(600, rows=5))
    result = compiled(hidden.at[3].set(bad), head, ref_hidden, ref_head, implementation=implementation)
    apart = compiled(hidden, head, ref_hidden.at[3].set(bad), ref_head, implementation=implementation)
    for values in (*result, apart.kl):
        np.testing.assert_array_equal(np.isnan(values), np.arange(5) == 3)
    assert np.isfinite(apart.entropy).all()


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Everything that a program does, inside its loops and branches too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def test_no_more_than_a_chunk_of_logits_is_ever_made() -> None:
    case = Case(512, rows=128, width=8)
    hidden, head, ref_hidden, ref_head = models_of(case)

    def largest(chunk: int, ref_head: Head) -> int:
        def run(hidden: Array) -> Divergence:
            return chunked(hidden, head, ref_hidden, ref_head, where=jnp.ones(case.rows, bool), chunk=chunk)

        outputs = [out.aval for one in equations(jax.make_jaxpr(run)(hidden).jaxpr) for out in one.outvars]
        return max(aval.size for aval in outputs if hasattr(aval, "size"))

    assert largest(16, ref_head) == 16 * 512
    assert largest(128, ref_head) == 128 * 512
    assert largest(16, head) == 2 * 16 * 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_weight_is_read_once(dtype: str) -> None:
    case = Case(1000, rows=5, dtype=dtype)
    hidden, head, ref_hidden, _ = models_of(case)

    def run(ref_head: Head, implementation: str = "xla") -> Divergence:
        return divergence(hidden, head, ref_hidden, ref_head, implementation=implementation)

    def weights_read(ref_head: Head) -> int:
        traced = jax.make_jaxpr(lambda: run(ref_head, "tpu"))()
        (call,) = (one for one in equations(traced.jaxpr) if one.primitive.name == "pallas_call")
        return sum(variable.aval.shape == head.weight.shape for variable in call.invars)

    copy = head.with_weight(head.weight + 0)
    for ref_head, reads in ((head, 1), (copy, 2), (Head(head.weight, scale=0.5), 2)):
        assert products(lambda ref_head=ref_head: run(ref_head)) == reads
        assert weights_read(ref_head) == reads
    for one, two in zip(jax.jit(lambda: run(head))(), jax.jit(lambda: run(copy))(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_vmap_equals_a_loop() -> None:
    hidden, head, ref_hidden, ref_head = models_of(CASE)
    stacked = jnp.stack([hidden, hidden[::-1], 2 * hidden])
    where = jnp.arange(3)[:, None] * 10 < jnp.arange(CASE.rows)[None, :]

    def measure(hidden: Array, where: Array) -> Divergence:
        return divergence(hidden, head, ref_hidden, ref_head, where=where, implementation="xla")

    mapped = jax.jit(jax.vmap(measure))(stacked, where)
    for number, row in enumerate(zip(stacked, where, strict=True)):
        for value, other in zip(mapped, measure(*row), strict=True):
            np.testing.assert_allclose(value[number], other, rtol=1e-5, atol=1e-6)


@every_fast_one
def test_a_derivative_is_refused_in_words(implementation: str) -> None:
    hidden, head, ref_hidden, ref_head = models_of(SMALL[0])
    refused = r"arguments of divergence must be constants, but received .* derivative .*stop_gradient, or .*'reference'"

    def total(hidden: Array, head: Head, ref_hidden: Array, ref_head: Head) -> Array:
        return divergence(hidden, head, ref_hidden, ref_head, implementation=implementation).kl.sum()

    for argument in range(4):
        with pytest.raises(NotImplementedError, match=refused):
            jax.grad(total, argument)(hidden, head, ref_hidden, ref_head)
    with pytest.raises(NotImplementedError, match=refused):
        jax.jvp(partial(total, head=head, ref_hidden=ref_hidden, ref_head=ref_head), (hidden,), (hidden,))

    def reported(hidden: Array) -> tuple[Array, Array]:
        return jnp.sum(hidden**2), total(jax.lax.stop_gradient(hidden), head, ref_hidden, ref_head)

    gradient, kl = jax.jit(jax.grad(reported, has_aux=True))(hidden)
    np.testing.assert_allclose(gradient, 2 * hidden)
    assert kl > 0


def test_the_reference_is_differentiable() -> None:
    case = Case(40, rows=3, width=4)
    hidden, head, ref_hidden, ref_head = models_of(case)
    where = jnp.array([True, False, True])

    def kl(hidden: Array) -> Array:
        spoiled = jnp.where(where[:, None], hidden, jnp.nan)
        return divergence(spoiled, head, ref_hidden, ref_head, where=where, implementation="reference").kl.sum()

    logps, ref = (true_log_softmax(true_logits(*model)) for model in ((hidden, head), (ref_hidden, ref_head)))
    # ∂KL/∂z = p (log p − log p_ref − KL)
    slope = np.exp(logps) * (logps - ref - true_values(hidden, head, ref_hidden, ref_head)[0][:, None])
    expected = np.where(where[:, None], slope @ float64(head.weight), 0.0)
    np.testing.assert_allclose(jax.grad(kl)(hidden), expected, rtol=1e-4, atol=1e-5)


def test_errors_say_rule_value_and_remedy() -> None:
    hidden, head, ref_hidden, ref_head = models_of(SMALL[0])
    with pytest.raises(
        ValueError, match=r"^ref_hidden must be as wide as its head, but received D = 8 for a head of D"
    ):
        divergence(hidden, head, ref_hidden[:, :8], ref_head)
    with pytest.raises(
        ValueError, match=r"^hidden and its head's weight must have one dtype, but received bfloat16 and"
    ):
        divergence(hidden.astype(jnp.bfloat16), head, ref_hidden, ref_head)
    with pytest.raises(ValueError, match=r"must have one vocabulary, but received V = 17 and 18\. Pad the smaller\.$"):
        divergence(hidden, head, ref_hidden, make_head(Case(18)))
    with pytest.raises(ValueError, match=r"must be split alike, but received mesh axes None and 'model'\. Split both"):
        divergence(hidden, head, ref_hidden, Head(ref_head.weight, mesh_axis="model"))
    with pytest.raises(ValueError, match=r"of divergence must be one of .* or None, but received 'fast'\. Pass None"):
        divergence(hidden, head, ref_hidden, ref_head, implementation="fast")


def test_shapes_that_do_not_fit_are_refused(unchecked: None) -> None:
    hidden, head, ref_hidden, ref_head = models_of(SMALL[0])
    with pytest.raises(
        ValueError, match=r"must have the rows of hidden, shape \(24, 16\), but received shape \(23, 16\)"
    ):
        divergence(hidden, head, ref_hidden[1:], ref_head)
    with pytest.raises(
        ValueError, match=r"^where must have one flag per row of hidden, shape \(24,\), but received .*5"
    ):
        divergence(hidden, head, ref_hidden, ref_head, where=jnp.ones(5, bool))
