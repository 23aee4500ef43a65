"""How the TPU sampler cuts its work into tiles of tokens and blocks of rows."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ..head import Head
from ..streams import stream_bytes
from ..vmem import LANES, SUBLANES, tile_bytes
from .sample import GROUP_SIZE, groups_of

ROW_MULTIPLE = 16
"""Rows of a bfloat16 register."""
_MAX_GROUPS = 4
"""Groups of a tile: more make long programs and stream no better."""
_STEP = 0.05
"""What a grid step costs besides, in groups."""
_TILE_BYTES = 4 << 20
"""Weights of one head that a grid step streams, about: 5 µs on a v5e, far above what a step costs to start."""


@dataclass(frozen=True)
class Layout:
    """How the work is cut: all that is known before the kernel runs."""

    policy_head: Head
    ref_head: Head
    dtype: Any
    """Of the hidden states."""
    shared: bool
    """Both heads are one: its tiles are read once."""
    temperature: float
    split: bool
    """The vocabulary is split over devices: the first and the last group are edges."""
    shifted: bool
    """Slices do not begin with a group, so groups straddle tiles of one group each."""
    groups: int
    """Groups of a tile."""
    whole_groups: int | None
    """Groups before the first that is masked; None where that depends on the device."""
    block: int
    """Rows of hidden states that one grid step takes."""
    blocks: int
    """Steps that share a tile of the weights."""

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.groups * GROUP_SIZE

    @property
    def tiles(self) -> int:
        """Tiles of the weights."""
        return -(-self.policy_head.slice_size // self.tile)

    @property
    def whole_tiles(self) -> int | None:
        """Tiles before the first that is masked; None where that depends on the device."""
        return None if self.whole_groups is None else self.whole_groups // self.groups

    def masks(self, group: int) -> bool:
        """Whether this group of a masked tile is masked: those before the first that is need not be."""
        if self.whole_groups is None or self.whole_tiles != self.steps - 1:
            return True
        return group >= self.whole_groups % self.groups

    @property
    def steps(self) -> int:
        """Grid steps over the vocabulary. Shifted groups end a tile later."""
        return self.tiles + self.shifted

    @property
    def lanes(self) -> list[slice]:
        """Cuts of a block into units."""
        return [slice(start, min(start + LANES, self.block)) for start in range(0, self.block, LANES)]

    @property
    def heads(self) -> list[Head]:
        """The heads that are streamed."""
        return [self.policy_head] if self.shared else [self.policy_head, self.ref_head]

    @property
    def vmem_bytes(self) -> int:
        """VMEM of the kernel's blocks and scratch."""
        width = min(self.block, LANES)
        weights = sum(stream_bytes(head, self.tile, width) for head in self.heads)
        hidden = sum(
            self.blocks
            * tile_bytes(*((head.width, self.block) if head.vocab_axis == 0 else (self.block, head.width)), self.dtype)
            for head in (self.policy_head, self.ref_head)
        )
        units = self.groups * len(self.lanes)
        logits = units * (2 * (1 + self.shifted) + 1) * tile_bytes(GROUP_SIZE, width, jnp.float32)
        by_row = GROUP_SIZE + 4 * SUBLANES + 4 * SUBLANES
        state = self.blocks * tile_bytes(by_row, self.block, jnp.float32)
        return weights + hidden + logits + state


def _groups(vocab: int, width: int) -> int:
    """Groups of a tile: as many as its bytes allow, unless fewer leave less of the last tile empty."""
    most = min(max(_TILE_BYTES // (width * GROUP_SIZE), 1), _MAX_GROUPS)
    return min(range(1, most + 1), key=lambda groups: -(-groups_of(vocab) // groups) * (groups + _STEP))


def layout_of(
    rows: int,
    policy_head: Head,
    ref_head: Head,
    dtype: Any,
    temperature: float,
    num_valid_tokens: int,
    groups: int | None,
) -> Layout:
    """Blocks as wide as rows go, and tiles of as many groups as their width allows."""
    block = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
    if block > LANES:
        block = LANES if -(-rows // LANES) % 2 else 2 * LANES
    split = policy_head.mesh_axis is not None
    shifted = split and policy_head.slice_size % GROUP_SIZE != 0
    width = max(policy_head.width, ref_head.width) * policy_head.weight.dtype.itemsize
    groups = 1 if shifted else groups or _groups(policy_head.slice_size, width)
    return Layout(
        policy_head=policy_head,
        ref_head=ref_head,
        dtype=dtype,
        shared=policy_head.same_map(ref_head),
        temperature=temperature,
        split=split,
        shifted=shifted,
        whole_groups=None if split else num_valid_tokens // GROUP_SIZE,
        groups=groups,
        block=block,
        blocks=-(-rows // block),
    )
