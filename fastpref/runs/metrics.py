"""What every metric means, in one table, and the formulas of those that are computed from pairs and completions."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from fastpref.sampling.completions import Completions, ended


class Metric(NamedTuple):
    """What a metric means."""

    formula: str
    unit: str
    over: str
    """What the average is taken over; "" where nothing is averaged."""
    better: str = ""
    """"higher", "lower", or "" where neither is."""


USED = "pairs used"
SAMPLED = "sampled completions"
BY_POLICY = "completions that π wrote"
HELD = "held-out prompts"

METRICS: dict[str, Metric] = {
    "step": Metric("optimiser steps taken, this one included", "steps", ""),
    "epoch": Metric("whole passes over the data before the one that this step's first record is from", "passes", ""),
    "loss": Metric(
        "the algorithm's loss; of supervised training, −log-likelihood", "", "pairs used; tokens or pairs", "lower"
    ),
    "grad_norm": Metric("Euclidean norm of the gradient before clipping", "", ""),
    "learning_rate": Metric(
        "step size that the update was made with; left out where an optimiser was passed as an object", "", ""
    ),
    "tau": Metric("τ, strength of the regularisation towards the reference", "", ""),
    "eta": Metric("η, strength of the regularisation towards π_t", "", ""),
    "round": Metric("number of the round, from 1: π_t is the policy at its beginning", "rounds", ""),
    "mixture_beta": Metric("β, weight of the reference in the mixture that completions are drawn from", "", ""),
    "updates/skipped": Metric(
        "1 if loss, gradient or what they lead to was not finite and nothing was changed, else 0", "", "", "lower"
    ),
    "rewards/chosen": Metric("τ·(log π − log π_ref) of the preferred completion", "nats", USED, "higher"),
    "rewards/rejected": Metric("τ·(log π − log π_ref) of the other completion", "nats", USED, "lower"),
    "rewards/margins": Metric("rewards/chosen − rewards/rejected", "nats", USED, "higher"),
    "rewards/accuracies": Metric(
        "1 if the preferred completion has the higher reward, ½ if they are equal, else 0", "", USED, "higher"
    ),
    "anchor/chosen": Metric("η·(log π − anchor) of the preferred completion, the anchor with π_t in it", "nats", USED),
    "anchor/rejected": Metric("η·(log π − anchor) of the other completion", "nats", USED),
    "anchor/margins": Metric("anchor/chosen − anchor/rejected", "nats", USED, "higher"),
    "anchor/accuracies": Metric(
        "1 if the preferred completion is further above the anchor, ½ if they are equal, else 0", "", USED, "higher"
    ),
    "logps/chosen": Metric("log π of the preferred completion, summed over its tokens", "nats", USED),
    "logps/rejected": Metric("log π of the other completion, summed over its tokens", "nats", USED),
    "objective/kl": Metric(
        "log π − log π_ref, summed over tokens: an estimate of KL(π ‖ π_ref)", "nats/completion", BY_POLICY, "lower"
    ),
    "objective/writer_kl": Metric(
        "log π − log π_ref, or log π_t − log π_ref in rounds, of what the mixture or π_t wrote; may be negative",
        "nats/completion",
        SAMPLED,
    ),
    "objective/scores": Metric(
        "reward of a completion, less `missing_eos_penalty` where it was cut off", "reward", SAMPLED, "higher"
    ),
    "objective/rlhf_reward": Metric("reward − τ·(log π − log π_ref)", "reward", SAMPLED, "higher"),
    "objective/entropy": Metric(
        "−log π of the token that was drawn: an estimate of π's entropy", "nats/token", "tokens that π wrote"
    ),
    "objective/writer_entropy": Metric(
        "−log π, or −log π_t in rounds, of the token that the mixture or π_t drew", "nats/token", "sampled tokens"
    ),
    "preference/mean": Metric("p(first ≻ second), ½ for identical completions", "", "all pairs"),
    "preference/confidence": Metric("|p(first ≻ second) − ½|", "", "all pairs"),
    "preference/comparisons": Metric(
        "comparisons that were judged, those of identical completions left out", "comparisons", ""
    ),
    "completions/mean_length": Metric("tokens, EOS included", "tokens", SAMPLED),
    "completions/eos_rate": Metric("1 if the completion ends with EOS, 0 if it was cut off", "", SAMPLED, "higher"),
    "pairs/used": Metric("pairs of this step that were learned from", "pairs", "", "higher"),
    "pairs/identical": Metric("pairs whose completions are the same tokens: counted, not learned from", "pairs", ""),
    "pairs/worst_won": Metric("pairs whose worst won the tournament's last comparison: not learned from", "pairs", ""),
    "pairs/tie": Metric("pairs for which that comparison was even: not learned from", "pairs", ""),
    "pairs/cyclic": Metric("tournaments of an odd number that one completion both won and lost", "pairs", ""),
    "tokens/generated": Metric("tokens sampled at this step, EOS included", "tokens", ""),
    "eval/win_rate": Metric("p(policy ≻ reference), the mean of both orders", "", HELD, "higher"),
    "eval/win_rate_low": Metric("lower end of the 95 % bootstrap interval of eval/win_rate", "", HELD, "higher"),
    "eval/win_rate_high": Metric("upper end of the 95 % bootstrap interval of eval/win_rate", "", HELD, "higher"),
    "eval/kl": Metric(
        "log π − log π_ref of a completion that π wrote, summed over tokens", "nats/completion", HELD, "lower"
    ),
    "eval/kl_exact": Metric(
        "Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)) along a completion that π wrote", "nats/completion", HELD, "lower"
    ),
    "eval/kl_per_token": Metric(
        "KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)) at a token that π wrote", "nats/token", "held-out tokens", "lower"
    ),
    "eval/entropy": Metric("entropy of π(·|x, y_<t) at a token that π wrote", "nats/token", "held-out tokens"),
    "eval/mean_length": Metric("tokens that π wrote, EOS included", "tokens", HELD),
    "eval/eos_rate": Metric("1 if what π wrote ends with EOS, 0 if it was cut off", "", HELD, "higher"),
    "eval/agreement": Metric(
        "1 if log π − log π_ref and the judge prefer the same of two completions of the reference, ½ if either ties, "
        "else 0",
        "",
        "held-out prompts whose two completions differ",
        "higher",
    ),
    "eval/loss": Metric("supervised loss on held-out records", "", "held-out tokens or pairs", "lower"),
    "eval/accuracy": Metric(
        "1 if the model prefers what the label does, ½ if either ties, else 0", "", "held-out pairs", "higher"
    ),
    "time/data": Metric("waiting for the next batch", "s", "", "lower"),
    "time/generate": Metric("sampling both completions", "s", "", "lower"),
    "time/judge": Metric("asking the judge", "s", "", "lower"),
    "time/pair": Metric("packing pairs into rows, and their log-probs under frozen models", "s", "", "lower"),
    "time/learn": Metric("loss, gradient and update", "s", "", "lower"),
    "time/step": Metric("the whole step, without held-out evaluation", "s", "", "lower"),
}
"""Every metric by name. Only those under `time/` differ between two runs of one configuration on one machine."""


def markdown() -> str:
    """The table as it stands in docs/metrics.md."""
    cells = [
        (f"`{name}`", metric.formula.replace("|", "\\|"), metric.unit, metric.over, metric.better)
        for name, metric in METRICS.items()
    ]
    rows = [("name", "formula", "unit", "averaged over", "better"), ("---",) * 5, *cells]
    return "".join(f"| {' | '.join(cell or '–' for cell in row)} |\n" for row in rows)


def pair_metrics(
    policy_logps: Float[Array, "P 2"],
    ref_logps: Float[Array, "P 2"],
    preference: Float[Array, " P"],
    where: Bool[Array, " P"],
    tau: Float[Array, ""],
) -> dict[str, Array]:
    """`rewards/...` and `logps/...` of judged pairs.

    Where p is ½ neither completion is preferred: both names get their mean, and the margin is 0.

    Args:
      policy_logps: log π of both completions, sums over tokens, shape [P, 2].
      ref_logps: log π_ref of both, shape [P, 2].
      preference: p(first ≻ second), shape [P].
      where: the pairs that are learned from, shape [P]; the others have no part in any average.
      tau: τ, a scalar.

    Returns:
      Float32 scalars by name; 0 where no pair is used.
    """
    lean = jnp.sign(preference - 0.5)
    count = jnp.maximum(where.sum(), 1).astype(jnp.float32)

    def mean(values: Float[Array, " P"]) -> Float[Array, ""]:
        return jnp.where(where, values, 0.0).sum() / count

    def split(values: Float[Array, "P 2"]) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        first, second = values[:, 0], values[:, 1]
        even = (first + second) / 2
        chosen = jnp.where(lean > 0, first, jnp.where(lean < 0, second, even))
        return chosen, jnp.where(lean > 0, second, jnp.where(lean < 0, first, even))

    chosen, rejected = split(tau * (policy_logps - ref_logps))
    chosen_logps, rejected_logps = split(policy_logps)
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(chosen - rejected),
        "rewards/accuracies": mean((1 + jnp.sign(chosen - rejected)) / 2),
        "logps/chosen": mean(chosen_logps),
        "logps/rejected": mean(rejected_logps),
    }


def sampling_metrics(
    completions: Completions, by_policy: Sequence[bool] | None, eos_id: int | Sequence[int] | None
) -> dict[str, float]:
    """`objective/...` and `completions/...` of a step's completions, before anything is learned from them.

    Args:
      completions: P prompts with K completions each.
      by_policy: K flags, True where π wrote: what is said of π is averaged over those. None where π wrote none: the
        averages are then over all completions, and named after their writer.
      eos_id: token, or tokens, that end a completion.
    """
    lengths = np.asarray(completions.lengths)
    kept = np.ones(lengths.shape[1], bool) if by_policy is None else np.asarray(by_policy)
    writer = "writer_" if by_policy is None else ""
    policy_logps, ref_logps = (
        np.asarray(logps)[:, kept] for logps in (completions.policy_logps, completions.ref_logps)
    )
    return {
        f"objective/{writer}kl": float((policy_logps - ref_logps).mean()),
        f"objective/{writer}entropy": float(-policy_logps.sum() / lengths[:, kept].sum()),
        "completions/mean_length": float(lengths.mean()),
        "completions/eos_rate": float(ended(np.asarray(completions.tokens), lengths, eos_id).mean()),
        "tokens/generated": float(lengths.sum()),
    }
