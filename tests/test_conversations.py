"""Conversations and caches of tokens from the functions that train: the same numbers as from text, and made once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from small import language_model, prefers_w1
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from fastpref.cli import main
from fastpref.data import cache, read_prompts
from fastpref.data.tokenization import TokenStream
from fastpref.data.tokenizer import Rendered, Tokenizer
from fastpref.learning.supervised import fit_preference_model, fit_reward_model, sft
from fastpref.learning.train import train
from fastpref.method.config import SupervisedConfig, TrainConfig
from fastpref.method.errors import DataError
from fastpref.models import LanguageModel, save
from fastpref.runs.read_model import read_tokenizer

TEMPLATE = """{% for message in messages %}
{{ 'w9 ' if message['role'] == 'user' else 'w8 ' }}{{ message['content'] }} {{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}w8 {% endif %}"""
SETTINGS: dict[str, Any] = {"batch_size": 4, "steps": 2, "max_prompt_tokens": 16, "optimizer": "adamw"}
QUESTIONS = [f"w{number} w{number + 1}" for number in range(10, 22)]


def tokenizer(*, bare: bool) -> Tokenizer:
    """One that adds EOS to prompts and brings a template; or the bare one, which adds nothing and has none."""
    backend = Backend.from_str(language_model().tokenizer.backend.to_str())
    files = {"chat_template.jinja": TEMPLATE.encode()}
    if bare:
        backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        files = {}
    files = {"tokenizer.json": backend.to_str().encode()} | files
    # What the template wrote stands in plain text for the bare one, with its special tokens.
    return Tokenizer(backend, eos_id=1, pad_id=0, files=files, special_text=bare)


def model(*, bare: bool = False) -> LanguageModel:
    return replace(language_model(), tokenizer=tokenizer(bare=bare))


def written(question: str) -> str:
    return f"w9 {question} </s>\nw8 "


def says(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


CHATS = [
    {"prompt": says("user", q), "chosen": says("assistant", "w1 w2"), "rejected": says("assistant", "w3")}
    for q in QUESTIONS
]
TEXTS = [{"prompt": written(q), "chosen": "w1 w2", "rejected": "w3"} for q in QUESTIONS]


def numbers(metrics: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if not name.startswith("time/")} for step in metrics]


@pytest.mark.filterwarnings("ignore:prompts.* columns not used")
def test_the_two_tokenizers_differ_and_agree_where_it_matters() -> None:
    (chat,) = read_prompts(CHATS[:1], tokenizer(bare=False))
    assert chat == TEXTS[0]["prompt"]
    bare, full = tokenizer(bare=True).encode_prompts([chat]), tokenizer(bare=False).encode_prompts([chat, str(chat)])
    assert bare == full[:1]
    # Without the mark, as it comes from a file, it is recognised.
    assert full[1] == bare[0]


def test_online_training_reads_conversations_as_written() -> None:
    config = TrainConfig(max_new_tokens=5, eval_every=2, **SETTINGS)
    asked: set[str] = set()

    def judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        asked.update(prompts)
        return prefers_w1(prompts, first, second)

    prompts = [{"prompt": row["prompt"]} for row in CHATS]
    chats = train(model(), prompts, judge, config, eval_prompts=prompts, quiet=True)
    assert asked == {written(question) for question in QUESTIONS}
    texts = [{"prompt": row["prompt"]} for row in TEXTS]
    plain = train(model(bare=True), texts, judge, config, eval_prompts=texts, quiet=True)
    assert numbers(chats.metrics) == numbers(plain.metrics)
    assert "eval/win_rate" in chats.metrics[-1]


def test_recorded_conversations_train_as_text_does() -> None:
    offline = TrainConfig(algorithm="offline-dpo", max_new_tokens=5, **SETTINGS)
    assert numbers(train(model(), CHATS, None, offline, quiet=True).metrics) == numbers(
        train(model(bare=True), TEXTS, None, offline, quiet=True).metrics
    )
    config = SupervisedConfig(max_completion_tokens=5, eval_every=2, **SETTINGS)
    examples = [{"messages": [*row["prompt"], *row["chosen"]]} for row in CHATS]
    plain = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in TEXTS]
    assert numbers(sft(model(), examples, config, held_out=examples, quiet=True).metrics) == numbers(
        sft(model(bare=True), plain, config, held_out=plain, quiet=True).metrics
    )
    reward, same = (
        fit_reward_model(start, rows, config, held_out=rows, quiet=True)
        for start, rows in ((model(), CHATS), (model(bare=True), TEXTS))
    )
    assert numbers(reward.metrics) == numbers(same.metrics)
    # A reward model reads a rendered prompt as it was trained to.
    prompts = [Rendered(written(question)) for question in QUESTIONS]
    scores = reward.model.scores(prompts, ["w1"] * 12)
    assert scores.tolist() == same.model.scores([str(prompt) for prompt in prompts], ["w1"] * 12).tolist()
    fitted = fit_preference_model(
        model(), CHATS, replace(config, max_prompt_tokens=64), template="{prompt} {first} or {second}", quiet=True
    )
    assert fitted.report.delivered == 12


def test_without_a_template_conversations_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"column 'prompt' must hold text, but received list; conversations need a chat template"
    ):
        train(model(bare=True), CHATS, prefers_w1, TrainConfig(**SETTINGS), quiet=True)


def test_bad_records_are_refused_or_counted_as_the_setting_says() -> None:
    rows = [*TEXTS, {"prompt": "w3", "chosen": "w1"}, {"prompt": " ", "chosen": "w1", "rejected": "w2"}]
    config = TrainConfig(algorithm="offline-ipo", max_new_tokens=5, **SETTINGS)
    with pytest.raises(DataError, match=r"record 12: column 'rejected' must be there.*counted: on_bad_record='skip'"):
        train(model(), rows, None, config, quiet=True)
    found = train(model(), rows, None, replace(config, on_bad_record="skip"), quiet=True)
    assert found.report.dropped == {"missing column": 1, "empty prompt": 1}
    with pytest.warns(UserWarning, match="14 records read, 12 delivered, 2 dropped"):
        sft(
            model(),
            [{"prompt": "w3", "completion": row.get("rejected", "")} for row in rows[:12]] + [{}, {}],
            SupervisedConfig(max_completion_tokens=5, on_bad_record="warn", **SETTINGS),
            quiet=True,
        )


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each encoding of a part was given."""
    counts: list[int] = []
    part = TokenStream._part

    def counted(stream: TokenStream, records: list[Any], completions: int) -> Any:
        counts.append(len(records))
        return part(stream, records, completions)

    monkeypatch.setattr(TokenStream, "_part", counted)
    return counts


def test_a_cache_keeps_what_the_next_run_reads(tmp_path: Path, encodings: list[int]) -> None:
    offline = TrainConfig(algorithm="offline-ipo", max_new_tokens=5, **SETTINGS)
    supervised = SupervisedConfig(max_completion_tokens=5, **SETTINGS)
    source = tmp_path / "pairs.jsonl"
    source.write_bytes(b"\n".join(map(orjson.dumps, CHATS)))
    examples = [{"messages": [*row["prompt"], *row["chosen"]]} for row in CHATS]

    def trained(folder: Path | None) -> list[dict[str, float]]:
        return numbers(train(model(), source, None, offline, cache=folder, quiet=True).metrics)

    def tuned(folder: Path | None) -> list[dict[str, float]]:
        return numbers(sft(model(), examples, supervised, cache=folder, quiet=True).metrics)

    def rated(folder: Path | None) -> list[dict[str, float]]:
        return numbers(fit_reward_model(model(), source, supervised, cache=folder, quiet=True).metrics)

    read: list[Any] = []

    def judge(prompts: Any, first: Any, second: Any) -> list[float]:
        read.append([(type(prompt), prompt) for prompt in prompts])
        return prefers_w1(prompts, first, second)

    def aligned(folder: Path | None) -> list[Any]:
        read.clear()
        online = TrainConfig(max_new_tokens=5, **SETTINGS)
        return [numbers(train(model(), source, judge, online, cache=folder, quiet=True).metrics), [*read]]

    # The reward model finds what the training on the same pairs, with the same limits, has left.
    for run, made in ((trained, 1), (tuned, 1), (rated, 0), (aligned, 1)):
        expected = run(None)
        encodings.clear()
        assert run(tmp_path / "cache") == expected
        assert run(tmp_path / "cache") == expected
        assert len(encodings) == made, run
    assert len(list((tmp_path / "cache").iterdir())) == 3
    plain = cache.tokenized(TEXTS, tokenizer(bare=False), max_prompt_tokens=4)
    assert plain[1].dropped == {"prompt too long": 12}


@pytest.mark.filterwarnings("ignore:prompts.* columns not used")
def test_the_command_line_reads_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(model(), "sft")
    Path("pairs.jsonl").write_bytes(b"\n".join(map(orjson.dumps, CHATS)))
    Path("tastes_of_chats.py").write_text(
        "def taste(prompts, first, second):\n"
        "    assert all(p.startswith('w9 ') and p.endswith('</s>\\nw8 ') for p in prompts), prompts\n"
        "    return [0.5] * len(prompts)\n"
    )
    settings = "[settings]\nbatch_size = 4\nsteps = 2\nmax_prompt_tokens = 16\ncheckpoint_every = 1\n"
    files = 'prompts = "pairs.jsonl"\n'
    Path("train.toml").write_text(
        f'policy = "sft"\n{files}run_dir = "run"\ncache = "cache"\n{settings}'
        'max_new_tokens = 4\nalgorithm = "offline-ipo"\n'
    )
    assert main(["train", "train.toml"]) == 0
    assert len(list(Path("cache").iterdir())) == 1
    Path("evaluate.toml").write_text(
        f'policy = "run/checkpoints/00000002"\nbaseline = "sft"\n{files}judge = "tastes_of_chats:taste"\n'
        "[settings]\nmax_new_tokens = 4\n"
    )
    assert read_tokenizer("run/checkpoints/00000002").files == read_tokenizer("sft").files
    assert main(["evaluate", "evaluate.toml"]) == 0, capsys.readouterr().err
    assert "0.500" in capsys.readouterr().out
    Path("several.toml").write_text(
        f'{files}judge = "tastes_of_chats:taste"\n[policies]\nrun = ["run"]\nsft = "sft"\n'
        "[settings]\nmax_new_tokens = 4\nseeds = [0]\n"
    )
    assert main(["evaluate", "several.toml"]) == 0, capsys.readouterr().err
    assert main(["evaluate", "several.toml", "policies.none=[]"]) == 1
    assert "a policy must be a directory or a list of them, but received none = []" in capsys.readouterr().err
