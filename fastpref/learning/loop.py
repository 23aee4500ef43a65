"""The outer loop that every training here runs in: progress, metrics, checkpoints, exact continuation."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from fastpref.data import hashes
from fastpref.runs import checkpoints, log, owner, terminal


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
    """What one step gives back."""

    arrays: Any
    """Pytree of arrays: everything that the next step depends on besides the source."""
    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Journal:
    """Where and how often a run is written down.

    Args:
      run_dir: the run directory, or None to write nothing.
      settings: the configuration, as JSON values, for config.json.
      fingerprint: what must be equal for a continuation, as JSON values.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      keep_checkpoints: how many are kept.
    """

    run_dir: Path | None
    settings: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    checkpoint_every: int
    keep_checkpoints: int


def drive(
    advance: Callable[[int, Any], Outcome],
    arrays: Any,
    source: Source,
    *,
    steps: int,
    journal: Journal,
    description: str,
    on_step: Callable[[int, dict[str, float], Any], None] | None = None,
    quiet: bool = False,
) -> tuple[Any, list[dict[str, float]]]:
    """Call `advance` until `steps` are done, going on from the newest checkpoint of the run directory.

    A failure inside a step saves the state before it, so that nothing is lost, and is raised again.

    Args:
      advance: takes the number of steps done and the arrays, makes one step, and may consume the source.
      arrays: the arrays at step 0.
      source: the batcher that `advance` reads.
      steps: how many steps the whole run has.
      journal: where the run is written.
      description: what the progress bar says.
      on_step: called with the number of steps done, the metrics and the arrays, after each step.
      quiet: show no progress.

    Returns:
      The arrays after the last step, and the metrics of each step made here.

    Raises:
      CheckpointError: the run directory holds another run, or nothing readable.
      OwnerError: another process is writing the run directory.
    """
    done = 0
    history: list[dict[str, float]] = []
    with ExitStack() as stack:
        stack.enter_context(owner.hold(journal.run_dir))
        run = None
        folder = None
        if journal.run_dir is not None:
            folder = journal.run_dir / "checkpoints"
            found = checkpoints.restore(folder, arrays, fingerprint=journal.fingerprint)
            if found is not None:
                done, arrays = found.step, found.arrays
                source.restore(found.extra["source"])
            run = stack.enter_context(log.Run(journal.run_dir))
            run.write_config(journal.settings)
            run.resume(done, None if found is None else found.extra.get("metrics"))
        saved = done
        position = source.state()

        def keep() -> None:
            nonlocal saved
            if folder is not None and saved < done:
                checkpoints.save(
                    folder,
                    done,
                    arrays,
                    {"source": position, "metrics": run.history() if run is not None else b""},
                    fingerprint=journal.fingerprint,
                    keep=journal.keep_checkpoints,
                )
                saved = done

        bar = stack.enter_context(
            terminal.progress(steps, description=description, completed=done, enabled=False if quiet else None)
        )
        try:
            while done < steps:
                began = time.perf_counter()
                outcome = advance(done, arrays)
                arrays, position, done = outcome.arrays, source.state(), done + 1
                outcome.metrics["time/step"] = time.perf_counter() - began
                history.append(outcome.metrics)
                if run is not None:
                    run.log(done, outcome.metrics)
                    run.log_samples(done, outcome.samples)
                bar.update(**outcome.metrics)
                if done % journal.checkpoint_every == 0 or done == steps:
                    keep()
                if on_step is not None:
                    on_step(done, outcome.metrics, arrays)
        except BaseException:
            # A step that failed after its update has given its buffers away: the last checkpoint then stands.
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(arrays)):
                keep()
            raise
    return arrays, history


def digest(*parts: Any) -> str:
    """A hash of pytrees of arrays: names what a run was started from."""
    arrays = map(np.asarray, jax.tree.leaves(parts))
    return hashes.of_buffers(part for x in arrays for part in (f"{x.dtype}{x.shape}".encode(), x.tobytes())).hex()


def lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a continuation must share; the others do not change what a step computes."""
    changeable = ("steps", "rounds", "checkpoint_every", "keep_checkpoints", "sample_every", "judge_timeout")
    return {f"config.{name}": value for name, value in settings.items() if name not in changeable}
