"""Sampling: two models, one loop, completions with their log-probs."""

from fastpref._lazy import need

need("train", __name__)
