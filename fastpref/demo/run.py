"""`fastpref demo`: the chat model where it can be had, else the small one."""

from pathlib import Path

from rich.console import Console

from fastpref.demo import chat, small, smollm2
from fastpref.demo.stages import DemoResult
from fastpref.method.errors import UnavailableError


def run(run_dir: Path | str, *, seed: int = 0, small_only: bool = False, quiet: bool = False) -> DemoResult:
    """Run the demo, or go on with one that was stopped.

    Args:
      run_dir: each demo is written below it, under its name and seed.
      seed: of initial weights, orders and draws.
      small_only: run the small demo, which needs no network, without trying to have the chat model.
      quiet: print nothing.

    Raises:
      OwnerError: another process is writing this demo.
    """
    console = Console(quiet=quiet)
    folder = Path(run_dir)
    if small_only:
        return small.run(folder / "small", seed=seed, quiet=quiet)
    try:
        start = smollm2.checkpoint(say=console.print)
    except UnavailableError as error:
        console.print(f"{error}\n\nWithout it, here is the small demo.", markup=False, highlight=False)
        return small.run(folder / "small", seed=seed, quiet=quiet)
    return chat.run(start, folder / "smollm2" / f"seed-{seed}", seed=seed, quiet=quiet)
