"""Reward models of the hub: the scores that transformers computes, and a clear word about what is not read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from reward_checkpoints import CHATS, KINDS, REPLIES, STOP, write_checkpoint
from safetensors.numpy import load_file, save_file
from small import language_model, prefers_w1

from fastpref.cli import load_judge as of_the_command_line
from fastpref.data import read_prompts
from fastpref.data.rendered import Unfinished
from fastpref.data.tokenizer import Tokenizer
from fastpref.judging.models import RewardModel
from fastpref.judging.protocol import ask
from fastpref.judging.sources import load_judge
from fastpref.learning.train import train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ModelError
from fastpref.models import load, save

GOLDEN = json.loads((Path(__file__).parent / "golden_rewards" / "rewards.json").read_text())["models"]


def reward_model(path: Path) -> RewardModel:
    judge = load_judge(path)
    assert isinstance(judge, RewardModel)
    return judge


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / kind, kind)
    golden = GOLDEN[kind]
    assert xxhash.xxh3_64_hexdigest((path / "model.safetensors").read_bytes()) == golden["weights"]
    judge = reward_model(path)
    # As the policy's own template would write them, had it another: the judge does not read that.
    other = Tokenizer.load(write_checkpoint(tmp_path / "policy", "mistral" if kind != "mistral" else "llama"))
    chats = read_prompts([{"prompt": chat} for chat in CHATS], other)
    plain = [f"{chat[-1]['content']} " for chat in CHATS]
    cut = [Unfinished(reply) for reply in REPLIES]
    pad = KINDS[kind]["pad"] if kind != "value_head" else None
    for name, prompts, completions in (("chat", chats, REPLIES), ("cut chat", chats, cut), ("text", plain, REPLIES)):
        read, rest = judge.readings(prompts, completions)
        expected = [entry["ids"] for entry in golden[name]]
        for ids in expected:
            while ids[-1] == pad:
                ids.pop()
        assert [[*head, *tail] for head, tail in zip(read, rest, strict=True)] == expected
        scores = judge.scores(prompts, completions)
        np.testing.assert_allclose(scores, [entry["score"] for entry in golden[name]], atol=1e-4, rtol=0)
    told = judge.scores(chats, REPLIES, finished=[False] * 3)
    assert told.tolist() == judge.scores(chats, cut).tolist()
    for folder in (tmp_path / "run" / "model", tmp_path / "saved"):
        judge.save(folder)
    # A run directory stands for the judge that it trained.
    assert reward_model(tmp_path / "run").identity == judge.identity
    again = reward_model(tmp_path / "saved")
    assert again.scores(chats, REPLIES).tolist() == judge.scores(chats, REPLIES).tolist()
    assert again.identity == judge.identity


def test_padding_that_is_the_end_is_passed_over_and_the_kinds_differ(tmp_path: Path) -> None:
    judge = reward_model(write_checkpoint(tmp_path / "a", "qwen2"))
    assert judge.pad_id == STOP
    (head,), (tail,) = judge.readings(["w "], ["x"])
    assert tail[-1] != STOP
    other = reward_model(write_checkpoint(tmp_path / "b", "qwen2", pad_token_id=0))
    assert other.readings(["w "], ["x"]) == ([head], [[*tail, STOP]])
    assert other.identity != judge.identity


def test_a_value_head_may_lie_beside_its_body(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "value_head")
    expected = reward_model(path).scores(["a "], ["b"])
    weights = load_file(path / "model.safetensors")
    heads = {name: weights.pop(name) for name in [*weights] if name.startswith("v_head")}
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"which holds no scalar head such as score.weight"):
        load_judge(path)
    (path / "value_head.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"stored as safetensors, but received .*value_head.bin"):
        load_judge(path)
    save_file(heads, path / "value_head.safetensors")
    assert reward_model(path).scores(["a "], ["b"]).tolist() == expected.tolist()
    (path / "value_head.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"value_head.safetensors must be a whole safetensors file"):
        load_judge(path)


def test_what_is_no_reward_model_is_refused_with_a_way_out(tmp_path: Path) -> None:
    two = write_checkpoint(tmp_path / "two", "llama", labels=2)
    with pytest.raises(
        ModelError, match=r"must have one label, but received score.weight of shape \(2, 16\).*function"
    ):
        load_judge(two)
    ranker = tmp_path / "ranker"
    ranker.mkdir()
    for kind in ("deberta-v2", "roberta"):
        (ranker / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["DebertaV2PairRM"]}))
        with pytest.raises(
            ModelError, match=rf"a {kind} \(DebertaV2PairRM\), an encoder as PairRM is.*package.module:f"
        ):
            load_judge(ranker)
    one = write_checkpoint(tmp_path / "one", "llama")
    (one / "model.safetensors").rename(one / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"weights as safetensors, but received .*one without"):
        load_judge(one)
    (one / "pytorch_model.bin").rename(one / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"score.weight, a reward model \(LlamaForSequenceClassification\).*load_judge"
    ):
        load(one)
    weights = load_file(one / "model.safetensors")
    save_file({**weights, "value_head.weight": weights["score.weight"]}, one / "model.safetensors")
    with pytest.raises(ModelError, match=r"one scalar head, but received score.weight, value_head.weight"):
        load_judge(one)
    save_file({**weights, "score.weight": np.ones((1, 8), np.float32)}, one / "model.safetensors")
    with pytest.raises(ModelError, match=r"width of the body, 16, but received 8"):
        load_judge(one)
    save(language_model(), tmp_path / "plain")
    with pytest.raises(
        ModelError, match=r"preference or reward model, but received .*plain, which holds no scalar head"
    ):
        load_judge(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"directory of a judge must hold config.json, but received .*empty"):
        load_judge(tmp_path / "empty")
    adapter = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "some/base"}
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ModelError, match=r"an adapter \(LORA\) of the base 'some/base'.*AutoPeftModelForSequenceClass"):
        load_judge(tmp_path / "empty")
    for name in ("nowhere", "https://host/v1"):
        with pytest.raises(ValueError, match=r"package.module:function, or a table with url and model"):
            of_the_command_line(name)
    assert load_judge("small:prefers_w1") is prefers_w1


def test_one_trains_a_policy_as_judge_and_as_reward(tmp_path: Path) -> None:
    judge = reward_model(write_checkpoint(tmp_path, "llama"))
    settings: dict[str, Any] = {"steps": 1, "batch_size": 2, "max_new_tokens": 4, "max_prompt_tokens": 64}
    found = train(language_model(), ["w1 w2", "w3 w4"], judge, TrainConfig(algorithm="rl", **settings), quiet=True)
    assert np.isfinite(found.metrics[0]["objective/scores"])
    texts = ["w1 w2"], ["w3"], ["w4 w5"]
    np.testing.assert_allclose(ask(judge, *texts) + ask(judge, texts[0], texts[2], texts[1]), 1, rtol=0)
    margin = judge.scores(texts[0], texts[1]) - judge.scores(texts[0], texts[2])
    np.testing.assert_allclose(ask(judge, *texts), 1 / (1 + np.exp(-margin)), rtol=1e-5)
