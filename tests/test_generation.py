"""Cached two-model sampling against a slow, uncached, step-by-step mixture."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from small import PROMPTS, language_model, tokenizer

from fastpref.method.errors import CutWarning, DataError
from fastpref.models.policy import hidden_states
from fastpref.sampling.completions import Completions, ended
from fastpref.sampling.generate import generate, generate_jit, num_valid_tokens, write

FAMILIES = ["decoder", "t5"]
BETAS = [0.0, 0.125, 0.5, 1.0]
NEW = 8


def prompts(side: str = "right", width: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rows = tokenizer().encode_prompts(PROMPTS[:4])
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for row, ids in enumerate(rows):
        places = {
            "right": np.arange(len(ids)),
            "left": width - len(ids) + np.arange(len(ids)),
            # One gap after the first token.
            "middle": np.r_[0, 2 + np.arange(len(ids) - 1)],
        }[side]
        tokens[row, places], mask[row, places] = ids, True
    return tokens, mask


@functools.partial(jax.jit, static_argnames=("family", "options"))
def run(
    tokens: Any, mask: Any, betas: Any, rows: Any, *, family: str, options: tuple[tuple[str, Any], ...]
) -> Completions:
    policy, ref = language_model(family, 0).module, language_model(family, 1).module
    return generate(policy, ref, tokens, mask, mixture_beta=betas, key=jax.random.key(3), row_ids=rows, **dict(options))


def sample(
    family: str, side: str = "right", *, betas: Any = 0.125, completions: int = 2, width: int = 9, **settings: Any
) -> Completions:
    tokens, mask = prompts(side, width)
    shape = (len(tokens), completions)
    options = {"eos_id": 1, "max_new_tokens": NEW, "num_valid_tokens": 33, "temperature": 1.0} | settings
    rows = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    betas = np.broadcast_to(np.asarray(betas, np.float32), shape)
    drawn = run(tokens, mask, betas, rows, family=family, options=tuple(options.items()))
    return Completions(*map(np.asarray, drawn))


@functools.cache
def uncached(family: str, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [P, T] of the mixture, each step a full forward pass of both; their summed log-probs."""
    models = [language_model(family, seed).module for seed in (0, 1)]
    tokens, mask = prompts()
    written = np.zeros((len(tokens), 1, NEW), np.int32)
    sums = np.zeros((len(tokens), 2))
    live = np.ones(len(tokens), bool)
    forwards = [jax.jit(functools.partial(hidden_states, model)) for model in models]
    for step in range(NEW):
        logps = [
            np.asarray(jax.nn.log_softmax(model.head().logits(forward(tokens, mask, written)[:, 0, step])), np.float64)
            for model, forward in zip(models, forwards, strict=True)
        ]
        mixture = (1 - beta) * logps[0] + beta * logps[1]
        choice = np.where(live, mixture[:, :33].argmax(-1), 0)
        written[:, 0, step] = choice
        sums += live[:, None] * np.stack([logp[np.arange(len(tokens)), choice] for logp in logps], -1)
        live &= choice != 1
    return written[:, 0], sums


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_an_uncached_mixture_at_every_position(family: str) -> None:
    greedy = sample(family, betas=np.tile(BETAS, (4, 1)), completions=4, temperature=0.0)
    for column, beta in enumerate(BETAS):
        expected, sums = uncached(family, beta)
        np.testing.assert_array_equal(greedy.tokens[:, column], expected, err_msg=f"beta {beta}")
        np.testing.assert_allclose(greedy.policy_logps[:, column], sums[:, 0], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(greedy.ref_logps[:, column], sums[:, 1], rtol=1e-5, atol=1e-4)


def test_the_models_of_the_gate_differ() -> None:
    for family in FAMILIES:
        assert (uncached(family, 0.0)[0] != uncached(family, 1.0)[0]).any(), family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("side", "width"), [("left", 9), ("middle", 9), ("right", 24)])
def test_padding_changes_nothing(family: str, side: str, width: int) -> None:
    plain, padded = sample(family), sample(family, side, width=width)
    np.testing.assert_array_equal(plain.tokens, padded.tokens)
    np.testing.assert_array_equal(plain.lengths, padded.lengths)
    for field in ("policy_logps", "ref_logps", "mixture_logps"):
        np.testing.assert_allclose(getattr(plain, field), getattr(padded, field), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_includes_its_eos_and_nothing_after_it(family: str) -> None:
    drawn = sample(family, completions=16, betas=0.5, max_new_tokens=40)
    ended = 0
    for row, length in zip(drawn.tokens.reshape(-1, 40), drawn.lengths.reshape(-1), strict=True):
        assert not row[length:].any()
        assert 1 not in row[: length - 1]
        ended += row[length - 1] == 1
        assert row[length - 1] == 1 or length == 40
    assert ended > 0
    assert len(set(drawn.lengths.reshape(-1).tolist())) > 3


def test_each_of_several_tokens_ends_a_completion() -> None:
    settings: dict[str, Any] = {"completions": 16, "betas": 0.5, "max_new_tokens": 40}
    alone, drawn = sample("decoder", **settings), sample("decoder", **settings, eos_id=(1, 7, 9))
    assert ended(drawn.tokens, drawn.lengths, (1, 7, 9)).sum() > ended(alone.tokens, alone.lengths, 1).sum() > 0
    places = zip(*(one.reshape(64, *one.shape[2:]) for one in (alone.tokens, drawn.tokens, drawn.lengths)), strict=True)
    for before, row, length in places:
        # The same draws, up to the first of the three.
        first = next((at for at, token in enumerate(before) if token in (1, 7, 9)), 39)
        assert length == first + 1
        np.testing.assert_array_equal(row[:length], before[:length])
        assert not row[length:].any()


def test_writing_says_what_it_cuts_and_what_has_ended() -> None:
    long = [" ".join(["w1"] * 12), "w2 w3"]
    for side, kept in (("right", "w4 w1 w1"), ("left", "w1 w1 w5")):
        text = f"w4 {long[0]} w5"
        with pytest.warns(
            CutWarning, match=r"1 of 2 prompts \(50 %\) are cut to max_prompt_tokens=4; .* has 15 tokens"
        ):
            written = write(
                language_model(),
                [text, long[1]],
                seed=0,
                max_new_tokens=3,
                max_prompt_tokens=4,
                truncation_side=side,  # type: ignore[arg-type]
            )
        expected = tokenizer().encode_prompts([kept])[0]
        assert written.prompt_tokens[0, : written.prompt_lengths[0]].tolist() == expected
        assert expected[-1] == 1
        assert written.finished.tolist() == ended(written.tokens, written.lengths, 1).tolist()


def test_without_an_eos_every_completion_has_all_its_tokens() -> None:
    assert (sample("decoder", eos_id=None).lengths == NEW).all()


def test_tokens_past_the_tokenizer_are_never_drawn() -> None:
    assert num_valid_tokens(language_model()) == 33
    assert sample("decoder", completions=64, eos_id=None).tokens.max() < 33
    assert sample("decoder", completions=64, eos_id=None, num_valid_tokens=None).tokens.max() >= 33


def test_a_row_depends_on_its_id_and_not_on_its_place() -> None:
    model = language_model()
    definition, params = nnx.split(model.module)
    tokens, mask = prompts()
    lengths, key = mask.sum(-1).astype(np.int32), jax.random.key(5)

    def draw(order: list[int]) -> np.ndarray:
        drawn = generate_jit(
            definition,
            params,
            None,
            None,
            tokens[order],
            lengths[order],
            np.zeros((4, 1), np.float32),
            key,
            np.array(order, np.int32)[:, None],
            eos_id=1,
            max_new_tokens=NEW,
            num_valid_tokens=33,
            temperature=1.0,
        )
        return np.asarray(drawn.tokens)[:, 0]

    straight, shuffled = draw([0, 1, 2, 3]), draw([2, 0, 3, 1])
    np.testing.assert_array_equal(straight[[2, 0, 3, 1]], shuffled)


def test_mixture_log_probs_are_those_of_the_mixture() -> None:
    for beta, field in ((0.0, "policy_logps"), (1.0, "ref_logps")):
        drawn = sample("decoder", betas=beta, num_valid_tokens=None)
        np.testing.assert_allclose(drawn.mixture_logps, getattr(drawn, field), rtol=1e-6)


def test_written_text_does_not_depend_on_the_batch_size() -> None:
    model, ref = language_model("t5"), language_model("t5", 1)
    results = [
        write(model, PROMPTS[:5], seed=1, max_new_tokens=6, completions=2, ref=ref, batch_size=size) for size in (2, 5)
    ]
    assert results[0].texts == results[1].texts
    assert [len(texts) for texts in results[0].texts] == [2] * 5
    np.testing.assert_allclose(results[0].ref_logps, results[1].ref_logps, rtol=1e-5)
    assert (results[0].ref_logps != results[0].policy_logps).all()


def test_sequences_are_drawn_with_their_probabilities() -> None:
    """First tokens of one prompt, counted against the exact mixture by a chi-square test."""
    tokens, mask = (x[:1] for x in prompts())
    draws = 20_000
    rows, betas = np.arange(draws, dtype=np.int32)[None], np.full((1, draws), 0.5, np.float32)
    options = (("eos_id", None), ("max_new_tokens", 1))
    drawn = np.asarray(run(tokens, mask, betas, rows, family="decoder", options=options).tokens).reshape(-1)
    unread = np.zeros((1, 1, 1), np.int32)
    logps = [
        jax.nn.log_softmax(
            model.head().logits(jax.jit(functools.partial(hidden_states, model))(tokens, mask, unread)[:, 0, 0])
        )
        for model in (language_model("decoder", seed).module for seed in (0, 1))
    ]
    exact = np.asarray(jax.nn.softmax(0.5 * logps[0] + 0.5 * logps[1]))[0]
    counts = np.bincount(drawn, minlength=len(exact))
    statistic = ((counts - draws * exact) ** 2 / (draws * exact)).sum()
    # 99.9 % quantile of chi-square with 35 degrees of freedom.
    assert statistic < 66.6


def test_an_encoder_reads_prompts_alone_whatever_the_tokenizer_was_made_for() -> None:
    bare = tokenizer.__wrapped__()
    bare.backend.post_processor = None
    assert not bare.encoder_decoder
    assert dataclasses.replace(language_model("t5"), tokenizer=bare).tokenizer.encoder_decoder
    assert not dataclasses.replace(language_model(), tokenizer=bare).tokenizer.encoder_decoder


def test_an_empty_prompt_is_refused() -> None:
    bare = tokenizer.__wrapped__()
    bare.backend.post_processor = None
    with pytest.raises(DataError, match=r"record 1: the prompt must hold more than white space"):
        write(dataclasses.replace(language_model(), tokenizer=bare), ["w1", ""], seed=0, max_new_tokens=2)
