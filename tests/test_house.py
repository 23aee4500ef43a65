"""The order of the house, read from the sources: who may import whom, and that everything public says what it is."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
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
    assert "fastpref.training" in importers("fastpref.learner")
    assert "fastpref.kernels.token_logprobs" in importers("fastpref.kernels.head")
    assert len(SOURCES) > 30


def test_kernels_import_nothing_of_the_trainer() -> None:
    for name, imported in IMPORTS.items():
        if name.startswith("fastpref.kernels"):
            strangers = {one for one in imported if re.match(r"fastpref(?!\.kernels(\.|$))", one)}
            assert not strangers, name


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        (
            "fastpref._batcher",
            {
                "fastpref.data.batchers",
                "fastpref.data.columns",
                "fastpref.data.packing",
                "fastpref.pair_log",
                "fastpref.tournament",
            },
        ),
        ("matplotlib", {"fastpref.figures", "fastpref.plots", "fastpref.reporting"}),
        ("tensorboardX", {"fastpref.plots", "fastpref.reporting"}),
        ("rich", {"fastpref.plots", "fastpref.reporting", "fastpref.demo"}),
        ("fastpref.cli", set()),
        ("fastpref.demo", {"fastpref.cli", "fastpref.reproduce.studies"}),
        ("kernels", set()),
    ],
)
def test_only_some_rooms_may_import(target: str, allowed: set[str]) -> None:
    assert importers(target) <= allowed
    if allowed:
        assert importers(target)


@pytest.mark.parametrize("name", ["losses", "config", "algorithms", "records"])
def test_the_mathematics_knows_no_loop(name: str) -> None:
    assert f"fastpref.{name}" not in importers("fastpref.training", "fastpref.supervised", "fastpref.cli")


def test_only_the_bindings_know_python() -> None:
    sources = [path for path in (ROOT / "csrc").iterdir() if path.suffix in (".cc", ".h")]
    includes = {path.name for path in sources if re.search(r"#include\s*[<\"](pybind11|Python\.h)", path.read_text())}
    assert includes == {"bindings.cc"}


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
    assert set(fastpref.__all__) <= set(vars(fastpref))
    assert {"train", "TrainConfig", "ALGORITHMS", "Judge", "Policy"} <= set(fastpref.__all__)
