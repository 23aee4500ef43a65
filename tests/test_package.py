"""The built wheel works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

CHECK = """
import sys
from pathlib import Path
import fastpref, fastpref.kernels
from fastpref.data import PromptBatcher
site = Path(sys.argv[1])
for module in (fastpref, fastpref.kernels, sys.modules["fastpref.data._native"]):
    assert Path(module.__file__).is_relative_to(site), module.__file__
batch = next(PromptBatcher([[1, 2], [3]], batch_size=2, max_tokens=4))
assert sorted(batch.lengths.tolist()) == [1, 2]
"""

KERNELS_ALONE = """
import jax.numpy as jnp
from fastpref.kernels import Head, token_logprobs
print(token_logprobs(jnp.ones((2, 4)), Head(jnp.zeros((8, 4))), jnp.array([1, 2])))
try:
    import fastpref.data.packing
except ImportError as error:
    print(error)
"""


def test_kernels_work_from_an_install_without_a_compiler(tmp_path: Path) -> None:
    site = tmp_path / "site"
    checkout = tmp_path / "checkout"
    for name in ("csrc", "fastpref", "kernels"):
        shutil.copytree(
            ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--target", str(site), str(checkout)],
        env={**os.environ, "CC": "no-compiler", "CXX": "no-compiler"},
        check=True,
    )
    assert not list(site.rglob("*.so"))
    done = subprocess.run(
        [sys.executable, "-c", KERNELS_ALONE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-2.07" in done.stdout
    assert "no C++20 compiler was found when it was built" in done.stdout


def test_the_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("fastpref-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fastpref/py.typed", "fastpref/data/_native.pyi", "fastpref/kernels/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    command = [sys.executable, "-c", CHECK, str(site)]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""}, check=True)
