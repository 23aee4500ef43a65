"""Public names that load their module on first use, so that importing one room loads nothing of the others."""

import ast
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EXTRAS = {
    "train": (
        "flax", "jinja2", "matplotlib", "optax", "orbax.checkpoint", "orjson", "pyarrow", "rich", "safetensors",
        "tensorboardX", "tokenizers",
    ),
    "http": ("httpx",),
}  # fmt: skip
"""Modules that `pip install fastpref` leaves out, by the extra that brings them."""

EXTENSION = "fastpref.data._native"


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package, read from the imports of its stub `__init__.pyi`.

    Args:
      package: its `__name__`.
      file: its `__file__`.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text())
    homes = {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if alias.asname == alias.name
    }

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            home = vars(importlib.import_module(homes[name]))
            return home[name] if name in home else importlib.import_module(f"{homes[name]}.{name}")
        except ModuleNotFoundError as error:
            raise _explained(f"{package}.{name}", [error.name or ""]) from error

    public = sorted(name for name in homes if not name.startswith("_"))
    return load, lambda: public, public


def need(extra: str, room: str) -> None:
    """Raise ImportError, which says what to install, unless the modules of an extra are there."""
    missing = [name for name in EXTRAS[extra] if find_spec(name.partition(".")[0]) is None]
    if missing:
        raise _explained(room, missing)


def _explained(name: str, missing: list[str]) -> ImportError:
    if missing == [EXTENSION]:
        return ImportError(
            f"{name} must have the compiled extension, but received an install without it: no C++20 compiler was found "
            "when it was built. Install a compiler, then fastpref again (pip install --force-reinstall --no-cache-dir)."
        )
    extra = next((extra for extra, modules in EXTRAS.items() if set(missing) & set(modules)), None)
    remedy = f"Do pip install 'fastpref[{extra}]'." if extra else "Install them."
    return ImportError(f"{name} must have its modules, but received an install without {', '.join(missing)}. {remedy}")
