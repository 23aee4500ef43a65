"""Optimisers by name against their formulas, what decays, the learning rate over a run, and runs that go on."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orjson
import pytest
from flax import nnx
from small import PROMPTS, language_model

from fastpref.learning import loop, update
from fastpref.learning.optimizers import apply, build, decays, initial_state, learning_rate, rate
from fastpref.learning.supervised import sft
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import CheckpointError
from fastpref.method.schedules import Schedule, value_at
from fastpref.models import T5, Decoder, DecoderConfig, T5Config

SHAPES: dict[str, Any] = {
    "embedding": (5, 3),
    "layers": {"kernel": (2, 3, 4), "a": (2, 3, 2), "bias": (2, 4), "q_bias": (2, 4), "scale": (2, 3)},
    "position_bias": (4, 2),
    "weight": (3,),
}
DECAYING = {"embedding", "layers/kernel", "layers/a"}
NAMES = ["adafactor", "adamw", "lion"]
EXAMPLES = [{"prompt": prompt, "completion": "w1 w2"} for prompt in PROMPTS[:8]]


def tree(seed: int) -> Any:
    """A tree of `SHAPES`: parameters, or gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
    )


def flat(of: Any) -> dict[str, np.ndarray]:
    """Arrays of a tree by path, in double precision."""
    leaves = jax.tree_util.tree_leaves_with_path(of)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64) for path, x in leaves}


def compiled(optimizer: optax.GradientTransformation) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The optimiser's state of parameters, and an update by it."""
    return jax.jit(partial(initial_state, optimizer)), jax.jit(partial(apply, optimizer))


def three_updates(optimizer: optax.GradientTransformation) -> Any:
    params = tree(0)
    start, advance = compiled(optimizer)
    state = start(params)
    for step in range(3):
        params, state = advance(tree(step + 1), state, params)
    return params


def assert_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for pair in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(*pair)


# Updates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "betas"),
    [
        ({"optimizer": "adamw"}, (0.9, 0.999)),
        ({"optimizer": "adamw", "betas": (0.8, 0.95), "weight_decay": 0.1}, (0.8, 0.95)),
        ({"optimizer": "adamw", "weight_decay": 0.5, "max_grad_norm": 0.5}, (0.9, 0.999)),
        ({"optimizer": "lion"}, (0.9, 0.99)),
        ({"optimizer": "lion", "betas": (0.95, 0.98), "weight_decay": 0.3, "max_grad_norm": 1.0}, (0.95, 0.98)),
    ],
)
def test_three_updates_are_those_of_the_papers(settings: dict[str, Any], betas: tuple[float, float]) -> None:
    """AdamW: Loshchilov and Hutter, algorithm 2, with the rate before the decay. Lion: Chen et al., algorithm 2."""
    config = TrainConfig(**settings, learning_rate=0.01, warmup_steps=2, lr_schedule="linear", steps=10)
    (b1, b2), params = betas, flat(tree(0))
    first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for step in range(3):
        gradients, size = flat(tree(step + 1)), 0.01 * min(step / 2, (10 - step) / 8)
        norm = np.sqrt(sum((x**2).sum() for x in gradients.values()))
        for name, gradient in gradients.items():
            gradient *= min(1.0, (config.max_grad_norm or np.inf) / norm)
            if config.optimizer == "adamw":
                first[name] = b1 * first[name] + (1 - b1) * gradient
                second[name] = b2 * second[name] + (1 - b2) * gradient**2
                mean, square = first[name] / (1 - b1 ** (step + 1)), second[name] / (1 - b2 ** (step + 1))
                direction = mean / (np.sqrt(square) + 1e-8)
            else:
                direction = np.sign(b1 * first[name] + (1 - b1) * gradient)
                first[name] = b2 * first[name] + (1 - b2) * gradient
            params[name] = params[name] - size * (direction + config.weight_decay * (name in DECAYING) * params[name])
    result = flat(three_updates(build(config)))
    for name, expected in params.items():
        np.testing.assert_allclose(result[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_adafactor_is_the_papers_and_decays_by_the_rate() -> None:
    """Optax's own adds its decay past the rate."""
    config = TrainConfig(learning_rate=0.01, lr_schedule="cosine", steps=10, max_grad_norm=2.0, weight_decay=0.5)
    plain = build(replace(config, weight_decay=0.0))
    params = tree(0)
    (start, advance), (start_plain, advance_plain) = compiled(build(config)), compiled(plain)
    state, plain_state = start(params), start_plain(params)
    for step in range(3):
        before, size = flat(params), 0.005 * (1 + np.cos(np.pi * step / 10))
        # The second moments are those of the gradients, whatever becomes of the parameters.
        without, plain_state = advance_plain(tree(step + 1), plain_state, params)
        params, state = advance(tree(step + 1), state, params)
        for name, result in flat(params).items():
            expected = flat(without)[name] - size * 0.5 * (name in DECAYING) * before[name]
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def layer_by_layer_apart(optimizer: optax.GradientTransformation) -> Any:
    """Three updates of a tree in which every layer has arrays of its own."""

    def apart(of: Any) -> Any:
        return of | {"layers": [{name: array[at] for name, array in of["layers"].items()} for at in range(2)]}

    params = apart(tree(0))
    start, advance = compiled(optimizer)
    state = start(params)
    for step in range(3):
        params, state = advance(apart(tree(step + 1)), state, params)
    return params | {"layers": jax.tree.map(lambda *each: jnp.stack(each), *params["layers"])}


def test_adafactor_of_stacked_layers_is_that_of_each_layer() -> None:
    config = TrainConfig(learning_rate=0.01, max_grad_norm=2.0)
    plain = optax.chain(optax.clip_by_global_norm(2.0), optax.adafactor(0.01, decay_rate=0.8))
    ours, theirs = flat(three_updates(build(config))), flat(layer_by_layer_apart(plain))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)
    # One scale of both layers at once would be another.
    assert not np.allclose(flat(three_updates(plain))["layers/kernel"], theirs["layers/kernel"], rtol=1e-4)


def test_the_defaults_are_optax_bit_for_bit() -> None:
    constant = optax.constant_schedule(1e-4)
    assert_equal(
        three_updates(build(TrainConfig(optimizer="adafactor")))["embedding"],
        three_updates(optax.adafactor(constant, decay_rate=0.8))["embedding"],
    )
    for name, optimizer in (
        ("adamw", optax.adamw(constant, weight_decay=0.0)),
        ("lion", optax.lion(constant, weight_decay=0.0)),
    ):
        assert_equal(three_updates(build(TrainConfig(optimizer=name))), three_updates(optimizer))


def test_equal_settings_share_an_optimiser_and_so_its_compiled_update() -> None:
    settings: dict[str, Any] = {"optimizer": "adamw", "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = build(TrainConfig(**settings, warmup_steps=3))
    assert build(TrainConfig(**settings, warmup_steps=3, seed=1, steps=7)) is optimizer
    for change in ({"betas": None}, {"weight_decay": 0.0}, {"warmup_steps": 4}, {"lr_schedule": "linear"}):
        assert build(TrainConfig(**{**settings, "warmup_steps": 3, **change})) is not optimizer


# What decays --------------------------------------------------------------------------------------------------------


def names(make: Callable[..., Any]) -> tuple[set[str], set[str]]:
    """Last names of the parameters of a module that decay, and of the rest."""
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    decaying, rest = set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(module)):
        (decaying if decays(path, leaf) else rest).add(jax.tree_util.keystr(path[-2:-1], simple=True))
    return decaying, rest


def test_matrices_decay_and_norms_and_biases_never_do() -> None:
    leaves = jax.tree_util.tree_leaves_with_path(tree(0))
    assert {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if decays(path, leaf)
    } == DECAYING
    products = {"q", "k", "v", "o", "gate", "up", "down"}
    sizes: dict[str, int] = {"vocab_size": 8, "width": 4, "hidden": 6, "heads": 2, "head_dim": 2}
    t5 = T5Config(**sizes, encoder_layers=1, decoder_layers=1, tied=True)
    assert names(partial(T5, t5)) == (products | {"embedding"}, {"scale", "position_bias"})
    biases: dict[str, Any] = dict.fromkeys(("attention_bias", "output_bias", "feed_forward_bias"), True)
    config = DecoderConfig(
        **sizes, layers=1, kv_heads=1, **biases, norm="layer", qk_norm="head", learned_positions=True, max_positions=5
    )
    assert names(partial(Decoder, config)) == (
        products | {"embedding", "positions", "lm_head"},
        {"scale", "bias", *(f"{name}_bias" for name in products)},
    )


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_a_gradient_shrink_by_the_decay_alone(name: str) -> None:
    """On parameters of a model, NNX variables, as a training has them."""
    config = TrainConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5)
    params = nnx.split(language_model().module.layers)[1]
    zeros = jax.tree.map(jnp.zeros_like, params)
    start, advance = compiled(build(config))
    after, _ = advance(zeros, start(params), params)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for (path, leaf), result in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), strict=True):
        factor = 0.95 if decays(path, leaf) else 1.0
        np.testing.assert_allclose(result, np.asarray(leaf) * np.float32(factor), rtol=1e-6)


# Learning rate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_rate_follows_its_formula(kind: Any, warmup: int) -> None:
    config = SupervisedConfig(learning_rate=0.3, warmup_steps=warmup, lr_schedule=kind, steps=20)
    for step in (0, 1, 3, 4, 5, 11, 19, 20, 25):
        done = min(1.0, (step - warmup) / (20 - warmup))
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[kind]
        expected = 0.3 * (step / warmup if step < warmup else fall)
        assert value_at(rate(config), step) == pytest.approx(expected, abs=1e-7), step


def test_the_rates_of_a_constant_course_do_not_depend_on_the_steps() -> None:
    def course(**settings: Any) -> Any:
        return rate(TrainConfig(warmup_steps=7, **settings))

    assert course(steps=10) == course(steps=1000)
    assert rate(TrainConfig(learning_rate=0.1)) == 0.1
    whole = Schedule(start=1.0, end=0.5, steps=5, kind="cosine")
    assert rate(TrainConfig(learning_rate=whole)) is whole


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_update_moves_no_count(name: str) -> None:
    config = TrainConfig(optimizer=name, learning_rate=0.1, warmup_steps=2, steps=10, weight_decay=0.1)
    params, optimizer = tree(0), build(config)
    state = compiled(optimizer)[0](params)
    advance = jax.jit(partial(update.apply_gated, optimizer))
    broken = jax.tree.map(lambda x: x * jnp.float32(jnp.nan), tree(1))
    rates = []
    for gradients in (tree(1), broken, tree(2), tree(3)):
        rates.append(learning_rate(config, state))
        params, state, _ = advance(jnp.float32(1), gradients, state, params)
    assert rates == pytest.approx([0.0, 0.05, 0.05, 0.1])


def test_a_training_logs_the_rate_of_each_update() -> None:
    config = SupervisedConfig(
        steps=4, batch_size=8, max_prompt_tokens=8, max_completion_tokens=4, max_shapes=1, optimizer="lion",
        betas=(0.9, 0.98), weight_decay=0.1, learning_rate=0.01, warmup_steps=2, lr_schedule="linear",
    )  # fmt: skip
    result = sft(language_model(), EXAMPLES, config, quiet=True)
    assert [step["learning_rate"] for step in result.metrics] == pytest.approx([0.0, 0.005, 0.01, 0.005])
    losses = [step["loss"] for step in result.metrics]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5), "the first update is made with a rate of 0"
    assert losses[3] < losses[2] < losses[1]


# Runs that go on ----------------------------------------------------------------------------------------------------


class Killed(Exception):
    """The end of a process."""


class Nothing:
    """A source of no data."""

    def state(self) -> bytes:
        return b""

    def restore(self, state: bytes, /) -> None:
        assert not state


def go(run_dir: Path, kill_at: int | None = None, **settings: Any) -> Any:
    config = TrainConfig(**{"learning_rate": 0.01, "steps": 4, **settings})
    params = tree(0)
    start, update_by = compiled(build(config))

    def advance(done: int, arrays: Any) -> loop.Outcome:
        params, state = arrays
        size = learning_rate(config, state)
        after = update_by(tree(done + 1), state, params)
        return loop.Outcome(after, {"learning_rate": size, "updates/skipped": 0.0})

    def kill(done: int, *_: Any) -> None:
        if done == kill_at:
            raise Killed

    (params, _), history = loop.drive(
        advance, (params, start(params)), Nothing(), config,
        run_dir=run_dir, fingerprint={}, description="test", on_step=kill, quiet=True,
    )  # fmt: skip
    return params, [step["learning_rate"] for step in history]


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer": name, "weight_decay": 0.1, "warmup_steps": 1, "lr_schedule": "cosine"}
    with pytest.raises(Killed):
        go(tmp_path / "run", kill_at=2, **settings)
    params, rates = go(tmp_path / "run", **settings)
    expected, expected_rates = go(tmp_path / "whole", **settings)
    assert_equal(params, expected)
    assert rates == expected_rates


def test_a_longer_run_decays_to_its_new_end_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path, lr_schedule="linear")
    capsys.readouterr()
    _, rates = go(tmp_path, lr_schedule="linear", steps=8)
    assert rates == pytest.approx([0.01 * (1 - step / (4 if step < 4 else 8)) for step in range(8)])
    said = " ".join(capsys.readouterr().out.split())
    assert "other settings: steps 4 becomes 8; the learning rate now reaches 0 at the new steps" in said
    assert orjson.loads((tmp_path / "changes.jsonl").read_bytes()) == {"step": 4, "settings": {"steps": [4, 8]}}


def test_the_rate_may_change_and_the_optimiser_may_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path, optimizer="adamw", steps=2)
    for change, text in (
        ({"weight_decay": 0.1}, r"config\.weight_decay: 0\.0 in the checkpoint, 0\.1 now"),
        ({"betas": (0.9, 0.95)}, r"config\.betas: None in the checkpoint, \[0\.9, 0\.95\] now"),
        ({"optimizer": "lion"}, r"config\.optimizer: 'adamw' in the checkpoint, 'lion' now"),
    ):
        with pytest.raises(CheckpointError, match=text):
            go(tmp_path, **{"optimizer": "adamw", "steps": 3, **change})
    _, rates = go(tmp_path, optimizer="adamw", steps=3, warmup_steps=1, lr_schedule="linear")
    assert rates == pytest.approx([0.01, 0.01, 0.005])
    assert "lr_schedule 'constant' becomes 'linear'" in capsys.readouterr().out
