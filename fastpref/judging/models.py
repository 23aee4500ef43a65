"""Preference and reward models: judges that are language models, trained here from recorded preferences."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import orjson
from flax import nnx
from jax import Array
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from fastpref.data import ChatTemplate
from fastpref.data.batches import token_mask
from fastpref.data.readers import written_by
from fastpref.data.rendered import Rendered, Unfinished
from fastpref.judging.conversations import readings
from fastpref.judging.identity import digest
from fastpref.judging.protocol import probability
from fastpref.method.errors import CutWarning
from fastpref.models import LanguageModel, load, save
from fastpref.models.policy import Policy, hidden_states, position_limit
from fastpref.sampling.generate import round_up

SUMMARY_PROMPT = (
    "You are an expert summary rater. Given a piece of text and two of its possible summaries, "
    "output 1 or 2 to indicate which summary is better. "
    "Text - {prompt}, Summary 1 - {first}, Summary 2 - {second} Preferred Summary -"
)
"""The papers' prompt for side-by-side comparison (IPO-MD, section 6)."""

FIELDS = re.compile(r"(\{prompt\}|\{first\}|\{second\})")


FEW_WIDTHS = 32
"""Readings are padded to multiples of it, so that few programs are compiled."""

Reading = tuple[tuple[int, ...], ...]
"""Token ids of what is scored at once: a prompt and its completions."""


def last_states(
    policy: Policy,
    prompt_tokens: Int[Array, "P S"],
    prompt_lengths: Int[Array, " P"],
    completion_tokens: Int[Array, "P K T"],
    completion_lengths: Int[Array, "P K"],
) -> Float[Array, "P K D"]:
    """States right after the last token of each completion, shape [P, K, D]."""
    mask = token_mask(prompt_lengths, prompt_tokens.shape[1])
    # One more position, so that the state after the last token of a full-length completion exists.
    padded = jnp.pad(completion_tokens, ((0, 0), (0, 0), (0, 1)))
    hidden = hidden_states(policy, prompt_tokens, mask, padded)
    return jnp.take_along_axis(hidden, completion_lengths[:, :, None, None], axis=2)[:, :, 0]


def answer_margins(policy: Policy, answers: Int[Array, " 2"], *readings: Array) -> Float[Array, "P K"]:
    """Logit of the first answer minus that of the second after each reading, shape [P, K], float32.

    `readings` are the four arrays of `last_states`: a shared beginning, and K ways to go on.
    """
    states = last_states(policy, *readings)
    head = policy.head()
    logits = head.of(answers).logits(states.reshape(-1, states.shape[-1]))
    return (logits[:, 0] - logits[:, 1]).reshape(states.shape[:2])


def rewards(module: "ScoredPolicy", *completions: Array) -> Float[Array, "P K"]:
    """Scalar reward of each completion, read off its last state, shape [P, K], float32.

    `completions` are the four arrays of `last_states`.
    """
    states = last_states(module.policy, *completions).astype(jnp.float32)
    return (states * module.weight[...][None, None, :]).sum(-1)


class ScoredPolicy(nnx.Module):
    """A policy's body with a scalar head: weight of shape [D], zeros at the start."""

    def __init__(self, policy: Any, width: int) -> None:
        self.policy = policy
        self.weight = nnx.Param(jnp.zeros(width, jnp.float32))


@partial(jax.jit, static_argnames=("definition",))
def _answer_margins(definition: Any, params: Any, answers: Array, *readings: Array) -> Array:
    return answer_margins(nnx.merge(definition, params), answers, *readings)


@partial(jax.jit, static_argnames=("definition",))
def _rewards(definition: Any, params: Any, *completions: Array) -> Array:
    return rewards(nnx.merge(definition, params), *completions)


def _padded(parts: Sequence[Sequence[int]], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as [N, S] int32 with S a multiple, and their lengths."""
    lengths = np.array([len(ids) for ids in parts], np.int32)
    tokens = np.zeros((len(parts), round_up(max(1, int(lengths.max(initial=1))), multiple)), np.int32)
    for index, ids in enumerate(parts):
        tokens[index, : len(ids)] = ids
    return tokens, lengths


def _reading(*parts: Sequence[int]) -> Reading:
    return tuple(tuple(part) for part in parts)


def _arrays(readings: Sequence[Reading], limit: int | None) -> tuple[np.ndarray, ...]:
    """The four arrays of `last_states` of readings that are a prompt and K completions each.

    They are padded to a few widths, or to the longest where the positions of the model end before that.
    """
    prompts, texts = [reading[0] for reading in readings], [text for reading in readings for text in reading[1:]]
    width = sum(round_up(max(1, *map(len, part)), FEW_WIDTHS) for part in (prompts, texts))
    multiple = FEW_WIDTHS if limit is None or width <= limit else 1
    tokens, lengths = _padded(texts, multiple)
    shape = (len(readings), len(readings[0]) - 1)
    return *_padded(prompts, multiple), tokens.reshape(*shape, -1), lengths.reshape(shape)


def _score_distinct(
    readings: Sequence[Reading], score: Callable[[Sequence[Reading]], np.ndarray], batch_size: int
) -> Float[np.ndarray, " N"]:
    """Score N readings in full batches, each distinct reading once.

    Rounding depends on the company that a reading is scored in. So the batches follow from the set of readings alone,
    and neither the order of a call nor a repetition in it can make two scores of a reading differ.
    """
    distinct = sorted(set(readings), key=lambda reading: ([len(tokens) for tokens in reading], reading))
    scores: dict[Reading, np.float32] = {}
    for start in range(0, len(distinct), batch_size):
        part = distinct[start : start + batch_size]
        filled = part + part[:1] * (batch_size - len(part))
        scores.update(zip(part, score(filled)[: len(part)], strict=True))
    return np.array([scores[reading] for reading in readings], np.float32)


@dataclass(frozen=True)
class PreferenceModel:
    """A language model that reads a text and two completions and whose answer's logit gives p(first ≻ second).

    It is a `Judge`. With `symmetric`, both orders are read and their logits averaged, so that
    p(y ≻ y') + p(y' ≻ y) is exactly 1.

    Args:
      model: the language model and its tokenizer.
      template: the text to read, with {prompt}, {first} and {second}.
      answers: the two words whose logits are compared; each must be a single token.
      symmetric: average over the two orders.
      max_tokens: longest beginning, up to the end of the prompt. Above it a chat loses its oldest turns, and a text its
        end, and a warning says so.
      batch_size: pairs judged at once.
      chat_template_kwargs: options of the chat template, as for `SupervisedConfig`.

    Raises:
      ValueError: a template without its three fields, or an answer that is not a single token.
    """

    model: LanguageModel
    template: str = SUMMARY_PROMPT
    answers: tuple[str, str] = ("1", "2")
    symmetric: bool = True
    max_tokens: int = 512
    batch_size: int = 64
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields = FIELDS.findall(self.template)
        if sorted(fields) != ["{first}", "{prompt}", "{second}"] or fields[0] != "{prompt}":
            raise ValueError(
                "a template must contain {prompt} and then {first} and {second}, each once, but received "
                f"{self.template!r}. Write one such as SUMMARY_PROMPT."
            )
        self.answer_ids()

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, tokenizer and settings by content, for `judging.identity`; the batch size decides rounding alone."""
        return {**_content(self.model, self.model.module), **self._settings()}

    def _settings(self) -> dict[str, Any]:
        """What decides an answer besides weights and tokenizer."""
        options = {"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}
        names = ("template", "symmetric", "max_tokens")
        return {name: getattr(self, name) for name in names} | {"answers": list(self.answers), **options}

    def answer_ids(self) -> Int[np.ndarray, " 2"]:
        """Token ids of the two answers, shape [2]."""
        ids = [tokens[:-1] for tokens in self.model.tokenizer.encode_completions(list(self.answers))]
        for answer, tokens in zip(self.answers, ids, strict=True):
            if len(tokens) != 1:
                raise ValueError(
                    f"an answer must be a single token, but {answer!r} is {len(tokens)} tokens. "
                    "Choose answers that the tokenizer knows whole."
                )
        return np.array([tokens[0] for tokens in ids], np.int32)

    def readings(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of what is read for each pair: up to the end of the prompt, and from there to the answer.

        The two orders of a pair differ in the second part only, so the prompt is read once for both. An
        encoder-decoder model reads the first part with its encoder and the second with its decoder.
        """
        tokenizer = self.model.tokenizer
        template = ChatTemplate.find(tokenizer, self.chat_template_kwargs)
        prompts = written_by(template, prompts)
        before, after = self.template.split("{prompt}")
        opened = tokenizer.encode_prompts([before + prompt for prompt in prompts])
        long = [index for index, tokens in enumerate(opened) if len(tokens) > self.max_tokens]
        for index in long:
            prompt, tokens = prompts[index], opened[index]
            while len(tokens) > self.max_tokens and isinstance(prompt, Rendered) and template is not None:
                shorter = template.shorter(prompt)
                if shorter is None:
                    break
                prompt, (tokens,) = shorter, tokenizer.encode_prompts([before + shorter])
            if len(tokens) > self.max_tokens:
                body = tokenizer.encode_completions([str(prompt)])[0][:-1]
                kept = tokenizer.decode([body[: max(0, len(body) - len(tokens) + self.max_tokens)]])[0]
                # Cutting text can add a token or two at the seam.
                tokens = tokenizer.encode_prompts([before + kept])[0][: self.max_tokens]
            opened[index] = tokens
        if long:
            warnings.warn(
                f"{len(long)} of {len(prompts)} prompts are cut, so that a preference model's readings keep to "
                f"max_tokens={self.max_tokens}",
                CutWarning,
                stacklevel=3,
            )
        pieces = FIELDS.split(after)
        # Braces in the texts themselves must stay as they are, so the template is split, not formatted.
        closed = [
            "".join({"{first}": one, "{second}": two}.get(piece, piece) for piece in pieces)
            for one, two in zip(first, second, strict=True)
        ]
        return opened, [tokens[:-1] for tokens in tokenizer.encode_completions(closed)]

    def margins(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, " P"]:
        """Logit of "the first is better", shape [P], float32; antisymmetric where `symmetric`."""
        definition, params = nnx.split(self.model.module)
        answers, limit = self.answer_ids(), self.model.max_positions

        def score(readings: Sequence[Reading]) -> np.ndarray:
            margins = np.asarray(_answer_margins(definition, params, answers, *_arrays(readings, limit)))
            return (margins[:, 0] - margins[:, 1]) / np.float32(2) if self.symmetric else margins[:, 0]

        opened, forward = self.readings(prompts, first, second)
        if not self.symmetric:
            readings = [_reading(*parts) for parts in zip(opened, forward, strict=True)]
            return _score_distinct(readings, score, self.batch_size)
        _, backward = self.readings(prompts, second, first)
        # One canonical order, so that (y, y') and (y', y) are the same reading and answered by exact opposites.
        sign = [1 if one <= other else -1 for one, other in zip(forward, backward, strict=True)]
        readings = [
            _reading(prompt, *sorted(orders)) for prompt, *orders in zip(opened, forward, backward, strict=True)
        ]
        margin: Float[np.ndarray, " P"] = np.array(sign, np.float32) * _score_distinct(readings, score, self.batch_size)
        return margin

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, " P"]:
        """p(first ≻ second | prompt), shape [P], float32."""
        return probability(self.margins(prompts, first, second))

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face directory with one more file, `preference_model.json`."""
        settings = orjson.dumps(self._settings(), option=orjson.OPT_INDENT_2)
        save(self.model, path, beside={"preference_model.json": settings})

    @classmethod
    def load(cls, path: str | Path, *, base: LanguageModel | None = None) -> "PreferenceModel":
        """Read what `save` wrote.

        Args:
          path: the directory.
          base: of a model with an adapter, the model to share its base with; None to read one.

        Raises:
          ValueError: the directory holds no preference model.
        """
        settings = _read_settings(Path(path), "preference_model.json", "preference model")
        settings["answers"] = tuple(settings["answers"])
        return cls(load(path, base=base), **settings)


@dataclass(frozen=True)
class RewardModel:
    """A scalar reward r(x, y), as a judge by Bradley-Terry: p(y ≻ y') = σ(r(x, y) − r(x, y')) (IPO-MD, eq. 2).

    Conversations are read by the chat template of the model's own tokenizer. A completion is read with EOS behind it
    where it is finished, and without where it was cut off.

    Args:
      model: the language model whose body is used, and its tokenizer.
      module: the body with its scalar head.
      max_prompt_tokens: longest prompt; a longer chat loses its oldest turns, a text is cut, and a warning says so.
        None for any length.
      batch_size: completions scored at once.
      whole: read prompt and completion as one text with all that the template writes behind the completion, as models
        of the hub were trained to; else as `fit_reward_model` reads them.
      pad_id: of models of the hub, tokens of this id at the end are passed over, as transformers does.
      bias: of the scalar head.
      chat_template_kwargs: options of the chat template, as for `SupervisedConfig`.
    """

    model: LanguageModel
    module: ScoredPolicy
    max_prompt_tokens: int | None = 512
    batch_size: int = 64
    whole: bool = False
    pad_id: int | None = None
    bias: float = 0.0
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    bradley_terry: ClassVar[bool] = True

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, tokenizer and settings by content, for `judging.identity`; the batch size decides rounding alone."""
        return {**_content(self.model, self.module), **self._settings()}

    def _settings(self) -> dict[str, Any]:
        """What decides a score besides weights and tokenizer, as far as it is not the default."""
        rest = {"whole": self.whole, "bias": self.bias, "chat_template_kwargs": dict(self.chat_template_kwargs)}
        padding = {} if self.pad_id is None else {"pad_id": self.pad_id}
        settled = {key: value for key, value in rest.items() if value}
        return {"max_prompt_tokens": self.max_prompt_tokens, **padding, **settled}

    @classmethod
    def from_model(cls, model: LanguageModel, **settings: Any) -> "RewardModel":
        """A reward model on a language model's body, its scalar head at zero."""
        return cls(model, ScoredPolicy(nnx.clone(model.module), model.module.head().width), **settings)

    def readings(self, prompts: Sequence[str], completions: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of what is read for each completion: see `conversations.readings`."""
        return readings(
            self.model.tokenizer,
            prompts,
            completions,
            max_prompt_tokens=self.max_prompt_tokens,
            to_the_end=self.whole,
            pad_id=self.pad_id,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def scores(
        self, prompts: Sequence[str], completions: Sequence[str], *, finished: Sequence[bool] | None = None
    ) -> Float[np.ndarray, " P"]:
        """r(x, y) of each completion, shape [P], float32.

        Args:
          prompts: P texts; conversations that a template wrote are written anew by this model's own.
          completions: a completion of each prompt.
          finished: False where one was cut off; None for what the texts themselves say (`Written.texts` do).

        Raises:
          ChatError: see `conversations.readings`.
        """
        if finished is not None:
            completions = [
                str(text) if end else Unfinished(text) for text, end in zip(completions, finished, strict=True)
            ]
        definition, params = nnx.split(self.module)
        limit = position_limit(self.module.policy)

        def score(readings: Sequence[Reading]) -> np.ndarray:
            return np.asarray(_rewards(definition, params, *_arrays(readings, limit)))[:, 0]

        readings = [_reading(*parts) for parts in zip(*self.readings(prompts, completions), strict=True)]
        scores: Float[np.ndarray, " P"] = _score_distinct(readings, score, self.batch_size) + np.float32(self.bias)
        return scores

    def __call__(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        *,
        finished: Sequence[Sequence[bool]] | None = None,
    ) -> Float[np.ndarray, " P"]:
        """p(first ≻ second | prompt), shape [P], float32; the two orders add up to exactly 1. See `scores`."""
        ends = None if finished is None else [*finished[0], *finished[1]]
        scores = self.scores([*prompts, *prompts], [*first, *second], finished=ends)
        return probability(scores[: len(prompts)] - scores[len(prompts) :])

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face directory with two more files: the scalar head and `reward_model.json`."""
        save(
            dataclasses.replace(self.model, module=self.module.policy),
            path,
            beside={
                "reward_head.safetensors": to_safetensors({"weight": np.asarray(self.module.weight[...])}),
                "reward_model.json": orjson.dumps(self._settings(), option=orjson.OPT_INDENT_2),
            },
        )

    @classmethod
    def load(cls, path: str | Path, *, base: LanguageModel | None = None) -> "RewardModel":
        """Read what `save` wrote.

        Args:
          path: the directory.
          base: of a model with an adapter, the model to share its base with; None to read one.

        Raises:
          ValueError: the directory holds no reward model, or its scalar head is damaged.
        """
        settings = _read_settings(Path(path), "reward_model.json", "reward model")
        try:
            weight = load_file(Path(path) / "reward_head.safetensors")["weight"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} must hold a readable reward_head.safetensors, but reading it failed: {error}. "
                "Copy the directory again or train the reward model again."
            ) from error
        result = cls.from_model(load(path, body=True, base=base), **settings)
        result.module.weight[...] = jnp.asarray(weight)
        return result


def _content(model: LanguageModel, module: Any) -> dict[str, str]:
    """Hashes of what a model computes by."""
    weights = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(nnx.state(module))}
    return {
        "weights": digest(weights),
        "architecture": digest(getattr(model.module, "config", None)),
        "tokenizer": model.tokenizer.fingerprint.hex(),
    }


def _read_settings(path: Path, name: str, kind: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = orjson.loads((path / name).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(
            f"a {kind} is a directory with a readable {name}, but reading {path / name} failed: {error}. "
            f"Give a directory that a {kind}'s save() wrote."
        ) from error
    return settings
