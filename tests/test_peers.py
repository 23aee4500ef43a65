"""The benchmark against TRL, without TRL: sides take turns, unequal work is refused, ratios are of one round."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))
bench_peers, peers_side = map(import_module, ("bench_peers", "peers_side"))

MATCH = bench_peers.MATCHES[1]._replace(prompts=2, new_tokens=4, warmup=1, rounds=3)
TRAINER = """
import sys; sys.path.insert(0, {bench!r})
from peers_side import Turns
turns, steps = Turns(), 0
print("a library's own line")
turns.ready(prompts=[[1, 2]], versions={{"trl": "1"}})
while True:
    steps += 1
    open({log!r}, "a").write({name!r})
    if steps == {last}:
        raise ValueError("out of memory")
    turns.done(tokens=16, loss=25.0, nats=6.2)
"""


def side(**changed: Any) -> dict[str, Any]:
    steps = [
        {
            "seconds": seconds,
            "cpu_seconds": 1.5,
            "peak_rss_bytes": 7e8 + number,
            "tokens": 16,
            "loss": 25.0,
            "nats": 6.2,
        }
        for number, seconds in enumerate((9.0, 3.0, 1.0, 2.0))
    ]
    return MATCH.sides[0]._asdict() | {"prompts": [[1, 2], [3]], "versions": {"trl": "1"}, "steps": steps} | changed


def step(**changed: Any) -> list[dict[str, Any]]:
    first, *rest = side()["steps"]
    return [first | changed, *rest]


def trainers(monkeypatch: pytest.MonkeyPatch, log: Path, last: int = 0) -> None:
    """Put trainers that do nothing in the place of both sides; the second fails at its step `last`."""
    begin = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        name = "ab"[command[2] == "ours"]
        code = TRAINER.format(bench=str(BENCH), log=str(log), name=name, last=last if name == "b" else 0)
        return begin([sys.executable, "-c", code], **options)

    monkeypatch.setattr(bench_peers.subprocess, "Popen", popen)


def test_sides_make_their_steps_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainers(monkeypatch, tmp_path / "log")
    peer, ours = bench_peers.played(MATCH, {"ours": "", "trl": ""}, tmp_path)
    assert (tmp_path / "log").read_text() == "abababab"
    assert (peer["program"], ours["program"]) == ("trl", "ours")
    assert [made["loss"] for made in ours["steps"]] == [25.0] * 4
    assert all(made["seconds"] > 0 and made["peak_rss_bytes"] > 1e6 for made in peer["steps"])
    bench_peers.require_same_work(MATCH, [peer, ours])


def test_a_side_that_fails_is_named_with_its_last_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainers(monkeypatch, tmp_path / "log", last=2)
    with pytest.raises(SystemExit, match="`online-ipo` must make its steps, but received exit status 1") as refused:
        bench_peers.played(MATCH, {"ours": "", "trl": ""}, tmp_path)
    assert "ValueError: out of memory" in str(refused.value)
    assert (tmp_path / "log").read_text() == "abab"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": [[1, 2], [4]]}, "the tokens of the prompts must be"),
        ({"steps": step(tokens=15)}, "the tokens written in each step must be [16, 16, 16, 16], but received [15, "),
        ({"steps": step(loss=25.2)}, "the loss at step 0, to a decimal, must be 25.0, but received 25.2"),
    ],
)
def test_unequal_work_is_refused(changed: dict[str, Any], message: str) -> None:
    bench_peers.require_same_work(MATCH, [side(), side()])
    with pytest.raises(SystemExit) as refused:
        bench_peers.require_same_work(MATCH, [side(), side(**changed)])
    assert message in str(refused.value)


def test_the_loss_of_a_policy_gradient_may_be_any() -> None:
    bench_peers.require_same_work(MATCH, [side(), side(method="nash-md-pg", steps=step(loss=-3.0))])


def test_what_is_recorded_is_of_the_steps_that_count() -> None:
    faster = [{**made, "seconds": seconds} for made, seconds in zip(side()["steps"], (1, 2, 2, 1), strict=True)]
    match = bench_peers.summary(MATCH, [side(), side(steps=faster)])
    peer, ours = match["sides"]
    assert (match["model"], match["pair"], match["prompt_tokens"]) == ("random", "policy", 3)
    assert peer["seconds"] == {"median": 2.0, "least": 1.0, "most": 3.0, "each": [3.0, 1.0, 2.0]}
    assert peer["ratio"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert ours["ratio"] == {"median": 1.5, "least": 0.5, "most": 2.0}
    assert (peer["first_seconds"], peer["tokens_per_second"], peer["peak_rss_bytes"]) == (9.0, 8.0, 7e8 + 3)


def test_every_match_is_named_by_its_model_and_pair() -> None:
    names = {(match.model, match.sides[0].method) for match in bench_peers.MATCHES}
    assert len(names) == len(bench_peers.MATCHES)
    assert {model for model, _ in names} == set(bench_peers.MODELS)
    assert all(
        [made.program == "trl" for made in match.sides] == [True] + [False] * (len(match.sides) - 1)
        for match in bench_peers.MATCHES
    )


def test_the_text_shows_both_sides() -> None:
    report = {
        "command": "python bench/bench_peers.py --write",
        "machine": "a machine",
        "peer_versions": {"trl": "1.13.0"},
        "before": {"load average": 0.1},
        "matches": [bench_peers.summary(MATCH, [side(), side(name="ours")])],
        "after": {"load average": 1.0},
    }
    text = bench_peers.text(report)
    assert (
        "`python bench/bench_peers.py --write` on a machine; the peer: trl 1.13.0; before: load average 0.10;" in text
    )
    assert "2 prompts, 3 tokens together, 2 × 4 new tokens each; AdamW at 0.0001; steps timed: 3, after 1" in text
    row = "policy, policy | 2.00 (1.00 to 3.00) | 1.00 (1.00 to 1.00) | 9.0 s | 8 | 700 MB | 16 | 25.00 | 6.20 |"
    assert f"| TRL Online DPO, `ipo` loss, cached | {row}\n| ours | {row}" in text


def test_the_judge_takes_the_first_where_words_tie() -> None:
    first, second = ["a b", "a a", "a"], ["a", "a b", "b"]
    assert peers_side.prefers(["p"] * 3, first, second) == [1.0, 0.0, 1.0]
