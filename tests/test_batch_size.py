"""The number of pairs of a step and the number of its pass over the data: what the settings say, on every family."""

import random
from typing import Any

import numpy as np
import pytest
from small import PROMPTS, language_model, prefers_w1

from fastpref.data import Ragged, TokenRecords
from fastpref.learning.row_plan import plan_recorded
from fastpref.learning.train import train
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError

SETTINGS: dict[str, Any] = {
    "algorithm": "offline-dpo",
    "tau": 0.1,
    "batch_size": 8,
    "learning_rate": 0.0,
    "max_prompt_tokens": 40,
    "max_new_tokens": 40,
    "max_shapes": 1,
}


def recorded() -> list[dict[str, Any]]:
    """24 pairs of 1 to 39 words, most of them short."""
    draw = random.Random(2)

    def words() -> str:
        return " ".join(f"w{draw.randrange(28)}" for _ in range(min(38, max(1, int(draw.lognormvariate(1.6, 0.9))))))

    return [{"prompt": words(), "chosen": words(), "rejected": words() + " w3"} for _ in range(24)]


def run(family: str = "decoder", **settings: Any) -> list[dict[str, float]]:
    """Metrics of a run that learns nothing, against another model than the policy."""
    config = TrainConfig(**SETTINGS | settings)
    ref = language_model(family, seed=1)
    return train(language_model(family), recorded(), None, config, ref=ref, quiet=True).metrics


@pytest.mark.parametrize("family", ["decoder", "t5"])
def test_an_offline_step_has_batch_size_pairs_whatever_their_length(family: str) -> None:
    metrics = run(family, steps=4)
    assert [step["pairs/used"] for step in metrics] == [8] * 4
    assert [step["epoch"] for step in metrics] == [0, 0, 0, 1]


def test_the_loss_of_a_pass_is_the_mean_over_its_pairs_in_whatever_batches_and_parts() -> None:
    (whole,) = run(steps=1, batch_size=24)
    for settings in ({"steps": 3}, {"steps": 3, "gradient_accumulation": 4}):
        metrics = run(**settings)
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert np.mean([step[name] for step in metrics]) == pytest.approx(whole[name], rel=1e-4), name


def test_an_epoch_is_that_of_the_prompts_of_the_step() -> None:
    config = TrainConfig(
        algorithm="online-dpo", steps=6, batch_size=4, max_prompt_tokens=8, max_new_tokens=6, max_shapes=1,
        learning_rate=0.0,
    )  # fmt: skip
    metrics = train(language_model(), PROMPTS[:8], prefers_w1, config, quiet=True).metrics
    assert [step["epoch"] for step in metrics] == [0, 0, 1, 1, 2, 2]


def test_rows_follow_from_the_pairs_that_are_there() -> None:
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
