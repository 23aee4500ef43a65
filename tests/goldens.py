"""The golden checkpoints of `golden/`: their names and configurations, and those that stand for their family."""

import json
from pathlib import Path
from typing import Any

from fastpref.models import DecoderConfig, T5Config
from fastpref.models.configs import is_tied, read_config, text_config

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def raw_of(name: str) -> dict[str, Any]:
    """Its `config.json`, of the language model alone."""
    return text_config(json.loads((GOLDEN / name / "config.json").read_text()))


def config_of(name: str) -> DecoderConfig | T5Config:
    raw = raw_of(name)
    return read_config(raw, tied=is_tied(raw))


def window_of(name: str) -> int | None:
    """Positions that a query of its local layers attends to."""
    config = config_of(name)
    return config.window if isinstance(config, DecoderConfig) else None


def _representatives() -> list[str]:
    first: dict[tuple[str, bool], str] = {}
    for name in NAMES:
        first.setdefault((raw_of(name)["model_type"], window_of(name) is not None), name)
    return sorted(first.values())


REPRESENTATIVES = _representatives()
"""The first golden of every family, and the first with windows where it has them."""
