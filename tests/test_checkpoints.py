"""A checkpoint comes back bit for bit, or says why not and lets the one before come back."""

import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orjson
import pytest

from fastpref.data import files as durable
from fastpref.data import hashes
from fastpref.method.errors import CheckpointError, CheckpointWarning
from fastpref.runs import checkpoints
from fastpref.runs.checkpoints import restore, save, steps

FINGERPRINT = {"algorithm": "ipo-md", "tau": 1.0, "optimizer": {"name": "adafactor", "learning_rate": 1e-4}}


class Moments(NamedTuple):
    mean: jax.Array
    nothing: None
    nested: tuple[jax.Array, ...]


def state(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = {"layer": {"w": jnp.asarray(rng.normal(size=(16, 40)), jnp.float32)}, "bias": jnp.ones(7)}
    bits = jnp.asarray(rng.integers(0, 2**16, size=(5, 9)), jnp.uint16)
    optimizer = optax.adafactor(1e-4, decay_rate=0.8, min_dim_size_to_factor=8)
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "moments": Moments(jax.lax.bitcast_convert_type(bits, jnp.bfloat16), None, (jnp.arange(3, dtype=jnp.int32),)),
        "key": jax.random.key_data(jax.random.key(seed)),
        "flag": jnp.asarray([True, False]),
        "zero_d": jnp.asarray(seed, jnp.int32),
        "empty": jnp.zeros((0, 4), jnp.float32),
        "odd": jnp.asarray([np.nan, np.inf, -0.0, 1e-45, 3.4e38], jnp.float32),
        "weak": jnp.full((3,), 0.5),
        "weak_zero_d": jnp.asarray(2.0),
    }


def small(step: int) -> dict[str, jax.Array]:
    return {"w": jnp.full((64,), step, jnp.float32)}


def bits(array: jax.Array) -> tuple[Any, ...]:
    return array.shape, array.dtype, array.weak_type, np.asarray(array).tobytes()


def assert_same(left: Any, right: Any) -> None:
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    assert [bits(leaf) for leaf in jax.tree.leaves(left)] == [bits(leaf) for leaf in jax.tree.leaves(right)]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [0, 100, checkpoints.SMALL])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(checkpoints, "SMALL", limit)
    saved = state(3)
    extra = {"batcher": bytes(range(256)), "nothing": b""}
    path = save(tmp_path / "new" / "checkpoints", 12, saved, extra, fingerprint=FINGERPRINT, keep=1)
    # What is read follows from what was written, not from today's limit.
    monkeypatch.undo()
    found = restore(path.parent, state(4), fingerprint=FINGERPRINT)
    assert found is not None
    assert (found.step, found.extra) == (12, extra)
    assert_same(found.arrays, saved)
    part = {name: saved[name] for name in ("weak", "moments", "odd", "empty")}
    assert_same(checkpoints.read(path, part), part)


def test_small_arrays_are_few_on_disk(tmp_path: Path) -> None:
    many = {f"{number}": jnp.full((number + 1,), number, jnp.float32) for number in range(40)}
    path = save(tmp_path, 1, many | {"large": jnp.ones((checkpoints.SMALL // 4,))}, {}, fingerprint={}, keep=1)
    stored = orjson.loads((path / "arrays" / "_METADATA").read_bytes())["tree_metadata"]
    assert len(stored) == 2


def test_shapes_alone_are_enough_to_restore(tmp_path: Path) -> None:
    saved = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "empty": jnp.zeros((0,), jnp.int32)}
    save(tmp_path, 1, saved, {}, fingerprint={}, keep=1)
    found = restore(tmp_path, jax.eval_shape(lambda: saved), fingerprint=None)
    assert found is not None
    assert_same(found.arrays, saved)


def test_an_empty_place_has_no_checkpoint(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        assert restore(place, small(0), fingerprint=None) is None
        assert steps(place) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(0, 50, 10):
        save(tmp_path, step, small(step), {}, fingerprint={}, keep=2)
    assert steps(tmp_path) == [30, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000030", "00000040"]


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    for value in (1, 2):
        save(tmp_path, 5, small(value), {"value": b"%d" % value}, fingerprint={}, keep=1)
    found = restore(tmp_path, small(0), fingerprint={})
    assert found is not None
    assert found.extra == {"value": b"2"}
    assert_same(found.arrays, small(2))


def test_what_a_killed_save_left_is_removed_or_brought_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, small(step), {}, fingerprint={}, keep=3)
    (tmp_path / "00000003").rename(tmp_path / ".old-00000003")  # died between the two renames of a replacement
    shutil.copytree(tmp_path / "00000002", tmp_path / ".old-00000002")  # died just after them
    (tmp_path / ".tmp-00000004" / "arrays").mkdir(parents=True)
    assert steps(tmp_path) == [1, 2, 3]
    found = restore(tmp_path, small(0), fingerprint={})
    assert found is not None
    assert_same(found.arrays, small(3))
    save(tmp_path, 4, small(4), {}, fingerprint={}, keep=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002", "00000003", "00000004"]


@pytest.mark.parametrize("damage", ["flip", "empty", "half", "short", "absent"])
def test_damage_to_any_file_is_found_and_the_step_before_is_used(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step), {"step": b"%d" % step}, fingerprint=FINGERPRINT, keep=2)
    rng = random.Random(damage)
    newest = tmp_path / "00000002"
    names = sorted(files(newest))
    assert {"manifest", "extra/step"} < set(names)
    assert len(names) > 6
    for name in names:
        path = newest / name
        before = path.read_bytes()
        after = bytearray(before)
        after[rng.randrange(len(after))] ^= 1 << rng.randrange(8)
        cut = {"flip": bytes(after), "empty": b"", "half": before[: len(before) // 2], "short": before[:-1]}
        path.unlink() if damage == "absent" else path.write_bytes(cut[damage])
        with pytest.warns(CheckpointWarning, match=rf"step 2 is damaged and passed over: .*{path.name}"):
            found = restore(tmp_path, state(0), fingerprint=FINGERPRINT)
        assert found is not None, name
        assert found.extra == {"step": b"1"}, name
        path.write_bytes(before)
    found = restore(tmp_path, state(0), fingerprint=FINGERPRINT)
    assert found is not None
    assert found.step == 2
    assert_same(found.arrays, state(2))


def test_when_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, small(step), {"step": b"%d" % step}, fingerprint={}, keep=2)
        (tmp_path / f"{step:08d}" / "extra" / "step").write_bytes(b"{}")
    with (
        pytest.warns(CheckpointWarning, match="extra/step"),
        pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(steps \[2, 1\]"),
    ):
        restore(tmp_path, small(0), fingerprint={})


def test_a_damaged_later_step_does_not_outlive_the_run_that_passed_it_over(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, small(step), {"step": b"%d" % step}, fingerprint={}, keep=3)
    (tmp_path / "00000030" / "extra" / "step").write_bytes(b"{}")
    with pytest.raises(
        CheckpointError, match=r"must be the newest .* but received step 15 beside step 20 of another run"
    ):
        save(tmp_path, 15, small(15), {}, fingerprint={}, keep=1)
    assert steps(tmp_path) == [10, 20, 30]
    save(tmp_path, 25, small(25), {}, fingerprint={}, keep=1)
    assert steps(tmp_path) == [25]


def test_another_configuration_is_refused_with_each_difference(tmp_path: Path) -> None:
    save(tmp_path, 1, small(1), {}, fingerprint=FINGERPRINT | {"seeds": (1, 2)}, keep=1)
    now = {"algorithm": "ipo-md", "tau": 0.5, "optimizer": {"name": "adafactor"}, "seeds": (1, 3), "new": True}
    with pytest.raises(CheckpointError, match="belongs to another configuration") as caught:
        restore(tmp_path, small(0), fingerprint=now)
    assert str(caught.value).splitlines()[1:-1] == [
        "  new: absent in the checkpoint, True now",
        "  optimizer.learning_rate: 0.0001 in the checkpoint, absent now",
        "  seeds: [1, 2] in the checkpoint, [1, 3] now",
        "  tau: 1.0 in the checkpoint, 0.5 now",
    ]
    assert "Set these back to resume" in str(caught.value)
    assert restore(tmp_path, small(0), fingerprint=None) is not None


def test_another_model_is_refused_with_each_difference(tmp_path: Path) -> None:
    save(tmp_path, 1, {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(1)}, {}, fingerprint={}, keep=1)
    like = {"a": jnp.ones((3, 2)), "b": jnp.ones(4, jnp.bfloat16), "d": jnp.ones(1)}
    with pytest.raises(CheckpointError, match="do not fit this model and optimiser") as caught:
        restore(tmp_path, like, fingerprint={})
    assert str(caught.value).splitlines()[1:-1] == [
        "  ['a']: float32[2,3] in the checkpoint, float32[3,2] wanted",
        "  ['b']: float32[4] in the checkpoint, bfloat16[4] wanted",
        "  ['c']: float32[1] in the checkpoint, absent wanted",
        "  ['d']: absent in the checkpoint, float32[1] wanted",
    ]


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"step": -1}, "step must be at least 0"),
        ({"keep": 0}, "keep at least 1, but received step=1, keep=0"),
        ({"arrays": {"w": np.ones(3)}}, r"received ndarray at arrays\['w'\]. Convert it with"),
        ({"arrays": {"lr": 0.1}}, r"received float at arrays\['lr'\]"),
        ({"arrays": {"key": jax.random.key(0)}}, "typed PRNG key, .* Save jax.random.key_data"),
        (
            {"arrays": {"none": None, "w": jnp.zeros(0)}},
            "at least one number, but received 1 leaves, all empty",
        ),
        (
            {"fingerprint": {"dtype": np.dtype("float32")}},
            "fingerprint must be JSON, but received .* Convert",
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path, changed: Any, rule: str) -> None:
    arguments = {"step": 1, "arrays": small(1), "extra": {}, "fingerprint": {}, "keep": 1} | changed
    with pytest.raises(ValueError, match=rule):
        save(tmp_path / "here", **arguments)
    assert not (tmp_path / "here").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match="by one process, but received a run of 2"):
        save(tmp_path, 1, small(1), {}, fingerprint={}, keep=1)
    with pytest.raises(CheckpointError, match="by one process, but received a run of 2"):
        restore(tmp_path, small(1), fingerprint={})


@pytest.mark.parametrize(
    ("module", "where"),
    [(checkpoints, "_write_arrays"), (hashes, "of_file"), (durable, "force_to_disk"), (durable, "_sync")],
)
def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, where: str
) -> None:
    save(tmp_path, 1, small(1), {}, fingerprint={}, keep=1)
    before = files(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, where, full)
        with pytest.raises(CheckpointError, match=r"step 2 could not be written to .*0002: .*No space left on device"):
            save(tmp_path, 2, small(2), {}, fingerprint={}, keep=1)
    assert files(tmp_path) == before
    assert steps(tmp_path) == [1]
    save(tmp_path, 2, small(2), {}, fingerprint={}, keep=1)
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_failed_replacement_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    save(tmp_path, 1, small(1), {}, fingerprint={}, keep=1)
    before = files(tmp_path)
    rename = Path.rename

    def fails_for_the_new_one(path: Path, target: Path) -> Path:
        if path.parent.name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    def fails(new: Path, path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ctypes.CDLL", lambda *_: object())
    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    if exchanges:
        monkeypatch.setattr(durable, "_exchange", fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 1, small(2), {}, fingerprint={}, keep=1)
    assert files(tmp_path) == before


@pytest.mark.parametrize("part", ["extra/step", "arrays/"])
def test_a_published_checkpoint_that_lacks_a_part_is_passed_over(tmp_path: Path, part: str) -> None:
    """Neither the files nor the manifest have the part: another process took it away while it was written."""
    for step in (1, 2):
        save(tmp_path, step, small(step), {"step": b"%d" % step}, fingerprint={}, keep=2)
    newest = tmp_path / "00000002"
    body = hashes.unsealed((newest / "manifest").read_bytes())
    for name in [name for name in body["files"] if name.startswith(part)]:
        (newest / name).unlink()
        del body["files"][name]
    (newest / "manifest").write_bytes(hashes.sealed(body))
    with pytest.warns(
        CheckpointWarning, match=f"step 2 is damaged and passed over: .*{part.rstrip('/')}: no such part"
    ):
        found = restore(tmp_path, small(0), fingerprint={})
    assert found is not None
    assert (found.step, found.extra) == (1, {"step": b"1"})
    assert_same(found.arrays, small(1))


def test_a_checkpoint_that_loses_a_part_while_it_is_written_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, small(1), {"step": b"1"}, fingerprint={}, keep=1)
    write = checkpoints._write_arrays

    def taken_away(directory: Path, *arguments: Any) -> None:
        write(directory, *arguments)
        (directory.parent / "extra" / "step").unlink()

    monkeypatch.setattr(checkpoints, "_write_arrays", taken_away)
    with pytest.raises(CheckpointError, match=r"extra/step: no such part is in the manifest"):
        save(tmp_path, 2, small(2), {"step": b"2"}, fingerprint={}, keep=1)
    assert steps(tmp_path) == [1]


def test_a_manifest_of_another_version_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, small(step), {}, fingerprint={}, keep=2)
    manifest = tmp_path / "00000002" / "manifest"
    content = hashes.unsealed(manifest.read_bytes())
    del content["extra"]
    manifest.write_bytes(hashes.sealed(content))
    with pytest.warns(CheckpointWarning, match=r"step 2 .*manifest: it must have an entry 'extra', and has none"):
        found = restore(tmp_path, small(0), fingerprint={})
    assert found is not None
    assert found.step == 1


def test_arrays_that_orbax_cannot_read_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step, small(step), {"step": b"%d" % step}, fingerprint={}, keep=2)
    read = checkpoints._read_arrays

    def fails_for_the_newest(directory: Path, *arguments: Any) -> Any:
        if "00000002" in directory.parts:
            raise FileNotFoundError("no _METADATA")
        return read(directory, *arguments)

    monkeypatch.setattr(checkpoints, "_read_arrays", fails_for_the_newest)
    with pytest.warns(CheckpointWarning, match=r"step 2 is damaged .*Orbax lacks a part of it \(no _METADATA\)"):
        found = restore(tmp_path, small(0), fingerprint={})
    assert found is not None
    assert found.step == 1


def test_a_file_that_may_not_grow_is_a_clear_error_from_orbax_too(tmp_path: Path) -> None:
    save(tmp_path, 1, small(1), {}, fingerprint={}, keep=1)
    before = files(tmp_path)
    noise = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 could not be written to .*0002"):
            save(tmp_path, 2, noise, {}, fingerprint={}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before


def test_an_interrupt_leaves_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "force_to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, small(1), {}, fingerprint={}, keep=1)
    assert list(tmp_path.iterdir()) == []


SAVER = """
import sys, jax.numpy as jnp
from fastpref.runs import checkpoints
directory = sys.argv[1]
like = {f"layer{i}": jnp.zeros((50, 50)) for i in range(6)}
found = checkpoints.restore(directory, like, fingerprint={"run": 1})
step = found.step if found else 0
while True:
    step += 1
    arrays = {name: jnp.full((50, 50), step * 7 + i, jnp.float32) for i, name in enumerate(like)}
    checkpoints.save(directory, step, arrays, {"step": b"%d" % step}, fingerprint={"run": 1}, keep=2)
    print(step, flush=True)
"""


def test_a_killed_process_always_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(20260101)
    like = {f"layer{i}": jnp.zeros((50, 50)) for i in range(6)}
    reached = 0
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONWARNINGS": "error::UserWarning"},
        )
        assert child.stdout is not None
        for _ in range(rng.randint(1, 3)):
            assert child.stdout.readline().strip() == str(reached + 1).encode()
            reached += 1
        time.sleep(rng.uniform(0, 0.25))
        child.kill()
        child.wait()
        lines = child.stdout.read().split()
        child.stdout.close()
        reached = max([reached, *map(int, lines)])
        with warnings.catch_warnings():
            warnings.simplefilter("error", CheckpointWarning)
            found = restore(tmp_path, like, fingerprint={"run": 1})
        assert found is not None
        assert found.step - reached in (0, 1)  # published, but killed before it could say so
        reached = found.step
        assert found.extra == {"step": b"%d" % reached}
        assert_same(
            found.arrays, {name: jnp.full((50, 50), reached * 7 + i, jnp.float32) for i, name in enumerate(like)}
        )
    save(tmp_path, reached + 1, like, {}, fingerprint={"run": 1}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"{reached + 1:08d}"]
