"""What a judge may answer, and what is said when it answers something else."""

import contextvars
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fastpref.judging.judgements import FILE, Judgements
from fastpref.judging.protocol import ask, rate
from fastpref.judging.recorded import RecordedJudge
from fastpref.method.errors import JudgeError, JudgeWarning
from fastpref.runs import terminal


def shortest(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in zip(first, second, strict=True)]


def test_a_plain_function_is_a_judge() -> None:
    answer = ask(shortest, ["x"] * 3, ["a", "bb", "c"], ["aa", "b", "d"])
    assert answer.dtype == np.float32
    assert answer.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([0.5], r"one probability for each of 2 prompts, but received an array of shape \(1,\)"),
        ([[0.5], [0.5]], r"shape \(2, 1\)"),
        ([0.5, float("nan")], r"in \[0, 1\], but received nan for pair 1 \(1 of 2 answers are wrong\)"),
        ([-0.1, 2.0], r"but received -0.1\d* for pair 0 \(2 of 2"),
        (["yes", "no"], r"must return numbers, but received list of str\. Return one probability"),
        (["0.5", "0.25"], r"must return numbers, but received list of str\. Return one probability"),
        (["0.5", 0.25], r"must return numbers, but received list of float, str"),
        ([b"0.5", b"1"], r"must return numbers, but received list of bytes"),
        (np.array(["0.5", "1"]), r"must return numbers, but received ndarray"),
        ([0.5 + 0j, 1j], r"must return numbers, but received list of complex"),
        (np.array([0.5 + 0j, 0.5]), r"must return numbers, but received ndarray"),
        ([0.5, None], r"must return numbers, but received list of NoneType, float"),
        ([[0.5], [0.5, 1.0]], r"must return numbers, but received list of list"),
        ({0: 0.5, 1: 0.5}, r"must return numbers, but received dict"),
        ({0.5, 0.25}, r"must return numbers, but received set"),
        ((value for value in (0.5, 0.5)), r"must return numbers, but received generator"),
        (np.array([("a", 0.5), ("b", 0.5)], [("name", "U1"), ("p", "f4")]), r"must return numbers, but received nd"),
        ([10**400, 0], r"must return numbers, but received list of int"),
        (np.ma.masked_array([0.5, 0.25], [False, True]), r"must return numbers, but received MaskedArray"),
        (None, r"the judge must return numbers, but received NoneType"),
    ],
)
def test_anything_but_probabilities_is_refused(answer: Any, text: str) -> None:
    with pytest.raises(JudgeError, match=text):
        ask(lambda *texts: answer, ["x", "y"], ["a", "b"], ["c", "d"])


class Tensor:
    """A tensor as PyTorch has them: it cannot become an array while it needs gradients."""

    def __init__(self, value: Any, *, needs_gradient: bool = True) -> None:
        self.value, self.needs_gradient = value, needs_gradient

    def detach(self) -> "Tensor":
        return Tensor(self.value, needs_gradient=False)

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def tolist(self) -> Any:
        assert not self.needs_gradient
        return self.value


@pytest.mark.parametrize(
    "answer",
    [
        (0.5, 0.25),
        np.array([0.5, 0.25]),
        jnp.array([0.5, 0.25], jnp.bfloat16),
        [jnp.float32(0.5), np.float16(0.25)],
        Tensor([0.5, 0.25]),
        [Tensor(0.5), Tensor(0.25)],
        np.ma.masked_array([0.5, 0.25]),
    ],
)
def test_numbers_of_any_library_are_answers(answer: Any) -> None:
    found = ask(lambda *texts: answer, ["x", "y"], ["a", "b"], ["c", "d"])
    assert found.dtype == np.float32
    assert found.tolist() == [0.5, 0.25]


def test_a_hard_judge_may_say_true_and_false() -> None:
    assert ask(lambda *texts: [True, False], ["x", "y"], ["a", "b"], ["c", "d"]).tolist() == [1, 0]


def test_a_complex_tensor_is_refused() -> None:
    with pytest.raises(JudgeError, match="must return numbers, but received Tensor"):
        ask(lambda *texts: Tensor([0.5j]), ["x"], ["a"], ["b"])


def test_a_judge_that_has_to_be_awaited_is_refused() -> None:
    async def later(*texts: Sequence[str]) -> list[float]:
        return [0.5]

    with pytest.raises(JudgeError, match=r"received a coroutine. Write a plain function .* one probability for each"):
        ask(later, ["x"], ["a"], ["b"])


def test_what_a_judge_does_to_its_lists_reaches_nobody_else() -> None:
    def orders(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        second.clear()
        prompts.pop()
        return [float(len(text)) / 4 for text in sorted(first)]

    texts = ["x", "y"], ["bb", "a"], ["c", "d"]
    assert ask(orders, *texts).tolist() == ask(orders, *texts).tolist() == [0.25, 0.5]
    assert texts == (["x", "y"], ["bb", "a"], ["c", "d"])


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_judge_that_ends_the_process_is_an_error_that_names_it(timeout: float | None) -> None:
    def leaves(*texts: Sequence[str]) -> list[float]:
        raise SystemExit(0)

    with pytest.raises(JudgeError, match=r"without ending the process, but .*leaves called sys.exit\(0\).*again"):
        ask(leaves, ["x"], ["a"], ["b"], timeout=timeout)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, type("Terminated", (SystemExit,), {})])
def test_a_user_or_a_signal_that_ends_the_process_does(kind: type[BaseException]) -> None:
    def stopped(*texts: Sequence[str]) -> list[float]:
        raise kind

    with pytest.raises(kind):
        ask(stopped, ["x"], ["a"], ["b"])


def test_a_judge_that_hangs_is_left_behind() -> None:
    woken = threading.Event()

    def hangs(*texts: Sequence[str]) -> list[float]:
        woken.wait()
        return [0.5]

    with pytest.raises(JudgeError, match=r"within judge_timeout=0.01 seconds, but .*hangs took longer for 1 prompt"):
        ask(hangs, ["x"], ["a"], ["b"], timeout=0.01)
    with pytest.raises(JudgeError, match=r"but .*Slow took longer"):
        rate(Slow(woken), ["x"], ["a"], timeout=0.01)
    woken.set()
    assert ask(hangs, ["x"], ["a"], ["b"], timeout=60.0).tolist() == [0.5]


class Slow:
    """A reward model that waits."""

    def __init__(self, woken: threading.Event) -> None:
        self.woken = woken

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        self.woken.wait()
        return [1.0]


def test_a_limited_judge_is_asked_in_the_same_context() -> None:
    name = contextvars.ContextVar("name", default=0.0)
    name.set(0.25)
    assert ask(lambda *texts: [name.get()], ["x"], ["a"], ["b"], timeout=60.0).tolist() == [0.25]


def test_a_judge_that_raises_is_named() -> None:
    def broken(*texts: Sequence[str]) -> list[float]:
        raise TimeoutError("no answer")

    with pytest.raises(JudgeError, match=r"raised TimeoutError: no answer.*goes on from the last checkpoint") as caught:
        ask(broken, ["x"], ["a"], ["b"])
    assert isinstance(caught.value.__cause__, TimeoutError)


class Fixed:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> Any:
        return self.answer


def test_rewards_are_any_finite_numbers() -> None:
    answer = rate(Fixed([-3.5, 12]), ["x", "y"], ["a", "b"])
    assert answer.dtype == np.float32
    assert answer.tolist() == [-3.5, 12.0]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([1.0], r"one reward for each of 2 prompts, but received an array of shape \(1,\)"),
        ([1.0, float("inf")], r"finite rewards, but received inf for completion 1 \(1 of 2 answers are wrong\)"),
        (["good", "bad"], r"must return numbers, but received list of str. Return one reward"),
    ],
)
def test_other_rewards_are_refused(answer: Any, text: str) -> None:
    with pytest.raises(JudgeError, match=text):
        rate(Fixed(answer), ["x", "y"], ["a", "b"])


QUESTION: dict[str, Any] = {"prompts": ["x", "y"], "first": ["a", "b"], "second": ["c", "d"], "step": 3}


def says(value: float) -> Any:
    return lambda prompts, first, second: [value] * len(prompts)


def test_answers_of_a_judge_are_never_given_for_another(tmp_path: Path) -> None:
    """Two lambdas of one place, which differ in what they hold."""
    for value in (0.25, 0.75, 0.25):
        with Judgements(tmp_path / FILE) as log:
            assert RecordedJudge(says(value), log).ask(**QUESTION, purpose="training").tolist() == [value] * 2
            assert log.asked + log.replayed == 2
    with Judgements(tmp_path / FILE) as log:
        assert len(log) == 4, "the third was answered by the first"


def test_a_judge_that_cannot_be_told_from_another_is_asked_again_and_said_to_be(tmp_path: Path) -> None:
    lock, calls = threading.Lock(), []

    def locked(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        with lock:
            calls.append(len(prompts))
            return [0.5] * len(prompts)

    for times in (1, 2):
        with Judgements(tmp_path / FILE) as log:
            with pytest.warns(JudgeWarning, match=r"locked must be told from others .* closure lock .*asked for again"):
                recorded = RecordedJudge(locked, log)
            recorded.ask(**QUESTION, purpose="training")
            # Within one process it is one judge.
            recorded.ask(**QUESTION, purpose="training")
        assert calls == [2] * times


def test_rewards_are_kept_too(tmp_path: Path) -> None:
    for answer in ([1.5, -2.0], []):
        with Judgements(tmp_path / FILE) as log:
            judge = Fixed(answer)
            judge.identity = "fixed"  # type: ignore[attr-defined]
            recorded = RecordedJudge(judge, log)
            assert recorded.rate(["x", "y"], ["a", "b"], purpose="training", step=0).tolist() == [1.5, -2.0]


def test_the_progress_bar_says_judging(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def looks(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        seen.append(bar.activity)
        return [0.5] * len(prompts)

    with terminal.progress(2, description="x", enabled=False) as bar:
        RecordedJudge(looks).ask(**QUESTION, purpose="training")
        assert (seen, bar.activity) == (["judging"], "")
