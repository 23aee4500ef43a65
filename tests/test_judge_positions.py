"""Models whose positions end: refused before anything is written where they are too few, else read to the last one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import PROMPTS, language_model, prefers_w1, tokenizer

from fastpref.data.rendered import Unfinished
from fastpref.evaluation.best_checkpoint import select_checkpoint
from fastpref.evaluation.side_by_side import compare, evaluate
from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.judging.positions import check_positions
from fastpref.learning.train import train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ModelError
from fastpref.models import Decoder, DecoderConfig, LanguageModel

LONGEST = 1 + max(len(prompt.split()) for prompt in PROMPTS)
"""Tokens of the longest prompt: this tokenizer ends each with EOS."""
TEMPLATE = "{prompt} 1 {first} 2 {second}"
REFUSED = r"a judge must have positions for what it reads, but received a RewardModel with 24 of them"
POLICY_REFUSED = r"of this model must be at most 24 tokens together, .* but received room for 25. Lower"


def limited(positions: int = 24) -> LanguageModel:
    config = DecoderConfig(
        vocab_size=36,
        width=16,
        hidden=24,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=8,
        learned_positions=True,
        max_positions=positions,
    )
    return LanguageModel(Decoder(config, rngs=nnx.Rngs(0)), tokenizer())


def reward_model(**settings: Any) -> RewardModel:
    model = RewardModel.from_model(limited(), batch_size=4, **settings)
    model.module.weight[...] = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    return model


def settings_of(max_new_tokens: int, **more: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "algorithm": "online-dpo",
        "tau": 0.1,
        "steps": 1,
        "batch_size": 4,
        "max_prompt_tokens": 16,
    }
    return TrainConfig(max_new_tokens=max_new_tokens, **usual, **more)


def test_a_reward_model_reads_as_far_as_its_positions_and_no_farther() -> None:
    judge = reward_model()
    prompt = max(PROMPTS, key=lambda text: len(text.split()))
    words = ["w3"] * (24 - LONGEST)
    scores = judge.scores([prompt, prompt], [Unfinished(" ".join(words)), Unfinished(" ".join(words[1:]))])
    assert np.isfinite(scores).all()
    with pytest.raises(ModelError, match=r"at most 24 tokens together, .* but received room for 25"):
        judge.scores([prompt], [Unfinished(" ".join([*words, "w3"]))])
    # The longest prompt, the end of a completion, and the others of its tokens.
    check_positions(judge, PROMPTS, 24 - LONGEST)
    said = rf"longest prompt has {LONGEST + 1} tokens and completions of max_new_tokens={25 - LONGEST} take"
    with pytest.raises(ModelError, match=rf"{REFUSED}, where its {said} {24 - LONGEST} more. Lower max_new_tokens or"):
        check_positions(judge, PROMPTS, 25 - LONGEST)
    check_positions(replace(judge, max_prompt_tokens=LONGEST - 1), PROMPTS, 25 - LONGEST)
    check_positions(judge, [], 99)


def test_a_preference_model_reads_both_completions() -> None:
    judge = PreferenceModel(limited(), TEMPLATE, batch_size=4)
    both = (24 - LONGEST - 2) // 2
    check_positions(judge, PROMPTS, both)
    with pytest.raises(ModelError, match=r"a PreferenceModel with 24 .* or the judge's max_tokens, or leave out"):
        check_positions(judge, PROMPTS, both + 1)
    words = " ".join(["w4"] * both)
    assert 0 < judge([PROMPTS[3]], [words], ["w1"])[0] < 1


@pytest.mark.parametrize("kind", ["function", "reward", "preference"])
def test_what_has_no_limit_is_asked_whatever_it_is(kind: str) -> None:
    judges = {
        "function": prefers_w1,
        "reward": RewardModel.from_model(language_model()),
        "preference": PreferenceModel(language_model("t5"), TEMPLATE),
    }
    check_positions(judges[kind], PROMPTS, 10_000)


def test_a_judge_with_too_few_positions_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    judge, long = reward_model(), 25 - LONGEST
    with pytest.raises(ModelError, match=REFUSED):
        train(language_model(), PROMPTS, judge, settings_of(long), run_dir=tmp_path / "run", quiet=True)
    with pytest.raises(ModelError, match=REFUSED):
        train(
            language_model(),
            PROMPTS[:1],
            prefers_w1,
            settings_of(long, eval_every=1),
            eval_prompts=PROMPTS,
            eval_judge=judge,
            run_dir=tmp_path / "run",
            quiet=True,
        )
    models = {"a": language_model(), "b": language_model(seed=1)}
    with pytest.raises(ModelError, match=REFUSED):
        evaluate(models, PROMPTS, judge, max_new_tokens=long, save=tmp_path / "run")
    with pytest.raises(ModelError, match=REFUSED):
        compare(models["a"], models["b"], PROMPTS, judge, max_new_tokens=long)
    with pytest.raises(ModelError, match=REFUSED):
        select_checkpoint([models["a"]], models["b"], PROMPTS, judge, max_new_tokens=long, save=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_that_write_or_are_compared_with_are_refused_too(tmp_path: Path) -> None:
    """A prompt of seven tokens is padded to eight, one that is held out to sixteen."""
    refused: dict[str, Any] = {"run_dir": tmp_path / "run", "quiet": True}
    with pytest.raises(ModelError, match=POLICY_REFUSED):
        train(limited(), PROMPTS, prefers_w1, settings_of(18), **refused)
    with pytest.raises(ModelError, match=POLICY_REFUSED):
        train(language_model(), PROMPTS, prefers_w1, settings_of(18), ref=limited(), **refused)
    with pytest.raises(ModelError, match=POLICY_REFUSED):
        train(limited(), PROMPTS, prefers_w1, settings_of(10, eval_every=1), eval_prompts=PROMPTS, **refused)
    pairs = [{"prompt": "w1 w2", "chosen": " ".join(["w3"] * 21), "rejected": "w4"}]
    offline = replace(settings_of(64), algorithm="offline-dpo", batch_size=1)
    for models in ({"policy": limited(23)}, {"policy": language_model(), "ref": limited(23)}):
        with pytest.raises(ModelError, match=r"at most 23 tokens together, .* but received room for 24"):
            train(prompts=pairs, config=offline, **models, **refused)
    assert not (tmp_path / "run").exists()
