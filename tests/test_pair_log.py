"""The pair log: what is in it is what was judged, whatever happens to the process or the disk."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import _native
from fastpref.judging import pair_log
from fastpref.judging.pair_log import PairLog
from fastpref.method.errors import PairLogError

FIRST = [[1, 2, 3], [4], []]
SECOND = [[5], [], [6, 7]]
ANSWERS = np.array([0.25, 1.0, 0.0], np.float32)
FIXED, HEAD = 32, 40


class Judge:
    """Answers every question differently, and remembers what it was asked."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.calls: list[list[int]] = []

    def __call__(self, missing: np.ndarray) -> np.ndarray:
        self.calls.append(missing.tolist())
        self.count += len(missing)
        return np.arange(self.count - len(missing), self.count, dtype=np.float32) / 1024


def never(missing: np.ndarray) -> np.ndarray:
    raise AssertionError(f"asked about {missing}")


def log_file(folder: Path, steps: int = 3) -> Path:
    with PairLog(folder, judge="é", seed=7) as log:
        for step in range(steps):
            log.judge(step, [step, -1, 2**62], FIRST, SECOND, lambda _: ANSWERS)
    (path,) = pair_log.files(folder)
    return path


def test_answers_are_read_back_and_not_asked_for_again(tmp_path: Path) -> None:
    judge = Judge()
    with PairLog(tmp_path) as log:
        one = log.judge(0, [10, 11, 12], FIRST, SECOND, judge)
        assert log.judge(0, [10, 11, 12], FIRST, SECOND, never).tobytes() == one.tobytes()
        two = log.judge(5, np.array([10]), [np.array([9])], [np.array([8])], judge)
        assert (log.asked, log.replayed, log.records, log.cut) == (4, 3, 0, {})
    assert judge.calls == [[0, 1, 2], [0]]
    with PairLog(tmp_path) as log:
        assert (log.records, log.replayable) == (4, 4)
        # Half of a batch is known: only the rest is asked about, and the answers keep their places.
        mixed = log.judge(0, [12, 10, 77, 11], [FIRST[2], FIRST[0], [1], FIRST[1]], [*SECOND[::-2], [2], []], judge)
        assert judge.calls[2:] == [[2]]
        assert mixed.tolist() == [one[2], one[0], 4 / 1024, one[1]]
        assert log.judge(5, [10], [[9]], [[8]], never).tobytes() == two.tobytes()
        assert log.judge(6, [], [], [], never).tolist() == []
    assert len(list(pair_log.read(tmp_path))) == 5


@pytest.mark.parametrize(
    "change",
    [{"step": 1}, {"ids": [4]}, {"first": [[1, 3]]}, {"second": [[3, 1]]}, {"first": [[1, 2, 3]], "second": [[]]}],
)
def test_another_question_gets_another_answer(change: dict[str, Any], tmp_path: Path) -> None:
    question: dict[str, Any] = {"step": 0, "ids": [3], "first": [[1, 2]], "second": [[3]]}
    judge = Judge()
    with PairLog(tmp_path) as log:
        log.judge(**question, ask=judge)
    with PairLog(tmp_path) as log:
        assert log.judge(**question | change, ask=judge).tolist() == [1 / 1024]
        assert judge.calls == [[0], [0]]


def test_another_judge_or_seed_is_asked_itself(tmp_path: Path) -> None:
    question: Any = (0, [3], [[1, 2]], [[3]])
    for position, options in enumerate([{}, {"judge": "b"}, {"seed": 1}, {"judge": "b", "seed": 1}]):
        with PairLog(tmp_path, **options) as log:  # type: ignore[arg-type]
            assert log.judge(*question, Judge(position)).tolist() == [position / 1024]
    with PairLog(tmp_path, judge="b") as log:
        assert (log.records, log.replayable) == (4, 1)
        assert log.judge(*question, never).tolist() == [1 / 1024]
    assert [(pair["judge"], pair["seed"]) for pair in pair_log.read(tmp_path)] == [("", 0), ("b", 0), ("", 1), ("b", 1)]


def test_a_question_twice_in_one_call_is_asked_once(tmp_path: Path) -> None:
    judge = Judge()
    with PairLog(tmp_path) as log:
        answers = log.judge(0, [1, 2, 1, 1], [[5], [5], [5], [6]], [[]] * 4, judge)
    assert judge.calls == [[0, 1, 3]]
    assert (answers * 1024).tolist() == [0, 1, 0, 2]
    with PairLog(tmp_path) as log:
        assert log.judge(0, [1, 2, 1, 1], [[5], [5], [5], [6]], [[]] * 4, never).tobytes() == answers.tobytes()


def test_a_run_that_goes_back_finds_the_steps_beyond(tmp_path: Path) -> None:
    judge = Judge()
    with PairLog(tmp_path) as log:
        first = [log.judge(step, [step], [[step]], [[9]], judge) for step in range(6)]
        assert log.replayable == 1
        with pytest.raises(ValueError, match="step must be at least 5, got 4; open the log again to go back"):
            log.judge(4, [4], [[4]], [[9]], judge)
    with PairLog(tmp_path, first_step=3) as log:
        assert (log.records, log.replayable) == (6, 3)
        again = [log.judge(step, [step], [[step]], [[9]], never) for step in range(3, 6)]
        assert again == first[3:]
        log.judge(6, [6], [[6]], [[9]], judge)
    assert [pair["step"] for pair in pair_log.read(tmp_path)] == list(range(7))


def test_pairs_read_back_as_plain_records(tmp_path: Path) -> None:
    path = log_file(tmp_path, steps=1)
    expected = [
        {"step": 0, "prompt_id": name, "first": a, "second": b, "preference": p, "judge": "é", "seed": 7}
        for name, a, b, p in zip([0, -1, 2**62], FIRST, SECOND, ANSWERS.tolist(), strict=True)
    ]
    assert list(pair_log.read(tmp_path)) == list(pair_log.read(path)) == expected
    assert json.loads(json.dumps(expected)) == expected
    with pytest.raises(PairLogError, match=r"a pair log must be a directory or a file, got '.*absent'"):
        next(pair_log.read(tmp_path / "absent"))


def test_files_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_log, "FILE_BYTES", 300)
    judge = Judge()
    with PairLog(tmp_path) as log:
        for step in range(20):
            log.judge(step, [step], [[1] * step], [[2]], judge)
    (tmp_path / "notes.txt").write_text("not a part of the log")
    names = [path.name for path in pair_log.files(tmp_path)]
    assert names == [f"{number:08d}.pairs" for number in range(1, len(names) + 1)]
    assert len(names) > 4
    with PairLog(tmp_path) as log:
        assert log.records == 20
        for step in range(20):
            log.judge(step, [step], [[1] * step], [[2]], never)
    assert [pair["step"] for pair in pair_log.read(tmp_path)] == list(range(20))


def spans(data: bytes) -> list[tuple[int, int]]:
    """Start and end of each record, read from the layout that csrc/pair_log.h describes."""
    (name,) = struct.unpack_from("<I", data, 12)
    at, found = FIXED + -(-name // 8) * 8 + 8, []
    while at < len(data):
        first, second = struct.unpack_from("<II", data, at)
        found.append((at, at := at + HEAD + 4 * (first + second) + 8))
    return found


def test_a_tail_that_was_not_written_is_cut_off_and_asked_for_again(tmp_path: Path) -> None:
    """Wherever a process is killed: it leaves the beginning of a record."""
    path = log_file(tmp_path)
    data = path.read_bytes()
    records = spans(data)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        check_tail(path, [end for _, end in records if end <= size], records[0][0] if size >= records[0][0] else 0)
    with PairLog(tmp_path, judge="é", seed=7) as log:
        log.judge(2, [2, -1, 2**62], FIRST, SECOND, lambda missing: ANSWERS[missing])
        assert log.asked == 1
    assert len(list(pair_log.read(tmp_path))) == 9


def scan(data: bytes) -> tuple[int, int]:
    return _native.PairIndex().scan(data, judge=b"", seed=0, first_step=0)


def check_tail(path: Path, whole: list[int], header: int) -> None:
    data, end = path.read_bytes(), whole[-1] if whole else header
    assert len(list(pair_log.read(path))) == len(whole)
    with PairLog(path.parent, judge="é", seed=7) as log:
        assert (log.records, log.replayable) == (len(whole), len(whole))
        assert log.cut == ({path.name: len(data) - end} if end < len(data) else {})
    assert path.read_bytes() == data[:end]


def test_zeros_from_a_sector_or_a_record_on_were_not_written(tmp_path: Path) -> None:
    with PairLog(tmp_path, judge="é", seed=7) as log:
        for step in range(6):
            log.judge(step, [step], [[step + 1] * (90 + 17 * step)], [[2] * 13], Judge())
    (path,) = pair_log.files(tmp_path)
    data = path.read_bytes()
    records = spans(data)
    starts = {0, *range(512, len(data), 512), *(start for start, _ in records)}
    damaged = 0
    for size in range(len(data)):
        left = data[:size] + bytes(len(data) - size)
        if size in starts:
            path.write_bytes(left)
            check_tail(path, [end for _, end in records if end <= size], records[0][0] if size else 0)
            continue
        start, end = next(((a, b) for a, b in records if size < b), (0, 0))
        stop = 32 if size < 32 else 48 if size < 48 else start + HEAD if size < start + HEAD else end
        if left[:stop] != data[:stop] and not any(len(left.rstrip(b"\0")) <= at < stop for at in starts):
            damaged += 1
            with pytest.raises(ValueError, match="is damaged"):
                scan(left)
    assert damaged > len(data) / 4


def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    path = log_file(tmp_path, steps=2)
    data = path.read_bytes()
    records = spans(data)
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        number = next((i for i, (start, end) in enumerate(records) if start <= position // 8 < end), None)
        place = "header at byte 0" if number is None else f"record {number} at byte {records[number][0]}"
        with pytest.raises(ValueError, match=f"^{place} is damaged: "):
            scan(bytes(flipped))
        if position % 101:
            continue
        path.write_bytes(flipped)
        with pytest.raises(PairLogError, match=rf"{path.name}: {place} is damaged: .*move it away") as error:
            PairLog(tmp_path, judge="é", seed=7)
        assert str(path) in str(error.value)
        assert path.read_bytes() == flipped
    with pytest.raises(PairLogError, match=r"is damaged"):
        list(pair_log.read(tmp_path))
    path.rename(tmp_path / "away")
    with PairLog(tmp_path, judge="é", seed=7) as log:
        assert log.records == 0


def test_records_that_changed_places_are_refused(tmp_path: Path) -> None:
    path = log_file(tmp_path)
    data = path.read_bytes()
    (_, *_, (start, end)), other = spans(data), log_file(tmp_path / "other", steps=1).read_bytes()
    first = spans(data)[0]
    for changed in (
        data[: first[0]] + data[first[1] :],
        data + data[start:end],
        data[: first[0]] + data[first[1] : 2 * first[1] - first[0]] + data[first[0] : first[1]],
        data + other,
        b"something else altogether",
        b"\0" * 8 + data,
    ):
        path.write_bytes(changed)
        with pytest.raises(PairLogError, match="is damaged"):
            PairLog(tmp_path, judge="é", seed=7)
    newer = bytearray(data)
    newer[8] = 2
    content, _ = _native.pair_header(b"", 0)
    assert content[8] == 1
    path.write_bytes(newer)
    with pytest.raises(PairLogError, match="header at byte 0 is damaged"):
        PairLog(tmp_path)


@given(data=st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: _native.pair_header(b"j", 1)[0] + tail))
@settings(max_examples=500)
def test_arbitrary_bytes_are_refused_or_a_torn_tail(data: bytes) -> None:
    index = _native.PairIndex()
    message = ""
    try:
        assert index.scan(data, judge=b"j", seed=1, first_step=0)[1] <= len(data)
    except ValueError as error:
        message = str(error)
    assert ("is damaged: " in message) == bool(message)
    assert len(index) == 0


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    with PairLog(tmp_path), pytest.raises(PairLogError, match="must be written by one process at a time, got a second"):
        PairLog(tmp_path)
    PairLog(tmp_path).close()


# The top of the package imports JAX, which is not needed here.
KILLED = """
import sys, types, numpy as np
top = types.ModuleType("fastpref")
top.__path__ = [sys.argv[2]]
sys.modules["fastpref"] = top
from fastpref.judging.pair_log import PairLog
random = np.random.default_rng()
with PairLog(sys.argv[1]) as log:
    for step in range(10**6):
        tokens = [[step] * 50, [step + 1] * (step % 7)]
        answers = log.judge(step, [step, step + 1], tokens, tokens[::-1], lambda missing: random.random(len(missing)))
        print(step, *(float(p).hex() for p in answers), flush=True)
"""


def test_a_killed_process_has_written_all_it_has_used(tmp_path: Path) -> None:
    """Killed at some moment, three times over: what it printed, its successor replays, whatever the judge would say."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(pair_log.__file__).parent)]
    used: list[str] = []
    for lines in (3, 200, 300):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        # A line that was cut off says nothing.
        printed += [line for line in process.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
        assert printed[: len(used)] == used[: len(printed)]
        used = max(used, printed, key=len)
    with PairLog(tmp_path) as log:
        for step, line in enumerate(used):
            tokens = [[step] * 50, [step + 1] * (step % 7)]
            answers = log.judge(step, [step, step + 1], tokens, tokens[::-1], never)
            assert line.split() == [str(step), *(float(p).hex() for p in answers)]


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, truncate = os.write, os.ftruncate
    room = [20]

    def full(file: int, content: Any) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        written = write(file, content[: room[0]])
        room[0] -= written
        return written

    judge = Judge()
    with PairLog(tmp_path) as log:
        good = log.judge(0, [0, 1, 2], FIRST, SECOND, judge)
        monkeypatch.setattr(os, "write", full)
        # The second time not even half a record can be taken back, and it is cut off on opening.
        for taken_back in (truncate, lambda file, size: full(file, b"")):
            room[0] = 20
            monkeypatch.setattr(os, "ftruncate", taken_back)
            with pytest.raises(PairLogError, match=r"the answers of step 1 could not be written to .*No space left"):
                log.judge(1, [0], [[1]], [[2]], judge)
        monkeypatch.undo()
        later = log.judge(1, [0], [[1]], [[2]], judge)
    with PairLog(tmp_path) as log:
        assert (log.records, list(log.cut.values())) == (4, [20])
        assert log.judge(0, [0, 1, 2], FIRST, SECOND, never).tobytes() == good.tobytes()
        assert log.judge(1, [0], [[1]], [[2]], never).tobytes() == later.tobytes()


def answered(value: Any) -> Any:
    return {"ask": lambda _: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (answered([0.5]), r"ask must return one probability for each of 2 pairs, got shape \(1,\)"),
        (answered([0.5, np.nan]), r"preference must be in \[0, 1\], got nan for prompt 4"),
        (answered([1.5, 0.5]), r"preference must be in \[0, 1\], got 1.50* for prompt 3"),
        ({"ids": [3]}, "ids, first and second must have one entry a pair, got 1, 2 and 2; align them"),
        ({"first": [[1]]}, "one entry a pair, got 2, 1 and 2"),
        ({"first": [[2**31], [1]]}, "token ids must fit into 32 bits"),
        ({"step": -1}, "step must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused_and_not_written(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    question: dict[str, Any] = {"step": 0, "ids": [3, 4], "first": [[1], [2]], "second": [[3], [4]], "ask": Judge()}
    with PairLog(tmp_path) as log:
        with pytest.raises(ValueError, match=message):
            log.judge(**question | change)
        assert list(pair_log.read(tmp_path)) == []
        assert len(log.judge(**question)) == 2
    with pytest.raises(ValueError, match="a pair log must be open to judge, got a closed one; open it again"):
        log.judge(**question)
    log.close()


def test_settings_that_cannot_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="judge must have at most 65535 bytes, got 65536"):
        PairLog(tmp_path / "a", judge="x" * 2**16)
    with pytest.raises(ValueError, match="seed must be an integer in"):
        PairLog(tmp_path / "a", seed=-1)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(PairLogError, match=r"file must be a directory to read and write, got: .*Choose another"):
        PairLog(tmp_path / "file")
    (tmp_path / "log" / "00000001.pairs").mkdir(parents=True)
    with pytest.raises(PairLogError, match="log must be a directory to read and write"):
        PairLog(tmp_path / "log")
    (tmp_path / "log" / "00000001.pairs").rmdir()
    PairLog(tmp_path / "log").close()


def test_nothing_is_left_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for step in range(20):
        with PairLog(tmp_path) as log:
            log.judge(step, [step], [[1]], [[2]], Judge())
    assert descriptors() == before
    assert threading.active_count() == len(threading.enumerate())


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    random = np.random.default_rng(0)
    with PairLog(folder) as log:
        for step in range(50):
            rows = [random.integers(-(2**31), 2**31, int(n)).tolist() for n in random.integers(0, 40, 16)]
            log.judge(step, random.integers(0, 5, 8), rows[:8], rows[8:], Judge(8 * step))
    return folder


def test_a_reader_written_in_python_agrees(long_log: Path) -> None:
    (path,) = pair_log.files(long_log)
    data = path.read_bytes()
    expected = []
    for start, end in spans(data):
        first, second, step, prompt, p, zero = struct.unpack_from("<IIqqfI", data, start)
        tokens = np.frombuffer(data, np.int32, first + second, start + HEAD).tolist()
        assert (end - start, zero) == (HEAD + 4 * (first + second) + 8, 0)
        expected.append((step, prompt, p, tokens[:first], tokens[first:]))
    names = ("step", "prompt_id", "preference", "first", "second")
    assert [tuple(pair[name] for name in names) for pair in pair_log.read(long_log)] == expected
    assert len(expected) == 400


def checksum(before: int, data: bytes) -> int:
    mask = 2**64 - 1
    x = (before + 0x9E3779B97F4A7C15 * (len(data) + 1)) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    data += bytes(-len(data) % 8)
    for (word,) in struct.iter_unpack("<Q", data):
        x = ((x ^ word) * 0x9FB21C651E98DF25) & mask
        x ^= x >> 32
    return x


def test_checksums_are_those_of_the_layout(long_log: Path) -> None:
    (path,) = pair_log.files(long_log)
    data = path.read_bytes()
    chain = 0
    records = spans(data)
    blocks = [(0, 24), (FIXED, records[0][0] - 8)]
    blocks += [block for start, end in records for block in ((start, start + 32), (start + HEAD, end - 8))]
    for start, end in blocks:
        chain = checksum(chain, data[start:end])
        assert struct.unpack_from("<Q", data, end) == (chain,)
