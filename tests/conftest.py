"""Strictness for every test: no implicit dtype promotion, no silent broadcasting of ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("fastpref", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fastpref")
