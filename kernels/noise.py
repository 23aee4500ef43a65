"""Counter-based random numbers: the same for a row wherever it stands, and on every backend.

A number is named by (key, row id, step, stream, counter). The key of a row is
`fold_in(fold_in(key, row_id), step)`; stream s of it is `jax.random.bits(fold_in(row_key, s), (n,), uint32)`, of which
the counter is the index. So plain `jax.random` gives the same numbers; here they are computed from their counters
alone, which a kernel can do for any part of them, in any order. Threefry-2x32: Salmon et al., SC 2011.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

GROUP_STREAM = 0
"""One number per group of token ids: it chooses the group."""
TOKEN_STREAM = 1
"""One number per place within a group: it chooses the token. The groups share them: only one group is ever drawn."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def key_words(key: Array) -> UInt32[Array, " 2"]:
    """The two words of a threefry key.

    Args:
      key: `jax.random.key(seed)`, or the raw uint32[2] of `jax.random.PRNGKey(seed)`.

    Raises:
      ValueError: for another generator, whose numbers depend on the backend and the number of shards, or another shape.
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        name = str(jax.random.key_impl(key))
        if name != "threefry2x32":
            raise ValueError(
                f"the key of a draw must be of threefry2x32, but received {name}. "
                "Make it with jax.random.key(seed, impl='threefry2x32')."
            )
        words = jax.random.key_data(key)
    else:
        words = key
    if words.dtype != jnp.uint32 or words.shape != (2,):
        raise ValueError(
            f"the key of a draw must be one of threefry, uint32[2], but received {words.dtype}{list(words.shape)}. "
            "Make it with jax.random.key(seed)."
        )
    return words


def threefry(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]], count: tuple[UInt32[Array, "..."], UInt32[Array, "..."]]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Threefry-2x32 with 20 rounds: two words for two words. Only additions, shifts and exclusive ors."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = count[0] + schedule[0], count[1] + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x, y = x + schedule[(block + 1) % 3], y + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return x, y


def row_keys(key: Array, row_ids: Int[Array, " B"], step: Int[Array, ""] | int) -> UInt32[Array, "B 2"]:
    """`fold_in(fold_in(key, row_id), step)` of every row."""
    first, second = key_words(key)
    rows = row_ids.astype(jnp.uint32)
    zeros = jnp.zeros_like(rows)
    words = threefry((jnp.broadcast_to(first, rows.shape), jnp.broadcast_to(second, rows.shape)), (zeros, rows))
    words = threefry(words, (zeros, jnp.broadcast_to(jnp.asarray(step).astype(jnp.uint32), rows.shape)))
    return jnp.stack(words, axis=1)


def random_bits(
    keys: UInt32[Array, "B 2"], group_counters: Int[Array, " G"], token_counters: Int[Array, " T"]
) -> tuple[UInt32[Array, "B G"], UInt32[Array, "B T"]]:
    """Entries of `jax.random.bits(fold_in(row_key, stream), ..., uint32)` of every row, for both streams.

    Both come from one evaluation: each is 20 rounds to compile.
    """
    rows, groups, tokens = keys.shape[0], group_counters.shape[0], token_counters.shape[0]
    streams = jnp.broadcast_to(jnp.array([[GROUP_STREAM, TOKEN_STREAM]], jnp.uint32), (rows, 2))
    row_words = [jnp.broadcast_to(word[:, None], (rows, 2)) for word in (keys[:, 0], keys[:, 1])]
    stream_words = threefry((row_words[0], row_words[1]), (jnp.zeros_like(streams), streams))
    lengths, width = jnp.array([groups, tokens]), groups + tokens
    first, second = (jnp.repeat(word, lengths, axis=1, total_repeat_length=width) for word in stream_words)
    count = jnp.concatenate([group_counters, token_counters]).astype(jnp.uint32)
    count = jnp.broadcast_to(count[None, :], (rows, width))
    words = threefry((first, second), (jnp.zeros_like(count), count))
    bits = words[0] ^ words[1]
    return bits[:, :groups], bits[:, groups:]


def gumbel_from_bits(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Standard Gumbel noise, float32, from all 32 bits: −log E with E = −log(1 − u), u = (bits + ½)/2³².

    u is never 0 or 1, so the noise lies in [−3.2, 22.9]. The upper half takes the logarithm of the exact integer
    complement: `1 - u` in float32 would give the largest values a few coarse steps. 23-bit uniforms tie in 2 % of
    draws at V = 256k; these are drawn 512 at a time.
    """
    below = bits < jnp.uint32(1 << 31)
    half = (jnp.where(below, bits, ~bits).astype(jnp.float32) + 0.5) * 2.0**-32
    exponential = jnp.where(below, -jnp.log1p(-half), -jnp.log(half))
    return -jnp.log(exponential)


def gumbel(
    keys: UInt32[Array, "B 2"], group_counters: Int[Array, " G"], token_counters: Int[Array, " T"]
) -> tuple[Float[Array, "B G"], Float[Array, "B T"]]:
    """Gumbel noise of every row at the counters of both streams."""
    group_bits, token_bits = random_bits(keys, group_counters, token_counters)
    return gumbel_from_bits(group_bits), gumbel_from_bits(token_bits)
