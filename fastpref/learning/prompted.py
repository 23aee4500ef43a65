"""Reading of what a run learns from: prompts, or recorded pairs, in batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastpref.data import ChatTemplate, DropReport, PairBatcher, PromptBatcher, Source, tokenized
from fastpref.data.tokenization import PromptTexts
from fastpref.learning import loop
from fastpref.learning.held_out import LIMITS
from fastpref.learning.row_plan import RowPlan, plan_recorded, plan_rows
from fastpref.method.config import TrainConfig
from fastpref.method.errors import DataError
from fastpref.models import LanguageModel


class Prompted(NamedTuple):
    """Source of what a run learns from."""

    batches: PromptBatcher | PairBatcher
    """Prompts of online methods, packed pairs of offline ones."""
    texts: Mapping[int, str]
    """Prompts by id, as the judge reads them; none offline."""
    plan: RowPlan
    report: DropReport
    longest: int
    """Inputs of the longest sequence that a model reads, for its positions."""


def read_source(
    prompts: Source, policy: LanguageModel, config: TrainConfig, cache: str | Path | None, quiet: bool
) -> Prompted:
    """Read, encode and batch what is learned from."""
    template = ChatTemplate.find(policy.tokenizer, config.chat_template_kwargs)
    named = prompts if isinstance(prompts, str | Path) else "the prompts"
    limits: dict[str, Any] = {
        "vocab_size": policy.module.vocab_size,
        "overlong": config.overlong,
        "truncation_side": config.truncation_side,
        "on_bad_record": config.on_bad_record,
    }
    start = policy.module.decoder_start
    if config.method.offline:
        try:
            tokens, report = tokenized(
                prompts,
                policy.tokenizer,
                columns=("prompt", "chosen", "rejected"),
                max_prompt_tokens=config.max_prompt_tokens,
                max_completion_tokens=config.max_new_tokens,
                cache=cache,
                template=template,
                **limits,
            )
        except DataError as error:
            raise DataError(f"{config.algorithm} learns from recorded pairs: {error}") from error
        loop.report_drops(report, config, limits=LIMITS, source=named, quiet=quiet)
        plan = plan_recorded(config, decoder_start=start, pairs=tokens)
        lengths, *of_completions = (np.diff(rows.offsets) for rows in (tokens.prompts, *tokens.completions))
        longest = int((lengths + np.maximum(*of_completions)).max()) - 1
        pairs = PairBatcher(
            tokens.prompts,
            tokens.completions[0],
            tokens.completions[1],
            tokens.preference,
            ids=tokens.ids,
            tokenizer_hash=policy.tokenizer.fingerprint,
            batch_size=config.batch_size,
            max_shapes=config.max_shapes,
            multiple=config.gradient_accumulation,
            seed=config.seed,
            **plan.shape,
        )
        return Prompted(pairs, {}, plan, report, longest)
    encoded, report = tokenized(
        prompts,
        policy.tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        cache=cache,
        template=template,
        **limits,
    )
    loop.report_drops(report, config, limits=LIMITS, source=named, quiet=quiet)
    batcher = PromptBatcher(
        encoded.prompts,
        ids=encoded.ids,
        batch_size=config.batch_size,
        max_tokens=config.max_prompt_tokens,
        max_shapes=config.max_shapes,
        seed=config.seed,
    )
    plan = plan_rows(config, decoder_start=start, prompts=encoded.prompts)
    longest = batcher.shapes[-1][0] + config.max_new_tokens - 1
    return Prompted(batcher, PromptTexts(encoded), plan, report, longest)
