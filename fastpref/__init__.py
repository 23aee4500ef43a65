"""Online preference optimisation of language models: IPO-MD and its family, on compiled kernels.

    result = fastpref.train(policy, prompts, judge, fastpref.TrainConfig(tau=0.1), run_dir="runs/first")

Rooms: `fastpref.kernels` (three functions for anybody's JAX trainer), `fastpref.data` (batches for anybody's trainer),
`fastpref.models`, and everything below.
"""

from fastpref.algorithms import ALGORITHMS
from fastpref.config import ConfigError, Schedule, SupervisedConfig, TrainConfig
from fastpref.evaluation import compare, evaluate
from fastpref.generation import write
from fastpref.judging import Judge, JudgeError
from fastpref.models import LanguageModel, Policy, load, save
from fastpref.preference import PreferenceModel, RewardModel
from fastpref.supervised import FitResult, fit_preference_model, fit_reward_model, sft
from fastpref.tokenizer import Tokenizer
from fastpref.training import Step, TrainResult, train
from fastpref.win_rates import WinRate, WinRates, win_rate

__version__ = "0.1.0"

__all__ = [
    "ALGORITHMS",
    "ConfigError",
    "FitResult",
    "Judge",
    "JudgeError",
    "LanguageModel",
    "Policy",
    "PreferenceModel",
    "RewardModel",
    "Schedule",
    "Step",
    "SupervisedConfig",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "WinRate",
    "WinRates",
    "compare",
    "evaluate",
    "fit_preference_model",
    "fit_reward_model",
    "load",
    "save",
    "sft",
    "train",
    "win_rate",
    "write",
]
