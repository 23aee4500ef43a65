"""The demo: docstring summaries, aligned on two CPU cores."""

from fastpref._lazy import need

need("train", __name__)
