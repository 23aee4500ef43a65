"""A reward model whose body stays as it is: only its scalar head is fitted, which takes one reading of the data.

r(x, y) = w·h(x, y), h being the body's state right after the completion, and p(y ≻ y') = σ(r(x, y) − r(x, y'))
(IPO-MD, eq. 2). Minus log-likelihood of recorded preferences plus a ridge is convex in w: Newton's method finds the one
minimum.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from fastpref.judging.models import RewardModel, last_states
from fastpref.models import LanguageModel

NEWTON_STEPS = 50


class HeadFit(NamedTuple):
    """What `fit_head` returns."""

    judge: RewardModel
    held_out: float
    """Share of held-out pairs in whose winner the model agrees with the label."""


def fit_head(
    model: LanguageModel,
    pairs: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    *,
    ridge: float,
    max_prompt_tokens: int = 512,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda prompts: None,
) -> HeadFit:
    """Fit a reward model on a frozen body.

    Args:
      model: the body and its tokenizer. It is not changed.
      pairs: mappings with `prompt`, `chosen`, `rejected`, all text, and `preference`, soft or hard.
      held_out: more of them.
      ridge: weight of |w|²/2, in units in which every entry of a state has a deviation of 1.
      max_prompt_tokens: longest prompt; longer ones keep their first tokens.
      batch_size: prompts read at once, and completions that the reward model scores at once.
      progress: called after each batch with its number of prompts.
    """
    texts: dict[str, list[str]] = {}
    for pair in (*pairs, *held_out):
        own = texts.setdefault(pair["prompt"], [])
        own += [text for text in (pair["chosen"], pair["rejected"]) if text not in own]
    states = _states(model, texts, max_prompt_tokens, batch_size, progress)
    scale = np.std(list(states.values()), axis=0) + 1e-6

    def differences(of: Sequence[Mapping[str, Any]]) -> tuple[Float[np.ndarray, "P D"], Float[np.ndarray, " P"]]:
        leads = [states[pair["prompt"], pair["chosen"]] - states[pair["prompt"], pair["rejected"]] for pair in of]
        return np.array(leads) / scale, np.array([pair["preference"] for pair in of])

    weight = ridge_logistic(*differences(pairs), ridge)
    judge = RewardModel.from_model(model, max_prompt_tokens=max_prompt_tokens, batch_size=batch_size)
    judge.module.weight[...] = jnp.asarray(weight / scale, jnp.float32)
    leads, preference = differences(held_out)
    agreement = 0.5 + 0.5 * np.sign(leads @ weight) * np.sign(preference - 0.5)
    return HeadFit(judge, float(agreement.mean()))


def ridge_logistic(
    x: Float[np.ndarray, "P D"], preference: Float[np.ndarray, " P"], ridge: float
) -> Float[np.ndarray, " D"]:
    """The w that minimises Σ −p·log σ(x·w) − (1 − p)·log σ(−x·w) + ridge·|w|²/2."""
    weight = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 0.5 + 0.5 * np.tanh(x @ weight / 2)
        gradient = x.T @ (p - preference) + ridge * weight
        curvature = (x.T * (p * (1 - p))) @ x + ridge * np.eye(len(weight))
        step = np.linalg.solve(curvature, gradient)
        weight -= step
        if np.abs(step).max() < 1e-6:
            break
    return weight


def _states(
    model: LanguageModel,
    texts: Mapping[str, Sequence[str]],
    max_prompt_tokens: int,
    batch_size: int,
    progress: Callable[[int], object],
) -> dict[tuple[str, str], Float[np.ndarray, " D"]]:
    """The state after each completion, by prompt and completion: each prompt is read once for all of its own."""
    definition, params = nnx.split(model.module)
    prompts = list(texts)
    most = max(map(len, texts.values()))
    read = [tokens[:max_prompt_tokens] for tokens in model.tokenizer.encode_prompts(prompts)]
    # Filled up with its first one, so that every prompt has as many.
    filled = [[*texts[prompt], *[texts[prompt][0]] * (most - len(texts[prompt]))] for prompt in prompts]
    written = model.tokenizer.encode_completions([text for several in filled for text in several])
    prompt_tokens, prompt_lengths = _padded(read)
    flat, lengths = _padded(written)
    arrays = (prompt_tokens, prompt_lengths, flat.reshape(len(prompts), most, -1), lengths.reshape(-1, most))
    found: dict[tuple[str, str], Float[np.ndarray, " D"]] = {}
    for start in range(0, len(prompts), batch_size):
        # Filled up from the beginning, so that one shape is compiled.
        batch = np.arange(start, start + batch_size) % len(prompts)
        states = np.asarray(_last_states(definition, params, *(array[batch] for array in arrays)), np.float64)
        new = batch[: len(prompts) - start]
        for place, i in enumerate(new):
            found |= {(prompts[i], text): states[place, which] for which, text in enumerate(texts[prompts[i]])}
        progress(len(new))
    return found


@partial(jax.jit, static_argnames="definition")
def _last_states(definition: Any, params: Any, *arrays: Array) -> Array:
    return last_states(nnx.merge(definition, params), *arrays)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows as [N, S] int32, zeros behind, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, lengths
