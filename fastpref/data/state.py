"""The saved state of a batcher: what it belongs to and where the next batch is taken from, in a few hundred bytes.

A sealed JSON object with the format, the identity and the position. A state of other data, settings or format is
refused with the name of what differs.
"""

from collections.abc import Mapping
from typing import Any

from fastpref.data import hashes
from fastpref.method.errors import DataError

FORMAT = 3


def encode(identity: Mapping[str, Any], position: Mapping[str, int]) -> bytes:
    """The bytes of a state.

    Args:
      identity: what `decode` compares, the plainest differences first: values that JSON keeps, with lists for tuples.
      position: whole numbers by name.
    """
    return hashes.sealed({"format": FORMAT, "identity": dict(identity), "position": dict(position)})


def decode(state: bytes, identity: Mapping[str, Any]) -> dict[str, int]:
    """The position that `encode` was given.

    Raises:
      TypeError: `state` is not bytes.
      DataError: the bytes are damaged, or of another identity or format; the message names what differs.
    """
    if not isinstance(state, bytes):
        raise TypeError(f"state must be bytes, but received {type(state).__name__}. Pass what state() returned.")
    try:
        saved = hashes.unsealed(state)
    except ValueError as error:
        raise DataError(
            f"state must be the bytes of state(), but received {len(state)} bytes that are not. Start from an "
            "undamaged copy, or anew."
        ) from error
    differing = [("format", saved.get("format"), FORMAT)]
    differing += [(name, saved.get("identity", {}).get(name), own) for name, own in identity.items()]
    for name, received, own in differing:
        if received != own:
            raise DataError(
                f"state must have the {name} of this batcher, {own}, but received {received}. Restore with what it "
                "was saved with, or start anew."
            )
    position: dict[str, int] = saved["position"]
    return position
