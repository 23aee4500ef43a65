"""Identity of judges: two that may answer differently are never taken for one, in this process or another."""

import functools
import random
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import language_model

from fastpref.judging.identity import digest, identity
from fastpref.judging.models import PreferenceModel, RewardModel

BETTER = "w1"


def counts(word: str, prompts: Any, first: Any, second: Any) -> list[float]:
    return [0.5 + 0.1 * (a.count(word) - b.count(word)) for a, b in zip(first, second, strict=True)]


def outer(weight: Any) -> Any:
    def judge(prompts: Any, first: Any, second: Any) -> Any:
        return weight

    return judge


def refers() -> Any:
    return lambda prompts, first, second: counts(BETTER, prompts, first, second)


class Scale:
    """A judge with state."""

    def __init__(self, **state: Any) -> None:
        vars(self).update(state)

    def __call__(self, prompts: Any, first: Any, second: Any) -> Any:
        return [0.5] * len(prompts)

    def method(self, prompts: Any, first: Any, second: Any) -> Any:
        return [0.25] * len(prompts)


@dataclass(frozen=True)
class Frozen:
    """A judge with settings."""

    width: int = 1

    def __call__(self, prompts: Any, first: Any, second: Any) -> Any:
        return [0.5] * len(prompts)


def defaults(prompts: Any, first: Any, second: Any, strength: float = 1.0, *, sign: int = 1) -> Any:
    return [0.5] * len(prompts)


def nested(flag: bool) -> Any:
    if flag:
        return lambda *texts: [(lambda: 0.25)()]
    return lambda *texts: [(lambda: 0.75)()]


JUDGES: dict[str, Any] = {
    "function": defaults,
    "lambda a": lambda *texts: [0.25],
    "lambda b": lambda *texts: [0.75],
    "nested a": nested(True),
    "nested b": nested(False),
    "name a": lambda *texts: texts[0].count,
    "name b": lambda *texts: texts[0].index,
    "closure 1": outer(1),
    "closure True": outer(True),
    "closure 1.0": outer(1.0),
    "closure text": outer("1"),
    "closure bytes": outer(b"1"),
    "closure list": outer([1, 2]),
    "closure nested list": outer([[1], 2]),
    "closure tuple": outer((1, 2)),
    "closure array": outer(np.array([1.0, 2.0])),
    "closure array of float32": outer(np.array([1.0, 2.0], np.float32)),
    "closure array of JAX": outer(jnp.array([1.0, 3.0])),
    "closure key": outer(jax.random.key(1)),
    "closure set": outer({"a", "b"}),
    "closure mapping": outer({"a": 1, "b": 2}),
    "closure function": outer(counts),
    "closure pattern": outer(re.compile("a")),
    "closure flags": outer(re.compile("a", re.IGNORECASE)),
    "closure path": outer(Path("a")),
    "closure class": outer(Scale),
    "closure generator": outer(random.Random(1)),
    "closure NumPy generator": outer(np.random.default_rng(1)),
    "closure other NumPy generator": outer(np.random.default_rng(2)),
    "partial a": functools.partial(counts, "a"),
    "partial b": functools.partial(counts, "b"),
    "partial twice": functools.partial(functools.partial(counts, "a"), ["p"]),
    "partial by name": functools.partial(counts, word="a"),
    "object": Scale(),
    "object 1": Scale(width=1),
    "object 2": Scale(width=2),
    "object list": Scale(width=[1]),
    "object named alike": Scale(height=1),
    "frozen 1": Frozen(),
    "frozen 2": Frozen(2),
    "method": Scale().method,
    "method 1": Scale(width=1).method,
    "compiled a": jax.jit(lambda *texts: jnp.zeros(3)),
    "compiled b": jax.jit(lambda *texts: jnp.ones(3)),
    "optimiser 1": optax.adamw(1e-3),
    "optimiser 2": optax.adamw(2e-3),
    "optimiser schedule": optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
}


def test_different_judges_have_different_identities() -> None:
    keys: dict[str, str] = {}
    for name, judge in JUDGES.items():
        described = identity(judge)
        assert described.unknown is None, (name, described.unknown)
        assert described.key not in keys, f"{name} is taken for {keys[described.key]}"
        keys[described.key] = name


def test_another_process_finds_the_same_identities() -> None:
    """Under another hash seed, so that no order of a set, and no address, comes in."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_identity as t\n"
        "for name, judge in t.JUDGES.items(): print(name, t.identity(judge).key)"
    )
    command = ["env", "PYTHONHASHSEED=1", "JAX_PLATFORMS=cpu", sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == [f"{name} {identity(judge).key}" for name, judge in JUDGES.items()]


def test_equal_judges_made_twice_are_one() -> None:
    for make in (
        lambda: outer({"b": 1, "a": [2, 3]}),
        lambda: functools.partial(counts, "a"),
        lambda: Scale(width=np.arange(3)),
        lambda: Frozen(2),
        lambda: optax.adamw(1e-3),
    ):
        assert identity(make()).key == identity(make()).key


def source(body: str) -> Any:
    space: dict[str, Any] = {"__name__": "mended"}
    exec(body, space)
    return space["judge"]


def test_a_mended_function_of_the_same_name_is_another_judge() -> None:
    before = source("WORDS = ['a']\ndef helper(x): return x\ndef judge(p, a, b): return [helper(WORDS)]")
    for body in (
        "WORDS = ['a']\ndef helper(x): return x\ndef judge(p, a, b): return [helper(WORDS), 1]",
        "WORDS = ['a']\ndef helper(x): return x + x\ndef judge(p, a, b): return [helper(WORDS)]",
        "WORDS = ['b']\ndef helper(x): return x\ndef judge(p, a, b): return [helper(WORDS)]",
    ):
        after = source(body)
        assert identity(after).name == identity(before).name == "mended.judge"
        assert identity(after).key != identity(before).key
    moved = source("\n\nWORDS = ['a']\ndef helper(x): return x\n# A note.\ndef judge(p, a, b): return [helper(WORDS)]")
    assert identity(moved).key == identity(before).key, "where it stands does not decide what it says"


def test_a_mended_class_is_another_judge() -> None:
    body = "class Base:\n def help(self): return {0}\nclass J(Base):\n def __call__(self): return {1}\njudge = J()"
    assert identity(source(body.format(1, 2))).key == identity(source(body.format(1, 2))).key
    assert identity(source(body.format(1, 3))).key != identity(source(body.format(1, 2))).key
    assert identity(source(body.format(2, 2))).key != identity(source(body.format(1, 2))).key


def test_a_refusal_can_show_numbers_and_never_text() -> None:
    parts = identity(functools.partial(counts, "secret", strength=2)).parts
    assert parts["keywords"] == {"strength": 2}
    assert "secret" not in str(parts)


def test_what_recursion_holds_is_told_apart_too() -> None:
    def chain(value: int) -> Scale:
        first = Scale(value=value)
        first.self = first  # type: ignore[attr-defined]
        return first

    assert identity(chain(1)).key == identity(chain(1)).key != identity(chain(2)).key
    even = "def odd(n): return n and even(n - 1)\ndef even(n): return not n or odd(n - {0})\njudge = even"
    assert identity(source(even.format(1))).key != identity(source(even.format(2))).key
    assert identity(source(even.format(1))).key == identity(source(even.format(1))).key


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (Scale(lock=threading.Lock()), r"attribute lock \(_thread.lock\): cannot pickle '_thread.lock' object"),
        (outer(threading.Lock()), r"closure weight \(_thread.lock\): cannot pickle"),
        (functools.partial(counts, Path(__file__).open()), r"argument 0 \(_io.TextIOWrapper\): cannot pickle"),  # noqa: SIM115
        (outer([{"a": (x for x in [1])}]), r"closure weight \(builtins.list\): cannot pickle 'generator' object"),
    ],
)
def test_what_has_no_content_is_never_the_same_again(judge: Any, reason: str) -> None:
    once, again = identity(judge), identity(judge)
    assert once.key != again.key
    assert once.key.startswith("unknown ")
    assert re.match(reason, once.unknown or "")
    assert once.fingerprint() == again.fingerprint() == {"name": once.name, "unknown": once.unknown}


def test_a_judge_may_say_who_it_is() -> None:
    judge = Scale(lock=threading.Lock(), identity="gpt, prompt 3")
    assert identity(judge).parts == {"identity": "gpt, prompt 3"}
    assert identity(judge).key == identity(Scale(identity="gpt, prompt 3", calls=9)).key
    assert identity(judge).key != identity(Scale(identity="gpt, prompt 4")).key
    asked: list[int] = []
    counted = outer(asked)
    counted.identity = {"model": 1}
    before = identity(counted).key
    asked.append(1)
    assert identity(counted).key == before
    assert "not JSON" in (identity(Scale(identity={1, 2})).unknown or "")


def test_models_are_known_by_weights_tokenizer_and_settings() -> None:
    judge = PreferenceModel(language_model())
    others = [
        PreferenceModel(language_model(seed=1)),
        replace(judge, symmetric=False),
        replace(judge, max_tokens=9),
        replace(judge, answers=("2", "1")),
        replace(judge, template="{prompt} {second} {first}"),
        RewardModel.from_model(language_model()),
        RewardModel.from_model(language_model(), max_prompt_tokens=9),
    ]
    keys = {identity(each).key for each in (judge, *others)}
    assert len(keys) == 1 + len(others)
    assert identity(PreferenceModel(language_model(), batch_size=2)).key == identity(judge).key
    scored = RewardModel.from_model(language_model())
    before = identity(scored).key
    scored.module.weight[...] = jnp.ones_like(scored.module.weight[...])
    assert identity(scored).key != before


def test_a_digest_says_what_it_cannot_read() -> None:
    assert digest([1, "a"]) == digest([1, "a"]) != digest([1, "b"])
    with pytest.raises(ValueError, match="must be made of data, functions and classes, but received cannot pickle"):
        digest(threading.Lock())
