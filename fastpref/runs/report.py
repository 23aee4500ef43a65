"""The report of a run: one HTML page that needs no other file, written when a run ends.

It shows settings, plots, win rates with intervals, samples before and after with the words that differ, the data and
what was dropped, times, and the versions that the run was made with. All but the data and the judge is read from the
run directory, so that it is complete however often the run was interrupted.
"""

import difflib
import importlib.metadata
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import orjson
from markupsafe import Markup

from fastpref.data import files
from fastpref.data.records import DropReport
from fastpref.method.errors import RunWarning
from fastpref.runs import plots
from fastpref.runs.log import METRICS, SAMPLES, gaps, read_metrics

MOST_SAMPLES = 8
MOST_WIN_RATES = 12
LIBRARIES = ("fastpref", "jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")

TIMES = {
    "time/data": "Waiting for data",
    "time/generate": "Sampling",
    "time/judge": "Judging",
    "time/learn": "Learning",
}


def finish(
    run_dir: Path | str | None,
    title: str,
    plot: Callable[[Path], object] = plots.plot_run,
    *,
    data: DropReport | None = None,
    judge: str | None = None,
) -> None:
    """Plot a run that has ended and write its report. A failure is a warning: the run itself is done.

    Args:
      run_dir: the run directory; None for a run that writes nothing.
      title: the kind of run, such as "ipo-md".
      plot: writes the plots of this kind of run.
      data: the account of the records.
      judge: names the judge.

    Warns:
      RunWarning: plots or report could not be written; the message says why.
    """
    if run_dir is None:
        return
    folder = Path(run_dir)
    panels = plots.SUPERVISED_PANELS if plot is plots.plot_supervised else plots.RUN_PANELS
    writers: tuple[tuple[str, Callable[[], object]], ...] = (
        ("plots", lambda: plot(folder)),
        ("report.html", lambda: write_report(folder, title, panels, data=data, judge=judge)),
    )
    for name, write in writers:
        try:
            write()
        except Exception as error:
            reason = files.reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            warnings.warn(
                f"{folder / name} must be written when a run ends, but received {reason}. The run itself is complete.",
                RunWarning,
                stacklevel=2,
            )


def write_report(
    run_dir: Path | str,
    title: str,
    panels: Sequence[plots.Panel] = plots.RUN_PANELS,
    *,
    data: DropReport | None = None,
    judge: str | None = None,
) -> Path:
    """Write `report.html` of a run directory.

    Args:
      run_dir: holds `config.json`, `metrics.jsonl` and `samples.jsonl`, or some of them.
      title: the kind of run.
      panels: the plots that are shown, of those whose metrics the run has.
      data: the account of the records.
      judge: names the judge.

    Returns:
      The file.

    Raises:
      WriteError: the disk refused.
    """
    folder = Path(run_dir)
    metrics, samples = read_metrics(folder / METRICS), read_metrics(folder / SAMPLES)
    path = folder / "config.json"
    settings = dict(_flat(orjson.loads(path.read_bytes()))) if path.exists() else {}
    shown, note = _samples(samples)
    rates = [record for record in metrics if record.get("eval/win_rate") is not None]
    half = -(-len(settings) // 2)
    rows = list(settings.items())
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).render(
        name=folder.resolve().name,
        title=title,
        summary=_summary(metrics, settings),
        numbers=_numbers(metrics),
        notes=_notes(metrics, settings),
        plots=[{"title": panel.title, "svg": svg} for panel, svg in plots.svgs(metrics, panels)],
        win_rates=[_rate(record) for record in rates[-MOST_WIN_RATES:]],
        skipped_rates=max(0, len(rates) - MOST_WIN_RATES),
        samples=shown,
        samples_note=note,
        marked=any("before" in sample for sample in samples),
        data=[] if data is None else _data(data),
        times=_times(metrics),
        versions=_versions(judge),
        settings=[rows[:half], rows[half:]] if len(rows) > 8 else [rows],
    )
    return files.write_file(folder / "report.html", page.encode())


def differing_words(before: str, after: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The parts of two texts, each with its kind: "same", "removed" in the first, "added" in the second."""
    old, new = (re.findall(r"\s*\S+(?:\s+\Z)?|\s+", text) for text in (before, after))
    first, second = ([part.strip() for part in parts] for parts in (old, new))
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for kind, i, j, k, n in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        for side, parts, mark in ((sides[0], old[i:j], "removed"), (sides[1], new[k:n], "added")):
            if parts:
                side.append({"kind": "same" if kind == "equal" else mark, "text": "".join(parts)})
    return sides


def _samples(samples: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """What is shown of `samples.jsonl`, and a sentence about it."""
    held_out = [sample for sample in samples if "before" in sample]
    if held_out:
        last = held_out[-1]["step"]
        shown = []
        for sample in [sample for sample in held_out if sample["step"] == last][:MOST_SAMPLES]:
            before, after = differing_words(sample["before"], sample["after"])
            chance = f", {sample['preference']:.0%} preferred" if "preference" in sample else ""
            sides = [{"name": "Reference", "parts": before}, {"name": f"Policy{chance}", "parts": after}]
            shown.append({"prompt": sample["prompt"], "sides": sides})
        return shown, f"Held-out prompts: the reference, and the policy after step {last}."
    steps = sorted({sample["step"] for sample in samples})
    shown = [
        {"prompt": sample["prompt"], "sides": _pair(sample)}
        for step in dict.fromkeys([*steps[:1], *steps[-1:]])
        for sample in [sample for sample in samples if sample["step"] == step][: MOST_SAMPLES // 2]
    ]
    several = f"those of step {steps[0]} and of step {steps[-1]}" if len(steps) > 1 else "those of one step"
    return shown, f"Completions of training prompts as they were judged: {several}."


def _pair(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    chance = sample.get("preference")
    notes = {
        "first": "" if chance is None else f", {chance:.0%} preferred",
        "second": "" if chance is None else f", {1 - chance:.0%} preferred",
    }
    if "reward" in sample:
        notes["first"] = f", reward {sample['reward']:.3g}"
    return [
        {
            "name": f"Step {sample['step']}{notes[name]}",
            "parts": [{"kind": "same", "text": sample[name]}],
        }
        for name in ("first", "second")
        if name in sample
    ]


def _summary(metrics: Sequence[Mapping[str, Any]], settings: Mapping[str, str]) -> str:
    done = metrics[-1]["step"] if metrics else 0
    planned = settings.get("steps", str(done))
    return f"{done} steps" if planned == str(done) else f"{done} of {planned} steps"


def _numbers(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The few numbers that most readers came for: the last of each."""
    last: dict[str, Any] = {}
    for record in metrics:
        last |= {name: value for name, value in record.items() if value is not None}
    numbers = []
    if "eval/win_rate" in last:
        interval = f"95 % interval {last['eval/win_rate_low']:.1%} to {last['eval/win_rate_high']:.1%}"
        numbers.append({"name": "Win rate, held out", "value": f"{last['eval/win_rate']:.1%}", "note": interval})
    for name, title, form, note in (
        ("eval/accuracy", "Accuracy, held out", "{:.1%}", "agreement with the labels"),
        ("eval/loss", "Loss, held out", "{:.4g}", "the last measured"),
        ("eval/kl_exact", "KL, held out", "{:.3g}", "nats a completion, from the reference"),
        ("loss", "Loss", "{:.4g}", "of the last step"),
        ("objective/kl", "KL, training", "{:.3g}", "nats a completion, of the last step"),
    ):
        if name in last and (name != "objective/kl" or "eval/kl_exact" not in last):
            numbers.append({"name": title, "value": form.format(last[name]), "note": note})
    seconds = sum(record.get("time/step") or 0.0 for record in metrics)
    if seconds:
        pace = f"{seconds / len(metrics):.3g} s a step"
        numbers.append({"name": "Time in steps", "value": _duration(seconds), "note": pace})
    return numbers


def _notes(metrics: Sequence[Mapping[str, Any]], settings: Mapping[str, str]) -> list[str]:
    notes = []
    done = max((record["step"] for record in metrics), default=0)
    if missing := gaps([record["step"] for record in metrics], done):
        notes.append(f"The metrics of {missing} are missing from metrics.jsonl and from this page.")
    if skipped := sum(bool(record.get("updates/skipped")) for record in metrics):
        notes.append(f"{skipped} updates were skipped: their loss or gradient was not finite.")
    planned = settings.get("steps", "")
    if planned.isdecimal() and done < int(planned):
        notes.append(f"This run stands at step {done} of {planned}. The same command goes on from its checkpoint.")
    return notes


def _rate(record: Mapping[str, Any]) -> dict[str, str]:
    low, high = (record.get(f"eval/win_rate_{end}") for end in ("low", "high"))
    kl = record.get("eval/kl_exact", record.get("eval/kl"))
    return {
        "step": f"{record['step']}",
        "value": f"{record['eval/win_rate']:.1%}",
        "interval": "–" if low is None or high is None else f"{low:.1%} to {high:.1%}",
        "kl": "–" if kl is None else f"{kl:.3g}",
    }


def _data(report: DropReport) -> list[tuple[str, str]]:
    reasons = sorted(report.dropped.items(), key=lambda item: (-item[1], item[0]))
    return [
        ("Read", f"{report.read:,}"),
        ("Delivered", f"{report.delivered:,}"),
        ("of these, truncated", f"{report.truncated:,}"),
        *((f"Dropped: {reason}", f"{count:,}") for reason, count in reasons),
    ]


def _times(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    total = sum(record.get("time/step") or 0.0 for record in metrics)
    if not total:
        return []
    parts = {title: sum(record.get(name) or 0.0 for record in metrics) for name, title in TIMES.items()}
    parts = {title: seconds for title, seconds in parts.items() if seconds}
    if parts:
        parts["All else, evaluation included"] = max(0.0, total - sum(parts.values()))
    return [
        {"name": title, "value": _duration(seconds), "share": f"{seconds / total:.0%}"}
        for title, seconds in [*parts.items(), ("Whole steps", total)]
    ]


def _versions(judge: str | None) -> list[tuple[str, str]]:
    device = jax.devices()[0]
    return [
        *([("judge", judge)] if judge else []),
        *((name, importlib.metadata.version(name)) for name in LIBRARIES),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("devices", f"{jax.device_count()} × {device.device_kind} ({device.platform})"),
    ]


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Settings under dotted names, as text."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, "–" if value is None else value if isinstance(value, str) else orjson.dumps(value).decode()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _visible(value: Any) -> Any:
    """Text without control codes, which HTML cannot hold and a model may write."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "".join(x if x.isprintable() or x in "\n\t" else "�" for x in value)
    return value
