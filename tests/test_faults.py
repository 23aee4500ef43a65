"""Runs that are stopped, fail or diverge: no step is lost, nothing broken is saved, and what goes on is told."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from small import PROMPTS, language_model, prefers_w1
from test_training import SMALL, metrics_of

from fastpref.judging.identity import identity
from fastpref.learning import optimizers, signals, update
from fastpref.learning.supervised import fit_preference_model, fit_reward_model, sft
from fastpref.learning.train import Step, TrainResult, train
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import CheckpointError, ConfigError, DataError, DivergedError, JudgeError, StopSignal
from fastpref.method.schedules import Schedule
from fastpref.models import LanguageModel
from fastpref.runs import checkpoints

ADAM = optax.adam(0.01)
UNNAMED = {name: value for name, value in SMALL.items() if name not in ("optimizer", "learning_rate")}
"""Settings that go with an optimiser which is passed as an object."""
EXAMPLES = [{"prompt": f"w{word}", "completion": f"w{word + 1} w{word + 2}"} for word in range(8)]
TUNING: dict[str, Any] = {"batch_size": 8, "max_shapes": 1, "max_prompt_tokens": 8, "max_completion_tokens": 4}


def go(folder: Path | None = None, *, judge: Any = prefers_w1, optimizer: Any = ADAM, **options: Any) -> TrainResult:
    passed = {name: options.pop(name) for name in ("eval_prompts", "eval_judge", "callbacks") if name in options}
    config = TrainConfig(**(SMALL if optimizer is None else UNNAMED) | {"algorithm": "online-ipo"} | options)
    return train(language_model(), PROMPTS, judge, config, run_dir=folder, optimizer=optimizer, quiet=True, **passed)


def taste(judge: Any) -> Any:
    """A judge that is the same to a run, whatever it does besides."""
    judge.identity = "likes w1"
    return judge


@taste
def likes_w1(*texts: Any) -> list[float]:
    return prefers_w1(*texts)


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Signals as a terminal gives them: what runs in the background is born with some ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_its_step_and_the_run_goes_on(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    @taste
    def kill(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        os.kill(os.getpid(), number)
        return prefers_w1(prompts, first, second)

    with pytest.raises((KeyboardInterrupt, StopSignal), match=r"stopped after step 1 of 2") as stopped:
        go(tmp_path / "a", judge=kill, steps=2)
    assert isinstance(stopped.value, KeyboardInterrupt if number == signal.SIGINT else StopSignal)
    if isinstance(stopped.value, StopSignal):
        assert stopped.value.code == 128 + number
    assert f"stopped after step 1 of 2. {tmp_path / 'a'} holds it. The same call goes on" in capfd.readouterr().err
    assert signal.getsignal(number) is before, "the handler before is back"
    assert checkpoints.steps(tmp_path / "a" / "checkpoints") == [1]
    go(tmp_path / "a", judge=likes_w1, steps=2)
    go(tmp_path / "b", judge=likes_w1, steps=2)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")


def test_a_supervised_training_is_stopped_by_the_same_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SupervisedConfig(**TUNING, steps=3)
    learn = update.apply_gated

    def interrupt(*arguments: Any, **options: Any) -> Any:
        # Traced once, at the first step.
        os.kill(os.getpid(), signal.SIGTERM)
        return learn(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(update, "apply_gated", interrupt)
        with pytest.raises(StopSignal):
            sft(language_model(), EXAMPLES, config, run_dir=tmp_path, optimizer=optax.sgd(0.1), quiet=True)
    assert checkpoints.steps(tmp_path / "checkpoints") == [1]


def test_a_second_signal_stops_at_once() -> None:
    with signals.stopping() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.number, stop.at_once) == (signal.SIGTERM, False)
        with pytest.raises(KeyboardInterrupt, match=r"SIGINT: stopped at once"):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.at_once


def test_another_thread_and_an_ignored_signal_are_left_alone() -> None:
    seen: list[Any] = []

    def look() -> None:
        with signals.stopping():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stopping():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hang_up)


def test_the_command_line_exits_with_128_and_the_signal(tmp_path: Path) -> None:
    script = (
        "import sys; from fastpref import cli; from fastpref.method.errors import StopSignal\n"
        "def stop(*_): raise (KeyboardInterrupt('x') if sys.argv[1] == '2' else StopSignal(int(sys.argv[1]), 'x'))\n"
        "cli.COMMANDS['sft'] = (stop, ''); cli.read_file = lambda *_: {}; sys.exit(cli.main(['sft', 'f']))"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        run = subprocess.run([sys.executable, "-c", script, str(int(number))], capture_output=True, check=False)
        assert run.returncode == 128 + number
        assert b"Traceback" not in run.stderr


# Failures after a step ----------------------------------------------------------------------------------------------


def test_an_evaluation_that_fails_loses_no_step_and_is_made_when_the_run_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 2, "eval_every": 1, "eval_prompts": PROMPTS[:4]}

    @taste
    def fails(*texts: Any) -> list[float]:
        raise ConnectionError("gone")

    with pytest.raises(JudgeError, match=r"ConnectionError: gone"):
        go(tmp_path / "a", eval_judge=fails, **options)
    assert checkpoints.steps(tmp_path / "a" / "checkpoints") == [1]
    result = go(tmp_path / "a", eval_judge=likes_w1, **options)
    go(tmp_path / "b", eval_judge=likes_w1, **options)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert "eval/win_rate" in result.metrics[0]
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == (tmp_path / "b" / "samples.jsonl").read_bytes()


def test_a_callback_that_fails_loses_no_step(tmp_path: Path) -> None:
    def fails(step: Step) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        go(tmp_path, steps=2, callbacks=[fails])
    assert checkpoints.steps(tmp_path / "checkpoints") == [1]
    assert len(metrics_of(tmp_path)) == 1


def test_a_finished_run_gives_its_whole_history_again(tmp_path: Path) -> None:
    first = go(tmp_path, steps=2)
    again = go(tmp_path, steps=2)
    assert again.metrics == first.metrics
    assert "objective/kl" in again.metrics[-1]


# Health -------------------------------------------------------------------------------------------------------------


def poisoned(after: int) -> optax.GradientTransformation:
    """Updates that are NaN from some update on, as a rate that is far too high makes them."""

    def init(params: Any) -> Any:
        return {"count": jax.numpy.zeros((), jax.numpy.int32)}

    def apply(updates: Any, state: Any, params: Any = None) -> Any:
        scale = jax.numpy.where(state["count"] >= after, jax.numpy.nan, -0.01)
        return jax.tree.map(lambda leaf: leaf * scale, updates), {"count": state["count"] + 1}

    return optax.GradientTransformation(init, apply)


def finite(model: LanguageModel) -> bool:
    return all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(nnx.state(model.module)))


def test_a_supervised_training_that_diverges_stops_and_stays_stopped(tmp_path: Path) -> None:
    optimizer = poisoned(2)
    config = SupervisedConfig(**TUNING, steps=20, checkpoint_every=1)

    def tune() -> Any:
        return sft(language_model(), EXAMPLES, config, run_dir=tmp_path, optimizer=optimizer, quiet=True)

    with pytest.raises(DivergedError, match=r"were not in 5 updates in a row, up to step 7.*Lower learning_rate"):
        tune()
    with pytest.raises(DivergedError, match=r"up to step 7"):
        tune()
    assert len(metrics_of(tmp_path)) == 7
    assert not (tmp_path / "model").exists()
    params = nnx.split(language_model().module)[1]
    arrays = (params, optimizers.initial_state(optimizer, params), params, jax.numpy.zeros((), jax.numpy.float32))
    state = checkpoints.restore(tmp_path / "checkpoints", arrays, fingerprint=None)
    assert state is not None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.arrays[0]))


def test_skipped_updates_are_counted_across_processes(tmp_path: Path) -> None:
    optimizer = poisoned(0)
    for steps in (2, 4):
        go(tmp_path, steps=steps, optimizer=optimizer)
    with pytest.raises(DivergedError, match=r"5 updates in a row, up to step 5"):
        go(tmp_path, steps=9, optimizer=optimizer)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_run_that_diverged_goes_on_with_a_lower_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def start(rate: float) -> TrainResult:
        options = {"learning_rate": rate, "steps": 7}
        return go(tmp_path, optimizer=None, **options)

    # Adam's steps are about as large as its rate: above the largest float32 at once.
    with pytest.raises(DivergedError):
        start(1e39)
    result = start(0.01)
    assert len(result.metrics) == 7
    assert finite(result.policy)
    # No skipped update has moved the schedule, and the rate is that of each update.
    assert [step["learning_rate"] for step in result.metrics] == [1e39] * 5 + [0.01] * 2
    assert "after step 5 with other settings: learning_rate 1e+39 becomes 0.01" in capsys.readouterr().out
    (change,) = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert change == {"step": 5, "settings": {"learning_rate": [1e39, 0.01]}}


def test_the_rate_that_is_logged_is_that_of_the_optimisers_own_count() -> None:
    config = TrainConfig(**SMALL | {"learning_rate": Schedule(start=0.0, end=1.0, steps=10)})
    params = {"w": jax.numpy.ones(3)}
    chain = optimizers.build(config)
    state = optimizers.initial_state(chain, params)
    nan = {"w": jax.numpy.full(3, jax.numpy.nan)}
    for gradient in ({"w": jax.numpy.ones(3)}, nan, nan):
        params, state, _ = update.apply_gated(chain, jax.numpy.float32(1), gradient, state, params)
    assert optimizers.learning_rate(config, state) == pytest.approx(0.1)


def test_the_compiled_update_grows_with_the_parameters_and_not_with_their_square() -> None:
    chain = optimizers.build(TrainConfig(**SMALL))

    def size(leaves: int) -> int:
        params = {str(leaf): jax.numpy.ones((3, 4)) for leaf in range(leaves)}
        state = optimizers.initial_state(chain, params)
        apply = jax.jit(lambda *of: update.apply_gated(chain, jax.numpy.float32(1), *of))
        return len(apply.lower(params, state, params).compile().as_text())

    assert size(32) < 5 * size(8)


def test_logits_that_are_not_finite_are_refused_in_words() -> None:
    model = language_model()
    definition, params = nnx.split(model.module)
    broken = jax.tree.map(lambda leaf: leaf * np.float32("nan"), params)
    policy = LanguageModel(nnx.merge(definition, broken), model.tokenizer)
    config = TrainConfig(**UNNAMED, algorithm="online-ipo", steps=1)
    with pytest.raises(DivergedError, match=r"logits must be finite to be sampled from, .* policy for 8 of 8"):
        train(policy, PROMPTS, prefers_w1, config, optimizer=ADAM, quiet=True)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_an_optimiser_is_told_from_another_by_its_content(tmp_path: Path) -> None:
    same, other, sgd = (
        identity(make(rate)).key for make, rate in ((optax.adam, 0.01), (optax.adam, 0.02), (optax.sgd, 0.01))
    )
    assert identity(ADAM).key == same
    assert len({same, other, sgd}) == 3
    go(tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=r"optimizer\.content: '"):
        go(tmp_path, steps=2, optimizer=optax.adam(0.02))


def test_a_folder_that_cannot_take_the_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    asked: list[int] = []
    for name in ("policy", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match=r"must hold nothing else, but received .*policy with notes in it"):
        go(tmp_path, steps=1, judge=lambda *texts: asked.append(1))
    with pytest.raises(FileExistsError, match=r"received .*model with notes in it"):
        sft(language_model(), EXAMPLES, SupervisedConfig(**TUNING, steps=1), run_dir=tmp_path, quiet=True)
    assert not asked
    assert not (tmp_path / "checkpoints").exists()


def test_an_empty_file_is_refused_with_its_name_and_reason(tmp_path: Path) -> None:
    empty = tmp_path / "none.jsonl"
    empty.write_text("")
    config = TrainConfig(**SMALL, algorithm="offline-ipo", steps=1)
    with pytest.raises(DataError, match=r"at least one record to learn from, but received none from .*none\.jsonl: 0"):
        train(language_model(), empty, None, config, quiet=True)
    long = [{"prompt": "w1 " * 20, "chosen": "w1", "rejected": "w2"}]
    with pytest.raises(DataError, match=r"none from the prompts: 1 records read, .*1 prompt too long.*max_prompt_tok"):
        train(language_model(), long, None, config, quiet=True)


def test_what_is_dropped_is_said_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    long = [{"prompt": "w1", "completion": "w1 w2 w3 w4 w5"}]
    sft(language_model(), EXAMPLES + long, SupervisedConfig(**TUNING, steps=1), optimizer=ADAM)
    out = capsys.readouterr().out
    assert out.startswith("9 records read, 8 delivered, 1 dropped (1 completion too long): 11 % lost of the data")


LOST: list[tuple[Any, dict[str, Any], str]] = [
    (
        sft,
        {},
        r"Raise max_completion_tokens, 4 now, to 6 to keep all of them\. To learn from the rest alone, raise max_l",
    ),
    (sft, {"on_bad_record": "skip"}, r"6 to keep all of them\. Check the records\. To learn from the rest"),
    (fit_reward_model, {}, r"Raise max_completion_tokens, 4 now, to 6 to keep"),
    (train, {}, r"Raise max_new_tokens, 4 now, to 6 to keep"),
]


@pytest.mark.parametrize(("training", "settings", "remedy"), LOST, ids=range(len(LOST)))
def test_a_run_that_would_lose_more_than_half_does_not_begin(
    training: Any, settings: dict[str, Any], remedy: str
) -> None:
    long = [{"prompt": "w1", "completion": "w1 w2 w3 w4 w5", "chosen": "w1 w2 w3 w4 w5", "rejected": "w1"}] * 9
    short = [row | {"chosen": row["completion"], "rejected": "w9"} for row in EXAMPLES]
    broken: list[dict[str, Any]] = [{"prompt": 1}] if settings else []
    tuned = {name: value for name, value in TUNING.items() if name != "max_completion_tokens"}

    def go_on(**more: Any) -> Any:
        if training is train:
            config = TrainConfig(algorithm="offline-dpo", steps=1, max_new_tokens=4, **tuned, **more)
            return train(language_model(), [*short, *long], None, config, quiet=True)
        config = SupervisedConfig(steps=1, **TUNING, **settings, **more)
        return training(language_model(), [*short, *long, *broken], config, quiet=True)

    with pytest.raises(DataError, match=rf"must keep 50% of its records, but received this from .*9 comp.*{remedy}"):
        go_on()
    if training is sft and not settings:
        assert go_on(max_lost=0.6).report.dropped == {"completion too long": 9}


def test_a_preference_model_keeps_to_the_limit_of_completions() -> None:
    pairs = [{"prompt": "w1", "chosen": "w1 w2", "rejected": "w3"}] * 3
    long = [{"prompt": "w1", "chosen": "w1 w2 w3 w4", "rejected": "w3"}]

    def fit(**settings: Any) -> Any:
        config = SupervisedConfig(**TUNING | {"max_prompt_tokens": 16} | settings, steps=1)
        return fit_preference_model(
            language_model(), pairs + long, config, template="{prompt} 1 {first} 2 {second}", optimizer=ADAM, quiet=True
        )

    assert fit().report.dropped == {"completion too long": 1}
    with pytest.raises(DataError, match=r"completion"):
        fit(overlong="raise")
    with pytest.raises(ConfigError, match=r"overlong must be 'drop' or 'raise' for a preference model"):
        fit(overlong="truncate")


def test_parts_of_a_batch_need_not_divide_it() -> None:
    def first(*texts: Sequence[str]) -> list[float]:
        return [0.9] * len(texts[0])

    whole, parts = (go(judge=first, steps=1, gradient_accumulation=number).metrics[0] for number in (1, 3))
    assert whole["grad_norm"] > 0.1
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
