"""Products in bfloat16 over float32 masters, what is computed again for the gradient, and both with adapters."""

from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import PROMPTS, language_model
from test_adapters import random_adapters
from test_training import SGD, SMALL, packed, pairs

from fastpref.learning import learner as learners
from fastpref.learning import update as updates
from fastpref.learning.train import train
from fastpref.method.adapter import AdapterConfig
from fastpref.method.algorithms import ALGORITHMS
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError
from fastpref.models import Decoder, DecoderConfig
from fastpref.models.adapters import adapt
from fastpref.models.masks import Mask, Masks, Places, in_blocks

ADAPTER = AdapterConfig(rank=3, alpha=6.0)
RECORDED = [
    {"prompt": prompt, "chosen": f"w1 w{number}", "rejected": f"w{number}"} for number, prompt in enumerate(PROMPTS, 2)
]


def first_wins(prompts: Any, first: Any, second: Any) -> list[float]:
    """A judge with hard labels."""
    return [1.0] * len(prompts)


QUICK = {
    ("ipo-md", "decoder", ADAPTER),
    ("ipo-md", "t5", None),
    ("online-dpo", "decoder", None),
    ("inpo", "t5", ADAPTER),
    ("offline-ipo", "decoder", ADAPTER),
}
"""Each method, each family, adapters and none; the other combinations take minutes."""


@pytest.mark.parametrize(
    ("algorithm", "family", "adapter"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product(("ipo-md", "online-dpo", "inpo", "offline-ipo"), ("decoder", "t5"), (ADAPTER, None))
    ],
)
def test_at_the_reference_rho_is_exactly_0_in_bfloat16(algorithm: str, family: str, adapter: Any) -> None:
    offline = algorithm.startswith("offline")
    rounds: dict[str, Any] = {"rounds": 1, "completions": 3} if algorithm == "inpo" else {}
    config = TrainConfig(**SMALL, steps=2, tau=0.5, algorithm=algorithm, dtype="bfloat16", adapter=adapter, **rounds)
    result = train(
        language_model(family), RECORDED if offline else PROMPTS, None if offline else first_wins, config, quiet=True
    )
    first, second = result.metrics
    kind = "anchor" if algorithm == "inpo" else "rewards"
    assert first[f"{kind}/margins"] == 0.0
    assert first[f"{kind}/chosen"] == first[f"{kind}/rejected"] == 0.0
    if "ipo" in algorithm:
        assert first["loss"] == 1.0
    if algorithm == "online-dpo":
        assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert second[f"{kind}/margins"] != 0.0
    # What is trained stays float32.
    leaves = jax.tree.leaves(nnx.state(result.policy.module))
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(result.ref.module))} == {"bfloat16"}


def test_a_reference_of_its_own_is_scored_in_the_same_program() -> None:
    config = TrainConfig(**SMALL, steps=1, algorithm="inpo", completions=3, rounds=1, dtype="bfloat16", adapter=ADAPTER)
    other = language_model(seed=1)
    (first,) = train(language_model(), PROMPTS, first_wins, config, ref=other, quiet=True).metrics
    assert abs(first["anchor/margins"]) > 1e-4
    with pytest.raises(ConfigError, match=r"ref must be of the policy's architecture in bfloat16, .* received 'T5'"):
        train(language_model(), PROMPTS, first_wins, config, ref=language_model("t5"), quiet=True)


@pytest.mark.usefixtures("unchecked")
def test_auto_is_float32_on_a_cpu_and_bfloat16_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert learners.dtype_of(TrainConfig()) == "float32"
    assert learners.dtype_of(TrainConfig(dtype="bfloat16")) == "bfloat16"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert learners.dtype_of(TrainConfig()) == "bfloat16"
    assert learners.dtype_of(TrainConfig(dtype="float32")) == "float32"
    with pytest.raises(ConfigError, match=r"dtype must be 'auto', 'float32' or 'bfloat16', but received 'fp16'"):
        TrainConfig(dtype="fp16")  # type: ignore[arg-type]


def test_the_gradient_in_bfloat16_is_that_in_float32_but_for_rounding() -> None:
    definition, params = nnx.split(language_model().module)
    ref = nnx.state(language_model(seed=1).module)
    batch = packed(pairs())

    def gradients(dtype: str) -> Any:
        anchors = learners.Anchors(jnp.ones(1, jnp.float32), (ref,))

        def loss(params: Any) -> Any:
            logps, ref_logps = learners.compared_logps(
                definition, params, batch, anchors, base=None, key=None, remat="none", dtype=dtype, frozen_head=False
            )
            apart = logps - ref_logps
            return jnp.square(apart[:, 0] - apart[:, 1] - 1).mean()

        return jax.grad(loss)(params)

    exact, low = (jax.tree.leaves(gradients(dtype)) for dtype in ("float32", "bfloat16"))
    assert all(leaf.dtype == np.float32 for leaf in low)
    difference = np.sqrt(sum(float(jnp.square(x - y).sum()) for x, y in zip(exact, low, strict=True)))
    size = np.sqrt(sum(float(jnp.square(x).sum()) for x in exact))
    assert 0 < difference < 0.05 * size


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_method_compares_within_one_program(algorithm: str) -> None:
    """What is left of ρ at the reference is 0 for each, policy gradients too, whatever it is compared with."""
    config = TrainConfig(**SMALL, algorithm=algorithm, dtype="bfloat16")
    model = language_model()
    learner = learners.Learner.of(model, None, model, config)
    assert learner.scores_itself(config)
    anchors = learner.anchors(config, 0, nnx.state(model.module) if config.method.in_rounds else ())
    logps, compared = pair_logps(len(anchors.models))(anchors.weights)
    np.testing.assert_array_equal(logps, compared)


@cache
def pair_logps(number: int) -> Any:
    """Compiled for so many anchors, each of which is the policy."""
    definition, params = nnx.split(language_model().module)

    def logps(weights: Any) -> Any:
        return learners.compared_logps(
            definition,
            params,
            packed(pairs()),
            learners.Anchors(weights, (params,) * number),
            base=None,
            key=None,
            remat="none",
            dtype="bfloat16",
            frozen_head=False,
        )

    return jax.jit(logps)


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("decoder", None),
        ("t5", ADAPTER),
        pytest.param("decoder", ADAPTER, marks=pytest.mark.slow),
        pytest.param("t5", None, marks=pytest.mark.slow),
    ],
)
def test_what_is_computed_again_changes_no_gradient(family: str, adapter: Any) -> None:
    model = language_model(family)
    definition, params = nnx.split(model.module)
    base = None
    if adapter is not None:
        base, adapters = adapt(model, adapter, seed=0)
        params = random_adapters(adapters, 0)
    results = []
    for remat in ("none", "layers", "all"):
        trained = jax.tree.map(jnp.copy, params)
        results.append(
            updates.update(
                definition,
                trained,
                SGD.init(trained),
                packed(pairs(ref_logps=-20.0), family),
                np.float32(0.5),
                optimizer=SGD,
                objective=ALGORITHMS["online-ipo"].objective,
                base=base,
                remat=remat,
            )
        )
    for other in results[1:]:
        for mine, theirs in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(other[0]), strict=True):
            # A sum of so many terms rounds by some units of the largest of them.
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 + 5e-7 * float(jnp.abs(theirs).max()))


def test_scores_of_long_rows_are_never_all_kept() -> None:
    """Whatever `remat` is: of rows in blocks they would be the square of the length, for each head and layer."""
    length, heads = 2048, 8
    config = DecoderConfig(vocab_size=16, width=32, hidden=32, layers=4, heads=heads, kv_heads=heads, head_dim=4)
    definition, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    numbers = jnp.arange(length)[None, None]
    places = Places(numbers % 256, numbers // 256, jnp.zeros_like(numbers))

    def loss(params: Any) -> jax.Array:
        module = nnx.merge(definition, params)
        return module.forward(numbers % 16, places.positions, Masks(in_blocks(Mask(places, places))))[0].sum()

    memory: Any = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < heads * length**2 * 4


def test_less_is_kept_for_the_gradient() -> None:
    definition, params = nnx.split(language_model().module)
    batch = packed(pairs())
    sizes = []
    for remat in ("none", "layers", "all"):

        def loss(params: Any, remat: Any = remat) -> Any:
            module = learners.module_of(definition, params, None, None, remat, "float32")
            return jnp.square(module.packed_hidden_states(batch)).sum()

        _, pullback = jax.vjp(loss, params)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)))
    assert sizes[2] < sizes[1] < sizes[0]


def test_a_module_of_ones_own_computes_nothing_again() -> None:
    class Mine(nnx.Module):
        pass

    with pytest.raises(ConfigError, match=r"remat must be 'none' for a module of another package, but received 'all'"):
        learners.rematerialising(Mine(), "all")
