"""Models of a run directory: the final one, and those of its checkpoints."""

import dataclasses
from pathlib import Path

import orjson
from flax import nnx

from fastpref.data.tokenizer import Tokenizer
from fastpref.method.adapter import AdapterConfig
from fastpref.models import LanguageModel, load
from fastpref.models.adapters import trainable, with_adapters
from fastpref.models.directories import is_adapter
from fastpref.models.peft import base_of
from fastpref.runs import checkpoints

Model = LanguageModel | str | Path
"""A model, a Hugging Face directory, a run directory (its final model), or one checkpoint of a run."""

WEIGHTS = ("*.safetensors", "adapter_config.json", "model.safetensors.index.json", "pytorch_model*.bin")
"""Files by which a directory is a model's, also where `load` then says why it cannot be read."""


def locate(source: str | Path) -> Path:
    """Where a model is read from, without reading it.

    Args:
      source: a Hugging Face directory, a run directory, or a checkpoint such as `run/checkpoints/00000100`.

    Returns:
      The Hugging Face directory or checkpoint.

    Raises:
      FileNotFoundError: there is none, or the run has no final model yet.
    """
    path = Path(source)
    if (path / "manifest").is_file():
        return path
    for folder in (path, path / "policy", path / "model"):
        if any(match for pattern in WEIGHTS for match in folder.glob(pattern)):
            return folder
    if saved := checkpoints.steps(path / "checkpoints"):
        raise FileNotFoundError(
            f"a run must be finished to give its final model, but {path} stands at step {saved[-1]}. "
            f"Name one of its checkpoints, such as {step_directory(path, saved[-1])}, or finish it."
        )
    raise FileNotFoundError(
        f"a policy must be a model directory, a run directory or a checkpoint of a run, but {path} is "
        f"{'none of them' if path.exists() else 'not there'}. Check the path."
    )


def step_directory(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step of a run lies."""
    return Path(run_dir) / "checkpoints" / f"{step:08d}"


def read_model(source: Model, *, like: Model | None = None) -> LanguageModel:
    """The model that a source names.

    Args:
      source: a `LanguageModel`, which is returned as it is; a Hugging Face directory; a run directory; a checkpoint.
      like: for a checkpoint, a model of the same architecture, whose tokenizer and settings are taken; None for the
        final model of the run.

    Raises:
      FileNotFoundError: there is no such model, or a checkpoint of an unfinished run is read without `like`.
      ValueError: a file of a model directory cannot be read.
      CheckpointError: the checkpoint is damaged, or belongs to another architecture.
    """
    if isinstance(source, LanguageModel):
        return source
    folder = locate(source)
    if not (folder / "manifest").is_file():
        return load(folder)
    pattern = read_model(_final(folder) if like is None else like)
    # The loop saves (parameters or adapters, ...): what follows them stays on disk.
    parts = trainable(pattern, _adapter(folder), seed=0)
    if parts is not None:
        base, adapters = parts
        return with_adapters(pattern, base, checkpoints.read(folder, (adapters,))[0])
    definition, params = nnx.split(pattern.module)
    (restored,) = checkpoints.read(folder, (params,))
    return dataclasses.replace(pattern, module=nnx.merge(definition, restored))


def read_tokenizer(source: Model) -> Tokenizer:
    """The tokenizer of the model that a source names, as for `read_model`; no weights are read.

    Raises:
      FileNotFoundError: there is no such model, or a checkpoint of an unfinished run.
      ValueError: a file of the tokenizer cannot be read.
    """
    if isinstance(source, LanguageModel):
        return source.tokenizer
    folder = locate(source)
    folder = _final(folder) if (folder / "manifest").is_file() else folder
    return Tokenizer.load(
        base_of(folder) if is_adapter(folder) and not (folder / "tokenizer.json").is_file() else folder
    )


def _adapter(checkpoint: Path) -> AdapterConfig | None:
    """The adapter's settings of the run that a checkpoint belongs to, where its config can be read."""
    try:
        table = orjson.loads((checkpoint.absolute().parent.parent / "config.json").read_bytes()).get("adapter")
    except (OSError, orjson.JSONDecodeError, AttributeError):
        return None
    return AdapterConfig.of(table) if isinstance(table, dict) else None


def _final(checkpoint: Path) -> Path:
    """The final model of the run that a checkpoint belongs to."""
    run_dir = checkpoint.absolute().parent.parent
    final = next((run_dir / name for name in ("policy", "model") if (run_dir / name).is_dir()), None)
    if final is None:
        raise FileNotFoundError(
            f"a checkpoint holds parameters alone, and the run of {checkpoint} has no final model to take the rest "
            "from. Pass like=, a model of the same architecture such as the one that the run began with."
        )
    return final
