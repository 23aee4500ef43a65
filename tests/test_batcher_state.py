"""The saved state of a batcher: what was saved comes back, and anything else is refused by its name."""

from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data import hashes, state
from fastpref.method.errors import DataError

MASK = 2**64 - 1
IDENTITY: dict[str, Any] = {"data fingerprint": "ab" * 16, "seed": MASK, "set of shapes": [[64, 32], [128, 2**31 - 1]]}


def test_the_layout_of_a_state_is_pinned() -> None:
    """A change of these bytes is a change of format: it needs a new number."""
    text = b'{"format":3,"identity":{"seed":1},"position":{"batches":5}}'
    assert state.encode({"seed": 1}, {"batches": 5}) == xxhash.xxh3_128_hexdigest(text).encode() + b"\n" + text


@given(batches=st.integers(0, 2**62), seed=st.integers(0, MASK))
def test_a_state_comes_back(batches: int, seed: int) -> None:
    identity = IDENTITY | {"seed": seed}
    assert state.decode(state.encode(identity, {"batches": batches}), identity) == {"batches": batches}


def test_every_damaged_byte_and_length_is_refused() -> None:
    saved = state.encode(IDENTITY, {"batches": 12345})
    for at in range(len(saved)):
        flips = (saved[:at] + bytes([saved[at] ^ flip]) + saved[at + 1 :] for flip in (1, 0x80, 0xFF))
        for damaged in (*flips, saved[:at]):
            with pytest.raises(DataError, match=r"state must be the bytes of state\(\), but received \d+ bytes"):
                state.decode(damaged, IDENTITY)
    with pytest.raises(DataError, match="undamaged copy"):
        state.decode(saved + b"\0", IDENTITY)


@pytest.mark.parametrize("name", IDENTITY)
def test_the_state_of_another_identity_is_refused_by_its_name(name: str) -> None:
    saved = state.encode(IDENTITY, {"batches": 1})
    with pytest.raises(DataError, match=f"state must have the {name} of this batcher, other, but received"):
        state.decode(saved, IDENTITY | {name: "other"})


def test_another_format_is_refused() -> None:
    content = hashes.unsealed(state.encode(IDENTITY, {"batches": 1}))
    with pytest.raises(DataError, match="state must have the format of this batcher, 3, but received 1"):
        state.decode(hashes.sealed(content | {"format": 1}), IDENTITY)
    with pytest.raises(DataError, match="state must have the format of this batcher, 3, but received None"):
        state.decode(hashes.sealed({"step": 1}), IDENTITY)


def test_a_state_is_bytes(unchecked: None) -> None:
    with pytest.raises(TypeError, match="state must be bytes, but received str"):
        state.decode("x", IDENTITY)  # type: ignore[arg-type]
