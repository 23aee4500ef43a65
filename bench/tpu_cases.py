"""The cases that the lab compiles: chips, models, kernels, and each side's function with the shapes it takes."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from fastpref.kernels import Head
from fastpref.method import losses

PAIRS = 16


@dataclass(frozen=True)
class Chip:
    topology: str
    flops: float
    """bfloat16, per second."""
    bandwidth: float
    """Bytes per second."""
    mxu: int
    """Rows and columns of an MXU."""
    rows: float = 4
    """Rows that the MXUs of a core take in a cycle: 4 MXUs of one, or the 2 of v6e, of two."""
    cores: int = 1
    """Cores that JAX sees as one device. A sequential grid runs on one, with its share of the bandwidth."""

    @property
    def clock(self) -> float:
        return self.flops / (2 * self.mxu**2 * self.rows * self.cores)

    @property
    def rate(self) -> float:
        """Bytes per second of one core."""
        return self.bandwidth / self.cores


CHIPS = {
    "v5e": Chip("v5e:1x1", 197e12, 819e9, 128),
    "v6e": Chip("v6e:1x1", 918e12, 1640e9, 256),
    "v5p": Chip("v5p:2x2x1", 459e12, 2765e9, 128, cores=2),
}


@dataclass(frozen=True)
class Model:
    name: str
    width: int
    vocab: int
    soft_cap: float | None = None


T5_L, LLAMA_1B, LLAMA_8B = (
    Model("T5-L", 1024, 32128),
    Model("Llama-3.2-1B", 2048, 128256),
    Model("Llama-3-8B", 4096, 128256),
)
MODELS = [T5_L, Model("T5-XL", 2048, 32128), LLAMA_1B, LLAMA_8B, Model("Gemma", 2560, 262144, 30.0)]
FORWARD, BACKWARD, FROZEN = "forward", "forward + backward", "frozen head"
"""A frozen head is forward and backward too."""


@dataclass(frozen=True)
class Case:
    kernel: str
    model: Model
    rows: int
    mode: str = FORWARD
    dtype: str = "bfloat16"
    vocab_axis: int = 0
    shared: bool = False
    int8: bool = False
    """Heads in int8 with their scales; states are of `dtype`."""

    @property
    def sampler(self) -> bool:
        return self.kernel == "mixture_sample"

    @property
    def models(self) -> int:
        """A policy, or a policy and its reference."""
        return 2 if self.kernel in ("mixture_sample", "divergence") else 1

    @property
    def name(self) -> str:
        rows = f"B = {self.rows}" if self.sampler else f"N = {self.rows}"
        rows += f", {self.mode}" * (self.models == 1)
        marks = [self.dtype] * (self.dtype != "bfloat16") + ["[D, V]"] * self.vocab_axis + ["one head"] * self.shared
        marks += ["int8"] * self.int8
        return ", ".join([self.kernel, self.model.name, rows, *marks])

    @property
    def flops(self) -> int:
        products = self.models * {FORWARD: 1, BACKWARD: 4, FROZEN: 2}[self.mode]
        return 2 * products * self.rows * self.model.vocab * self.model.width

    @property
    def bytes(self) -> int:
        """Least that must move: heads and states read once, their gradients written once."""
        states, weight = self.rows * self.model.width, self.model.vocab * self.model.width
        heads, size = 1 if self.shared else self.models, jnp.dtype(self.dtype).itemsize
        written = {FORWARD: 0, BACKWARD: states + weight, FROZEN: states}[self.mode]
        head = weight + 4 * self.model.vocab if self.int8 else size * weight
        return heads * head + size * (self.models * states + written)

    def floor(self, chip: Chip) -> float:
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


CASES = [
    *(Case("mixture_sample", model, rows) for model in MODELS for rows in (8, 64, 128, 256)),
    Case("mixture_sample", LLAMA_1B, 64, shared=True),
    Case("mixture_sample", LLAMA_1B, 64, vocab_axis=1),
    Case("mixture_sample", LLAMA_1B, 64, dtype="float32"),
    *(
        Case("token_logprobs", model, rows, mode)
        for model in MODELS
        for rows in (2048, 16384)
        for mode in (FORWARD, BACKWARD, FROZEN)
    ),
    Case("preference_loss", LLAMA_1B, 16384, BACKWARD),
    *(Case("divergence", model, rows) for model in MODELS for rows in (2048, 16384)),
    Case("divergence", LLAMA_1B, 2048, shared=True),
    Case("divergence", LLAMA_1B, 2048, vocab_axis=1),
    Case("divergence", LLAMA_1B, 2048, dtype="float32"),
    *(Case("mixture_sample", model, rows, int8=True) for model in (LLAMA_1B, LLAMA_8B) for rows in (8, 64, 128)),
    Case("mixture_sample", LLAMA_8B, 64, vocab_axis=1, int8=True),
    *(Case("token_logprobs", LLAMA_8B, 2048, mode, int8=True) for mode in (FORWARD, FROZEN)),
    Case("token_logprobs", LLAMA_8B, 2048, FROZEN, vocab_axis=1, int8=True),
    Case("divergence", LLAMA_8B, 2048, int8=True),
    *(Case("tokamax", model, 16384, mode, vocab_axis=1) for model in (T5_L, LLAMA_8B) for mode in (FORWARD, BACKWARD)),
]

Work = tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]


def work(case: Case, side: str) -> Work:
    """The function of one side of a case, and the shapes of its arguments."""
    model, shape = case.model, jax.ShapeDtypeStruct
    hidden = shape((case.rows, model.width), case.dtype)
    weight = shape((model.vocab, model.width)[:: 1 - 2 * case.vocab_axis], "int8" if case.int8 else case.dtype)
    scales = [shape((model.vocab,), jnp.float32)] * case.int8
    ids, values = shape((case.rows,), jnp.int32), shape((case.rows,), jnp.float32)
    if case.kernel == "tokamax":
        return tokamax(case), [hidden, weight, ids]
    folder = "mixture_sampling" if case.sampler else case.kernel
    call = import_module(f"fastpref.kernels.{folder}").IMPLEMENTATIONS[side].call

    def head(weight: jax.Array, *scales: jax.Array) -> Head:
        return Head(weight, case.vocab_axis, soft_cap=model.soft_cap, scales=scales[0] if scales else None)

    def heads_of(arrays: tuple[jax.Array, ...]) -> list[Head]:
        each = 1 + len(scales)
        return [head(*arrays[first : first + each]) for first in range(0, len(arrays), each)]

    def sample(hidden: Any, ref_hidden: Any, beta: Any, key: Any, row_ids: Any, step: Any, *weights: Any) -> Any:
        heads = heads_of(weights)
        options: dict[str, Any] = {"temperature": 1.0, "num_valid_tokens": model.vocab}
        options |= {"block": case.rows} if side == "xla" else {}
        draw = {"mixture_beta": beta, "key": key, "row_ids": row_ids, "step": step}
        return call(hidden, heads[0], ref_hidden, heads[-1], **draw, **options)

    def apart(hidden: Any, ref_hidden: Any, *weights: Any) -> Any:
        heads = heads_of(weights)
        return call(hidden, heads[0], ref_hidden, heads[-1], where=jnp.ones(case.rows, bool))

    def scored(hidden: Any, weight: Any, targets: Any, values: Any, *scales: Any) -> Any:
        def value(hidden: Any, weight: Any) -> Any:
            options: dict[str, Any] = {"frozen_head": case.mode == FROZEN}
            if case.kernel == "token_logprobs":
                return call(hidden, head(weight, *scales), targets, where=jnp.ones(case.rows, bool), **options)
            segments = jnp.repeat(jnp.arange(2 * PAIRS), case.rows // (2 * PAIRS))
            pairs = segments, values[: 2 * PAIRS].reshape(PAIRS, 2), jnp.full(PAIRS, 0.5)
            options |= {"loss": losses.bind(losses.ipo, tau=0.1), "where": jnp.ones(PAIRS, bool)}
            return call(hidden, head(weight), targets, *pairs, **options).loss

        if case.mode == FORWARD:
            return value(hidden, weight)
        wanted = (hidden,) if case.mode == FROZEN else (hidden, weight)
        result, pull = jax.vjp(lambda *wanted: value(*wanted, *(hidden, weight)[len(wanted) :]), *wanted)
        return result, pull(values if result.ndim else jnp.ones(()))

    if case.models == 1:
        return scored, [hidden, weight, ids, values, *scales]
    weights = [weight, *scales] * (1 if case.shared else 2)
    if not case.sampler:
        return apart, [hidden, hidden, *weights]
    scalars = [values, shape((2,), jnp.uint32), ids, shape((), jnp.int32)]
    return sample, [hidden, hidden, *scalars, *weights]


def tokamax(case: Case) -> Callable[..., Any]:
    """A peer, where it can be imported: its kernels, with the tiles of its own heuristics in their names."""
    name = "linear_softmax_cross_entropy_loss"
    kernel = import_module(f"tokamax._src.ops.{name}.pallas_mosaic_tpu_kernel")

    def loss(hidden: Any, weight: Any, targets: Any) -> Any:
        sizes, dtype = (case.rows, case.model.width, case.model.vocab), jnp.dtype(case.dtype)
        forward, backward = (
            asdict(choose(*sizes, dtype=dtype))
            for choose in (kernel.get_heuristic_fwd_config, kernel.get_heuristic_bwd_config)
        )
        del forward["buffer_count"]
        value, lse = getattr(kernel, f"{name}_fwd_pallas_mosaic_tpu")(hidden, targets, weight, **forward)
        if case.mode == FORWARD:
            return value
        call = getattr(kernel, f"{name}_bwd_pallas_mosaic_tpu")
        return value, call(jnp.ones(()), lse, hidden, targets, weight, **backward)

    return loss
