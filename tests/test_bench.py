"""Benchmarks: what is written about a result is the result, and none is recorded on a busy machine."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))
figures, machine, readme_tables = map(import_module, ("figures", "machine", "readme_tables"))

QUIET = {machine.LOAD: 0.1, machine.OTHERS: 0.05}


@pytest.mark.parametrize(
    ("path", "text"), list(readme_tables.documents()), ids=lambda value: getattr(value, "name", "")
)
def test_what_is_written_is_what_was_recorded(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "run `python bench/readme_tables.py --write`"


def test_every_result_is_written_about() -> None:
    results = {path.stem for path in machine.RESULTS.glob("*.json")}
    assert results <= set(readme_tables.TEXTS)
    assert results == {path.stem for path in machine.RESULTS.glob("*.md")}


def test_every_block_is_shown_and_known() -> None:
    pages = [path.read_text(encoding="utf-8") for path, _ in readme_tables.documents() if path.suffix == ".md"]
    shown = re.findall(r"<!-- figures: ([\w-]+) -->", "".join(pages))
    assert sorted(shown) == sorted(readme_tables.BLOCKS)


def test_another_result_makes_another_document(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "It takes <!-- figures: state -->1<!-- end --> bytes.\n"
    state = figures.Prose((figures.Figure("batcher", ("resuming", "bytes"), str),))
    monkeypatch.setattr(readme_tables, "BLOCKS", {"state": state})
    monkeypatch.setattr(figures, "read", lambda _: {"resuming": {"bytes": 77}})
    assert readme_tables.filled(known) == "It takes <!-- figures: state -->77<!-- end --> bytes.\n"


def test_a_figure_that_nothing_recorded_is_refused() -> None:
    with pytest.raises(figures.MissingError, match=r"batcher: \('rates', 'nobody'\)"):
        str(figures.Figure("batcher", ("rates", "nobody"), str))
    with pytest.raises(figures.MissingError, match=r"bench/results/nothing\.json"):
        str(figures.Figure("nothing", (), str))
    with pytest.raises(figures.MissingError):
        str(figures.Figure("kernels_cpu", ("results", {"kernel": "mixture_sample"}), str))


def test_a_row_that_is_not_recorded_yet_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = figures.Figure("nothing", (), str)
    table = figures.Table(("what", "ours"), [figures.Row("that", [(missing,)], later=True)])
    monkeypatch.setattr(readme_tables, "BLOCKS", {"measured": table})
    assert readme_tables.rendered("measured") == "| what | ours |\n| --- | --- |"
    assert readme_tables.unrecorded() == ["that: nothing at bench/results/nothing.json"]
    table.rows[0] = table.rows[0]._replace(later=False)
    with pytest.raises(figures.MissingError):
        readme_tables.rendered("measured")


def test_a_quiet_machine_may_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "use", lambda: QUIET)
    assert machine.require_quiet() == QUIET


@pytest.mark.parametrize(("what", "value"), [(machine.LOAD, 0.51), (machine.OTHERS, 0.21)])
def test_a_busy_machine_may_not(what: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "use", lambda: QUIET | {what: value})
    with pytest.raises(SystemExit) as refused:
        machine.require_quiet()
    assert refused.value.code == (
        f"The {what} of a machine that records must be at most {machine.LIMITS[what]}, but received {value}. "
        "Stop other programs, wait a minute or two, and start the benchmark again."
    )


def test_use_is_that_of_other_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In two seconds of the clock the machine works three, half a second of that for this process."""
    ticks = machine.os.sysconf("SC_CLK_TCK")
    stat, clocks = tmp_path / "stat", {"perf_counter": 10.0, "process_time": 1.0}

    def write(seconds: float) -> None:
        # User, nice, system, idle, waiting for disks, interrupts of two kinds, stolen by a host.
        shares = [0.5 * seconds, 0, 0.25 * seconds, 1000, 1000, 0, 0, 0.25 * seconds]
        stat.write_text(f"cpu  {' '.join(str(round(ticks * share)) for share in shares)} 0 0\ncpu0 1 1\n")

    def sleep(seconds: float) -> None:
        write(7 + 3)
        clocks["perf_counter"] += seconds
        clocks["process_time"] += 0.5

    write(7)
    monkeypatch.setattr(machine, "STAT", stat)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.3, 0.2, 0.1))
    monkeypatch.setattr(machine.time, "sleep", sleep)
    for name in clocks:
        monkeypatch.setattr(machine.time, name, lambda name=name: clocks[name])
    measured = machine.use()
    assert measured[machine.LOAD] == 0.3
    assert measured[machine.OTHERS] == pytest.approx((3 - 0.5) / 2)
    monkeypatch.setattr(machine, "STAT", tmp_path / "none")
    assert machine.use() == {machine.LOAD: 0.3}


def test_a_result_says_how_busy_the_machine_was() -> None:
    report: dict[str, Any] = {"before": QUIET, "after": {machine.LOAD: 1.5}}
    assert machine.described(report) == (
        "before: load average 0.10, cores in use by other processes 0.05; after: load average 1.50"
    )


@pytest.mark.parametrize("path", sorted(BENCH.glob("bench_*.py")), ids=lambda path: path.stem)
def test_whoever_records_asks_for_a_quiet_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "machine.record(" in text
    assert text.index("machine.require_quiet()") < text.index("machine.record(")
    assert "RESULTS" not in text
