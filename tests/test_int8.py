"""Models in int8: the product, what stays float, one pass, training, files, and what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import PROMPTS, language_model, prefers_w1
from test_adapter_runs import ADAPTER, FIT, RECORDED, config
from test_adapters import FAMILIES, adapted, logits, random_adapters
from test_precision import first_wins

from fastpref.kernels import quantize
from fastpref.learning.memory import train_memory
from fastpref.learning.supervised import fit_preference_model, sft
from fastpref.learning.train import train
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import ConfigError, ModelError, ModelWarning
from fastpref.models import LanguageModel, load, load_adapter, merged, quantized, save
from fastpref.models.adapters import adapt, split, with_adapters
from fastpref.models.int8 import KERNELS
from fastpref.models.lowrank import Adapted, LowRank, Quantized, dense, in_dtype, is_quantized, product, stacked
from fastpref.sampling.generate import generate_jit, sample


def matrix(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def in_int8(weight: np.ndarray) -> Quantized:
    return Quantized(*quantize(jnp.asarray(weight, jnp.float32), -2))


def leaves(model: LanguageModel) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model.module))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 129, 33), (4, 64, 256)], ids=str)
def test_a_product_is_within_half_a_scale_of_the_float_one(shape: tuple[int, int, int], dtype: str) -> None:
    rows, inner, outer = shape
    x, weight = jnp.asarray(matrix((rows, inner), 0), dtype), matrix((inner, outer), 1).astype(np.float32)
    kernel = in_int8(weight)
    wide, scale = np.asarray(x, np.float64), np.asarray(kernel.scale, np.float64)
    np.testing.assert_allclose(scale, np.abs(weight).max(0) / 127, rtol=1e-6)
    exact = wide @ (np.asarray(kernel.weight, np.float64) * scale)
    bound = np.abs(wide).sum(1, keepdims=True) * scale / 2
    assert np.all(np.abs(exact - wide @ weight.astype(np.float64)) <= bound * (1 + 1e-5))
    result = product(x, kernel)
    assert result.dtype == x.dtype
    rounding = (np.abs(wide) @ (np.abs(np.asarray(kernel.weight, np.float64)) * scale)) * 2.0**-22
    rounding += np.abs(exact) * (2.0**-7 if dtype == "bfloat16" else 0)
    assert np.all(np.abs(np.asarray(result, np.float64) - exact) <= rounding)


def test_gradients_are_those_of_the_array_that_it_stands_for() -> None:
    x, weight = jnp.asarray(matrix((6, 5), 0), jnp.float32), in_int8(matrix((5, 4), 1))
    factors = LowRank(*(jnp.asarray(matrix(shape, 2), jnp.float32) for shape in ((5, 2), (2, 4))))

    def value(x: Any, factors: Any, kernel: Any) -> Any:
        return jnp.sin(product(x, Adapted(kernel, (factors, None), 0.5))).sum()

    ours, plain = (jax.grad(value, (0, 1))(x, factors, kernel) for kernel in (weight, weight.dense()))
    for gradient, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_kernels_may_lie_behind_one_another() -> None:
    """As layers under one scan hold them."""
    x, kernels = jnp.asarray(matrix((3, 5), 0), jnp.float32), [in_int8(matrix((5, 5), seed)) for seed in range(4)]
    together = jax.tree.map(lambda *each: jnp.stack(each), *kernels)
    assert (together.shape, together.scale.shape, together.size) == ((4, 5, 5), (4, 5), 100)
    result, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(product(x, kernel)), None), x, together)
    expected = x
    for kernel in kernels:
        expected = jnp.tanh(product(expected, kernel))
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(together.dense()[2], kernels[2].dense())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_head_are_in_int8_and_all_else_is_as_it_was(family: str) -> None:
    model = language_model(family)
    small, before, after = quantized(model), leaves(model), leaves(quantized(model))
    for name, value in after.items():
        last = name.rpartition(".")[2]
        tied = family == "t5"
        assert isinstance(value, Quantized) == (last in KERNELS or (tied and last == "embedding")), name
        if isinstance(value, Quantized):
            wide = jnp.expand_dims(value.scale, value.axis)
            assert np.all(np.abs(value.dense() - before[name]) <= wide / 2 * (1 + 1e-6))
        else:
            assert value is before[name]
    head = small.module.head()
    assert head.weight.dtype == jnp.int8
    assert head.scales.shape == (36,)
    # The model is the one of its dequantised arrays, and near the one that it was made from.
    with pytest.warns(ModelWarning, match="merged with what int8 kept of its base"):
        plain = merged(small)
    assert not is_quantized(nnx.state(plain.module))
    np.testing.assert_allclose(logits(small), logits(plain), rtol=1e-5, atol=1e-5)
    assert 0 < np.abs(logits(small) - logits(model)).max() < 0.05 * np.abs(logits(model)).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_two_models_in_one_pass_are_those_of_two_passes(family: str) -> None:
    base = quantized(language_model(family))
    parts = adapt(base, ADAPTER, seed=0)
    policy = with_adapters(base, parts[0], random_adapters(parts[1], 1))
    with pytest.warns(ModelWarning):
        plain = merged(base)
    floats = with_adapters(plain, adapt(plain, ADAPTER, seed=0)[0], random_adapters(parts[1], 1))
    settings: dict[str, Any] = {"eos_id": 1, "max_new_tokens": 6, "num_valid_tokens": 33, "temperature": 1.0}
    prompts = np.random.default_rng(3).integers(3, 33, (3, 5)).astype(np.int32)
    arguments = (
        prompts,
        np.array([5, 2, 4], np.int32),
        np.full((3, 2), 0.3, np.float32),
        jax.random.key(0),
        np.arange(6, dtype=np.int32).reshape(3, 2),
    )
    (definition, params), ref_params = nnx.split(policy.module), nnx.state(base.module)
    assert stacked(params, ref_params) is not None
    together = sample(definition, params, definition, ref_params, *arguments, **settings)
    apart = generate_jit(definition, params, definition, ref_params, *arguments, **settings)
    (definition, params), ref_params = nnx.split(floats.module), nnx.state(plain.module)
    exact = sample(definition, params, definition, ref_params, *arguments, **settings)
    for other in (apart, exact):
        np.testing.assert_array_equal(together.tokens, other.tokens)
        for name in ("policy_logps", "ref_logps", "mixture_logps"):
            np.testing.assert_allclose(getattr(together, name), getattr(other, name), rtol=1e-4, atol=1e-4)


def test_low_precision_reads_rows_in_its_dtype() -> None:
    small = quantized(language_model("t5"))
    params = in_dtype(nnx.state(small.module), jnp.bfloat16)
    flat = {path[-1]: leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    assert flat["embedding"].dtype == flat["q"].dtype == "bfloat16"
    assert flat["embedding"][jnp.arange(3)].dtype == jnp.bfloat16
    assert flat["embedding"].scale.dtype == jnp.float32
    same = in_dtype(params, jnp.bfloat16)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ["ipo-md", "offline-ipo", "inpo"])
def test_a_run_starts_where_the_policy_is_the_reference(algorithm: str, dtype: Any, tmp_path: Path) -> None:
    save(language_model(), tmp_path / "sft")
    offline = algorithm.startswith("offline")
    settings = config(algorithm, steps=2, dtype=dtype, base_dtype="int8")
    result = train(
        tmp_path / "sft", RECORDED if offline else PROMPTS, None if offline else first_wins, settings,
        run_dir=tmp_path / "run", quiet=True,
    )  # fmt: skip
    first, second = result.metrics
    kind = "anchor" if algorithm == "inpo" else "rewards"
    assert first[f"{kind}/margins"] == pytest.approx(0, abs=0 if dtype == "bfloat16" else 1e-5)
    assert second[f"{kind}/margins"] != 0
    parts = split(result.policy)
    assert parts is not None
    assert is_quantized(parts[0].params)
    assert is_quantized(nnx.state(result.ref.module))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(parts[1])} == {"float32"}
    # Its files name the float base, which is told from another by what int8 makes of it.
    with pytest.warns(ModelWarning, match="trained on its base in int8, and is read on the base itself"):
        again = load(tmp_path / "run" / "policy", dtype=jnp.dtype(dtype))
    assert not is_quantized(nnx.state(again.module))
    np.testing.assert_allclose(logits(again), logits(result.policy), atol=0.05 * np.abs(logits(again)).max())
    if dtype == "float32" and algorithm == "ipo-md":
        save(merged(again), tmp_path / "whole")
        with pytest.raises(ModelError, match="must be read on the base that it was trained on"):
            load_adapter(tmp_path / "run" / "policy", base=language_model(seed=1))


def test_a_reference_from_a_directory_shares_the_base(tmp_path: Path) -> None:
    save(language_model(), tmp_path / "sft")
    settings = config(steps=1, base_dtype="int8")
    result = train(tmp_path / "sft", PROMPTS, prefers_w1, settings, ref=tmp_path / "sft", quiet=True)
    parts = split(result.policy)
    assert parts is not None
    shared = zip(jax.tree.leaves(parts[0].params), jax.tree.leaves(nnx.state(result.ref.module)), strict=True)
    assert all(one is other for one, other in shared)


def test_supervised_trainings_take_an_int8_base() -> None:
    settings = {"steps": 3, "max_prompt_tokens": 8, "base_dtype": "int8", "eval_every": 3}
    records = [{"prompt": prompt, "completion": "w1 w2"} for prompt in PROMPTS]
    tuned = sft(language_model(), records, SupervisedConfig(**FIT | settings), held_out=records[:4], quiet=True)
    assert is_quantized(nnx.state(tuned.model.module))
    assert np.isfinite(tuned.held_out)
    long = SupervisedConfig(**FIT | settings | {"max_prompt_tokens": 24})
    judge = fit_preference_model(
        language_model(), RECORDED, long, held_out=RECORDED[:4], template="{prompt} {first} {second}", quiet=True
    )
    assert 0 <= judge.held_out <= 1


def test_only_adapters_are_trained_on_int8(tmp_path: Path) -> None:
    words = (
        r"adapter must be set to train a model in int8, whose own parameters have no gradient, but received None. "
        r"Set adapter = \{ rank = 16 \}, say, or train a model in floating point: leave base_dtype out"
    )
    plain, small = language_model(), quantized(language_model())
    for policy, settings in ((plain, config(adapter=None, base_dtype="int8")), (small, config(adapter=None))):
        with pytest.raises(ConfigError, match=words):
            train(policy, PROMPTS, prefers_w1, settings, quiet=True)
    with pytest.raises(ConfigError, match=words):
        sft(plain, PROMPTS, SupervisedConfig(base_dtype="int8"), quiet=True)
    with pytest.raises(ConfigError, match=words):
        train_memory(TrainConfig(base_dtype="int8"), *nnx.split(plain.module))
    with pytest.raises(ModelError, match=r"floating point to be saved whole, but received one in int8. Save the one"):
        save(small, tmp_path / "small")


@pytest.mark.usefixtures("unchecked")
def test_no_other_type_is_known() -> None:
    with pytest.raises(ConfigError, match=r"base_dtype must be 'auto' or 'int8', but received 'int4'. Choose how the"):
        TrainConfig(base_dtype="int4")  # type: ignore[arg-type]


def test_memory_counts_a_byte_for_each_weight() -> None:
    model = language_model()
    parts = adapt(model, ADAPTER, seed=0)
    held = [
        train_memory(config(base_dtype=kind), *nnx.split(model.module), parts, peak=False).ref
        for kind in ("auto", "int8")
    ]
    kernels = [leaf for leaf in leaves(quantized(model)).values() if isinstance(leaf, Quantized)]
    assert held[0] - held[1] == sum(3 * kernel.size - 4 * kernel.scale.size for kernel in kernels)


def test_an_adapted_head_is_one_array() -> None:
    wide = adapted("decoder", config=type(ADAPTER)(rank=3, targets=("lm_head", "q_proj")))
    head = quantized(wide).module.head()
    assert head.scales is None
    kernel = leaves(quantized(wide))["lm_head"]
    assert isinstance(kernel.weight, Quantized)
    np.testing.assert_array_equal(head.weight, dense(kernel))
