"""Draw one token per row from the geometric mixture of two models."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..checks import check_fraction, check_heads, check_length, check_rows
from ..dispatch import Implementation, choose
from ..head import Head
from ..noise import key_words
from ..vmem import obstacle
from . import reference, tpu, xla
from .sample import MixtureSample

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.mixture_sample, obstacle),
    "xla": Implementation(xla.mixture_sample),
    "reference": Implementation(reference.mixture_sample),
}


def mixture_sample(
    policy_hidden: Float[Array, "B Dp"],
    policy_head: Head,
    ref_hidden: Float[Array, "B Dr"],
    ref_head: Head,
    *,
    mixture_beta: Float[Array, " B"] | Float[Array, ""] | float,
    key: Array,
    row_ids: Int[Array, " B"],
    step: Int[Array, ""] | int,
    temperature: float = 1.0,
    num_valid_tokens: int | None = None,
    implementation: str | None = None,
) -> MixtureSample:
    """Draw a token per row from π̂ ∝ exp(((1 − β)·z_policy + β·z_ref) / temperature), z the logits of each model.

    The draw is a pure function of (key, row id, step, logits): the place in the batch, the other rows and the
    implementation change nothing, except for tokens that tie within the rounding of the logits. The vocabulary is cut
    into groups of 512 consecutive ids; a group wins by the largest log-sum-exp plus Gumbel noise, then a token within
    it by the largest logit plus Gumbel noise. Ties go to the lowest id. Noise: see `fastpref.kernels.noise`.

    If both heads hold the same weight array and use it alike, it is read once. Not differentiable: gradients are zero.

    Args:
      policy_hidden: states of the policy, one per row.
      policy_head: head of the policy, V rows.
      ref_hidden: states of the reference, one per row; its width may differ.
      ref_head: head of the reference, V rows as well.
      mixture_beta: β, the weight of the reference in [0, 1], for all rows or for each. 0 is exactly the policy and 1
        exactly the reference: the other model is not multiplied by 0, so its infinities do no harm.
      key: a threefry key, `jax.random.key(seed)` or the older uint32[2].
      row_ids: names of the rows in the noise, such as prompt · K + completion. Equal ids draw equal noise.
      step: number of the token within its completion. The same (key, row id, step) draws the same noise.
      temperature: a Python number, at least 0. 0 takes the largest mixture logit, the lowest id on ties, without noise.
      num_valid_tokens: ids from here on are never drawn; None for all V. A Python number.
      implementation: "tpu", "xla", "reference", or None for the best that runs here.

    Returns:
      The token, and its log-probs. A row without a finite mixture (NaN, or no token with any probability) draws −1.

    Raises:
      ValueError: for shapes, dtypes, keys or numbers that break the rules above.
      NotImplementedError: for an implementation that cannot run here.

    Source: "Human Alignment of Large Language Models through Online Preference Optimisation", section 4 (the
    mixture); Maddison et al. (2014) for draws by maximum.
    """
    check_rows(policy_hidden, policy_head, "policy_hidden")
    check_rows(ref_hidden, ref_head, "ref_hidden")
    check_heads(policy_head, ref_head)
    rows, vocab = policy_hidden.shape[0], policy_head.vocab_size
    check_length("ref_hidden", ref_hidden, (rows, ref_head.width), "the rows of policy_hidden")
    check_length("row_ids", row_ids, (rows,), "one id per row")
    check_fraction("mixture_beta", mixture_beta)
    beta = jnp.asarray(mixture_beta, jnp.float32)
    if beta.ndim:
        check_length("mixture_beta", beta, (rows,), "one weight per row or one for all")
    if not (isinstance(temperature, int | float) and temperature >= 0):
        raise ValueError(
            f"temperature must be a Python number of at least 0, but received {temperature!r}. Pass 0 to be greedy."
        )
    if num_valid_tokens is not None and not 1 <= num_valid_tokens <= vocab:
        raise ValueError(
            f"num_valid_tokens must lie in [1, V = {vocab}], but received {num_valid_tokens}. Pass None for all."
        )
    result: MixtureSample = choose("mixture_sample", IMPLEMENTATIONS, implementation)(
        policy_hidden,
        policy_head,
        ref_hidden,
        ref_head,
        mixture_beta=jnp.broadcast_to(beta, (rows,)),
        key=key_words(key),
        row_ids=row_ids,
        step=jnp.asarray(step),
        temperature=float(temperature),
        num_valid_tokens=vocab if num_valid_tokens is None else num_valid_tokens,
    )
    return result
