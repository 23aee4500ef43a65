"""Side-by-side evaluation: policies write to held-out prompts, and a judge compares what they wrote."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastpref.data import ChatTemplate, read_prompts
from fastpref.data.readers import written_by
from fastpref.data.rendered import Rendered
from fastpref.data.sources import Source
from fastpref.evaluation.win_rates import WinRate, WinRates, both_orders, check_prompts, summarise, tabulate
from fastpref.judging.judgements import FILE, Judgements
from fastpref.judging.positions import check_positions
from fastpref.judging.protocol import Judge
from fastpref.judging.recorded import RecordedJudge
from fastpref.method.choices import OnBadRecord, TruncationSide
from fastpref.models import LanguageModel
from fastpref.runs.read_model import Model, locate, read_model, read_tokenizer
from fastpref.sampling.generate import write

Policies = Mapping[str, Model | Sequence[Model]] | Sequence[Model]
"""Policies by name; several models under one name are runs of one method with different seeds."""


def compare(
    policy: Model,
    baseline: Model,
    prompts: Source,
    judge: Judge,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int = 512,
    truncation_side: TruncationSide = "right",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_bad_record: OnBadRecord = "raise",
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    save: str | Path | None = None,
) -> WinRate:
    """Let two policies write to the same held-out prompts and compare them side by side.

    Args:
      policy: the policy that is evaluated: a `LanguageModel`, a Hugging Face directory, a run directory, a checkpoint.
      baseline: what it is compared with, usually the reference.
      prompts: P prompts that neither was trained on, at least 2, in any form that `train` takes; see `evaluate`.
      judge: says p(first ≻ second).
      max_new_tokens: longest completion, EOS included.
      max_prompt_tokens: longest prompt; a longer chat loses its oldest turns, a text is cut, and a warning says so.
      truncation_side: where a text is cut: "right" keeps its first tokens, "left" its last.
      chat_template_kwargs: options of the policies' chat templates, such as `enable_thinking`.
      on_bad_record: what becomes of bad records, as for `fastpref.data.read_records`.
      temperature: of the draws.
      seed: of the draws; the two policies draw with different noise.
      batch_size: prompts decoded at once.
      save: a folder that keeps what the judge says, in `judged.sqlite`: the same call again, after a kill or a judge
        that failed midway, asks for the rest alone.

    Raises:
      ValueError: fewer than 2 prompts, or an empty one.
      FileNotFoundError: there is no such model.
      JudgeError: see `judging.protocol.ask`.
      JudgementsError: what the folder keeps is damaged, or cannot be written.

    Warns:
      DropWarning: records were dropped, or hold columns that are not used.
    """
    found = evaluate(
        {"policy": policy, "baseline": baseline},
        prompts,
        judge,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        truncation_side=truncation_side,
        chat_template_kwargs=chat_template_kwargs,
        on_bad_record=on_bad_record,
        temperature=temperature,
        seeds=(seed,),
        batch_size=batch_size,
        save=save,
    )
    ((ours,), (theirs,)) = found.texts
    return summarise(found.prompts, ours, theirs, found.preference["policy", "baseline"][0])


def evaluate(
    policies: Policies,
    prompts: Source,
    judge: Judge,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int = 512,
    truncation_side: TruncationSide = "right",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_bad_record: OnBadRecord = "raise",
    temperature: float = 1.0,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 64,
    save: str | Path | None = None,
) -> WinRates:
    """Let any number of policies write to the same held-out prompts, and compare each with each, side by side.

    The draws of a model depend on the sampling seed and on its name, not on the other policies. With several models
    under one name, every model of one is compared with every model of the other, under each sampling seed: with 3
    models each and one seed, value and deviation are those of the IPO-MD paper's Table 2.

    Args:
      policies: at least 2, by name or as a list: `LanguageModel`s, Hugging Face directories, run directories or
        checkpoints; or a list of those under one name. Models are read one at a time. A list names directories by
        their path and models "policy 0", "policy 1", …
      prompts: P prompts that none was trained on, at least 2: texts, mappings with a `prompt`, or a file, as for
        `train`. Messages are written for each policy by its own chat template; a function that judges reads them as
        that of the first policy writes them, a judging model by its own.
      judge: says p(first ≻ second).
      max_new_tokens: longest completion, EOS included.
      max_prompt_tokens: longest prompt; a longer chat loses its oldest turns, a text is cut, and a warning says so.
      truncation_side: where a text is cut: "right" keeps its first tokens, "left" its last.
      chat_template_kwargs: options of the policies' chat templates, such as `enable_thinking`.
      on_bad_record: what becomes of bad records, as for `fastpref.data.read_records`.
      temperature: of the draws.
      seeds: sampling seeds, different ones.
      batch_size: prompts decoded at once.
      save: a folder that keeps what the judge says, in `judged.sqlite`: the same call again, after a kill or a judge
        that failed midway, asks for the rest alone.

    Raises:
      ValueError: fewer than 2 policies or prompts, an empty prompt, a name or seed given twice.
      DataError: the prompts cannot be read.
      ChatError: a policy has no chat template, or one that refuses a conversation.
      ModelError: a model cannot be read, or one that judges has too few positions for what it would read.
      FileNotFoundError: there is no such model.
      JudgeError: see `judging.protocol.ask`.
      JudgementsError: what the folder keeps is damaged, or cannot be written.

    Warns:
      DropWarning: records were dropped, or hold columns that are not used.
    """
    # All before anything is written, which may take long.
    check_prompts(prompts)
    named = name_policies(policies)
    first = read_tokenizer(next(iter(named.values()))[0])
    options: dict[str, Any] = {"on_bad_record": on_bad_record, "chat_template_kwargs": chat_template_kwargs}
    questions = read_prompts(prompts, first, **options)
    check_prompts(questions)
    if any(isinstance(question, Rendered) for question in questions):
        for model in chain.from_iterable(named.values()):
            written_by(ChatTemplate.find(read_tokenizer(model), chat_template_kwargs), questions)
    check_positions(judge, questions, max_new_tokens)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different, at least one, but received {list(seeds)}. Give each seed once.")
    texts = {
        name: [
            draw(
                read_model(model),
                questions,
                stream=f"{seed} {number} {name}",
                max_new_tokens=max_new_tokens,
                max_prompt_tokens=max_prompt_tokens,
                truncation_side=truncation_side,
                chat_template_kwargs=chat_template_kwargs,
                temperature=temperature,
                batch_size=batch_size,
            )
            for number, model in enumerate(models)
            for seed in seeds
        ]
        for name, models in named.items()
    }
    pairs = {
        (one, other): [
            (first * len(seeds) + seed, second * len(seeds) + seed)
            for first, second, seed in product(range(len(named[one])), range(len(named[other])), range(len(seeds)))
        ]
        for one, other in combinations(named, 2)
    }
    with kept(judge, save) as asked:
        preference = {
            (one, other): np.stack([both_orders(asked, questions, texts[one][i], texts[other][j]) for i, j in drawn])
            for (one, other), drawn in pairs.items()
        }
    value, low, high, deviation = tabulate(list(named), preference)
    return WinRates(list(named), questions, list(texts.values()), preference, pairs, value, low, high, deviation)


@contextmanager
def kept(judge: Judge, folder: str | Path | None) -> Iterator[Judge]:
    """The judge with its answers kept in a folder, or as it is."""
    if folder is None:
        yield judge
        return
    with Judgements(Path(folder) / FILE) as log:
        yield RecordedJudge(judge, log).at("side by side", 0)


def name_policies(policies: Policies) -> dict[str, list[Model]]:
    """The models of each policy by name, each known to be there.

    Raises:
      ValueError: fewer than 2, none under a name, or a name given twice.
      FileNotFoundError: there is no such model.
    """
    if not isinstance(policies, Mapping):
        listed = [
            (f"policy {number}" if isinstance(model, LanguageModel) else str(model), model)
            for number, model in enumerate(policies)
        ]
        names = [name for name, _ in listed]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"policies must have different names, but received {twice[0]!r} {names.count(twice[0])} times. "
                "Pass a mapping from names of your own."
            )
        policies = dict(listed)
    if len(policies) < 2:
        raise ValueError(
            f"a comparison needs at least 2 policies, but received {len(policies)}. "
            "Add a baseline, such as the reference."
        )
    named: dict[str, list[Model]] = {}
    for name, models in policies.items():
        named[name] = [models] if isinstance(models, LanguageModel | str | Path) else list(models)
        if not named[name]:
            raise ValueError(f"a policy must have at least one model, but {name!r} has none. Leave the name out.")
        for model in named[name]:
            if not isinstance(model, LanguageModel):
                locate(model)
    return named


def draw(model: LanguageModel, prompts: Sequence[str], *, stream: str, **settings: Any) -> list[str]:
    """One completion of each prompt; the text `stream` names the noise. `settings` are those of `write`."""
    seed = xxhash.xxh32_intdigest(stream.encode()) >> 1
    return [text for (text,) in write(model, prompts, seed=seed, **settings).texts]
