"""Kernels of online preference optimisation, usable in any JAX trainer.

Four functions, which need nothing else of this package:

- `mixture_sample` draws a token per row from the geometric mixture of two models, with all three log-probs;
- `token_logprobs` scores tokens from hidden states without the logits in memory;
- `preference_loss` goes from the hidden states of pairs to a contrastive loss and its gradients, likewise;
- `divergence` is the exact KL between two models, and the entropy of the first, at every place, likewise.

`Head` tells them how hidden states become logits:

    head = Head(embedding, scale=width**-0.5)                # [V, D], tied as in T5
    draw = mixture_sample(h, head, h_ref, ref_head, mixture_beta=0.125, key=key, row_ids=rows, step=t)
    logps = token_logprobs(hidden, head, tokens, where=is_completion)
    result = preference_loss(hidden, head, tokens, segments, ref_logps, preference, loss=loss)
    kl, entropy = divergence(hidden, head, hidden_ref, ref_head, where=is_completion)

A frozen head in int8 takes half of the memory of one in bfloat16:

    weight, scales = quantize(embedding, axis=1)
    head = Head(weight, scales=scales)

Each takes `implementation="tpu"` (Pallas kernels: logits never reach the device's memory), `"xla"` (CPU and GPU),
`"reference"` (plain JAX, the definition), or None for the best that runs here. All logits, sums and noise are float32;
the operands of products keep their dtype, and float32 ones are multiplied in the precision that JAX is configured for.

A vocabulary may be split over a mesh axis: inside `jax.shard_map`, `Head(weight_slice, mesh_axis="model")` says so, and
draws and values are those of the whole head. Where axes are not checked (`check_vma=False`), take gradients inside.
"""

from .divergence import divergence
from .divergence.sums import Divergence
from .head import Head
from .int8 import quantize
from .mixture_sampling import mixture_sample
from .mixture_sampling.sample import MixtureSample
from .preference_loss import preference_loss
from .preference_loss.objective import PreferenceLoss
from .token_logprobs import token_logprobs

__all__ = [
    "Divergence",
    "Head",
    "MixtureSample",
    "PreferenceLoss",
    "divergence",
    "mixture_sample",
    "preference_loss",
    "quantize",
    "token_logprobs",
]
