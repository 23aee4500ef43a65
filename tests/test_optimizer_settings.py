"""Settings of optimisers: what is refused, beside an object too, and how files give them."""

from pathlib import Path
from typing import Any

import optax
import orjson
import pytest
from small import PROMPTS, language_model, prefers_w1

from fastpref.cli import read_file
from fastpref.learning.optimizers import build
from fastpref.learning.supervised import sft
from fastpref.learning.train import train
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import ConfigError
from fastpref.method.schedules import Schedule
from fastpref.method.tables import from_mapping, to_json

EXAMPLES = [{"prompt": prompt, "completion": "w1 w2"} for prompt in PROMPTS[:8]]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weight_decay": -0.1}, r"weight_decay must be a finite number of at least 0, but received -0\.1\. Recipes"),
        (
            {"betas": (0.9, 1.0), "optimizer": "lion"},
            r"betas must be two numbers in \[0, 1\), .* received \(0\.9, 1\.0",
        ),
        ({"betas": (0.9,), "optimizer": "lion"}, r"betas must be two numbers .*\. AdamW's are 0\.9 and 0\.999, Lion's"),
        ({"betas": ("0.9", 0.5), "optimizer": "lion"}, r"betas must be two numbers .* but received \('0\.9', 0\.5\)"),
        (
            {"betas": (0.9, 0.95)},
            r"betas must be None for adafactor, which has no momentum, but .* choose adamw or lion",
        ),
        ({"warmup_steps": -1}, r"warmup_steps must be a whole number of at least 0, but received -1\. 0 is no warm-up"),
        ({"warmup_steps": 0.1}, r"warmup_steps must be a whole number of at least 0, but received 0\.1"),
        ({"warmup_steps": 5, "steps": 5}, r"warmup_steps must be below steps \(5\), but received 5\. With so long"),
        (
            {"lr_schedule": "step"},
            r"lr_schedule must be 'constant', 'linear' or 'cosine', but .* 'step'\. Set warmup_st",
        ),
        (
            {"learning_rate": Schedule(start=1.0, end=0.0, steps=5), "warmup_steps": 1},
            r"learning_rate must be a number where warmup_steps or lr_schedule is set, but received Schedule\(start=1",
        ),
        (
            {"learning_rate": Schedule(start=1.0, end=0.0, steps=5), "lr_schedule": "linear"},
            r"received Schedule\(.*\)\. Leave those two out, or give the number that they start from",
        ),
    ],
)
def test_a_broken_rule_is_refused(settings: dict[str, Any], text: str, unchecked: None) -> None:
    for kind in (TrainConfig, SupervisedConfig):
        with pytest.raises(ConfigError, match=text):
            kind(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "lion"},
        {"learning_rate": 0.1},
        {"warmup_steps": 3},
        {"lr_schedule": "linear"},
        {"weight_decay": 0.1},
        {"optimizer": "adamw", "betas": (0.9, 0.95)},
        {"max_grad_norm": 1.0},
    ],
)
def test_settings_that_an_optimiser_object_does_not_read_are_refused(settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    sgd = optax.sgd(0.1)
    text = rf"{name} must be left out where an optimizer is passed as an object, .* but received .*\. Make it part of"
    for kind in (TrainConfig, SupervisedConfig):
        assert build(kind(steps=3, seed=4), sgd) is sgd
        with pytest.raises(ConfigError, match=text):
            build(kind(**settings), sgd)


def test_trainings_refuse_them_before_the_first_step() -> None:
    sgd = optax.sgd(0.1)
    with pytest.raises(ConfigError, match=r"max_grad_norm must be left out where an optimizer is passed"):
        train("no such directory", PROMPTS, prefers_w1, TrainConfig(max_grad_norm=1.0), optimizer=sgd)
    with pytest.raises(ConfigError, match=r"learning_rate must be left out where an optimizer is passed"):
        sft(language_model(), EXAMPLES, SupervisedConfig(learning_rate=0.1), optimizer=sgd, quiet=True)


def test_the_settings_are_read_from_a_file_and_survive_json(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'policy = "p"\nprompts = "x"\nrun_dir = "r"\n[settings]\noptimizer = "adamw"\nbetas = [0.9, 0.95]\n'
        'weight_decay = 1\nwarmup_steps = 10\nlr_schedule = "cosine"\n'
    )
    config = from_mapping(TrainConfig, read_file("train", file, [])["settings"])
    assert (config.betas, config.weight_decay) == ((0.9, 0.95), 1.0)
    assert (config.warmup_steps, config.lr_schedule) == (10, "cosine")
    assert from_mapping(TrainConfig, to_json(config)) == config
    assert from_mapping(TrainConfig, orjson.loads(orjson.dumps(to_json(config)))) == config
    config = from_mapping(TrainConfig, read_file("train", file, ["settings.betas=[0, 0.99]"])["settings"])
    assert config.betas == (0.0, 0.99)
    for key, value, text in (
        ("betas", 0.9, r"betas must be of type list, but received 0\.9\. Its default is None"),
        ("betas", "0.9", r"betas must be of type list, but received '0\.9'"),
        ("warmup_steps", 0.1, r"warmup_steps must be of type int, but received 0\.1\. Its default is 0"),
        ("weight_decay", "0.1", r"weight_decay must be of type float, but received '0\.1'\. Its default is 0\.0"),
        ("lr_scheduler_type", "cosine", r"no setting of that name, .* Did you mean 'lr_schedule'\?"),
        ("warmup_ratio", 0.1, r"no setting of that name, but received 'warmup_ratio'\. Did you mean 'warmup_steps'\?"),
    ):
        with pytest.raises(ConfigError, match=text):
            from_mapping(TrainConfig, {key: value})
