"""The counter-based noise of every draw: the numbers of plain `jax.random`, exact to the last of 32 bits."""

import jax
import jax.numpy as jnp
import numpy as np

from fastpref.kernels import noise

KEY = jax.random.key(42)


def test_noise_is_that_of_jax_random() -> None:
    rows, step = jnp.array([0, 1, 7, 2**31 - 1]), 11
    keys = noise.row_keys(KEY, rows, step)
    expected = [jax.random.fold_in(jax.random.fold_in(KEY, row), step) for row in rows]
    np.testing.assert_array_equal(keys, jnp.stack([jax.random.key_data(key) for key in expected]))
    counters = jnp.array([0, 5, 511, 70000])
    drawn = noise.random_bits(keys, counters, counters[::-1])
    for stream, order, bits in (
        (noise.GROUP_STREAM, counters, drawn[0]),
        (noise.TOKEN_STREAM, counters[::-1], drawn[1]),
    ):
        plain = [jax.random.bits(jax.random.fold_in(key, stream), (70001,), jnp.uint32)[order] for key in expected]
        np.testing.assert_array_equal(bits, jnp.stack(plain))


def test_gumbel_noise_uses_all_bits() -> None:
    edges = np.array([0, 1, 2, 255, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 256, 2**32 - 2, 2**32 - 1])
    bits = np.concatenate([edges, np.random.default_rng(0).integers(0, 2**32, 10_000)]).astype(np.uint32)
    value = np.asarray(noise.gumbel_from_bits(jnp.asarray(bits)), np.float64)
    uniform = (bits.astype(np.float64) + 0.5) / 2**32
    truth = -np.log(-np.log1p(-uniform))
    assert np.isfinite(value).all()
    np.testing.assert_allclose(value, truth, rtol=3e-7, atol=3e-7)
    assert len(np.unique(value[np.argsort(bits)[:3]])) == 3
    assert value.max() > 22.5
