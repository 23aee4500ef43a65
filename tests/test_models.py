"""Both model families against the original implementations, and against what the policy protocol promises."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import GOLDEN, NAMES, REPRESENTATIVES
from safetensors.numpy import load_file

from fastpref.method.errors import ModelError
from fastpref.models import T5, Decoder, DecoderConfig, Policy, RopeScaling, T5Config, load
from fastpref.models.attention import Own, Shared, attend
from fastpref.models.layers import right_padded
from fastpref.models.masks import Distances, Mask, Masks, Places, causal_mask, toeplitz
from fastpref.models.policy import hidden_states
from fastpref.models.rope import inverse_frequencies
from fastpref.models.t5 import relative_buckets

DECODER = DecoderConfig(vocab_size=61, width=24, hidden=40, layers=2, heads=6, kv_heads=2, head_dim=6)
ENCODER_DECODER = T5Config(
    vocab_size=61,
    width=24,
    hidden=40,
    encoder_layers=2,
    decoder_layers=3,
    heads=3,
    head_dim=6,
    buckets=8,
    max_distance=9,
)
CONFIGS: dict[str, Any] = {
    "decoder": DECODER,
    "decoder-tied-biased": replace(DECODER, tied=True, attention_bias=True, output_bias=True),
    "decoder-local": replace(
        DECODER,
        norm="rms+1",
        norms="both",
        qk_norm="head",
        window=4,
        local=(0,),
        local_rope_theta=30.0,
        embedding_scale=24**0.5,
        attention_scale=0.3,
        attention_cap=2.0,
        logit_cap=3.0,
        activation="gelu_pytorch_tanh",
    ),
    "decoder-after": replace(
        DECODER,
        norms="after",
        qk_norm="width",
        unrotated=(1,),
        rotary_dim=4,
        window=3,
        local=(0,),
        residual_scale=0.7,
        logit_scale=0.5,
        feed_forward_bias=True,
    ),
    "decoder-learned": replace(
        DECODER,
        kv_heads=6,
        norm="layer",
        learned_positions=True,
        max_positions=32,
        gated=False,
        activation="gelu_new",
        attention_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        tied=True,
    ),
    "t5-v1.1": ENCODER_DECODER,
    "t5-original": replace(
        ENCODER_DECODER, activation="relu", gated=False, tied=True, scaled_output=True, decoder_layers=2
    ),
}
P, S, K, T = 3, 11, 2, 6
LENGTHS = np.array([11, 4, 1])


# Machine code of the plainest kind: here compiling takes far longer than running.
compiled = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def make(name: str) -> Any:
    """A model whose norms and biases are random too, with kernels that give attention something to choose."""
    config = CONFIGS[name]
    kind = T5 if isinstance(config, T5Config) else Decoder
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(5)

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        values = random.normal(size=shape)
        return jnp.asarray(1 + 0.2 * values if len(shape) == 1 else 1.3 * shape[0] ** -0.5 * values, jnp.float32)

    return nnx.merge(graph, jax.tree.map(lambda abstract: leaf(abstract.shape), state))


def with_weights_of(name: str, **options: Any) -> Any:
    """A model with other options and the same weights."""
    abstract = nnx.eval_shape(lambda: Decoder(replace(CONFIGS[name], **options), rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(abstract)[0], nnx.state(make(name)))


def forced_states(model: Any, *arguments: jax.Array) -> jax.Array:
    """The teacher-forced states, [P, K, T, D], compiled once per model configuration."""
    states: jax.Array = states_of(*nnx.split(model), *arguments)
    return states


@compiled
def states_of(graph: Any, state: Any, *arguments: jax.Array) -> jax.Array:
    states: jax.Array = hidden_states(nnx.merge(graph, state), *arguments)
    return states


def draw(vocab_size: int = 61) -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(11)
    prompts = jnp.asarray(random.integers(0, vocab_size, (P, S)), jnp.int32)
    completions = jnp.asarray(random.integers(0, vocab_size, (P, K, T)), jnp.int32)
    return prompts, jnp.asarray(np.arange(S)[None, :] < LENGTHS[:, None]), completions


def decoded_states(model: Any, *arguments: jax.Array) -> jax.Array:
    """The states of prefill and decode, [P, K, T, D], by a compiled loop that carries the cache."""
    states: jax.Array = loop_of(*nnx.split(model), *arguments)
    return states


@compiled
def loop_of(graph: Any, state: Any, prompts: jax.Array, mask: jax.Array, completions: jax.Array) -> jax.Array:
    policy = nnx.merge(graph, state)
    _, k, t = completions.shape
    first, cache = policy.prefill(prompts, mask, completions=k, max_new_tokens=t)
    inputs = after(first, completions)

    def body(cache: Any, step: jax.Array) -> tuple[Any, jax.Array]:
        states, cache = policy.decode(cache, jax.lax.dynamic_slice_in_dim(inputs, step, 1, axis=2), step)
        return cache, states[:, :, 0]

    return jnp.moveaxis(jax.lax.scan(body, cache, jnp.arange(t))[1], 0, 2)


def after(first: jax.Array, completions: jax.Array) -> jax.Array:
    """What a decoder reads: the first input, and the completions but their last token."""
    return jnp.concatenate(
        [jnp.broadcast_to(first[:, None, None], (*completions.shape[:2], 1)), completions[:, :, :-1]], 2
    )


@compiled
def chunks_of(static: tuple[Any, tuple[int, ...]], state: Any, *arguments: jax.Array) -> jax.Array:
    graph, sizes = static
    policy = nnx.merge(graph, state)
    prompts, mask, completions = arguments
    first, cache = policy.prefill(prompts, mask, completions=K, max_new_tokens=T + 3)
    inputs, states, step = after(first, completions), [], 0
    for size in sizes:
        chunk, cache = policy.decode(cache, inputs[:, :, step : step + size], jnp.int32(step))
        states.append(chunk)
        step += size
    return jnp.concatenate(states, axis=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*tensors of images")
def test_logits_equal_the_original_implementation(name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    model = load(GOLDEN / name).module
    prompts, completions = jnp.asarray(golden["prompt_tokens"]), jnp.asarray(golden["completion_tokens"])
    mask = jnp.asarray(np.arange(prompts.shape[1])[None, :] < golden["prompt_lengths"][:, None])
    expected = golden["logits"]
    assert expected.std() > 0.5
    # Where logits are large, the truth is in double precision, from which the original itself is farther.
    bound = max(1e-4, 2 * float(golden.get("float32_error", np.zeros(1))[0]))
    # Those that stand for their family are decoded too: each costs seconds of compiling.
    each = (forced_states, decoded_states) if name in REPRESENTATIVES else (forced_states,)
    for states in (compute(model, prompts, mask, completions) for compute in each):
        logits = model.head().logits(states.reshape(-1, states.shape[-1])).reshape(expected.shape)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_gives_the_teacher_forced_states(name: str) -> None:
    model = make(name)
    prompts, mask, completions = draw()
    forced = forced_states(model, prompts, mask, completions)
    np.testing.assert_allclose(decoded_states(model, prompts, mask, completions), forced, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_several_tokens_are_decoded_at_once(name: str) -> None:
    """In chunks of any size, in a cache with room to spare."""
    model = make(name)
    arguments = draw()
    graph, state = nnx.split(model)
    chunked = chunks_of((graph, (2, 1, 3)), state, *arguments)
    np.testing.assert_allclose(chunked, forced_states(model, *arguments), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing_wherever_it_is(name: str) -> None:
    model = make(name)
    prompts, mask, completions = draw()
    right = forced_states(model, prompts, mask, completions)
    for side in ("left", "middle", "longer"):
        size = S + 5 if side == "longer" else S
        moved, moved_mask = np.full((P, size), 60, np.int32), np.zeros((P, size), bool)
        for row, length in enumerate(LENGTHS):
            head = length // 2
            places = np.arange(length)
            if side == "left":
                places += size - length
            elif side == "middle":
                places[head:] += size - length
            moved[row, places], moved_mask[row, places] = prompts[row, :length], True
        arguments = (jnp.asarray(moved), jnp.asarray(moved_mask), completions)
        forced = forced_states(model, *arguments)
        if side == "longer":
            np.testing.assert_allclose(forced, right, rtol=0, atol=2e-5)
        else:
            np.testing.assert_array_equal(forced, right)
        if side == "left":
            np.testing.assert_allclose(decoded_states(model, *arguments), right, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_changes_only_what_follows_it_in_its_completion(name: str) -> None:
    model = make(name)
    prompts, mask, completions = draw()
    before = np.asarray(forced_states(model, prompts, mask, completions))
    after = np.asarray(
        forced_states(model, prompts, mask, completions.at[1, 0, 3].set((completions[1, 0, 3] + 1) % 61))
    )
    changed = np.abs(after - before).max(-1) > 1e-6
    expected = np.zeros((P, K, T), bool)
    expected[1, 0, 4:] = True
    np.testing.assert_array_equal(changed, expected)
    np.testing.assert_array_equal(after[~expected], before[~expected])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_changes_only_its_own_completions(name: str) -> None:
    model = make(name)
    prompts, mask, completions = draw()
    before = forced_states(model, prompts, mask, completions)
    after = forced_states(model, prompts.at[1, 0].set((prompts[1, 0] + 1) % 61), mask, completions)
    changed = np.abs(np.asarray(after - before)).max(-1) > 1e-6
    np.testing.assert_array_equal(changed, np.arange(P)[:, None, None] == np.full((P, K, T), 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_finite_and_reach_every_parameter(name: str) -> None:
    model = make(name)
    prompts, mask, completions = draw()
    graph, state = nnx.split(model)

    def loss(state: Any) -> jax.Array:
        policy = nnx.merge(graph, state)
        states = hidden_states(policy, prompts, mask, completions)
        logits = policy.head().logits(states.reshape(-1, states.shape[-1]))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), completions.reshape(-1, 1), axis=1).mean()

    gradient = compiled(lambda _, state: jax.grad(loss)(state))(None, state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        # A key's bias shifts all scores of a query alike, so that softmax is blind to it.
        assert np.abs(leaf).max() > 1e-7 or "k_bias" in jax.tree_util.keystr(path), path


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


@pytest.mark.parametrize("name", ["decoder", "decoder-learned", "t5-v1.1"])
def test_bfloat16_runs_and_stays_near_float32(name: str) -> None:
    graph, state = nnx.split(make(name))
    narrow = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    wide = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), state))
    prompts, mask, completions = draw()
    states = forced_states(narrow, prompts, mask, completions)
    assert states.dtype == jnp.bfloat16
    expected = np.asarray(forced_states(wide, prompts, mask, completions))
    error = np.asarray(states.astype(jnp.float32)) - expected
    assert np.sqrt((error**2).mean()) < 0.06 * expected.std()
    decoded = decoded_states(narrow, prompts, mask, completions)
    error = np.asarray(decoded.astype(jnp.float32)) - expected
    assert decoded.dtype == jnp.bfloat16
    assert np.sqrt((error**2).mean()) < 0.06 * expected.std()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_protocol_is_kept_and_prompts_are_cached_once(name: str) -> None:
    model = make(name)
    assert isinstance(model, Policy)
    assert model.vocab_size == 61 == model.head().vocab_size
    prompts, mask, _ = draw()
    prefill = functools.partial(model.prefill, completions=5, max_new_tokens=4)
    first, cache = jax.eval_shape(prefill, prompts, mask)
    assert first.shape == (P,)
    for shared in cache.prompts:
        assert shared.keys.size == shared.values.size == P * S * shared.keys.shape[1] * 6
    assert len(cache.completions) == len(cache.prompts)
    for own in cache.completions:
        assert own.keys.shape[0] == P
        assert own.keys.shape[2:4] == (5, 4)
    _, cache = jax.eval_shape(model.prefill, prompts, mask)
    states, kept = jax.eval_shape(model.decode, cache, jax.ShapeDtypeStruct((P, 5, 3), jnp.int32), 0)
    assert states.shape == (P, 5, 3, 24)
    assert jax.tree.leaves(kept) == jax.tree.leaves(cache), "without room nothing is kept"


def test_a_window_ends_where_it_should() -> None:
    """With local layers alone, a state sees as far back as their windows reach together, and no farther."""
    model = with_weights_of("decoder-after", local=(0, 1))
    prompts, mask, completions = draw()
    before = np.asarray(forced_states(model, prompts, mask, completions))
    for place in range(S):
        changed = prompts.at[0, place].set((prompts[0, place] + 1) % 61)
        after = np.asarray(forced_states(model, changed, mask, completions))
        seen = np.abs(after - before)[0].max((0, 2)) > 1e-7
        # Two layers of three positions each see four positions back; state t is that of position S - 1 + t.
        np.testing.assert_array_equal(seen, S - 1 + np.arange(T) - place <= 4)


def test_what_has_no_position_is_refused_or_no_number() -> None:
    model = make("decoder-learned")
    prompts, mask, completions = draw()
    message = "must be at most 32 tokens together, .* but received room for 35. Lower max_prompt_tokens"
    with pytest.raises(ModelError, match=message):
        model.prefill(prompts, mask, max_new_tokens=25)
    with pytest.raises(ModelError, match=message):
        jax.eval_shape(lambda: hidden_states(model, prompts, mask, jnp.zeros((P, 1, 25), jnp.int32)))
    limited = with_weights_of("decoder", rope_scaling=RopeScaling("dynamic", 2.0), max_positions=16)
    assert np.isfinite(forced_states(limited, prompts, mask, completions)).all()
    forward = jax.jit(lambda positions: limited.forward(prompts[:, None], positions, Masks(causal_mask(S)))[0])
    states = forward(jnp.arange(S)[None, None] + 8)
    assert not np.isfinite(states[:, :, 16 - 8 :]).any()


def test_initial_values_follow_each_family() -> None:
    decoder = Decoder(replace(DECODER, width=200, vocab_size=300, layers=1), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(decoder.embedding[...].std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(decoder.layers[0].feed_forward.down[...].std(), 0.02, rtol=0.05)
    wide = replace(ENCODER_DECODER, width=200, heads=8, head_dim=16, hidden=300, decoder_layers=1, encoder_layers=1)
    model = T5(wide, rngs=nnx.Rngs(0))
    attention, feed_forward = model.encoder.layers[0].attention, model.decoder.layers[0].feed_forward
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
