"""Sampling from the one-token-at-a-time mixture of two models: two caches, one loop.

log π̂ = (1 − β) log π + β log π_ref + const at every token (IPO-MD, section 6). Each prompt is read once by each model,
whatever the number of completions; the loop ends when every row has its EOS.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from fastpref.data import read_prompts
from fastpref.data.batches import token_mask
from fastpref.data.rendered import Unfinished
from fastpref.data.sources import Source
from fastpref.data.tokenization import fit_prompts
from fastpref.kernels import mixture_sample
from fastpref.method.choices import TruncationSide
from fastpref.method.errors import DivergedError
from fastpref.models import LanguageModel
from fastpref.models.lowrank import stacked as stacked_params
from fastpref.models.policy import Policy
from fastpref.models.rows import shared_rows
from fastpref.sampling.completions import Completions, ended


def generate(
    policy: Policy,
    ref: Policy | None,
    prompt_tokens: Int[Array, "P S"],
    prompt_mask: Bool[Array, "P S"],
    *,
    mixture_beta: Float[Array, "P K"],
    key: Array,
    row_ids: Int[Array, "P K"],
    eos_id: int | tuple[int, ...] | None,
    max_new_tokens: int,
    num_valid_tokens: int | None = None,
    temperature: float = 1.0,
    stacked: bool = False,
) -> Completions:
    """Write K completions to each of P prompts. Traceable: call it under `jax.jit`.

    Args:
      policy: π.
      ref: π_ref, or None to sample from the policy alone (its log-probs then stand for both).
      prompt_tokens: token ids, shape [P, S].
      prompt_mask: True where a token is real, shape [P, S]; padding may stand anywhere.
      mixture_beta: weight of the reference of each row, shape [P, K], in [0, 1].
      key: a typed JAX PRNG key. The draw of a row depends on (key, row id, step, logits) only.
      row_ids: a number for each row, shape [P, K], int32, distinct within a call.
      eos_id: token that ends a completion, or several that do, or None if none does: every completion then has
        max_new_tokens tokens.
      max_new_tokens: T.
      num_valid_tokens: ids from here on are never drawn; None draws from the whole head.
      temperature: of the draw; 0 takes the most likely token of the mixture.
      stacked: `policy` holds both models (`models.lowrank.stacked`), whose rows take each product with the base at
        once; `ref` is then None.

    Returns:
      `Completions`, with summed log-probs of both models at temperature 1.
    """
    prompts, completions = mixture_beta.shape
    rows = prompts * completions
    shares = 2 if stacked else 1
    prompt_tokens, prompt_mask = (jnp.tile(array, (shares, 1)) for array in (prompt_tokens, prompt_mask))
    betas, ids = mixture_beta.reshape(rows), row_ids.reshape(rows)
    models = (policy,) if ref is None else (policy, ref)
    heads = [model.head() for model in models]
    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id

    def read(model: Policy) -> tuple[Array, Any]:
        """The first input of every row, and what else the model has read."""
        first, cache = model.prefill(prompt_tokens, prompt_mask, completions=completions, max_new_tokens=max_new_tokens)
        return jnp.repeat(first, completions), cache

    def unfinished(state: tuple[Array, dict[str, Array], Any]) -> Array:
        step, written, _ = state
        return (step < max_new_tokens) & ~jnp.all(written["done"])

    def advance(state: tuple[Array, dict[str, Array], Any]) -> tuple[Array, dict[str, Array], Any]:
        step, written, inputs = state
        hidden, caches = [], []
        for model, (tokens, cache) in zip(models, inputs, strict=True):
            states, after = model.decode(cache, tokens.reshape(shares * prompts, completions, 1), step)
            hidden += list(states.reshape(shares, rows, -1))
            caches.append(after)
        drawn = mixture_sample(
            hidden[0],
            heads[0],
            hidden[-1],
            heads[-1],
            mixture_beta=betas,
            key=key,
            row_ids=ids,
            step=step,
            temperature=temperature,
            num_valid_tokens=num_valid_tokens,
        )
        live = ~written["done"]
        ended = jnp.isin(drawn.token, jnp.array(ends, jnp.int32)) if ends else jnp.zeros_like(live)
        written = {
            "tokens": written["tokens"].at[:, step].set(jnp.where(live, drawn.token, 0)),
            "lengths": written["lengths"] + live.astype(jnp.int32),
            "policy": written["policy"] + jnp.where(live, drawn.policy_logp, 0.0),
            "ref": written["ref"] + jnp.where(live, drawn.ref_logp, 0.0),
            "mixture": written["mixture"] + jnp.where(live, drawn.mixture_logp, 0.0),
            "done": written["done"] | ended,
        }
        return step + 1, written, tuple((jnp.tile(drawn.token, shares), cache) for cache in caches)

    zeros = jnp.zeros(rows, jnp.float32)
    blank = {
        "tokens": jnp.zeros((rows, max_new_tokens), jnp.int32),
        "lengths": jnp.zeros(rows, jnp.int32),
        "policy": zeros,
        "ref": zeros,
        "mixture": zeros,
        "done": jnp.zeros(rows, bool),
    }
    begin = (jnp.zeros((), jnp.int32), blank, tuple(map(read, models)))
    _, written, _ = jax.lax.while_loop(unfinished, advance, begin)
    shape = (prompts, completions)
    return Completions(
        tokens=written["tokens"].reshape(*shape, max_new_tokens),
        lengths=written["lengths"].reshape(shape),
        policy_logps=written["policy"].reshape(shape),
        ref_logps=written["ref"].reshape(shape),
        mixture_logps=written["mixture"].reshape(shape),
    )


def sample(
    policy_def: Any, params: Any, ref_def: Any, ref_params: Any, *arguments: Any, **settings: Any
) -> Completions:
    """`generate_jit`, with the rows of both models in one pass where they are adapters of one base."""
    both = None
    if policy_def == ref_def and params is not None:
        both = stacked_params(params, ref_params)
    if both is None:
        drawn: Completions = generate_jit(policy_def, params, ref_def, ref_params, *arguments, **settings)
    else:
        drawn = generate_jit(policy_def, both, None, None, *arguments, stacked=True, **settings)
    return drawn


@partial(
    jax.jit,
    static_argnames=("policy_def", "ref_def", "eos_id", "max_new_tokens", "num_valid_tokens", "temperature", "stacked"),
)
def generate_jit(
    policy_def: Any,
    params: Any,
    ref_def: Any,
    ref_params: Any,
    prompt_tokens: Int[Array, "P S"],
    prompt_lengths: Int[Array, " P"],
    mixture_beta: Float[Array, "P K"],
    key: Array,
    row_ids: Int[Array, "P K"],
    *,
    eos_id: int | tuple[int, ...] | None,
    max_new_tokens: int,
    num_valid_tokens: int | None,
    temperature: float,
    stacked: bool = False,
) -> Completions:
    """`generate` on split NNX modules, compiled once for each pair of models and shape; `ref_def` may be None."""
    mask = token_mask(prompt_lengths, prompt_tokens.shape[1])
    return generate(
        nnx.merge(policy_def, params),
        None if ref_def is None else nnx.merge(ref_def, ref_params),
        prompt_tokens,
        mask,
        mixture_beta=mixture_beta,
        key=key,
        row_ids=row_ids,
        eos_id=eos_id,
        max_new_tokens=max_new_tokens,
        num_valid_tokens=num_valid_tokens,
        temperature=temperature,
        stacked=stacked,
    )


class Written(NamedTuple):
    """Completions as text, with what the sampler knows of them."""

    texts: list[list[str]]
    """P lists of K texts, special tokens removed; `Unfinished` where a completion was cut off."""
    lengths: Int[np.ndarray, "P K"]
    """Tokens of each, EOS included."""
    policy_logps: Float[np.ndarray, "P K"]
    """Summed log-probs under the model that wrote them."""
    ref_logps: Float[np.ndarray, "P K"]
    """Summed log-probs under the reference, or under the model itself where there is none."""
    tokens: Int[np.ndarray, "P K T"]
    """Token ids, 0 past the length."""
    prompt_tokens: Int[np.ndarray, "P S"]
    """What was read, padded on the right."""
    prompt_lengths: Int[np.ndarray, " P"]
    finished: Bool[np.ndarray, "P K"]
    """Whether a token that ends completions was written; False where a completion ran into max_new_tokens."""


def write(
    model: LanguageModel,
    prompts: Source,
    *,
    seed: int,
    max_new_tokens: int,
    ref: LanguageModel | None = None,
    max_prompt_tokens: int = 512,
    truncation_side: TruncationSide = "right",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    completions: int = 1,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Written:
    """Let a model write to each of P prompts.

    Args:
      model: the model and its tokenizer.
      prompts: P texts; or mappings, messages or a file, as `train` takes them, which the chat template of this model's
        tokenizer writes. A chat above max_prompt_tokens loses its oldest turns; another text is cut.
      seed: of the draw: the same seed, prompts and weights give the same texts, whatever the batch size.
      max_new_tokens: longest completion, EOS included.
      ref: also score the completions under this model.
      max_prompt_tokens: longest prompt.
      truncation_side: where a longer text is cut: "right" keeps its first tokens, "left" its last.
      chat_template_kwargs: options of the chat template, such as `enable_thinking`.
      temperature: of the draw; 0 takes the most likely token.
      completions: K, how many for each prompt.
      batch_size: prompts decoded at once.
      progress: called after each batch, with its number of prompts.

    Returns:
      `Written`.

    Raises:
      ValueError: a prompt without tokens.
      DataError: the prompts cannot be read, or a chat above max_prompt_tokens has no turn that could be left out.
      DivergedError: a model's logits are not finite.

    Warns:
      CutWarning: prompts were cut.
      DropWarning: records hold columns that are not used.
    """
    if ref is not None:
        model, ref = shared_rows([model, ref])
    texts = read_prompts(prompts, model.tokenizer, chat_template_kwargs=chat_template_kwargs)
    encoded = fit_prompts(texts, model.tokenizer, max_prompt_tokens=max_prompt_tokens, truncation_side=truncation_side)
    empty = [index for index, tokens in enumerate(encoded) if not tokens]
    if empty:
        raise ValueError(
            f"a prompt must have at least one token, but prompt {empty[0]} has none ({texts[empty[0]]!r}). "
            "Remove empty prompts."
        )
    definition, params = nnx.split(model.module)
    ref_definition, ref_params = (None, None) if ref is None else nnx.split(ref.module)
    width = padded_width(encoded, max_prompt_tokens)
    parts: list[Written] = []
    for start in range(0, len(encoded), batch_size):
        part, of = encoded[start : start + batch_size], texts[start : start + batch_size]
        # A short last batch is filled up, so that one shape is compiled.
        missing = min(batch_size, len(encoded)) - len(part)
        rows, of = part + part[:1] * missing, of + of[:1] * missing
        tokens = np.zeros((len(rows), width), np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        row_ids = (start + np.arange(len(rows)))[:, None] * completions + np.arange(completions)[None, :]
        lengths = np.array([len(ids) for ids in rows], np.int32)
        batch = sample(
            definition,
            params,
            ref_definition,
            ref_params,
            tokens,
            lengths,
            np.zeros((len(rows), completions), np.float32),
            jax.random.key(seed),
            row_ids.astype(np.int32),
            eos_id=model.tokenizer.stop_ids,
            max_new_tokens=max_new_tokens,
            num_valid_tokens=num_valid_tokens(model),
            temperature=temperature,
        )
        require_finite(batch)
        parts.append(
            Written(
                decode(model, batch, of)[: len(part)],
                *(
                    np.asarray(x)[: len(part)]
                    for x in (
                        *(batch.lengths, batch.policy_logps, batch.ref_logps, batch.tokens, tokens, lengths),
                        ended(batch.tokens, batch.lengths, model.tokenizer.stop_ids),
                    )
                ),
            )
        )
        if progress is not None:
            progress(len(part))
    return Written(
        [texts for part in parts for texts in part.texts],
        *(np.concatenate([part[field] for part in parts]) for field in range(1, len(Written._fields))),
    )


def require_finite(completions: Completions) -> None:
    """Refuse completions that were drawn from logits that are not finite: their tokens mean nothing.

    Raises:
      DivergedError: a log-prob is NaN or infinite.
    """
    for name, logps in (("policy", completions.policy_logps), ("reference", completions.ref_logps)):
        broken = ~np.isfinite(np.asarray(logps))
        if broken.any():
            raise DivergedError(
                f"logits must be finite to be sampled from, but received NaN or infinity from the {name} for "
                f"{broken.sum()} of {broken.size} completions. Check its weights, or lower learning_rate and go on "
                "from an earlier checkpoint."
            )


def padded_width(prompts: Sequence[Sequence[int]], most: int) -> int:
    """The width to which `write` pads encoded prompts of at most `most` tokens."""
    return min(round_up(max(map(len, prompts), default=1), 16), most)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def decode(model: LanguageModel, completions: Completions, prompts: Sequence[str]) -> list[list[str]]:
    """Completions of P prompts as text: P lists of K, special tokens removed; `Unfinished` where one was cut off."""
    tokens, lengths = np.asarray(completions.tokens), np.asarray(completions.lengths)
    count, per_prompt, _ = tokens.shape
    flat = [
        tokens[prompt, which, : lengths[prompt, which]].tolist()
        for prompt in range(count)
        for which in range(per_prompt)
    ]
    owners = [prompt for prompt in prompts for _ in range(per_prompt)]
    ends = ended(tokens, lengths, model.tokenizer.stop_ids).reshape(-1)
    decoded = zip(model.tokenizer.decode_completions(flat, owners), ends, strict=True)
    texts = [text if end else Unfinished(text) for text, end in decoded]
    return [texts[start : start + per_prompt] for start in range(0, len(texts), per_prompt)]


def num_valid_tokens(model: LanguageModel) -> int | None:
    """Ids that the tokenizer knows, where the head has more rows than that; else None."""
    known = model.tokenizer.vocab_size
    return known if known < model.module.vocab_size else None
