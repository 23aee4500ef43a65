"""The command line: its files, its errors, and each command end to end on tiny models."""

import inspect
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from small import PROMPTS, language_model

from fastpref.cli import KEYS, load_judge, main, parser, read_file
from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.learning.supervised import fit_preference_model, sft
from fastpref.learning.train import train
from fastpref.method.errors import ConfigError
from fastpref.models import load, save

SETTINGS = 'steps = 2\nbatch_size = 4\nmax_shapes = 1\noptimizer = "adamw"\n'


@pytest.fixture(autouse=True)
def _keep_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` installs a signal handler, and a judge by name needs the current folder on the path."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(language_model(), tmp_path / "sft")
    write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    write(tmp_path / "examples.jsonl", [{"prompt": prompt, "completion": "w1 w2"} for prompt in PROMPTS])
    write(tmp_path / "pairs.jsonl", [{"prompt": prompt, "chosen": "w1", "rejected": "w2 w3"} for prompt in PROMPTS])
    (tmp_path / "tastes.py").write_text("def flat(prompts, first, second):\n    return [0.75] * len(prompts)\n")
    return tmp_path


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))


def toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("policy = ", [], r"must be a TOML file, but reading it failed.*Mend that line"),
        ('policy = "a"\npolice = "b"', [], r"train has no setting of that name, but received 'police'. Known: policy"),
        ('policy = "a"', [], r"train must have the key prompts, but received .* without. Add prompts = "),
        ('policy = "a"', ["tau"], r"an override must be key=value, but received 'tau'"),
        ('policy = "a"', ["settings.tau=1", "settings.tau.end=2"], r"tau must be a table to hold end, but received 1"),
        ("policy = 3", [], r"policy must be text, such as a path or a name, but received 3"),
        ('settings = "fast"', [], r"settings must be a table, but received 'fast'"),
    ],
)
def test_a_broken_file_is_refused(text: str, overrides: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_file("train", toml(tmp_path / "run.toml", text), overrides)


def test_overrides_are_toml_values_or_else_text(tmp_path: Path) -> None:
    file = toml(tmp_path / "run.toml", 'policy = "a"\nprompts = "p"\njudge = "j"\nrun_dir = "r"\n')
    values = read_file("train", file, ["settings.tau=0.5", "judge=module:name", "settings.tags=[1, 2]"])
    assert values["settings"] == {"tau": 0.5, "tags": [1, 2]}
    assert values["judge"] == "module:name"


def test_a_judge_is_a_directory_or_a_name(folder: Path) -> None:
    assert load_judge("tastes:flat")(["x"], ["a"], ["b"]) == [0.75]
    PreferenceModel(language_model()).save(folder / "preference")
    RewardModel.from_model(language_model()).save(folder / "reward")
    assert isinstance(load_judge("preference"), PreferenceModel)
    assert isinstance(load_judge("reward"), RewardModel)
    with pytest.raises(ValueError, match=r"a judge must be the directory .* but received 'nothing'"):
        load_judge("nothing")
    with pytest.raises(ValueError, match=r"'tastes:sharp' must be importable from .*Check the spelling"):
        load_judge("tastes:sharp")


def test_train_and_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f'policy = "sft"\nprompts = "prompts.jsonl"\njudge = "tastes:flat"\nrun_dir = "run"\n[settings]\n{SETTINGS}'
    file = toml(folder / "train.toml", text + "max_new_tokens = 4\n")
    assert main(["train", str(file), "settings.tau=0.5"]) == 0
    assert orjson.loads((folder / "run" / "config.json").read_bytes())["tau"] == 0.5
    assert len((folder / "run" / "metrics.jsonl").read_bytes().splitlines()) == 2
    assert "24 records read, 24 delivered" in capsys.readouterr().out
    text = 'policy = "run/policy"\nbaseline = "sft"\nprompts = "prompts.jsonl"\njudge = "tastes:flat"\n'
    text += 'output = "out.jsonl"\n'
    file = toml(folder / "evaluate.toml", text)
    assert main(["evaluate", str(file), "settings.max_new_tokens=4"]) == 0
    # A judge that always says 0.75 for the first place is balanced out by the other order.
    assert "0.500" in capsys.readouterr().out
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 24
    assert main(["evaluate", str(file), "settings.max_tokens=4"]) == 1
    assert "no setting of that name, but received 'max_tokens'" in capsys.readouterr().err


def test_sft_and_preference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = toml(
        folder / "sft.toml", f'policy = "sft"\ndata = "examples.jsonl"\nrun_dir = "tuned"\n[settings]\n{SETTINGS}'
    )
    assert main(["sft", str(file)]) == 0
    assert load(folder / "tuned" / "model").module.vocab_size == 36
    text = f'policy = "sft"\ndata = "pairs.jsonl"\nrun_dir = "judge"\nheld_out = "pairs.jsonl"\n[settings]\n{SETTINGS}'
    file = toml(folder / "preference.toml", text)
    assert main(["preference", str(file)]) == 0
    assert "Held-out agreement" in capsys.readouterr().out
    assert isinstance(load_judge("judge/model"), PreferenceModel)
    assert main(["preference", str(file), "kind=ranking"]) == 1
    assert "kind must be 'preference' or 'reward', but received 'ranking'" in capsys.readouterr().err


def test_a_broken_line_is_one_line_of_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "prompts.jsonl").write_bytes(b'{"prompt": "w1"}\n{"prompt": \n')
    text = 'policy = "sft"\nprompts = "prompts.jsonl"\njudge = "tastes:flat"\nrun_dir = "run"\n'
    assert main(["train", str(toml(folder / "train.toml", text))]) == 1
    message = capsys.readouterr().err
    assert message.startswith("fastpref: prompts.jsonl, line 2")
    assert len(message.splitlines()) == 1


def test_a_file_that_is_not_there_is_one_line_of_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(tmp_path / "none.toml")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("fastpref: ")
    assert "none.toml" in message
    assert len(message.splitlines()) == 1


def test_a_reward_model_is_fitted_by_name(folder: Path) -> None:
    text = f'policy = "sft"\ndata = "pairs.jsonl"\nrun_dir = "judge"\nkind = "reward"\n[settings]\n{SETTINGS}'
    assert main(["preference", str(toml(folder / "reward.toml", text))]) == 0
    assert isinstance(load_judge("judge/model"), RewardModel)


def test_every_text_parameter_of_a_function_is_a_key() -> None:
    for command, function in (("train", train), ("sft", sft), ("preference", fit_preference_model)):
        names = set(inspect.signature(function).parameters) - {"config", "optimizer", "callbacks", "quiet", "model"}
        assert names | {"settings"} <= set(KEYS[command]), command


def test_a_preference_model_takes_its_own_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f'policy = "sft"\ndata = "pairs.jsonl"\nrun_dir = "judge"\nanswers = ["w1", "w2"]\n[settings]\n{SETTINGS}'
    file = toml(folder / "preference.toml", text)
    assert main(["preference", str(file)]) == 0
    assert orjson.loads((folder / "judge" / "model" / "preference_model.json").read_bytes())["answers"] == ["w1", "w2"]
    assert main(["preference", str(file), "kind=reward"]) == 1
    assert "but received answers. Take it out" in capsys.readouterr().err


def test_help_lists_every_command() -> None:
    assert all(name in parser().format_help() for name in ("demo", "sft", "preference", "train", "evaluate"))
