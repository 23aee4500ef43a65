"""The number of pairs of a step and the number of its pass over the data: what the settings say, on every family."""

import random
from typing import Any

import numpy as np
import pytest
from small import PROMPTS, language_model, prefers_w1

from fastpref.learning.train import train
from fastpref.method.config import TrainConfig

SETTINGS: dict[str, Any] = {
    "tau": 0.1,
    "steps": 7,
    "batch_size": 8,
    "learning_rate": 0.0,
    "max_prompt_tokens": 40,
    "max_new_tokens": 40,
    "on_bad_record": "skip",
}


def recorded(count: int = 28) -> list[dict[str, Any]]:
    """Pairs of 1 to 39 words, most of them short."""
    draw = random.Random(2)

    def words() -> str:
        return " ".join(f"w{draw.randrange(28)}" for _ in range(min(38, max(1, int(draw.lognormvariate(1.6, 0.9))))))

    return [{"prompt": words(), "chosen": words(), "rejected": words() + " w3"} for _ in range(count)]


@pytest.mark.parametrize("family", ["decoder", "t5"])
def test_an_offline_step_has_batch_size_pairs_whatever_their_length(family: str) -> None:
    config = TrainConfig(algorithm="offline-dpo", **SETTINGS)
    metrics = train(language_model(family), recorded(), None, config, quiet=True).metrics
    assert [step["pairs/used"] for step in metrics] == [8] * 7
    # 28 records in batches of 8: the fourth is filled up from the second pass, where the fifth begins.
    assert [step["epoch"] for step in metrics] == [0, 0, 0, 0, 1, 1, 1]


def test_parts_of_a_batch_weigh_its_pairs_alike() -> None:
    runs = [
        train(
            language_model(), recorded(), None,
            TrainConfig(algorithm="offline-dpo", **SETTINGS | {"gradient_accumulation": parts, "steps": 3}), quiet=True,
        ).metrics
        for parts in (1, 4)
    ]  # fmt: skip
    for whole, parts in zip(*runs, strict=True):
        for name in ("loss", "grad_norm", "pairs/used", "completions/mean_length"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-4), name


def test_the_loss_of_a_pass_is_the_mean_over_its_pairs() -> None:
    """With no learning, batches that divide the records average to what one batch of all of them gives."""
    data, ref = recorded(24), language_model(seed=1)
    means = []
    for size in (24, 8, 4):
        settings = SETTINGS | {"batch_size": size, "steps": 24 // size}
        config = TrainConfig(algorithm="offline-dpo", **settings)
        metrics = train(language_model(), data, None, config, ref=ref, quiet=True).metrics
        means.append(np.mean([step["loss"] for step in metrics]))
    assert means[1:] == pytest.approx([means[0]] * 2, rel=1e-4)


def test_an_epoch_is_that_of_the_prompts_of_the_step() -> None:
    config = TrainConfig(
        algorithm="online-dpo", steps=6, batch_size=4, max_prompt_tokens=8, max_new_tokens=2, learning_rate=0.0
    )
    metrics = train(language_model(), PROMPTS[:8], prefers_w1, config, quiet=True).metrics
    assert [step["epoch"] for step in metrics] == [0, 0, 1, 1, 2, 2]


def test_rows_follow_from_the_pairs_that_are_there() -> None:
    from fastpref.data import Ragged, TokenRecords
    from fastpref.learning.row_plan import plan_recorded
    from fastpref.method.errors import ConfigError

    def pairs(lengths: list[int]) -> TokenRecords:
        rows = Ragged.from_rows([[1] * length for length in lengths])
        numbers = np.arange(len(lengths))
        return TokenRecords(rows, (rows, rows), numbers.astype(np.float32), numbers)

    # A pair of n, n and n tokens takes 3n - 1 places: here 71, which leaves half of a row of 144 places empty.
    config = TrainConfig(algorithm="offline-dpo", batch_size=1)
    assert plan_recorded(config, decoder_start=None, pairs=pairs([24] * 6)).row_tokens == 72
    # Three of 47 places fit into 144; alone they would leave a third of 72 empty.
    config = TrainConfig(algorithm="offline-dpo", batch_size=6)
    assert plan_recorded(config, decoder_start=None, pairs=pairs([16] * 11 + [24])).row_tokens == 144
    encoder = plan_recorded(config, decoder_start=0, pairs=pairs([24] * 6))
    assert (encoder.row_tokens, encoder.prompt_row_tokens) == (48, 24)
    with pytest.raises(ConfigError, match=r"row_tokens must hold the longest pair whole, 71 places, but received 70"):
        plan_recorded(TrainConfig(algorithm="offline-dpo", row_tokens=70), decoder_start=None, pairs=pairs([24]))
