"""Rotary positions in `config.json`: the older entries and the newer single one, of all layers or of each kind."""

import math
from collections.abc import Mapping
from typing import Any

from fastpref.method.errors import ModelError
from fastpref.models.entries import FLAG, OPTIONAL_SIZE, POSITIVE, SMALL, Entry, check_entries, entry, unsupported
from fastpref.models.rope import RopeScaling

ROPE_ENTRIES = {
    "rope_theta": POSITIVE,
    "factor": Entry(float, 0, 1e6, optional=True),
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": OPTIONAL_SIZE,
    "attention_factor": POSITIVE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "mscale": POSITIVE,
    "mscale_all_dim": POSITIVE,
    "truncate": FLAG,
    "partial_rotary_factor": SMALL,
}
"""Entries of `rope_parameters` (or `rope_scaling`), with their rules; lists of factors have checks of their own."""


def read_rope(described: Mapping[str, Any], kinds: tuple[str, ...], head_dim: int, *, by_layer: bool) -> dict[str, Any]:
    """The options of a `DecoderConfig` that say how it rotates.

    Args:
      described: the file's entries, and those that were left out.
      kinds: of rotary positions that the family has.
      head_dim: H.
      by_layer: whether local layers have frequencies of their own (Gemma 3).
    """
    rope = rope_object(described.get("rope_scaling") or ({} if by_layer else described.get("rope_parameters") or {}))
    local_theta = None
    if by_layer:
        layers = rope_object(described.get("rope_parameters") or {})
        if layers and not layers.keys() <= {"full_attention", "sliding_attention"}:
            raise unsupported(
                described["model_type"], "rope_parameters", layers, ({"full_attention": {}, "sliding_attention": {}},)
            )
        rope = rope_object(layers.get("full_attention") or {}) | rope
        local = rope_object(layers.get("sliding_attention") or {})
        if (kind := local.get("rope_type", "default")) != "default":
            raise unsupported(described["model_type"], "rope_type of sliding_attention", kind, ("default",))
        local_theta = float(local.get("rope_theta") or described["rope_local_base_freq"])
    elif nested := rope.keys() & {"full_attention", "sliding_attention"}:
        raise unsupported(described["model_type"], f"rope_parameters.{min(nested)}", rope[min(nested)], ())
    theta = float(rope.get("rope_theta") or described.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if "linear" not in kinds and kind in ("su", "yarn"):
        kind = "longrope"  # older files of Phi-3
    share = rope.get("partial_rotary_factor") or described.get("partial_rotary_factor", 1)
    if share != 1 and "linear" in kinds:
        raise unsupported(described["model_type"], "partial_rotary_factor", share, (1,))
    if kind not in kinds:
        raise unsupported(described["model_type"], "rope_type", kind, kinds)
    size = int(head_dim * share)
    if size % 2 or not size:
        raise ModelError(
            f"partial_rotary_factor of config.json must leave an even part of head_dim, {head_dim}, but received "
            f"{share}. Copy the file again."
        )
    scaling, limit = read_scaling(kind, rope, described, size // 2)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local_theta,
        "rotary_dim": None if size == head_dim else size,
        "max_positions": limit,
    }


def rope_object(value: object) -> dict[str, Any]:
    """An object of rotary positions, checked; nulls are left out."""
    if not isinstance(value, Mapping):
        raise ModelError(f"rope_scaling of config.json must be an object, but received {value!r}. Copy the file again.")
    check_entries(value, ROPE_ENTRIES)
    return {name: content for name, content in value.items() if content is not None}


def read_scaling(
    kind: str, rope: Mapping[str, Any], described: Mapping[str, Any], frequencies: int
) -> tuple[RopeScaling | None, int | None]:
    """The scaling of so many frequencies, and the length up to which it holds, if there is one."""
    if kind == "default":
        return None, None
    most = described.get("max_position_embeddings", 2048)
    # What stands outside of the rotary entries comes first, as in the families that have it there.
    first = described.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", most))
    if kind == "linear":
        return RopeScaling("linear", float(entry(rope, "factor"))), None
    if kind == "dynamic":
        return RopeScaling("dynamic", float(entry(rope, "factor"))), most
    if kind == "llama3":
        factor, low, high = (float(entry(rope, name)) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeScaling("llama3", factor, low, high, first), None
    factor = float(rope.get("factor") or most / first)
    if kind == "yarn":
        scaling = RopeScaling(
            "yarn",
            factor,
            original_max_positions=first,
            attention_factor=float(rope.get("attention_factor") or yarn_attention(rope, factor)),
            beta_fast=float(rope.get("beta_fast", 32)),
            beta_slow=float(rope.get("beta_slow", 1)),
            truncate=rope.get("truncate", True),
        )
        return scaling, None
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(first))
    short = rope.get("short_factor")
    if (
        not isinstance(short, list)
        or len(short) != frequencies
        or not all(isinstance(x, int | float) and 0 < x < math.inf for x in short)
    ):
        raise ModelError(
            f"short_factor of config.json must list {frequencies} numbers above 0, but received {short!r}. "
            "Copy the file again."
        )
    scaling = RopeScaling(
        "longrope",
        factor,
        original_max_positions=first,
        attention_factor=float(rope.get("attention_factor") or attention),
        short_factors=tuple(map(float, short)),
    )
    return scaling, first


def yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor of cosines and sines, from the factor of the context."""

    def scaled(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scaled(float(rope["mscale"])) / scaled(float(rope["mscale_all_dim"]))
    return scaled(1.0)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The entries of `config.json` for a base and a scaling; `read_rope` reads them back.

    Raises:
      ModelError: the scaling needs factors of long contexts, which only a checkpoint has.
    """
    rope: dict[str, Any] = {}
    if scaling is not None:
        if scaling.kind == "longrope":
            raise ModelError(
                "rope_scaling of a model that was made here must be another than longrope, but received longrope. "
                "Load the checkpoint that it comes from, and save that."
            )
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("llama3", "yarn"):
            rope["original_max_position_embeddings"] = scaling.original_max_positions
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            names = ("attention_factor", "beta_fast", "beta_slow", "truncate")
            rope |= {name: getattr(scaling, name) for name in names}
    return {"rope_theta": theta, "rope_scaling": rope or None}
