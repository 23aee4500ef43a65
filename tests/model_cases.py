"""Models small enough for every test, one for each way in which the families differ, and the ways to run them."""

import functools
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastpref.models import T5, Decoder, DecoderConfig, T5Config
from fastpref.models.policy import hidden_states

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

    def leaf(path: Any, abstract: Any) -> jax.Array:
        values = random.normal(size=abstract.shape)
        vector = re.search(r"(bias|scale)\b", jax.tree_util.keystr(path, simple=True, separator=".")) is not None
        vector &= "position_bias" not in jax.tree_util.keystr(path)
        return jnp.asarray(1 + 0.2 * values if vector else 1.3 * abstract.shape[-2] ** -0.5 * values, jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(leaf, state))


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
