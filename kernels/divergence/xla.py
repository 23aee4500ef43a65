"""KL and entropy for CPUs and GPUs: chunks of rows, never more than one chunk of both models' logits alive."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ..chunks import chunk_index, chunk_rows, compact, over_chunks, put
from ..head import Head
from ..slices import axes_of, vary, vary_alike
from .forward_only import forward_only
from .sums import FIELDS, Divergence, Sums, finish, of_logits, over_slices


@forward_only
def divergence(
    hidden: Float[Array, "N Dp"],
    head: Head,
    ref_hidden: Float[Array, "N Dr"],
    ref_head: Head,
    *,
    where: Bool[Array, " N"],
    chunk: int | None = None,
) -> Divergence:
    """`fastpref.kernels.divergence` for every backend; `chunk` overrides the rows of a chunk."""
    shared, counted, total = head.same_map(ref_head), where, hidden.shape[0]
    chunk = chunk_rows(total, 2 * head.slice_size, chunk)
    hidden, head, ref_hidden, ref_head, rows = vary_alike(hidden, head, ref_hidden, ref_head, compact(where, chunk))

    def logits(index: Int[Array, " C"]) -> tuple[Array, Array]:
        if not shared:
            return head.logits(hidden[index]), ref_head.logits(ref_hidden[index])
        both = head.logits(jnp.concatenate([hidden[index], ref_hidden[index]]))
        return both[:chunk], both[chunk:]

    def step(start: Array, results: Sums) -> Sums:
        index, live = chunk_index(rows, start, chunk)
        sums = of_logits(*logits(index))
        return Sums(*(put(old, index, live, new) for old, new in zip(results, sums, strict=True)))

    zeros = vary(jnp.zeros(total, jnp.float32), axes_of(hidden, head, ref_hidden, ref_head, rows))
    # Devices of a split vocabulary meet once, after all chunks.
    sums = over_slices(head, over_chunks(rows, chunk, step, Sums(*[zeros] * FIELDS)))
    kl, entropy = (jnp.where(counted, values, 0.0) for values in finish(sums))
    return Divergence(kl, entropy)
