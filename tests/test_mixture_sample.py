"""Mixture sampling, all implementations: tokens by the definition, values against float64, what a draw depends on."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from kernel_cases import (
    LARGE,
    SMALL,
    Case,
    assert_as_exact,
    every_case,
    every_fast_one,
    every_implementation,
    float64,
    interpreted_tpu,
    make_head,
    make_hidden,
    products,
    true_log_softmax,
    true_logits,
)
from scipy import stats

from fastpref.kernels import Head, MixtureSample, mixture_sample, noise
from fastpref.kernels.mixture_sampling.xla import mixture_sample as tiled

pytestmark = interpreted_tpu
KEY = jax.random.key(42)
BETAS = (0.0, 1.0, 0.125, 0.5)
NEAR_TIE = 1e-4
"""Two scores closer than this may change places with the rounding of a logit."""


def betas(rows: int) -> Array:
    return jnp.resize(jnp.asarray(BETAS), (rows,))


compiled = jax.jit(mixture_sample, static_argnames=("temperature", "num_valid_tokens", "implementation"))


def draw(
    case: Case, implementation: str, step: int | Array = 0, sample: Callable[..., MixtureSample] = compiled, **changes
) -> MixtureSample:
    keywords: dict[str, object] = {
        "mixture_beta": betas(case.rows),
        "key": KEY,
        "row_ids": 3 * jnp.arange(case.rows),
        "step": step,
    }
    return sample(
        make_hidden(case),
        make_head(case),
        make_hidden(case, 1),
        make_head(case, 1),
        implementation=implementation,
        **(keywords | changes),
    )


def true_mixture(case: Case, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of the policy, of the reference and of their mixture."""
    policy = true_logits(make_hidden(case), make_head(case))
    ref = true_logits(make_hidden(case, 1), make_head(case, 1))
    beta = float64(betas(case.rows))[:, None]
    return policy, ref, ((1 - beta) * policy + beta * ref) / temperature


def true_gumbel(row_ids: Array, step: int, stream: int, size: int) -> np.ndarray:
    """Noise by plain `jax.random`, its logarithms in float64."""

    def bits(row: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(KEY, row), step)
        return jax.random.bits(jax.random.fold_in(key, stream), (size,), jnp.uint32)

    uniform = (np.asarray(jax.vmap(bits)(row_ids), np.float64) + 0.5) / 2**32
    return -np.log(-np.log1p(-uniform))


def true_scores(mixture: np.ndarray, row_ids: Array, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scores of the groups of each row, and scores of the tokens in the winning group."""
    rows, vocab = mixture.shape
    groups = -(-vocab // 512)
    padded = np.full((rows, groups * 512), -np.inf)
    padded[:, :vocab] = mixture
    blocks = padded.reshape(rows, groups, 512)
    top = blocks.max(axis=2)
    lse = top + np.log(np.exp(blocks - top[:, :, None]).sum(axis=2))
    group_scores = lse + true_gumbel(row_ids, step, 0, groups)
    token_noise = true_gumbel(row_ids, step, 1, 512)
    winners = group_scores.argmax(axis=1)
    return group_scores, [blocks[row, winners[row]] + token_noise[row] for row in range(rows)]


def margin(scores: np.ndarray) -> float:
    """Lead of the best score."""
    best = np.sort(scores)[-2:]
    return float(best[-1] - best[0]) if len(best) == 2 else np.inf


@every_fast_one
@every_case
def test_log_probs_are_as_exact_as_ordinary_jax(case: Case, implementation: str) -> None:
    ordinary, ours = draw(case, "reference", temperature=0.7), draw(case, implementation, temperature=0.7)
    np.testing.assert_array_equal(ours.token, ordinary.token)
    chosen = np.arange(case.rows), np.asarray(ours.token)
    policy, ref, mixture = true_mixture(case, 0.7)
    for field, logits in (("policy_logp", policy), ("ref_logp", ref), ("mixture_logp", mixture)):
        truth = true_log_softmax(logits)[chosen]
        assert_as_exact(getattr(ours, field), getattr(ordinary, field), truth, "float32")


@every_implementation
@pytest.mark.parametrize("case", [SMALL[3], SMALL[6], LARGE[0]], ids=str)
def test_tokens_are_those_of_the_definition(case: Case, implementation: str) -> None:
    near_ties, total = 0, 0
    _, _, mixture = true_mixture(case)
    for step in range(30):
        tokens = np.asarray(draw(case, implementation, step).token)
        groups, within = true_scores(mixture, 3 * jnp.arange(case.rows), step)
        expected = groups.argmax(axis=1) * 512 + np.array([scores.argmax() for scores in within])
        for row in np.flatnonzero(tokens != expected):
            assert min(margin(groups[row]), margin(within[row])) < NEAR_TIE
            near_ties += 1
        total += case.rows
    assert near_ties <= 0.005 * total + 1


@pytest.mark.parametrize(
    ("vocab", "temperature", "implementation"),
    [(17, 1.0, "xla"), (700, 1.0, "xla"), (700, 0.6, "xla"), (700, 1.0, "tpu"), (700, 1.0, "reference")],
)
def test_draws_have_the_distribution_of_the_mixture(vocab: int, temperature: float, implementation: str) -> None:
    rows, beta = 30_000, 0.3
    case = Case(vocab, rows=1, width=4, scale=0.7)
    sample = compiled(
        jnp.repeat(make_hidden(case), rows, axis=0), make_head(case),
        jnp.repeat(make_hidden(case, 1), rows, axis=0), make_head(case, 1),
        mixture_beta=beta, key=KEY, row_ids=jnp.arange(rows), step=0, temperature=temperature,
        implementation=implementation,
    )  # fmt: skip
    policy, ref = (true_logits(make_hidden(case, seed), make_head(case, seed))[0] for seed in (0, 1))
    counts = np.bincount(sample.token, minlength=vocab)

    def p_value(beta: float) -> float:
        expected = rows * np.exp(true_log_softmax(((1 - beta) * policy + beta * ref) / temperature))
        common = expected >= 5
        observed = np.append(counts[common], counts[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
        kept = expected > 0
        return float(stats.chisquare(observed[kept], expected[kept]).pvalue)

    assert p_value(beta) > 1e-3
    assert p_value(beta + 0.1) < 1e-6


@pytest.mark.slow
def test_ten_million_draws_from_a_large_vocabulary() -> None:
    """Down to tokens of probability 10⁻⁹, which coarse uniforms draw too often or never.

    A draw is what the two levels of noise make of fixed logits, so it costs 763 random numbers instead of all logits
    anew; that it is the kernel's draw is checked on the first of them.
    """
    vocab, batch, batches = 128256, 20_000, 500
    case = Case(vocab, rows=1, width=4, scale=2.0)
    logits = jnp.asarray(true_logits(make_hidden(case), make_head(case))[0], jnp.float32)
    groups = -(-vocab // 512)
    padded = jnp.pad(logits, (0, groups * 512 - vocab), constant_values=-jnp.inf).reshape(groups, 512)
    lse = jax.nn.logsumexp(padded, axis=1)

    @jax.jit
    def draws(first: Array) -> Array:
        keys = noise.row_keys(KEY, first + jnp.arange(batch), 0)
        group_noise, token_noise = noise.gumbel(keys, jnp.arange(groups), jnp.arange(512))
        group = jnp.argmax(lse[None, :] + group_noise, axis=1)
        return group * 512 + jnp.argmax(padded[group] + token_noise, axis=1)

    few = 64
    kernel = compiled(
        jnp.repeat(make_hidden(case), few, axis=0), make_head(case), jnp.repeat(make_hidden(case), few, axis=0),
        make_head(case), mixture_beta=0.0, key=KEY, row_ids=jnp.arange(few), step=0, implementation="xla",
    )  # fmt: skip
    np.testing.assert_array_equal(kernel.token, draws(jnp.int32(0))[:few])

    counts = np.zeros(vocab, np.int64)
    for number in range(batches):
        counts += np.bincount(draws(jnp.int32(number * batch)), minlength=vocab)
    total = batch * batches
    probability = np.exp(true_log_softmax(np.asarray(logits, np.float64)))
    order = np.argsort(-probability)
    expected, observed = total * probability[order], counts[order]
    # Bins of tokens of like probability: equal parts of the mass, and equal parts of what is in the tail.
    tail = int(np.argmax(expected < 1.0))
    parts = [
        first + np.searchsorted(np.cumsum(mass), np.linspace(0, mass.sum(), count, endpoint=False))
        for first, mass, count in ((0, expected[:tail], 2000), (tail, expected[tail:], 10))
    ]
    edges = np.unique(np.concatenate(parts))
    folded = [np.add.reduceat(one, edges) for one in (expected, observed)]
    assert folded[0][-1] >= 50
    assert edges[-1] > tail
    assert stats.chisquare(folded[1], folded[0] * folded[1].sum() / folded[0].sum()).pvalue > 1e-3
    drawn_of_tail = observed[tail:].sum()
    assert abs(drawn_of_tail - expected[tail:].sum()) < 4 * np.sqrt(expected[tail:].sum())
    wrong = folded[0] * (1 + 0.01 * (np.arange(len(folded[0])) % 2 * 2 - 1))
    assert stats.chisquare(folded[1], wrong * folded[1].sum() / wrong.sum()).pvalue < 1e-6


@every_implementation
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], LARGE[0]], ids=str)
def test_temperature_zero_is_greedy(case: Case, implementation: str) -> None:
    sample = draw(case, implementation, temperature=0.0)
    np.testing.assert_array_equal(sample.token, true_mixture(case)[2].argmax(axis=1))
    np.testing.assert_array_equal(sample.mixture_logp, 0)
    other = draw(case, implementation, temperature=0.0, step=9, key=jax.random.key(1))
    np.testing.assert_array_equal(other.token, sample.token)
    assert np.all(sample.policy_logp < 0)


@every_implementation
def test_ties_go_to_the_lowest_id(implementation: str) -> None:
    weight = jnp.zeros((1100, 2)).at[jnp.array([600, 700, 1050])].set(1.0)
    hidden, head = jnp.ones((3, 2)), Head(weight)
    sample = compiled(
        hidden, head, hidden, head, mixture_beta=0.5, key=KEY, row_ids=jnp.arange(3), step=0, temperature=0.0,
        implementation=implementation,
    )  # fmt: skip
    assert sample.token.tolist() == [600] * 3


def masked_head(case: Case, ids: Array, seed: int = 0) -> Head:
    """A head whose logits of these ids are −inf where the first component of the state is positive."""
    return make_head(case, seed).with_weight(make_head(case, seed).weight.at[ids, 0].set(-jnp.inf))


@every_implementation
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_the_ends_of_beta_are_one_model_exactly(implementation: str, temperature: float) -> None:
    case = Case(600, rows=40)
    policy, ref = (make_hidden(case, seed).at[:, 0].set(1.0) for seed in (0, 1))
    even, odd = jnp.arange(0, 600, 2), jnp.arange(1, 600, 2)
    common = {
        "key": KEY, "row_ids": jnp.arange(40), "step": 0, "temperature": temperature, "implementation": implementation
    }  # fmt: skip
    odd_only, even_only = masked_head(case, even), masked_head(case, odd, 1)
    at_policy = compiled(policy, odd_only, ref, even_only, mixture_beta=0.0, **common)
    at_ref = compiled(policy, odd_only, ref, even_only, mixture_beta=1.0, **common)
    assert np.all(np.asarray(at_policy.token) % 2 == 1)
    assert np.all(np.asarray(at_ref.token) % 2 == 0)
    np.testing.assert_array_equal(at_policy.ref_logp, -np.inf)
    assert np.isfinite(at_policy.policy_logp).all()
    # The other model may be anything at all.
    nothing = jnp.full_like(ref, jnp.nan)
    alone = compiled(policy, odd_only, nothing, even_only, mixture_beta=jnp.zeros(40), **common)
    np.testing.assert_array_equal(alone.token, at_policy.token)
    np.testing.assert_array_equal(alone.policy_logp, at_policy.policy_logp)
    np.testing.assert_array_equal(alone.mixture_logp, at_policy.mixture_logp)
    if temperature == 1:
        np.testing.assert_allclose(at_policy.mixture_logp, at_policy.policy_logp, rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(at_ref.mixture_logp, at_ref.ref_logp, rtol=1e-6, atol=2e-6)


@every_implementation
def test_masked_tokens_are_never_drawn(implementation: str) -> None:
    case = Case(600, rows=64)
    policy, ref = (make_hidden(case, seed).at[:, 0].set(1.0) for seed in (0, 1))
    heads = masked_head(case, jnp.arange(0, 590)), masked_head(case, jnp.arange(595, 600), 1)
    sample = compiled(
        policy, heads[0], ref, heads[1], mixture_beta=0.5, key=KEY, row_ids=jnp.arange(64), step=0,
        implementation=implementation,
    )  # fmt: skip
    assert set(sample.token.tolist()) <= set(range(590, 595))
    assert all(np.isfinite(field).all() for field in sample)
    nothing_left = compiled(
        policy, masked_head(case, jnp.arange(600)), ref, heads[1], mixture_beta=0.5, key=KEY,
        row_ids=jnp.arange(64), step=0, implementation=implementation,
    )  # fmt: skip
    np.testing.assert_array_equal(nothing_left.token, -1)
    assert np.isnan(nothing_left.mixture_logp).all()


@every_implementation
def test_a_draw_depends_on_its_row_id_alone(implementation: str) -> None:
    case = Case(1000, rows=32)
    hidden, ref = make_hidden(case), make_hidden(case, 1)
    rows = jnp.arange(32) * 5 + 1

    def tokens(index: Array, row_ids: Array, step: int = 3, key: Array = KEY) -> np.ndarray:
        sample = compiled(
            hidden[index], make_head(case), ref[index], make_head(case, 1), mixture_beta=betas(32)[index], key=key,
            row_ids=row_ids, step=step, implementation=implementation,
        )  # fmt: skip
        return np.asarray(sample.token)

    everything = jnp.arange(32)
    plain = tokens(everything, rows)
    order = jax.random.permutation(jax.random.key(0), 32)
    np.testing.assert_array_equal(tokens(order, rows[order]), plain[order])
    padded = jnp.concatenate([everything, everything[:5]])
    np.testing.assert_array_equal(tokens(padded, rows[padded])[:32], plain)
    for row in range(3):
        np.testing.assert_array_equal(tokens(everything[row : row + 1], rows[row : row + 1]), plain[row : row + 1])
    raw = jax.random.key_data(KEY)
    np.testing.assert_array_equal(tokens(everything, rows, key=raw), plain)
    for other in (tokens(everything, rows + 1), tokens(everything, rows, 4), tokens(everything, rows, 3, raw + 1)):
        assert np.mean(other == plain) < 0.5


@pytest.mark.parametrize(
    ("case", "block", "vocab_axis"),
    [
        (Case(1000, rows=32), 1, 0),
        (Case(1000, rows=32), 5, 1),
        (Case(768, rows=32, vocab_axis=1), 7, 0),
        (Case(768, rows=32, vocab_axis=1), 32, 1),
    ],
    ids=str,
)
def test_blocks_and_layouts_change_nothing(case: Case, block: int, vocab_axis: int) -> None:
    override = partial(tiled, block=block, vocab_axis=vocab_axis)

    def sample(*arguments: Array | Head, mixture_beta: Array, key: Array, row_ids: Array, step: int) -> MixtureSample:
        return override(
            *arguments, mixture_beta=mixture_beta, key=jax.random.key_data(key), row_ids=row_ids,
            step=jnp.asarray(step), temperature=0.9, num_valid_tokens=700,
        )  # fmt: skip

    ours = draw(case, "", sample=lambda *arguments, implementation, **rest: jax.jit(sample)(*arguments, **rest))
    plain = draw(case, "reference", temperature=0.9, num_valid_tokens=700)
    np.testing.assert_array_equal(ours.token, plain.token)
    for value, other in zip(ours[1:], plain[1:], strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=5e-6)


@every_implementation
@pytest.mark.parametrize("valid", [1, 100, 513, 999])
def test_ids_past_the_valid_tokens_are_never_drawn(valid: int, implementation: str) -> None:
    case = Case(1000, rows=200, scale=0.3)
    sample = draw(case, implementation, num_valid_tokens=valid)
    token = np.asarray(sample.token)
    assert 0 <= token.min() <= token.max() < valid
    assert len(set(token.tolist())) >= min(valid, 50)
    policy, _, mixture = true_mixture(case)
    rows = np.arange(case.rows)
    np.testing.assert_allclose(sample.policy_logp, true_log_softmax(policy)[rows, token], rtol=2e-5)
    np.testing.assert_allclose(
        sample.mixture_logp, true_log_softmax(mixture[:, :valid])[rows, token], rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_weight_is_read_once(dtype: str) -> None:
    case = Case(1000, rows=5, dtype=dtype)
    head, hidden, ref = make_head(case), make_hidden(case), make_hidden(case, 1)

    def sample(head: Head, ref_head: Head) -> MixtureSample:
        return mixture_sample(
            hidden, head, ref, ref_head, mixture_beta=betas(5), key=KEY, row_ids=jnp.arange(5), step=0,
            implementation="xla",
        )  # fmt: skip

    copy = head.with_weight(head.weight + 0)
    assert products(lambda: sample(head, head)) == 1
    assert products(lambda: sample(head, copy)) == 2
    assert products(lambda: sample(head, Head(head.weight, scale=0.5))) == 2
    shared, apart = jax.jit(lambda: sample(head, head))(), jax.jit(lambda: sample(head, copy))()
    np.testing.assert_array_equal(shared.token, apart.token)
    for one, two in zip(shared[1:], apart[1:], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)


@every_fast_one
def test_models_may_differ_in_width(implementation: str) -> None:
    narrow, wide = Case(513, rows=9, width=4), Case(513, rows=9, width=12, vocab_axis=1, dtype="bfloat16")
    arguments = make_hidden(narrow), make_head(narrow), make_hidden(wide), make_head(wide)
    keywords = {"mixture_beta": 0.5, "key": KEY, "row_ids": jnp.arange(9), "step": 0}
    ours, ordinary = (compiled(*arguments, **keywords, implementation=name) for name in (implementation, "reference"))
    np.testing.assert_array_equal(ours.token, ordinary.token)
    np.testing.assert_allclose(ours.ref_logp, ordinary.ref_logp, rtol=1e-5)


def test_jit_and_vmap_change_nothing() -> None:
    case = Case(513, rows=8)
    sample = partial(draw, case, "xla")
    steps = jnp.arange(4)
    looped = jnp.stack([sample(int(step)).token for step in steps])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda step: sample(step).token))(steps), looped)
    _, scanned = jax.lax.scan(lambda carry, step: (carry, sample(step).token), None, steps)
    np.testing.assert_array_equal(scanned, looped)
    by_beta = jax.vmap(lambda beta: sample(0, mixture_beta=beta).token)(jnp.array([0.0, 0.7]))
    np.testing.assert_array_equal(by_beta[1], sample(0, mixture_beta=0.7).token)


@every_implementation
def test_the_flag_of_jax_random_changes_nothing(implementation: str) -> None:
    plain = draw(SMALL[5], implementation)
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(draw(SMALL[5], implementation).token, plain.token)


def test_errors_say_rule_value_and_remedy() -> None:
    case = SMALL[0]
    plain = partial(draw, sample=mixture_sample)
    with pytest.raises(
        ValueError, match=r"mixture_beta must lie in \[0, 1\], but received values between 1\.5 and 1\.5\. Pass a"
    ):
        plain(case, "xla", mixture_beta=1.5)
    with pytest.raises(ValueError, match=r"mixture_beta must lie in \[0, 1\], but received values between nan and nan"):
        plain(case, "xla", mixture_beta=jnp.full(case.rows, jnp.nan))
    with pytest.raises(
        ValueError, match=r"temperature must be a Python number of at least 0, but received -0\.5\. Pass 0"
    ):
        plain(case, "xla", temperature=-0.5)
    with pytest.raises(
        ValueError, match=r"num_valid_tokens must lie in \[1, V = 17\], but received 18\. Pass None for all"
    ):
        plain(case, "xla", num_valid_tokens=18)
    with pytest.raises(ValueError, match=r"must be of threefry2x32, but received rbg\. Make it with jax\.random\.key"):
        plain(case, "xla", key=jax.random.key(0, impl="rbg"))
    with pytest.raises(
        ValueError, match=r"one of threefry, uint32\[2\], but received uint32\[3, 2\]\. Make it with jax\.random"
    ):
        plain(case, "xla", key=jax.random.split(KEY, 3))
    with pytest.raises(ValueError, match=r"uint32\[2\], but received uint32\[4\]"):
        plain(case, "xla", key=jax.random.key_data(jax.random.key(0, impl="rbg")))
    with pytest.raises(
        ValueError,
        match=r"the implementation of mixture_sample must be one of .* or None, but received 'fast'\. Pass None",
    ):
        plain(case, "fast")
    hidden = make_hidden(case)
    other = make_head(Case(18))
    keywords = {"mixture_beta": 0.5, "key": KEY, "row_ids": jnp.arange(24), "step": 0}
    with pytest.raises(ValueError, match=r"must have one vocabulary, but received V = 17 and 18\. Pad the smaller"):
        mixture_sample(hidden, make_head(case), hidden, other, **keywords)
    with pytest.raises(
        ValueError, match=r"ref_hidden and its head's weight must have one dtype, but received bfloat16 and float32"
    ):
        mixture_sample(hidden, make_head(case), hidden.astype(jnp.bfloat16), make_head(case), **keywords)
