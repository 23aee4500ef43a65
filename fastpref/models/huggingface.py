"""Checkpoints in Hugging Face's layout: `config.json`, safetensors and the tokenizer's files, in and out."""

import contextlib
import errno
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import orjson
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastpref.data import files
from fastpref.data.tokenizer import FILES, Tokenizer, read_json
from fastpref.method.errors import ModelError
from fastpref.models.configs import check_sizes, is_tied, read_config, text_config, write_config
from fastpref.models.decoder import Decoder, DecoderConfig
from fastpref.models.families import FAMILIES
from fastpref.models.policy import Policy
from fastpref.models.t5 import T5, T5Config

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

FLOATS = ("F16", "BF16", "F32", "F64")
"""Types of tensors that are read."""

IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias"
    r"|^transformer\.h\.\d+\.attn\.(masked_)?bias$"
)
"""Tensors of old checkpoints that no model reads."""

RENAMED = (
    (re.compile(r"^(model\.)?language_model\.(model\.)?(?=embed_tokens|layers|norm)"), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?=(wte|wpe|h|ln_f)\.)"), "transformer."),
)
"""Beginnings of names that some files have, and those that they are saved with: Gemma 3 with images, GPT-2."""

IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
"""Tensors of a model of images around the language model."""

OURS = re.compile(
    "|".join([r"config\.json", r"model.*\.safetensors", *map(re.escape, (INDEX, files.MANIFEST, *FILES))])
)
"""Files that a checkpoint consists of."""


def t5_names(gated: bool) -> dict[str, str]:
    """Our parameter paths, with {} for a layer number, to tensor names of T5."""
    projections = {name: f"{name}.weight" for name in "qkvo"}
    inner = {"gate": "wi_0.weight", "up": "wi_1.weight" if gated else "wi.weight", "down": "wo.weight"}
    names = {"embedding": "shared.weight", "lm_head": "lm_head.weight"}
    for stack in ("encoder", "decoder"):
        names[f"{stack}.norm.scale"] = f"{stack}.final_layer_norm.weight"
        names[f"{stack}.position_bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for ours, theirs, block, kernels in (
        ("encoder.layers.{}.attention", "encoder.block.{}.layer.0", "SelfAttention", projections),
        ("encoder.layers.{}.feed_forward", "encoder.block.{}.layer.1", "DenseReluDense", inner),
        ("decoder.layers.{}.attention", "decoder.block.{}.layer.0", "SelfAttention", projections),
        ("cross.{}", "decoder.block.{}.layer.1", "EncDecAttention", projections),
        ("decoder.layers.{}.feed_forward", "decoder.block.{}.layer.2", "DenseReluDense", inner),
    ):
        names[f"{ours}.norm.scale"] = f"{theirs}.layer_norm.weight"
        names |= {f"{ours}.{name}": f"{theirs}.{block}.{kernel}" for name, kernel in kernels.items()}
    return names


KEPT_AS_IS = ("embedding", "positions", "position_bias")
"""Matrices that are not kernels: both layouts are the same. Every other matrix is [out, in] on disk, [in, out] here."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model and its tokenizer, and what it takes to save them as they came."""

    module: Policy
    tokenizer: Tokenizer
    config: Mapping[str, Any] = field(default_factory=dict)
    """`config.json` as loaded, with entries that only other libraries read; empty writes one from the module."""


def load(path: str | Path, *, dtype: DTypeLike = jnp.float32, finite: bool = True) -> LanguageModel:
    """Read a checkpoint directory in Hugging Face's layout.

    Supported are `t5` and `mt5` (both forms of T5) and the decoders of `families.FAMILIES`. Of a Gemma 3 that reads
    images, the language model is loaded, with a warning, and saved without the rest.

    Args:
      path: holds `config.json`, `model.safetensors` (or its shards and their index) and `tokenizer.json`.
      dtype: of the parameters, whatever the file has.
      finite: refuse weights that hold NaN or infinity.

    Returns:
      The module, a `Policy`, and its tokenizer.

    Raises:
      FileNotFoundError: the directory or one of its files is missing.
      ModelError: a file cannot be read or is not what `save` wrote, the model is of an unsupported kind, or tensors do
        not fit the configuration. What others wrote has no manifest, and is read as it is.
    """
    source = Path(path)
    if not source.is_dir():
        files.tidy(source.absolute().parent, source.name)
    if not source.is_dir():
        raise FileNotFoundError(f"a checkpoint must be a directory, but received {source}. Check the path.")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"a checkpoint must hold config.json, but received {source} without. Check the path.")
    files.check_manifest(source)
    raw = text_config(read_json({"config.json": (source / "config.json").read_bytes()}, "config.json"))
    config = read_config(raw, tied=False)
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(source, stack)
        if images := [name for name in tensors if IMAGES.match(name)]:
            warnings.warn(
                f"{source}: the language model is read, without {len(images)} tensors of images", stacklevel=2
            )
            tensors = {name: tensor for name, tensor in tensors.items() if name not in images}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        check_sizes(config, shapes)
        config = replace(config, tied=drop_copies(tensors, raw))
        graph, state = nnx.split(abstract_module(config))
        places = stored_tensors(config, raw, state)
        if missing := sorted(places.keys() - tensors.keys()):
            raise ModelError(
                f"{source} must hold the tensors that its config.json asks for, but received it without "
                f"{len(missing)}, first {missing[0]}. "
                "Copy it again."
            )
        if unexpected := sorted(tensors.keys() - places.keys()):
            raise ModelError(
                f"{source} must hold only tensors that its config.json has a place for, but received "
                f"{len(unexpected)} others, first "
                f"{unexpected[0]}. Use the config.json that belongs to these weights."
            )
        leaves = {}
        for name, stored in places.items():
            if shapes[name] != stored.shape:
                raise ModelError(
                    f"{name} must have shape {stored.shape} by config.json, but received {shapes[name]} in {source}. "
                    "Use the config.json that belongs to these weights."
                )
            if (kind := tensors[name].dtype) not in FLOATS:
                raise ModelError(
                    f"a tensor must be of type {', '.join(FLOATS)}, but received {name} of {source} with type "
                    f"{kind}. "
                    "Save the weights in one of these."
                )
            tensor = tensors[name].read()
            if finite and not np.isfinite(tensor.astype(np.float32)).all():
                raise ModelError(
                    f"weights must be finite, but received {name} of {source} with NaN or infinity. Use an earlier "
                    "checkpoint, or load(..., finite=False)."
                )
            for (path_in_module, variable), part in zip(stored.leaves, stored.parts(tensor), strict=True):
                leaves[path_in_module] = variable.replace(jnp.asarray(part, dtype))
    module = nnx.merge(graph, nnx.from_flat_state(leaves))
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > module.vocab_size:
        raise ModelError(
            f"a tokenizer's ids must fit the model's vocabulary of {module.vocab_size}, but received that of "
            f"{source} with "
            f"{tokenizer.vocab_size}. Use the tokenizer that belongs to these weights."
        )
    return LanguageModel(module, tokenizer, raw)


def save(
    model: LanguageModel,
    path: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint directory that `load` and Hugging Face's libraries read.

    It appears by one rename when it is complete and on disk, so that no crash leaves half a checkpoint or none. A
    checkpoint that is already there is replaced. Saving what was loaded writes the same bytes again. A manifest of all
    files, which other libraries do not read, lets `load` find damage.

    Args:
      model: what to save.
      path: a new or empty directory, or one that holds a checkpoint and nothing else.
      max_shard_bytes: weights above this size are cut into shards of at most it, one tensor at least in each.
      beside: further files of the checkpoint, contents by name.

    Raises:
      WriteError: the disk refused; the message names `path`, which is as it was.
      TypeError: the module is neither a `T5` nor a `Decoder`.
      ModelError: `model.config` describes another model, or no kind of checkpoint fits the module's configuration.
      FileExistsError: `path` holds files that are no part of a checkpoint.
    """
    target, module = Path(path).absolute(), model.module
    if not isinstance(module, T5 | Decoder):
        raise TypeError(
            f"a module must be a T5 or a Decoder to be saved, but received a {type(module).__name__}. Save it yourself."
        )
    config = module.config
    eos_id, pad_id = model.tokenizer.eos_id, model.tokenizer.pad_id
    raw = text_config(model.config) or write_config(config, eos_id=eos_id, pad_id=pad_id)
    if (described := read_config(raw, tied=config.tied)) != config:
        raise ModelError(
            f"the config of a LanguageModel must describe its module, {config}, but received {described}. "
            "Leave config empty to have it written."
        )
    for key in {"dtype", "torch_dtype"} & raw.keys():
        raw[key] = str(module.embedding[...].dtype)
    further = {} if beside is None else beside
    if target.exists():
        present = target.iterdir() if target.is_dir() else [target]
        if foreign := sorted(x.name for x in present if not OURS.fullmatch(x.name) and x.name not in further):
            raise FileExistsError(
                f"a checkpoint must have a directory of its own, but received {target} with {foreign[0]}. Choose "
                f"another path."
            )
    with files.replacing(target) as new:
        new.mkdir()
        write_json(new / "config.json", raw)
        write_tensors(new, module, raw, max_shard_bytes)
        model.tokenizer.save(new)
        for name, content in further.items():
            (new / name).write_bytes(content)
        files.write_manifest(new)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON as Hugging Face lays it out."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_tensors(directory: Path, module: T5 | Decoder, raw: Mapping[str, Any], max_shard_bytes: int) -> None:
    """Write the weights, in shards with an index where they are larger than `max_shard_bytes`."""
    places = stored_tensors(module.config, raw, nnx.state(module))
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in sorted(places, key=natural):
        more = sum(variable[...].nbytes for _, variable in places[name].leaves)
        total += more
        if shards[-1] and size + more > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    shard_files = [
        WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, names in zip(shard_files, shards, strict=True):
        try:
            save_file({name: places[name].tensor() for name in names}, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # says what the disk said, as text alone
            raise OSError(errno.EIO, str(error)) from error
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(shard_files, shards, strict=True) for name in names}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


class Tensor(NamedTuple):
    """A tensor of an open file."""

    file: Any
    name: str
    """In the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape on disk."""
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """Its type on disk, in the words of safetensors."""
        return str(self.file.get_slice(self.name).get_dtype())

    def read(self) -> np.ndarray:
        """Its numbers."""
        return np.asarray(self.file.get_tensor(self.name))


def open_tensors(source: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """Open the weights of a checkpoint; return every tensor by the name that it is saved with."""
    shards = [WEIGHTS]
    if (source / INDEX).is_file():
        try:
            shards = sorted(
                {str(shard) for shard in orjson.loads((source / INDEX).read_bytes())["weight_map"].values()}
            )
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{INDEX} must map tensors to files, but received one in {source} that does not. Copy it again."
            ) from error
    elif not (source / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"a checkpoint must hold {WEIGHTS} or {INDEX}, but received {source} with neither. Save its weights as "
            f"safetensors."
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ModelError(
                f"{INDEX} must name files of its own directory, but received {shard!r} in {source}. Copy it again."
            )
        if not (source / shard).is_file():
            raise FileNotFoundError(
                f"{INDEX} must name files that are there, but received {shard} in {source}. Copy it again."
            )
        try:
            file = stack.enter_context(safe_open(source / shard, framework="np"))
        except SafetensorError as error:
            raise ModelError(
                f"{source / shard} must be a whole safetensors file, but received one that is not "
                f"({error}). Copy it again."
            ) from error
        tensors |= {renamed(name): Tensor(file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return {name: tensor for name, tensor in tensors.items() if not IGNORED.search(name)}


def renamed(name: str) -> str:
    """The name that a tensor is saved with."""
    for beginning, usual in RENAMED:
        name = beginning.sub(usual, name)
    return name


def drop_copies(tensors: dict[str, Tensor], raw: Mapping[str, Any]) -> bool:
    """Leave out copies of the embedding under other names; return whether the head is the embedding.

    A head that differs from the embedding is its own, whatever `tie_word_embeddings` says.
    """
    kind = raw["model_type"]
    embedding = FAMILIES[kind].names["embedding"] if kind in FAMILIES else "shared.weight"
    tied = is_tied(raw)
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(["lm_head.weight"] if tied else [])]
    for copy in copies:
        if copy in tensors and embedding in tensors and np.array_equal(tensors[copy].read(), tensors[embedding].read()):
            del tensors[copy]
    return tied and "lm_head.weight" not in tensors


def abstract_module(config: T5Config | DecoderConfig) -> T5 | Decoder:
    """The module with shapes in the place of arrays."""
    module: T5 | Decoder = nnx.eval_shape(lambda: make_module(config))
    return module


def make_module(config: T5Config | DecoderConfig) -> T5 | Decoder:
    """The module of a configuration, with initial values."""
    rngs = nnx.Rngs(0)
    return T5(config, rngs=rngs) if isinstance(config, T5Config) else Decoder(config, rngs=rngs)


class Stored(NamedTuple):
    """A tensor on disk, and the parameters that lie in it one after the other."""

    leaves: tuple[tuple[tuple[Any, ...], nnx.Variable[Any]], ...]
    """Path in the module and variable of each."""
    turned: bool
    """Whether it is [out, in] on disk and [in, out] here."""

    @property
    def sides(self) -> list[tuple[int, ...]]:
        """The shape on disk of each parameter."""
        shapes = [tuple(variable.shape) for _, variable in self.leaves]
        return [shape[::-1] for shape in shapes] if self.turned else shapes

    @property
    def axis(self) -> int:
        """The axis on disk along which the parameters lie."""
        return 0 if self.turned else len(self.sides[0]) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape on disk of the whole."""
        whole, axis = list(self.sides[0]), self.axis
        whole[axis] = sum(side[axis] for side in self.sides)
        return tuple(whole)

    def parts(self, tensor: np.ndarray) -> Iterator[np.ndarray]:
        """The parameters in a tensor that was read."""
        ends = np.cumsum([side[self.axis] for side in self.sides])[:-1]
        for part in np.split(tensor, ends, axis=self.axis) if len(ends) else [tensor]:
            yield np.ascontiguousarray(part.T if self.turned else part)

    def tensor(self) -> np.ndarray:
        """The tensor to write."""
        arrays = [np.asarray(variable[...]) for _, variable in self.leaves]
        arrays = [array.T for array in arrays] if self.turned else arrays
        return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=self.axis))


def stored_tensors(config: T5Config | DecoderConfig, raw: Mapping[str, Any], state: Any) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name on disk, with the parameters that it holds."""
    family = FAMILIES.get(raw["model_type"])
    names = t5_names(config.gated) if isinstance(config, T5Config) else FAMILIES[raw["model_type"]].names
    as_is = KEPT_AS_IS if family is None else (*KEPT_AS_IS, *family.as_is)
    order = {pattern: number for number, pattern in enumerate(names)}

    def pattern(path: tuple[Any, ...]) -> str:
        return ".".join("{}" if isinstance(part, int) else str(part) for part in path)

    tensors: dict[str, Stored] = {}
    for path, variable in sorted(nnx.to_flat_state(state), key=lambda leaf: order[pattern(leaf[0])]):
        name = names[pattern(path)].format(*(part for part in path if isinstance(part, int)))
        turned = len(variable.shape) == 2 and path[-1] not in as_is
        before = tensors[name].leaves if name in tensors else ()
        tensors[name] = Stored((*before, (path, variable)), turned)
    return tensors


def natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def as_model(model: LanguageModel | str | Path) -> LanguageModel:
    """The model itself, or the one that a checkpoint directory holds."""
    return load(model) if isinstance(model, str | Path) else model
