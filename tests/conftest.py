"""Strictness for every test, no implicit dtype promotion and no silent broadcasting of ranks; and cheap compiling."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from hypothesis import settings
from jax._src import compiler
from matplotlib.figure import Figure

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("fastpref", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fastpref")


def pytest_report_header() -> str:
    """Which JAX a log speaks of."""
    return f"jax {jax.__version__}"


OPTIMISED = {
    *("divergence", "losses", "mixture_sample", "noise", "optimizers", "packed_families", "precision"),
    *("preference_loss", "split_vocabulary", "token_logprobs", "tpu_kernels", "training"),
    *("convergence", "demo", "games", "gold", "reproduce", "smollm2", "theory_inpo", "theory_ipo", "theory_ipo_md"),
}
"""Modules that run the machine code that users get: their claims are about numbers, or they compute for long."""


SLOW = {
    "adapters": r"rows_of_two_models.*\[t5\]",
    "convergence": r"a_round_of_inpo.*|a_reward_is_followed.*",
    "divergence": r"values_are.*\[(V513-.*|V1000-.*float32|V32128-.*)-tpu\]|equal_models.*\[(V5-|V513-|V1000-).*-tpu\]",
    "int8_heads": r"a_split_head.*\[0-.*|draws_are.*\[(V32128-.*|(V17|V513|V1100)-.*-(xla|reference))\]",
    "mixture_sample": r"(tokens_are|temperature_zero).*\[V32128-.*-(tpu|reference)\]"
    r"|log_probs_are.*\[(V50257|V32128)-.*-tpu\]|the_ends_of_beta.*\[1.0-(tpu|reference)\]|ids_past.*\[(1|100|999)-tpu\]"
    r"|draws_have.*\[700-0.6-xla\]"
    r"|a_shared_weight.*\[float32\]",
    "precision": r".*\[(inpo-t5-adapter10|decoder-None)\]",
    "preference_loss": r"values_and.*\[(slic|ipo|dpo-frozen)-V17-.*-xla\]"
    r"|values_and.*\[slic-V32128-.*\]|windows_and.*\[(24|48|128)\]",
    "split_vocabulary": r"draws_are.*\[(whole groups-.*|greedy-tpu)\]",
    "studies": r"a_matrix_of_runs|rounds_of_tournaments",
    "training": r"at_the_reference.*\[t5\]",
}
"""Names of tests, by module, that are `slow` as well. Of a test with cases some of every implementation always run.
Whole tests are slow in `convergence` and `studies` alone, where others of the same path stay."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of `SLOW`."""
    for item in items:
        pattern = SLOW.get(item.path.stem.removeprefix("test_"))
        if pattern is not None and re.fullmatch(f"test_({pattern})", item.name):
            item.add_marker(pytest.mark.slow)


PLAIN = {"xla_cpu_use_fusion_emitters": False}
"""The older of two ways to make code of a fusion, which takes a third of the time."""


@cache
def plain_options() -> list[tuple[str, bool]]:
    """`PLAIN` where this XLA knows it, else nothing."""
    try:
        jax.jit(jnp.negative, compiler_options=PLAIN)(0.0)
    except jax.errors.JaxRuntimeError:
        return []
    return list(PLAIN.items())


@contextmanager
def compiled_plainly() -> Iterator[None]:
    """Compile quickly, without optimisation: small programs take far longer to compile than to run."""
    options = plain_options()

    def plainly(*arguments: Any, backend: Any = None, **settings: Any) -> Any:
        made = optimised(*arguments, backend=backend, **settings)
        if getattr(backend, "platform", "") == "cpu":
            made.env_option_overrides = [*made.env_option_overrides, *options]
        return made

    optimised = compiler.get_compile_options
    with pytest.MonkeyPatch.context() as patch:
        # No public setting reaches functions that are jitted already.
        patch.setattr(compiler, "get_compile_options", plainly)
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile plainly, unless the module is one of `OPTIMISED`; and forget the programs of a module afterwards.

    Each takes several mappings of memory, of which a process has so many.
    """
    optimised = request.module.__name__.removeprefix("test_") in OPTIMISED
    with nullcontext() if optimised else compiled_plainly():
        yield
    jax.clear_caches()


DRAWN = {"demo", "docs", "evaluation", "plots", "plots_compared", "readme", "report", "selection", "sweeps"}
"""Modules that look at pictures. In the others figures are made and not drawn: that takes longer than a small run."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what matplotlib draws into files, where nobody looks at it."""

    def savefig(figure: Figure, target: Any, *, format: str = "png", **_: Any) -> None:
        if format == "svg":
            target.write("<svg></svg>")
        else:
            Path(target).write_bytes(b"\x89PNG\r\n\x1a\n")

    if request.module.__name__.removeprefix("test_") not in DRAWN:
        monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns off the checks of annotations, which refuse wrong words before the function can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def interpreted_tpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Let "tpu" run here, in Pallas's interpreter, with fewer and longer steps: its time is that of compiling them."""
    sampler, logprobs, distances = (
        import_module(f"fastpref.kernels.{name}.tpu") for name in ("mixture_sampling", "token_logprobs", "divergence")
    )
    vmem = import_module("fastpref.kernels.vmem")
    passes = [f"token_logprobs.{name}" for name in ("forward_pass", "backward_pass", "frozen_pass")]
    for name in ("vmem", "tiles", "mixture_sampling.tpu_kernel", "divergence.tpu", *passes):
        monkeypatch.setattr(import_module(f"fastpref.kernels.{name}"), "CHUNK", 256)
    # XLA would move transposes through products, into a form of bfloat16 product that it does not have on CPUs.
    apart = jax.lax.optimization_barrier
    for module in (vmem, import_module("fastpref.kernels.token_logprobs.backward_pass")):
        monkeypatch.setattr(module, "turned", lambda matrix: apart(apart(matrix).T))
    scored = partial(logprobs.token_logprobs, interpret=True)
    composed = import_module("fastpref.kernels.preference_loss.reference").preference_loss
    for name, call in {
        "mixture_sampling": partial(sampler.mixture_sample, interpret=True),
        "token_logprobs": scored,
        "preference_loss": partial(composed, token_logprobs=scored),
        "divergence": partial(distances.divergence, interpret=True),
    }.items():
        table = import_module(f"fastpref.kernels.{name}").IMPLEMENTATIONS
        # Set anew, it is the last choice of those who ask for none.
        monkeypatch.delitem(table, "tpu")
        monkeypatch.setitem(table, "tpu", import_module("fastpref.kernels.dispatch").Implementation(call))
    # What the interpreter makes of a kernel is no code that users get.
    parameters = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    module = request.module.__name__
    # Where models share large logits, optimised products are equal bit for bit and plain ones are not.
    kernel = ("tpu" in parameters and module != "test_divergence") or module == "test_tpu_kernels"
    with compiled_plainly() if kernel else nullcontext():
        yield
