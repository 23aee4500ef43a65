"""What only the TPU kernels can get wrong: memory, copies, tiles, and whether the TPU's compiler takes them."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import Case, interpreted_tpu, make_head, make_hidden, make_targets, normal

from fastpref.kernels import (
    Divergence,
    Head,
    MixtureSample,
    divergence,
    mixture_sample,
    preference_loss,
    token_logprobs,
)
from fastpref.kernels.divergence.tpu import divergence as measurer
from fastpref.kernels.mixture_sampling.tpu import mixture_sample as sampler
from fastpref.kernels.tiles import Tiles
from fastpref.kernels.token_logprobs.tpu import token_logprobs as scorer

KEY = jax.random.key(8)


def strict() -> pltpu.InterpretParams:
    """Memory that was not written is NaN, reads outside of arrays raise, copies that race are found."""
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )


def races_found() -> bool:
    """Whether the last strict run saw a race."""
    module = import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    return bool(module.races.races_found)


def draw(case: Case, function: Any = sampler, **changes: Any) -> MixtureSample:
    rows = case.rows
    keywords = {
        "mixture_beta": jnp.linspace(0, 1, rows), "key": jax.random.key_data(KEY), "row_ids": jnp.arange(rows),
        "step": jnp.int32(1), "temperature": 1.0, "num_valid_tokens": case.vocab,
    }  # fmt: skip
    hidden, head, ref, ref_head = make_hidden(case), make_head(case), make_hidden(case, 1), make_head(case, 1)

    @jax.jit
    def run(hidden: Array, head: Head, ref: Array, ref_head: Head) -> MixtureSample:
        sample: MixtureSample = function(hidden, head, ref, ref_head, **(keywords | changes))
        return sample

    return run(hidden, head, ref, ref_head)


def score(case: Case, function: Any, where: Array | None = None, **changes: Any) -> tuple[Array, Array, Array]:
    """Log-probs, and the gradients of a weighted sum of them."""
    weights, targets = normal((case.rows,), 9), make_targets(case)
    where = jnp.ones(case.rows, bool) if where is None else where

    @jax.jit
    def run(hidden: Array, head: Head) -> tuple[Array, Array, Array]:
        def total(hidden: Array, head: Head) -> tuple[Array, Array]:
            logps = function(hidden, head, targets, where=where, **changes)
            return jnp.sum(logps * weights), logps

        (_, logps), (states, matrix) = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)
        return logps, states, matrix.weight

    return run(make_hidden(case), make_head(case))


def measure(case: Case, function: Any, where: Array | None = None, **changes: Any) -> Divergence:
    """KL and entropy of models whose heads lie differently."""
    other = replace(case, vocab_axis=1 - case.vocab_axis, width=2 * case.width)
    where = jnp.ones(case.rows, bool) if where is None else where

    @jax.jit
    def run(hidden: Array, head: Head, ref_hidden: Array, ref_head: Head) -> Divergence:
        result: Divergence = function(hidden, head, ref_hidden, ref_head, where=where, **changes)
        return result

    return run(make_hidden(case), make_head(case), make_hidden(other, 1), make_head(other, 1))


def reference(kernel: str) -> Any:
    return getattr(
        import_module(f"fastpref.kernels.{kernel}.reference"),
        {"mixture_sampling": "mixture_sample"}.get(kernel, kernel),
    )


def assert_close(ours: tuple[Array, ...], expected: tuple[Array, ...], tolerance: float = 2e-5) -> None:
    for value, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=tolerance, atol=tolerance)


@interpreted_tpu
@pytest.mark.parametrize("case", [Case(1100, rows=5), Case(700, rows=140, vocab_axis=1, width=8)], ids=str)
def test_the_sampler_reads_nothing_that_nobody_wrote(case: Case) -> None:
    ours = draw(case, interpret=strict())
    assert not races_found()
    expected = draw(case, reference("mixture_sampling"))
    np.testing.assert_array_equal(ours.token, expected.token)
    assert_close(ours[1:], expected[1:])


@interpreted_tpu
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("case", "blocks"),
    [(Case(1100, rows=100), 1), (Case(1100, rows=250, vocab_axis=1), 2), (Case(1100, rows=370, width=128), 3)],
    ids=["one block", "two blocks", "three blocks"],
)
def test_log_probs_read_nothing_that_nobody_wrote(case: Case, blocks: int, frozen_head: bool) -> None:
    assert -(-case.rows // 128) == blocks
    where = jnp.arange(case.rows) % 7 != 0
    keywords = {"where": where, "frozen_head": frozen_head}
    ours = score(case, scorer, interpret=strict(), tiles=Tiles(128, 512), **keywords)
    assert not races_found()
    assert_close(ours, score(case, reference("token_logprobs"), **keywords), 1e-4)


@interpreted_tpu
@pytest.mark.parametrize("rows", [100, 250])
def test_divergences_read_nothing_that_nobody_wrote(rows: int) -> None:
    case = Case(1100, rows=rows)
    where = jnp.arange(case.rows) % 7 != 0
    ours = measure(case, measurer, where, interpret=strict(), tiles=Tiles(128, 512))
    assert not races_found()
    assert_close(ours, measure(case, reference("divergence"), where))


@interpreted_tpu
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_a_tile_change_nothing(groups: int) -> None:
    case = Case(2100, rows=20, width=8)
    ours, plain = draw(case, groups=groups, interpret=True), draw(case, reference("mixture_sampling"))
    np.testing.assert_array_equal(ours.token, plain.token)
    assert_close(ours[1:], plain[1:], 1e-5)


@interpreted_tpu
@pytest.mark.parametrize("rows", [128, 129, 300])
def test_rows_go_in_blocks(rows: int) -> None:
    case = Case(600, rows=rows, width=4)
    ours, plain = draw(case, interpret=True), draw(case, reference("mixture_sampling"))
    np.testing.assert_array_equal(ours.token, plain.token)


@interpreted_tpu
def test_rows_that_do_not_fit_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(600, rows=520, width=4)
    module = import_module("fastpref.kernels.mixture_sampling.tpu")
    plain = draw(case, reference("mixture_sampling"))
    monkeypatch.setattr(module, "vmem_limit", lambda: 3 << 20)
    calls: list[int] = []
    call = module._call
    monkeypatch.setattr(module, "_call", lambda *arguments: calls.append(1) or call(*arguments))
    np.testing.assert_array_equal(draw(case, interpret=True).token, plain.token)
    assert len(calls) > 1


@interpreted_tpu
@pytest.mark.parametrize(
    ("tiles", "vocab_axis"),
    [
        (Tiles(128, 1024), 0),
        (Tiles(256, 512), 0),
        (Tiles(384, 512), 0),
        (Tiles(256, 1024, columns=256), 0),
        (Tiles(512, 512, columns=256), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained", "frozen"])
def test_tiles_change_nothing(tiles: Tiles, vocab_axis: int, frozen_head: bool) -> None:
    case = Case(1300, rows=300, width=8, vocab_axis=vocab_axis, soft_cap=4.0, scale=0.7)
    ours = score(case, scorer, interpret=True, tiles=tiles, frozen_head=frozen_head)
    assert_close(ours, score(case, reference("token_logprobs"), frozen_head=frozen_head))


@interpreted_tpu
@pytest.mark.parametrize("tiles", [Tiles(128, 512), Tiles(256, 512), Tiles(384, 512)], ids=str)
def test_tiles_change_no_divergence(tiles: Tiles) -> None:
    case = Case(1300, rows=300, width=8, soft_cap=4.0, scale=0.7)
    where = jnp.arange(case.rows) < 200
    ours = measure(case, measurer, where, interpret=True, tiles=tiles)
    assert_close(ours, measure(case, reference("divergence"), where))


_MASKED = Case(600, rows=150, width=8)


@pytest.fixture(scope="module")
def masked_scores() -> Any:
    @jax.jit
    def run(hidden: Array, where: Array) -> Array:
        return scorer(hidden, make_head(_MASKED), make_targets(_MASKED), where=where, interpret=True)

    return run


@settings(max_examples=25)
@given(st.lists(st.booleans(), min_size=150, max_size=150))
def test_masking_is_dropping(masked_scores: Any, mask: list[bool]) -> None:
    where, hidden = jnp.asarray(mask), make_hidden(_MASKED)
    everything = masked_scores(hidden, jnp.ones(_MASKED.rows, bool))
    masked = masked_scores(jnp.where(where[:, None], hidden, jnp.nan), where)
    np.testing.assert_allclose(masked, jnp.where(where, everything, 0.0), rtol=1e-6)


def test_elsewhere_than_on_a_tpu_the_error_says_so() -> None:
    hidden, head, ids = jnp.ones((2, 4)), Head(jnp.ones((8, 4))), jnp.arange(2)
    why = r" must run on a TPU, but received a program for a cpu\. Pass None for the best here\."
    with pytest.raises(NotImplementedError, match="the implementation 'tpu' of mixture_sample" + why):
        mixture_sample(hidden, head, hidden, head, mixture_beta=0.5, key=KEY, row_ids=ids, step=0, implementation="tpu")
    with pytest.raises(NotImplementedError, match="the implementation 'tpu' of token_logprobs" + why):
        token_logprobs(hidden, head, ids, implementation="tpu")
    with pytest.raises(NotImplementedError, match="the implementation 'tpu' of divergence" + why):
        divergence(hidden, head, hidden, head, implementation="tpu")
    with pytest.raises(NotImplementedError, match="the implementation 'tpu' of preference_loss" + why):
        preference_loss(
            hidden, head, ids, ids, jnp.zeros((1, 2)), jnp.ones(1), loss=lambda ratio, _: ratio, implementation="tpu"
        )


def compile_for_tpu(script: str) -> str:
    """What the script prints, run where JAX finds the TPU's compiler."""
    compiler = Path(sys.prefix) / "libtpu"
    assert compiler.is_dir() or importlib.util.find_spec("libtpu"), (
        "the TPU's compiler is missing: `make test` and `make lab` put libtpu beside the virtual environment's packages"
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(compiler), str(Path(__file__).parent)]),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_compiler_takes_every_kernel() -> None:
    lines = compile_for_tpu("import tpu_compile; tpu_compile.every_kernel()").splitlines()
    assert len(lines) >= 17
    assert all(line.startswith("compiled ") for line in lines)


def test_public_functions_choose_by_the_platform_of_the_program() -> None:
    lines = compile_for_tpu("import tpu_compile; tpu_compile.public()").splitlines()
    assert len(lines) == 3


def test_the_compiler_takes_split_heads() -> None:
    lines = compile_for_tpu("import tpu_compile; tpu_compile.split_heads()").splitlines()
    assert [line.split()[1] for line in lines] == ["mixture_sample", "token_logprobs", "divergence"]


def test_vmem_is_what_the_formulas_say() -> None:
    lines = compile_for_tpu("import tpu_compile; tpu_compile.vmem()").splitlines()
    assert len(lines) >= 8
    for line in lines:
        name, formula, used = line.split()
        assert 0.9 < int(formula) / int(used) < 1.15, name
