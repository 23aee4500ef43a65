"""Online preference optimisation of language models: IPO-MD and its family, on compiled kernels.

    result = fastpref.train(policy, prompts, judge, fastpref.TrainConfig(tau=0.1), run_dir="runs/first")

Two rooms serve trainers of other projects and load nothing of the rest: `fastpref.kernels` (needs jax) and
`fastpref.data` (batches from the native core). The others need `pip install 'fastpref[train]'`. In the order of the
story: method, data, models, sampling, judging, learning, evaluation, runs, theory. Names load on first use.
"""

from fastpref._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(__name__, __file__)
