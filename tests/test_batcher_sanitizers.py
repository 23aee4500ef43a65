"""The native core under sanitizers: its threads alone, and from Python. tests/native/fuzz drives the rest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SURFACE = ["pairs", "counted", "native", "pair_refusals", "threads"]

pytestmark = pytest.mark.slow


def library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_the_threads_alone(kind: str, tmp_path: Path) -> None:
    core = [path for path in (ROOT / "csrc").glob("*.cc") if not path.name.startswith("bindings")]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", f"-fsanitize={kind}"]
    program = tmp_path / "stress"
    sources = [*core, ROOT / "tests/native/stress_loader.cc"]
    subprocess.run(["g++", *flags, f"-I{ROOT}/csrc", "-pthread", *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loader holds" in done.stdout


def test_from_python(tmp_path: Path) -> None:
    """The tests of the batcher, with the extension under the address sanitizer.

    Python itself is not: the sanitizer is loaded before it, together with the C++ library whose exceptions it watches,
    and leaks are not looked for.
    """
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
    site = tmp_path / "site"
    # A copy: where the checkout was built before, setuptools would take its objects.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "bench", "docs", "*.so"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(site), str(source)],
        env=os.environ | {"CFLAGS": flags, "LDFLAGS": "-fsanitize=address,undefined"},
        check=True,
    )
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    where = "import fastpref.data._native as b; print(b.__file__)"
    # An extension that is instrumented cannot be loaded without the sanitizer.
    bare = {name: value for name, value in environment.items() if name != "LD_PRELOAD"}
    assert subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=bare, capture_output=True).returncode != 0
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
    # What is not in the way of the sanitizer: it multiplies memory, and knows nothing of what JAX does with it.
    outside = "not leave_nothing and not the_process and not fork and not waits and not jax and not wakes"
    tests = [str(ROOT / f"tests/test_batcher_{name}.py") for name in SURFACE]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, *tests, "-k", outside], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR: AddressSanitizer" not in done.stderr
