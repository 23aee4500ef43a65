"""The built wheel works away from the checkout."""

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
for module in (fastpref, fastpref.kernels, sys.modules["fastpref._batcher"]):
    assert Path(module.__file__).is_relative_to(site), module.__file__
batch = next(PromptBatcher([[1, 2], [3]], batch_size=2, max_tokens=4))
assert sorted(batch.lengths.tolist()) == [1, 2]
"""


def test_the_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("fastpref-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fastpref/py.typed", "fastpref/_batcher.pyi", "fastpref/kernels/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    command = [sys.executable, "-c", CHECK, str(site)]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""}, check=True)
