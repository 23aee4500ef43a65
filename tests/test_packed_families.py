"""A golden of every family in packed rows: the states of padded pairs, windows included."""

import functools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from goldens import GOLDEN, REPRESENTATIVES, raw_of, window_of
from test_models import compiled, forced_states
from test_packed_models import COMPLETIONS, PROMPTS, P, T, by_completion, packed_pairs, padded_arguments

from fastpref.data.batches import PackedPairs
from fastpref.models import Decoder, load
from fastpref.models.families import FAMILIES

KINDS = {name: raw_of(name)["model_type"] for name in REPRESENTATIVES}
LAYOUTS = {name: "encoder-decoder" if kind in ("t5", "mt5") else "shared" for name, kind in KINDS.items()}
CASES = [*LAYOUTS.items(), *((name, "separate") for name in REPRESENTATIVES if window_of(name) is not None)]


@functools.cache
def model(name: str) -> Any:
    return load(GOLDEN / name).module


@functools.cache
def padded_states(name: str) -> np.ndarray:
    return np.asarray(forced_states(model(name), *padded_arguments()))


@compiled
def rows_of(graph: Any, state: Any, packed: PackedPairs) -> jax.Array:
    states: jax.Array = nnx.merge(graph, state).packed_hidden_states(packed)
    return states


def test_every_family_is_here_and_with_windows_where_it_has_them() -> None:
    assert {*KINDS.values()} == {*FAMILIES, "t5", "mt5"}
    local = {name for name in REPRESENTATIVES if window_of(name) is not None}
    assert {KINDS[name] for name in local} == {kind for kind, family in FAMILIES.items() if family.windows}
    assert all((window_of(name) or 0) < PROMPTS.max() for name in local)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_packed_rows_have_the_states_of_padded_pairs(name: str, layout: str) -> None:
    packed, expected = packed_pairs(layout), padded_states(name)
    found = by_completion(rows_of(*nnx.split(model(name)), packed), packed)
    assert len(found) == 2 * P
    for (pair, k), states in found.items():
        np.testing.assert_allclose(states, expected[pair, k, : COMPLETIONS[pair, k]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVES if window_of(name) is not None])
def test_without_its_windows_a_model_has_other_states_from_their_length_on(name: str) -> None:
    """So that the test above sees them."""
    config = replace(model(name).config, window=None, local=())
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    states = forced_states(nnx.merge(graph, nnx.state(model(name))), *padded_arguments())
    differ = np.abs(np.asarray(states) - padded_states(name)).max(-1) > 1e-3
    assert differ[PROMPTS.argmax()].all()
    # Local layers may have frequencies of their own.
    if config.local_rope_theta is None:
        positions = PROMPTS[:, None, None] - 1 + np.arange(T)
        assert not differ[np.broadcast_to(positions < window_of(name), differ.shape)].any()
