"""Kernels that are measured by and not learned from: differentiating them is refused in words."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax import Array

from ..head import Head
from .sums import Divergence


def forward_only(call: Callable[..., Divergence]) -> Callable[..., Divergence]:
    """The same function, which refuses arguments that a derivative is taken in."""

    @wraps(call)
    def constant(
        hidden: Array, head: Head, ref_hidden: Array, ref_head: Head, *, where: Array, **options: Any
    ) -> Divergence:
        # Inside, each argument is an array of its own.
        shared = head.same_map(ref_head)

        @jax.custom_jvp
        def run(hidden: Array, head: Head, ref_hidden: Array, ref_head: Head, where: Array) -> Divergence:
            return call(hidden, head, ref_hidden, head if shared else ref_head, where=where, **options)

        @run.defjvp
        def _refuse(primals: Any, tangents: Any) -> Any:
            raise NotImplementedError(
                "the arguments of divergence must be constants, but received some that a derivative is taken in. "
                "Pass them through jax.lax.stop_gradient, or differentiate implementation='reference', which keeps "
                "all logits."
            )

        result: Divergence = run(hidden, head, ref_hidden, ref_head, where)
        return result

    return constant
