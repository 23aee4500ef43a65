"""Online preference optimisation of language models: IPO-MD and its family, on compiled kernels.

    result = fastpref.train(policy, prompts, judge, fastpref.TrainConfig(tau=0.1), run_dir="runs/first")

Rooms: `fastpref.kernels` (three functions for anybody's JAX trainer), `fastpref.data` (batches for anybody's trainer),
`fastpref.models`, and everything below.
"""

from fastpref.algorithms import ALGORITHMS
from fastpref.config import SupervisedConfig, TrainConfig
from fastpref.evaluation import compare, evaluate
from fastpref.generation import write
from fastpref.held_out import exact_kl
from fastpref.judging import Judge, JudgeError
from fastpref.models import LanguageModel, Policy, load, save
from fastpref.preference import PreferenceModel, RewardModel
from fastpref.rules import ConfigError
from fastpref.runs import read_model
from fastpref.schedules import Schedule
from fastpref.selection import Ranking, select_checkpoint
from fastpref.supervised import FitResult, fit_preference_model, fit_reward_model, sft
from fastpref.sweeps import SweepResult, sweep
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
    "Ranking",
    "RewardModel",
    "Schedule",
    "Step",
    "SupervisedConfig",
    "SweepResult",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "WinRate",
    "WinRates",
    "compare",
    "evaluate",
    "exact_kl",
    "fit_preference_model",
    "fit_reward_model",
    "load",
    "read_model",
    "save",
    "select_checkpoint",
    "sft",
    "sweep",
    "train",
    "win_rate",
    "write",
]
