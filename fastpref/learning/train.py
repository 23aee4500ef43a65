"""Training by preferences, online and offline: `train`, and the step of every method in one place, `Trainer.step`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

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
    Source,
    tokenized,
)
from fastpref.data.batches import PackedPairs, PromptBatch
from fastpref.data.tokenization import PromptTexts
from fastpref.evaluation.during_training import HeldOut
from fastpref.judging.identity import identity, name_of
from fastpref.judging.judgements import FILE, Judgements
from fastpref.judging.positions import check_positions
from fastpref.judging.protocol import Judge, Rewarder, by_scores
from fastpref.judging.recorded import RecordedJudge
from fastpref.learning import loop, rollout, update
from fastpref.learning.held_out import LIMITS, read_held_out
from fastpref.learning.row_plan import RowPlan, plan_recorded, plan_rows
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError, DataError, require
from fastpref.method.schedules import value_at
from fastpref.models import T5, Decoder, LanguageModel, as_model, save
from fastpref.models.policy import check_length
from fastpref.models.rows import shared_rows
from fastpref.runs import owner
from fastpref.runs.report import finish


@dataclass(frozen=True)
class Step:
    """State of a run after a step, as a callback receives it."""

    step: int
    """Steps completed, from 1."""
    metrics: Mapping[str, float]
    policy: Callable[[], LanguageModel]
    """Gives the policy as it is now."""


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`.

    Args:
      policy: the aligned model.
      ref: the frozen reference.
      metrics: a mapping for each step of the run, whatever process made it.
      run_dir: where the run was written, or None.
      report: what became of the prompts.
    """

    policy: LanguageModel
    ref: LanguageModel
    metrics: list[dict[str, float]]
    run_dir: Path | None
    report: DropReport


Learned = tuple[Any, Any, Any]
"""Arrays that a step changes and a checkpoint holds: parameters of π, optimiser state, parameters of π_t or ()."""


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


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """All that stays the same from step to step of a run.

    Args:
      config: the settings; `config.method` says who writes, what judges, what is learned from and how.
      policy: the model as it was given, for its tokenizer and sizes.
      definition: its GraphDef.
      ref: π_ref.
      partner: the frozen model that the sampler mixes with: π_ref, or μ.
      source: prompts or recorded pairs.
      judge: of the completions, with the log of its answers; None where the data has labels.
      optimizer: an optax transformation, or None for the one that the config names.
      held_out: comparisons with the reference during the run, or None.
    """

    config: TrainConfig
    policy: LanguageModel
    definition: Any
    ref: rollout.Frozen
    partner: rollout.Frozen
    source: Prompted
    judge: RecordedJudge | None
    optimizer: optax.GradientTransformation | None
    held_out: HeldOut | None

    def step(self, done: int, learned: Learned) -> loop.Outcome:
        """A step: batch, draw, judge, pair, anchor, update, metrics.

        Args:
          done: steps done before.
          learned: the arrays; parameters and optimiser state are donated once the pairs are there.

        Raises:
          JudgeError: the judge failed.
          DivergedError: a model that writes has logits that are not finite.
        """
        config, method, clock = self.config, self.config.method, rollout.Clock()
        params, opt_state, round_params = learned
        if method.in_rounds and done % config.round_steps == 0:
            round_params = _copy(params)
        at_round = rollout.Frozen(self.definition, round_params)

        epoch = self.source.batches.epoch
        batch: PromptBatch | PackedPairs = self.source.batches.__next__()
        clock.lap("time/data")
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        if isinstance(batch, PackedPairs):
            paired = rollout.recorded(batch, self.ref)
        else:
            writer = at_round if "round" in method.writers else rollout.Frozen(self.definition, params)
            drawn = rollout.draw(config, done, batch, self.policy, writer, self.partner)
            clock.lap("time/generate")
            judge = cast(RecordedJudge, self.judge)  # which every online method has
            judged = rollout.judge(config, done, batch, drawn, self.policy, judge, self.source.texts)
            clock.lap("time/judge")
            metrics |= judged.metrics
            samples = judged.samples if (done + 1) % config.sample_every == 0 else []
            same = self.partner is self.ref
            paired = rollout.pair(
                config, batch, drawn, judged.selection, self.source.plan, self.ref, partner_is_ref=same
            )
        pairs = rollout.anchor(config, done, paired, at_round)
        clock.lap("time/pair")
        params, opt_state, measured = update.learn(
            config, done, self.definition, params, opt_state, pairs, optimizer=self.optimizer
        )
        clock.lap("time/learn")

        metrics |= paired.metrics | measured | clock.laps | {"epoch": float(epoch)}
        if "mixture" in method.writers:
            metrics["mixture_beta"] = value_at(config.mixture_beta, done)
        if method.in_rounds:
            metrics["round"] = float(done // config.round_steps + 1)
        return loop.Outcome((params, opt_state, round_params), metrics, samples)

    def measure(self, done: int, learned: Learned) -> loop.Outcome:
        """Held-out metrics and samples, after the steps that ask for them."""
        every, last = self.config.eval_every, done == self.config.steps
        if self.held_out is None or not (done % every == 0 or last):
            return loop.Outcome(learned, {})
        metrics = self.held_out.measure(self.current(learned), done)
        return loop.Outcome(learned, metrics, list(self.held_out.samples))

    def current(self, learned: Learned) -> LanguageModel:
        """The policy as it is now, in arrays of its own."""
        return dataclasses.replace(self.policy, module=nnx.merge(self.definition, _copy(learned[0])))


def _copy(parameters: Any) -> Any:
    # The update donates its buffers, and these are still the caller's, or π_t's.
    return jax.tree.map(jnp.copy, parameters)


def train(
    policy: LanguageModel | str | Path,
    prompts: Source,
    judge: Judge | Rewarder | None = None,
    config: TrainConfig | None = None,
    *,
    ref: LanguageModel | str | Path | None = None,
    behaviour: LanguageModel | str | Path | None = None,
    run_dir: str | Path | None = None,
    cache: str | Path | None = None,
    optimizer: optax.GradientTransformation | None = None,
    eval_prompts: Source = (),
    eval_judge: Judge | None = None,
    callbacks: Sequence[Callable[[Step], None]] = (),
    quiet: bool = False,
) -> TrainResult:
    """Align a language model with preferences: online with those of a judge, or offline with recorded ones.

    Every step draws completions for each prompt of a batch and asks the judge, or reads recorded pairs, and updates the
    policy by the algorithm's loss; `ALGORITHMS` says which does what. With a run directory, killing the process at any
    moment and starting the same call again continues it exactly: parameters, optimiser, π_t, noise and prompt order;
    all metrics but `time/...` are bitwise those of an uninterrupted run. `TrainConfig` says which settings may change
    between two starts.

    Args:
      policy: a `LanguageModel`, or the directory of a Hugging Face checkpoint. It is not changed.
      prompts: texts, mappings with a `prompt`, or files and tables with that column, as for
        `fastpref.data.read_records`. For offline algorithms each record also has `chosen`, `rejected` and, where
        labels are soft, `preference`. Messages, lists of `role` and `content`, may stand for text: the chat template
        of the policy's tokenizer writes them, with the `system`, `tools` and `chat_template_kwargs` of the record, and
        the judge reads prompts as it wrote them.
      judge: p(first ≻ second) for each prompt; see `fastpref.Judge`. A plain function will do. The run
        belongs to it (`fastpref.judging.identity`): another is refused. For `rl` a
        `RewardModel`, or anything with its `scores`; which any other algorithm takes for p = σ(r − r'). None for
        offline algorithms.
      config: settings; the defaults are the paper's.
      ref: π_ref; None for the policy as it is given. Where heads have different numbers of rows past the tokenizer's
        ids, the larger is cut, with a `ModelWarning`.
      behaviour: μ, for `mixture_partner="behaviour"`. It shares the policy's tokenizer.
      run_dir: where config, metrics, samples, checkpoints, plots and the aligned model are written; None for nowhere.
      cache: a directory that keeps the tokens of prompts or pairs, so that the next start maps them.
      optimizer: any optax transformation, instead of the one that the config names.
      eval_prompts: held-out prompts, compared with the reference every `config.eval_every` steps.
      eval_judge: the judge of those comparisons; None for `judge`. Like the prompts, it stays that of the run.
      callbacks: functions called with a `Step` after each step.
      quiet: show no progress bar.

    Returns:
      `TrainResult`.

    Raises:
      ConfigError: a setting breaks its rule.
      DataError: the prompts cannot be read, or more of them than `config.max_lost` allows would be dropped.
      ModelError: a model cannot be read, or one that judges has too few positions for what it would read.
      JudgeError: the judge failed; the steps before are saved.
      JudgementsError: what the judge said before is damaged, or cannot be written.
      CheckpointError: the run directory holds another run.
      OwnerError: another process is writing the run directory.
      DivergedError: five updates in a row were not finite, or the logits of a model that writes.
      FileExistsError: `policy` in the run directory holds other files than a model's.
      KeyboardInterrupt: INT was received; the step was finished and saved. A second one stops at once.
      StopSignal: the same of TERM and HUP.
    """
    config = TrainConfig() if config is None else config
    _check_sources(config, judge, behaviour)
    policy = as_model(policy)
    models = [policy, policy if ref is None else as_model(ref), *([] if behaviour is None else [as_model(behaviour)])]
    policy, ref, *others = shared_rows(models)
    folder = None if run_dir is None else Path(run_dir)
    destination = folder / "policy" if folder is not None and isinstance(policy.module, T5 | Decoder) else None
    if destination is not None:
        loop.check_destination(destination)
    definition, start = nnx.split(policy.module)
    frozen = rollout.Frozen(*nnx.split(ref.module))
    partner = rollout.Frozen(*nnx.split(others[0].module)) if others else frozen
    checks = read_held_out(eval_prompts, (policy, ref), config, quiet)
    eval_judge = _as_judge(eval_judge or judge, config) if config.eval_every else None
    source = _source(prompts, policy, config, cache, quiet)
    for model in (policy, ref, *others):
        check_length(model.module, source.longest)
    check_positions(judge, source.texts.values(), config.max_new_tokens)
    check_positions(eval_judge, checks, config.max_new_tokens)
    with ExitStack() as stack:
        stack.enter_context(owner.hold(folder))
        stack.enter_context(source.batches)
        log = None
        if folder is not None and (judge is not None or eval_judge is not None):
            log = stack.enter_context(Judgements(folder / FILE))
        asked = None if judge is None else RecordedJudge(judge, log, timeout=config.judge_timeout)
        held_out = None
        if eval_judge is not None:
            same = asked if eval_judge is judge else None
            held_out = HeldOut(
                ref, checks, same or RecordedJudge(eval_judge, log, timeout=config.judge_timeout), config
            )
        fingerprint = {
            "policy": loop.digest(start),
            "tokenizer": policy.tokenizer.fingerprint.hex(),
            "reference": loop.digest(frozen.params),
            "optimizer": config.optimizer if optimizer is None else identity(optimizer).fingerprint(),
            **({"prompts": source.texts.digest} if isinstance(source.texts, PromptTexts) else {}),
            **({"behaviour": loop.digest(partner.params)} if partner is not frozen else {}),
            **({"steps of a round": config.round_steps} if config.method.in_rounds else {}),
            **({} if asked is None else {"judge": asked.identity.fingerprint()}),
            **({} if held_out is None else {"evaluation": held_out.fingerprint()}),
        }
        trainer = Trainer(
            config=config,
            policy=policy,
            definition=definition,
            ref=frozen,
            partner=partner,
            source=source,
            judge=asked,
            optimizer=optimizer,
            held_out=held_out,
        )

        def report(done: int, metrics: dict[str, float], learned: Learned) -> None:
            for callback in callbacks:
                callback(Step(done, metrics, lambda: trainer.current(learned)))

        params = _copy(start)
        opt_state = update.initial_state(update.build(config) if optimizer is None else optimizer, params)
        learned, history = loop.drive(
            trainer.step,
            (params, opt_state, _copy(start) if config.method.in_rounds else ()),
            source.batches,
            config,
            run_dir=folder,
            fingerprint=fingerprint,
            description=config.algorithm,
            measure=trainer.measure,
            on_step=report,
            quiet=quiet,
        )
        aligned = trainer.current(learned)
        if folder is not None:
            if destination is not None:
                save(aligned, destination)
            finish(folder, config.algorithm, data=source.report, judge=None if judge is None else name_of(judge))
    return TrainResult(policy=aligned, ref=ref, metrics=history, run_dir=folder, report=source.report)


def _check_sources(config: TrainConfig, judge: Judge | Rewarder | None, behaviour: object) -> None:
    """Require the judge and the models that the method reads, and no others."""
    method, name = config.method, config.algorithm
    if method.offline:
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
            f"Pass {'a RewardModel' if method.judged_by == 'reward' else 'a function or a PreferenceModel'}, as "
            "fastpref.load_judge gives it for a directory or a name, or choose an offline algorithm.",
        )
    require(
        method.judged_by != "reward" or isinstance(judge, Rewarder),
        f"{name} is judged by rewards: its judge must have scores(prompts, completions)",
        judge,
        "Pass a RewardModel; a judge of pairs goes with an algorithm such as online-ipo.",
    )
    require(
        config.missing_eos_penalty is None or method.judged_by == "reward" or by_scores(judge),
        "missing_eos_penalty must be None where no reward is there to subtract it from",
        config.missing_eos_penalty,
        "Pass a RewardModel as the judge, or have a judge of pairs ask for `finished` (fastpref.Judge).",
    )
    wanted = config.mixture_partner == "behaviour"
    require(
        wanted == (behaviour is not None),
        f"behaviour must be {'a model' if wanted else 'None'} for mixture_partner={config.mixture_partner!r}",
        behaviour,
        "Pass both, to mix the policy with the behaviour model, or neither.",
    )


def _source(
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


def _as_judge(judge: Judge | Rewarder | None, config: TrainConfig) -> Judge:
    if not isinstance(judge, Judge):
        raise ConfigError(
            f"eval_every={config.eval_every} needs a judge of pairs, but received {judge!r}. "
            "Pass eval_judge, or set eval_every=0."
        )
    return judge
