"""Heads split over a mesh axis draw and score what whole ones do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from kernel_cases import Case, every_fast_one, every_implementation, interpreted_tpu, make_head, make_hidden, normal

from fastpref.kernels import (
    Divergence,
    Head,
    MixtureSample,
    divergence,
    mixture_sample,
    preference_loss,
    token_logprobs,
)
from fastpref.method import losses

pytestmark = interpreted_tpu
KEY = jax.random.key(5)
CASES = [
    Case(1024, rows=9, width=8),
    Case(1000, rows=9, width=8, vocab_axis=1, soft_cap=4.0),
    Case(4096, rows=9, width=8, dtype="bfloat16"),
]


WHOLE = P()


def split(function: Callable[..., Any], shards: int, case: Case, heads: int, out: Any = WHOLE) -> Callable[..., Any]:
    """`function(*heads, *arrays)` with the heads' vocabulary over `shards` devices, and everything else on each.

    Pallas's interpreter does not track over which axes values vary, so nobody checks it here; see `test_tpu_kernels`.
    """
    mesh = Mesh(np.array(jax.devices()[:shards]), ("vocab",))
    spec = P("vocab", None) if case.vocab_axis == 0 else P(None, "vocab")

    def local(*arguments: Any) -> Any:
        sliced = [Head(head.weight, head.vocab_axis, head.scale, head.soft_cap, "vocab") for head in arguments[:heads]]
        return function(*sliced, *arguments[heads:])

    def call(*arguments: Any) -> Any:
        specs = (spec,) * heads + (P(),) * (len(arguments) - heads)
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return jax.jit(mapped)(*arguments)

    return call


def draw(implementation: str, **changes: Any) -> Callable[..., MixtureSample]:
    def sample(policy_head: Head, ref_head: Head, hidden: Array, ref_hidden: Array) -> MixtureSample:
        rows = hidden.shape[0]
        keywords = {"mixture_beta": jnp.linspace(0, 1, rows), "key": KEY, "row_ids": jnp.arange(rows), "step": 2}
        return mixture_sample(
            hidden, policy_head, ref_hidden, ref_head, implementation=implementation, **(keywords | changes)
        )

    return sample


@every_implementation
@pytest.mark.parametrize(
    ("case", "shards", "changes"),
    [
        (CASES[0], 2, {}),
        (CASES[1], 8, {}),
        (CASES[1], 4, {"temperature": 0.0, "num_valid_tokens": 600}),
        (CASES[2], 4, {"temperature": 0.7, "num_valid_tokens": 1500}),
    ],
    ids=["whole groups", "groups over many slices", "greedy", "slices without valid tokens"],
)
def test_draws_are_those_of_the_whole_head(
    case: Case, shards: int, changes: dict[str, Any], implementation: str
) -> None:
    arguments = make_head(case), make_head(case, 1), make_hidden(case), make_hidden(case, 1)
    whole = jax.jit(draw("reference", **changes))(*arguments)
    apart = split(draw(implementation, **changes), shards, case, 2)(*arguments)
    np.testing.assert_array_equal(apart.token, whole.token)
    for value, expected in zip(apart[1:], whole[1:], strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=4e-6)


def test_one_slice_is_a_split_as_well() -> None:
    arguments = make_head(CASES[1]), make_head(CASES[1], 1), make_hidden(CASES[1]), make_hidden(CASES[1], 1)
    whole = jax.jit(draw("xla"))(*arguments)
    np.testing.assert_array_equal(split(draw("xla"), 1, CASES[1], 2)(*arguments).token, whole.token)


def test_pieces_of_a_group_tie_to_the_lowest_id() -> None:
    case = Case(1000, rows=3, width=2)
    head = Head(jnp.zeros((1000, 2)).at[jnp.array([490, 520, 999])].set(1.0))
    hidden = jnp.ones((3, 2))
    apart = split(draw("xla", temperature=0.0), 2, case, 2)(head, head, hidden, hidden)
    assert apart.token.tolist() == [490] * 3


def scored(frozen_head: bool, implementation: str) -> Callable[..., Any]:
    def value_and_gradients(head: Head, hidden: Array, targets: Array, where: Array, weights: Array) -> Any:
        def total(head: Head, hidden: Array) -> tuple[Array, Array]:
            logps = token_logprobs(
                hidden, head, targets, where=where, frozen_head=frozen_head, implementation=implementation
            )
            return jnp.sum(logps * weights), logps

        (_, logps), (matrix, states) = jax.value_and_grad(total, (0, 1), has_aux=True)(head, hidden)
        return logps, states, matrix.weight

    return value_and_gradients


@every_fast_one
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("case", "shards"), [(CASES[0], 4), (CASES[1], 8)], ids=str)
def test_log_probs_and_gradients_are_those_of_the_whole_head(
    case: Case, shards: int, frozen_head: bool, implementation: str
) -> None:
    where = jnp.arange(case.rows) != 3
    targets = jnp.asarray(np.random.default_rng(1).integers(0, case.vocab, case.rows), jnp.int32)
    arguments = make_head(case), make_hidden(case), targets, where, normal((case.rows,), 3)
    whole = jax.jit(scored(frozen_head, "reference"))(*arguments)
    weight = P("vocab", None) if case.vocab_axis == 0 else P(None, "vocab")
    apart = split(scored(frozen_head, implementation), shards, case, 1, (P(), P(), weight))(*arguments)
    for value, expected in zip(apart, whole, strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=4e-6)


@every_fast_one
def test_the_loss_is_that_of_the_whole_head(implementation: str) -> None:
    case, shards = CASES[1], 4
    segments = jnp.array([0, 0, 1, -1, 2, 3, 3, 1, 0])
    loss = losses.bind(losses.ipo, tau=0.2)

    def value_and_gradients(implementation: str, head: Head, hidden: Array, targets: Array) -> Any:
        def value(head: Head, hidden: Array) -> tuple[Array, Any]:
            result = preference_loss(
                hidden, head, targets, segments, jnp.full((2, 2), -3.0), jnp.array([0.9, 0.2]), loss=loss,
                implementation=implementation,
            )  # fmt: skip
            return result.loss, result

        (_, result), (matrix, states) = jax.value_and_grad(value, (0, 1), has_aux=True)(head, hidden)
        return tuple(result), states, matrix.weight

    arguments = make_head(case), make_hidden(case), jnp.arange(case.rows) * 111
    whole = jax.jit(partial(value_and_gradients, "reference"))(*arguments)
    out = ((P(), P(), P(), P()), P(), P(None, "vocab"))
    apart = split(partial(value_and_gradients, implementation), shards, case, 1, out)(*arguments)
    for value, expected in zip(jax.tree.leaves(apart), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(value, expected, rtol=3e-5, atol=1e-5)


@every_implementation
@pytest.mark.parametrize(("case", "shards"), [(CASES[0], 4), (CASES[1], 8), (CASES[2], 2)], ids=str)
def test_divergences_are_those_of_the_whole_head(case: Case, shards: int, implementation: str) -> None:
    def measure(implementation: str, head: Head, ref_head: Head, hidden: Array, ref_hidden: Array) -> Divergence:
        where = jnp.arange(case.rows) != 3
        return divergence(hidden, head, ref_hidden, ref_head, where=where, implementation=implementation)

    arguments = make_head(case), make_head(case, 1), make_hidden(case), make_hidden(case, 1)
    whole = jax.jit(partial(measure, "reference"))(*arguments)
    apart = split(partial(measure, implementation), shards, case, 2)(*arguments)
    for value, expected in zip(apart, whole, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-6)
    # One head for both models, and equal states: 0, also where slices meet.
    equal = split(lambda head, hidden: measure(implementation, head, head, hidden, hidden + 0), shards, case, 1)
    np.testing.assert_array_equal(equal(arguments[0], arguments[2]).kl, 0)


@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head"])
def test_divergences_vary_over_no_axis_that_was_summed(shared: bool) -> None:
    """Axes are checked here: rows over one, the vocabulary over the other."""
    case = Case(1000, rows=8)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "vocab"))
    rows, weight = P("data", None), P("vocab", None)

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, weight, rows, weight), out_specs=P("data"))
    def apart(hidden: Array, weight: Array, ref_hidden: Array, ref_weight: Array) -> Divergence:
        head = Head(weight, mesh_axis="vocab")
        ref_head = head if shared else Head(ref_weight, mesh_axis="vocab")
        return divergence(hidden, head, ref_hidden, ref_head, implementation="xla")

    hidden, head, ref_hidden, ref_head = make_hidden(case), make_head(case), make_hidden(case, 1), make_head(case, 1)
    whole = divergence(hidden, head, ref_hidden, head if shared else ref_head, implementation="reference")
    result = jax.jit(apart)(hidden, head.weight, ref_hidden, ref_head.weight)
    for value, expected in zip(result, whole, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-6)


def test_gradients_may_be_taken_outside_of_the_map() -> None:
    case = CASES[0]
    mesh = Mesh(np.array(jax.devices()[:4]), ("vocab",))
    targets = jnp.arange(case.rows) * 100

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("vocab", None), P()), out_specs=P())
    def apart(weight: Array, hidden: Array) -> Array:
        return token_logprobs(hidden, Head(weight, mesh_axis="vocab"), targets, implementation="xla")

    def whole(weight: Array, hidden: Array) -> Array:
        return token_logprobs(hidden, Head(weight), targets, implementation="reference")

    arguments = make_head(case).weight, make_hidden(case)
    for argument in (0, 1):
        one, two = (
            jax.jit(jax.grad(lambda *both, f=f: jnp.sum(f(*both)), argument))(*arguments) for f in (apart, whole)
        )
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=4e-6)


def test_little_moves_between_the_devices() -> None:
    case = Case(4096, rows=8, width=16)
    arguments = make_head(case), make_head(case, 1), make_hidden(case), make_hidden(case, 1)
    moved = str(jax.make_jaxpr(split(draw("xla"), 4, case, 2))(*arguments))
    shapes = [line.split("=")[0] for line in moved.splitlines() if "psum" in line]
    assert shapes
    assert not any("4096" in shape or "1024" in shape or "512" in shape for shape in shapes)
