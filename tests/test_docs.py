"""The pages under docs/ are true: their code runs, their links lead somewhere, the names that they give exist."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import orjson
import pytest
from small import PROMPTS, language_model

import fastpref
from fastpref.method.algorithms import ALGORITHMS
from fastpref.method.config import TrainConfig
from fastpref.models import save
from fastpref.runs.metrics import METRICS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TRL = (DOCS / "for_trl_users.md").read_text(encoding="utf-8")


def snippet(page: str, name: str) -> str:
    """The code under a mark, with small numbers for large ones."""
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found, name
    return re.sub(r"(max_new_tokens|eval_every)=\d+", r"\1=5", re.sub(r"steps=\d+", "steps=10", found[1]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(language_model(), tmp_path / "checkpoints" / "sft")
    pairs = [{"prompt": prompt, "chosen": "w1 w2", "rejected": "w3"} for prompt in PROMPTS]
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    files = {"pairs": pairs, "held_out_pairs": pairs[:4], "prompts": prompts, "held_out": prompts[:4]}
    for name, records in files.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, records)))
    return tmp_path


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_run_goes_through_and_leaves_what_the_page_says(folder: Path) -> None:
    lines = run(snippet("first_run.md", "first run"), folder).splitlines()
    assert any(re.fullmatch(r"agrees with \d+% of the pairs that were kept back", line) for line in lines)
    assert 0 <= float(lines[-1]) <= 1
    page = (DOCS / "first_run.md").read_text()
    left = page[page.index("| file |") : page.index("## What to look at")]
    names = re.findall(r"`([\w.]+)/?`", re.sub(r"\|[^|]*\|$", "", left, flags=re.M))
    assert {"policy", "metrics.jsonl", "checkpoints", "config.json"} <= set(names)
    for name in names:
        assert (folder / "runs" / "ipo-md" / name).exists(), name
    assert (folder / "runs" / "ipo-md" / "plots" / "overview.png").exists()


@pytest.mark.parametrize("name", ["checkpoint", "judge", "data"])
def test_what_people_bring_goes_through(name: str, folder: Path) -> None:
    fastpref.RewardModel.from_model(language_model()).save(folder / "checkpoints" / "reward")
    code = snippet("bring_your_own.md", name)
    assert len(code.strip().splitlines()) - 2 <= 5  # without the import
    run(code, folder)


def test_the_run_for_trl_users_goes_through(folder: Path) -> None:
    fastpref.RewardModel.from_model(language_model()).save(folder / "checkpoints" / "reward")
    run(snippet("for_trl_users.md", "nash-md"), folder)
    assert (folder / "runs" / "nash-md" / "policy").is_dir()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, but for its two first lines."""
    section = TRL[TRL.index(f"## {heading}\n") :]
    lines = [line for line in section[: section.find("\n## ")].splitlines() if line.startswith("|")]
    assert len(lines) > 5
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_the_settings_for_trl_users_exist() -> None:
    known = {field.name for field in fields(TrainConfig)} | set(inspect.signature(fastpref.train).parameters)
    named = {name for _, ours, *_ in rows("Settings") for name in re.findall(r"`(\w+)`", ours)}
    assert {"tau", "mixture_beta", "batch_size"} <= named <= known


def test_the_algorithms_for_trl_users_exist() -> None:
    named = {name for _, ours in rows("Trainers") for name in re.findall(r'`(?:algorithm=)?"([\w-]+)"`', ours)}
    assert {"ipo-md", "nash-md-pg", "offline-ipo"} <= named <= set(ALGORITHMS)
    functions = {name for _, ours in rows("Trainers") for name in re.findall(r"`fastpref\.(\w+)`", ours)}
    assert functions == {"sft", "fit_reward_model", "fit_preference_model"} <= set(fastpref.__all__)


def test_the_metrics_for_trl_users_exist() -> None:
    named = {name for _, ours, *_ in rows("Metrics") for name in re.findall(r"`([\w/]+)`", ours)}
    assert {"rewards/margins", "preference/mean", "eval/win_rate"} <= named <= set(METRICS)


def test_the_metrics_of_the_first_run_exist() -> None:
    page = (DOCS / "first_run.md").read_text()
    assert set(re.findall(r"`((?:eval|rewards|pairs|completions)/\w+)`", page)) <= set(METRICS)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in DOCS.glob("*.md")} == set(re.findall(r"\(docs/(\w+\.md)\)", readme))


def test_no_result_of_the_papers_page_stands_outside_what_is_generated() -> None:
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- figures: .*?<!-- end -->|`[^`]*`", "", text, flags=re.DOTALL)
    assert re.findall(r"[^\n]*\d\.\d[^\n]*", prose) == []
