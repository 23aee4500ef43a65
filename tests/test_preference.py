"""Models as judges: exact symmetry, readings that keep what matters, directories that hold the same judge again."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from scipy.special import expit
from small import language_model
from tokenizers import models, pre_tokenizers

from fastpref.data.tokenizer import Tokenizer
from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.judging.protocol import Judge, probability
from fastpref.method.errors import CutWarning
from fastpref.method.losses import bradley_terry
from fastpref.models import save

TEMPLATE = "{prompt} 1 {first} 2 {second}"
EIGHT = {"batch_size": 8}
WORDS = ["{prompt}", "{first}", "{second}", "{x}", "w1"]


def texts(count: int, longest: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(0, 28, rng.integers(1, longest + 1))) for _ in range(count)]


def preference_model(family: str = "decoder", **options: Any) -> PreferenceModel:
    return PreferenceModel(language_model(family), TEMPLATE, **(EIGHT | options))


def reward_model(family: str = "decoder", **options: Any) -> RewardModel:
    model = RewardModel.from_model(language_model(family), **(EIGHT | options))
    weight = np.random.default_rng(3).normal(size=model.module.weight.shape).astype(np.float32)
    model.module.weight[...] = jax.numpy.asarray(weight)
    return model


MODELS = {
    "preference decoder": lambda: preference_model("decoder"),
    "preference t5": lambda: preference_model("t5"),
    "reward decoder": lambda: reward_model("decoder"),
    "reward t5": lambda: reward_model("t5"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_two_orders_add_up_to_exactly_one(kind: str) -> None:
    # Lengths on both sides of a padded width, so that batches of several shapes are scored.
    prompts, first, second = (texts(45, longest, seed) for seed, longest in enumerate((12, 18, 18)))
    prompts[1], first[1], second[1] = prompts[0], second[0], first[0]
    second[2] = first[2]
    judge: Judge = MODELS[kind]()
    one = np.asarray(judge(prompts, first, second))
    other = np.asarray(judge(prompts, second, first))
    both = np.asarray(judge(prompts * 2, first + second, second + first))
    assert one.dtype == np.float32
    assert len(set(one.tolist())) > 40
    np.testing.assert_array_equal(one + other, np.ones(45, np.float32))
    np.testing.assert_array_equal(both[:45] + both[45:], np.ones(45, np.float32))
    assert one[0] + one[1] == 1
    assert one[2] == 0.5


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_judge_answers_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    prompts, first, second = (texts(8, 6, seed) for seed in range(3))
    judge = MODELS[kind]()
    judge.save(tmp_path)
    again = dataclasses.replace(type(judge).load(tmp_path), batch_size=8)
    np.testing.assert_array_equal(judge(prompts, first, second), again(prompts, first, second))


def test_settings_are_saved(tmp_path: Path) -> None:
    judge = preference_model(answers=("w3", "w4"), symmetric=False, max_tokens=99)
    judge.save(tmp_path)
    again = PreferenceModel.load(tmp_path)
    assert (again.template, again.answers, again.symmetric, again.max_tokens) == (TEMPLATE, ("w3", "w4"), False, 99)
    reward_model(max_prompt_tokens=7).save(tmp_path / "reward")
    assert RewardModel.load(tmp_path / "reward").max_prompt_tokens == 7


def test_a_directory_that_holds_no_judge_is_refused(tmp_path: Path) -> None:
    save(language_model(), tmp_path)
    with pytest.raises(ValueError, match=r"a preference model is a directory with a readable preference_model\.json"):
        PreferenceModel.load(tmp_path)
    with pytest.raises(ValueError, match=r"a reward model is a directory .* Give a directory that a reward model's"):
        RewardModel.load(tmp_path)
    reward_model().save(tmp_path)
    (tmp_path / "reward_head.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"must hold a readable reward_head\.safetensors, but reading it failed"):
        RewardModel.load(tmp_path)
    (tmp_path / "reward_model.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"readable reward_model\.json, but reading .* failed"):
        RewardModel.load(tmp_path)


@pytest.mark.parametrize(
    "template",
    [TEMPLATE.replace(f, "text") for f in ("{prompt}", "{first}", "{second}")]
    + [
        "{first} {second} {prompt}",
        TEMPLATE + " {first}",
    ],
)
def test_a_template_needs_its_fields_the_prompt_first(template: str) -> None:
    rule = r"must contain \{prompt\} and then \{first\} and \{second\}, each once, but received '.*'\. Write one such"
    with pytest.raises(ValueError, match=rule):
        PreferenceModel(language_model(), template)


def test_answers_must_be_single_tokens() -> None:
    with pytest.raises(ValueError, match=r"'w1 w2' is 2 tokens\. Choose answers that the tokenizer knows whole"):
        preference_model(answers=("1", "w1 w2"))


def test_braces_in_texts_stay_as_they_are() -> None:
    # A word for every text, so that reading it back shows what was filled in.
    parts = ["{second} w1", "{prompt}", "{first} {x}"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(["</s>", "/", *WORDS])}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = dataclasses.replace(language_model(), tokenizer=Tokenizer(backend, eos_id=0))
    judge = PreferenceModel(model, "{prompt} / {first} / {second}", answers=("w1", "{x}"))
    (opened,), (closed,) = judge.readings(*([part] for part in parts))
    assert [backend.id_to_token(token) for token in [*opened, *closed]] == " / ".join(parts).split()


def test_a_long_prompt_is_shortened_and_the_rest_stays() -> None:
    judge = preference_model(max_tokens=7)
    prompt = " ".join(f"w{number}" for number in range(20))
    with pytest.warns(CutWarning, match=r"1 of 2 prompts are cut, .* keep to max_tokens=7"):
        opened, closed = judge.readings([prompt, "w0 w1"], ["w21 w22"] * 2, ["w23"] * 2)
    # Seven tokens: six of the prompt and EOS.
    assert len(opened[0]) == 7
    assert judge.model.tokenizer.decode(opened) == ["w0 w1 w2 w3 w4 w5", "w0 w1"]
    assert judge.model.tokenizer.decode(closed) == ["1 w21 w22 2 w23"] * 2


@pytest.mark.parametrize("family", ["decoder", "t5"])
def test_padding_and_batch_size_change_no_margin(family: str) -> None:
    prompts, first, second = (texts(8, 6, seed) for seed in range(3))
    judge = preference_model(family)
    alone = judge.margins(prompts, first, second)
    # One long companion widens the padding of the batch it is in.
    wide = dataclasses.replace(judge, batch_size=32).margins(
        [*prompts, texts(1, 1, 5)[0] + " w2" * 40], [*first, "w1"], [*second, "w2"]
    )
    np.testing.assert_allclose(wide[:8], alone, rtol=1e-3, atol=1e-6)
    assert np.abs(alone).max() > 5e-4


def test_padding_and_batch_size_change_no_reward() -> None:
    prompts, completions = texts(8, 6, 0), texts(8, 6, 1)
    judge = reward_model()
    wide = dataclasses.replace(judge, batch_size=32).scores([*prompts, "w2 " * 40], [*completions, "w3 " * 40])
    np.testing.assert_allclose(wide[:8], judge.scores(prompts, completions), rtol=1e-4, atol=1e-5)


def test_without_symmetry_one_order_is_read() -> None:
    prompts, first, second = (texts(8, 6, seed) for seed in range(3))
    plain, symmetric = preference_model(symmetric=False), preference_model()
    forward, backward = plain.margins(prompts, first, second), plain.margins(prompts, second, first)
    assert np.abs(forward + backward).max() > 1e-3
    np.testing.assert_allclose(symmetric.margins(prompts, first, second), (forward - backward) / 2, atol=1e-6)


def test_a_fresh_reward_is_zero_and_its_body_is_a_copy() -> None:
    model = RewardModel.from_model(language_model(), **EIGHT)
    np.testing.assert_array_equal(model(["w1"], ["w2"], ["w3"]), [0.5])
    assert model.module.policy is not language_model().module


def test_nothing_to_judge_is_answered_with_nothing() -> None:
    for judge in (preference_model(), reward_model()):
        assert judge([], [], []).shape == (0,)


def test_probabilities_of_opposite_margins_add_up_to_exactly_one() -> None:
    rng = np.random.default_rng(0)
    scales = 10.0 ** rng.uniform(-8, 4, 20000)
    margins = np.concatenate([rng.normal(size=20000) * scales, [0.0, -0.0, 88.8, 1e4, 3e38, np.inf]]).astype(np.float32)
    one, other = probability(margins), probability(-margins)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one + other, np.ones_like(margins))
    np.testing.assert_allclose(one, expit(margins.astype(np.float64)), rtol=1e-6, atol=1e-38)


def test_bradley_terry_is_the_cross_entropy_of_a_soft_label() -> None:
    margin = np.array([-200.0, -1.0, 0.0, 2.0, 200.0], np.float32)
    p = np.array([0.0, 0.3, 0.5, 1.0, 0.9], np.float32)
    first = expit(margin[1:4].astype(np.float64))
    expected = [0.0, *(-p[1:4] * np.log(first) - (1 - p[1:4]) * np.log(1 - first)), 0.1 * 200]
    np.testing.assert_allclose(bradley_terry(jax.numpy.asarray(margin), jax.numpy.asarray(p)), expected, rtol=1e-5)
