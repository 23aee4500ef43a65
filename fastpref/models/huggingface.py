"""Checkpoints in Hugging Face's layout: `config.json`, safetensors and the tokenizer's files, in and out."""

import contextlib
import errno
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orjson
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastpref.data import files
from fastpref.data.chat import FOLDER
from fastpref.data.token_files import FILES, read_json
from fastpref.data.tokenizer import Tokenizer
from fastpref.method.errors import ModelError
from fastpref.models.configs import check_sizes, read_config, write_config
from fastpref.models.decoder import Decoder, DecoderConfig
from fastpref.models.policy import Policy
from fastpref.models.t5 import T5, T5Config

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

FLOATS = ("F16", "BF16", "F32", "F64")
"""Types of tensors that are read."""

IGNORED = re.compile(r"rotary_emb\.inv_freq$|^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias")
"""Tensors of old checkpoints that no model reads."""

SCALAR_HEAD = re.compile(r"(score|v_head\.summary|value_head|reward_head)\.(weight|bias)")
"""Tensors of a scalar head, by which a directory is a reward model's: of transformers, of TRL, and of others."""

OURS = re.compile(
    "|".join([r"config\.json", r"model.*\.safetensors", *map(re.escape, (INDEX, files.MANIFEST, *FILES, FOLDER[:-1]))])
)
"""Files that a checkpoint consists of."""

DECODER_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers.{}.attention.norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.attention.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.attention.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.{}.attention.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.{}.attention.o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.{}.feed_forward.norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.feed_forward.down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
"""Our parameter paths, with {} for a layer number, to tensor names of the Llama family."""


def t5_names(gated: bool) -> dict[str, str]:
    """Our parameter paths, with {} for a layer number, to tensor names of T5."""
    projections = {name: f"{name}.weight" for name in "qkvo"}
    inner = {"gate": "wi_0.weight", "up": "wi_1.weight" if gated else "wi.weight", "down": "wo.weight"}
    names = {"embedding": "shared.weight", "lm_head": "lm_head.weight"}
    for stack in ("encoder", "decoder"):
        names[f"{stack}.norm"] = f"{stack}.final_layer_norm.weight"
        names[f"{stack}.position_bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for ours, theirs, block, kernels in (
        ("encoder.layers.{}.attention", "encoder.block.{}.layer.0", "SelfAttention", projections),
        ("encoder.layers.{}.feed_forward", "encoder.block.{}.layer.1", "DenseReluDense", inner),
        ("decoder.layers.{}.attention", "decoder.block.{}.layer.0", "SelfAttention", projections),
        ("cross.{}", "decoder.block.{}.layer.1", "EncDecAttention", projections),
        ("decoder.layers.{}.feed_forward", "decoder.block.{}.layer.2", "DenseReluDense", inner),
    ):
        names[f"{ours}.norm"] = f"{theirs}.layer_norm.weight"
        names |= {f"{ours}.{name}": f"{theirs}.{block}.{kernel}" for name, kernel in kernels.items()}
    return names


KEPT_AS_IS = ("embedding", "position_bias")
"""Matrices that are not kernels: both layouts are the same. Every other matrix is [out, in] on disk, [in, out] here."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model and its tokenizer, and what it takes to save them as they came."""

    module: Policy
    tokenizer: Tokenizer
    config: Mapping[str, Any] = field(default_factory=dict)
    """`config.json` as loaded, with entries that only other libraries read; empty writes one from the module."""

    def __post_init__(self) -> None:
        # Whatever the tokenizer was made for, an encoder reads prompts alone.
        if getattr(self.module, "decoder_start", None) is not None and not self.tokenizer.encoder_decoder:
            object.__setattr__(self, "tokenizer", self.tokenizer.apart())


def load(path: str | Path, *, dtype: DTypeLike = jnp.float32, finite: bool = True, body: bool = False) -> LanguageModel:
    """Read a checkpoint directory in Hugging Face's layout.

    Supported are `t5` and `mt5` (both forms of T5), `llama`, and `mistral` and `qwen2` without sliding windows.

    Args:
      path: holds `config.json`, `model.safetensors` (or its shards and their index) and `tokenizer.json`.
      dtype: of the parameters, whatever the file has.
      finite: refuse weights that hold NaN or infinity.
      body: read a model whose states alone are used, by a reward model: scalar heads are passed over, and the embedding
        stands for a head of the vocabulary that is not there.

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
    raw = read_json({"config.json": (source / "config.json").read_bytes()}, "config.json")
    config = read_config(raw, tied=False)
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(source, stack)
        scalar_heads = [name for name in tensors if SCALAR_HEAD.fullmatch(name)]
        if scalar_heads and not body:
            raise ModelError(
                f"a language model must have a head of its vocabulary, but received {source} with {scalar_heads[0]}, "
                f"a reward model ({', '.join(raw.get('architectures') or ['no architecture named'])}). Read it with "
                "fastpref.load_judge, or give the directory as the judge."
            )
        for name in scalar_heads:
            del tensors[name]
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in tensors.items()}
        check_sizes(config, shapes)
        tied = drop_copies(tensors, raw) or (body and "lm_head.weight" not in tensors)
        config = replace(config, tied=tied)
        graph, state = nnx.split(abstract_module(config))
        places = named_leaves(config, state)
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
        for name, (path_in_module, variable) in places.items():
            shape = tuple(variable.shape)
            kernel = is_kernel(path_in_module, shape)
            wanted, received = shape[::-1] if kernel else shape, shapes[name]
            if received != wanted:
                raise ModelError(
                    f"{name} must have shape {wanted} by config.json, but received {received} in {source}. "
                    "Use the config.json that belongs to these weights."
                )
            if (stored := tensors[name].get_slice(name).get_dtype()) not in FLOATS:
                raise ModelError(
                    f"a tensor must be of type {', '.join(FLOATS)}, but received {name} of {source} with type "
                    f"{stored}. "
                    "Save the weights in one of these."
                )
            tensor = tensors[name].get_tensor(name)
            if finite and not np.isfinite(tensor.astype(np.float32)).all():
                raise ModelError(
                    f"weights must be finite, but received {name} of {source} with NaN or infinity. Use an earlier "
                    "checkpoint, or load(..., finite=False)."
                )
            array = jnp.asarray(np.ascontiguousarray(tensor.T if kernel else tensor), dtype)
            leaves[path_in_module] = variable.replace(array)
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
    raw = dict(model.config) or write_config(config, eos_id=eos_id, pad_id=pad_id)
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
        write_tensors(new, module, max_shard_bytes)
        model.tokenizer.save(new)
        for name, content in further.items():
            (new / name).write_bytes(content)
        files.write_manifest(new)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON as Hugging Face lays it out."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_tensors(directory: Path, module: T5 | Decoder, max_shard_bytes: int) -> None:
    """Write the weights, in shards with an index where they are larger than `max_shard_bytes`."""
    places = named_leaves(module.config, nnx.state(module))
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in sorted(places, key=natural):
        array = places[name][1][...]
        total += array.nbytes
        if shards[-1] and size + array.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    shard_files = [
        WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, names in zip(shard_files, shards, strict=True):
        tensors = {}
        for name in names:
            place, variable = places[name]
            tensor = np.asarray(variable[...])
            tensors[name] = np.ascontiguousarray(tensor.T if is_kernel(place, tensor.shape) else tensor)
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # says what the disk said, as text alone
            raise OSError(errno.EIO, str(error)) from error
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(shard_files, shards, strict=True) for name in names}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def open_tensors(source: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Open the weights of a checkpoint; return the file that holds each tensor, by its name."""
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
    tensors: dict[str, Any] = {}
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
        tensors |= dict.fromkeys(file.keys(), file)
    return {name: file for name, file in tensors.items() if not IGNORED.search(name)}


def drop_copies(tensors: dict[str, Any], raw: Mapping[str, Any]) -> bool:
    """Leave out copies of the embedding under other names; return whether the head is the embedding.

    A head that differs from the embedding is its own, whatever `tie_word_embeddings` says.
    """
    embedding = "shared.weight" if "shared.weight" in tensors else "model.embed_tokens.weight"
    tied = bool(raw.get("tie_word_embeddings", raw.get("model_type") in ("t5", "mt5")))
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(["lm_head.weight"] if tied else [])]
    for copy in copies:
        if copy in tensors and embedding in tensors:
            original = tensors[embedding].get_tensor(embedding)
            if np.array_equal(tensors[copy].get_tensor(copy), original):
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


def named_leaves(config: T5Config | DecoderConfig, state: Any) -> dict[str, tuple[tuple[Any, ...], nnx.Variable[Any]]]:
    """The path in the module and the variable of every tensor, by its name on disk."""
    names = t5_names(config.gated) if isinstance(config, T5Config) else DECODER_NAMES
    found = {}
    for path, variable in nnx.to_flat_state(state):
        pattern = ".".join("{}" if isinstance(part, int) else str(part) for part in path)
        found[names[pattern].format(*(part for part in path if isinstance(part, int)))] = (path, variable)
    return found


def is_kernel(path: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether a parameter is stored the other way round on disk."""
    return len(shape) == 2 and path[-1] not in KEPT_AS_IS


def natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def as_model(model: LanguageModel | str | Path) -> LanguageModel:
    """The model itself, or the one that a checkpoint directory holds."""
    return load(model) if isinstance(model, str | Path) else model
