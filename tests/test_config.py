"""Settings: defaults of the paper, and the text of every refusal."""

import math
from typing import Any

import pytest

from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import ConfigError
from fastpref.method.schedules import Schedule, value_at
from fastpref.method.tables import from_mapping, to_json


def test_the_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.algorithm, config.tau, config.mixture_beta) == ("ipo-md", 1.0, 0.125)
    assert (config.optimizer, config.learning_rate, config.batch_size) == ("adafactor", 1e-4, 32)
    assert not config.length_normalize


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"algorithm": "ipo_md"}, r"algorithm must be one of .*received 'ipo_md'.*Did you mean 'ipo-md'"),
        ({"tau": 0.0}, r"tau must be above 0, but received 0.0"),
        ({"tau": -1.0}, r"tau must be above 0, but received -1.0"),
        ({"tau": math.nan}, r"tau must be above 0, but received nan"),
        ({"tau": Schedule(start=1.0, end=0.0, steps=5)}, r"tau must be above 0"),
        ({"mixture_beta": 1.5}, r"mixture_beta must lie in \[0, 1\], but received 1.5.*0.125"),
        ({"mixture_beta": -0.1}, r"mixture_beta must lie in \[0, 1\]"),
        ({"steps": 0}, r"steps must be a whole number of at least 1, but received 0"),
        ({"gradient_accumulation": 0}, r"gradient_accumulation must be a whole number of at least 1, but received 0"),
        ({"optimizer": "adam"}, r"must be 'adafactor', 'adamw' or 'lion', but received 'adam'.*GradientTransform"),
        ({"learning_rate": -1e-4}, r"learning_rate must not be negative"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm must be above 0, or None"),
        ({"temperature": 0.0}, r"temperature must be above 0"),
        ({"on_bad_record": "drop"}, r"on_bad_record must be 'raise', 'skip' or 'warn', but received 'drop'"),
        ({"overlong": "cut"}, r"overlong must be 'drop', 'truncate' or 'raise', but received 'cut'"),
        ({"eval_every": -1}, r"eval_every must not be negative"),
        (
            {"algorithm": "inpo", "completions": 1},
            r"completions must be at least 2 for inpo, which chooses a pair, but received 1. INPO's is 8",
        ),
        ({"algorithm": "sppo", "completions": 0}, r"completions must be at least 2 for sppo"),
        ({"completions": 8}, r"completions must be 2 for ipo-md, .*, but received 8. Leave completions out"),
        ({"algorithm": "inpo", "eta": 0.5}, r"eta must not be below tau \(1.0\).*received 0.5. Raise eta or lower tau"),
        ({"algorithm": "inpo", "tau": 0.0}, r"eta must be above 0, but received None. Set it where tau is 0"),
        ({"algorithm": "inpo", "tau": -0.1, "eta": 1.0}, r"tau must not be negative, but received -0.1"),
        ({"algorithm": "iterative-dpo", "tau": 0.0}, r"tau must be above 0, but received 0.0"),
        ({"algorithm": "inpo", "rounds": 4, "steps": 3}, r"rounds must not exceed steps \(3\), but received 4"),
        ({"rounds": 0}, r"rounds must be a whole number of at least 1"),
        ({"mixture_partner": "mu"}, r"mixture_partner must be 'ref' or 'behaviour', but received 'mu'"),
        ({"algorithm": "rl", "mixture_partner": "behaviour"}, r"must be 'ref' for rl, which samples from no mixture"),
        ({"baseline": "mean"}, r"baseline must be 'none' or 'batch', but received 'mean'"),
        ({"baseline": "batch"}, r"baseline must be 'none' for ipo-md, which has no reward, but received 'batch'"),
        ({"algorithm": "rl", "baseline": "batch", "batch_size": 1}, r"batch_size must be at least 2 for a baseline"),
        (
            {"algorithm": "rl", "length_normalize": True},
            r"length_normalize must be False for rl, whose loss is",
        ),
    ],
)
def test_a_broken_rule_is_refused_with_rule_value_and_remedy(
    settings: dict[str, Any], text: str, unchecked: None
) -> None:
    with pytest.raises(ConfigError, match=text):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lerning_rate": 1.0}, r"no setting of that name, but received 'lerning_rate'. Did you mean 'learning_rate'"),
        ({"steps": "10"}, r"steps must be of type int, but received '10'. Its default is 1000"),
        ({"completions": "8"}, r"completions must be of type int, but received '8'. Its default is None"),
        ({"eta": True}, r"eta must be of type float, but received True"),
        ({"steps": {"start": 1.0, "end": 2.0, "steps": 5}}, r"steps must be of type int, but received {'start'"),
        ({"tau": {"start": 1.0}}, r"tau as a table must have start, end and steps"),
        ({"tau": {"start": 1.0, "end": 2.0, "steps": 5, "shape": "cosine"}}, r"tau as a table must have"),
    ],
)
def test_a_table_is_checked_key_by_key(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        from_mapping(TrainConfig, settings)


def test_a_config_survives_json() -> None:
    config = TrainConfig(tau=Schedule(start=1.0, end=0.5, steps=10, kind="cosine"), steps=3)
    assert from_mapping(TrainConfig, to_json(config)) == config
    assert from_mapping(SupervisedConfig, to_json(SupervisedConfig(steps=7))) == SupervisedConfig(steps=7)
    options = {"enable_thinking": False}
    config = TrainConfig(chat_template_kwargs=options, truncation_side="left", max_lost=0.25)
    assert from_mapping(TrainConfig, to_json(config)) == config
    assert config.chat_template_kwargs == options
    with pytest.raises(ConfigError, match=r"chat_template_kwargs must be of type dict, but received 3"):
        from_mapping(TrainConfig, {"chat_template_kwargs": 3})


def test_whole_numbers_are_taken_for_fractions() -> None:
    assert from_mapping(TrainConfig, {"tau": 1, "learning_rate": {"start": 0, "end": 1, "steps": 2}}).tau == 1.0


@pytest.mark.parametrize(
    ("kind", "expected"), [("linear", [0.0, 0.25, 0.5, 1.0, 1.0]), ("cosine", [0.0, 0.146447, 0.5, 1.0, 1.0])]
)
def test_a_schedule_goes_from_start_to_end_and_stays(kind: Any, expected: list[float]) -> None:
    schedule = Schedule(start=0.0, end=1.0, steps=4, kind=kind)
    assert [value_at(schedule, step) for step in (0, 1, 2, 4, 9)] == pytest.approx(expected, abs=1e-6)


def test_a_schedule_checks_itself() -> None:
    with pytest.raises(ConfigError, match=r"steps of a schedule must be at least 1, but received 0"):
        Schedule(start=0.0, end=1.0, steps=0)
    with pytest.raises(ConfigError, match=r"kind must be 'linear' or 'cosine', but received 'step'"):
        Schedule(start=0.0, end=1.0, steps=1, kind="step")
    with pytest.raises(ConfigError, match=r"warmup must lie in \[0, 1\), but received 1.0. It is a share of steps"):
        Schedule(start=0.0, end=1.0, steps=1, warmup=1.0)


def test_a_schedule_warms_up_and_begins_again() -> None:
    """INPO's, appendix B: cosine from the peak to 0 after a warm-up, in every round."""
    schedule = Schedule(start=2.0, end=0.0, steps=200, kind="cosine", warmup=0.03, repeat=True)
    assert [value_at(schedule, step) for step in (0, 3, 6, 103, 200, 203)] == pytest.approx(
        [0.0, 1.0, 2.0, 1.0, 0.0, 1.0], abs=1e-5
    )
    assert schedule.bounds == (0.0, 2.0)
    once = Schedule(start=2.0, end=0.5, steps=100, warmup=0.5)
    assert [value_at(once, step) for step in (25, 75, 100, 300)] == pytest.approx([1.0, 1.25, 0.5, 0.5])
    assert from_mapping(TrainConfig, to_json(TrainConfig(learning_rate=schedule))).learning_rate == schedule


def test_eta_is_three_tau_unless_set() -> None:
    assert TrainConfig(algorithm="inpo", tau=0.1).strengths(0) == pytest.approx((0.1, 0.3))
    config = TrainConfig(algorithm="inpo", tau=0.0, eta=Schedule(start=1.0, end=2.0, steps=2))
    assert config.strengths(1) == (0.0, 1.5)
    assert config.round_steps == 334


def test_supervised_settings_keep_the_same_rules(unchecked: None) -> None:
    for settings, text in (
        ({"eval_every": 0}, r"eval_every must be at least 1, but received 0"),
        ({"max_completion_tokens": 0}, r"max_completion_tokens must be a whole number of at least 1, but received 0"),
        ({"overlong": "cut"}, r"overlong must be 'drop', 'truncate' or 'raise', but received 'cut'"),
        ({"truncation_side": "middle"}, r"truncation_side must be 'left' or 'right', but received 'middle'"),
        ({"max_lost": 2.0}, r"max_lost must lie in \[0, 1\], but received 2.0"),
    ):
        with pytest.raises(ConfigError, match=text):
            SupervisedConfig(**settings)
