"""Supervised trainings: SFT (maximum likelihood), preference model (cross-entropy), reward model (Bradley-Terry)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx

from fastpref.data import (
    ChatTemplate,
    CompletionBatcher,
    DropReport,
    PaddedPairBatcher,
    Record,
    Source,
    TokenRecords,
    read_records,
    tokenize_completions,
    tokenized,
)
from fastpref.data.batches import CompletionBatch
from fastpref.judging.models import SUMMARY_PROMPT, PreferenceModel, RewardModel
from fastpref.judging.protocol import agreement, columns_of
from fastpref.learning import loop
from fastpref.learning.fit import FitResult, fit
from fastpref.learning.objectives import (
    answer_loss,
    measure,
    reward_loss,
    token_loss,
    token_loss_with_frozen_head,
)
from fastpref.method.config import SupervisedConfig
from fastpref.method.errors import require
from fastpref.models import LanguageModel, as_model, quantized, save
from fastpref.models.adapters import Adapters, Base, trainable
from fastpref.models.directories import ADAPTER_FILES, warn_of_merging
from fastpref.runs import owner

PAIR_COLUMNS, NO_LIMIT = ("prompt", "chosen", "rejected"), 2**31 - 1
LIMITS = {"prompt too long": "max_prompt_tokens", "completion too long": "max_completion_tokens"}
"""The setting that a record is dropped for, by the reason."""


def _arrays(batch: CompletionBatch) -> dict[str, Any]:
    return {entry.name: getattr(batch, entry.name) for entry in dataclasses.fields(batch) if entry.name != "ids"}


def _tokens(
    data: Source, model: LanguageModel, columns: Sequence[str], config: SupervisedConfig, cache: Any = None
) -> tuple[TokenRecords, DropReport]:
    return tokenized(
        data,
        model.tokenizer,
        columns=columns,
        max_prompt_tokens=config.max_prompt_tokens,
        max_completion_tokens=config.max_completion_tokens,
        cache=cache,
        vocab_size=model.module.vocab_size,
        overlong=config.overlong,
        truncation_side=config.truncation_side,
        on_bad_record=config.on_bad_record,
        template=ChatTemplate.find(model.tokenizer, config.chat_template_kwargs),
    )


def _sizes(config: SupervisedConfig) -> dict[str, Any]:
    """The settings that batchers take."""
    names = ("batch_size", "seed", "max_prompt_tokens", "max_completion_tokens", "max_shapes")
    return {name: getattr(config, name) for name in names}


def _pairs(data: Source, model: LanguageModel, config: SupervisedConfig) -> tuple[list[Record], DropReport]:
    template = ChatTemplate.find(model.tokenizer, config.chat_template_kwargs)
    return read_records(data, columns=PAIR_COLUMNS, on_bad_record=config.on_bad_record, template=template)


def _within_limits(
    records: list[Record], read: DropReport, model: LanguageModel, config: SupervisedConfig
) -> tuple[list[Record], DropReport]:
    """The records whose completions keep to `max_completion_tokens`. A preference model shortens prompts by itself."""
    tokens, kept = tokenize_completions(
        records,
        model.tokenizer,
        max_prompt_tokens=NO_LIMIT,
        max_completion_tokens=config.max_completion_tokens,
        vocab_size=model.module.vocab_size,
        overlong=config.overlong,
        on_bad_record=config.on_bad_record,
    )
    ids = set(tokens.ids.tolist())
    return [record for record in records if record.id in ids], read.then(kept)


def _check_destination(run_dir: str | Path | None, *beside: str) -> None:
    if run_dir is not None:
        loop.check_destination(Path(run_dir) / "model", *beside, *ADAPTER_FILES)


def _parts(model: LanguageModel, config: SupervisedConfig, run_dir: str | Path | None) -> tuple[Base, Adapters] | None:
    """The base and the initial adapters of a training, or None where all parameters are trained."""
    model = quantized(model) if config.base_dtype == "int8" else model
    parts = trainable(model, config.adapter, seed=config.seed)
    if parts is not None and run_dir is not None:
        warn_of_merging(model)
    return parts


def _report(source: Source, report: DropReport, config: SupervisedConfig, quiet: bool) -> None:
    named = source if isinstance(source, str | Path) else "the data"
    loop.report_drops(report, config, limits=LIMITS, source=named, quiet=quiet)


def sft(
    policy: LanguageModel | str | Path,
    data: Source,
    config: SupervisedConfig | None = None,
    *,
    held_out: Source = (),
    run_dir: str | Path | None = None,
    cache: str | Path | None = None,
    optimizer: optax.GradientTransformation | None = None,
    quiet: bool = False,
) -> FitResult:
    """Fine-tune a language model on recorded completions: the starting point and reference of `train`.

    The loss is the mean of −log π over completion tokens, EOS included; prompts are read, not learned.

    Args:
      policy: a `LanguageModel`, or the directory of a Hugging Face checkpoint. It is not changed.
      data: records with `prompt` and `completion`, read as those of `train`.
      config: settings.
      held_out: records of the same form; the model with the lowest loss on them is returned.
      run_dir: where config, metrics, checkpoints, plots and the model are written; the same call goes on from there.
      cache: a directory that keeps the tokens of `data`, so that the next run maps them.
      optimizer: any optax transformation, instead of the one that the config names.
      quiet: show no progress bar.

    Returns:
      `FitResult`; its criterion is `eval/loss`, in nats per token.

    Raises:
      ConfigError: a setting breaks its rule.
      DataError: a record cannot be used, or more than `config.max_lost` allows would be dropped.
      CheckpointError: the run directory holds another run.
      DivergedError: five updates in a row were not finite.
      FileExistsError: `model` in the run directory holds other files than a model's.
      OwnerError, KeyboardInterrupt, StopSignal: as `train` does.
    """
    config = SupervisedConfig() if config is None else config
    model = as_model(policy)
    parts = _parts(model, config, run_dir)
    _check_destination(run_dir)
    tokens, report = _tokens(data, model, ("prompt", "completion"), config, cache)
    _report(data, report, config, quiet)
    checks, held = _tokens(held_out, model, ("prompt", "completion"), config)
    if held.read:
        _report("held_out", held, config, quiet)

    def batches(of: TokenRecords) -> CompletionBatcher:
        return CompletionBatcher(of.prompts, *of.completions, ids=of.ids, **_sizes(config))

    with owner.hold(run_dir), batches(tokens) as batcher:

        def validate(module: Any) -> float:
            definition, params = nnx.split(module)
            with batches(checks) as each:
                sums = [measure(definition, params, _arrays(batch), objective=token_loss) for batch in each.in_order()]
            total, count = (sum(float(part[which]) for part in sums) for which in (0, 1))
            return total / count

        return fit(
            model.module,
            parts,
            token_loss_with_frozen_head if parts is not None and parts[0].frozen_head else token_loss,
            batcher,
            lambda: _arrays(next(batcher)),
            config,
            validate=validate if held.read else None,
            criterion="eval/loss",
            held_out=checks,
            optimizer=optimizer,
            run_dir=run_dir,
            description="sft",
            quiet=quiet,
            with_module=model.with_module,
            save=save,
            report=report,
        )


def fit_preference_model(
    model: LanguageModel | str | Path,
    data: Source,
    config: SupervisedConfig | None = None,
    *,
    held_out: Source = (),
    template: str = SUMMARY_PROMPT,
    answers: tuple[str, str] = ("1", "2"),
    symmetric: bool = True,
    run_dir: str | Path | None = None,
    optimizer: optax.GradientTransformation | None = None,
    quiet: bool = False,
) -> FitResult:
    """Train a language model to say which of two completions is better.

    Every pair is read in both orders, its prompt once; the loss is the cross-entropy of the answer with the recorded
    preference, hard or soft.

    Args:
      model: where to start; a `LanguageModel` or the directory of a checkpoint. It is not changed.
      data: records with `prompt`, `chosen`, `rejected` and optionally `preference`, read as those of `train`.
      config: settings; `max_prompt_tokens` limits a reading up to the end of the prompt, which is shortened to fit;
        completions above `max_completion_tokens` are dropped, counted, or refused, as `overlong` says.
      held_out: records of the same form; the model with the highest agreement with them is returned.
      template: the text to read, with {prompt}, {first} and {second}.
      answers: the two words whose logits are compared.
      symmetric: average over both orders when judging.
      run_dir: where everything is written; the same call goes on from there.
      optimizer: any optax transformation, instead of the one that the config names.
      quiet: show no progress bar.

    Returns:
      `FitResult` with a `PreferenceModel`; its criterion is `eval/accuracy`: agreement, ties counted as half.

    Raises:
      ConfigError: a setting breaks its rule.
      DataError: a record cannot be used, or more than `config.max_lost` allows would be dropped.
      ValueError: a template or answers that cannot be used.
      CheckpointError: the run directory holds another run.
      DivergedError: five updates in a row were not finite.
      FileExistsError: `model` in the run directory holds other files than a model's.
      OwnerError, KeyboardInterrupt, StopSignal: as `train` does.
    """
    config = SupervisedConfig() if config is None else config
    read: dict[str, Any] = {"max_tokens": config.max_prompt_tokens, "chat_template_kwargs": config.chat_template_kwargs}
    judge = PreferenceModel(as_model(model), template, answers, symmetric=symmetric, **read)
    require(
        config.overlong != "truncate",
        "overlong must be 'drop' or 'raise' for a preference model, which reads completions as text",
        config.overlong,
        "Drop long completions, or raise max_completion_tokens.",
    )
    parts = _parts(judge.model, config, run_dir)
    _check_destination(run_dir, "preference_model.json")
    records, report = _within_limits(*_pairs(data, judge.model, config), judge.model, config)
    _report(data, report, config, quiet)
    checks, held = _pairs(held_out, judge.model, config)
    if held.read:
        _report("held_out", held, config, quiet)
    prompts, chosen, rejected, preference = columns_of(records)
    opened, forward = judge.readings(prompts, chosen, rejected)
    _, backward = judge.readings(prompts, rejected, chosen)
    constants = {"answers": judge.answer_ids(), "symmetric": np.asarray(symmetric)}
    with (
        owner.hold(run_dir),
        PaddedPairBatcher(
            opened,
            forward,
            backward,
            preference,
            vocab_size=judge.model.module.vocab_size,
            **(_sizes(config) | {"max_completion_tokens": max(map(len, forward + backward), default=1)}),
        ) as batcher,
    ):

        def with_module(module: Any) -> PreferenceModel:
            return dataclasses.replace(judge, model=judge.model.with_module(module))

        return fit(
            judge.model.module,
            parts,
            answer_loss,
            batcher,
            lambda: _arrays(next(batcher)) | constants,
            config,
            validate=(lambda module: agreement(with_module(module), checks)) if checks else None,
            criterion="eval/accuracy",
            held_out=checks,
            optimizer=optimizer,
            run_dir=run_dir,
            description="preference model",
            quiet=quiet,
            with_module=with_module,
            save=PreferenceModel.save,
            report=report,
        )


def fit_reward_model(
    model: LanguageModel | str | Path,
    data: Source,
    config: SupervisedConfig | None = None,
    *,
    held_out: Source = (),
    run_dir: str | Path | None = None,
    cache: str | Path | None = None,
    optimizer: optax.GradientTransformation | None = None,
    quiet: bool = False,
) -> FitResult:
    """Train a scalar reward on recorded preferences, by Bradley-Terry (IPO-MD, section 2.2).

    Args:
      model: where to start; a `LanguageModel` or the directory of a checkpoint. It is not changed.
      data: records with `prompt`, `chosen`, `rejected` and optionally `preference`, read as those of `train`.
      config: settings.
      held_out: records of the same form; the model with the highest agreement with them is returned.
      run_dir: where everything is written; the same call goes on from there.
      cache: a directory that keeps the tokens of `data`, so that the next run maps them.
      optimizer: any optax transformation, instead of the one that the config names.
      quiet: show no progress bar.

    Returns:
      `FitResult` with a `RewardModel`; its criterion is `eval/accuracy`: agreement, ties counted as half.

    Raises:
      ConfigError: a setting breaks its rule.
      DataError: a record cannot be used, or more than `config.max_lost` allows would be dropped.
      CheckpointError: the run directory holds another run.
      DivergedError: five updates in a row were not finite.
      FileExistsError: `model` in the run directory holds other files than a model's.
      OwnerError, KeyboardInterrupt, StopSignal: as `train` does.
    """
    config = SupervisedConfig() if config is None else config
    read = {"max_prompt_tokens": config.max_prompt_tokens, "chat_template_kwargs": config.chat_template_kwargs}
    judge = RewardModel.from_model(as_model(model), **read)
    parts = _parts(judge.model, config, run_dir)
    if parts is not None:
        base, adapters = parts
        parts = base.within(judge.module, "policy", adapters)
    _check_destination(run_dir, "reward_model.json", "reward_head.safetensors")
    tokens, report = _tokens(data, judge.model, PAIR_COLUMNS, config, cache)
    _report(data, report, config, quiet)
    checks, held = _pairs(held_out, judge.model, config)
    if held.read:
        _report("held_out", held, config, quiet)
    with (
        owner.hold(run_dir),
        PaddedPairBatcher(
            tokens.prompts,
            tokens.completions[0],
            tokens.completions[1],
            tokens.preference,
            ids=tokens.ids,
            **_sizes(config),
        ) as batcher,
    ):

        def with_module(module: Any) -> RewardModel:
            return dataclasses.replace(judge, model=judge.model.with_module(module.policy), module=module)

        return fit(
            judge.module,
            parts,
            reward_loss,
            batcher,
            lambda: _arrays(next(batcher)),
            config,
            validate=(lambda module: agreement(with_module(module), checks)) if checks else None,
            criterion="eval/accuracy",
            held_out=checks,
            optimizer=optimizer,
            run_dir=run_dir,
            description="reward model",
            quiet=quiet,
            with_module=with_module,
            save=RewardModel.save,
            report=report,
        )
