"""Packed rows give every model the states, losses and gradients that padded pairs give it, and no pair sees another."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import compiled, make
from slow_packing import LAYOUTS, PaddedPairs, pack, scored

from fastpref.data.batches import PackedPairs
from fastpref.kernels import preference_loss, token_logprobs
from fastpref.method import losses
from fastpref.models import masks
from fastpref.models.policy import hidden_states

P, S, T, V = 6, 11, 6, 61
PROMPTS = np.array([11, 4, 1, 7, 3, 9], np.int32)
COMPLETIONS = np.array([[6, 3], [1, 1], [2, 6], [4, 1], [5, 5], [3, 2]], np.int32)
ROWS: dict[str, dict[str, int]] = {
    "shared": {"rows": 4, "length": 32, "slots": 4},
    "separate": {"rows": 5, "length": 32, "slots": 3},
    "encoder-decoder": {"rows": 4, "length": 20, "slots": 4, "prompt_length": 16},
}
"""Wide enough for every order tried here, with full rows, rows of one pair, empty slots and an empty row."""
CASES = [
    (name, layout)
    for name, layouts in {
        "decoder": ("shared", "separate"),
        "decoder-tied-biased": ("shared", "separate"),
        "t5-v1.1": ("encoder-decoder",),
        "t5-original": ("encoder-decoder",),
        "decoder-local": ("shared", "separate"),
        "decoder-after": ("shared",),
        "decoder-learned": ("separate",),
    }.items()
    for layout in layouts
]
each_case = pytest.mark.parametrize(("name", "layout"), CASES)
TAU = 0.1


@functools.cache
def pairs() -> PaddedPairs:
    random = np.random.default_rng(3)
    preference = np.array([1, 0, 0.25, 0.5, 1, 0.75], np.float32)
    batch: Any = PaddedPairs(
        prompt_tokens=random.integers(0, V, (P, S), np.int32),
        prompt_lengths=PROMPTS,
        completion_tokens=random.integers(0, V, (P, 2, T), np.int32),
        completion_lengths=COMPLETIONS,
        ref_logps=random.normal(size=(P, 2)).astype(np.float32),
        preference=preference,
        scores=np.zeros((P, 2), np.float32),
        where=np.ones(P, bool),
    )
    return batch


def packed_pairs(layout: str, batch: Any = None, order: Any = None) -> PackedPairs:
    return pack(pairs() if batch is None else batch, layout=layout, order=order, **ROWS[layout])


def padded_arguments() -> tuple[Any, ...]:
    batch = pairs()
    return batch.prompt_tokens, np.arange(S)[None, :] < batch.prompt_lengths[:, None], batch.completion_tokens


@compiled
def run(static: tuple[Any, int], state: Any, batch: Any, targets: Any, weights: Any) -> Any:
    """States; sum of weighted log-probs of the targets; its gradient. For packed rows and for padded pairs.

    The smallest block of queries is part of what is static, for programs differ by it.
    """
    graph, _ = static

    def loss(state: Any) -> tuple[jax.Array, jax.Array]:
        policy = nnx.merge(graph, state)
        packed = isinstance(batch, PackedPairs)
        states = policy.packed_hidden_states(batch) if packed else hidden_states(policy, *batch)
        logps = jax.nn.log_softmax(policy.head().logits(states.reshape(-1, states.shape[-1])))
        return (jnp.take_along_axis(logps, targets.reshape(-1, 1), axis=1)[:, 0] * weights.reshape(-1)).sum(), states

    (value, states), gradient = jax.value_and_grad(loss, has_aux=True)(state)
    return states, value, gradient


WEIGHTS = np.random.default_rng(4).normal(size=(P, 2)).astype(np.float32)
"""Of each completion in the sum of log-probs: nothing cancels."""


def run_any(model: Any, *arguments: Any) -> Any:
    graph, state = model
    return run((graph, masks.LEAST), state, *arguments)


def run_packed(name: str, packed: PackedPairs) -> Any:
    weights = np.zeros(packed.tokens.shape, np.float32)
    for completion, places in scored(packed).items():
        weights[places] = WEIGHTS[completion]
    return run_any(nnx.split(make(name)), packed, packed.targets, weights)


@functools.cache
def packed_result(name: str, layout: str) -> Any:
    return run_packed(name, packed_pairs(layout))


@functools.cache
def padded_result(name: str) -> Any:
    real = np.arange(T)[None, None, :] < COMPLETIONS[:, :, None]
    weights = np.where(real, WEIGHTS[:, :, None], np.float32(0))
    return run_any(nnx.split(make(name)), padded_arguments(), pairs().completion_tokens, weights)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of this module in blocks, some of which see more than their window."""
    monkeypatch.setattr(masks, "LEAST", 3)


def by_completion(states: Any, packed: PackedPairs) -> dict[tuple[int, int], np.ndarray]:
    return {completion: np.asarray(states)[places] for completion, places in scored(packed).items()}


def test_the_rows_of_this_module_hold_what_they_should() -> None:
    for layout in LAYOUTS:
        packed = packed_pairs(layout)
        counts = (packed.ids.reshape(ROWS[layout]["rows"], -1) >= 0).sum(1)
        assert {0, 1} < set(counts.tolist()), layout
        assert max(counts) > 1
        filled = (packed.pairs >= 0).sum(1)
        assert (packed.lengths.sum(), len(scored(packed))) == (COMPLETIONS.sum(), 2 * P)
        expected = COMPLETIONS.sum(1)
        if layout == "shared":
            expected = PROMPTS - 1 + expected
        elif layout == "separate":
            expected = 2 * PROMPTS - 2 + expected
        assert filled.sum() == expected.sum(), layout
    assert (packed_pairs("shared").pairs[0] >= 0).all()
    assert (packed_pairs("encoder-decoder").prompt_pairs[0] >= 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_follow_from_the_rule(layout: str) -> None:
    packed = packed_pairs(layout)
    rows, length = packed.tokens.shape
    size = packed.prompt_tokens.shape[1]
    expected = np.zeros((rows, length, length), bool)
    across, prompts = np.zeros((rows, length, size), bool), np.zeros((rows, size, size), bool)
    for r, i in itertools.product(range(rows), range(length)):
        for j in range(length):
            same = packed.pairs[r, i] == packed.pairs[r, j] and packed.pairs[r, j] >= 0
            expected[r, i, j] = same and j <= i and packed.streams[r, j] in (0, packed.streams[r, i])
        for j in range(size):
            across[r, i, j] = packed.prompt_pairs[r, j] == packed.pairs[r, i] >= 0
    for r, i, j in itertools.product(range(rows), range(size), range(size)):
        prompts[r, i, j] = packed.prompt_pairs[r, i] == packed.prompt_pairs[r, j] >= 0
    for mask, dense in (
        (masks.packed_mask(packed), expected),
        (masks.cross_mask(packed), across),
        (masks.prompt_mask(packed), prompts),
    ):
        np.testing.assert_array_equal(mask.dense, dense[:, None])
        bias = mask.bias(*dense.shape[1:])
        np.testing.assert_array_equal(bias[:, 0, 0, 0], np.where(dense, 0, np.float32(masks.MASKED)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [1, 3, 30])
def test_windows_count_positions_of_the_sequence(window: int) -> None:
    """Not places of the row: a second completion lies behind the first, and follows the prompt."""
    for layout in ("shared", "separate"):
        packed = packed_pairs(layout)
        whole = masks.packed_mask(packed)
        local = whole.within(window)
        back = packed.positions[:, :, None] - packed.positions[:, None, :]
        np.testing.assert_array_equal(local.dense[:, 0], np.asarray(whole.dense[:, 0]) & (back < window))
        assert local.spans is not None
        assert whole.spans is not None
        assert (np.asarray(local.spans.first) >= np.asarray(whole.spans.first)).all()
        assert (local.spans.first != whole.spans.first).any() == (window < 30)


@each_case
def test_scored_states_are_those_of_padded_pairs(name: str, layout: str) -> None:
    packed = packed_pairs(layout)
    states, expected = packed_result(name, layout)[0], np.asarray(padded_result(name)[0])
    assert states.shape == (*packed.tokens.shape, 24)
    assert np.isfinite(states).all()
    found = by_completion(states, packed)
    assert len(found) == 2 * P
    for (pair, k), values in found.items():
        np.testing.assert_allclose(values, expected[pair, k, : COMPLETIONS[pair, k]], rtol=0, atol=2e-5)


@each_case
def test_losses_and_gradients_are_those_of_padded_pairs(name: str, layout: str) -> None:
    _, value, gradient = packed_result(name, layout)
    _, padded, expected = padded_result(name)
    np.testing.assert_allclose(value, padded, rtol=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert scale > 1
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=5e-6 * scale, err_msg=str(path))


@pytest.mark.parametrize(("name", "layout"), [CASES[0], CASES[4], ("decoder-local", "shared")])
@pytest.mark.usefixtures("small_blocks")
def test_rows_in_blocks_give_the_same(name: str, layout: str) -> None:
    packed, (padded_states, padded, expected) = packed_pairs(layout), padded_result(name)
    length, size = packed.tokens.shape[1], packed.prompt_tokens.shape[1] or packed.tokens.shape[1]
    assert masks.window_size(length, length) < length
    assert masks.window_size(length, size) < size
    states, value, gradient = run_packed(name, packed)
    found = by_completion(states, packed)
    for (pair, k), values in found.items():
        np.testing.assert_allclose(values, padded_states[pair, k, : COMPLETIONS[pair, k]], rtol=0, atol=2e-5)
    np.testing.assert_allclose(value, padded, rtol=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=5e-6 * scale)
    # Bitwise isolation as well: what a block reads does not depend on tokens.
    changed = packed._replace(
        tokens=np.where(packed.pairs == 1, (packed.tokens + 1) % V, packed.tokens),
        prompt_tokens=np.where(packed.prompt_pairs == 1, (packed.prompt_tokens + 1) % V, packed.prompt_tokens),
    )
    after = np.asarray(run_packed(name, changed)[0])
    others, own = (packed.pairs >= 0) & (packed.pairs != 1), packed.pairs == 1
    np.testing.assert_array_equal(after[others], np.asarray(states)[others])
    assert (after[own] != np.asarray(states)[own]).any(-1).all()


@pytest.mark.usefixtures("small_blocks")
def test_blocks_read_their_window_or_the_whole_row() -> None:
    """With small blocks some do the one and some the other, and no query loses a key that it sees."""
    near = set()
    for layout in LAYOUTS:
        mask = masks.packed_mask(packed_pairs(layout))
        visible, spans = mask.dense[:, 0], mask.spans
        assert spans is not None
        size = visible.shape[1]
        block, window = masks.block_size(size), masks.window_size(size, size)
        assert spans.first.shape == (-(-size // block),)
        for number, (first, last) in enumerate(zip(spans.first.tolist(), spans.last.tolist(), strict=True)):
            columns = np.asarray(visible[:, number * block : (number + 1) * block]).any((0, 1))
            assert (first, last) == (int(columns.argmax()), size - 1 - int(columns[::-1].argmax()))
            near.add(last < min(first, size - window) + window)
    assert near == {True, False}


def test_block_sizes_grow_with_the_row() -> None:
    assert [masks.block_size(size) for size in (1, 511, 1023, 1024, 2048, 4096, 100_000)] == [
        64,
        64,
        64,
        128,
        256,
        512,
        512,
    ]
    assert [masks.window_size(size, size) for size in (1, 192, 193, 4096)] == [1, 192, 192, 1536]
    assert masks.window_size(512, 1024) == 384


@each_case
def test_a_pair_leaves_all_others_bitwise_alone(name: str, layout: str) -> None:
    packed, before = packed_pairs(layout), np.asarray(packed_result(name, layout)[0])
    batch = pairs()
    prompts, completions = batch.prompt_tokens.copy(), batch.completion_tokens.copy()
    prompts[1], completions[1] = (prompts[1] + 1) % V, (completions[1] + 1) % V
    changed: Any = batch._replace(prompt_tokens=prompts, completion_tokens=completions)
    after = run_packed(name, packed_pairs(layout, changed))[0]
    for (pair, _), places in scored(packed).items():
        if pair == 1:
            assert np.abs(np.asarray(after)[places] - before[places]).max(-1).min() > 1e-3
        else:
            np.testing.assert_array_equal(np.asarray(after)[places], before[places])


@each_case
def test_a_completion_leaves_its_partner_bitwise_alone(name: str, layout: str) -> None:
    packed, before = packed_pairs(layout), np.asarray(packed_result(name, layout)[0])
    for k in (0, 1):
        completions = pairs().completion_tokens.copy()
        completions[4, k, 1] = (completions[4, k, 1] + 1) % V
        changed: Any = pairs()._replace(completion_tokens=completions)
        after = np.asarray(run_packed(name, packed_pairs(layout, changed))[0])
        differs = np.zeros(packed.tokens.shape, bool)
        rows, columns = scored(packed)[4, k]
        differs[rows[2:], columns[2:]] = True
        np.testing.assert_array_equal((after != before).any(-1) & (packed.pairs >= 0), differs)


@each_case
def test_what_lies_in_empty_places_does_not_matter(name: str, layout: str) -> None:
    packed, before = packed_pairs(layout), np.asarray(packed_result(name, layout)[0])
    filled = packed._replace(
        tokens=np.where(packed.pairs < 0, 60, packed.tokens),
        positions=np.where(packed.pairs < 0, 17, packed.positions),
        prompt_tokens=np.where(packed.prompt_pairs < 0, 60, packed.prompt_tokens),
    )
    after = np.asarray(run_packed(name, filled)[0])
    np.testing.assert_array_equal(after[packed.pairs >= 0], before[packed.pairs >= 0])
    assert np.isfinite(after).all()


@each_case
def test_the_order_of_pairs_does_not_matter(name: str, layout: str) -> None:
    packed = packed_pairs(layout)
    expected, total = by_completion(packed_result(name, layout)[0], packed), packed_result(name, layout)[1]
    moved = packed_pairs(layout, order=(5, 0, 4, 2, 1, 3))
    assert (moved.ids != packed.ids).any()
    states, value, _ = run_packed(name, moved)
    for completion, values in by_completion(states, moved).items():
        np.testing.assert_allclose(values, expected[completion], rtol=0, atol=2e-5)
    np.testing.assert_allclose(value, total, rtol=1e-5)


@pytest.mark.parametrize(("name", "layout"), [CASES[0], CASES[4]])
def test_bfloat16_stays_near_float32(name: str, layout: str) -> None:
    packed = packed_pairs(layout)
    graph, state = nnx.split(make(name))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    nothing = np.zeros(packed.tokens.shape, np.float32)
    states = run_any((graph, narrow), packed, packed.targets, nothing)[0]
    assert states.dtype == jnp.bfloat16
    real = packed.sequences >= 0
    expected = np.asarray(run_any((graph, wide), packed, packed.targets, nothing)[0])[real]
    error = np.asarray(states.astype(jnp.float32))[real] - expected
    assert 0 < np.sqrt((error**2).mean()) < 0.06 * expected.std()


@compiled
def loss_of(graph: Any, state: Any, batch: PackedPairs) -> Any:
    policy = nnx.merge(graph, state)
    states = policy.packed_hidden_states(batch)
    flat = states.reshape(-1, states.shape[-1]), policy.head(), batch.targets.reshape(-1)
    sequences = batch.sequences.reshape(-1)
    result = preference_loss(
        *flat,
        sequences,
        batch.ref_logps,
        batch.preference,
        loss=losses.bind(losses.ipo, tau=TAU),
        where=batch.where,
    )
    logps = token_logprobs(*flat, where=sequences >= 0)
    sums = jax.ops.segment_sum(logps, jnp.where(sequences < 0, 2 * len(batch.where), sequences), 2 * len(batch.where))
    return result, sums.reshape(-1, 2)


@pytest.mark.parametrize(("name", "layout"), [CASES[0], CASES[1], CASES[4]])
def test_where_policy_is_reference_the_loss_is_the_closed_form(name: str, layout: str) -> None:
    model = nnx.split(make(name))
    packed = packed_pairs(layout)
    first, sums = loss_of(*model, packed)
    filled = packed.ids >= 0
    np.testing.assert_allclose(first.policy_logps[filled], sums[filled], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(first.policy_logps)[~filled], 0)
    again, _ = loss_of(*model, packed._replace(ref_logps=first.policy_logps))
    np.testing.assert_array_equal(again.log_ratio, 0)
    # p(ρ − 1/2τ)² + (1 − p)(ρ + 1/2τ)² at ρ = 0, whatever p is.
    np.testing.assert_array_equal(np.asarray(again.per_pair)[filled], np.float32(25))
    assert again.loss == 25


def test_each_family_refuses_rows_for_the_other() -> None:
    with pytest.raises(
        ValueError, match=r"rows of a decoder-only model must have no encoder stream, but received 16 places"
    ):
        make("decoder").packed_hidden_states(packed_pairs("encoder-decoder"))
    with pytest.raises(
        ValueError, match="rows of an encoder-decoder must have an encoder stream, but received some without"
    ):
        make("t5-v1.1").packed_hidden_states(packed_pairs("shared"))
