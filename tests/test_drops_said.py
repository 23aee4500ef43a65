"""What is dropped of prompts, and columns that are not used, is said wherever policies write to them."""

import json
from pathlib import Path
from typing import Any

import pytest
from small import PROMPTS, language_model, prefers_w1

from fastpref.cli import main
from fastpref.data import read_prompts
from fastpref.evaluation.best_checkpoint import select_checkpoint
from fastpref.evaluation.side_by_side import compare, evaluate
from fastpref.learning.held_out import read_held_out
from fastpref.method.config import TrainConfig
from fastpref.method.errors import DataError, DropWarning
from fastpref.models import save
from fastpref.sampling.generate import write

GOOD = [{"prompt": prompt} for prompt in PROMPTS[:4]]
BAD = [*GOOD[:2], {"prompt": ""}, {"text": "w1"}, *GOOD[2:]]
DROPPED = r"prompts.*: 6 records read, 4 delivered, 2 dropped \(1 empty prompt, 1 missing column\)"
SKIP: dict[str, Any] = {"on_bad_record": "skip", "max_new_tokens": 3}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, BAD)))
    return path


def test_prompts_that_are_dropped_are_counted_aloud(source: Path) -> None:
    with pytest.warns(DropWarning, match=rf"of {source}: 6 records read, 4 delivered, .*; columns not used: text$"):
        assert read_prompts(source, on_bad_record="skip") == PROMPTS[:4]
    with pytest.warns(UserWarning, match="the first: ") as said:
        assert read_prompts(BAD, on_bad_record="warn") == PROMPTS[:4]
    assert len(said) == 1
    with pytest.warns(DropWarning, match=r"^prompts: 4 records read, 4 delivered, 0 dropped; columns not used: note$"):
        read_prompts([{**row, "note": "n"} for row in GOOD], on_bad_record="warn")
    assert read_prompts(GOOD) == PROMPTS[:4]


def test_evaluation_says_what_it_leaves_out(source: Path) -> None:
    models = {"a": language_model(), "b": language_model(seed=1)}
    with pytest.warns(DropWarning, match=DROPPED):
        found = evaluate(models, source, prefers_w1, seeds=(0,), **SKIP)
    assert found.prompts == PROMPTS[:4]
    with pytest.warns(DropWarning, match=DROPPED):
        assert compare(*models.values(), source, prefers_w1, **SKIP).prompts == PROMPTS[:4]
    with pytest.warns(DropWarning, match=DROPPED):
        ranked = select_checkpoint([models["a"]], models["b"], BAD, prefers_w1, **SKIP)
    assert ranked.best.win_rate.prompts == PROMPTS[:4]
    for prompts in (BAD, source):
        with pytest.raises(DataError, match=r"\[empty prompt\]"):
            evaluate(models, prompts, prefers_w1, max_new_tokens=3)
    with pytest.warns(DropWarning, match=r"4 delivered, 0 dropped; columns not used: chosen, rejected"):
        write(models["a"], [{**row, "chosen": "w1", "rejected": "w2"} for row in GOOD], seed=0, max_new_tokens=3)


def test_the_command_line_skips_and_says_so(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(language_model(), tmp_path / "sft")
    file = tmp_path / "evaluate.toml"
    file.write_text(
        f'policy = "{tmp_path}/sft"\nbaseline = "{tmp_path}/sft"\nprompts = "{source}"\njudge = "small:prefers_w1"\n'
        "[settings]\nmax_new_tokens = 3\n"
    )
    assert main(["evaluate", str(file)]) == 1
    assert "[empty prompt]" in capsys.readouterr().err
    with pytest.warns(DropWarning, match=DROPPED):
        assert main(["evaluate", str(file), "settings.on_bad_record=skip"]) == 0, capsys.readouterr().err


def test_held_out_prompts_that_are_not_used_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    models = [language_model()] * 2
    for settings, used in (
        ({"eval_every": 1, "eval_prompts": 3}, "3 of 4 eval_prompts are used during the run: eval_prompts is 3"),
        ({}, "0 of 4 eval_prompts are used during the run: eval_every is 0"),
    ):
        config = TrainConfig(on_bad_record="skip", **settings)
        assert read_held_out(BAD, models, config, quiet=False) == PROMPTS[: int(used[0])]
        said = capsys.readouterr().out
        assert used in said
        assert "2 dropped (1 empty prompt, 1 missing column)" in said
        assert "33 % lost of the eval_prompts" in said
        read_held_out(BAD, models, config, quiet=True)
        assert capsys.readouterr().out == ""
