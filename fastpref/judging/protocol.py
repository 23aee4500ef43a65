"""Judges and rewards, and the one place where they are asked and their answers checked."""

import contextvars
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Float

from fastpref.data.records import Record
from fastpref.data.rendered import is_finished
from fastpref.judging.identity import name_of
from fastpref.method.errors import JudgeError, JudgementsError


@runtime_checkable
class Judge(Protocol):
    """Anything that says how likely the first completion of a prompt beats the second. A plain function will do.

    A run belongs to its judge, which is known by its content; see `fastpref.judging.identity`. A judge behind a
    network, or one that holds what does not decide its answers, may say who it is: an attribute `identity`, any JSON
    value.

    Prompts are text. Of a conversation it is what the chat template of the policy wrote, in `evaluate` that of the
    first policy; models that are judges here write the messages by their own template instead.

    A judge that has a parameter `finished` is told by it which completions ended by themselves: two lists of P
    booleans, of the first and of the second ones, False where a completion was cut off at its longest length. Others
    are told nothing.
    """

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], /
    ) -> Sequence[float] | Float[np.ndarray, " P"]:
        """p(first ≻ second | prompt) for each of the P prompts, in [0, 1]; ½ is a tie."""
        ...


@runtime_checkable
class Rewarder(Protocol):
    """Anything that scores single completions, such as `fastpref.RewardModel`.

    Where pairs are judged, one that cannot be called answers p(y ≻ y') = σ(r(y) − r(y')) (IPO-MD, eq. 2): each of K
    completions is scored once, where a judge of pairs makes up to K(K − 1)/2 comparisons. One that can be called is
    asked about pairs, since its preferences may be any, unless its attribute `bradley_terry` says that they are these.
    If `scores` has a parameter `finished`, it is told by it, in a list of P booleans, which completions ended.
    """

    def scores(
        self, prompts: Sequence[str], completions: Sequence[str], /
    ) -> Sequence[float] | Float[np.ndarray, " P"]:
        """r(prompt, completion) of each of the P prompts, any finite number."""
        ...


def by_scores(judge: object) -> bool:
    """Preferences of the judge are σ(r − r') of its scores; see `Rewarder`."""
    return isinstance(judge, Rewarder) and bool(getattr(judge, "bradley_terry", not callable(judge)))


def asks_finished(function: Callable[..., Any]) -> bool:
    """The function has a parameter `finished`, to be told which completions ended; see `Judge`."""
    if isinstance(function, functools.partial) and "finished" in function.keywords:
        return False
    try:
        parameter = inspect.signature(function).parameters.get("finished")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)


def finished(judge: Judge | Rewarder, *completions: Sequence[str]) -> tuple[list[bool], ...] | None:
    """Flags of each list of completions, True where one ended by itself; None for a judge that does not ask.

    Args:
      judge: the judge, for two lists; or the reward model, for one.
      completions: texts, `Unfinished` where they were cut off.
    """
    function = judge if len(completions) == 2 else cast(Rewarder, judge).scores
    if not asks_finished(cast(Callable[..., Any], function)):
        return None
    return tuple([is_finished(text) for text in texts] for texts in completions)


def ask(
    judge: Judge,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    timeout: float | None = None,
) -> Float[np.ndarray, " P"]:
    """The judge's preferences, checked.

    Args:
      judge: the judge.
      prompts: P texts.
      first: y of each prompt.
      second: y' of each prompt.
      timeout: seconds that it may take; None for any number.

    Returns:
      p(y ≻ y' | x), shape [P], float32, in [0, 1].

    Raises:
      JudgeError: the judge raised, took longer than its time, gave another number of answers than P, or gave one that
        is not a number in [0, 1].
    """
    told = finished(judge, first, second)
    function: Callable[..., Any] = judge
    if told is not None:
        function = functools.partial(function, finished=told)
    preference = _answer("probability", name_of(judge), function, prompts, first, second, timeout=timeout)
    wrong = ~((preference >= 0) & (preference <= 1))
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise JudgeError(
            f"the judge must return probabilities in [0, 1], but received {preference[index]} for pair {index} "
            f"({int(wrong.sum())} of {len(prompts)} answers are wrong). "
            "Return p(first beats second), not a score or a difference of scores."
        )
    return preference


def rate(
    judge: Rewarder, prompts: Sequence[str], completions: Sequence[str], *, timeout: float | None = None
) -> Float[np.ndarray, " P"]:
    """The rewards of P completions, checked.

    Args:
      judge: the reward model.
      prompts: P texts.
      completions: a completion of each prompt.
      timeout: seconds that it may take; None for any number.

    Returns:
      r(x, y), shape [P], float32.

    Raises:
      JudgeError: the reward model raised, took longer than its time, gave another number of answers than P, or gave one
        that is not a finite number.
    """
    told = finished(judge, completions)
    function: Callable[..., Any] = judge.scores
    if told is not None:
        function = functools.partial(function, finished=told[0])
    rewards = _answer("reward", name_of(judge), function, prompts, completions, timeout=timeout)
    wrong = ~np.isfinite(rewards)
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise JudgeError(
            f"the judge must return finite rewards, but received {rewards[index]} for completion {index} "
            f"({int(wrong.sum())} of {len(prompts)} answers are wrong). Mend the reward model."
        )
    return rewards


def probability(margin: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """σ(margin) in float32, such that probability(m) + probability(−m) is exactly 1."""
    # Of the negative magnitude, whose exponential cannot overflow.
    small = np.exp(-np.abs(margin.astype(np.float64)))
    lower = (small / (1 + small)).astype(np.float32)
    above: Float[np.ndarray, " N"] = np.where(margin >= 0, np.float32(1) - lower, lower).astype(np.float32)
    return above


def _answer(
    kind: str,
    name: str,
    judge: Callable[..., Any],
    prompts: Sequence[str],
    *texts: Sequence[str],
    timeout: float | None,
) -> Float[np.ndarray, " P"]:
    """Answers of the judge, a float32 for each prompt."""
    again = "start the same command again: it goes on from the last checkpoint."
    try:
        # Copies: what a judge does to its lists must reach nobody else.
        answer = _within(timeout, judge, *map(list, (prompts, *texts)))
    except _LateError:
        raise JudgeError(
            f"the judge must answer within judge_timeout={timeout:g} seconds, but {name} took longer for "
            f"{len(prompts)} prompts. Raise judge_timeout or mend the judge, and {again}"
        ) from None
    except (JudgeError, JudgementsError):
        # Of the judge that is asked in turn, or of its log.
        raise
    except Exception as error:
        raise JudgeError(
            f"the judge must answer without raising, but {name} raised {type(error).__name__}: {error}. "
            f"Mend the judge and {again}"
        ) from error
    except SystemExit as error:
        # A subclass comes from a signal, which ends the process on purpose.
        if type(error) is not SystemExit:
            raise
        raise JudgeError(
            f"the judge must answer without ending the process, but {name} called sys.exit({error.code!r}). "
            f"Mend the judge and {again}"
        ) from error
    numbers = _numbers(kind, answer)
    if numbers.shape != (len(prompts),):
        raise JudgeError(
            f"the judge must return one {kind} for each of {len(prompts)} prompts, but received an array of shape "
            f"{numbers.shape}. Return a flat list in the order of the prompts."
        )
    return numbers


class _LateError(Exception):
    """The time is over."""


def _within(timeout: float | None, judge: Callable[..., Any], *texts: Sequence[str]) -> Any:
    """Call a judge, in a thread of its own where its time is limited: a judge that hangs is left behind."""
    if timeout is None:
        return judge(*texts)
    ended: list[tuple[Any, BaseException | None]] = []

    def call() -> None:
        try:
            ended.append((judge(*texts), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(call,), name="judge", daemon=True)
    thread.start()
    thread.join(timeout)
    if not ended:
        raise _LateError
    answer, error = ended[0]
    if error is not None:
        raise error
    return answer


def _numbers(kind: str, answer: Any) -> Float[np.ndarray, "..."]:
    """Numbers of Python, NumPy, JAX or PyTorch as float32. Text and complex numbers are none."""
    if inspect.iscoroutine(answer):
        answer.close()
        raise JudgeError(
            f"the judge must return numbers, but received a coroutine. Write a plain function that waits for its "
            f"answers, as asyncio.run does, and returns one {kind} for each prompt."
        )
    parts = isinstance(answer, list | tuple)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if np.ma.is_masked(answer):
                raise TypeError("some are masked")
            array = np.asarray([_plain(value) for value in answer] if parts else _plain(answer))
            # Kind V holds the narrow floats of JAX.
            if array.dtype.kind not in "biufV" or array.dtype.names is not None:
                raise TypeError(f"{array.dtype} is not a type of real numbers")
            return array.astype(np.float32)
    except Exception as error:
        inside = f" of {', '.join(sorted({type(value).__name__ for value in answer}))}" if parts and answer else ""
        raise JudgeError(
            f"the judge must return numbers, but received {type(answer).__name__}{inside}. "
            f"Return one {kind} for each prompt, as a float."
        ) from error


def _plain(value: Any) -> Any:
    """A tensor of PyTorch as Python numbers, whether it needs gradients or lies on a device."""
    return value.detach().tolist() if hasattr(value, "detach") and hasattr(value, "tolist") else value


def agreement(judge: Judge, records: Sequence[Record]) -> float:
    """Share of pairs where the judge and the record prefer the same completion, a tie of either counted as half."""
    prompts, chosen, rejected, preference = columns_of(records)
    given = np.sign(ask(judge, prompts, chosen, rejected) - np.float32(0.5))
    return float((1 + given * np.sign(preference - np.float32(0.5))).mean() / 2)


def columns_of(records: Sequence[Record]) -> tuple[list[str], list[str], list[str], Float[np.ndarray, " P"]]:
    """Prompts, first and second completions, and preferences of recorded pairs."""
    return (
        [record.prompt for record in records],
        [record.completions[0] for record in records],
        [record.completions[1] for record in records],
        np.array([record.preference for record in records], np.float32),
    )
