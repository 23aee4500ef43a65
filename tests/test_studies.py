"""The studies of algorithms on the demo's task, with a model of few words and runs of two steps."""

import csv
from pathlib import Path
from typing import Any

import pytest
from small import PROMPTS, language_model

from fastpref.demo.docstrings import Example, Splits
from fastpref.demo.small import Prepared
from fastpref.judging.models import PreferenceModel
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.reproduce import reproduce, studies

TRAIN = TrainConfig(
    steps=2, batch_size=3, max_prompt_tokens=16, max_new_tokens=4, max_shapes=1, eval_prompts=4, optimizer="adamw"
)
FIT = SupervisedConfig(steps=2, batch_size=4, max_prompt_tokens=16, max_completion_tokens=8, max_shapes=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture
def lab(folder: Path, monkeypatch: pytest.MonkeyPatch) -> studies.Lab:
    """A folder that all tests share, as all studies do."""
    monkeypatch.setattr(studies.demo, "IPO_MD", TRAIN)
    monkeypatch.setattr(studies.demo, "PREFERENCE", FIT)
    monkeypatch.setattr(studies.demo, "MAX_NEW_TOKENS", TRAIN.max_new_tokens)
    monkeypatch.setattr(studies, "SEEDS", (0,))
    monkeypatch.setattr(studies, "TAUS", dict.fromkeys(studies.TAUS, (0.1,)) | {"rl": (0.1, 1.0)})
    examples = [Example(prompt, "w1", "library") for prompt in PROMPTS]
    pairs = [{"prompt": prompt, "chosen": "w1", "rejected": "w2 w3", "preference": 0.9} for prompt in PROMPTS]
    model = language_model("t5")
    judge = PreferenceModel(model, template="{prompt} 1 {first} 2 {second}")
    made = studies.Lab(folder, settings={"steps": 2, "eval_every": 1}, prompts=4, quiet=True)
    made.__dict__["ready"] = Prepared(Splits(examples, examples, examples, examples), model, pairs, judge, None)
    return made


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_matrix_of_runs(lab: studies.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    text, table, image = studies.table_2(lab)
    shown = text.read_text(encoding="utf-8")
    assert "| p(row ≻ column) | online-ipo | ipo-md | online-dpo | nash-md-pg | online-slic | rl | SFT |" in shown
    assert "paper 0.515" in shown
    assert "paper 0.485" in shown
    assert '"algorithm":"rl","tau":' in shown
    assert len(rows_of(table)) >= 21
    assert image.read_bytes().startswith(b"\x89PNG")
    assert len(list((lab.folder / "runs").iterdir())) == 6 + 1

    monkeypatch.setattr(studies, "train", lambda *_, **__: pytest.fail("a run that is there is trained again"))
    assert studies.table_2(lab) == [text, table, image]
    assert text.read_text(encoding="utf-8") == shown


def test_a_curve_for_each_setting(lab: studies.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "BETAS", (0.0, 0.5))
    table, image = studies.figure_5(lab)
    rows = rows_of(table)
    assert [row["mixture_beta"] for row in rows] == ["0.0", "0.5"]
    assert all(float(row["low"]) <= float(row["win_rate"]) <= float(row["high"]) for row in rows)
    assert {row["baseline"] for row in rows} == {"RL"}
    assert image.exists()


def test_offline_and_online_side_by_side(lab: studies.Lab) -> None:
    files = studies.figures_3_and_4(lab)
    assert [path.name for path in files] == [f"ipo-md-figure-{n}.{kind}" for n in (3, 4) for kind in ("csv", "png")]
    assert len(rows_of(files[0])) == len(rows_of(files[2])) == 4


def test_learning_curves(lab: studies.Lab) -> None:
    table, _ = studies.figure_2(lab)
    assert [(row["tau"], row["step"]) for row in rows_of(table)] == [
        (tau, step) for tau in ("0.1",) for step in ("1", "2")
    ]


def test_rounds_of_tournaments(lab: studies.Lab) -> None:
    few: dict[str, Any] = {"rounds": 2, "completions": 4}
    text, *_ = studies.inpo_table(lab, **few)
    assert "| inpo, no KL |" in text.read_text(encoding="utf-8")


def test_a_study_is_a_command(lab: studies.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    made, folders = studies.figure_2(lab), list[Path]()

    def shared(folder: Path) -> studies.Lab:
        folders.append(folder)
        return lab

    monkeypatch.setattr(studies, "Lab", shared)
    assert reproduce("ipo-md-figure-2", lab.folder / "again") == made
    assert folders == [lab.folder / "again"]
