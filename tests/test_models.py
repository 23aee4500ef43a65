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
from model_cases import (
    CONFIGS,
    LENGTHS,
    K,
    P,
    S,
    T,
    chunks_of,
    compiled,
    decoded_states,
    draw,
    forced_states,
    make,
    with_weights_of,
)
from safetensors.numpy import load_file

from fastpref.method.errors import ModelError
from fastpref.models import T5, Decoder, Policy, RopeScaling, T5Config, load
from fastpref.models.masks import Masks, causal_mask
from fastpref.models.policy import hidden_states


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
    shared, own = cache.prompts, cache.completions
    layers, heads = shared.keys.shape[0], shared.keys.shape[2]
    assert shared.keys.size == shared.values.size == layers * P * S * heads * 6
    assert own.keys.shape[:2] == (layers, P)
    assert own.keys.shape[3:5] == (5, 4)
    _, cache = jax.eval_shape(model.prefill, prompts, mask)
    states, kept = jax.eval_shape(model.decode, cache, jax.ShapeDtypeStruct((P, 5, 3), jnp.int32), 0)
    assert states.shape == (P, 5, 3, 24)
    assert jax.tree.leaves(kept) == jax.tree.leaves(cache), "without room nothing is kept"


@pytest.mark.parametrize("name", ["decoder-local", "t5-v1.1"])
def test_a_program_is_as_large_with_many_layers_as_with_few(name: str) -> None:
    prompts, mask, completions = draw()
    config = CONFIGS[name]
    kind = T5 if isinstance(config, T5Config) else Decoder
    sizes = ("encoder_layers", "decoder_layers") if kind is T5 else ("layers",)

    def equations(layers: int) -> int:
        sized: Any = replace(config, **dict.fromkeys(sizes, layers))
        graph, state = nnx.split(nnx.eval_shape(lambda: kind(sized, rngs=nnx.Rngs(0))))

        def loss(state: Any) -> jax.Array:
            return hidden_states(nnx.merge(graph, state), prompts, mask, completions).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(state)).count(" = ")

    assert equations(3) == equations(9) > 50


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
