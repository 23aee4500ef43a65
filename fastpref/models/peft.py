"""Adapter directories in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, in and out."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import safe_open
from safetensors.numpy import save as to_safetensors

from fastpref.data import files, hashes
from fastpref.data.token_files import FILES, read_json
from fastpref.data.tokenizer import Tokenizer
from fastpref.kernels import quantize
from fastpref.method.errors import ModelError, ModelWarning
from fastpref.models.adapters import HEAD, Adapters, Base, linear_modules, sides, sites_of, split, with_adapters
from fastpref.models.huggingface import LanguageModel, load_whole, write_json
from fastpref.models.int8 import quantized_params
from fastpref.models.layers import layers_in
from fastpref.models.lowrank import LowRank, Quantized, is_quantized
from fastpref.models.t5 import T5
from fastpref.models.tensors import Tensor, read_header, read_tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
"""Names of tensors: the module, and which factor it is."""
COPIED = re.compile(r"(?:base_model\.model\.)?(.+)\.base_layer\.weight")
"""Names of kernels that are stored beside their adapter."""
DIGEST = "fastpref.base"
"""Entry of the metadata of the weights: a hash of the base that they were trained on."""
OURS = re.compile(
    "|".join(map(re.escape, (CONFIG, WEIGHTS, files.MANIFEST, "README.md", *FILES))) + r"|chat_template.*"
)
"""Files that an adapter directory consists of."""

UNREAD: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}
"""Entries that are read under these values alone; the others change nothing that is computed here."""


def load_adapter(
    path: str | Path,
    *,
    base: LanguageModel | str | Path | None = None,
    dtype: DTypeLike = jnp.float32,
    finite: bool = True,
    body: bool = False,
) -> LanguageModel:
    """Read an adapter of PEFT's layout, and its base.

    Args:
      path: the directory.
      base: the model that the adapter belongs to; None for the directory that `base_model_name_or_path` names, from
        here or from beside the adapter.
      dtype: of the base; adapters are float32. `lora_dropout` is not read: dropout is off unless a training's `adapter`
        asks for it.
      finite: refuse numbers that are not.
      body: read a base whose states alone are used, by a reward model.

    Returns:
      The model with its adapter, on the arrays of `base` where that is a model.

    Raises:
      FileNotFoundError: the base is no directory, or a file is missing.
      ModelError: the adapter is of another kind than LoRA, or belongs to another base.
    """
    source = Path(path)
    files.check_manifest(source)
    entries = read_json({CONFIG: (source / CONFIG).read_bytes()}, CONFIG)
    for name, allowed in UNREAD.items():
        value = entries.get(name, allowed[0])
        if value not in allowed:
            raise ModelError(
                f"{name} of an adapter must be {' or '.join(repr(choice) for choice in allowed[:1])}, but received "
                f"{value!r} in {source}. Merge it into its base with peft: merge_and_unload()."
            )
    where = base_of(source) if base is None else base
    if not (source / WEIGHTS).is_file():
        raise FileNotFoundError(f"an adapter must hold {WEIGHTS}, but received {source} without. Save it again.")
    tensors = read_header(source / WEIGHTS)
    if not isinstance(where, LanguageModel):
        where = load_whole(where, dtype=dtype, finite=finite, body=body)
    base = where
    if split(base) is not None:
        raise ModelError(
            f"the base of an adapter must be a whole checkpoint, but received one with an adapter for {source}. "
            "Merge that one first: fastpref.models.merged(base)."
        )
    with safe_open(source / WEIGHTS, framework="np") as file:
        digest = (file.metadata() or {}).get(DIGEST)
    params = nnx.state(base.module)
    in_int8 = "int8" in (digest or "").partition(":")[0] and not is_quantized(params)
    known = None if digest is None else base_digest(quantized_params(params) if in_int8 else params)
    # Numbers of another dtype are others; then the shapes alone tell.
    if digest and known and digest.partition(":")[0] == known.partition(":")[0] and digest != known:
        raise ModelError(
            f"an adapter must be read on the base that it was trained on, but received {source} with another "
            f"({entries.get('base_model_name_or_path')!r} has changed, or is not the one). Give the right one as base."
        )
    if in_int8:
        warnings.warn(
            f"{source}: the adapter was trained on its base in int8, and is read on the base itself, which int8 rounds",
            ModelWarning,
            stacklevel=2,
        )
    frozen, adapters = read_factors(source, entries, tensors, base, finite=finite)
    model = with_adapters(base, frozen, adapters)
    if (source / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(source)
        tokenizer.rows = base.tokenizer.rows
        model = replace(model, tokenizer=tokenizer)
    return model


def base_of(source: Path) -> Path:
    """The directory of the base that an adapter names.

    Raises:
      ModelError: it names none.
      FileNotFoundError: it is not here.
    """
    entries = read_json({CONFIG: (source / CONFIG).read_bytes()}, CONFIG)
    name = entries.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"base_model_name_or_path of an adapter must name its base, but received {name!r} in {source}. "
            "Give the base: fastpref.models.load_adapter(path, base=...)."
        )
    for place in (Path(name), source / name, source.parent / name):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"the base of an adapter must be a directory, but received {name!r} in {source}, which is not there. Download "
        "it and give it: fastpref.models.load_adapter(path, base=...); or merge the adapter into its base with peft: "
        f'AutoPeftModelForCausalLM.from_pretrained("{source}").merge_and_unload().save_pretrained("a new path").'
    )


def read_factors(
    source: Path, entries: Mapping[str, Any], tensors: Mapping[str, Tensor], model: LanguageModel, *, finite: bool
) -> tuple[Base, Adapters]:
    """The factors of an adapter, and the base with their sites."""
    named: dict[str, dict[str, Tensor]] = {}
    modules, params = linear_modules(model), nnx.state(model.module)
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None and (copied := COPIED.fullmatch(name)) is not None and copied[1] in modules:
            # PEFT writes a head that has an adapter beside it.
            (place,) = modules[copied[1]].places
            kernel = dict(nnx.to_flat_state(params))[place.path][...]
            copy: Any = read_tensor(tensor, kernel.dtype, turned=True)
            if isinstance(kernel, Quantized):
                copy, kernel = quantize(copy, kernel.axis)[0], kernel.weight
            if not np.array_equal(np.asarray(copy), np.asarray(kernel)):
                raise ModelError(
                    f"{name} must be that of the base, but received another in {source}. Merge the adapter into its "
                    "base with peft: merge_and_unload()."
                )
            continue
        if match is None:
            raise ModelError(
                f"tensors of an adapter must be lora_A and lora_B of modules, but received {name} in {source}. "
                "Merge it into its base with peft: merge_and_unload()."
            )
        named.setdefault(match[1], {})[match[2]] = tensor
    strangers = sorted(named.keys() - modules.keys())
    if strangers or not named:
        raise ModelError(
            f"modules of an adapter must be kernels of its base, but received "
            f"{strangers[0] if strangers else 'none'} in {source}. Give the base that it was trained on."
        )
    factors: dict[str, LowRank] = {}
    for name in (name for name in modules if name in named):
        inner, outer = sides(model, modules[name].places)
        shapes = {factor: tensor.shape for factor, tensor in named[name].items()}
        rank = shapes.get("A", (0,))[0]
        if not rank or shapes != {"A": (rank, inner), "B": (outer, rank)}:
            raise ModelError(
                f"lora_A and lora_B of {name} must have shapes (r, {inner}) and ({outer}, r) for this base, but "
                f"received {shapes.get('A')} and {shapes.get('B')} in {source}. Give the base that it was trained on."
            )
        a, b = (read_tensor(named[name][factor], jnp.float32, turned=True, finite=finite) for factor in "AB")
        factors[name] = LowRank(a, b)
    scales = {name: _scale(entries, name, pair.a.shape[1]) for name, pair in factors.items()}
    sites = sites_of(modules, scales)
    adapters = {}
    for site in sites:
        pairs = [factors[name] for name in site.modules]
        adapters[site.name] = _of_layers(pairs) if site.layers else pairs[0]
    return Base(params, tuple(sites)), adapters


def _of_layers(pairs: list[LowRank]) -> LowRank:
    """Factors one after the other, with zeros beside those of a lower rank."""
    rank = max(pair.a.shape[1] for pair in pairs)
    rest = [rank - pair.a.shape[1] for pair in pairs]
    return LowRank(
        jnp.stack([jnp.pad(pair.a, ((0, 0), (0, more))) for pair, more in zip(pairs, rest, strict=True)]),
        jnp.stack([jnp.pad(pair.b, ((0, more), (0, 0))) for pair, more in zip(pairs, rest, strict=True)]),
    )


def by_module(base: Base, adapters: Adapters) -> dict[str, LowRank]:
    """Factors of each module by its name, without columns of A and rows of B that are both zero, which end them."""
    factors = {}
    for site in base.sites:
        a, b = (np.asarray(factor) for factor in adapters[site.name])
        pairs = zip(a, b, strict=True) if site.layers else [(a, b)]
        for name, (first, second) in zip(site.modules, pairs, strict=True):
            used = np.flatnonzero(first.any(0) | second.any(1))
            rank = int(used[-1]) + 1 if used.size else first.shape[1]
            factors[name] = LowRank(first[:, :rank], second[:rank])
    return factors


def _scale(entries: Mapping[str, Any], name: str, rank: int) -> float:
    """s of a module: α by the pattern that names it, over its rank or the root of it."""
    alpha: Any = entries.get("lora_alpha", 8)
    for pattern, value in (entries.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern.removeprefix('^')})", name):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ModelError(f"lora_alpha of {CONFIG} must be a number above 0, but received {alpha!r}. Copy it again.")
    return float(alpha / (rank**0.5 if entries.get("use_rslora") else rank))


def base_digest(params: Any) -> str:
    """The dtypes of the parameters of a base, and a hash of them by their paths."""
    # Layer by layer, so that a base has one hash however its layers lie in memory.
    numbered: list[tuple[tuple[Any, ...], np.ndarray]] = []
    for path, variable in nnx.to_flat_state(params):
        at = layers_in(path)
        for array in map(np.asarray, jax.tree.leaves(variable[...])):
            parts = (
                [(path, array)]
                if at is None
                else [((*path[: at + 1], number, *path[at + 1 :]), part) for number, part in enumerate(array)]
            )
            numbered += parts
    leaves = [(".".join(map(str, path)), array) for path, array in sorted(numbered, key=lambda leaf: leaf[0])]
    dtypes = ",".join(sorted({str(array.dtype) for _, array in leaves}))
    buffers = (part for name, array in leaves for part in (f"{name}{array.shape}".encode(), array.tobytes()))
    return f"{dtypes}:{hashes.of_buffers(buffers).hex()}"


def save_adapter(
    model: LanguageModel,
    path: str | Path,
    *,
    base: str | Path | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write the adapter of a model in PEFT's layout, with the files of its tokenizer. Its base is not written.

    Args:
      model: a model with an adapter.
      path: a new or empty directory, or one that holds an adapter and nothing else.
      base: where the base lies, as others are to find it; None for where it was loaded from.
      beside: further files of the directory, contents by name.

    Raises:
      ModelError: the model has no adapter, or its base was loaded from nowhere.
      FileExistsError: `path` holds other files.
      WriteError: the disk refused.
    """
    parts, place = split(model), model.source if base is None else base
    if parts is None:
        raise ModelError("a model must have an adapter for it to be saved alone, but received one without. Use save.")
    if place is None:
        raise ModelError(
            "an adapter must name its base, but received one on a base that was loaded from no directory. Give base=, "
            "or save the model with its adapter merged: save(merged(model), path)."
        )
    frozen, adapters = parts
    target, further = Path(path).absolute(), {} if beside is None else beside
    if target.exists():
        present = target.iterdir() if target.is_dir() else [target]
        if foreign := sorted(
            file.name for file in present if not OURS.fullmatch(file.name) and file.name not in further
        ):
            raise FileExistsError(
                f"an adapter must have a directory of its own, but received {target} with {foreign[0]}. Choose "
                "another path."
            )
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": np.ascontiguousarray(np.asarray(array).T)
        for name, pair in by_module(frozen, adapters).items()
        for factor, array in zip("AB", pair, strict=True)
    }
    # One entry alone: of several, safetensors writes the order anew each time.
    metadata = {DIGEST: base_digest(frozen.params)}
    with files.replacing(target) as new:
        new.mkdir()
        write_json(new / CONFIG, described(model, frozen, adapters, str(place)))
        (new / WEIGHTS).write_bytes(to_safetensors(tensors, metadata=metadata))
        model.tokenizer.save(new)
        for name, content in further.items():
            (new / name).write_bytes(content)
        files.write_manifest(new)


def described(model: LanguageModel, base: Base, adapters: Adapters, place: str) -> dict[str, Any]:
    """`adapter_config.json`, whose α is s · r of each module."""
    ranks = {name: int(pair.a.shape[1]) for name, pair in by_module(base, adapters).items()}
    scales = {name: scale for site in base.sites for name, scale in zip(site.modules, site.scales, strict=True)}
    alphas = {name: scales[name] * rank for name, rank in ranks.items()}
    rank, alpha = (_most_common(list(values.values())) for values in (ranks, alphas))
    kind = "SEQ_2_SEQ_LM" if isinstance(model.module, T5) else "CAUSAL_LM"
    return {
        "peft_type": "LORA",
        "task_type": kind,
        "base_model_name_or_path": str(Path(place).absolute()) if Path(place).exists() else place,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": base.dropout,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": any(name.startswith("transformer.h.") for name in ranks),
        "target_modules": _names(linear_modules(model), ranks),
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _names(modules: Mapping[str, object], chosen: Mapping[str, object]) -> list[str]:
    """Names by which PEFT finds the chosen modules and no others: their last parts where those will do."""
    ends = {name.rpartition(".")[2] for name in chosen}
    matched = {name for name in modules if name.rpartition(".")[2] in ends}
    return sorted(ends if matched == chosen.keys() and HEAD not in ends else chosen)


def _most_common(values: list[Any]) -> Any:
    return max(sorted(set(values)), key=values.count)
