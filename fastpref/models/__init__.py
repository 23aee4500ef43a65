"""Language models: the protocol, two families, and checkpoints in and out."""

from fastpref.models.decoder import Decoder, DecoderConfig
from fastpref.models.policy import Policy
from fastpref.models.t5 import T5, T5Config

__all__ = ["T5", "Decoder", "DecoderConfig", "Policy", "T5Config"]
