"""Strictness for every test: no implicit dtype promotion, no silent broadcasting of ranks."""

import os
from functools import partial
from importlib import import_module

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("fastpref", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fastpref")


@pytest.fixture
def interpreted_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "tpu" run here, in Pallas's interpreter, with fewer and longer steps: its time is that of compiling them."""
    sampler, logprobs = (
        import_module(f"fastpref.kernels.{name}.tpu") for name in ("mixture_sampling", "token_logprobs")
    )
    passes, vmem = (import_module(f"fastpref.kernels.{name}") for name in ("token_logprobs.passes", "vmem"))
    for module in (sampler, passes, vmem):
        monkeypatch.setattr(module, "CHUNK", 256)
    # XLA would turn the product's operands instead, into a form that it has no bfloat16 product for on CPUs.
    monkeypatch.setattr(vmem, "turned", lambda logits: jax.lax.optimization_barrier(logits).T)
    scored = partial(logprobs.token_logprobs, interpret=True)
    composed = import_module("fastpref.kernels.preference_loss.reference").preference_loss
    for name, call in {
        "mixture_sampling": partial(sampler.mixture_sample, interpret=True),
        "token_logprobs": scored,
        "preference_loss": partial(composed, token_logprobs=scored),
    }.items():
        table = import_module(f"fastpref.kernels.{name}").IMPLEMENTATIONS
        # Set anew, it is the last choice of those who ask for none.
        monkeypatch.delitem(table, "tpu")
        monkeypatch.setitem(table, "tpu", import_module("fastpref.kernels.dispatch").Implementation(call))
