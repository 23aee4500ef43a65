"""Heads of models that are read side by side: as many rows in each, however their vocabularies are padded."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flax import nnx

from fastpref.method.errors import ModelError, ModelWarning
from fastpref.models.decoder import Decoder
from fastpref.models.huggingface import LanguageModel, abstract_module
from fastpref.models.lowrank import dense
from fastpref.models.t5 import T5


def shared_rows(models: Sequence[LanguageModel]) -> list[LanguageModel]:
    """Models whose heads have as many rows as the smallest of them.

    Checkpoints of one family pad their vocabulary to different sizes (151936 and 152064 of Qwen2.5). The rows past the
    smallest head belong to no token: they are taken out of the larger models, for good, and a warning says so. Their
    share of the probability goes to the other rows.

    Args:
      models: read side by side, by one tokenizer: that of the first.

    Returns:
      The models in their order; those that need no cut are the same objects.

    Raises:
      ModelError: a token of the first model's tokenizer would lose its row, or a larger module is not of this package.
    """
    rows = min(model.module.vocab_size for model in models)
    larger = {id(model): model for model in models if model.module.vocab_size > rows}
    known = models[0].tokenizer.vocab_size
    for model in larger.values():
        sizes = " and ".join(map(str, sorted({one.module.vocab_size for one in models}, reverse=True)))
        if known > rows or not isinstance(model.module, T5 | Decoder):
            reason = f"a tokenizer of {known} ids" if known > rows else f"a {type(model.module).__name__}, not cut here"
            raise ModelError(
                f"models that are read side by side must have heads of as many rows, but received {sizes}, with "
                f"{reason}. Give them one number of rows with transformers: resize_token_embeddings."
            )
        warnings.warn(
            f"heads of {sizes} rows are read as {rows}: the rest belongs to no token of the tokenizer (ids below "
            f"{known}), and is taken out of the larger model, also where it is saved",
            ModelWarning,
            stacklevel=3,
        )
    made = {key: cut(model, rows) for key, model in larger.items()}
    return [made.get(id(model), model) for model in models]


def cut(model: LanguageModel, rows: int) -> LanguageModel:
    """The model with the first rows of its embedding and head alone."""
    module: Any = model.module
    config = replace(module.config, vocab_size=rows)
    graph, state = nnx.split(abstract_module(config))
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(state)}
    leaves = {
        path: variable
        if tuple(variable.shape) == shapes[path]
        else variable.replace(dense(variable[...])[tuple(slice(side) for side in shapes[path])])
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }
    raw = {**model.config, "vocab_size": rows} if model.config else model.config
    # What lies in the directory is no longer this model.
    return replace(model, module=nnx.merge(graph, nnx.from_flat_state(leaves)), config=raw, source=None)
