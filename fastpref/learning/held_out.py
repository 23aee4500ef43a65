"""Held-out prompts of a run: read, and what becomes of them said, before anything is learned."""

from collections.abc import Sequence
from typing import Any

from fastpref.data import ChatTemplate, Source, read_records
from fastpref.data.tokenization import fit_prompts
from fastpref.learning import loop
from fastpref.method.config import TrainConfig
from fastpref.models import LanguageModel
from fastpref.models.policy import check_length
from fastpref.runs import terminal
from fastpref.sampling.generate import padded_width

LIMITS = {"prompt too long": "max_prompt_tokens", "completion too long": "max_new_tokens"}
"""The setting that a record is dropped for, by the reason."""


def read_held_out(source: Source, models: Sequence[LanguageModel], config: TrainConfig, quiet: bool) -> list[str]:
    """Read held-out prompts, and say now which of them are dropped, will be cut, or are not used.

    Args:
      source: where they come from.
      models: what will write to them; the first brings tokenizer and template.
      config: the settings of the run.
      quiet: print nothing.

    Raises:
      DataError: they cannot be read, or more of them than `config.max_lost` allows would be dropped.
      ModelError: a model has too few positions for them.

    Warns:
      CutWarning: some will be cut.
    """
    tokenizer = models[0].tokenizer
    template = ChatTemplate.find(tokenizer, config.chat_template_kwargs)
    records, report = read_records(source, on_bad_record=config.on_bad_record, template=template)
    if report.read:
        loop.report_drops(report, config, limits=LIMITS, source="the eval_prompts", quiet=quiet)
    used = config.eval_prompts if config.eval_every else 0
    if len(records) > used and not quiet:
        setting = f"eval_prompts is {used}" if config.eval_every else "eval_every is 0"
        terminal.say(f"{used} of {len(records)} eval_prompts are used during the run: {setting}")
    prompts = [record.prompt for record in records[:used]]
    limits: dict[str, Any] = {name: getattr(config, name) for name in ("max_prompt_tokens", "truncation_side")}
    encoded = fit_prompts(prompts, tokenizer, **limits)
    for model in models if prompts else ():
        check_length(model.module, padded_width(encoded, config.max_prompt_tokens) + config.max_new_tokens - 1)
    return prompts
