"""Layout of the pairs of a run in rows: by the family of the model, the longest prompt and the settings."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from fastpref.data.packing import MAX_PAIRS, Layout, pair_sizes
from fastpref.data.ragged import Ragged
from fastpref.data.row_shapes import batch_shapes, row_counts
from fastpref.data.tokenization import TokenRecords
from fastpref.method.config import TrainConfig
from fastpref.method.errors import ConfigError

ROOM = 2
"""Longest pairs that a row holds, or at most holds, where nothing else is asked for: most are shorter and fill it."""
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


def plan_rows(config: TrainConfig, *, decoder_start: int | None, prompts: Ragged) -> RowPlan:
    """The rows of an online run, in which every pair fits that its settings allow.

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
    return _plan(config, decoder_start, (longest, longest_prompt), ROOM)


def plan_recorded(config: TrainConfig, *, decoder_start: int | None, pairs: TokenRecords) -> RowPlan:
    """The rows of an offline run, in which every recorded pair fits: those with the fewest places in the first epoch.

    Args:
      config: `batch_size`, and `row_tokens` and `prompt_row_tokens` where they are set.
      decoder_start: of an encoder-decoder; None for a decoder-only model.
      pairs: all that the run reads.

    Raises:
      ConfigError: a row is too short for the longest pair.
    """
    layout = _layout(decoder_start)
    sizes = pair_sizes(pairs.prompts, *pairs.completions, layout=layout)
    longest = (int(sizes[:, 0].max()), int(sizes[:, 1].max()))
    plans = [_plan(config, decoder_start, longest, room) for room in range(1, ROOM + 1)]
    return min(plans, key=lambda plan: _places(config, plan, sizes))


def _places(config: TrainConfig, plan: RowPlan, sizes: Int32[np.ndarray, "N 2"]) -> int:
    """Decoder places of the first epoch."""
    _, places = batch_shapes(
        sizes,
        batch_size=config.batch_size,
        row_tokens=plan.row_tokens,
        prompt_row_tokens=plan.prompt_row_tokens or 0,
        max_pairs_per_row=min(MAX_PAIRS, config.batch_size),
        max_shapes=config.max_shapes,
        multiple=config.gradient_accumulation,
        seed=config.seed,
    )
    return places


def _layout(decoder_start: int | None) -> Layout:
    return "shared" if decoder_start is None else "encoder-decoder"


def _plan(config: TrainConfig, decoder_start: int | None, longest: tuple[int, int], room: int) -> RowPlan:
    """Rows for so many of the longest pair, or of the length that is set."""
    row_tokens = _row("row_tokens", config.row_tokens, longest[0], room)
    prompt_row_tokens = None
    if decoder_start is not None:
        prompt_row_tokens = _row("prompt_row_tokens", config.prompt_row_tokens, longest[1], room)
    elif config.prompt_row_tokens is not None:
        raise ConfigError(
            f"prompt_row_tokens is for encoder-decoder models, but received {config.prompt_row_tokens} for another. "
            "Leave it out; row_tokens counts the prompts of a decoder-only model."
        )
    return RowPlan(
        layout=_layout(decoder_start),
        row_tokens=row_tokens,
        prompt_row_tokens=prompt_row_tokens,
        decoder_start=decoder_start,
        counts=row_counts(config.batch_size, multiple=config.gradient_accumulation),
    )


def _row(name: str, wanted: int | None, longest: int, room: int) -> int:
    if wanted is None:
        return -(-room * longest // MULTIPLE) * MULTIPLE
    if wanted < longest:
        raise ConfigError(
            f"{name} must hold the longest pair whole, {longest} places, but received {wanted}. "
            f"Raise {name}, lower max_new_tokens or max_prompt_tokens, or leave {name} out."
        )
    return wanted
