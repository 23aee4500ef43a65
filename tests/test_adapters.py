"""Low-rank adapters: the product, models that share a base, targets, merging, and what is refused."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx
from small import language_model

from fastpref.method.adapter import AdapterConfig
from fastpref.method.errors import ConfigError, ModelError
from fastpref.models import LanguageModel
from fastpref.models.adapters import adapt, linear_modules, merged, on_base, split, trainable, with_adapters
from fastpref.models.lowrank import Adapted, LowRank, product, stacked
from fastpref.models.policy import hidden_states
from fastpref.sampling.generate import generate_jit, sample

FAMILIES = ["decoder", "t5"]
CONFIG = AdapterConfig(rank=3, alpha=6.0)


def random_adapters(adapters: Any, seed: int, size: float = 0.2) -> Any:
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [size * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def logits(model: LanguageModel) -> np.ndarray:
    rng = np.random.default_rng(0)
    prompts, tokens = (jnp.asarray(rng.integers(3, 33, shape).astype(np.int32)) for shape in ((3, 5), (3, 2, 4)))
    states = hidden_states(model.module, prompts, jnp.ones((3, 5), bool), tokens)
    return np.asarray(model.module.head().logits(states.reshape(-1, states.shape[-1])))


def adapted(family: str, seed: int = 1, config: AdapterConfig = CONFIG) -> LanguageModel:
    model = language_model(family)
    base, adapters = adapt(model, config, seed=0)
    return with_adapters(model, base, random_adapters(adapters, seed))


@pytest.mark.parametrize("init", ["zero-b", "zero-a"])
@pytest.mark.parametrize("family", FAMILIES)
def test_initial_adapters_are_the_base_bit_for_bit(family: str, init: Any) -> None:
    model = language_model(family)
    base, adapters = adapt(model, AdapterConfig(rank=3, init=init), seed=0)
    np.testing.assert_array_equal(logits(with_adapters(model, base, adapters)), logits(model))
    zero, drawn = (1, 0) if init == "zero-b" else (0, 1)
    for factors in adapters.values():
        assert not factors[zero].any()
        bound = (factors.a.shape[-2] if init == "zero-b" else 3) ** -0.5
        assert 0 < np.abs(factors[drawn]).max() <= bound
        assert len(np.unique(factors[drawn])) > 1


def test_the_product_is_that_of_each_models_own_kernel() -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(6, 5)), rng.normal(size=(5, 4))
    factors = [
        LowRank(jnp.asarray(rng.normal(size=(5, 2)), jnp.float32), jnp.asarray(rng.normal(size=(2, 4)), jnp.float32))
        for _ in range(2)
    ]
    kernel = Adapted(jnp.asarray(weight, jnp.float32), (factors[0], None, factors[1]), 0.5)
    kernels = [weight + 0.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64) for a, b in factors]
    wanted = np.concatenate([x[:2] @ kernels[0], x[2:4] @ weight, x[4:] @ kernels[1]])
    np.testing.assert_allclose(product(jnp.asarray(x, jnp.float32), kernel), wanted, rtol=1e-5, atol=1e-5)
    alone = Adapted(kernel.weight, (factors[0],), 0.5)
    np.testing.assert_allclose(alone.merged(), kernels[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"the adapter of one model, but received 3. Merge each model by itself"):
        kernel.merged()


def test_the_gradient_is_that_of_finite_differences() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        x, weight, a, b = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 5), (5, 4), (5, 2), (2, 4)))

        @jax.jit
        def value(x: Any, a: Any, b: Any) -> Any:
            return jnp.sin(product(x, Adapted(weight, (LowRank(a, b), None), 0.5))).sum()

        jax.test_util.check_grads(value, (x, a, b), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_two_models_in_one_pass_are_those_of_two_passes(family: str) -> None:
    policy, ref = adapted(family, 1), language_model(family)
    moved = adapted(family, 2)
    for first, second in ((policy, ref), (policy, moved), (ref, ref)):
        (definition, params), (_, ref_params) = nnx.split(first.module), nnx.split(second.module)
        both = stacked(params, ref_params)
        assert both is not None
        arrays = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(ref.module)))
        extra = sum(leaf.size for leaf in jax.tree.leaves(both)) - arrays
        assert extra < arrays
        settings: dict[str, Any] = {"eos_id": 1, "max_new_tokens": 6, "num_valid_tokens": 33, "temperature": 1.0}
        rng = np.random.default_rng(3)
        prompts = rng.integers(3, 33, (3, 5)).astype(np.int32)
        arguments = (
            prompts,
            np.array([5, 2, 4], np.int32),
            np.full((3, 2), 0.3, np.float32),
            jax.random.key(0),
            np.arange(6, dtype=np.int32).reshape(3, 2),
        )
        together = sample(definition, params, definition, ref_params, *arguments, **settings)
        apart = generate_jit(definition, params, definition, ref_params, *arguments, **settings)
        np.testing.assert_array_equal(together.tokens, apart.tokens)
        for name in ("policy_logps", "ref_logps", "mixture_logps"):
            np.testing.assert_allclose(getattr(together, name), getattr(apart, name), rtol=1e-5, atol=1e-5)
        if first is second:
            np.testing.assert_array_equal(together.policy_logps, together.ref_logps)


def test_models_that_share_no_base_are_not_stacked() -> None:
    params = nnx.state(adapted("decoder").module)
    assert stacked(params, nnx.state(language_model("decoder", 1).module)) is None
    head = AdapterConfig(rank=3, alpha=6.0, targets=("lm_head", "q_proj"))
    assert stacked(nnx.state(adapted("decoder", config=head).module), nnx.state(language_model().module)) is None
    other = nnx.state(adapted("decoder", config=replace(CONFIG, alpha=3.0)).module)
    assert stacked(params, other) is None
    assert stacked(stacked(params, params), params) is None


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head")])
def test_a_merged_model_has_the_logits_of_its_adapter(targets: Any) -> None:
    model = adapted("decoder", config=replace(CONFIG, targets=targets))
    whole = merged(model)
    assert split(whole) is None
    assert not np.allclose(logits(whole), logits(language_model()), atol=1e-3)
    np.testing.assert_allclose(logits(whole), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_splitting_gives_base_and_adapters_back(family: str) -> None:
    model = language_model(family)
    base, adapters = adapt(model, CONFIG, seed=0)
    adapters = random_adapters(adapters, 4)
    parts = split(with_adapters(model, base, adapters))
    assert parts is not None
    assert parts[0].sites == base.sites
    assert all(
        one is other for one, other in zip(jax.tree.leaves(parts[0].params), jax.tree.leaves(base.params), strict=True)
    )
    assert parts[1].keys() == adapters.keys()
    jax.tree.map(np.testing.assert_array_equal, parts[1], adapters)
    assert split(model) is None
    assert trainable(model, None, seed=0) is None
    # A copy of the base is the base.
    copy = replace(model, module=nnx.clone(model.module))
    assert on_base(copy, base) == (True, None)
    shared, same = on_base(with_adapters(copy, base, adapters), base)
    assert shared
    assert same is not None
    assert same.keys() == adapters.keys()
    assert not on_base(language_model(family, 1), base)[0]


def test_targets_are_read_as_peft_reads_them() -> None:
    modules = {family: linear_modules(language_model(family)) for family in FAMILIES}
    assert "lm_head" in modules["decoder"]
    assert "encoder.block.0.layer.0.SelfAttention.q" in modules["t5"]
    assert "decoder.block.1.layer.1.EncDecAttention.v" in modules["t5"]

    def names(family: str, targets: Any) -> set[str]:
        base, adapters = adapt(language_model(family), AdapterConfig(targets=targets), seed=0)
        assert adapters.keys() == {site.name for site in base.sites}
        return {name for site in base.sites for name in site.modules}

    assert names("decoder", "all-linear") == modules["decoder"].keys() - {"lm_head"}
    assert names("t5", "all-linear") == modules["t5"].keys()
    assert names("decoder", ["v_proj"]) == {f"model.layers.{number}.self_attn.v_proj" for number in (0, 1)}
    assert names("decoder", r"model\.layers\.1\..*") == {name for name in modules["decoder"] if ".1." in name}
    assert names("t5", ["EncDecAttention.q"]) == {f"decoder.block.{n}.layer.1.EncDecAttention.q" for n in (0, 1)}


def test_layers_without_an_adapter_are_the_base_and_scales_may_differ() -> None:
    model = language_model()
    base, adapters = adapt(model, AdapterConfig(rank=2, targets=r"model\.layers\.1\..*q_proj"), seed=0)
    (site,) = base.sites
    assert site == ("model.layers.{}.self_attn.q_proj", site.places, (1,), (16.0,))
    assert adapters[site.name].a.shape[0] == 1
    kernel = nnx.state(with_adapters(model, base, random_adapters(adapters, 1)).module)["layers"]["attention"]["q"][...]
    assert kernel.scale == (0.0, 16.0)
    assert not kernel.adapters[0].a[0].any()
    whole, bare = kernel.merged(), kernel.weight
    np.testing.assert_array_equal(whole[0], bare[0])
    assert not np.allclose(whole[1], bare[1], atol=1e-3)
    x = jnp.ones((2, 16))
    each = jax.lax.scan(lambda _, part: (None, product(x, part)), None, kernel)[1]
    np.testing.assert_allclose(each, jnp.ones((2, 2, 16)) @ whole, rtol=1e-5, atol=1e-5)
    parts = split(with_adapters(model, base, adapters))
    assert parts is not None
    assert parts[0].sites == base.sites
    jax.tree.map(np.testing.assert_array_equal, parts[1], adapters)


def test_targets_that_name_nothing_are_refused() -> None:
    ends = "which end with down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    cases: list[str | list[str]] = [["q_proj", "query"], "query", "layers"]
    for targets in cases:
        named = targets if isinstance(targets, str) else "query"
        with pytest.raises(ConfigError, match=rf"{ends}, but received '{named}', which names none"):
            adapt(language_model(), AdapterConfig(targets=targets), seed=0)
    with pytest.raises(ConfigError, match=r"The head of this model is its embedding, which has no adapter"):
        adapt(language_model("t5"), AdapterConfig(targets=("lm_head",)), seed=0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rank": 0}, r"rank of an adapter must be a whole number of at least 1, but received 0. Set 16, say"),
        ({"rank": True}, r"rank of an adapter must be of type int, but received True"),
        ({"alpha": 0}, r"alpha of an adapter must be a finite number above 0, but received 0"),
        ({"dropout": 1.0}, r"dropout of an adapter must lie in \[0, 1\), but received 1.0"),
        ({"init": "zeros"}, r"init of an adapter must be 'zero-b' or 'zero-a', but received 'zeros'"),
        ({"targets": []}, r"targets of an adapter must be 'all-linear', names of modules or a regular expression"),
        ({"targets": "("}, r"must be a regular expression \(.*\), but received '\('. Write a list of names"),
        ({"r": 8}, r"an adapter has no setting of that name, but received 'r'. Did you mean|Known"),
    ],
)
def test_settings_that_break_their_rule_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterConfig.of(table)


def test_an_adapter_of_another_shape_is_not_gone_on_with() -> None:
    model = adapted("decoder")
    parts = trainable(model, None, seed=0)
    assert parts is not None
    with_dropout = trainable(model, replace(CONFIG, dropout=0.5), seed=0)
    assert with_dropout is not None
    assert with_dropout[0].dropout == 0.5
    for config in (replace(CONFIG, rank=4), replace(CONFIG, targets=("q_proj",)), replace(CONFIG, alpha=1.0)):
        with pytest.raises(ConfigError, match=r"goes on with its own \(rank 3, scale 2.0, 14 modules\)"):
            trainable(model, config, seed=0)


@pytest.mark.usefixtures("unchecked")
def test_a_module_of_ones_own_has_no_adapters() -> None:
    class Mine(nnx.Module):
        decoder_start = None

    mine: Any = Mine()
    with pytest.raises(ModelError, match=r"a model with adapters must be a T5 or a Decoder, but received a Mine"):
        adapt(replace(language_model(), module=mine), CONFIG, seed=0)


def test_dropout_keeps_the_mean_and_follows_its_key() -> None:
    rng = np.random.default_rng(5)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 64), (64, 3)))
    factors = LowRank(jnp.ones((64, 1)), jnp.ones((1, 3)))

    def drawn(seed: int, dropout: float = 0.5) -> Any:
        return product(x, Adapted(weight, (factors,), 1.0, noise=jax.random.key(seed), dropout=dropout))

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))
    plain = product(x, Adapted(weight, (factors,), 1.0))
    np.testing.assert_array_equal(drawn(0, 0.0), plain)
    mean = np.mean([drawn(seed) for seed in range(400)], axis=0)
    spread = np.std([drawn(seed) for seed in range(400)], axis=0) / 20
    assert np.all(np.abs(mean - plain) < 5 * spread)
