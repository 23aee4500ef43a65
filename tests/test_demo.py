"""The demo's promise, for three seeds. Minutes each: run with `pytest -m demo`."""

from pathlib import Path

import orjson
import pytest

from fastpref.demo import small as demo


@pytest.mark.demo
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_aligned_policy_is_preferred(seed: int, tmp_path: Path) -> None:
    result = demo.run(tmp_path, seed=seed, quiet=True)
    assert result.win_rate.low > 0.5
    folder = tmp_path / f"seed-{seed}"
    saved = orjson.loads((folder / "result.json").read_bytes())
    assert saved["win_rate_low"] == result.win_rate.low
    assert (folder / "ipo-md" / "plots" / "overview.png").exists()
    assert len((folder / "side_by_side.jsonl").read_bytes().splitlines()) == len(result.win_rate.prompts)
