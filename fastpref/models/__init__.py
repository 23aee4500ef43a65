"""Language models: the protocol, two families, and checkpoints in and out."""

from fastpref.models.adapters import merged
from fastpref.models.decoder import Decoder, DecoderConfig
from fastpref.models.directories import as_model, load, save
from fastpref.models.huggingface import LanguageModel
from fastpref.models.int8 import quantized
from fastpref.models.peft import load_adapter, save_adapter
from fastpref.models.policy import Policy
from fastpref.models.rope import RopeScaling
from fastpref.models.t5 import T5, T5Config

__all__ = [
    "T5",
    "Decoder",
    "DecoderConfig",
    "LanguageModel",
    "Policy",
    "RopeScaling",
    "T5Config",
    "as_model",
    "load",
    "load_adapter",
    "merged",
    "quantized",
    "save",
    "save_adapter",
]
