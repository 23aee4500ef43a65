"""The supervised trainings' loop: an objective over batches, held-out selection, and what is kept of the result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orjson
from flax import nnx

from fastpref.data import DropReport, Record, TokenRecords, hashes
from fastpref.judging.identity import identity
from fastpref.learning import learner, loop, optimizers
from fastpref.learning.objectives import Objective, learn
from fastpref.method.config import SupervisedConfig
from fastpref.models.adapters import Adapters, Base
from fastpref.runs import metrics, plots
from fastpref.runs.report import finish


@dataclass(frozen=True)
class FitResult:
    """Result of a supervised training.

    Args:
      model: the trained `LanguageModel`, `PreferenceModel` or `RewardModel`: the best by the held-out criterion, or
        the last where nothing is held out.
      metrics: a mapping for each step of the run, whatever process made it.
      held_out: the held-out criterion of the returned model, or None.
      report: account of the records, those dropped by reason.
    """

    model: Any
    metrics: list[dict[str, float]]
    held_out: float | None
    report: DropReport


def fit(
    module: Any,
    parts: tuple[Base, Adapters] | None,
    objective: Objective,
    source: loop.Source,
    read: Callable[[], Mapping[str, Any]],
    config: SupervisedConfig,
    *,
    validate: Callable[[Any], float] | None,
    criterion: str,
    held_out: TokenRecords | list[Record],
    optimizer: optax.GradientTransformation | None,
    run_dir: str | Path | None,
    description: str,
    quiet: bool,
    with_module: Callable[[Any], Any],
    save: Callable[[Any, Path], object],
    report: DropReport,
) -> FitResult:
    """Minimise an objective over batches from `read`; keep, save and report on the best module by `validate`.

    With `parts`, the module's base and adapters, those alone are trained.
    """
    chain = optimizers.build(config, optimizer)
    definition = nnx.graphdef(module)
    start: Any = nnx.state(module)
    base = None
    if parts is not None:
        base, start = parts
    start = learner.cast_once(start, dtype=config.param_dtype)

    def with_params(params: Any) -> Any:
        return nnx.merge(definition, params if base is None else base.adapted(params))

    sign = 1.0 if metrics.METRICS[criterion].better == "higher" else -1.0

    def copy(tree: Any) -> Any:
        # The update donates its buffers, and others still need theirs.
        return jax.tree.map(jnp.copy, tree)

    def advance(done: int, arrays: Any) -> loop.Outcome:
        params, opt_state, *best = arrays
        rate = {} if optimizer is not None else {"learning_rate": optimizers.learning_rate(config, opt_state)}
        params, opt_state, measured = learn(
            definition,
            params,
            opt_state,
            dict(read()),
            objective=objective,
            optimizer=chain,
            base=base,
            key=learner.update_key(config, done, base),
            remat=config.remat,
            dtype=learner.dtype_of(config),
        )
        return loop.Outcome((params, opt_state, *best), {name: float(value) for name, value in measured.items()} | rate)

    def measure(done: int, arrays: Any) -> loop.Outcome:
        params, opt_state, best, best_value = arrays
        if validate is None or not (done % config.eval_every == 0 or done == config.steps):
            return loop.Outcome(arrays, {})
        value = validate(with_params(params))
        if sign * value > float(best_value):
            best, best_value = copy(params), jnp.asarray(sign * value, jnp.float32)
        return loop.Outcome((params, opt_state, best, best_value), {criterion: value})

    params = copy(start)
    (params, _, best, best_value), history = loop.drive(
        advance,
        (params, optimizers.initial_state(chain, params), copy(start), jnp.asarray(-jnp.inf, jnp.float32)),
        source,
        config,
        run_dir=None if run_dir is None else Path(run_dir),
        fingerprint={
            "model": loop.digest(start) if base is None else loop.digest(base.params, start),
            "objective": description,
            **({"held_out": _content(held_out)} if len(held_out) else {}),
            **({} if learner.dtype_of(config) == "float32" else {"dtype": learner.dtype_of(config)}),
            "optimizer": config.optimizer if optimizer is None else identity(chain).fingerprint(),
        },
        description=description,
        measure=measure,
        quiet=quiet,
    )
    fitted = with_module(with_params(params if validate is None else best))
    if run_dir is not None:
        save(fitted, Path(run_dir) / "model")
        finish(run_dir, description, plots.plot_supervised, data=report)
    return FitResult(fitted, history, None if validate is None else sign * float(best_value), report)


def _content(records: TokenRecords | list[Record]) -> str:
    return hashes.of_bytes(orjson.dumps(records, option=orjson.OPT_SERIALIZE_NUMPY))
