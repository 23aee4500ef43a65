"""The report of a run: whole, escaped, without anything from elsewhere, and never the end of a run."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastpref.data.records import DropReport
from fastpref.method.errors import RunWarning
from fastpref.runs import plots
from fastpref.runs.log import Run
from fastpref.runs.report import differing_words, finish, write_report

VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path", "defs", "rect", "circle"}
SECTIONS = ["plots", "win-rates", "samples", "data", "time", "versions", "settings"]
HOSTILE = "</p><script>alert('x')</script> <img src=x onerror=\"alert(1)\"> {{ 7 * 7 }} {% raw %} &amp; \x00\x1b[31m é𝄞"


class Page(HTMLParser):
    """Tags in their order, text, ids and attributes of a page; fails where an element is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset", "data") and value]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in ("b", "div", "h1", "h2", "h3", "p", "span", "td", "th") else ""

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def online(folder: Path, text: str = "plain") -> Path:
    rng = np.random.default_rng(0)
    with Run(folder, tensorboard=False) as run:
        run.write_config({"algorithm": "ipo-md", "steps": 6, "tau": 0.5, "optimizer": {"name": text}, "eta": None})
        for step in range(1, 7):
            metrics = {"loss": float(rng.normal()), "objective/kl": step / 10, "updates/skipped": float(step == 2)}
            metrics |= {"time/step": 2.0, "time/generate": 1.0, "time/judge": 0.25, "time/data": 0.0}
            if step % 3 == 0:
                metrics |= {"eval/win_rate": 0.6125, "eval/win_rate_low": 0.55, "eval/win_rate_high": 0.6751}
                metrics |= {"eval/kl_exact": 1.25, "grad_norm": math.nan}
                sample = {"prompt": f"prompt {text}", "before": f"The old {text} end", "after": f"The new {text} end"}
                run.log_samples(step, [{**sample, "preference": 0.75}] * 2)
            run.log_samples(step, [{"prompt": "p", "first": "a", "second": "b", "preference": 0.5}])
            run.log(step, metrics)
    return folder


REPORT = DropReport(10, 7, {"prompt too long": 2, "identical completions": 1}, truncated=3)


def test_a_report_is_well_formed_and_has_every_section(tmp_path: Path) -> None:
    page = Page(write_report(online(tmp_path / "my run"), "ipo-md", data=REPORT, judge="judges.mine"))
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    words = " ".join(page.text.split())
    for part in (
        *("my run", "ipo-md", "6 steps", "61.3%", "55.0% to 67.5%", "1.25", "1 updates were skipped"),
        *("The old plain end", "The new plain end", "prompt plain", "Policy, 75% preferred"),
        *("Read 10", "Delivered 7", "of these, truncated 3", "Dropped: prompt too long 2", "identical completions 1"),
        *("Sampling 6 s 50%", "Judging 1.5 s 12%", "Whole steps 12 s 100%", "optimizer.name plain", "eta –"),
        *("judge judges.mine", "python 3.", "jax 0.", "fastpref ", "platform ", "devices "),
    ):
        assert part in words, part
    assert page.tags.count("svg") == 3
    assert (page.tags.count("ins"), page.tags.count("del")) == (3, 3)  # two samples and the legend
    assert [path.name for path in (tmp_path / "my run").glob("*.html")] == ["report.html"]


def test_a_report_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = write_report(online(tmp_path), "ipo-md", data=REPORT)
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|//\w|@import|<script|<link|<iframe|src=", text)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert "url(" not in re.sub(r"url\(#", "", text)
    used = set(re.findall(r"var\(--([a-z]+)\)", text))
    assert {"ink", "muted", "grid", "blue"} <= used
    assert used <= set(re.findall(r"--([a-z]+):", text))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = online(tmp_path, HOSTILE)
    page = Page(write_report(folder, HOSTILE, data=DropReport(1, 0, {HOSTILE: 1}), judge=HOSTILE))
    assert not {"script", "img"} & set(page.tags)
    shown = HOSTILE.replace("\x00", "�").replace("\x1b", "�")
    assert page.text.count(shown) >= 6
    assert "49" not in page.text.replace("0.49", "")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", (folder / "report.html").read_text(encoding="utf-8"))


def test_a_run_of_any_kind_has_a_report(tmp_path: Path) -> None:
    with Run(tmp_path / "sft", tensorboard=False) as run:
        run.log(1, {"loss": 2.0, "eval/accuracy": 0.75})
    words = Page(write_report(tmp_path / "sft", "sft", plots.SUPERVISED_PANELS)).text
    assert "75.0%" in words
    assert "No win rate was measured" in words
    assert "This run has written no samples" in words
    (tmp_path / "empty").mkdir()
    assert "no metric that can be plotted" in Page(write_report(tmp_path / "empty", "sft")).text


def test_without_held_out_prompts_the_first_and_last_completions_are_shown(tmp_path: Path) -> None:
    with Run(tmp_path, tensorboard=False) as run:
        for step in (10, 20, 30):
            run.log_samples(step, [{"prompt": f"prompt {step}", "first": "a", "second": "b", "preference": 0.25}])
        run.log_samples(40, [{"prompt": "prompt 40", "first": "a", "reward": 1.5}])
    words = " ".join(Page(write_report(tmp_path, "online-ipo")).text.split())
    assert "those of step 10 and of step 40" in words
    assert "prompt 10 Step 10, 25% preferred a Step 10, 75% preferred b" in words
    assert "prompt 40 Step 40, reward 1.5 a" in words
    assert "prompt 20" not in words


def test_gaps_damage_and_unfinished_runs_are_said(tmp_path: Path) -> None:
    folder = online(tmp_path)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([lines[0], b"{broken\n", *lines[2:4], lines[4][:9]]))
    with pytest.warns(RunWarning, match="lines 2 do not"):
        words = Page(write_report(folder, "ipo-md")).text
    assert "The metrics of steps 2 are missing" in words
    assert "This run stands at step 4 of 6. The same command goes on from its checkpoint." in words


@pytest.mark.parametrize("broken", ["disk", "settings", "plots"])
def test_a_report_that_fails_is_a_warning(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = online(tmp_path)
    if broken == "disk":
        (folder / "report.html").mkdir()
        said = r"report.html must be written when a run ends, but received Is a directory. The run itself is complete"
    elif broken == "settings":
        (folder / "config.json").write_text("{")
        said = r"report.html must be written .*JSONDecodeError"
    else:
        (folder / "plots").write_text("")
        said = r"plots must be written when a run ends, but received File exists"
    with pytest.warns(RunWarning, match=said):
        finish(folder, "ipo-md")
    assert (folder / "report.html").is_file() == (broken == "plots")
    finish(None, "ipo-md")


def test_words_that_differ_are_marked_and_nothing_is_lost() -> None:
    before, after = "The cat  sat\non the mat. ", "The dog sat\non a mat."
    sides = differing_words(before, after)
    assert ["".join(part["text"] for part in side) for side in sides] == [before, after]
    marked = [[part["text"].split() for part in side if part["kind"] != "same"] for side in sides]
    assert marked == [[["cat"], ["the"]], [["dog"], ["a"]]]
    assert differing_words("same text", "same  text") == (
        [{"kind": "same", "text": "same text"}],
        [{"kind": "same", "text": "same  text"}],
    )
    assert differing_words("", "x") == ([], [{"kind": "added", "text": "x"}])
