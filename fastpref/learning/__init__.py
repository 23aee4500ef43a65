"""Learning: the trainings, their rollouts and updates."""

from fastpref._lazy import need

need("train", __name__)
