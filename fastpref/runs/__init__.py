"""Runs: what a run directory holds, and how it is shown."""

from fastpref._lazy import need

need("train", __name__)
