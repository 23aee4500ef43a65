"""The order of the house, read from the sources: who may import whom, and that everything public says what it is."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastpref

ROOT = Path(__file__).parent.parent
LONGEST = 450


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("fastpref", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for folder in ("fastpref", "kernels") for path in (ROOT / folder).rglob("*.py")}


def imports(name: str) -> Iterator[str]:
    """Everything that a module imports, at its top or inside a function, by full dotted name."""
    path = SOURCES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


IMPORTS = {name: set(imports(name)) for name in SOURCES}


def importers(*targets: str) -> set[str]:
    """The modules that import one of the targets, or something inside it."""
    return {
        name
        for name, imported in IMPORTS.items()
        if any(f"{one}.".startswith(f"{target}.") for one in imported for target in targets)
    }


def test_the_reading_of_imports_finds_what_is_there() -> None:
    assert "fastpref.learning.train" in importers("fastpref.learning.update")
    assert "fastpref.kernels.token_logprobs" in importers("fastpref.kernels.head")
    assert len(SOURCES) > 30


def test_rooms_import_one_way() -> None:
    """An order of the rooms in which each imports only earlier ones exists."""
    rooms = {name.split(".")[1] for name in SOURCES if name.count(".")} - {"cli", "_lazy"}
    arrows = {
        room: {
            target
            for name, imported in IMPORTS.items()
            if f"{name}.".startswith(f"fastpref.{room}.")
            for target in rooms - {room}
            if any(f"{dotted}.".startswith(f"fastpref.{target}.") for dotted in imported)
        }
        for room in rooms
    }
    TopologicalSorter(arrows).prepare()
    assert not arrows["kernels"]
    assert not arrows["method"] - {"kernels"}
    assert not arrows["data"] - {"method"}


def test_kernels_import_nothing_of_the_trainer() -> None:
    for name, imported in IMPORTS.items():
        if name.startswith("fastpref.kernels"):
            strangers = {one for one in imported if re.match(r"fastpref(?!\.kernels(\.|$))", one)}
            assert not strangers, name


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        (
            "fastpref.data._native",
            {
                "fastpref.data.columns",
                "fastpref.data.packing",
                "fastpref.data.row_shapes",
            },
        ),
        ("matplotlib", {"fastpref.reproduce.figures", "fastpref.runs.plots"}),
        ("tensorboardX", {"fastpref.runs.log"}),
        ("rich", {"fastpref.runs.terminal", *(f"fastpref.demo.{name}" for name in ("chat", "run", "small", "stages"))}),
        ("fastpref.cli", set()),
        ("fastpref.demo", {"fastpref.cli", "fastpref.reproduce.studies"}),
        ("kernels", set()),
    ],
)
def test_only_some_rooms_import(target: str, allowed: set[str]) -> None:
    """Exactly these: a module that no longer does is to lose its leave."""
    assert {name for name in importers(target) if not f"{name}.".startswith(f"{target}.")} == allowed


def test_only_the_bindings_know_python() -> None:
    sources = [path for path in (ROOT / "csrc").iterdir() if path.suffix in (".cc", ".h")]
    includes = {
        path.name
        for path in sources
        if re.search(r"#include\s*[<\"](pybind11|Python\.h|bindings\.h)", path.read_text())
    }
    assert includes == {"bindings.cc", "bindings.h", "bindings_batches.cc"}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_module_says_what_it_is_and_stays_short(name: str) -> None:
    text = SOURCES[name].read_text()
    assert (ast.get_docstring(ast.parse(text)) or "").strip(), f"{name} has no docstring"
    assert len(text.splitlines()) <= LONGEST, f"{name} has more than {LONGEST} lines"


@pytest.mark.parametrize("module", ["fastpref", "fastpref.kernels", "fastpref.data", "fastpref.models"])
def test_every_public_name_exists_and_is_documented(module: str) -> None:
    room = importlib.import_module(module)
    assert sorted(set(room.__all__)) == sorted(room.__all__)
    for name in room.__all__:
        value = getattr(room, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            text = value.__doc__ or ""
            # A dataclass or named tuple without a docstring is given its signature as one.
            assert text.strip(), name
            assert not text.startswith(f"{name}("), name


def test_the_top_names_what_it_promises() -> None:
    assert {"train", "TrainConfig", "ALGORITHMS", "Judge", "Policy", "losses", "kernels"} <= set(fastpref.__all__)


TRAINER = [
    "flax",
    "jinja2",
    "matplotlib",
    "optax",
    "orbax",
    "orjson",
    "pyarrow",
    "rich",
    "safetensors",
    "tensorboardX",
    "tokenizers",
]
ALONE = """
import sys
import {room}
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & set({trainer}), loaded
assert not [name for name in sys.modules if name.startswith("fastpref.") and not name.startswith({prefixes})]
"""


def test_evaluation_draws_only_when_it_is_asked_to() -> None:
    rooms = [name for name in SOURCES if name.startswith(("fastpref.evaluation", "fastpref.judging"))]
    code = f"import importlib, sys; list(map(importlib.import_module, {rooms})); sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("room", "prefixes"),
    [
        ("fastpref", ("fastpref._lazy",)),
        ("fastpref.kernels", ("fastpref._lazy", "fastpref.kernels")),
        ("fastpref.data.packing", ("fastpref._lazy", "fastpref.data", "fastpref.method")),
    ],
)
def test_a_room_alone_loads_nothing_of_the_others(room: str, prefixes: tuple[str, ...]) -> None:
    code = ALONE.format(room=room, prefixes=prefixes, trainer=TRAINER)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_import_that_lacks_an_extra_says_which_to_install() -> None:
    code = "import sys; sys.modules['optax'] = None\nimport fastpref.data\nimport fastpref\nfastpref.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "fastpref[train]" in done.stderr, done.stderr
