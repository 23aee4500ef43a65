"""Parameters that are trained in bfloat16: rounding that keeps the mean, and what stays in float32."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import PROMPTS, language_model, prefers_w1
from test_training import SMALL

from fastpref.learning import optimizers
from fastpref.learning.supervised import sft
from fastpref.learning.train import train
from fastpref.method.adapter import AdapterConfig
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import ConfigError
from fastpref.models import LanguageModel
from fastpref.models.lowrank import in_dtype


def dtypes(tree: Any) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def test_rounding_gives_a_neighbour_and_keeps_the_mean() -> None:
    numbers = np.random.default_rng(0).normal(0, 10.0 ** np.arange(-20, 20)[:, None], (40, 25)).astype(np.float32)
    draws = 1_000
    keys = jax.random.split(jax.random.key(0), draws)
    rounded = jax.vmap(lambda key: optimizers.stochastically_rounded(jnp.asarray(numbers), key))(keys)
    values = np.asarray(rounded.astype(jnp.float32), np.float64)
    gap = 2.0 ** (np.floor(np.log2(np.abs(numbers.astype(np.float64)))) - 7)
    assert (np.abs(values - numbers) < gap).all()
    # A mean of draws of two numbers a gap apart: standard deviation at most half a gap over the root of their number.
    assert (np.abs(values.mean(0) - numbers) < 5 * gap / 2 / draws**0.5).all()


def test_what_bfloat16_holds_is_kept_and_so_is_what_is_no_number() -> None:
    held = jnp.asarray([0.0, -0.0, 1.0, -2.5, 3.0e38, np.inf, -np.inf], jnp.bfloat16).astype(jnp.float32)
    for seed in range(8):
        rounded = optimizers.stochastically_rounded(held, jax.random.key(seed))
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(rounded.astype(jnp.float32)), np.asarray(held))
        nothing = optimizers.stochastically_rounded(jnp.asarray([np.nan], jnp.float32), jax.random.key(seed))
        assert bool(jnp.isnan(nothing).all())


def test_small_updates_reach_the_mean_that_rounding_to_nearest_loses() -> None:
    chain = optimizers.build(SupervisedConfig(steps=1, optimizer="adamw", learning_rate=1e-4))
    params = {"kernel": jnp.full((64, 64), 0.5, jnp.bfloat16)}
    gradients = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    state = optimizers.initial_state(chain, params)
    nearest, _ = optimizers.apply(chain, gradients, state, params)
    assert bool((nearest["kernel"] == params["kernel"]).all())
    for step in range(20):
        params, state = optimizers.apply(chain, gradients, state, params, key=jax.random.key(step))
    assert params["kernel"].dtype == jnp.bfloat16
    moved = 0.5 - float(params["kernel"].astype(jnp.float32).mean())
    assert moved == pytest.approx(20 * 1e-4, rel=0.1)


@pytest.mark.filterwarnings("ignore:the base of the adapter was loaded from no directory")
@pytest.mark.parametrize("adapter", [None, pytest.param(AdapterConfig(rank=2), marks=pytest.mark.slow)])
def test_a_run_in_bfloat16_goes_on_bit_for_bit(adapter: AdapterConfig | None, tmp_path: Path) -> None:
    """Its parameters are bfloat16, in its files too, the state of its optimiser float32."""
    settings: dict[str, Any] = {**SMALL, "param_dtype": "bfloat16", "adapter": adapter, "optimizer": "adamw"}

    def go(name: str, steps: int) -> LanguageModel:
        config = TrainConfig(**settings, steps=steps)
        return train(language_model(), PROMPTS, prefers_w1, config, run_dir=tmp_path / name, quiet=True).policy

    whole = nnx.state(go("whole", 3).module)
    go("parts", 1)
    parts = nnx.state(go("parts", 3).module)
    assert dtypes(whole) == ({"bfloat16"} if adapter is None else {"bfloat16", "float32"})
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    first, third = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts"))
    assert len(first) == len(third) == 3


def test_the_optimiser_of_bfloat16_parameters_keeps_float32() -> None:
    params = {"kernel": jnp.zeros((8, 8), jnp.bfloat16)}
    for name in ("adamw", "adafactor", "lion"):
        state = optimizers.initial_state(optimizers.build(SupervisedConfig(steps=1, optimizer=name)), params)
        assert dtypes(state) == {"float32"}


@pytest.mark.usefixtures("unchecked")
def test_a_model_that_comes_in_bfloat16_is_trained_in_float32_unless_the_setting_says_otherwise() -> None:
    model = language_model()
    half = model.with_module(nnx.merge(*_halved(model)))
    trained = train(half, PROMPTS, prefers_w1, TrainConfig(**SMALL, steps=1), quiet=True).policy
    assert dtypes(nnx.state(trained.module)) == {"float32"}
    records = [{"prompt": prompt, "completion": "w1 w2"} for prompt in PROMPTS]
    for dtype in ("float32", "bfloat16"):
        config = SupervisedConfig(steps=1, batch_size=4, param_dtype=dtype)
        assert dtypes(nnx.state(sft(half, records, config, quiet=True).model.module)) == {dtype}
    with pytest.raises(ConfigError, match=r"param_dtype must be 'float32' or 'bfloat16', but received 'float16'"):
        TrainConfig(**SMALL, steps=1, param_dtype="float16")  # type: ignore[arg-type]


def _halved(model: LanguageModel) -> tuple[Any, Any]:
    definition, params = nnx.split(model.module)
    return definition, in_dtype(params, jnp.bfloat16)
