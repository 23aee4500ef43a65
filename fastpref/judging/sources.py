"""Judges by name: directories of preference and reward models, of the hub's too, servers, and functions."""

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fastpref.data.token_files import read_json
from fastpref.judging.http import HttpJudge
from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.judging.protocol import Judge
from fastpref.method.errors import ConfigError, ModelError, nearest
from fastpref.models import LanguageModel, load
from fastpref.models.configs import architectures_of
from fastpref.models.families import FAMILIES
from fastpref.models.huggingface import SCALAR_HEAD, refuse_adapter
from fastpref.models.tensors import read_header, read_tensor

VALUE_HEAD = "value_head.safetensors"
"""A scalar head stored beside a body."""

FUNCTION = (
    "Write a function f(prompts, first, second) that asks the model and returns p(first beats second), and give it as "
    "the judge: on the command line judge = 'package.module:f'."
)


def load_judge(source: str | Path | Mapping[str, Any], *, base: LanguageModel | None = None) -> Judge:
    """The judge or reward model that a source names.

    Args:
      source: a directory that `PreferenceModel.save` or `RewardModel.save` wrote, or the run directory of its fit; one
        of the hub, with a scalar head: `*ForSequenceClassification` with one label (`score.weight`), or a language
        model with a value head (`v_head.summary.weight`, in its own files or in `value_head.safetensors`);
        `package.module:object`, importable from the working directory; or a mapping with `url` and `model`, and other
        arguments of `HttpJudge`.
      base: the policy's base, say, for a model that was fitted by an adapter on it: its arrays are used, and no second
        copy is read.

    Returns:
      A `PreferenceModel`, a `RewardModel`, an `HttpJudge`, or the object.

    Raises:
      ValueError: none of these, a directory or a setting that cannot be used, or a base for a judge without an adapter.
      FileNotFoundError: a file of a directory is missing.
    """
    for folder in () if isinstance(source, Mapping) else (Path(source), Path(source) / "model"):
        if (folder / "preference_model.json").exists():
            return PreferenceModel.load(folder, base=base)
        if (folder / "reward_model.json").exists():
            return RewardModel.load(folder, base=base)
    if base is not None:
        raise ModelError(
            "a base must come with a preference or reward model that has an adapter on it, but received "
            f"{'a server' if isinstance(source, Mapping) else source}. Leave base out."
        )
    if isinstance(source, Mapping):
        return _server(source)
    return read_reward_model(source) if Path(source).is_dir() else _named(str(source))


def read_reward_model(path: str | Path) -> RewardModel:
    """Read a reward model in Hugging Face's layout; its scores are those that transformers computes.

    A whole conversation is read as the directory's chat template writes it, plain text as prompt, completion and EOS.
    The state of the last token is scored; of a `*ForSequenceClassification`, of the last that is not the padding token
    of its `config.json`, even where that is EOS, as transformers does.

    Args:
      path: a directory of the forms that `load_judge` names.

    Raises:
      ModelError: an encoder such as a DeBERTa ranker of pairs, another number of labels than one, no scalar head, or a
        body that cannot be read.
    """
    source = Path(path)
    refuse_adapter(source)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"the directory of a judge must hold config.json, but received {source} without. Name that of a preference "
            "or reward model, or the run directory of its training."
        )
    raw = read_json({"config.json": (source / "config.json").read_bytes()}, "config.json")
    kind, architectures = str(raw.get("model_type")), architectures_of(raw)
    ranker = "SequenceClassification" in architectures or "PairRM" in architectures
    if "deberta" in kind or "bert" in kind:
        raise ModelError(
            f"a judge must be a decoder with a scalar head, but received {source}, a {kind} "
            f"({architectures}), an encoder as PairRM is, which is not read here. {FUNCTION}"
        )
    head = _scalar_head(source)
    if not head and not any(source.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"a reward model must have its weights as safetensors, but received {source} without. Save them anew with "
            "transformers: AutoModelForSequenceClassification.from_pretrained(...).save_pretrained(...)."
        )
    if not head:
        raise ModelError(
            f"a judge must be the directory of a preference or reward model, but received {source}, which holds no "
            f"scalar head such as score.weight{' for its SequenceClassification' if ranker else ''}. Train one with "
            "`fastpref preference`, or name a reward model."
        )
    name = next(iter(head)).rpartition(".")[0]
    weight = head.get(f"{name}.weight")
    if weight is None or len(head) > 2 or any(key.rpartition(".")[0] != name for key in head):
        raise ModelError(
            f"a reward model must have one scalar head, but received {', '.join(sorted(head))} in {source}. Keep one."
        )
    bias = head.get(f"{name}.bias", np.zeros(1, np.float32))
    if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
        raise ModelError(
            f"a reward model must have one label, but received {name}.weight of shape {weight.shape} in {source}. "
            f"{FUNCTION}"
        )
    model = load(source, body=True)
    classifier = name == "score"
    reward = RewardModel.from_model(
        model,
        max_prompt_tokens=None,
        whole=True,
        pad_id=_pad_id(raw) if classifier else None,
        bias=float(bias[0]),
    )
    if weight[0].shape != reward.module.weight[...].shape:
        raise ModelError(
            f"{name}.weight must have the width of the body, {reward.module.weight[...].shape[0]}, but received "
            f"{weight.shape[1]} in {source}. Use the head that belongs to this body."
        )
    reward.module.weight[...] = jnp.asarray(weight[0])
    return reward


def _pad_id(raw: Mapping[str, Any]) -> int | None:
    """The padding token of the text's configuration; where the file is silent, that of its class in transformers."""
    nested = raw.get("model_type") == "gemma3"
    entries = raw["text_config"] if nested else raw
    family = FAMILIES.get("gemma3_text" if nested else raw["model_type"])
    found = entries.get("pad_token_id", None if family is None else family.defaults.get("pad_token_id"))
    return found if isinstance(found, int) else None


def _scalar_head(source: Path) -> dict[str, np.ndarray]:
    """Tensors of the scalar head, float32 by name, from the weights or from the file beside them."""
    if (source / "value_head.bin").is_file() and not (source / VALUE_HEAD).is_file():
        raise ModelError(
            f"a scalar head must be stored as safetensors, but received {source / 'value_head.bin'}. Save it as "
            f"{VALUE_HEAD}."
        )
    found = {}
    for path in [*sorted(source.glob("model*.safetensors")), *source.glob(VALUE_HEAD)]:
        for name, tensor in read_header(path).items():
            if SCALAR_HEAD.fullmatch(name):
                found[name] = np.asarray(read_tensor(tensor, np.float32, finite=False))
    return found


def _server(source: Mapping[str, Any]) -> HttpJudge:
    settings = [field.name for field in dataclasses.fields(HttpJudge) if field.init]
    for name in source:
        if name not in settings:
            raise ConfigError(f"a judge has no setting of that name, but received {name!r}. {nearest(name, settings)}")
    for name in ("url", "model"):
        if name not in source:
            raise ConfigError(f"a judge behind a server must have url and model, but received none of {name}. Add it.")
    values = dict(source)
    if "answers" in values:
        values["answers"] = tuple(values["answers"])
    return HttpJudge(**values)


def _named(name: str) -> Judge:
    module, _, attribute = name.partition(":")
    if not attribute or "://" in name:
        raise ValueError(
            "a judge must be the directory of a preference or reward model, package.module:function, or a table with "
            f"url and model, but received {name!r}. Train one with `fastpref preference`, or name a function that is "
            "importable from here."
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        judge: Judge = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the judge {name!r} must be importable from {Path.cwd()}, but importing it failed: {error}. "
            "Check the spelling of package.module:function."
        ) from error
    return judge
