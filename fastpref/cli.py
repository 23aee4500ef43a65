"""The command line: `fastpref demo | check | merge | sft | preference | train | evaluate | sweep | reproduce`.

`check` takes a directory, `merge` two; all others but the first and the last take a TOML file, with overrides.
"""

import argparse
import inspect
import json
import signal
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpref.check import check
from fastpref.demo import run as demo
from fastpref.evaluation.side_by_side import compare, evaluate
from fastpref.evaluation.sweeps import sweep
from fastpref.judging.sources import load_judge
from fastpref.learning.fit import FitResult
from fastpref.learning.supervised import fit_preference_model, fit_reward_model, sft
from fastpref.learning.train import train
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import ConfigError, FastprefError, StopSignal
from fastpref.method.tables import from_mapping
from fastpref.models import merged, save
from fastpref.models.adapters import split
from fastpref.reproduce import EXPERIMENTS, reproduce
from fastpref.runs import terminal
from fastpref.runs.read_model import locate, read_model

USER_ERRORS = (FastprefError, ValueError, OSError)
"""What ends a command with one line instead of a traceback."""

PYTHON_ONLY = ("config", "optimizer", "callbacks", "quiet", "model")
"""Parameters that a TOML file cannot hold, or that have a table of their own: `settings` makes the config."""

FITS: dict[str, Callable[..., FitResult]] = {"preference": fit_preference_model, "reward": fit_reward_model}


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a function that a TOML file may give, by name."""
    parameters = inspect.signature(function).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in PYTHON_ONLY}


KEYS: dict[str, tuple[str, ...]] = {
    "train": (*_parameters(train), "settings"),
    "sft": (*_parameters(sft), "settings"),
    "preference": ("policy", "kind", *(_parameters(fit_preference_model) | _parameters(fit_reward_model)), "settings"),
    "evaluate": ("policy", "baseline", "policies", "prompts", "judge", "output", "settings"),
    "sweep": (*_parameters(train), "grid", "metric", "baseline", "settings"),
}
"""Keys of each command's TOML file: what its function takes, and its own."""

JUDGE = (str | dict, "a directory, package.module:function, or a table with url and model")
FILES = (str | list, "text, the path of a file or a pattern of paths, or a list of them")

KINDS: dict[str, tuple[Any, str]] = {
    "judge": JUDGE,
    "eval_judge": JUDGE,
    "settings": (dict, "a table"),
    "policies": (dict, "a table"),
    "grid": (dict, "a table"),
    "answers": (list, "a list of two texts"),
    "symmetric": (bool, "true or false"),
    **dict.fromkeys(("prompts", "data", "held_out", "eval_prompts"), FILES),
}
"""Types of values; those of other keys are text."""

REQUIRED: dict[str, tuple[str, ...]] = {
    "train": ("policy", "prompts", "run_dir"),
    "sft": ("policy", "data", "run_dir"),
    "preference": ("policy", "data", "run_dir"),
    "evaluate": ("prompts", "judge"),
    "sweep": ("policy", "prompts", "judge", "run_dir", "grid"),
}


def read_file(command: str, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The command's TOML file with `key=value` or `settings.key=value` overrides applied.

    Raises:
      ConfigError: broken TOML, an unknown or missing key, or an override that is not key=value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be a TOML file, but reading it failed: {error}. Mend that line.") from error
    apply_overrides(values, overrides)
    unknown = [key for key in values if key not in KEYS[command]]
    if unknown:
        raise ConfigError(
            f"{command} has no setting of that name, but received {unknown[0]!r}. "
            f"Known: {', '.join(KEYS[command])}; algorithm settings stand in the table [settings]."
        )
    for key, value in values.items():
        kind, form = KINDS.get(key, (str, "text, such as a path or a name"))
        if not isinstance(value, kind):
            raise ConfigError(f"{key} must be {form}, but received {value!r}. Mind the quotes and the table headers.")
    missing = [key for key in REQUIRED[command] if key not in values]
    if missing:
        raise ConfigError(
            f"{command} must have the key {missing[0]}, but received {path} without. Add {missing[0]} = ... to it."
        )
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set entries of a file's contents, by `key=value` or `table.key=value`.

    Raises:
      ConfigError: an override that is not key=value, or a table that is none.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"an override must be key=value, but received {override!r}. Write settings.tau=0.5, say.")
        table = values
        *parents, name = key.strip().split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(
                    f"{parent} must be a table to hold {name}, but received {table!r}. Set {parent} itself."
                )
        table[name] = _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _given(function: Callable[..., Any], values: Mapping[str, Any], **others: Any) -> Any:
    """Call a function with what the file says of its parameters, judges loaded."""
    named = {name: values[name] for name in _parameters(function) if name in values}
    judges = {name: load_judge(named[name]) for name in ("judge", "eval_judge") if name in named}
    return function(**named | judges | others)


def _train(values: Mapping[str, Any]) -> None:
    result = _given(train, values, config=from_mapping(TrainConfig, values.get("settings", {})))
    print(f"{result.report}\nThe aligned policy is in {Path(values['run_dir']) / 'policy'}.")


def _sft(values: Mapping[str, Any]) -> None:
    result = _given(sft, values, config=from_mapping(SupervisedConfig, values.get("settings", {})))
    print(f"{result.report}\nThe fine-tuned model is in {Path(values['run_dir']) / 'model'}.")


def _preference(values: Mapping[str, Any]) -> None:
    kind = values.get("kind", "preference")
    if kind not in FITS:
        raise ConfigError(f"kind must be 'preference' or 'reward', but received {kind!r}. Choose one of them.")
    known = {"policy", "kind", "settings", *_parameters(FITS[kind])}
    if foreign := sorted(set(values) - known):
        raise ConfigError(
            f"keys of a {kind} model must be {', '.join(sorted(known))}, but received {foreign[0]}. Take it out."
        )
    given = {"answers": tuple(values["answers"])} if "answers" in values else {}
    config = from_mapping(SupervisedConfig, values.get("settings", {}))
    result = _given(FITS[kind], values, model=values["policy"], config=config, **given)
    agreement = "" if result.held_out is None else f" Held-out agreement: {result.held_out:.3f}."
    print(f"{result.report}\nThe {kind} model is in {Path(values['run_dir']) / 'model'}.{agreement}")


def _evaluate(values: Mapping[str, Any]) -> None:
    pair = [key for key in ("policy", "baseline") if key in values]
    if bool(pair) == ("policies" in values) or len(pair) == 1:
        raise ConfigError(
            f"evaluate must have either policy and baseline or a table [policies], but received "
            f"{', '.join([*pair, *(['policies'] if 'policies' in values else [])]) or 'neither'}. "
            'Write name = "directory" in [policies] for each of them.'
        )
    known: dict[str, Any] = {"max_new_tokens": 64, "max_prompt_tokens": 512, "temperature": 1.0, "batch_size": 64}
    known |= {"truncation_side": "right", "chat_template_kwargs": {}, "on_bad_record": "raise"}
    known |= {"seed": 0} if pair else {"seeds": [0, 1, 2]}
    settings = {"max_new_tokens": 64, **values.get("settings", {})}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"evaluate has no setting of that name, but received {key!r}. Known: {', '.join(known)}.")
        if type(value) is not type(known[key]) and not (key == "temperature" and isinstance(value, int)):
            raise ConfigError(
                f"{key} must be of type {type(known[key]).__name__}, but received {value!r}. "
                f"Its default is {known[key]!r}."
            )
    judge = load_judge(values["judge"])
    named = {"policy": values["policy"]} if pair else values["policies"]
    for name, models in named.items():
        if not models or not all(isinstance(one, str) for one in (models if isinstance(models, list) else [models])):
            raise ConfigError(
                f"a policy must be a directory or a list of them, but received {name} = {models!r}. Mind the quotes."
            )
    prompts = values["prompts"]
    if not pair:
        found = evaluate(values["policies"], prompts, judge, save=values.get("output"), **settings)
        found.table()
        if "output" in values:
            found.save(values["output"])
        return
    beside = Path(values["output"]).parent if "output" in values else None
    result = compare(values["policy"], values["baseline"], prompts, judge, save=beside, **settings)
    terminal.table(
        "Win rate",
        ["policy", "baseline", "win rate", "95 % interval", "prompts"],
        [
            [
                str(values["policy"]),
                str(values["baseline"]),
                f"{result.value:.3f}",
                f"{result.low:.3f} to {result.high:.3f}",
                str(len(result.prompts)),
            ]
        ],
    )
    if "output" in values:
        lines = [json.dumps(record, ensure_ascii=False) for record in result.records()]
        Path(values["output"]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sweep(values: Mapping[str, Any]) -> None:
    judge = load_judge(values["judge"])
    eval_judge = load_judge(values["eval_judge"]) if "eval_judge" in values else judge
    held_out = values.get("eval_prompts", ())
    of_train = {name: value for name, value in values.items() if name not in ("judge", "eval_judge")}
    metric: str | Callable[[TrainConfig, Path], float] = values.get("metric", "eval/win_rate")

    def run(config: TrainConfig, folder: Path) -> None:
        # Offline points of a grid read labels; the judge then judges held-out comparisons alone.
        online = None if config.method.offline else judge
        _given(train, of_train, config=config, judge=online, eval_judge=eval_judge, run_dir=folder)

    def win_rate(config: TrainConfig, folder: Path) -> float:
        return compare(
            folder,
            values["baseline"],
            held_out,
            eval_judge,
            max_new_tokens=config.max_new_tokens,
            max_prompt_tokens=config.max_prompt_tokens,
            truncation_side=config.truncation_side,
            chat_template_kwargs=config.chat_template_kwargs,
            on_bad_record=config.on_bad_record,
        ).value

    if "baseline" in values:
        if "metric" in values or "eval_prompts" not in values:
            raise ConfigError(
                "a baseline must come with eval_prompts and without a metric: the win rate over it is the metric, but "
                f"received {', '.join(key for key in ('metric', 'eval_prompts') if key in values) or 'neither'}. "
                "Add eval_prompts, or take metric or baseline out."
            )
        locate(values["baseline"])
        metric = win_rate
    base = from_mapping(TrainConfig, values.get("settings", {}))
    result = sweep(values["grid"], base, run, run_dir=values["run_dir"], metric=metric)
    result.table()
    print(f"The runs and the table are in {values['run_dir']}.")


COMMANDS: dict[str, tuple[Callable[[Mapping[str, Any]], None], str]] = {
    "sft": (_sft, "fine-tune a language model on prompt, completion"),
    "preference": (_preference, "train a preference or reward model on prompt, chosen, rejected"),
    "train": (_train, "align a policy: online with a judge, or offline with recorded pairs"),
    "evaluate": (_evaluate, "compare policies side by side"),
    "sweep": (_sweep, "train once for each point of a grid of settings"),
}


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="fastpref", description="Online preference optimisation of language models.")
    commands = top.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="align a chat model on real text, on this machine, in minutes")
    shown.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    shown.add_argument("--seed", type=int, default=0)
    shown.add_argument("--small", action="store_true", help="a T5 of a million parameters, which needs no download")
    again = commands.add_parser("reproduce", help="make a figure or table of the papers again: PNG and CSV")
    again.add_argument(
        "name", choices=EXPERIMENTS, help="; ".join(f"{name}: {one.text}" for name, one in EXPERIMENTS.items())
    )
    again.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="where its files are written")
    seen = commands.add_parser("check", help="what a directory is, whether it loads, what training it takes")
    seen.add_argument("directory", type=Path, help="a checkpoint, an adapter, a judge, or a run directory")
    seen.add_argument("overrides", nargs="*", help="key=value of train's settings, such as batch_size=8")
    whole = commands.add_parser("merge", help="write a model with its adapter as a whole checkpoint")
    whole.add_argument("adapter", type=Path, help="the directory of an adapter, or a run directory")
    whole.add_argument("output", type=Path, help="a new directory")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text}. Keys: {', '.join(KEYS[name])}.")
        command.add_argument("file", type=Path, help="a TOML file")
        command.add_argument("overrides", nargs="*", help="key=value, such as settings.tau=0.5")
    return top


def _check(directory: Path, overrides: Sequence[str]) -> None:
    values: dict[str, Any] = {}
    apply_overrides(values, overrides)
    # As in a file, or without the table's name.
    settings = {**{key: value for key, value in values.items() if key != "settings"}, **values.get("settings", {})}
    for subject, text in check(directory, settings):
        print(f"{subject:<22}{text}", flush=True)


def _merge(adapter: Path, output: Path) -> None:
    model = read_model(adapter)
    if split(model) is None:
        raise ConfigError(
            f"a model to be merged must have an adapter, but received {adapter} without. It is whole as it is."
        )
    save(merged(model), output)
    print(f"The model with its adapter merged is in {output}.")


def _leave(number: int, frame: object) -> None:
    raise StopSignal(number, "terminated")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a reported error, 128 + n after signal n."""
    chosen = parser().parse_args(arguments)
    # Outside of training, which has its own handler, a polite kill unwinds the stack as an error does.
    signal.signal(signal.SIGTERM, _leave)
    try:
        if chosen.command == "demo":
            demo.run(chosen.run_dir, seed=chosen.seed, small_only=chosen.small)
        elif chosen.command == "check":
            _check(chosen.directory, chosen.overrides)
        elif chosen.command == "merge":
            _merge(chosen.adapter, chosen.output)
        elif chosen.command == "reproduce":
            print("\n".join(str(path) for path in reproduce(chosen.name, chosen.out)))
        else:
            COMMANDS[chosen.command][0](read_file(chosen.command, chosen.file, chosen.overrides))
    except KeyboardInterrupt as stopped:
        # A run has said how it goes on; what else was interrupted says nothing.
        if not stopped.args:
            print("interrupted; the same command starts again", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"fastpref: {error}", file=sys.stderr)
        return 1
    return 0
