"""What a judge reads: conversations by its own template, and whether a completion ended; wherever policies write."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reward_checkpoints import BEGIN, CHATS, ZEPHYR, write_checkpoint
from safetensors.numpy import load_file, save_file
from small import PROMPTS, language_model, prefers_w1

from fastpref.data import read_prompts
from fastpref.data.rendered import Rendered, Unfinished, is_finished
from fastpref.evaluation.best_checkpoint import select_checkpoint
from fastpref.evaluation.during_training import HeldOut
from fastpref.evaluation.side_by_side import compare, evaluate
from fastpref.evaluation.win_rates import win_rate
from fastpref.judging import judgements
from fastpref.judging.judgements import Judgements
from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.judging.protocol import ask, asks_finished, rate
from fastpref.judging.recorded import RecordedJudge
from fastpref.learning.train import train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ChatError, CheckpointError, ConfigError, DataError, JudgeError
from fastpref.models import LanguageModel, load
from fastpref.sampling.generate import write

ROWS = [{"prompt": chat} for chat in CHATS]
SETTINGS: dict[str, Any] = {"steps": 1, "batch_size": 3, "max_new_tokens": 3, "max_prompt_tokens": 256}

TEMPLATES = {"bare": None, "tools": ZEPHYR.replace("{{ bos_token }}", "{{ bos_token }}{{ tools | tojson if tools }}")}


def tie(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [0.5] * len(prompts)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    """Language models of 264 tokens with the template of ChatML ("llama"), of Zephyr ("mistral"), or of `TEMPLATES`."""
    made: dict[str, LanguageModel] = {}

    def model(kind: str) -> LanguageModel:
        if kind not in made:
            path = write_checkpoint(tmp_path_factory.mktemp("models") / kind, "value_head")
            if kind != "llama":
                write_checkpoint(path / "other", "mistral")
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    (path / name).write_bytes((path / "other" / name).read_bytes())
            if kind in TEMPLATES:
                config = json.loads((path / "tokenizer_config.json").read_text())
                (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATES[kind]}))
            weights = load_file(path / "model.safetensors")
            bodies = {name: weight for name, weight in weights.items() if not name.startswith("v_head")}
            save_file(bodies, path / "model.safetensors")
            made[kind] = load(path)
        return made[kind]

    return model


def read_by(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that the model's tokenizer encodes from now on, with its special tokens as text."""
    tokenizer, read = model.tokenizer, []
    encode = type(tokenizer).encode_prompts

    def spy(texts: Sequence[str]) -> list[list[int]]:
        rows = encode(tokenizer, texts)
        read.extend(tokenizer.backend.decode(row, skip_special_tokens=False) for row in rows)
        return rows

    monkeypatch.setattr(tokenizer, "encode_prompts", spy)
    return read


def test_a_judging_model_reads_a_conversation_by_its_own_template(
    chat_model: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, other = chat_model("llama"), chat_model("mistral")
    prompts = read_prompts(ROWS, policy.tokenizer)
    assert prompts[0] == "<|im_start|>user\nWhere is the mill?<|im_end|>\n<|im_start|>assistant\n"
    reward = RewardModel.from_model(other)
    read, _ = reward.readings(prompts, ["a", "b", "c"])
    assert read[0][0] == BEGIN
    assert read == other.tokenizer.encode_prompts(read_prompts(ROWS, other.tokenizer))
    opened, _ = PreferenceModel(other, "{prompt} 1 {first} 2 {second}").readings(prompts, ["a"] * 3, ["b"] * 3)
    assert other.tokenizer.decode(opened)[1].startswith("<|system|>\nBe brief.\n<|user|>\nWhat rose?")
    assert opened[1][0] == BEGIN
    # The same in a run, from the cache of tokens too, and in its held-out comparisons.
    seen = read_by(other, monkeypatch)
    config = TrainConfig(algorithm="online-dpo", tau=0.1, eval_every=1, **SETTINGS)
    train(policy, ROWS, reward, config, eval_prompts=ROWS[:2], quiet=True)
    assert len(seen) > 6
    assert all(text.startswith("<s><|") and "im_start" not in text for text in seen), seen


def test_a_judge_without_a_template_is_refused_and_a_function_reads_the_text(
    chat_model: Callable[[str], LanguageModel],
) -> None:
    config = TrainConfig(algorithm="online-dpo", tau=0.1, **SETTINGS)
    bare = RewardModel.from_model(chat_model("bare"))
    with pytest.raises(JudgeError, match=r"raised ChatError: a model that reads conversations must bring a chat temp"):
        train(chat_model("llama"), ROWS, bare, config, quiet=True)
    asked: set[str] = set()

    def reader(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        asked.update(prompts)
        return tie(prompts, first, second)

    train(chat_model("llama"), ROWS, reader, config, quiet=True)
    assert asked == {*read_prompts(ROWS, chat_model("llama").tokenizer)}


def test_policies_that_differ_write_to_a_conversation_each_by_its_own_template(
    chat_model: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = {"one": chat_model("llama"), "two": chat_model("mistral")}
    seen = {name: read_by(model, monkeypatch) for name, model in models.items()}
    source = tmp_path / "chats.jsonl"
    source.write_text("\n".join(map(json.dumps, ROWS)))
    for prompts in (ROWS, source, read_prompts(ROWS, models["two"].tokenizer)):
        for read in seen.values():
            read.clear()
        found = evaluate(models, prompts, tie, max_new_tokens=2, seeds=(0,))
        assert list(found.prompts) == read_prompts(ROWS, models["one"].tokenizer)
        assert all(text.startswith("<|im_start|>") for text in seen["one"])
        assert all(text.startswith("<s><|") and "im_start" not in text for text in seen["two"])
        assert len(seen["one"]) == len(seen["two"]) == 3
    with pytest.raises(ChatError, match=r"must bring a chat template .* but received none"):
        evaluate({**models, "three": chat_model("bare")}, ROWS, tie, max_new_tokens=2)
    with pytest.raises(DataError, match=r"conversations need a chat template"):
        evaluate({"three": chat_model("bare"), **models}, ROWS, tie, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:.*columns not used. chosen")
def test_prompts_are_taken_in_every_form_that_training_takes(tmp_path: Path) -> None:
    model, texts = language_model(), PROMPTS[:3]
    expected = write(model, texts, seed=0, max_new_tokens=3)
    rows = [{"prompt": text, "chosen": "w1"} for text in texts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = {"a": model, "b": language_model(seed=1)}
    rated = evaluate(models, texts, prefers_w1, max_new_tokens=3, seeds=(0,))
    against = compare(model, models["b"], texts, prefers_w1, max_new_tokens=3)
    ranked = select_checkpoint([model], models["b"], texts, prefers_w1, max_new_tokens=3)
    for prompts in (rows, tuple(texts), iter(rows), tmp_path / "prompts.jsonl", str(tmp_path / "prompts.jsonl")):
        again = list(prompts) if not isinstance(prompts, str | Path) else prompts
        assert write(model, again, seed=0, max_new_tokens=3).texts == expected.texts
        assert evaluate(models, again, prefers_w1, max_new_tokens=3, seeds=(0,)).value.tolist() == rated.value.tolist()
        assert compare(model, models["b"], again, prefers_w1, max_new_tokens=3).value == against.value
        same = select_checkpoint([model], models["b"], again, prefers_w1, max_new_tokens=3)
        assert same.best.win_rate.value == ranked.best.win_rate.value
        assert win_rate(again, ["w1"] * 3, ["w2"] * 3, prefers_w1).value == 1


def test_what_is_no_prompt_is_refused(unchecked: None) -> None:
    models = {"a": language_model(), "b": language_model(seed=1)}
    bad: Any
    for bad in ([{"text": "w1"}] * 2, [["w1"], ["w2"]], [3, 4]):
        with pytest.raises(DataError, match=r"must"):
            evaluate(models, bad, prefers_w1, max_new_tokens=3)


def test_conversations_that_the_policy_reads_alike_are_judged_each(
    chat_model: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    """Tools stand in the judge's template and not in the policy's."""
    rows = [{**ROWS[0], "tools": [{"name": name}]} for name in ("clock", "bell")]
    prompts = read_prompts(rows, chat_model("llama").tokenizer)
    assert prompts[0] == prompts[1]
    reward = RewardModel.from_model(chat_model("tools"))
    reward.module.weight[...] = jnp.ones_like(reward.module.weight[...])
    expected = reward(prompts, ["a", "a"], ["b", "b"])
    assert expected[0] != expected[1]
    with Judgements(tmp_path / "judged.sqlite") as log:
        asked = RecordedJudge(reward, log)
        for _ in range(2):
            found = asked.ask(prompts, ["a", "a"], ["b", "b"], purpose="training", step=0)
            assert found.tolist() == expected.tolist()
        assert (log.asked, log.replayed) == (2, 2)


def test_a_run_and_its_cache_belong_to_the_conversations_that_prompts_were_written_from(
    chat_model: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    policy = chat_model("llama")
    seen: list[Any] = []

    def reader(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        said = [prompt.conversation for prompt in prompts if isinstance(prompt, Rendered)]
        seen.extend(conversation.tools for conversation in said if conversation is not None)
        return tie(prompts, first, second)

    rows = {name: [{**row, "tools": [{"name": name}]} for row in ROWS] for name in ("clock", "bell")}
    settings = TrainConfig(algorithm="online-dpo", tau=0.1, **SETTINGS)
    for name in rows:
        seen.clear()
        train(policy, rows[name], reader, settings, cache=tmp_path / "cache", quiet=True)
        assert [{"name": name}] in seen
    train(policy, rows["clock"], tie, settings, run_dir=tmp_path / "run", quiet=True)
    with pytest.raises(CheckpointError, match=r"\n  prompts: "):
        train(policy, rows["bell"], tie, replace(settings, steps=2), run_dir=tmp_path / "run", quiet=True)
    held_out = {name: read_prompts(rows[name], policy.tokenizer) for name in rows}
    assert held_out["clock"] == held_out["bell"]
    one, other = (HeldOut(policy, prompts, RecordedJudge(tie), settings) for prompts in held_out.values())
    assert one.fingerprint()["prompts"] != other.fingerprint()["prompts"]


Told = list[tuple[list[bool], ...]]


def teller(told: Told) -> Callable[..., list[float]]:
    def judge(
        prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, finished: Any = None
    ) -> list[float]:
        told.append(finished)
        return [0.5] * len(prompts)

    return judge


def test_a_judge_that_asks_is_told_which_completions_ended() -> None:
    told: Told = []
    judge = teller(told)
    cut = Unfinished("b")
    ask(judge, ["x", "y"], ["a", cut], [cut, "c"])
    assert told == [([True, False], [False, True])]
    assert asks_finished(judge)
    assert not asks_finished(prefers_w1)
    assert not asks_finished(len)
    assert not asks_finished(partial(judge, finished=None))
    assert asks_finished(partial(judge))
    assert is_finished("a")
    assert (cut, is_finished(cut)) == ("b", False)


def test_training_and_evaluation_tell_it(tmp_path: Path) -> None:
    told: Told = []
    config = TrainConfig(
        algorithm="online-ipo", steps=1, batch_size=16, max_new_tokens=3, max_prompt_tokens=16, eval_every=1
    )
    found = train(
        language_model(),
        PROMPTS,
        teller(told),
        config,
        run_dir=tmp_path,
        eval_prompts=PROMPTS[:4],
        eval_judge=prefers_w1,
        quiet=True,
    )
    flags = [flag for lists in told for ends in lists for flag in ends]
    assert {True, False} == {*flags}
    # Identical completions are not asked about: the shares need not be equal, and none may be where none ends.
    log = list(judgements.read(tmp_path))
    words = [word for row in log if row["finished"] for word in row["finished"].split()]
    assert words.count("ended") == sum(flags)
    assert words.count("cut") == len(flags) - sum(flags)
    assert {row["finished"] for row in log if row["purpose"] == "evaluation"} == {None}
    assert 0 < found.metrics[-1]["completions/eos_rate"] < 1
    told.clear()
    evaluate({"a": language_model(), "b": language_model()}, PROMPTS, teller(told), max_new_tokens=3, seeds=(0,))
    assert {True, False} == {flag for lists in told for ends in lists for flag in ends}


def test_the_log_keeps_a_cut_completion_apart_from_a_finished_one_for_judges_that_are_told(tmp_path: Path) -> None:
    told: Told = []
    with Judgements(tmp_path / "judged.sqlite") as log:
        asking, silent = RecordedJudge(teller(told), log), RecordedJudge(tie, log)
        for judge in (asking, silent):
            for first in ("a", Unfinished("a"), "a"):
                judge.ask(["x"], [first], ["b"], purpose="training", step=0)
        assert told == [([True], [True]), ([False], [True])]
        assert len(log) == 3


class Length:
    """A reward of one for each character."""

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [float(len(text)) for text in completions]


def test_a_reward_model_reads_no_end_behind_a_cut_completion() -> None:
    model = language_model()
    reward = RewardModel.from_model(model, batch_size=4)
    weight = np.random.default_rng(0).normal(size=16).astype(np.float32)
    reward.module.weight[...] = weight
    eos = model.tokenizer.eos_id
    _, written = reward.readings(["w1", "w1"], ["w2 w3", Unfinished("w2 w3")])
    assert written[0] == [*written[1], eos]
    ended, cut = reward.scores(["w1", "w1"], ["w2 w3", Unfinished("w2 w3")])
    assert ended != cut
    assert reward.scores(["w1"], ["w2 w3"], finished=[False]).tolist() == [cut]
    assert rate(reward, ["w1"], [Unfinished("w2 w3")]).tolist() == [cut]
    margin = reward(["w1"], [Unfinished("w2 w3")], ["w2 w3"], finished=([True], [False]))
    np.testing.assert_allclose(margin, 1 / (1 + np.exp(cut - ended)), rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["rl", "online-dpo"])
def test_a_penalty_is_taken_from_the_reward_of_what_was_cut(algorithm: str) -> None:
    settings = TrainConfig(algorithm=algorithm, steps=1, batch_size=16, max_new_tokens=3, max_prompt_tokens=16)
    model = language_model()
    plain = train(model, PROMPTS, Length(), settings, quiet=True).metrics[0]
    found = train(model, PROMPTS, Length(), replace(settings, missing_eos_penalty=1000.0), quiet=True).metrics[0]
    cut = 1 - plain["completions/eos_rate"]
    assert 0 < cut < 1
    if algorithm == "rl":
        np.testing.assert_allclose(plain["objective/scores"] - found["objective/scores"], 1000 * cut, rtol=1e-4)
    else:
        assert found["preference/confidence"] != plain["preference/confidence"]
    assert {"completions/mean_length": plain["completions/mean_length"]}.items() <= found.items()


def test_a_penalty_needs_rewards_and_is_positive() -> None:
    with pytest.raises(ConfigError, match=r"missing_eos_penalty must be a finite number above 0"):
        TrainConfig(missing_eos_penalty=-1.0)
    settings = TrainConfig(missing_eos_penalty=1.0, **SETTINGS)
    with pytest.raises(ConfigError, match=r"must be None where no reward is there to subtract it from, but received 1"):
        train(language_model(), PROMPTS, prefers_w1, settings, quiet=True)
    offline = replace(settings, algorithm="offline-ipo")
    with pytest.raises(ConfigError, match=r"must be None where no reward is there"):
        train(language_model(), [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}], None, offline, quiet=True)
