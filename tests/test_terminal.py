"""Progress bars and tables: what people see while a run goes on."""

import io
import re
import time
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fastpref.runs.terminal import progress, samples_table, table


def output(width: int = 100, **options: Any) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, **options), file


STEP = {"loss": 0.25, "objective/kl": 1.5, "tokens/generated": 500, "time/step": 0.25, "tau": 1.0}


def test_a_terminal_gets_a_bar_with_metrics() -> None:
    console, file = output(80, force_terminal=True)
    with progress(4, description="ipo-md", console=console) as bar:
        bar.update(**STEP, **{"eval/win_rate": 0.6125})
        bar.update(2)
    assert "\x1b[" in file.getvalue()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    for part in ("ipo-md", "3/4", "elapsed", "left", "loss 0.25", "win rate 61.3%", "KL 1.5 nats", "2,000 tokens/s"):
        assert part in " ".join(lines[-2:])
    assert "tau" not in file.getvalue()


def test_a_file_gets_a_plain_line_at_each_tenth() -> None:
    console, file = output(20)
    with progress(50, description="ipo-md", console=console) as bar:
        for _ in range(50):
            bar.update(**STEP)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/50" for step in range(5, 51, 5)]
    assert lines[0].startswith("ipo-md 5/50 · loss 0.25 · KL 1.5 nats · 2,000 tokens/s · 0:00:00 elapsed, 0:00:00 left")
    assert "\x1b" not in file.getvalue()


def test_a_slow_run_gets_a_line_a_minute_and_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console, file = output()
    with progress(100, description="sft", completed=20, console=console) as bar:
        for _ in range(5):
            now += 25.0
            bar.update()
    assert file.getvalue().splitlines() == ["sft 23/100 · 0:01:15 elapsed, 0:32:05 left"]


def test_quiet_is_quiet_and_a_bar_can_be_forced() -> None:
    for enabled, anything in ((False, False), (True, True)):
        console, file = output(force_terminal=False)
        with progress(1, description="sft", enabled=enabled, console=console) as bar:
            bar.update(loss=1.0)
        assert bool(file.getvalue()) == anything
    console, file = output(force_terminal=True)
    with progress(1, description="sft", enabled=False, console=console) as bar:
        bar.update(loss=1.0)
    assert file.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_lets_errors_through_and_takes_empty_runs(terminal: bool) -> None:
    console, _ = output(force_terminal=terminal)
    with pytest.raises(KeyError, match="judge"), progress(3, description="sft", console=console):
        raise KeyError("judge")
    with progress(0, description="sft", console=console):
        pass
    with progress(0, description="sft", console=console) as bar:  # the console is free again
        bar.update(0)


def test_a_table_aligns_numbers_and_shows_text_as_it_is() -> None:
    console, file = output(60)
    rows = [["[bold]ipo-md[/bold]", 0.612345, 12000.4, None], ["sft\x1b[31m", np.float32(0.5), 7, 3]]
    table("Win rates", ["policy", "win rate", "tokens", "runs"], rows, console=console)
    lines = file.getvalue().splitlines()
    assert lines[0].strip() == "Win rates"
    body = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert body == [["[bold]ipo-md[/bold]", "0.6123", "12,000", "–"], ["sft�[31m", "0.5", "7", "3"]]
    numbers = [line.split("│")[2] for line in lines if line.startswith("│")]
    assert [cell.rstrip()[-1] == cell[-2] for cell in numbers] == [True, True]
    with pytest.raises(ValueError, match=r"a line must have 2 cells, for \['a', 'b'\], but received 1: \[1\]"):
        table("t", ["a", "b"], [[1]], console=console)


def test_samples_stand_side_by_side_wrapped_and_shortened() -> None:
    console, file = output(70)
    samples = [
        {"prompt": "word " * 200, "before": "[red]x[/red]", "after": "Return the sum.\nAnd\x07 more."},
        {"prompt": "short", "before": "y", "after": "z"},
    ]
    samples_table("Held-out prompts", samples, limit=60, console=console)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 70
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    prompt = " ".join(row[0] for row in cells if row[0] and row[0] != "short")
    assert prompt == ("word " * 12).strip() + "…"
    assert {"[red]x[/red]", "y"} <= {row[1] for row in cells}
    assert {"Return the", "sum.", "And� more.", "z"} <= {row[2] for row in cells}
    assert sum(line.startswith("├") for line in lines) == 1
