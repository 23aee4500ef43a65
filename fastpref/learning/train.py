"""The one loop of every algorithm: gather pairs, update the policy, and write down what happened."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fastpref.data import (
    ChatTemplate,
    DropReport,
    PairBatcher,
    PromptBatcher,
    read_prompts,
    read_records,
    tokenize_prompts,
    tokenized,
)
from fastpref.data.batches import PackedPairs, PromptBatch
from fastpref.evaluation.during_training import HeldOut
from fastpref.judging.identity import name_of
from fastpref.judging.judgements import FILE, Judgements
from fastpref.judging.protocol import Judge, Rewarder
from fastpref.judging.recorded import RecordedJudge
from fastpref.learning import loop, optimizers, rollout, update
from fastpref.learning.row_plan import RowPlan, pair_sizes, plan_rows
from fastpref.method.config import TrainConfig, to_json
from fastpref.method.errors import ConfigError, DataError, DivergedError, require
from fastpref.method.schedules import value_at
from fastpref.models import T5, Decoder, LanguageModel, as_model, save
from fastpref.runs.report import finish

Prompts = str | Path | Iterable[str | Mapping[str, Any]]
"""Texts, mappings with a `prompt`, or a JSONL, Parquet or Arrow file with that column."""

UNHEALTHY_LIMIT = 5
"""So many skipped updates in a row end a run: the state before them is what the last checkpoint holds."""


@dataclass(frozen=True)
class Step:
    """What a callback is told after each step."""

    step: int
    """Steps completed, from 1."""
    metrics: Mapping[str, float]
    policy: Callable[[], LanguageModel]
    """Gives the policy as it is now."""


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Args:
      policy: the aligned model.
      ref: the frozen reference.
      metrics: one mapping for each step made in this process.
      run_dir: where the run was written, or None.
      report: what became of the prompts.
    """

    policy: LanguageModel
    ref: LanguageModel
    metrics: list[dict[str, float]]
    run_dir: Path | None
    report: DropReport


def train(
    policy: LanguageModel | str | Path,
    prompts: Prompts,
    judge: Judge | Rewarder | None = None,
    config: TrainConfig | None = None,
    *,
    ref: LanguageModel | str | Path | None = None,
    behaviour: LanguageModel | str | Path | None = None,
    run_dir: str | Path | None = None,
    cache: str | Path | None = None,
    optimizer: optax.GradientTransformation | None = None,
    eval_prompts: Prompts = (),
    eval_judge: Judge | None = None,
    callbacks: Sequence[Callable[[Step], None]] = (),
    quiet: bool = False,
) -> TrainResult:
    """Align a language model with preferences: online with those of a judge, or offline with recorded ones.

    Every step draws completions for each prompt of a batch and asks the judge, or reads recorded pairs, and updates the
    policy by the algorithm's loss; `ALGORITHMS` says which does what. With a run directory, killing the process at any
    moment and starting the same call again continues it exactly: parameters, optimiser, π_t, noise and prompt order;
    all metrics but `time/...` are bitwise those of an uninterrupted run.

    Args:
      policy: a `LanguageModel`, or the directory of a Hugging Face checkpoint. It is not changed.
      prompts: texts, mappings with a `prompt`, or a JSONL, Parquet or Arrow file with that column. For offline
        algorithms each record also has `chosen`, `rejected` and, where labels are soft, `preference`. Messages, lists
        of `role` and `content`, may stand for text: the chat template of the policy's tokenizer writes them, and the
        judge reads prompts as it wrote them.
      judge: p(first ≻ second) for each prompt; see `fastpref.Judge`. A plain function will do. The run
        belongs to it (`fastpref.judging.identity`): another is refused. For `rl` a
        `RewardModel`, or anything with its `scores`; which any other algorithm takes for p = σ(r − r'). None for
        offline algorithms.
      config: settings; the defaults are the paper's.
      ref: π_ref; None for the policy as it is given.
      behaviour: μ, for `mixture_partner="behaviour"`. It shares the policy's tokenizer.
      run_dir: where config, metrics, samples, checkpoints, plots and the aligned model are written; None for nowhere.
      cache: of offline algorithms, a directory that keeps the tokens of the pairs, so that the next run maps them.
      optimizer: any optax transformation, instead of the one that the config names.
      eval_prompts: held-out prompts, compared with the reference every `config.eval_every` steps.
      eval_judge: the judge of those comparisons; None for `judge`. Like the prompts, it stays that of the run.
      callbacks: functions called with a `Step` after each step.
      quiet: show no progress bar.

    Returns:
      `TrainResult`.

    Raises:
      ConfigError: a setting breaks its rule.
      DataError: the prompts cannot be read, or none is left.
      JudgeError: the judge failed; the steps before are saved.
      JudgementsError: what the judge said before is damaged, or cannot be written.
      CheckpointError: the run directory holds another run.
      DivergedError: five updates in a row were not finite.
    """
    config = TrainConfig() if config is None else config
    row = config.row
    _check_sources(config, judge, behaviour)
    require(
        cache is None or row.offline,
        f"cache must be None for {config.algorithm}, which is online: its judge reads text",
        cache,
        "Leave it out, or choose an offline algorithm.",
    )
    policy = as_model(policy)
    ref = policy if ref is None else as_model(ref)
    frozen = rollout.Frozen(*nnx.split(ref.module))
    partner = frozen if behaviour is None else rollout.Frozen(*nnx.split(as_model(behaviour).module))
    texts, source, rows, report = _source(prompts, policy, config, cache)
    chain = optimizers.build(config) if optimizer is None else optimizer
    definition, start = nnx.split(policy.module)

    def copy(parameters: Any) -> Any:
        # The learner donates its buffers, and these are still the caller's, or π_t's.
        return jax.tree.map(jnp.copy, parameters)

    checks = read_prompts(eval_prompts, policy.tokenizer, on_bad_record=config.on_bad_record)[: config.eval_prompts]
    eval_judge = _as_judge(eval_judge or judge, config) if config.eval_every else None

    def current(parameters: Any) -> LanguageModel:
        return dataclasses.replace(policy, module=nnx.merge(definition, copy(parameters)))

    def advance(done: int, arrays: Any) -> loop.Outcome:
        parameters, opt_state, round_params = arrays
        if row.in_rounds and done % config.round_steps == 0:
            round_params = copy(parameters)
        waiting = rollout.Clock()
        batch: PromptBatch | PackedPairs = source.__next__()
        waiting.lap("time/data")
        gathered = gather(done, batch, parameters, round_params)
        clock = rollout.Clock()
        tau, eta = config.strengths(done)
        parameters, opt_state, measured = update.update(
            definition,
            parameters,
            opt_state,
            gathered.pairs,
            np.float32(eta if row.strength == "eta" else tau),
            optimizer=chain,
            objective=row.objective,
            gradient_accumulation=config.gradient_accumulation,
            length_normalize=config.length_normalize,
        )
        metrics = {name: float(value) for name, value in measured.items()}
        clock.lap("time/learn")
        metrics |= {
            "tau": tau,
            "learning_rate": value_at(config.learning_rate, done),
            "epoch": float(source.epoch),
            **({"mixture_beta": value_at(config.mixture_beta, done)} if "mixture" in row.writers else {}),
            **({"eta": eta} if row.strength == "eta" else {}),
            **({"round": float(done // config.round_steps + 1)} if row.in_rounds else {}),
            **gathered.metrics,
            **waiting.laps,
            **clock.laps,
        }
        shown = gathered.samples if (done + 1) % config.sample_every == 0 else []
        if held_out is not None and ((done + 1) % config.eval_every == 0 or done + 1 == config.steps):
            metrics |= held_out.measure(current(parameters), done + 1)
            shown = [*shown, *held_out.samples]
        return loop.Outcome((parameters, opt_state, round_params), metrics, shown)

    skipped = 0

    def on_step(done: int, metrics: dict[str, float], arrays: Any) -> None:
        nonlocal skipped
        skipped = skipped + 1 if metrics["updates/skipped"] else 0
        if skipped == UNHEALTHY_LIMIT:
            raise DivergedError(
                f"loss and gradient must be finite, but were not in {skipped} updates in a row, up to step {done}. "
                "The policy is as it was before them. Lower learning_rate, raise tau, or set max_grad_norm."
            )
        for callback in callbacks:
            callback(Step(done, metrics, lambda: current(arrays[0])))

    folder = None if run_dir is None else Path(run_dir)
    settings = to_json(config)
    params = copy(start)
    with ExitStack() as stack:
        stack.enter_context(source)
        log = None
        if folder is not None and (judge is not None or eval_judge is not None):
            log = stack.enter_context(Judgements(folder / FILE))
        asked = None if judge is None else RecordedJudge(judge, log, timeout=config.judge_timeout)
        held_out = None
        if eval_judge is not None:
            same = asked if eval_judge is judge else None
            judged = same or RecordedJudge(eval_judge, log, timeout=config.judge_timeout)
            held_out = HeldOut(ref, checks, judged, config)
        fingerprint = {
            **loop.lasting(settings),
            "policy": loop.digest(start),
            "tokenizer": policy.tokenizer.fingerprint.hex(),
            "reference": loop.digest(frozen.params),
            "optimizer": config.optimizer if optimizer is None else "passed as an object",
            **({"behaviour": loop.digest(partner.params)} if partner is not frozen else {}),
            **({"steps of a round": config.round_steps} if row.in_rounds else {}),
            **({} if asked is None else {"judge": asked.identity.fingerprint()}),
            **({} if held_out is None else {"evaluation": held_out.fingerprint()}),
        }
        gather = rollout.Rollout(
            config=config,
            policy=policy,
            definition=definition,
            ref=frozen,
            partner=partner,
            judge=asked,
            texts=texts,
            rows=rows,
        )
        (params, _, _), history = loop.drive(
            advance,
            (params, optimizers.initial_state(chain, params), copy(start) if row.in_rounds else ()),
            source,
            steps=config.steps,
            journal=loop.Journal(
                run_dir=folder,
                settings=settings,
                fingerprint=fingerprint,
                checkpoint_every=config.checkpoint_every,
                keep_checkpoints=config.keep_checkpoints,
            ),
            description=config.algorithm,
            on_step=on_step,
            quiet=quiet,
        )
    aligned = current(params)
    if folder is not None:
        if isinstance(policy.module, T5 | Decoder):
            save(aligned, folder / "policy")
        finish(folder, config.algorithm, data=report, judge=None if judge is None else name_of(judge))
    return TrainResult(policy=aligned, ref=ref, metrics=history, run_dir=folder, report=report)


def _check_sources(config: TrainConfig, judge: Judge | Rewarder | None, behaviour: object) -> None:
    """Whether the judge and the models that were passed are those that the algorithm reads."""
    row, name = config.row, config.algorithm
    if row.offline:
        require(
            judge is None,
            f"{name} learns from recorded labels and must be given no judge",
            judge,
            "Pass judge=None, and a judge of held-out comparisons as eval_judge.",
        )
    else:
        require(
            callable(judge) or isinstance(judge, Rewarder),
            f"{name} is online and must be given a judge",
            judge,
            f"Pass {'a RewardModel' if row.judged_by == 'reward' else 'a function or a PreferenceModel'}, "
            "or choose an offline algorithm.",
        )
    require(
        row.judged_by != "reward" or isinstance(judge, Rewarder),
        f"{name} is judged by rewards: its judge must have scores(prompts, completions)",
        judge,
        "Pass a RewardModel; a judge of pairs goes with an algorithm such as online-ipo.",
    )
    wanted = config.mixture_partner == "behaviour"
    require(
        wanted == (behaviour is not None),
        f"behaviour must be {'a model' if wanted else 'None'} for mixture_partner={config.mixture_partner!r}",
        behaviour,
        "Pass both, to mix the policy with the behaviour model, or neither.",
    )


def _source(
    prompts: Prompts, policy: LanguageModel, config: TrainConfig, cache: str | Path | None
) -> tuple[dict[int, str], PromptBatcher | PairBatcher, RowPlan, DropReport]:
    """The prompts by id, the batcher of what is learned from, how it is packed, and what became of the records."""
    template = ChatTemplate.find(policy.tokenizer)
    limits: dict[str, Any] = {
        "vocab_size": policy.module.vocab_size,
        "overlong": config.overlong,
        "on_bad_record": config.on_bad_record,
    }
    start = policy.module.decoder_start
    if config.row.offline:
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
        rows = plan_rows(config, decoder_start=start, prompts=tokens.prompts)
        chosen, rejected = tokens.completions
        sizes = pair_sizes(tokens.prompts, chosen, rejected, layout=rows.layout)
        pairs = PairBatcher(
            tokens.prompts,
            chosen,
            rejected,
            tokens.preference,
            ids=tokens.ids,
            tokenizer_hash=policy.tokenizer.fingerprint,
            rows=rows.rows_for(sizes, config.batch_size),
            seed=config.seed,
            **rows.shape,
        )
        return {}, pairs, rows, report
    records, read = read_records(prompts, on_bad_record=config.on_bad_record, template=template)
    encoded, kept = tokenize_prompts(records, policy.tokenizer, max_tokens=config.max_prompt_tokens, **limits)
    batcher = PromptBatcher(
        encoded.prompts,
        ids=encoded.ids,
        batch_size=config.batch_size,
        max_tokens=config.max_prompt_tokens,
        max_shapes=config.max_shapes,
        seed=config.seed,
    )
    rows = plan_rows(config, decoder_start=start, prompts=encoded.prompts)
    return {record.id: record.prompt for record in records}, batcher, rows, read.then(kept)


def _as_judge(judge: Judge | Rewarder | None, config: TrainConfig) -> Judge:
    if not isinstance(judge, Judge):
        raise ConfigError(
            f"eval_every={config.eval_every} needs a judge of pairs, but received {judge!r}. "
            "Pass eval_judge, or set eval_every=0."
        )
    return judge
