"""Directories of models: whole checkpoints, and adapters on a base, told apart by their files."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fastpref.method.errors import ModelError, ModelWarning
from fastpref.models.adapters import merged
from fastpref.models.huggingface import LanguageModel, load_whole, save_whole
from fastpref.models.lowrank import is_adapted, is_quantized
from fastpref.models.peft import CONFIG, WEIGHTS, load_adapter, save_adapter

ADAPTER_FILES = (CONFIG, WEIGHTS)
"""Files of an adapter beside those of its tokenizer."""


def load(
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    finite: bool = True,
    body: bool = False,
    base: LanguageModel | None = None,
) -> LanguageModel:
    """Read a checkpoint directory in Hugging Face's layout (`huggingface.load_whole`), or an adapter in PEFT's.

    Args:
      path: a checkpoint, or an adapter whose `base_model_name_or_path` is a directory here.
      dtype: of the parameters, whatever the file has; adapters are float32.
      finite: refuse weights that hold NaN or infinity.
      body: read a model whose states alone are used, by a reward model.
      base: the model that an adapter belongs to, whose arrays are used; None to read the one that its files name.

    Returns:
      The module, a `Policy`, and its tokenizer.

    Raises:
      FileNotFoundError: the directory, one of its files or the base of an adapter is missing.
      ModelError: a file cannot be read, the model is of an unsupported kind, or its parts do not fit each other.
    """
    if is_adapter(Path(path)):
        return load_adapter(path, base=base, dtype=dtype, finite=finite, body=body)
    if base is not None:
        raise ModelError(
            f"a base must come with an adapter's directory, but received {path} with a whole model. Leave base out."
        )
    return load_whole(path, dtype=dtype, finite=finite, body=body)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter alone."""
    # Beside whole weights it is refused, since each may be meant.
    return (path / CONFIG).is_file() and not any(path.glob("model*.safetensors"))


def save(
    model: LanguageModel,
    path: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a directory that `load` and Hugging Face's libraries read; of a model with an adapter, that alone.

    A model whose base was loaded from no directory is written whole, its adapter merged, with a `ModelWarning`.

    Args:
      model: what to save.
      path: a new or empty directory, or one that holds a checkpoint and nothing else.
      max_shard_bytes: weights above this size are cut into shards of at most it, one tensor at least in each.
      beside: further files of the checkpoint, contents by name.

    Raises:
      WriteError: the disk refused; the message names `path`, which is as it was.
      TypeError: the module is neither a `T5` nor a `Decoder`.
      ModelError: `model.config` describes another model, no kind of checkpoint fits the module's configuration, or the
        model is in int8 without an adapter.
      FileExistsError: `path` holds files that are no part of a checkpoint.
    """
    params = nnx.state(model.module) if isinstance(model.module, nnx.Module) else {}
    adapted = is_adapted(params)
    if is_quantized(params) and not adapted:
        raise ModelError(
            "a model must be in floating point to be saved whole, but received one in int8. Save the one that it was "
            "made from, or what int8 kept of it: save(merged(model), path)."
        )
    if adapted and not warn_of_merging(model):
        save_adapter(model, path, beside=beside)
    else:
        whole = merged(model) if adapted else model
        save_whole(whole, path, max_shard_bytes=max_shard_bytes, beside=beside)


def warn_of_merging(model: LanguageModel) -> bool:
    """Whether `save` writes a model with an adapter whole, since nothing names its base; says so."""
    if model.source is None:
        warnings.warn(
            "the base of the adapter was loaded from no directory, which its files could name: it is saved merged, as "
            "a whole model",
            ModelWarning,
            stacklevel=3,
        )
    return model.source is None


def as_model(
    model: LanguageModel | str | Path, *, dtype: DTypeLike = jnp.float32, trained: DTypeLike | None = None
) -> LanguageModel:
    """The model itself, or the one that a directory holds.

    Args:
      model: a model or a directory.
      dtype: of what is only read of a directory's model.
      trained: dtype of the parameters where all are trained, unless the directory is an adapter's; else None.
    """
    if isinstance(model, LanguageModel):
        return model
    return load(model, dtype=dtype if trained is None or is_adapter(Path(model)) else trained)
