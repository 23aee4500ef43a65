"""Strictness for every test: no implicit dtype promotion, no silent broadcasting of ranks."""

import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("fastpref", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fastpref")


def pytest_report_header() -> str:
    """Which JAX a log speaks of."""
    return f"jax {jax.__version__}"


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module() -> Iterator[None]:
    """Forget compiled programs afterwards: each takes several mappings of memory, of which a process has so many."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns off the checks of annotations, which refuse wrong words before the function can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def interpreted_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
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
