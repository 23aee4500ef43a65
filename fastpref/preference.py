"""Preference and reward models: judges that are language models, trained here from recorded preferences."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orjson
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fastpref.generation import round_up
from fastpref.kernels import Head
from fastpref.models import LanguageModel, load, save
from fastpref.models.policy import Policy

SUMMARY_PROMPT = (
    "You are an expert summary rater. Given a piece of text and two of its possible summaries, "
    "output 1 or 2 to indicate which summary is better. "
    "Text - {prompt}, Summary 1 - {first}, Summary 2 - {second} Preferred Summary -"
)
"""The papers' prompt for side-by-side comparison (IPO-MD, section 6)."""

FIELDS = re.compile(r"(\{prompt\}|\{first\}|\{second\})")


def answer_logits(
    policy: Policy, tokens: Int[Array, "N S"], lengths: Int[Array, " N"], answers: Int[Array, " 2"]
) -> Float[Array, " N"]:
    """Logit of the first answer token minus that of the second, right after reading each text, shape [N]."""
    mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
    unread = jnp.zeros((tokens.shape[0], 1, 1), jnp.int32)
    hidden = policy.hidden_states(tokens, mask, unread)[:, 0, 0]
    head = policy.head()
    pair = Head(jnp.take(head.weight, answers, axis=head.vocab_axis), head.vocab_axis, head.scale, head.soft_cap)
    logits = pair.logits(hidden)
    return logits[:, 0] - logits[:, 1]


def rewards(
    module: "ScoredPolicy",
    prompt_tokens: Int[Array, "P S"],
    prompt_mask: Bool[Array, "P S"],
    completion_tokens: Int[Array, "P K T"],
    completion_lengths: Int[Array, "P K"],
) -> Float[Array, "P K"]:
    """Scalar reward of each completion, read off the state after its last token, shape [P, K], float32."""
    # One more position, so that the state after the last token of a full-length completion exists.
    padded = jnp.pad(completion_tokens, ((0, 0), (0, 0), (0, 1)))
    hidden = module.policy.hidden_states(prompt_tokens, prompt_mask, padded)
    last = jnp.take_along_axis(hidden, completion_lengths[:, :, None, None], axis=2)[:, :, 0]
    return (last.astype(jnp.float32) * module.weight[...].astype(jnp.float32)[None, None, :]).sum(-1)


class ScoredPolicy(nnx.Module):
    """A policy's body with a scalar head: weight of shape [D], zeros at the start."""

    def __init__(self, policy: Any, width: int) -> None:
        self.policy = policy
        self.weight = nnx.Param(jnp.zeros(width, jnp.float32))


def bradley_terry(margin: Float[Array, " N"], preference: Float[Array, " N"]) -> Float[Array, " N"]:
    """Cross-entropy of σ(margin) with a soft label: −p·log σ(m) − (1 − p)·log σ(−m), shape [N] (IPO-MD, eq. 2)."""
    return -preference * jax.nn.log_sigmoid(margin) - (1 - preference) * jax.nn.log_sigmoid(-margin)


def probability(margin: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """σ(margin) in float32, such that probability(m) + probability(−m) is exactly 1."""
    lower = 1 / (1 + np.exp(np.abs(margin.astype(np.float64))))
    lower = lower.astype(np.float32)
    return np.where(margin >= 0, np.float32(1) - lower, lower).astype(np.float32)


@partial(jax.jit, static_argnames=("definition",))
def _answer_logits(definition: Any, params: Any, tokens: Array, lengths: Array, answers: Array) -> Array:
    return answer_logits(nnx.merge(definition, params), tokens, lengths, answers)


@partial(jax.jit, static_argnames=("definition",))
def _rewards(definition: Any, params: Any, *batch: Array) -> Array:
    prompt_tokens, prompt_lengths, completion_tokens, completion_lengths = batch
    mask = jnp.arange(prompt_tokens.shape[1])[None, :] < prompt_lengths[:, None]
    return rewards(nnx.merge(definition, params), prompt_tokens, mask, completion_tokens, completion_lengths)


def _padded(rows: Sequence[Sequence[int]], multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Rows as [N, S] int32 with S a multiple, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), round_up(max(1, int(lengths.max(initial=1))), multiple)), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, lengths


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
      max_tokens: longest reading; the prompt is shortened where a reading is longer.
      batch_size: readings scored at once.

    Raises:
      ValueError: a template without one of its three fields, or an answer that is not a single token.
    """

    model: LanguageModel
    template: str = SUMMARY_PROMPT
    answers: tuple[str, str] = ("1", "2")
    symmetric: bool = True
    max_tokens: int = 512
    batch_size: int = 64

    def __post_init__(self) -> None:
        missing = [field for field in ("{prompt}", "{first}", "{second}") if field not in self.template]
        if missing:
            raise ValueError(
                f"a template must contain {{prompt}}, {{first}} and {{second}}, but {missing[0]} is missing from "
                f"{self.template!r}. Add it."
            )
        self.answer_ids()

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

    def readings(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[list[int]]:
        """What the model reads for each pair, as token ids; a prompt is cut where the whole would be too long."""
        tokenizer = self.model.tokenizer

        def fill(prompt: str, one: str, two: str) -> str:
            pieces = {"{prompt}": prompt, "{first}": one, "{second}": two}
            # Braces in the texts themselves must stay as they are, so the template is split, not formatted.
            return "".join(pieces.get(piece, piece) for piece in FIELDS.split(self.template))

        encoded = tokenizer.encode_prompts([fill(*texts) for texts in zip(prompts, first, second, strict=True)])
        for index, tokens in enumerate(encoded):
            if len(tokens) > self.max_tokens:
                body = tokenizer.encode_completions([prompts[index]])[0][:-1]
                kept = body[: max(0, len(body) - (len(tokens) - self.max_tokens))]
                short = tokenizer.decode([kept])[0]
                again = tokenizer.encode_prompts([fill(short, first[index], second[index])])[0]
                # Cutting text can add a token or two at the seam; the answer cue at the end is what must stay.
                encoded[index] = again[-self.max_tokens :]
        return encoded

    def margins(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, " P"]:
        """Logit of "the first is better", shape [P], float32; antisymmetric where `symmetric`."""
        if not self.symmetric:
            return self._score(self.readings(prompts, first, second))
        # The same reading order for (y, y') and (y', y), so that the two answers are exact opposites.
        flipped = np.array([one > two for one, two in zip(first, second, strict=True)], bool)
        low = [min(pair) for pair in zip(first, second, strict=True)]
        high = [max(pair) for pair in zip(first, second, strict=True)]
        forward, backward = np.split(
            self._score(self.readings(prompts, low, high) + self.readings(prompts, high, low)), 2
        )
        margin = (forward - backward) / 2
        signed: Float[np.ndarray, " P"] = np.where(flipped, -margin, margin).astype(np.float32)
        return signed

    def _score(self, encoded: list[list[int]]) -> Float[np.ndarray, " N"]:
        definition, params = nnx.split(self.model.module)
        scores = []
        for start in range(0, len(encoded), self.batch_size):
            part = encoded[start : start + self.batch_size]
            tokens, lengths = _padded(part + [part[0]] * (self.batch_size - len(part)))
            scores.append(
                np.asarray(_answer_logits(definition, params, tokens, lengths, self.answer_ids()))[: len(part)]
            )
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, " P"]:
        """p(first ≻ second | prompt), shape [P], float32."""
        return probability(self.margins(prompts, first, second))

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face directory with one more file, `preference_model.json`."""
        (Path(path) / "preference_model.json").unlink(missing_ok=True)
        save(self.model, path)
        settings = {
            "template": self.template,
            "answers": list(self.answers),
            "symmetric": self.symmetric,
            "max_tokens": self.max_tokens,
        }
        (Path(path) / "preference_model.json").write_bytes(orjson.dumps(settings, option=orjson.OPT_INDENT_2))

    @classmethod
    def load(cls, path: str | Path) -> "PreferenceModel":
        """Read what `save` wrote.

        Raises:
          ValueError: the directory holds no preference model.
        """
        settings = _read_settings(Path(path), "preference_model.json", "preference model")
        settings["answers"] = tuple(settings["answers"])
        return cls(load(path), **settings)


@dataclass(frozen=True)
class RewardModel:
    """A scalar reward r(x, y), as a judge by Bradley-Terry: p(y ≻ y') = σ(r(x, y) − r(x, y')) (IPO-MD, eq. 2).

    Args:
      model: the language model whose body is used, and its tokenizer.
      module: the body with its scalar head.
      max_prompt_tokens: longest prompt; longer ones keep their first tokens.
      batch_size: completions scored at once.
    """

    model: LanguageModel
    module: ScoredPolicy
    max_prompt_tokens: int = 512
    batch_size: int = 64

    @classmethod
    def from_model(cls, model: LanguageModel, **settings: int) -> "RewardModel":
        """A reward model on a language model's body, its scalar head at zero."""
        head = model.module.head()
        width = head.weight.shape[1 - head.vocab_axis]
        return cls(model, ScoredPolicy(nnx.clone(model.module), width), **settings)

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> Float[np.ndarray, " P"]:
        """r(x, y) of each completion, shape [P], float32."""
        tokenizer = self.model.tokenizer
        read = [tokens[: self.max_prompt_tokens] for tokens in tokenizer.encode_prompts(list(prompts))]
        written = tokenizer.encode_completions(list(completions))
        definition, params = nnx.split(self.module)
        scores = []
        for start in range(0, len(read), self.batch_size):
            stop = min(start + self.batch_size, len(read))
            filler = [start] * (self.batch_size - (stop - start))
            rows = [*range(start, stop), *filler]
            tokens, lengths = _padded([read[row] for row in rows])
            texts, text_lengths = _padded([written[row] for row in rows])
            part = _rewards(definition, params, tokens, lengths, texts[:, None, :], text_lengths[:, None])
            scores.append(np.asarray(part)[: stop - start, 0])
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, " P"]:
        """p(first ≻ second | prompt), shape [P], float32; the two orders add up to exactly 1."""
        scores = self.scores([*prompts, *prompts], [*first, *second])
        return probability(scores[: len(prompts)] - scores[len(prompts) :])

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face directory with two more files: the scalar head and `reward_model.json`."""
        for name in ("reward_model.json", "reward_head.safetensors"):
            (Path(path) / name).unlink(missing_ok=True)
        save(dataclasses.replace(self.model, module=self.module.policy), path)
        save_file({"weight": np.asarray(self.module.weight[...])}, Path(path) / "reward_head.safetensors")
        settings = {"max_prompt_tokens": self.max_prompt_tokens}
        (Path(path) / "reward_model.json").write_bytes(orjson.dumps(settings, option=orjson.OPT_INDENT_2))

    @classmethod
    def load(cls, path: str | Path) -> "RewardModel":
        """Read what `save` wrote.

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
        result = cls.from_model(load(path), **settings)
        result.module.weight[...] = jnp.asarray(weight)
        return result


def _read_settings(path: Path, name: str, kind: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = orjson.loads((path / name).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(
            f"a {kind} is a directory with a readable {name}, but reading {path / name} failed: {error}. "
            f"Give a directory that a {kind}'s save() wrote."
        ) from error
    return settings
