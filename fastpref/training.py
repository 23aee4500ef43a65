"""The online loop: sample pairs, ask the judge, update the policy, and write down what happened."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fastpref import learner, loop, optimizers, reporting
from fastpref.algorithms import ALGORITHMS
from fastpref.config import TrainConfig, to_json, value_at
from fastpref.data import DropReport, PromptBatcher, read_records, tokenize_prompts
from fastpref.generation import decode, generate_jit, num_valid_tokens
from fastpref.held_out import HeldOut
from fastpref.judging import Judge, ask
from fastpref.metrics import sampling_metrics
from fastpref.models import T5, Decoder, LanguageModel, as_model, save
from fastpref.records import Completions, PairBatch, PromptBatch

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


class DivergedError(RuntimeError):
    """Several updates in a row were not finite."""


def train(
    policy: LanguageModel | str | Path,
    prompts: Prompts,
    judge: Judge,
    config: TrainConfig | None = None,
    *,
    ref: LanguageModel | str | Path | None = None,
    run_dir: str | Path | None = None,
    optimizer: optax.GradientTransformation | None = None,
    eval_prompts: Prompts = (),
    eval_judge: Judge | None = None,
    callbacks: Sequence[Callable[[Step], None]] = (),
    quiet: bool = False,
) -> TrainResult:
    """Align a language model with a judge's preferences, online.

    Every step draws two completions for each prompt of a batch, asks the judge which is better, and updates the policy
    by the algorithm's loss. With a run directory, killing the process at any moment and starting the same call again
    continues it exactly: parameters, optimiser, noise and prompt order; all metrics but `time/...` are bitwise those of
    an uninterrupted run.

    Args:
      policy: a `LanguageModel`, or the directory of a Hugging Face checkpoint. It is not changed.
      prompts: texts, mappings with a `prompt`, or a JSONL, Parquet or Arrow file with that column.
      judge: p(first ≻ second) for each prompt; see `fastpref.Judge`. A plain function will do.
      config: settings; the defaults are the paper's.
      ref: π_ref; None for the policy as it is given.
      run_dir: where config, metrics, samples, checkpoints, plots and the aligned model are written; None for nowhere.
      optimizer: any optax transformation, instead of the one that the config names.
      eval_prompts: held-out prompts, compared with the reference every `config.eval_every` steps.
      eval_judge: the judge of those comparisons; None for `judge`.
      callbacks: functions called with a `Step` after each step.
      quiet: show no progress bar.

    Returns:
      `TrainResult`.

    Raises:
      ConfigError: a setting breaks its rule.
      DataError: the prompts cannot be read, or none is left.
      JudgeError: the judge failed; the steps before are saved.
      CheckpointError: the run directory holds another run.
      DivergedError: five updates in a row were not finite.
    """
    config = TrainConfig() if config is None else config
    policy = as_model(policy)
    ref = policy if ref is None else as_model(ref)
    records, read = read_records(prompts)
    texts = {record.id: record.prompt for record in records}
    encoded, kept = tokenize_prompts(
        records,
        policy.tokenizer,
        max_tokens=config.max_prompt_tokens,
        vocab_size=policy.module.vocab_size,
        overlong=config.overlong,
    )
    report = read.then(kept)
    algorithm = ALGORITHMS[config.algorithm]
    chain = optimizers.build(config) if optimizer is None else optimizer
    definition, start = nnx.split(policy.module)
    ref_definition, ref_params = nnx.split(ref.module)
    # The learner donates its buffers, and these are still the caller's.
    params = jax.tree.map(jnp.copy, start)
    checks = [record.prompt for record in read_records(eval_prompts)[0]][: config.eval_prompts]
    held_out = HeldOut(ref, checks, eval_judge or judge, config)

    def current(parameters: Any) -> LanguageModel:
        return dataclasses.replace(policy, module=nnx.merge(definition, jax.tree.map(jnp.copy, parameters)))

    def draw(done: int, batch: PromptBatch, parameters: Any) -> Completions:
        betas = algorithm.mixture_betas(value_at(config.mixture_beta, done))
        rows = len(batch.ids)
        drawn: Completions = generate_jit(
            definition,
            parameters,
            ref_definition,
            ref_params,
            batch.tokens,
            batch.lengths,
            np.broadcast_to(np.asarray(betas, np.float32), (rows, 2)),
            jax.random.fold_in(jax.random.key(config.seed), done),
            np.arange(2 * rows, dtype=np.int32).reshape(rows, 2),
            eos_id=policy.tokenizer.eos_id,
            max_new_tokens=config.max_new_tokens,
            num_valid_tokens=num_valid_tokens(policy),
            temperature=config.temperature,
        )
        drawn.tokens.block_until_ready()
        return drawn

    def advance(done: int, arrays: Any) -> loop.Outcome:
        parameters, opt_state = arrays
        batch = next(batcher)
        clock = _Clock()
        completions = draw(done, batch, parameters)
        clock.lap("time/generate")
        prompt_texts = [texts[int(index)] for index in batch.ids]
        written = decode(policy, completions)
        first, second = ([pair[which] for pair in written] for which in (0, 1))
        preference, different = _judge(judge, completions, prompt_texts, first, second)
        clock.lap("time/judge")
        pairs = PairBatch(
            prompt_tokens=jnp.asarray(batch.tokens),
            prompt_lengths=jnp.asarray(batch.lengths),
            completion_tokens=completions.tokens,
            completion_lengths=completions.lengths,
            ref_logps=completions.ref_logps,
            preference=jnp.asarray(preference),
            where=jnp.asarray(different),
        )
        if config.rescore_reference:
            pairs = pairs._replace(ref_logps=learner.score(ref_definition, ref_params, pairs))
        tau = value_at(config.tau, done)
        parameters, opt_state, measured = learner.update(
            definition,
            parameters,
            opt_state,
            pairs,
            np.float32(tau),
            optimizer=chain,
            loss=algorithm.loss,
            gradient_accumulation=config.gradient_accumulation,
            length_normalize=config.length_normalize,
        )
        metrics = {name: float(value) for name, value in measured.items()}
        clock.lap("time/learn")
        metrics |= {
            "tau": tau,
            "mixture_beta": value_at(config.mixture_beta, done),
            "learning_rate": value_at(config.learning_rate, done),
            "epoch": float(batcher.epoch),
            **sampling_metrics(completions, preference, different, policy.tokenizer.eos_id),
            **clock.laps,
        }
        if config.eval_every and ((done + 1) % config.eval_every == 0 or done + 1 == config.steps):
            metrics |= held_out.measure(current(parameters))
        samples = []
        if (done + 1) % config.sample_every == 0:
            samples = [
                {"prompt": prompt, "first": one, "second": two, "preference": float(p)}
                for prompt, one, two, p in zip(prompt_texts[:2], first[:2], second[:2], preference[:2], strict=True)
            ]
        return loop.Outcome((parameters, opt_state), metrics, samples)

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
    with PromptBatcher(
        encoded.prompts,
        ids=encoded.ids,
        batch_size=config.batch_size,
        seed=config.seed,
        max_tokens=config.max_prompt_tokens,
        max_shapes=config.max_shapes,
    ) as batcher:
        (params, _), history = loop.drive(
            advance,
            (params, optimizers.initial_state(chain, params)),
            batcher,
            steps=config.steps,
            journal=loop.Journal(
                run_dir=folder,
                settings=settings,
                fingerprint={
                    **loop.lasting(settings),
                    "policy": loop.digest(start),
                    "reference": loop.digest(ref_params),
                    "optimizer": config.optimizer if optimizer is None else "passed as an object",
                },
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
        reporting.plot_run(folder)
    return TrainResult(policy=aligned, ref=ref, metrics=history, run_dir=folder, report=report)


class _Clock:
    """Seconds between laps, under metric names."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _judge(
    judge: Judge, completions: Completions, prompts: list[str], first: list[str], second: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Preferences [P], ½ where the two completions are the same tokens, and where they differ [P]."""
    tokens = np.asarray(completions.tokens)
    different = (tokens[:, 0] != tokens[:, 1]).any(-1)
    asked = np.flatnonzero(different)
    preference = np.full(len(prompts), 0.5, np.float32)
    if len(asked):
        preference[asked] = ask(judge, *([texts[index] for index in asked] for texts in (prompts, first, second)))
    return preference, different
