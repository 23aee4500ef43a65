"""Layout of the pairs of a run in rows: by the family of the model, the longest prompt and the settings."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from fastpref.data.packing import Layout, row_counts
from fastpref.data.ragged import Ragged
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError

ROOM = 2
"""Longest pairs that a row holds where nothing else is asked for: most are shorter, and so fill it well."""
MULTIPLE = 8
"""Of the places of such a row."""


@dataclass(frozen=True)
class RowPlan:
    """The rows of every step of a run.

    Args:
      layout: where the tokens of a pair lie; see `PackedPairs`.
      row_tokens: L.
      prompt_row_tokens: S; None for a decoder-only model.
      decoder_start: first input of an encoder-decoder's decoder; None for a decoder-only model.
      counts: the numbers of rows that a step may have, each compiled once.
    """

    layout: Layout
    row_tokens: int
    prompt_row_tokens: int | None
    decoder_start: int | None
    counts: tuple[int, ...]

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments that `pack_pairs` and `PairBatcher` share."""
        return {
            "layout": self.layout,
            "row_tokens": self.row_tokens,
            "prompt_row_tokens": self.prompt_row_tokens,
            "decoder_start": self.decoder_start,
        }

    def rows_for(self, sizes: Int[np.ndarray, "N 2"], pairs: int) -> int:
        """Rows that hold so many pairs on average, of the given decoder and encoder places."""
        mean, room = sizes.mean(0), (self.row_tokens, self.prompt_row_tokens or 1)
        wanted = float(np.max(mean / room) * pairs)
        return next((count for count in self.counts if count >= wanted), self.counts[-1])


def plan_rows(config: TrainConfig, *, decoder_start: int | None, prompts: Ragged) -> RowPlan:
    """The rows of a run, in which every pair fits that its settings allow.

    Args:
      config: `row_tokens` and `prompt_row_tokens` where they are set, and the longest completion.
      decoder_start: of an encoder-decoder; None for a decoder-only model.
      prompts: all that the run may read.

    Raises:
      ConfigError: a row is too short for the longest pair.
    """
    longest_prompt = int(np.diff(prompts.offsets).max(initial=1))
    completions = 1 if config.method.pairs == "first" else 2
    longest = completions * config.max_new_tokens + (longest_prompt - 1 if decoder_start is None else 0)
    row_tokens = _places("row_tokens", config.row_tokens, longest)
    prompt_row_tokens = None
    if decoder_start is not None:
        prompt_row_tokens = _places("prompt_row_tokens", config.prompt_row_tokens, longest_prompt)
    elif config.prompt_row_tokens is not None:
        raise ConfigError(
            f"prompt_row_tokens is for encoder-decoder models, but received {config.prompt_row_tokens} for another. "
            "Leave it out; row_tokens counts the prompts of a decoder-only model."
        )
    return RowPlan(
        layout="shared" if decoder_start is None else "encoder-decoder",
        row_tokens=row_tokens,
        prompt_row_tokens=prompt_row_tokens,
        decoder_start=decoder_start,
        counts=row_counts(config.batch_size, multiple=config.gradient_accumulation),
    )


def _places(name: str, wanted: int | None, longest: int) -> int:
    if wanted is None:
        return -(-ROOM * longest // MULTIPLE) * MULTIPLE
    if wanted < longest:
        raise ConfigError(
            f"{name} must hold the longest pair whole, {longest} places, but received {wanted}. "
            f"Raise {name}, lower max_new_tokens or max_prompt_tokens, or leave {name} out."
        )
    return wanted
