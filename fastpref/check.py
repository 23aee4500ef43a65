"""`fastpref check`: what a directory is, whether it loads, how its completions end, and what training it takes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orjson
from flax import nnx

from fastpref.data.chat import ChatTemplate
from fastpref.data.token_files import read_json
from fastpref.data.tokenizer import Tokenizer
from fastpref.judging.sources import VALUE_HEAD, load_judge
from fastpref.learning.learner import dtype_of
from fastpref.learning.memory import TrainMemory, size, train_memory
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ChatError, FastprefError
from fastpref.method.tables import from_mapping
from fastpref.models import LanguageModel, load
from fastpref.models.adapters import adapted_shapes, split
from fastpref.models.configs import architectures_of
from fastpref.models.huggingface import SCALAR_HEAD, Description, abstract_module, describe, read_tokenizer
from fastpref.models.t5 import T5Config
from fastpref.models.tensors import open_tensors, read_tensor
from fastpref.runs import checkpoints
from fastpref.runs.read_model import locate, read_model

CONVERSATION = [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "No, it is dry."}]
"""A conversation that a chat template is shown with."""

JUDGES = {
    "preference_model.json": "a preference model",
    "reward_model.json": "a reward model",
    VALUE_HEAD: "a reward model with its head in a file beside it",
}
"""Words for judges, by the file that makes a directory one."""

Line = tuple[str, str]
"""Subject and text."""


def check(path: str | Path, settings: Mapping[str, Any]) -> Iterator[Line]:
    """Description of a directory, a line at a time, as it is read.

    Args:
      path: a checkpoint, an adapter, a preference or reward model, a run directory, or a checkpoint of a run.
      settings: of `TrainConfig`, for the memory that `train` needs.

    Yields:
      Pairs of a subject and a text.

    Raises:
      ConfigError: a setting breaks its rule.
      FastprefError, OSError: the directory does not load. The lines before say what it is.
    """
    config = from_mapping(TrainConfig, settings)
    given = Path(path)
    adapter = given / "adapter_config.json"
    if adapter.is_file():
        entries = read_json({adapter.name: adapter.read_bytes()}, adapter.name)
        yield "kind", f"an adapter ({entries.get('peft_type')}) of the base {entries.get('base_model_name_or_path')!r}"
        yield from adapter_of(load(given), config)
        return
    source, saved = given, (given / "manifest").is_file()
    if saved:
        source = given.absolute().parent.parent
        yield "kind", f"a checkpoint of a run: parameters alone; the rest is that of the final model of {source}"
    elif _is_run(given):
        yield "kind", f"a run directory{_history(given)}"
    if saved or _is_run(given):
        try:
            source = locate(source)
        except FileNotFoundError as error:
            yield "final model", f"none: {error}"
            return
        yield "final model", str(source)
    judge = judge_of(source)
    described = describe(source, body=judge is not None)
    yield "kind", kind_of(described, judge)
    yield "size", size_of(described)
    yield "stored as", stored_as(described)
    tokenizer = read_tokenizer(described)
    for tensor in described.tensors.values():
        read_tensor(tensor, jnp.float32).delete()
    if judge is not None:
        load_judge(source)
    if saved:
        read_model(given)
    yield "loads", "yes: every tensor was read and is finite"
    yield "tokenizer", f"{tokenizer.vocab_size} ids, {described.config.vocab_size} rows of the embedding"
    yield "completions end with", ends_of(tokenizer)
    yield from template_of(tokenizer)
    if judge is None:
        yield from memory_of(described, config)
    else:
        parameters = size([variable for _, variable in described.leaves])
        yield "memory as a judge", f"{gib(parameters)} of parameters, float32, counted"


def adapter_of(model: LanguageModel, config: TrainConfig) -> Iterator[Line]:
    """Lines on an adapter that was read with its base."""
    parts = split(model)
    assert parts is not None
    base, adapters = parts
    ranks = sorted({factors.a.shape[-1] for factors in adapters.values()})
    modules = [name for site in base.sites for name in site.modules]
    ends = sorted({name.rpartition(".")[2] for name in modules})
    scales = sorted({scale for site in base.sites for scale in site.scales})
    yield "rank", f"{', '.join(map(str, ranks))}, scale {', '.join(map(str, scales))}"
    yield "modules", f"{len(modules)}, which end with {', '.join(ends)}"
    yield "size", f"{sum(leaf.size for leaf in jax.tree.leaves(adapters)):,} parameters in the adapter"
    yield "loads", f"yes, on the base in {model.source}: every tensor was read and is finite"
    yield "completions end with", ends_of(model.tokenizer)
    yield from template_of(model.tokenizer)
    definition = nnx.graphdef(model.module)
    yield from memory_lines(train_memory(config, definition, base.params, parts), config)


def judge_of(source: Path) -> str | None:
    """Words for the kind of judge that a directory holds, or None."""
    made = next((words for name, words in JUDGES.items() if (source / name).is_file()), None)
    if made is None and (source / "config.json").is_file() and any(map(SCALAR_HEAD.fullmatch, open_tensors(source))):
        return "a reward model with its head among the weights"
    return made


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("metrics.jsonl", "checkpoints"))


def _history(path: Path) -> str:
    """Words on how far a run is, and by what settings."""
    saved = checkpoints.steps(path / "checkpoints")
    words = f", saved up to step {saved[-1]}" if saved else ""
    try:
        algorithm = orjson.loads((path / "config.json").read_bytes()).get("algorithm")
    except (OSError, orjson.JSONDecodeError, AttributeError):
        algorithm = None
    return (f" of {algorithm}" if algorithm else "") + words


def kind_of(described: Description, judge: str | None) -> str:
    """Words for the kind of a checkpoint."""
    raw = described.raw
    name = f"a language model of kind {raw['model_type']} ({architectures_of(raw)})"
    return name if judge is None else f"{judge}, on {name}"


def size_of(described: Description) -> str:
    """Words for the size of a model."""
    config = described.config
    layers = (
        f"{config.encoder_layers} + {config.decoder_layers} layers"
        if isinstance(config, T5Config)
        else f"{config.layers} layers"
    )
    count = sum(int(variable.size) for _, variable in described.leaves)
    head = "the embedding is the head" if config.tied else "a head of its own"
    return f"{count:,} parameters, {layers}, width {config.width}, {config.vocab_size} rows, {head}"


def stored_as(described: Description) -> str:
    """Words for the files and the types of the weights."""
    types = sorted({tensor.dtype for tensor in described.tensors.values()})
    names = sorted({tensor.file.name for tensor in described.tensors.values()})
    more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
    return f"{', '.join(types)} in {names[0]}{more}"


def ends_of(tokenizer: Tokenizer) -> str:
    """The tokens that end a completion, with their ids, and those that recorded ones end with."""
    ends = {number: f"{tokenizer.backend.id_to_token(number)!r} ({number})" for number in tokenizer.stop_ids}
    recorded = f"recorded text with {ends[tokenizer.eos_id]}"
    if tokenizer.turn_end_id != tokenizer.eos_id:
        recorded += f", recorded answers in a conversation with {ends[tokenizer.turn_end_id]}"
    return f"{', '.join(ends.values())}; {recorded}"


def template_of(tokenizer: Tokenizer) -> Iterator[Line]:
    """One conversation as the chat template writes it."""
    files = tokenizer.files
    named = [name for name in ("chat_template.jinja", "tokenizer_config.json") if _has_template(files, name)]
    try:
        template = ChatTemplate.find(tokenizer)
    except ChatError as error:
        yield "chat template", f"cannot be used: {error}"
        return
    if template is None:
        yield "chat template", "none: prompts are plain text"
        return
    unused = f" ({', '.join(named[1:])} has another, which is not used)" if _differ(files, named) else ""
    yield "chat template", f"of {named[0] if named else 'the tokenizer'}{unused}"
    row = {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}
    try:
        text = template.texts(row, ("prompt", "completion"))
    except FastprefError as error:
        yield "a conversation", f"is refused: {error}"
        return
    yield "a prompt", repr(str(text["prompt"]))
    yield "its completion", f"{str(text['completion'])!r}, and the token that ends it"


def _has_template(files: Mapping[str, bytes], name: str) -> bool:
    return name in files and (not name.endswith(".json") or bool(read_json(files, name).get("chat_template")))


def _differ(files: Mapping[str, bytes], named: Sequence[str]) -> bool:
    return len(named) == 2 and read_json(files, named[1]).get("chat_template") != files[named[0]].decode()


def memory_of(described: Description, config: TrainConfig) -> Iterator[Line]:
    """Memory of `train` with these settings."""
    module = abstract_module(described.config)
    definition, params = nnx.split(module)
    parts = None
    if config.adapter is not None:
        model = LanguageModel(module, read_tokenizer(described), described.raw)
        parts = adapted_shapes(model, config.adapter)
    yield from memory_lines(train_memory(config, definition, params, parts), config)


def memory_lines(memory: TrainMemory, config: TrainConfig) -> Iterator[Line]:
    """Memory in words."""
    yield (
        "memory of train",
        f"{gib(memory.total)} at the peak, {dtype_of(config)}: {config.algorithm}, batch_size {config.batch_size}, "
        f"prompts of {config.max_prompt_tokens} tokens, completions of {config.max_new_tokens}, {config.optimizer}, "
        f"gradient_accumulation {config.gradient_accumulation}",
    )
    yield "  policy", f"{gib(memory.policy)}, counted"
    yield "  reference", f"{gib(memory.ref)}, counted"
    if memory.round:
        yield "  π_t of a round", f"{gib(memory.round)}, counted"
    yield "  optimiser", f"{gib(memory.optimizer)}, counted"
    yield (
        "  update",
        f"{gib(memory.temporaries)} of temporaries, compiled for this machine; gradients of {gib(memory.gradients)} "
        "are among them",
    )
    if memory.cache:
        yield "  sampling", f"{gib(memory.cache)} of keys and values, counted; not at the same time as the update"


def gib(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
