"""Checkpoints that survive a killed process and a damaged disk.

Orbax writes the arrays. Around it: a step is written beside its place, every file is hashed and forced to disk, and one
rename makes the step appear; so a step that is listed was complete when it was written. Orbax restores a flipped bit
without a word; here the hashes find it, and `restore` takes the step before.

    checkpoints/00000040/manifest      sealed JSON: step, fingerprint, arrays, names of extra, and the files
    checkpoints/00000040/extra/        small values beside the arrays, each a file
    checkpoints/00000040/arrays/       what Orbax wrote: large arrays by their names, small ones end to end, by dtype
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import orjson

from fastpref.data import files, hashes
from fastpref.method.errors import CheckpointError, CheckpointWarning, WriteError

MANIFEST = "manifest"
SMALL = 1 << 20
"""Bytes of an array from which it is stored by itself. Each costs Orbax a millisecond, and adapters are a thousand."""

Leaf = jax.Array | jax.ShapeDtypeStruct


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `restore` found."""

    step: int
    arrays: Any
    """The tree that was saved, in the structure and with the shardings of `like`."""
    extra: dict[str, bytes]
    """The values that were saved beside it."""


def steps(directory: Path | str) -> list[int]:
    """Steps that have a checkpoint in `directory`, ascending; empty if there is no such directory.

    Listed means complete when written. Whether the files are still what they were, only `restore` checks.
    """
    return sorted(_step_directories(Path(directory)))


def save(
    directory: Path | str,
    step: int,
    arrays: Any,
    extra: Mapping[str, bytes],
    *,
    fingerprint: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write one checkpoint. When this returns it is on disk, complete and readable by `restore`.

    One process at a time may save to a directory. Whatever an earlier, killed save left is removed first. A checkpoint
    of the same step is replaced; older ones are removed, down to `keep`, once the new one is in place. A failure
    (a full disk, say) leaves the older ones as they were.

    Args:
      directory: where checkpoints live; made if need be.
      step: number of steps taken, at least 0.
      arrays: a tree of `jax.Array`s of any shapes: dictionaries, tuples, named tuples, optimiser states.
        Typed PRNG keys go through `jax.random.key_data` first.
      extra: small values beside the arrays, each written as a file of its name.
      fingerprint: what must be the same at resume, as JSON: configuration, hashes of data and tokenizer.
      keep: checkpoints to keep, this one included, at least 1.

    Returns:
      The directory of this step.

    Raises:
      ValueError: an argument breaks a rule above.
      CheckpointError: the files could not be written, or `directory` holds an intact later step of another run.
    """
    if step < 0 or keep < 1:
        raise ValueError(
            f"step must be at least 0 and keep at least 1, but received step={step}, keep={keep}. Raise them."
        )
    _one_process()
    leaves = _leaves(arrays, "arrays", jax.Array)
    described: dict[str, Any] = {
        "step": step,
        "fingerprint": _plain_json(fingerprint),
        "arrays": {name: _description(leaf) for name, leaf in leaves.items()},
        "small": SMALL,
        "extra": sorted(extra),
    }
    directory = Path(directory).absolute()
    target = directory / f"{step:08d}"
    try:
        files.tidy(directory)
        stale = _later_steps(directory, step)
        with files.replacing(target) as new:
            (new / "extra").mkdir(parents=True)
            for name, value in extra.items():
                (new / "extra" / name).write_bytes(value)
            _write_arrays(new / "arrays", described, leaves)
            described["files"] = hashes.of_tree(new)
            _require_parts(new, described)
            (new / MANIFEST).write_bytes(hashes.sealed(described, indent=2))
    except CheckpointError:
        raise
    except Exception as error:
        reason = files.reason(error) if isinstance(error, WriteError) else error
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {target}: {reason}. "
            f"Free space or mend the disk and run again; steps {steps(directory)} are as they were."
        ) from error
    older = [path for number, path in sorted(_step_directories(directory).items()) if number <= step]
    for path in [*older[:-keep], *stale]:
        files.remove(path)
    return target


def restore(directory: Path | str, like: Any, *, fingerprint: Mapping[str, Any] | None) -> Checkpoint | None:
    """Read the newest checkpoint whose files are all as they were written.

    Args:
      directory: where `save` wrote.
      like: a tree of `jax.Array`s or `jax.ShapeDtypeStruct`s: structure, shapes, dtypes, weak types and shardings of
        the result. Arrays come back bit for bit.
      fingerprint: must equal the saved one; None asks for no check, for readers that only look.

    Returns:
      The checkpoint, or None if `directory` has none.

    Raises:
      CheckpointError: all checkpoints are damaged, the fingerprint differs, or `like` does not fit.

    Warns:
      CheckpointWarning: for each damaged checkpoint that is passed over, with its step and file.
    """
    _one_process()
    wanted = _leaves(like, "like", Leaf)
    found = sorted(_step_directories(Path(directory).absolute()).items(), reverse=True)
    for step, path in found:
        try:
            manifest = _verified(path)
            if fingerprint is not None:
                _check_fingerprint(path, manifest["fingerprint"], _plain_json(fingerprint))
            tree = _read_tree(path, manifest, wanted, like, part=False)
            return Checkpoint(step, tree, {name: (path / "extra" / name).read_bytes() for name in manifest["extra"]})
        except _Damage as damage:
            warnings.warn(
                f"the checkpoint of step {step} is damaged and passed over: {damage}", CheckpointWarning, stacklevel=2
            )
    if found:
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged (steps {[step for step, _ in found]}; the warnings name the "
            "files). Bring one back from a copy, or remove the directory to start again."
        )
    return None


def read(path: Path | str, like: Any) -> Any:
    """Read some arrays of one checkpoint: those that `like` has.

    Args:
      path: the directory of one step, as `save` returned it.
      like: as for `restore`, but a part of the tree that was saved, under the same paths; the result has its structure.

    Raises:
      CheckpointError: the checkpoint is damaged, or `like` is no part of it.
    """
    _one_process()
    path, wanted = Path(path).absolute(), _leaves(like, "like", Leaf)
    try:
        return _read_tree(path, _verified(path), wanted, like, part=True)
    except _Damage as damage:
        raise CheckpointError(f"{path} must be as it was written, but is not: {damage}. Choose another step.") from None


class _Damage(Exception):
    """A file of a checkpoint is not what was written."""


def _one_process() -> None:
    if jax.process_count() > 1:
        raise CheckpointError(
            f"checkpoints must be written and read by one process, but received a run of {jax.process_count()}. "
            "Use Orbax's CheckpointManager from a callback."
        )


# Names on disk ------------------------------------------------------------------------------------------------------


def _step_directories(directory: Path) -> dict[int, Path]:
    """Where each step lies: its own directory, or its former one if a save died while it was replacing it."""
    lying = sorted(directory.iterdir()) if directory.is_dir() else []  # ".old-…" sorts before digits, so loses
    named = [(re.fullmatch(r"(?:\.old-)?([0-9]{8,})", path.name), path) for path in lying]
    return {int(match[1]): path for match, path in named if match}


def _later_steps(directory: Path, step: int) -> list[Path]:
    """Damaged checkpoints past `step`, which `restore` passed over and this run has outlived."""
    later = [(number, path) for number, path in _step_directories(directory).items() if number > step]
    for number, path in later:
        try:
            _verified(path)
        except _Damage:
            continue
        raise CheckpointError(
            f"a checkpoint must be the newest of its directory, but received step {step} beside step {number} of "
            f"another run in {directory}. Resume from that, or choose another directory."
        )
    return [path for _, path in later]


# Files --------------------------------------------------------------------------------------------------------------


def _require_parts(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `_Damage` unless a manifest lists every part that `restore` reads."""
    listed = manifest["files"]
    missing = [f"extra/{name}" for name in manifest["extra"] if f"extra/{name}" not in listed]
    if not any(name.startswith("arrays/") for name in listed):
        missing.append("arrays")
    if missing:
        raise _Damage(f"{path / missing[0]}: no such part is in the manifest")


def _verified(path: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it."""
    name = MANIFEST
    try:
        manifest = hashes.unsealed((path / name).read_bytes())
        _require_parts(path, manifest)
        for name, written in manifest["files"].items():
            here = hashes.of_file(path / name)
            if here != written:
                raise _Damage(f"{path / name}: {here} differs from the manifest's {written}")
    except OSError as error:
        raise _Damage(f"{path / name}: {error.strerror}") from error
    except ValueError as error:
        raise _Damage(f"{path / name}: {error}") from error
    except KeyError as error:
        raise _Damage(f"{path / MANIFEST}: it must have an entry {error}, and has none") from error
    return manifest


# Values -------------------------------------------------------------------------------------------------------------


def _plain_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """What `value` is once it has been through JSON: tuples become lists."""
    try:
        plain: dict[str, Any] = orjson.loads(orjson.dumps(dict(value)))
    except TypeError as error:
        raise ValueError(
            f"fingerprint must be JSON, but received {dict(value)}: {error}. Convert its values to text or numbers."
        ) from error
    return plain


def _check_fingerprint(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = dict(_fields(saved)), dict(_fields(now))
    differing = [
        f"  {name}: {_show(before, name)} in the checkpoint, {_show(after, name)} now"
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or before[name] != after[name]
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another configuration:\n"
            + "\n".join(differing)
            + "\nSet these back to resume, or choose another run directory to start again."
        )


def _fields(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves of nested JSON objects, under dotted names."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _fields(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _show(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"


# Arrays -------------------------------------------------------------------------------------------------------------


def _leaves(tree: Any, argument: str, kinds: Any) -> dict[str, Any]:
    """Leaves by their paths, such as "['params']['w']"; one flat level keeps Orbax's metadata small."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if not isinstance(leaf, kinds):
            raise ValueError(
                f"every leaf of {argument} must be a jax.Array, but received {type(leaf).__name__} at "
                f"{argument}{name}. Convert it with jnp.asarray, or save it in extra."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"every leaf of {argument} must be plain numbers, but received a typed PRNG key, {leaf.dtype}, at "
                f"{argument}{name}. Save jax.random.key_data(key), and make it again with jax.random.wrap_key_data."
            )
    if not any(leaf.size for leaf in leaves.values()):
        raise ValueError(
            f"{argument} must hold at least one number, but received {len(leaves)} leaves, all empty. "
            "Save its values in extra."
        )
    return leaves


def _description(leaf: Leaf) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _check_arrays(path: Path, saved: Mapping[str, str], wanted: Mapping[str, Leaf]) -> None:
    now = {name: _description(leaf) for name, leaf in wanted.items()}
    differing = [
        f"  {name}: {saved.get(name, 'absent')} in the checkpoint, {now.get(name, 'absent')} wanted"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if differing:
        shown = differing[:20] + ([f"  and {len(differing) - 20} more"] if len(differing) > 20 else [])
        raise CheckpointError(
            f"the arrays of the checkpoint {path} do not fit this model and optimiser:\n"
            + "\n".join(shown)
            + "\nUse the model and optimiser that wrote it, or another run directory."
        )


def _places(described: Mapping[str, Any]) -> dict[str, tuple[str, slice]]:
    """The stored array that each small array of a manifest lies in, and its part of it."""
    places, ends = {}, Counter[str]()
    for name, description in described["arrays"].items():
        dtype, _, shape = description.removesuffix("]").partition("[")
        size = math.prod(map(int, filter(None, shape.split(","))))
        if 0 < size * jnp.dtype(dtype).itemsize < described["small"]:
            places[name] = f"small {dtype}", slice(ends[dtype], ends[dtype] + size)
            ends[dtype] += size
    return places


def _write_arrays(directory: Path, described: Mapping[str, Any], leaves: Mapping[str, jax.Array]) -> None:
    places = _places(described)
    # Orbax refuses arrays without elements.
    stored: dict[str, Any] = {name: leaf for name, leaf in leaves.items() if leaf.size and name not in places}
    for array in sorted({array for array, _ in places.values()}):
        parts = [np.asarray(leaves[name]).reshape(-1) for name, (inside, _) in places.items() if inside == array]
        stored[array] = np.concatenate(parts)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(stored))


def _read_tree(path: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Leaf], like: Any, *, part: bool) -> Any:
    """The arrays that `like` has, which are all that was saved, or with `part` some of it."""
    saved = manifest["arrays"]
    _check_arrays(path, {name: saved[name] for name in wanted if name in saved} if part else saved, wanted)
    try:
        arrays = _read_arrays(path / "arrays", manifest, wanted)
    except (OSError, KeyError) as error:
        raise _Damage(f"{path / 'arrays'}: Orbax lacks a part of it ({error})") from error
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def _read_arrays(directory: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Leaf]) -> dict[str, jax.Array]:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = {name: place for name, place in _places(manifest).items() if name in wanted}
    how: dict[str, Any] = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding or default, global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in wanted.items()
        if leaf.size and name not in places
    }
    how |= {array: ocp.RestoreArgs(restore_type=np.ndarray) for array, _ in places.values()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        read = checkpointer.restore(
            directory,
            args=ocp.args.PyTreeRestore(item=dict.fromkeys(how, 0), restore_args=how, partial_restore=True),
        )
    for name, (array, part) in places.items():
        leaf = wanted[name]
        read[name] = jax.device_put(np.array(read[array][part]).reshape(leaf.shape), leaf.sharding or default)
    return {name: _weakened(read[name], leaf) if leaf.size else jnp.zeros_like(leaf) for name, leaf in wanted.items()}


def _weakened(array: jax.Array, like: Leaf) -> jax.Array:
    """Give back a weak type, which files do not hold: without it the next operation may promote to another dtype."""
    return jnp.zeros_like(like).at[...].set(array) if like.weak_type else array
