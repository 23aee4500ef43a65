"""The outer loop that every training here runs in: progress, metrics, health, checkpoints, exact continuation."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import orjson

from fastpref.data import hashes
from fastpref.data.records import DropReport
from fastpref.learning import signals
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import DataError, DivergedError
from fastpref.method.tables import to_json
from fastpref.models.huggingface import OURS
from fastpref.runs import checkpoints, log, terminal

UNHEALTHY_LIMIT = 5
"""So many skipped updates in a row end a run: the state before them is what the last checkpoint holds."""

FREE = (
    *("steps", "rounds", "checkpoint_every", "keep_checkpoints", "sample_every"),
    *("learning_rate", "warmup_steps", "lr_schedule", "max_grad_norm", "eval_every", "judge_timeout"),
)
"""Settings that may change between two starts of a run. Every other belongs to the run."""

STEADYING = ("learning_rate", "warmup_steps", "lr_schedule", "max_grad_norm")
"""Settings that can bring back a run whose updates were not finite: with another, they are counted anew."""


@runtime_checkable
class Source(Protocol):
    """A batcher, as far as the loop needs it: where it stands, and how to go back there."""

    def state(self) -> bytes:
        """Where the source stands."""
        ...

    def restore(self, state: bytes, /) -> None:
        """Go to where `state` was taken."""
        ...


@dataclass(frozen=True)
class Outcome:
    """Result of a step."""

    arrays: Any
    """Pytree of arrays: everything that the next step depends on besides the source."""
    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)


Measure = Callable[[int, Any], Outcome]
"""Steps done and the arrays to the arrays with what a measurement keeps, its metrics and samples."""


def drive(
    advance: Callable[[int, Any], Outcome],
    arrays: Any,
    source: Source,
    config: TrainConfig | SupervisedConfig,
    *,
    run_dir: Path | None,
    fingerprint: Mapping[str, Any],
    description: str,
    measure: Measure | None = None,
    on_step: Callable[[int, dict[str, float], Any], None] | None = None,
    quiet: bool = False,
) -> tuple[Any, list[dict[str, float]]]:
    """Call `advance` until `config.steps` are done, going on from the newest checkpoint of the run directory.

    No step is lost: a failure inside one saves the state before it, a failure in what follows it (measurement, report,
    callback) the state after it; and is raised again. A measurement that failed is made when the run goes on.

    Args:
      advance: takes the number of steps done and the arrays, makes one step, and may consume the source. Its metrics
        say in `updates/skipped` whether the update was left out.
      arrays: the arrays at step 0.
      source: the batcher that `advance` reads.
      config: steps, intervals and all else that belongs to the run.
      run_dir: where the run is written, held by the caller; or None to write nothing.
      fingerprint: what must be equal for a continuation besides the settings, as JSON values.
      description: what the progress bar says.
      measure: called after each step, once its result is safe.
      on_step: called with the number of steps done, the metrics and the arrays, after each step.
      quiet: show no progress.

    Returns:
      The arrays after the last step, and the metrics of each step of the run, whatever process made it.

    Raises:
      CheckpointError: the run directory holds another run, or nothing readable.
      DivergedError: `UNHEALTHY_LIMIT` updates in a row were skipped, those of earlier processes counted.
      KeyboardInterrupt: INT was received; the step was finished and saved.
      StopSignal: the same of TERM and HUP.
    """
    settings = to_json(config)
    free = {name: settings[name] for name in FREE if name in settings}
    fingerprint = {**lasting(settings), **fingerprint}
    done = skipped = 0
    unreported: Outcome | None = None
    history: list[dict[str, float]] = []
    with ExitStack() as stack:
        stop = stack.enter_context(signals.stopping())
        run = folder = None
        if run_dir is not None:
            folder = run_dir / "checkpoints"
            saved_state = checkpoints.restore(folder, arrays, fingerprint=fingerprint)
            run = stack.enter_context(log.Run(run_dir))
            if saved_state is not None:
                done, arrays = saved_state.step, saved_state.arrays
                source.restore(saved_state.extra["source"])
                progress = json.loads(saved_state.extra["progress"])
                if (rest := progress["unreported"]) is not None:
                    unreported = Outcome(arrays, rest["metrics"], rest["samples"])
                changed = _report_changes(run_dir, done, progress["settings"], free)
                skipped = 0 if changed else progress["skipped"]
            run.write_config(settings)
            written = None if saved_state is None else saved_state.extra["metrics"]
            history = _metrics(run.resume(done if unreported is None else done - 1, written))
        saved = done
        position = source.state()

        def keep() -> None:
            nonlocal saved
            if folder is not None and saved < done:
                rest = None if unreported is None else {"metrics": unreported.metrics, "samples": unreported.samples}
                progress = {"skipped": skipped, "unreported": rest, "settings": free}
                checkpoints.save(
                    folder,
                    done,
                    arrays,
                    {
                        "source": position,
                        "metrics": b"" if run is None else run.history(),
                        # Not orjson: metrics may be NaN.
                        "progress": json.dumps(progress).encode(),
                    },
                    fingerprint=fingerprint,
                    keep=config.keep_checkpoints,
                )
                saved = done

        bar = stack.enter_context(
            terminal.progress(config.steps, description=description, completed=done, enabled=False if quiet else None)
        )
        try:
            _check_health(skipped, done)
            while done < config.steps or unreported is not None:
                if unreported is None:
                    began = time.perf_counter()
                    outcome = advance(done, arrays)
                    arrays, position, done = outcome.arrays, source.state(), done + 1
                    outcome.metrics["time/step"] = time.perf_counter() - began
                    skipped = skipped + 1 if outcome.metrics["updates/skipped"] else 0
                    unreported = outcome
                metrics, samples = unreported.metrics, unreported.samples
                if measure is not None:
                    measured = measure(done, arrays)
                    arrays, metrics, samples = (
                        measured.arrays,
                        metrics | measured.metrics,
                        [*samples, *measured.samples],
                    )
                if run is not None:
                    run.log(done, metrics)
                    run.log_samples(done, samples)
                unreported = None
                history.append(metrics)
                bar.update(**metrics)
                if done % config.checkpoint_every == 0 or done == config.steps:
                    keep()
                if on_step is not None:
                    on_step(done, metrics, arrays)
                _check_health(skipped, done)
                if stop.number is not None:
                    keep()
                    where = "No run_dir was given, so it is lost." if run_dir is None else f"{run_dir} holds it."
                    message = f"stopped after step {done} of {config.steps}. {where} The same call goes on from there."
                    print(message, file=sys.stderr, flush=True)
                    raise signals.error(stop.number, message)
        except BaseException:
            # A step that failed after its update has given its buffers away: the last checkpoint then stands.
            if not stop.at_once and not any(leaf.is_deleted() for leaf in jax.tree.leaves(arrays)):
                keep()
            raise
    return arrays, history


def _check_health(skipped: int, done: int) -> None:
    if skipped >= UNHEALTHY_LIMIT:
        raise DivergedError(
            f"loss, gradient and parameters must be finite, but were not in {skipped} updates in a row, up to step "
            f"{done}. The model is as it was before them. Lower learning_rate or set max_grad_norm, which a run with a "
            "named optimizer accepts, or start another run with a larger tau."
        )


def _report_changes(run_dir: Path, done: int, before: Mapping[str, Any], free: Mapping[str, Any]) -> bool:
    """Say and write down which settings changed since the checkpoint; return whether one is of `STEADYING`."""
    now: dict[str, Any] = json.loads(json.dumps(free))
    changes = {name: [before[name], now[name]] for name in now if name in before and before[name] != now[name]}
    if changes:
        told = ", ".join(f"{name} {old!r} becomes {new!r}" for name, (old, new) in changes.items())
        ends = "steps" in changes and free["lr_schedule"] != "constant"
        decay = "; the learning rate now reaches 0 at the new steps" if ends else ""
        terminal.say(f"{run_dir} goes on after step {done} with other settings: {told}{decay}")
        with (run_dir / "changes.jsonl").open("ab") as file:
            file.write(orjson.dumps({"step": done, "settings": changes}, option=orjson.OPT_APPEND_NEWLINE))
    return any(name in changes for name in STEADYING)


def _metrics(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Lines of the log as metrics: NaN for a number that was not finite."""
    return [
        {name: math.nan if value is None else value for name, value in record.items() if name != "step"}
        for record in records
    ]


def check_destination(path: Path, *beside: str) -> None:
    """Refuse, before anything is trained, a directory in which the model could not be saved at the end.

    Raises:
      FileExistsError: it holds files that are no part of a checkpoint, nor those `beside` it.
    """
    files = path.iterdir() if path.is_dir() else [path] if path.exists() else []
    if foreign := sorted(file.name for file in files if not OURS.fullmatch(file.name) and file.name not in beside):
        raise FileExistsError(
            f"the directory of a model must hold nothing else, but received {path} with {foreign[0]} in it. "
            "Move that away, or choose another run_dir."
        )


def report_drops(
    report: DropReport,
    config: TrainConfig | SupervisedConfig,
    *,
    limits: Mapping[str, str],
    source: str | Path,
    quiet: bool,
) -> None:
    """Print what was dropped, cut or not used, with its reasons, before anything is learned from the rest.

    Args:
      report: account of the records.
      config: says in `max_lost` which share may be lost.
      limits: the setting by the reason that records above it are dropped for.
      source: where the records came from.
      quiet: print nothing.

    Raises:
      DataError: more is lost.
    """
    if not report.delivered or report.read - report.delivered > config.max_lost * report.read:
        remedies = [
            f"Raise {limits[reason]}, {getattr(config, limits[reason])} now, to {size} to keep all of them."
            for reason, size in report.longest.items()
            if reason in limits
        ]
        if not remedies or report.dropped.keys() - report.longest.keys():
            remedies.append("Check the records.")
        if report.delivered:
            remedies.append("To learn from the rest alone, raise max_lost.")
        some = f"keep {1 - config.max_lost:.0%} of its records"
        rule = some if report.delivered else "have at least one record to learn from"
        raise DataError(
            f"a training must {rule}, but received {'this' if report.delivered else 'none'} from {source}: {report}. "
            + " ".join(remedies)
        )
    if not quiet and (report.shares or report.unused):
        terminal.say(f"{report}{f': {report.shares} of {source}' if report.shares else ''}")


def digest(*parts: Any) -> str:
    """A hash of pytrees of arrays: names what a run was started from."""
    arrays = map(np.asarray, jax.tree.leaves(parts))
    return hashes.of_buffers(part for x in arrays for part in (f"{x.dtype}{x.shape}".encode(), x.tobytes())).hex()


def lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a continuation must share: all but `FREE`."""
    return {f"config.{name}": value for name, value in settings.items() if name not in FREE}
