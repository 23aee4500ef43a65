"""The log of judgements: what is in it is what was judged, whatever happens to the process or the disk."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref.data.rendered import Conversation, Rendered
from fastpref.judging import judgements
from fastpref.judging.identity import Identity
from fastpref.judging.judgements import FILE, Judgements
from fastpref.method.errors import JudgeError, JudgementsError, OwnerError

PROMPTS = ["p0", "p1", "é\n\0"]
FIRST = ["a", "", "long " * 50]
SECOND = ["b", "c", ""]
ALICE, BOB = (Identity(name, {}, None, f"key of {name}") for name in ("alice", "bob"))


class Judge:
    """Answers every question differently, and remembers what it was asked."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.calls: list[list[int]] = []

    def __call__(self, missing: list[int]) -> np.ndarray:
        self.calls.append(list(missing))
        self.count += len(missing)
        return np.arange(self.count - len(missing), self.count, dtype=np.float32) / np.float32(1024)


def never(missing: list[int]) -> np.ndarray:
    raise AssertionError(f"the judge is asked again about {missing}")


def ask(log: Judgements, judge: Any, step: int = 0, *, who: Identity = ALICE, **change: Any) -> np.ndarray:
    question: dict[str, Any] = {"prompts": PROMPTS, "first": FIRST, "second": SECOND, "purpose": "training"} | change
    return log.answers(who, step=step, answer=judge, **question)


def written(path: Path, steps: int = 3) -> Path:
    judge = Judge()
    with Judgements(path) as log:
        for step in range(steps):
            ask(log, judge, step)
    return path


def test_answers_come_back_bit_for_bit_and_only_the_rest_is_asked(tmp_path: Path) -> None:
    judge = Judge()
    with Judgements(tmp_path / "new" / FILE) as log:
        first = ask(log, judge)
        assert first.dtype == np.float32
        assert ask(log, never).tobytes() == first.tobytes()
        assert (log.asked, log.replayed, len(log)) == (3, 3, 3)
    with Judgements(tmp_path / "new" / FILE) as log:
        # Half of a batch is known: only the rest is asked about, and the answers keep their places.
        mixed = ask(log, judge, prompts=["p1", "new", "p0"], first=["", "x", "a"], second=["c", "y", "b"])
        assert judge.calls == [[0, 1, 2], [1]]
        assert mixed.tolist() == [first[1], 3 / 1024, first[0]]
        assert ask(log, never, prompts=[], first=[], second=[]).tolist() == []
    assert len(list(judgements.read(tmp_path / "new"))) == 4


def test_an_answer_that_no_float32_rounds_is_kept_as_it_was_used(tmp_path: Path) -> None:
    odd = np.array([1e-45, 1 - 2**-24, 1 / 3], np.float32)
    with Judgements(tmp_path / FILE) as log:
        used = ask(log, lambda _: odd)
    with Judgements(tmp_path / FILE) as log:
        assert ask(log, never).tobytes() == used.tobytes() == odd.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1},
        {"who": BOB},
        {"purpose": "evaluation"},
        {"prompts": ["p0", "p1", "p2"], "asked": [2]},
        {"first": ["ab", "", "long " * 50], "second": ["", "c", ""], "asked": [0]},
        {"second": None},
    ],
)
def test_another_question_gets_another_answer(change: dict[str, Any], tmp_path: Path) -> None:
    expected = change.pop("asked", [0, 1, 2])
    judge = Judge()
    with Judgements(tmp_path / FILE) as log:
        ask(log, judge)
        again = ask(log, judge, **change)
        assert judge.calls[1:] == [expected]
        assert again[expected].tolist() == [(3 + at) / 1024 for at in range(len(expected))]


def test_a_question_twice_in_one_call_is_asked_once(tmp_path: Path) -> None:
    judge = Judge()
    twice = {"prompts": ["p", "q", "p"], "first": ["a"] * 3, "second": ["b"] * 3}
    with Judgements(tmp_path / FILE) as log:
        answers = ask(log, judge, **twice)
    assert judge.calls == [[0, 1]]
    assert (answers * 1024).tolist() == [0, 1, 0]
    with Judgements(tmp_path / FILE) as log:
        assert ask(log, never, **twice).tobytes() == answers.tobytes()


def test_judgements_read_back_as_plain_records(tmp_path: Path) -> None:
    with Judgements(tmp_path / FILE) as log:
        answers = ask(log, Judge(5), 7)
        # Readable while it is written.
        records = list(judgements.read(tmp_path))
    expected = [
        {"judge": "alice", "judge_key": "key of alice", "purpose": "training", "step": 7}
        | {"prompt": prompt, "conversation": None, "first": a, "second": b, "finished": None, "answer": p}
        for prompt, a, b, p in zip(PROMPTS, FIRST, SECOND, answers.tolist(), strict=True)
    ]
    assert records == list(judgements.read(tmp_path / FILE)) == expected
    assert json.loads(json.dumps(expected)) == expected
    with pytest.raises(JudgementsError, match=r"a log of judgements must be a file judged.sqlite, but received '.*nt'"):
        next(judgements.read(tmp_path / "absent"))


def test_a_judge_that_fails_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    def fails(missing: list[int]) -> np.ndarray:
        raise ConnectionError("gone")

    with Judgements(tmp_path / FILE) as log:
        with pytest.raises(ConnectionError):
            ask(log, fails)
        assert len(log) == 0
        ask(log, Judge())
    assert len(list(judgements.read(tmp_path))) == 3


def test_a_judge_that_fails_midway_keeps_what_it_answered(tmp_path: Path) -> None:
    def fails(missing: list[int]) -> np.ndarray:
        raise JudgeError("no more", {0: 0.25, 2: 1 / 3})

    with Judgements(tmp_path / FILE) as log:
        with pytest.raises(JudgeError, match="no more"):
            ask(log, fails)
        assert len(log) == 2
    with Judgements(tmp_path / FILE) as log:
        judge = Judge(7)
        assert ask(log, judge).tolist() == [0.25, 7 / 1024, float(np.float32(1 / 3))]
        assert judge.calls == [[1]]


def test_answers_by_content_are_those_of_any_step_and_purpose(tmp_path: Path) -> None:
    judge = Judge()
    with Judgements(tmp_path / FILE) as log:
        first = ask(log, judge, 3)
        assert ask(log, never, 4, purpose="evaluation", by_content=True).tolist() == first.tolist()
        ask(log, judge, 4, who=BOB, by_content=True)
        assert len(log) == 6
    with Judgements(tmp_path / FILE) as log:
        assert ask(log, never, 9, by_content=True).tolist() == first.tolist()
        # Asked for their step, the answers are that step's.
        assert ask(log, judge, 9).tolist() != first.tolist()


def test_what_is_told_of_completions_is_part_of_the_question(tmp_path: Path) -> None:
    judge = Judge()
    both = [[True, True, False], [True, False, True]]
    with Judgements(tmp_path / FILE) as log:
        for finished in (None, both, [[True] * 3, both[1]], both):
            ask(log, judge, finished=finished)
        assert judge.calls == [[0, 1, 2], [0, 1, 2], [2]]
        log.answers(ALICE, "training", 0, ["p"], ["a"], finished=[[False]], answer=judge)
    words = [record["finished"] for record in judgements.read(tmp_path)]
    assert words == [None] * 3 + ["ended ended", "ended cut", "cut ended"] + ["ended ended", "cut"]


def test_conversations_that_one_text_was_written_from_are_different_questions(tmp_path: Path) -> None:
    def written_from(*messages: str, **more: Any) -> Rendered:
        said = [{"role": "user", "content": content} for content in messages]
        return Rendered("p", conversation=Conversation(said, **more))

    tools = [{"name": "clock"}]
    prompts = ["p", written_from("p"), written_from("p", tools=tools), written_from(" p "), Rendered("p")]
    prompts += [written_from("p", options={"thinking": False})]
    same = {"prompts": prompts, "first": ["a"] * 6, "second": ["b"] * 6}
    judge = Judge()
    with Judgements(tmp_path / FILE) as log:
        answers = ask(log, judge, **same)
        # Text alone, whether it is known to be a template's or not, is one.
        assert judge.calls == [[0, 1, 2, 3, 5]]
        for by_content in (False, True):
            assert ask(log, never, by_content=by_content, **same).tolist() == answers.tolist()
    with Judgements(tmp_path / FILE) as log:
        again = Rendered.unpack(prompts[2].pack())  # as a run reads it from its cache of tokens
        assert ask(log, never, prompts=[again], first=["a"], second=["b"]).tolist() == [answers[2]]
    said = [record["conversation"] for record in judgements.read(tmp_path)]
    assert said[0] is None
    assert json.loads(said[2]) == [[{"role": "user", "content": "p"}], tools, {}]


def test_every_flipped_bit_is_harmless_or_named(tmp_path: Path) -> None:
    path = written(tmp_path / FILE)
    data = path.read_bytes()
    good = list(judgements.read(path))
    messages = []
    rng = np.random.default_rng(0)
    # All of the header, then a sample of the rest, of which SQLite leaves most empty.
    for position in [*range(8 * 100), *rng.integers(800, 8 * len(data), 1500).tolist()]:
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = list(judgements.read(path))
        except JudgementsError as error:
            messages.append(str(error))
        else:
            assert found == good
    assert all(str(path) in message for message in messages)
    assert all(re.search("move it away to go on|must be a file that can be read", message) for message in messages)
    assert len(messages) > 300


def test_a_changed_answer_is_named_by_its_row_and_can_be_gone_on_without(tmp_path: Path) -> None:
    path = written(tmp_path / FILE)
    for change, fault in (
        ("UPDATE judged SET answer = 0.75 WHERE id = 5", "row 5 is not as it was written"),
        ("UPDATE judged SET judge_key = 'key of bob' WHERE id = 2", "row 2 is not as it was written"),
        ("DELETE FROM judged WHERE id = 4", "row 4 is not as it was written"),
        ("DELETE FROM judged WHERE id > 7", "it holds 7 rows, and 9 were written"),
        ("PRAGMA user_version = 1", "another version of fastpref"),
        ("DROP TABLE judged", "row 1 cannot be read"),
    ):
        copy = tmp_path / "copy.sqlite"
        copy.write_bytes(path.read_bytes())
        connection = sqlite3.connect(copy)
        connection.execute(change)
        connection.commit()
        connection.close()
        with pytest.raises(
            JudgementsError, match=rf"copy.sqlite must be as it was written, but .*{fault}.* move it aw"
        ):
            Judgements(copy)
    copy.unlink()
    with Judgements(copy) as log:
        assert len(log) == 0


def test_what_is_not_a_log_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"something else altogether, longer than a header of SQLite" * 9)
    connection = sqlite3.connect(tmp_path / "other")
    connection.execute("CREATE TABLE notes (text TEXT)")
    connection.commit()
    connection.close()
    for name in ("text", "other"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(JudgementsError, match=rf"{name} must be as it was written, but"):
            Judgements(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(JudgementsError, match=r"folder must be a file that can be read and written"):
        Judgements(tmp_path / "folder")
    with pytest.raises(JudgementsError, match=r"must be a file that can be read and written, but received: .*exists"):
        Judgements(tmp_path / "text" / FILE)


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    with Judgements(tmp_path / FILE):
        with pytest.raises(OwnerError, match=rf"is held by process {os.getpid()} on host"):
            Judgements(tmp_path / FILE)
        code = "import sys; from fastpref.judging.judgements import Judgements; Judgements(sys.argv[1])"
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / FILE)], capture_output=True, text=True, check=False
        )
        assert f"is held by process {os.getpid()} on host" in second.stderr
    Judgements(tmp_path / FILE).close()


KILLED = """
import sys, numpy as np
from fastpref.judging.identity import Identity
from fastpref.judging.judgements import Judgements
random = np.random.default_rng()
who = Identity("alice", {}, None, "key of alice")
with Judgements(sys.argv[1]) as log:
    for step in range(10**6):
        texts = ["x" * 50, "y" * (step % 7)]
        ask = lambda missing: random.random(len(missing), np.float32)
        answers = log.answers(who, "training", step, ["p", "q"], texts, texts[::-1], answer=ask)
        print(step, *(float(p).hex() for p in answers), flush=True)
"""


def test_a_killed_process_has_written_all_it_has_used(tmp_path: Path) -> None:
    """Killed at some moment, three times over: what it printed, its successor replays, whatever the judge would say."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / FILE)]
    used: list[str] = []
    for lines in (3, 100, 150):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        # A line that was cut off says nothing.
        printed += [line for line in process.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
        assert printed[: len(used)] == used[: len(printed)]
        used = max(used, printed, key=len)
    with Judgements(tmp_path / FILE) as log:
        for step, line in enumerate(used):
            texts = ["x" * 50, "y" * (step % 7)]
            answers = log.answers(ALICE, "training", step, ["p", "q"], texts, texts[::-1], answer=never)
            assert line.split() == [str(step), *(float(p).hex() for p in answers)]


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    judge = Judge()
    with Judgements(tmp_path / FILE) as log:
        good = ask(log, judge)
        (pages,) = log._connection.execute("PRAGMA page_count").fetchone()
        log._connection.execute(f"PRAGMA max_page_count = {pages}")
        long = {"prompts": ["p" * 50_000], "first": ["a"], "second": ["b"]}
        with pytest.raises(
            JudgementsError, match=r"writing 1 of them to .*judged.sqlite failed: database or disk is f"
        ):
            ask(log, judge, 1, **long)
        log._connection.execute(f"PRAGMA max_page_count = {2**30}")
        later = ask(log, judge, 1, **long)
    with Judgements(tmp_path / FILE) as log:
        assert len(log) == 4
        assert ask(log, never).tobytes() == good.tobytes()
        assert ask(log, never, 1, **long).tobytes() == later.tobytes()


def test_nothing_is_left_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for step in range(20):
        with Judgements(tmp_path / FILE) as log:
            ask(log, Judge(), step)
        list(judgements.read(tmp_path))
    assert descriptors() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, f"{FILE}.lock"]
