"""A language model behind a server as the judge: right where it answers, patient where not, and never leaking."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from chat_server import Reply, Request, Server, fault, reply
from small import PROMPTS, language_model

import fastpref.judging.http as http
from fastpref.cli import main
from fastpref.data.rendered import Conversation, Rendered, Unfinished
from fastpref.evaluation.side_by_side import evaluate
from fastpref.judging import judgements
from fastpref.judging.http import HttpJudge
from fastpref.judging.identity import identity
from fastpref.judging.protocol import Judge, ask
from fastpref.judging.sources import load_judge
from fastpref.learning.train import train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError, JudgeError
from fastpref.models import save

KEY = "sk-never-to-be-written"
SETTINGS: dict[str, Any] = {"steps": 2, "batch_size": 4, "max_new_tokens": 4, "max_prompt_tokens": 16}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No proxy, a key, and no waiting: the seconds that would have been waited."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    waited: list[float] = []
    sleep = asyncio.sleep

    async def at_once(seconds: float) -> None:
        if seconds:
            waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(http.asyncio, "sleep", at_once)
    return waited


@contextmanager
def served(answer: Callable[[Request], Reply], **settings: Any) -> Iterator[tuple[Server, HttpJudge]]:
    with Server(answer).running() as server:
        yield server, HttpJudge(server.url, "referee", **settings)


def sides(request: Request) -> tuple[str, str]:
    """The two answers in a question."""
    _, first, second = (part.partition("]\n")[2] for part in request.question.split("[")[1:])
    return first.strip(), second.partition("\n\nReply")[0].strip()


def longer(request: Request) -> float:
    """p(first) of a taste for long answers."""
    first, second = map(len, sides(request))
    return 0.9 if first > second else 0.1 if first < second else 0.5


def by_logprobs(request: Request) -> Reply:
    # Half of the probability is on neither answer, and the first place answers more often.
    p = longer(request)
    first, second = p * 0.6, (1 - p) * 0.4
    return reply("1", [{"1": first / 2, " 2": second / 2, "**": 0.25}])


def test_both_orders_are_asked_and_averaged_by_logprobs() -> None:
    with served(by_logprobs) as (server, judge):
        found = judge(["q{first}"] * 3, ["long {prompt}", "b", "c"], ["a", "bbbb", "d"])
        first = 0.9 * 0.6 / (0.9 * 0.6 + 0.1 * 0.4)
        back = 0.1 * 0.6 / (0.1 * 0.6 + 0.9 * 0.4)
        even = (0.6 + 1 - 0.6) / 2
        np.testing.assert_allclose(found, [(first + 1 - back) / 2, 1 - (first + 1 - back) / 2, even], rtol=1e-6)
        assert found.dtype == np.float32
        assert len(server.requests) == judge.calls == 6
        # The opposite order is the opposite answer, and costs nothing.
        np.testing.assert_allclose(judge(["q{first}"], ["a"], ["long {prompt}"]), 1 - found[:1], rtol=1e-6)
        assert judge.calls == 6
        request = server.requests[0]
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.body["model"] == "referee"
    assert (request.body["logprobs"], request.body["top_logprobs"], request.body["max_tokens"]) == (True, 5, 4)
    assert {sides(each) for each in server.requests if "long" in each.question} == {
        ("long {prompt}", "a"),
        ("a", "long {prompt}"),
    }


def test_the_place_that_answers_counts() -> None:
    thinking = [{"The": 0.9, "1": 0.1}, {" answer": 0.9, "2": 0.1}, {" 2": 0.75, "1": 0.25}]
    with served(lambda request: reply("The answer 2", thinking)) as (_, judge):
        assert judge(["q"], ["a"], ["b"]).tolist() == [0.5]
        assert judge._answer(orjson.loads(reply("The answer 2", thinking)[2])) == (0.25, True)
        # No place answers: the first at which it might have.
        assert judge._answer(orjson.loads(reply("The", thinking[:1])[2])) == (1.0, True)


def test_without_logprobs_votes_are_sampled() -> None:
    count = [0]

    def votes(request: Request) -> Reply:
        count[0] += 1
        first, _ = sides(request)
        if first == "good":
            return reply("**1**." if count[0] % 4 else "2")
        return reply(" 2\n")

    with served(votes, votes=4, concurrency=1) as (server, judge):
        # Three of four votes for it in the first place, all in the second.
        assert judge(["q"], ["good"], ["poor"]).tolist() == [0.875]
        assert judge.calls == 8
    with served(votes, votes=2, logprobs=False) as (server, judge):
        judge(["q"], ["good"], ["poor"])
        assert all("logprobs" not in request.body for request in server.requests)
        assert judge.calls == 4


def test_a_server_that_refuses_logprobs_is_asked_without(alone: list[float]) -> None:
    def answer(request: Request) -> Reply:
        if "logprobs" in request.body:
            return fault(400, '{"error": "logprobs are not supported by this model"}')
        return reply("1" if len(sides(request)[0]) > len(sides(request)[1]) else "2")

    with served(answer, votes=1, concurrency=1) as (_, judge):
        assert judge(["q", "r"], ["long", "s"], ["s", "long"]).tolist() == [1.0, 0.0]
        assert judge.calls == 5
    assert not alone


def faults_then(answer: Callable[[Request], Reply], *faults: Reply | None) -> Callable[[Request], Reply]:
    """Faults to the first requests, then answers. None hangs up."""
    left = list(faults)
    lock = threading.Lock()

    def serve(request: Request) -> Reply:
        with lock:
            found = left.pop(0) if left else answer(request)
        if found is None:
            raise ConnectionAbortedError
        return found

    return serve


def test_what_passes_is_tried_again_with_longer_waits(alone: list[float]) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    faults = [
        fault(500),
        fault(429, Retry_After="7.5"),
        fault(503, Retry_After=later),
        fault(502, Retry_After="soon"),
        reply("I cannot say."),
        (200, {}, b"<html>"),
    ]
    with served(faults_then(by_logprobs, *faults), concurrency=1) as (_, judge):
        assert judge(["q"], ["aaaa"], ["b"])[0] > 0.5
        assert judge.calls == len(faults) + 2
    backoff, asked, dated, *rest = alone
    assert 0.5 <= backoff <= 0.75
    assert asked == 7.5
    assert 20 < dated <= 30
    assert len(rest) == 3
    assert rest[0] >= 4
    assert rest[2] >= 16


def test_slow_answers_and_lost_connections_are_tried_again(alone: list[float]) -> None:
    woken = threading.Event()
    slow = [True]

    def answer(request: Request) -> Reply:
        if slow:
            slow.clear()
            woken.wait(30)
        return by_logprobs(request)

    with served(answer, timeout=0.2, concurrency=1) as (_, judge):
        assert judge(["q"], ["aaaa"], ["b"])[0] > 0.5
        assert judge.calls == 3
        woken.set()
    assert len(alone) == 1
    nowhere = HttpJudge("http://127.0.0.1:9/v1", "referee", retries=2)
    with pytest.raises(JudgeError, match=r"within 3 tries, but the last from .*127.0.0.1:9.* gave ConnectError"):
        nowhere(["q"], ["a"], ["b"])
    assert nowhere.calls == 3


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (fault(401, f"Incorrect API key: {KEY}"), r"answered 401, .*key: \*\*\*.*Set OPENAI_API_KEY"),
        (fault(404, "no such model"), r"answered 404, 'no such model'. Check url and model"),
        (fault(429, "busy", Retry_After="3600"), r"asks to wait 3600 \(status 429, 'busy'\)"),
        (fault(500, "out of order"), r"within 2 tries, .* gave status 500, 'out of order'"),
        (reply("neither"), r"within 2 tries, .* gave the reply 'neither'"),
        ((200, {}, b'{"choices": []}'), r"gave a reply of another form"),
        ((200, {}, b"\xff"), r"gave a reply of another form"),
        (fault(307, Location="http://elsewhere/"), r"answered 307"),
    ],
)
def test_what_does_not_pass_is_named_without_the_key(answer: Reply, text: str) -> None:
    with served(lambda request: answer, retries=1) as (_, judge), pytest.raises(JudgeError, match=text) as caught:
        judge(["q"], ["a"], ["b"])
    assert KEY not in str(caught.value)


def test_pairs_are_asked_about_at_once_within_bounds() -> None:
    together = threading.Barrier(3)

    def answer(request: Request) -> Reply:
        together.wait(30)
        return by_logprobs(request)

    with served(answer, concurrency=3) as (server, judge):
        judge([str(at) for at in range(9)], ["a"] * 9, ["b"] * 9)
        assert server.most == 3


def test_a_budget_is_refused_and_what_was_judged_is_kept(tmp_path: Path) -> None:
    prompts = PROMPTS[:4]
    config = TrainConfig(algorithm="online-ipo", tau=0.1, **SETTINGS)
    with served(by_logprobs, max_calls=5, concurrency=8) as (server, judge):
        with pytest.raises(
            JudgeError, match=r"keep to max_calls=5, but received pairs .* 2 more where 4 are sent or set aside"
        ):
            train(language_model(), prompts, judge, config, run_dir=tmp_path / "run", quiet=True)
        assert judge.calls == 4
        kept = list(judgements.read(tmp_path / "run"))
        assert len(kept) == 2
        again = HttpJudge(server.url, "referee", max_calls=100)
        train(language_model(), prompts, again, config, run_dir=tmp_path / "run", quiet=True)
        log = list(judgements.read(tmp_path / "run"))
        assert log[:2] == kept
        # Every question once, whatever the step.
        texts = [(row["prompt"], *sorted((row["first"], row["second"]))) for row in log]
        assert len(set(texts)) == len(texts) == again.calls / 2 + 2


def test_questions_of_later_steps_and_runs_are_answered_from_the_log(tmp_path: Path) -> None:
    with served(by_logprobs) as (server, judge):
        settings: dict[str, Any] = {"max_new_tokens": 4, "seeds": (0,), "save": tmp_path}
        models = {"a": language_model(), "b": language_model(seed=1)}
        found = evaluate(models, PROMPTS[:4], judge, **settings)
        sent = judge.calls
        assert 0 < sent <= 8
        fresh = HttpJudge(server.url, "referee")
        again = evaluate(models, PROMPTS[:4], fresh, **settings)
        assert fresh.calls == 0
        np.testing.assert_array_equal(again.value, found.value)
        other = HttpJudge(server.url, "another")
        evaluate(models, PROMPTS[:4], other, **settings)
        assert other.calls == sent


def test_the_key_is_written_nowhere_and_the_rest_decides_the_identity(tmp_path: Path) -> None:
    with served(by_logprobs) as (server, judge):
        config = TrainConfig(algorithm="online-ipo", tau=0.1, eval_every=1, **SETTINGS)
        train(language_model(), PROMPTS[:4], judge, config, run_dir=tmp_path, eval_prompts=PROMPTS[4:8], quiet=True)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) > 5
        assert [path for path in files if KEY.encode() in path.read_bytes()] == []
        assert KEY not in repr(judge)
        assert set(judge.identity) == {
            *(
                "url",
                "model",
                "template",
                "cut",
                "temperature",
                "max_tokens",
                "logprobs",
                "votes",
                "answers",
                "orders",
                "extra",
            )
        }
        changed = [HttpJudge(server.url, "other"), HttpJudge(server.url, "referee", votes=9)]
        assert len({identity(each).key for each in (judge, *changed)}) == 3
        assert identity(HttpJudge(server.url, "referee", concurrency=1, max_calls=3)).key == identity(judge).key


def test_a_conversation_is_sent_without_the_marks_of_a_template() -> None:
    user = {"role": "user", "content": "Hi"}
    parts = {"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]}
    one = Rendered("<|user|>\nHi\n", conversation=Conversation([user]))
    two = Rendered("...", conversation=Conversation([{"role": "system", "content": "Be brief."}, parts]))
    with served(by_logprobs) as (server, judge):
        judge([one, two, Rendered("text")], ["a"] * 3, ["b"] * 3)
        requests = {
            request.question.partition("[Request]\n")[2].partition("\n\n[Answer")[0] for request in server.requests
        }
    assert requests == {"Hi", "System: Be brief.\n\nUser: Why?", "text"}


def test_servers_that_give_other_logprobs_or_none_are_understood() -> None:
    """Without the likeliest tokens of a place the reply is a vote; raw tokens hold the blank of their vocabulary."""

    def bare(request: Request) -> Reply:
        status, headers, content = reply("1" if longer(request) > 0.5 else "2", [{"1": 1.0}])
        body = orjson.loads(content)
        del body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return status, headers, orjson.dumps(body)

    with served(bare, votes=2, concurrency=1) as (_, judge):
        assert judge(["q"], ["aaaa"], ["b"]).tolist() == [1.0]
        assert judge.calls == 4
    raw = [{"\u25811": 0.75, "\u01202": 0.25}]
    with served(lambda request: reply("1", raw)) as (_, judge):
        assert judge._answer(orjson.loads(reply("1", raw)[2])) == (0.75, True)
    long = orjson.loads(reply("Let me think")[2])
    long["choices"][0]["finish_reason"] = "length"
    with (
        served(lambda request: (200, {}, orjson.dumps(long)), retries=0) as (_, judge),
        pytest.raises(JudgeError, match=r"gave the reply 'Let me think', cut off at max_tokens=4"),
    ):
        judge(["q"], ["a"], ["b"])


def test_the_server_reads_which_answers_were_cut_off() -> None:
    with served(by_logprobs) as (server, judge):
        judge(["q"], ["aaaa"], ["b"], finished=([True], [False]))
        assert {sides(each) for each in server.requests} == {("aaaa", f"b{http.CUT}"), (f"b{http.CUT}", "aaaa")}
        # What the texts say of themselves, and the same text of which one was cut: another question.
        asked = len(server.requests)
        judge(["q"], ["aaaa"], [Unfinished("b")])
        assert len(server.requests) == asked
        judge(["q"], [Unfinished("b")], ["b"])
        assert len(server.requests) == asked + 2
        ask(judge, ["q"], ["aaaa"], [Unfinished("b")])
        assert len(server.requests) == asked + 2
        silent = HttpJudge(server.url, "referee", cut="")
        silent(["q"], ["c"], [Unfinished("d")])
        assert sides(server.requests[-1]) in (("c", "d"), ("d", "c"))
    assert identity(silent).key != identity(judge).key


def test_it_answers_where_an_event_loop_runs() -> None:
    async def notebook(judge: Judge) -> Sequence[float]:
        return list(judge(["q"], ["aaaa"], ["b"]))

    with served(by_logprobs) as (_, judge):
        assert asyncio.run(notebook(judge))[0] > 0.5


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"url": f"https://me:{KEY}@host/v1"}, "without name, password"),
        ({"url": f"https://host/v1?key={KEY}"}, "without name, password, query"),
        ({"url": "host/v1"}, "url must be http"),
        ({"template": "{prompt} {first}"}, "template must hold"),
        ({"answers": ("1", "1.")}, "two different words"),
        ({"votes": 0}, "votes and concurrency must be at least 1"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"max_calls": 0}, "max_tokens and max_calls must be at least 1"),
    ],
)
def test_settings_that_break_a_rule_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        HttpJudge(**{"url": "https://host/v1", "model": "m"} | settings)
    assert KEY not in str(caught.value)


def test_the_command_line_names_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(language_model(), tmp_path / "sft")
    (tmp_path / "prompts.jsonl").write_bytes(b"\n".join(orjson.dumps({"prompt": prompt}) for prompt in PROMPTS[:4]))
    with Server(by_logprobs).running() as server:
        (tmp_path / "train.toml").write_text(
            f'policy = "{tmp_path}/sft"\nprompts = "{tmp_path}/prompts.jsonl"\nrun_dir = "{tmp_path}/run"\n'
            f'[judge]\nurl = "{server.url}"\nmodel = "referee"\nmax_calls = 100\n'
            '[settings]\nalgorithm = "online-ipo"\nsteps = 1\nbatch_size = 4\nmax_new_tokens = 4\n'
        )
        assert main(["train", str(tmp_path / "train.toml")]) == 0, capsys.readouterr().err
        (tmp_path / "evaluate.toml").write_text(
            f'policy = "{tmp_path}/run"\nbaseline = "{tmp_path}/sft"\nprompts = "{tmp_path}/prompts.jsonl"\n'
            f'[judge]\nurl = "{server.url}"\nmodel = "referee"\n[settings]\nmax_new_tokens = 4\n'
        )
        asked = len(server.requests)
        assert asked
        assert main(["evaluate", str(tmp_path / "evaluate.toml"), "judge.model=second"]) == 0, capsys.readouterr().err
        assert {request.body["model"] for request in server.requests[asked:]} == {"second"}
    with pytest.raises(ConfigError, match=r"no setting of that name, but received 'voters'. Did you mean 'votes'"):
        load_judge({"url": server.url, "model": "m", "voters": 3})
    with pytest.raises(ConfigError, match=r"must have url and model, but received none of model"):
        load_judge({"url": server.url})
