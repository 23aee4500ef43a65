"""One short online run with held-out evaluation, made once and read by several tests."""

import functools
import tempfile
from pathlib import Path

import optax
from small import PROMPTS, language_model, prefers_w1

from fastpref.config import TrainConfig
from fastpref.models import LanguageModel
from fastpref.training import TrainResult, train

CONFIG = TrainConfig(
    algorithm="online-ipo",
    tau=0.1,
    steps=3,
    batch_size=4,
    max_prompt_tokens=8,
    max_shapes=1,
    max_new_tokens=6,
    checkpoint_every=1,
    keep_checkpoints=9,
    eval_every=2,
)
OPTIMIZER = optax.sgd(0.002)
"""One object, so that all runs with it share their compiled update."""
HELD_OUT = PROMPTS[:11]


@functools.cache
def short_run() -> tuple[Path, TrainResult, dict[int, LanguageModel]]:
    """The run directory, the result, and the policy after each step."""
    folder = Path(tempfile.mkdtemp(prefix="fastpref-")) / "run"
    policies: dict[int, LanguageModel] = {}
    result = train(
        language_model(),
        PROMPTS,
        prefers_w1,
        CONFIG,
        run_dir=folder,
        optimizer=OPTIMIZER,
        eval_prompts=HELD_OUT,
        callbacks=[lambda step: policies.update({step.step: step.policy()})],
        quiet=True,
    )
    return folder, result, policies
