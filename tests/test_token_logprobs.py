from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from kernel_cases import (
    LARGE,
    SMALL,
    Case,
    assert_as_exact,
    every_fast_one,
    every_implementation,
    float64,
    interpreted_tpu,
    make_head,
    make_hidden,
    make_targets,
    normal,
    products,
    true_gradients,
    true_log_softmax,
    true_logits,
)

from fastpref.kernels import Head, token_logprobs
from fastpref.kernels.chunks import chunk_rows, compact, over_chunks
from fastpref.kernels.token_logprobs.xla import token_logprobs as chunked

pytestmark = interpreted_tpu
CASE = Case(513, rows=41, soft_cap=4.0, scale=0.7)
Result = tuple[Array, Array, Array]


@partial(jax.jit, static_argnames=("function", "frozen_head", "implementation", "chunk"))
def run(function: Callable[..., Array], hidden: Array, head: Head, targets: Array, weights: Array, **kwargs) -> Result:
    """Values, and the gradients of their weighted sum."""

    def weighted(hidden: Array, head: Head) -> tuple[Array, Array]:
        logps = function(hidden, head, targets, **kwargs)
        return jnp.sum(logps * weights), logps

    (_, logps), (states, matrix) = jax.value_and_grad(weighted, (0, 1), has_aux=True)(hidden, head)
    return logps, states, matrix.weight


def weights_of(rows: int) -> Array:
    return normal((rows,), 7)


@every_fast_one
@pytest.mark.parametrize(
    ("case", "frozen_head"),
    [(case, False) for case in SMALL + LARGE] + [(case, True) for case in (SMALL[1], SMALL[3], SMALL[6], LARGE[0])],
    ids=lambda value: {True: "frozen", False: "trained"}.get(value, str(value)),
)
def test_values_and_gradients_are_as_exact_as_ordinary_jax(case: Case, frozen_head: bool, implementation: str) -> None:
    hidden, head, targets, weights = make_hidden(case), make_head(case), make_targets(case), weights_of(case.rows)
    arguments = (token_logprobs, hidden, head, targets, weights)
    ordinary = run(*arguments, frozen_head=frozen_head, implementation="reference")
    ours = run(*arguments, frozen_head=frozen_head, implementation=implementation)
    logps = true_log_softmax(true_logits(hidden, head))[np.arange(case.rows), np.asarray(targets)]
    states, matrix = true_gradients(hidden, head, targets, float64(weights))
    truth = (logps, states, np.zeros_like(matrix) if frozen_head else matrix)
    for value, expected, exact, dtype in zip(ours, ordinary, truth, ["float32", case.dtype, case.dtype], strict=True):
        assert value.dtype == expected.dtype == dtype
        assert_as_exact(value, expected, exact, dtype)


@pytest.mark.parametrize("chunk", [1, 16, 41, 1024])
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained", "frozen"])
def test_chunk_size_changes_nothing(chunk: int, frozen_head: bool) -> None:
    hidden, head, targets, weights = make_hidden(CASE), make_head(CASE), make_targets(CASE), weights_of(CASE.rows)
    where = jax.random.bernoulli(jax.random.key(1), 0.8, (CASE.rows,))
    keywords = {"where": where, "frozen_head": frozen_head}
    expected = run(token_logprobs, hidden, head, targets, weights, implementation="reference", **keywords)
    for value, other in zip(
        run(chunked, hidden, head, targets, weights, chunk=chunk, **keywords), expected, strict=True
    ):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=2e-6)


@every_implementation
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained", "frozen"])
def test_ignored_rows_may_hold_anything(implementation: str, frozen_head: bool) -> None:
    hidden, head, targets, weights = make_hidden(CASE), make_head(CASE), make_targets(CASE), weights_of(CASE.rows)
    where = jax.random.bernoulli(jax.random.key(2), 0.6, (CASE.rows,))
    keywords = {"frozen_head": frozen_head, "implementation": implementation}
    spoiled = jnp.where(where[:, None], hidden, jnp.nan)
    ids = jnp.where(where, targets, -(10**6))
    logps, states, matrix = run(token_logprobs, spoiled, head, ids, weights, where=where, **keywords)
    kept = np.flatnonzero(where)
    alone = run(token_logprobs, hidden[kept], head, targets[kept], weights[kept], **keywords)
    assert not np.any(logps[~where])
    assert not np.any(states[~where])
    np.testing.assert_allclose(logps[kept], alone[0], rtol=1e-6)
    np.testing.assert_allclose(states[kept], alone[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(matrix, alone[2], rtol=1e-5, atol=1e-6)


@every_implementation
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained", "frozen"])
def test_nothing_to_score_is_zero(implementation: str, frozen_head: bool) -> None:
    hidden, head, targets, weights = make_hidden(CASE), make_head(CASE), make_targets(CASE), weights_of(CASE.rows)
    keywords = {"frozen_head": frozen_head, "implementation": implementation}
    masked = run(token_logprobs, hidden, head, targets, weights, where=jnp.zeros(CASE.rows, bool), **keywords)
    empty = run(token_logprobs, hidden[:0], head, targets[:0], weights[:0], **keywords)
    assert empty[0].shape == (0,)
    assert empty[1].shape == (0, CASE.width)
    assert not any(np.any(array) for array in masked + empty)


def test_ignored_rows_run_no_chunk() -> None:
    where = jnp.arange(1000) % 10 == 0
    rows = compact(where, 32)
    assert int(over_chunks(rows, 32, lambda _, count: count + 1, jnp.int32(0))) == 4
    assert rows.order[:100].tolist() == list(range(0, 1000, 10))


def test_a_chunk_of_logits_is_the_most_that_is_alive() -> None:
    rows, vocab, width = 2048, 32128, 4
    chunk = chunk_rows(rows, vocab)
    shapes = (
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        Head.tree_unflatten((0, 1.0, None, None), (jax.ShapeDtypeStruct((vocab, width), jnp.float32), None)),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )

    def loss(hidden: Array, head: Head, targets: Array) -> Array:
        return jnp.sum(token_logprobs(hidden, head, targets, implementation="xla"))

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * chunk * vocab * 4 < rows * vocab * 4 / 3


def test_products_are_as_few_as_promised() -> None:
    hidden, head, targets = make_hidden(CASE), make_head(CASE), make_targets(CASE)

    def total(hidden: Array, head: Head, frozen_head: bool) -> Array:
        return jnp.sum(token_logprobs(hidden, head, targets, frozen_head=frozen_head, implementation="xla"))

    assert products(lambda: total(hidden, head, False)) == 1
    assert products(lambda: total(hidden, head, True)) == 1
    assert products(jax.grad(lambda hidden: total(hidden, head, True)), hidden) == 2
    assert products(jax.grad(lambda head: total(hidden, head, False)), head) == 4


@every_implementation
def test_order_of_rows_does_not_matter(implementation: str) -> None:
    hidden, head, targets, weights = make_hidden(CASE), make_head(CASE), make_targets(CASE), weights_of(CASE.rows)
    order = jax.random.permutation(jax.random.key(5), CASE.rows)
    plain = run(token_logprobs, hidden, head, targets, weights, implementation=implementation)
    moved = run(token_logprobs, hidden[order], head, targets[order], weights[order], implementation=implementation)
    np.testing.assert_allclose(moved[0], plain[0][order], rtol=1e-6)
    np.testing.assert_allclose(moved[1], plain[1][order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved[2], plain[2], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained", "frozen"])
def test_vmap_equals_a_loop(frozen_head: bool) -> None:
    hidden, head, targets = make_hidden(CASE), make_head(CASE), make_targets(CASE)
    stacked = jnp.stack([hidden, hidden[::-1], 2 * hidden])
    where = jnp.arange(3)[:, None] * 10 < jnp.arange(CASE.rows)[None, :]

    @jax.jit
    def gradient(hidden: Array, where: Array) -> Array:
        return jax.grad(
            lambda hidden: jnp.sum(
                token_logprobs(hidden, head, targets, where=where, frozen_head=frozen_head, implementation="xla")
            )
        )(hidden)

    looped = jnp.stack([gradient(*row) for row in zip(stacked, where, strict=True)])
    np.testing.assert_allclose(jax.vmap(gradient)(stacked, where), looped, rtol=1e-5, atol=1e-6)


@every_implementation
def test_a_bad_target_on_a_scored_row_is_not_hidden(implementation: str) -> None:
    hidden, head = make_hidden(CASE), make_head(CASE)
    targets = make_targets(CASE).at[3].set(CASE.vocab)
    assert np.isnan(token_logprobs(hidden, head, targets, implementation=implementation)[3])


def test_gradients_of_bfloat16_heads_are_summed_in_float32() -> None:
    # 512 rows that each add 1/512 of the same gradient: bfloat16 sums would stop growing at 8 bits.
    case = Case(17, rows=1, dtype="bfloat16")
    hidden, head = make_hidden(case), make_head(case)
    rows = 512
    repeated = jnp.broadcast_to(hidden, (rows, case.width))
    targets = jnp.zeros(rows, jnp.int32)
    keywords = {"where": jnp.ones(rows, bool), "chunk": 16}
    many = run(chunked, repeated, head, targets, jnp.full(rows, 1 / rows), **keywords)[2]
    one = run(chunked, hidden, head, targets[:1], jnp.ones(1), where=jnp.ones(1, bool))[2]
    np.testing.assert_allclose(float64(many), float64(one), rtol=2**-7, atol=1e-4)


def test_errors_say_rule_value_and_remedy() -> None:
    hidden, head, targets = make_hidden(CASE), make_head(CASE), make_targets(CASE)
    with pytest.raises(
        ValueError, match=r"must be as wide as its head, but received D = 8 for a head of D = 16.*\. Check vocab_axis"
    ):
        token_logprobs(hidden[:, :8], head, targets)
    with pytest.raises(ValueError, match=r"must have one dtype, but received bfloat16 and float32\. Convert .* astype"):
        token_logprobs(hidden.astype(jnp.bfloat16), head, targets)
    with pytest.raises(
        ValueError, match=r"must be one of 'xla', 'reference', 'tpu' or None, but received 'cuda'\. Pass None"
    ):
        token_logprobs(hidden, head, targets, implementation="cuda")


def test_a_head_says_what_it_cannot_be() -> None:
    weight = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"must have 2 axes, but received shape \(4,\)\. Pass \[V, D\]"):
        Head(weight[:, 0])
    with pytest.raises(ValueError, match=r"must be floating point or int8, but received int32\. Convert it"):
        Head(weight.astype(jnp.int32))
    with pytest.raises(
        ValueError, match=r"vocab_axis must be 0 or 1, but received 2\. Pass 0 for \[V, D\] or 1 for \[D, V\]"
    ):
        Head(weight, 2)
    with pytest.raises(
        ValueError, match=r"scale must be a finite Python number, but received inf\. Fold arrays into the weight"
    ):
        Head(weight, scale=float("inf"))
    with pytest.raises(ValueError, match=r"soft_cap must be a Python number above 0, but received 0\.0\. Pass None"):
        Head(weight, soft_cap=0.0)


def test_a_head_is_a_pytree_of_one_leaf() -> None:
    head = Head(jnp.zeros((4, 3)), 1, 0.5, 2.0)
    assert (head.vocab_size, head.width) == (3, 4)
    leaves, structure = jax.tree.flatten(head)
    assert len(leaves) == 1
    assert jax.tree.map(lambda _: None, head).weight is None
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert (rebuilt.vocab_axis, rebuilt.scale, rebuilt.soft_cap) == (1, 0.5, 2.0)
    assert jax.eval_shape(lambda head: head, head).width == 4
