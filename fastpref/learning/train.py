"""Training by preferences, online and offline: `train`, and the step of every method in one place, `Trainer.step`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fastpref.data import DropReport, Source
from fastpref.data.batches import PackedPairs, PromptBatch
from fastpref.data.tokenization import PromptTexts
from fastpref.evaluation.during_training import HeldOut
from fastpref.judging.identity import identity
from fastpref.judging.judgements import FILE, Judgements
from fastpref.judging.positions import check_positions
from fastpref.judging.protocol import Judge, Rewarder, by_scores
from fastpref.judging.recorded import RecordedJudge
from fastpref.learning import loop, optimizers, rollout, update
from fastpref.learning.held_out import read_held_out
from fastpref.learning.learner import Frozen, Learner, cast_once, dtype_of
from fastpref.learning.prompted import Prompted, read_source
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError, require
from fastpref.method.schedules import value_at
from fastpref.models import T5, Decoder, LanguageModel, as_model, save
from fastpref.models.adapters import Base, trainable
from fastpref.models.directories import ADAPTER_FILES, warn_of_merging
from fastpref.models.int8 import all_quantized
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
"""Arrays that a step changes and a checkpoint holds: what is trained of π, optimiser state, the same of π_t or ()."""


@dataclass(frozen=True)
class Trainer:
    """All that stays the same from step to step of a run.

    Args:
      config: the settings; `config.method` says who writes, what judges, what is learned from and how.
      policy: the model as it was given, for its tokenizer and sizes.
      base: the frozen model that its adapters are trained on, as it was given; None where all parameters are.
      learner: the same in the dtype of products, and π_ref.
      partner: the frozen model that the sampler mixes with: π_ref, or μ.
      source: prompts or recorded pairs.
      judge: of the completions, with the log of its answers; None where the data has labels.
      optimizer: an optax transformation, or None for the one that the config names.
      held_out: comparisons with the reference during the run, or None.
    """

    config: TrainConfig
    policy: LanguageModel
    base: Base | None
    learner: Learner
    partner: Frozen
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
        learner, scores_itself = self.learner, self.learner.scores_itself(config)
        params, opt_state, round_params = learned
        if method.in_rounds and done % config.round_steps == 0:
            round_params = _copy(params)
        at_round = learner.model(round_params)

        epoch = self.source.batches.epoch
        batch: PromptBatch | PackedPairs = self.source.batches.__next__()
        clock.lap("time/data")
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        if isinstance(batch, PackedPairs):
            paired = rollout.recorded(batch, None if scores_itself else learner.ref)
        else:
            writer = at_round if "round" in method.writers else learner.model(params)
            drawn = rollout.draw(config, done, batch, self.policy, writer, self.partner)
            clock.lap("time/generate")
            judge = cast(RecordedJudge, self.judge)  # which every online method has
            judged = rollout.judge(config, done, batch, drawn, self.policy, judge, self.source.texts)
            clock.lap("time/judge")
            metrics |= judged.metrics
            samples = judged.samples if (done + 1) % config.sample_every == 0 else []
            same = self.partner is learner.ref
            paired = rollout.pair(
                config, batch, drawn, judged.selection, self.source.plan, learner.ref, partner_is_ref=same
            )
        anchors = learner.anchors(config, done, round_params) if scores_itself else None
        pairs = paired.pairs if scores_itself else rollout.anchor(config, done, paired, at_round)
        clock.lap("time/pair")
        params, opt_state, measured = update.learn(
            config,
            done,
            learner.definition,
            params,
            opt_state,
            pairs,
            optimizer=self.optimizer,
            base=learner.base,
            anchors=anchors,
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
        policy = dataclasses.replace(self.policy, module=nnx.merge(*self.learner.model(learned[0])))
        metrics = self.held_out.measure(policy, done)
        return loop.Outcome(learned, metrics, list(self.held_out.samples))

    def current(self, learned: Learned) -> LanguageModel:
        """The policy as it is now; what is trained of it in arrays of its own."""
        trained = _copy(learned[0])
        params = trained if self.base is None else self.base.adapted(trained)
        return self.policy.with_module(nnx.merge(self.learner.definition, params))


def _frozen(model: LanguageModel, dtype: str) -> Frozen:
    definition, params = nnx.split(model.module)
    return Frozen(definition, cast_once(params, dtype=dtype))


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
    chain = optimizers.build(config, optimizer)
    dtype, read = dtype_of(config), not isinstance(policy, LanguageModel)
    policy = as_model(policy, dtype=dtype, trained=config.param_dtype if config.adapter is None else None)
    others = [as_model(model, dtype=dtype) for model in (ref, behaviour) if model is not None]
    models = [policy, *([policy] if ref is None else []), *others]
    models = shared_rows(models)
    policy, ref, *others = all_quantized(models) if config.base_dtype == "int8" else models
    folder = None if run_dir is None else Path(run_dir)
    destination = folder / "policy" if folder is not None and isinstance(policy.module, T5 | Decoder) else None
    base: Base | None = None
    start: Any = nnx.state(policy.module)
    if (parts := trainable(policy, config.adapter, seed=config.seed)) is not None:
        base, start = parts
    start = cast_once(start, dtype=config.param_dtype)
    if destination is not None:
        loop.check_destination(destination, *ADAPTER_FILES)
        if base is not None:
            warn_of_merging(policy)
    learner = Learner.of(policy, base, ref, config)
    partner = _frozen(others[0], learner.dtype) if others else learner.ref
    if learner.shared or learner.dtype != "float32":
        ref = dataclasses.replace(ref, module=nnx.merge(*learner.ref))
    checks = read_held_out(eval_prompts, (policy, ref), config, quiet)
    eval_judge = _as_judge(eval_judge or judge, config) if config.eval_every else None
    source = read_source(prompts, policy, config, cache, quiet)
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
            held_out_judge = same or RecordedJudge(eval_judge, log, timeout=config.judge_timeout)
            held_out = HeldOut(ref, checks, held_out_judge, config)
        fingerprint = {
            "policy": loop.digest(start) if base is None else loop.digest(base.params, start),
            "tokenizer": policy.tokenizer.fingerprint.hex(),
            "reference": loop.digest(learner.ref.params),
            "optimizer": config.optimizer if optimizer is None else identity(optimizer).fingerprint(),
            **({"prompts": source.texts.digest} if isinstance(source.texts, PromptTexts) else {}),
            **({"behaviour": loop.digest(partner.params)} if others else {}),
            **({"steps of a round": config.round_steps} if config.method.in_rounds else {}),
            **({} if learner.dtype == "float32" else {"dtype": learner.dtype}),
            **({} if asked is None else {"judge": asked.identity.fingerprint()}),
            **({} if held_out is None else {"evaluation": held_out.fingerprint()}),
        }
        # Read from a directory in a dtype of its own, nobody else needs it.
        params = start if read and base is None and dtype != config.param_dtype else _copy(start)
        opt_state = optimizers.initial_state(chain, params)
        trainer = Trainer(config, policy, base, learner, partner, source, asked, optimizer, held_out)

        def report(done: int, metrics: dict[str, float], learned: Learned) -> None:
            for callback in callbacks:
                callback(Step(done, metrics, lambda: trainer.current(learned)))

        learned, history = loop.drive(
            trainer.step,
            (params, opt_state, _copy(params) if config.method.in_rounds else ()),
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
            named = None if asked is None else asked.identity.name
            finish(folder, config.algorithm, data=source.report, judge=named)
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


def _as_judge(judge: Judge | Rewarder | None, config: TrainConfig) -> Judge:
    if not isinstance(judge, Judge):
        raise ConfigError(
            f"eval_every={config.eval_every} needs a judge of pairs, but received {judge!r}. "
            "Pass eval_judge, or set eval_every=0."
        )
    return judge
