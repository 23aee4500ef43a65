"""The parts of the models: attention, masks, rotary positions, initial values, and configurations that cannot be."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import DECODER, ENCODER_DECODER

from fastpref.models import T5, Decoder, RopeScaling
from fastpref.models.attention import Own, Shared, attend
from fastpref.models.layers import right_padded
from fastpref.models.masks import Distances, Mask, Places, toeplitz
from fastpref.models.rope import inverse_frequencies
from fastpref.models.t5 import relative_buckets


def test_attention_is_one_softmax_over_prompt_and_completion() -> None:
    p, n, k, g, t, h, size, own_size = 2, 2, 3, 2, 4, 5, 6, 7
    random = np.random.default_rng(13)
    shapes = [(p, n, k, g, t, h), (p, n, h, size), (p, n, size, h), (p, n, k, own_size, h), (p, n, k, own_size, h)]
    arrays = [jnp.asarray(3 * random.normal(size=shape), jnp.float32) for shape in shapes]
    seen = np.arange(size) < 4
    padding = Mask(keys=Places(segments=jnp.where(seen, 0, -1)[None, None].astype(jnp.int32)))
    # The queries are tokens 2 to 5 of seven.
    by_distance = jnp.asarray(random.normal(size=(n, 2 * own_size)), jnp.float32)
    places = [Places(jnp.arange(*span)[None, None]) for span in ((2, 2 + t), (0, own_size))]
    causal = Mask(*places, distances=Distances(by_distance, 2))
    query, key = 2 + np.arange(t)[:, None], np.arange(own_size)[None, :]
    bias = jnp.where(seen, 0.0, -jnp.inf).reshape(1, 1, 1, 1, 1, size)
    own_bias = jnp.where(key <= query, by_distance[:, key - query + own_size - 1], -jnp.inf)[None, :, None, None]
    weights = jnp.asarray(random.normal(size=shapes[0]), jnp.float32)

    def ours(queries: jax.Array, keys: jax.Array, values: jax.Array, own_keys: jax.Array, own: jax.Array) -> jax.Array:
        return attend(queries, (Shared(keys, values), padding), (Own(own_keys, own), causal))

    def plain(queries: jax.Array, keys: jax.Array, values: jax.Array, own_keys: jax.Array, own: jax.Array) -> jax.Array:
        to_prompt = jnp.einsum("pnkgth,pnhs->pnkgts", queries, keys) + bias
        to_own = jnp.einsum("pnkgth,pnkuh->pnkgtu", queries, own_keys) + own_bias
        share = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], axis=-1))
        read = jnp.einsum("pnkgts,pnsh->pnkgth", share[..., :size], values)
        return read + jnp.einsum("pnkgtu,pnkuh->pnkgth", share[..., size:], own)

    results = [
        jax.jit(jax.value_and_grad(lambda *x, f=f: (f(*x) * weights).sum(), argnums=tuple(range(5))))(*arrays)
        for f in (ours, plain)
    ]
    for ours_leaf, plain_leaf in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours_leaf, plain_leaf, rtol=1e-4, atol=1e-4)


def test_initial_values_follow_each_family() -> None:
    decoder = Decoder(replace(DECODER, width=200, vocab_size=300, layers=1), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(decoder.embedding[...].std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(decoder.layers.feed_forward.down[...].std(), 0.02, rtol=0.05)
    wide = replace(ENCODER_DECODER, width=200, heads=8, head_dim=16, hidden=300, decoder_layers=1, encoder_layers=1)
    model = T5(wide, rngs=nnx.Rngs(0))
    attention, feed_forward = model.encoder.layers.attention, model.decoder.layers.feed_forward
    expected: list[tuple[Any, float]] = [
        (model.embedding, 1.0),
        (model.lm_head, 1.0),
        (attention.q, (200 * 16) ** -0.5),
        (attention.k, 200**-0.5),
        (attention.v, 200**-0.5),
        (attention.o, (8 * 16) ** -0.5),
        (feed_forward.gate, 200**-0.5),
        (feed_forward.up, 200**-0.5),
        (feed_forward.down, 300**-0.5),
    ]
    for kernel, std in expected:
        np.testing.assert_allclose(kernel[...].std(), std, rtol=0.05)
    narrow = nnx.eval_shape(lambda: T5(ENCODER_DECODER, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype(jnp.bfloat16)}


def test_seeds_decide_initial_values() -> None:
    tiny = replace(DECODER, layers=1)
    one, same, other = (Decoder(tiny, rngs=nnx.Rngs(seed)).embedding[...] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_right_padding_keeps_the_order_of_real_tokens() -> None:
    tokens = jnp.array([[9, 5, 9, 3, 4], [1, 2, 3, 4, 5]], jnp.int32)
    mask = jnp.array([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]], bool)
    front, lengths = right_padded(tokens, mask)
    np.testing.assert_array_equal(lengths, [3, 5])
    np.testing.assert_array_equal(front[0, :3], [5, 3, 4])
    np.testing.assert_array_equal(front[1], tokens[1])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (7, 7), (1, 5), (5, 1), (3, 8), (8, 3)])
def test_toeplitz_places_each_distance(rows: int, columns: int) -> None:
    values = np.random.default_rng(0).normal(size=(3, rows + columns)).astype(np.float32)
    row, column = np.indices((rows, columns))
    np.testing.assert_array_equal(toeplitz(jnp.asarray(values), rows), values[:, column - row + rows - 1])


def test_relative_buckets_are_exact_when_near_and_shared_when_far() -> None:
    causal = relative_buckets(-np.arange(300), bidirectional=False, buckets=32, max_distance=128)
    np.testing.assert_array_equal(causal[:16], np.arange(16))
    assert (np.diff(causal) >= 0).all()
    assert (causal[128:] == 31).all()
    np.testing.assert_array_equal(
        relative_buckets(np.arange(5), bidirectional=False, buckets=32, max_distance=128), np.zeros(5)
    )
    both = relative_buckets(np.array([-3, 3, -500, 500]), bidirectional=True, buckets=32, max_distance=128)
    np.testing.assert_array_equal(both, [3, 19, 15, 31])


def test_rope_scaling_keeps_high_and_stretches_low_frequencies() -> None:
    plain = inverse_frequencies(64, 10_000.0, None)
    linear = inverse_frequencies(64, 10_000.0, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    for kind in ("llama3", "yarn"):
        scaling = RopeScaling(kind, 8.0, 1.0, 4.0, 8192, beta_fast=4.0)
        ratio = plain / inverse_frequencies(64, 10_000.0, scaling)
        turns = 8192 * plain / (2 * np.pi)
        # The ramp of YaRN begins and ends at whole places.
        more, fewer = (4, 1) if kind == "llama3" else (6, 0.7)
        np.testing.assert_allclose(ratio[turns > more], 1, rtol=1e-6)
        np.testing.assert_allclose(ratio[turns < fewer], 8, rtol=1e-6)
        between = (turns > 1.2) & (turns < 3.5)
        assert between.any()
        assert ((ratio[between] > 1) & (ratio[between] < 8)).all()


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DECODER, {"layers": 0}, "layers must be at least 1, but received 0"),
        (DECODER, {"kv_heads": 4}, "heads must be a multiple of kv_heads, but received 6 and 4"),
        (DECODER, {"head_dim": 5}, "head_dim must be even for rotary positions, but received 5"),
        (DECODER, {"rotary_dim": 8}, "rotary_dim must be even and at most head_dim, 6, but received 8"),
        (DECODER, {"activation": "tanh"}, "activation must be one of .*, but received 'tanh'"),
        (DECODER, {"norm": "batch"}, "norm must be one of .*, but received 'batch'"),
        (
            DECODER,
            {"window": 4},
            "window must be at least 1 where layers are local, .* but received 4 with 0 local layers",
        ),
        (DECODER, {"local": (1,)}, "window must be at least 1 where .* but received None with 1 local layers"),
        (DECODER, {"unrotated": (2,)}, "must hold numbers below 2, the number of layers, but received 2"),
        (DECODER, {"learned_positions": True}, "max_positions must come with learned_positions, but received None"),
        (ENCODER_DECODER, {"decoder_layers": 0}, "decoder_layers must be at least 1, but received 0"),
        (ENCODER_DECODER, {"activation": "tanh"}, "activation must be one of .*, but received 'tanh'"),
        (ENCODER_DECODER, {"buckets": 6}, "buckets must be a multiple of 4 .* but received 6 and 9"),
        (ENCODER_DECODER, {"start_id": 61}, "start_id must lie in the vocabulary, 0 to 60, but received 61"),
    ],
)
def test_impossible_configurations_are_refused(config: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_an_unknown_rope_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rope scaling must be one of linear, .*, longrope, but received 'mrope'"):
        RopeScaling("mrope", 2.0)
