"""Checkpoints in Hugging Face's layout: `config.json`, safetensors and the tokenizer's files, in and out."""

import errno
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fastpref.data import files
from fastpref.data.token_files import FILES, FOLDER, read_json
from fastpref.data.tokenizer import Tokenizer
from fastpref.method.errors import ModelError, ModelWarning
from fastpref.models.configs import architectures_of, check_sizes, is_tied, read_config, text_config, write_config
from fastpref.models.decoder import Decoder, DecoderConfig
from fastpref.models.families import FAMILIES
from fastpref.models.layers import layers_in
from fastpref.models.lowrank import is_adapted
from fastpref.models.policy import Policy, position_limit
from fastpref.models.stored import Stored, stored_tensors
from fastpref.models.t5 import T5, T5Config
from fastpref.models.tensors import INDEX, WEIGHTS, Part, Tensor, open_tensors, read_parts, settle_embedding

IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias"
    r"|^transformer\.h\.\d+\.attn\.(masked_)?bias$"
)
"""Tensors of old checkpoints that no model reads."""

SCALAR_HEAD = re.compile(r"(score|v_head\.summary|value_head|reward_head)\.(weight|bias)")
"""Tensors of a scalar head, by which a directory is a reward model's: of transformers, of TRL, and of others."""

RENAMED = (
    (re.compile(r"^(model\.)?language_model\.(model\.)?(?=embed_tokens|layers|norm)"), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?=(embed_tokens|layers|norm)\.)"), "model."),
    (re.compile(r"^(?=(wte|wpe|h|ln_f)\.)"), "transformer."),
)
"""Beginnings of names that some files have, and those that they are saved with: Gemma 3 with images, a body that was
saved alone, GPT-2."""

IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
"""Tensors of a model of images around the language model."""

OURS = re.compile(
    "|".join([r"config\.json", r"model.*\.safetensors", *map(re.escape, (INDEX, files.MANIFEST, *FILES, FOLDER[:-1]))])
)
"""Files that a checkpoint consists of."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model and its tokenizer, and what it takes to save them as they came."""

    module: Policy
    tokenizer: Tokenizer
    config: Mapping[str, Any] = field(default_factory=dict)
    """`config.json` as loaded, with entries that only other libraries read; empty writes one from the module."""
    source: Path | None = field(default=None, compare=False)
    """The directory that the model, or the base of its adapter, was loaded from."""

    def __post_init__(self) -> None:
        # Whatever the tokenizer was made for, an encoder reads prompts alone.
        if getattr(self.module, "decoder_start", None) is not None and not self.tokenizer.encoder_decoder:
            object.__setattr__(self, "tokenizer", self.tokenizer.apart())

    @property
    def max_positions(self) -> int | None:
        """The most inputs of a sequence that the module has positions for; None for any number."""
        return position_limit(self.module)

    def with_module(self, module: Any) -> "LanguageModel":
        """The model with another module. Of one without adapters, the directory no longer holds what it computes by."""
        return replace(self, module=module, source=self.source if is_adapted(nnx.state(module)) else None)


def load_whole(
    path: str | Path, *, dtype: DTypeLike = jnp.float32, finite: bool = True, body: bool = False
) -> LanguageModel:
    """Read a checkpoint directory in Hugging Face's layout.

    Supported are `t5` and `mt5` (both forms of T5) and the decoders of `families.FAMILIES`. Of a Gemma 3 that reads
    images, the language model is loaded, with a warning, and saved without the rest. Files that contradict each other
    are read as `transformers` reads them, with a `ModelWarning`, or refused. Weights are read a few megabytes at a
    time, so that the peak of memory is the result's and little more.

    Args:
      path: holds `config.json`, `model.safetensors` (or its shards and their index) and `tokenizer.json` or the model
        of SentencePiece (see `Tokenizer.load`).
      dtype: of the parameters, whatever the file has.
      finite: refuse weights that hold NaN or infinity.
      body: read a model whose states alone are used, by a reward model: scalar heads are passed over, and the embedding
        stands for a head of the vocabulary that is not there.

    Returns:
      The module, a `Policy`, and its tokenizer.

    Raises:
      FileNotFoundError: the directory or one of its files is missing.
      ModelError: a file cannot be read or is not what `save` wrote, the directory is an adapter's, the model is of an
        unsupported kind, or tensors do not fit the configuration. What others wrote has no manifest, and is read as it
        is.
    """
    described = describe(path, body=body)
    leaves = {path: variable.replace(array) for path, variable, array in described.arrays(dtype=dtype, finite=finite)}
    module = nnx.merge(described.graph, nnx.from_flat_state(leaves))
    tokenizer = read_tokenizer(described)
    return LanguageModel(module, tokenizer, described.raw, described.source)


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint whose files fit each other, before its numbers are read."""

    source: Path
    raw: dict[str, Any]
    """`config.json`."""
    config: T5Config | DecoderConfig
    graph: Any
    """GraphDef of the module."""
    places: dict[str, "Stored"]
    """The parameters that each tensor holds, with shapes in the place of arrays."""
    tensors: dict[str, Tensor]

    @property
    def leaves(self) -> list[tuple[tuple[Any, ...], nnx.Variable[Any]]]:
        """Path in the module and variable of each parameter."""
        return list({leaf.path: leaf.variable for stored in self.places.values() for leaf in stored.leaves}.items())

    def arrays(
        self, *, dtype: DTypeLike, finite: bool = True
    ) -> Iterator[tuple[tuple[Any, ...], nnx.Variable[Any], Array]]:
        """Path in the module, variable and array of each parameter, one after the other."""
        parts: dict[tuple[Any, ...], list[Part]] = {}
        for name, stored in self.places.items():
            for leaf, part in zip(stored.leaves, stored.parts, strict=True):
                parts.setdefault(leaf.path, []).append(Part(self.tensors[name], turned=stored.turned, **part))
        for path, variable in self.leaves:
            stacked = layers_in(path) is not None
            yield path, variable, read_parts(parts[path], dtype, stacked=stacked, finite=finite)


def describe(path: str | Path, *, body: bool = False) -> Description:
    """All of a checkpoint but its numbers and its tokenizer. Raises what `load` does."""
    source = Path(path)
    if not source.is_dir():
        files.tidy(source.absolute().parent, source.name)
    if not source.is_dir():
        raise FileNotFoundError(f"a checkpoint must be a directory, but received {source}. Check the path.")
    refuse_adapter(source)
    if not (source / "config.json").is_file():
        inner = [path.parent for pattern in ("*", "snapshots/*") for path in source.glob(f"{pattern}/config.json")]
        remedy = f"Name a folder in it, such as {max(inner)}." if inner else "Check the path."
        raise FileNotFoundError(f"a checkpoint must hold config.json, but received {source} without. {remedy}")
    files.check_manifest(source)
    raw = text_config(read_json({"config.json": (source / "config.json").read_bytes()}, "config.json"))
    config = read_config(raw, tied=False)
    tensors = {renamed(name): tensor for name, tensor in open_tensors(source).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED.search(name)}
    if images := [name for name in tensors if IMAGES.match(name)]:
        warnings.warn(
            f"{source}: the language model is read, without {len(images)} tensors of images", ModelWarning, stacklevel=3
        )
        tensors = {name: tensor for name, tensor in tensors.items() if name not in images}
    scalar_heads = [name for name in tensors if SCALAR_HEAD.fullmatch(name)]
    if scalar_heads and not body:
        raise ModelError(
            f"a language model must have a head of its vocabulary, but received {source} with {scalar_heads[0]}, "
            f"a reward model ({architectures_of(raw)}). Read it with fastpref.load_judge, or give the directory as the "
            "judge."
        )
    tensors = {name: tensor for name, tensor in tensors.items() if name not in scalar_heads}
    check_sizes(config, {name: tensor.shape for name, tensor in tensors.items()})
    t5 = isinstance(config, T5Config)
    embedding = "shared.weight" if t5 else FAMILIES[raw["model_type"]].names["embedding"]
    tied = is_tied(raw) or (body and "lm_head.weight" not in tensors)
    config = replace(config, tied=settle_embedding(tensors, embedding, tied=tied, encoder_decoder=t5))
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
    for name, stored in places.items():
        if tensors[name].shape != stored.shape:
            raise ModelError(
                f"{name} must have shape {stored.shape} by config.json, but received {tensors[name].shape} in "
                f"{source}. Use the config.json that belongs to these weights."
            )
    return Description(source, raw, config, graph, places, tensors)


def refuse_adapter(source: Path) -> None:
    """Raise ModelError for the directory of an adapter, which is no model without its base."""
    if not (source / "adapter_config.json").is_file():
        return
    adapter = read_json({"adapter_config.json": (source / "adapter_config.json").read_bytes()}, "adapter_config.json")
    base = adapter.get("base_model_name_or_path")
    weights = sorted(file.name for file in source.glob("model*.safetensors"))
    task = {"SEQ_CLS": "SequenceClassification", "SEQ_2_SEQ_LM": "Seq2SeqLM"}.get(
        str(adapter.get("task_type")), "CausalLM"
    )
    remedy = (
        f'Merge it into its base with peft: AutoPeftModelFor{task}.from_pretrained("{source}").merge_and_unload()'
        '.save_pretrained("a new path"), and save the tokenizer there.'
    )
    if weights:
        remedy = f"Delete adapter_config.json if {weights[0]} is the whole model. If not: {remedy}"
    raise ModelError(
        f"a model must be a whole checkpoint, but received {source}, which is an adapter "
        f"({adapter.get('peft_type', 'of no named type')}) of the base {base!r}"
        f"{f' with {weights[0]} beside it' if weights else ''}. {remedy}"
    )


def read_tokenizer(described: Description) -> Tokenizer:
    """The tokenizer of a checkpoint, if each id that a text may be given has a row of the embedding.

    Special tokens that stand in no text, such as a padding token that was added last, may go without one.
    """
    source, rows = described.source, described.config.vocab_size
    tokenizer = Tokenizer.load(source)
    tokenizer.rows = rows
    if tokenizer.vocab_size <= rows:
        return tokenizer
    backend = tokenizer.backend
    added = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    beyond = [number for number in backend.get_vocab(with_added_tokens=True).values() if number >= rows]
    embedded = sorted((set(beyond) - added) | (set(beyond) & {tokenizer.eos_id}))
    if embedded:
        raise ModelError(
            f"a tokenizer's ids must fit the model's vocabulary of {rows}, but received that of {source} with "
            f"{tokenizer.vocab_size}, such as {backend.id_to_token(embedded[0])!r}. Use the tokenizer that belongs to "
            "these weights, or give the weights more rows with transformers: resize_token_embeddings."
        )
    tokenizer.probe()
    return tokenizer


def save_whole(
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
        more = sum(leaf.nbytes for leaf in places[name].leaves)
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


def renamed(name: str) -> str:
    """The name that a tensor is saved with."""
    for beginning, usual in RENAMED:
        name = beginning.sub(usual, name)
    return name


def abstract_module(config: T5Config | DecoderConfig) -> T5 | Decoder:
    """The module with shapes in the place of arrays."""
    module: T5 | Decoder = nnx.eval_shape(lambda: make_module(config))
    return module


def make_module(config: T5Config | DecoderConfig) -> T5 | Decoder:
    """The module of a configuration, with initial values."""
    rngs = nnx.Rngs(0)
    return T5(config, rngs=rngs) if isinstance(config, T5Config) else Decoder(config, rngs=rngs)


def natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
