"""Evaluation: win rates, side by side, during training, of checkpoints, over grids of settings."""

from fastpref._lazy import need

need("train", __name__)
