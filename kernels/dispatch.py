"""Which implementation of a kernel runs: a named one or an error, never a silent fallback."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


def platform() -> str:
    """The platform that programs are compiled for: "cpu", "gpu" or "tpu".

    That of the abstract mesh's device (`jax.sharding.use_abstract_mesh`), so that a host without a TPU compiles what
    one would run; else that of `jax.default_device`; else that of this process.
    """
    config: Any = jax.config
    device: Any = jax.sharding.get_abstract_mesh().abstract_device or config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else str(device.platform)


@dataclass(frozen=True, slots=True)
class Implementation:
    """One implementation of a kernel."""

    call: Callable[..., Any]
    """Takes what the public function takes, checked and complete."""
    obstacle: Callable[[], str | None] = lambda: None
    """The rule and what breaks it here, as `must` goes on; None where it can run."""


def choose(kernel: str, implementations: Mapping[str, Implementation], name: str | None) -> Callable[..., Any]:
    """The implementation called `name`, or for None the first that can run here.

    Args:
      kernel: the public function, for errors.
      implementations: by name, the preferred ones first.
      name: what the caller asked for.

    Raises:
      ValueError: if there is no implementation of that name.
      NotImplementedError: if it cannot run here, with the reason.
    """
    if name is None:
        name = next(name for name, candidate in implementations.items() if candidate.obstacle() is None)
    elif name not in implementations:
        known = ", ".join(repr(known) for known in implementations)
        raise ValueError(
            f"the implementation of {kernel} must be one of {known} or None, but received {name!r}. "
            "Pass None for the best here."
        )
    if (reason := implementations[name].obstacle()) is not None:
        raise NotImplementedError(
            f"the implementation {name!r} of {kernel} must {reason}. Pass None for the best here."
        )
    return implementations[name].call
