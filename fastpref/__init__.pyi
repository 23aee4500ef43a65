from fastpref import data as data
from fastpref import kernels as kernels
from fastpref import models as models
from fastpref.data.tokenizer import Tokenizer as Tokenizer
from fastpref.evaluation.best_checkpoint import Ranking as Ranking
from fastpref.evaluation.best_checkpoint import select_checkpoint as select_checkpoint
from fastpref.evaluation.during_training import exact_kl as exact_kl
from fastpref.evaluation.side_by_side import compare as compare
from fastpref.evaluation.side_by_side import evaluate as evaluate
from fastpref.evaluation.sweeps import SweepResult as SweepResult
from fastpref.evaluation.sweeps import sweep as sweep
from fastpref.evaluation.win_rates import WinRate as WinRate
from fastpref.evaluation.win_rates import WinRates as WinRates
from fastpref.evaluation.win_rates import win_rate as win_rate
from fastpref.judging.http import HttpJudge as HttpJudge
from fastpref.judging.models import PreferenceModel as PreferenceModel
from fastpref.judging.models import RewardModel as RewardModel
from fastpref.judging.protocol import Judge as Judge
from fastpref.judging.sources import load_judge as load_judge
from fastpref.learning.fit import FitResult as FitResult
from fastpref.learning.supervised import fit_preference_model as fit_preference_model
from fastpref.learning.supervised import fit_reward_model as fit_reward_model
from fastpref.learning.supervised import sft as sft
from fastpref.learning.train import Step as Step
from fastpref.learning.train import TrainResult as TrainResult
from fastpref.learning.train import train as train
from fastpref.method import errors as errors
from fastpref.method import losses as losses
from fastpref.method.adapter import AdapterConfig as AdapterConfig
from fastpref.method.algorithms import ALGORITHMS as ALGORITHMS
from fastpref.method.config import SupervisedConfig as SupervisedConfig
from fastpref.method.config import TrainConfig as TrainConfig
from fastpref.method.errors import ConfigError as ConfigError
from fastpref.method.errors import FastprefError as FastprefError
from fastpref.method.errors import JudgeError as JudgeError
from fastpref.method.schedules import Schedule as Schedule
from fastpref.models.directories import load as load
from fastpref.models.directories import save as save
from fastpref.models.huggingface import LanguageModel as LanguageModel
from fastpref.models.policy import Policy as Policy
from fastpref.runs.read_model import read_model as read_model
from fastpref.sampling.generate import write as write
from fastpref.theory import games as games
from fastpref.theory import psi as psi

__version__: str

__all__ = [
    "ALGORITHMS",
    "ConfigError",
    "FastprefError",
    "FitResult",
    "HttpJudge",
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
    "data",
    "errors",
    "evaluate",
    "exact_kl",
    "fit_preference_model",
    "fit_reward_model",
    "games",
    "kernels",
    "load",
    "load_judge",
    "losses",
    "models",
    "psi",
    "read_model",
    "save",
    "select_checkpoint",
    "sft",
    "sweep",
    "train",
    "win_rate",
    "write",
]
