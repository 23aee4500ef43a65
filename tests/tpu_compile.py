"""Compile the kernels with the TPU's compiler, for a TPU v5e that is not there. Run by `test_tpu_kernels`."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fastpref.kernels import Head, divergence, mixture_sample, token_logprobs
from fastpref.kernels import tiles as tiling
from fastpref.kernels.divergence import tpu as distances
from fastpref.kernels.mixture_sampling import tpu as sampling
from fastpref.kernels.mixture_sampling.layout import layout_of
from fastpref.kernels.tiles import Tiles
from fastpref.kernels.token_logprobs import backward_pass, forward_pass, frozen_pass
from fastpref.kernels.token_logprobs import tpu as scoring

Shape = jax.ShapeDtypeStruct


def compiled(function: Callable[..., Any], *shapes: Any, mesh: Mesh, specs: Any) -> Any:
    """The program for the mesh's chips, traced as if they were here."""
    arguments = jax.tree.map(
        lambda shape, spec: Shape(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec)), shapes, specs
    )
    kind = mesh.devices.flat[0].device_kind
    device = AbstractDevice(platform="tpu", device_kind=kind, num_cores=1)
    axes = (AxisType.Auto,) * len(mesh.axis_names)
    with jax.sharding.use_abstract_mesh(
        AbstractMesh(mesh.devices.shape, mesh.axis_names, axis_types=axes, abstract_device=device)
    ):
        lowered = jax.jit(function).lower(*arguments)
    return lowered.compile()


def chips(topology: str, count: int) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices[:count]), ("vocab",))


def one_chip(function: Callable[..., Any], *shapes: Any) -> Any:
    return compiled(function, *shapes, mesh=chips("v5e:1x1", 1), specs=jax.tree.map(lambda _: P(), shapes))


def head_shape(vocab: int, width: int, axis: int, dtype: str) -> Shape:
    return Shape((vocab, width) if axis == 0 else (width, vocab), jnp.dtype(dtype))


def draws(head: Callable[[Array], Head], shared: bool = False, **changes: Any) -> Callable[..., Any]:
    def draw(hidden: Array, weight: Array, ref_hidden: Array, ref_weight: Array, beta: Array, key: Array) -> Any:
        policy = head(weight)
        keywords = {"temperature": 1.0, "num_valid_tokens": policy.vocab_size} | changes
        return sampling.mixture_sample(
            hidden, policy, ref_hidden, policy if shared else head(ref_weight), mixture_beta=beta, key=key,
            row_ids=jnp.arange(hidden.shape[0]), step=jnp.int32(3), **keywords,
        )  # fmt: skip

    return draw


def draw_shapes(rows: int, vocab: int, width: int, axis: int, dtype: str) -> tuple[Shape, ...]:
    hidden, weight = Shape((rows, width), jnp.dtype(dtype)), head_shape(vocab, width, axis, dtype)
    return hidden, weight, hidden, weight, Shape((rows,), jnp.float32), Shape((2,), jnp.uint32)


def scores(head: Callable[[Array], Head], frozen_head: bool = False) -> Callable[..., Any]:
    def score(hidden: Array, weight: Array, targets: Array) -> Any:
        def total(hidden: Array, weight: Array) -> Array:
            where = jnp.ones(hidden.shape[0], bool)
            return jnp.sum(scoring.token_logprobs(hidden, head(weight), targets, where=where, frozen_head=frozen_head))

        return jax.value_and_grad(total, 0 if frozen_head else (0, 1))(hidden, weight)

    return score


def score_shapes(rows: int, vocab: int, width: int, axis: int, dtype: str) -> tuple[Shape, ...]:
    hidden = Shape((rows, width), jnp.dtype(dtype))
    return hidden, head_shape(vocab, width, axis, dtype), Shape((rows,), jnp.int32)


def apart(head: Callable[[Array], Head], ref_head: Callable[[Array], Head] | None) -> Callable[..., Any]:
    """None for one head of both."""

    def measure(hidden: Array, weight: Array, ref_hidden: Array, ref_weight: Array) -> Any:
        policy, where = head(weight), jnp.ones(hidden.shape[0], bool)
        return distances.divergence(
            hidden, policy, ref_hidden, ref_head(ref_weight) if ref_head else policy, where=where
        )

    return measure


def apart_shapes(*shapes: tuple[int, int, int, int, str]) -> tuple[Shape, ...]:
    return tuple(shape for one in shapes for shape in score_shapes(*one)[:2])


SAMPLERS = [
    (8, 50257, 768, 0, "bfloat16", {}, {}),
    (1, 32128, 512, 1, "float32", {}, {"temperature": 0.0}),
    (128, 2000, 256, 1, "bfloat16", {"soft_cap": 30.0}, {"num_valid_tokens": 1900}),
    (300, 4096, 128, 0, "float32", {"scale": 0.1}, {"temperature": 0.7, "shared": True}),
    (5, 1000, 64, 0, "bfloat16", {}, {}),
]
SCORERS = [
    (1000, 50257, 768, 0, "bfloat16", {}, False),
    (1000, 50257, 768, 0, "bfloat16", {"soft_cap": 30.0}, True),
    (130, 2000, 256, 1, "float32", {"scale": 0.1}, False),
    (130, 2000, 256, 1, "bfloat16", {}, True),
    (64, 1000, 64, 0, "float32", {}, False),
]


DIVERGENCES = [
    ((1000, 50257, 768, 0, "bfloat16"), (1000, 50257, 512, 0, "bfloat16"), {}, False),
    ((300, 2000, 256, 0, "float32"), (300, 2000, 128, 1, "bfloat16"), {"soft_cap": 30.0}, False),
    ((130, 4096, 256, 1, "bfloat16"), (130, 4096, 256, 1, "bfloat16"), {"scale": 0.1}, True),
    ((5, 1000, 64, 0, "float32"), (5, 1000, 64, 0, "float32"), {}, False),
]


def public() -> None:
    """The public functions choose by the platform that they are compiled for, not by this process's."""
    hidden, weight = Shape((16, 256), jnp.dtype("bfloat16")), Shape((2000, 256), jnp.dtype("bfloat16"))
    rows, ids = Shape((16,), jnp.float32), Shape((16,), jnp.int32)

    def draw(hidden: Array, weight: Array, beta: Array, key: Array, ids: Array) -> Any:
        keywords: dict[str, Any] = {
            "mixture_beta": beta,
            "key": jax.random.wrap_key_data(key),
            "row_ids": ids,
            "step": 0,
        }
        return mixture_sample(hidden, Head(weight), hidden, Head(weight), **keywords)

    def score(hidden: Array, weight: Array, ids: Array) -> Any:
        return jax.grad(lambda x, w: token_logprobs(x, Head(w), ids).sum(), (0, 1))(hidden, weight)

    def measure(hidden: Array, weight: Array) -> Any:
        return divergence(hidden, Head(weight), hidden, Head(weight)).kl

    programs: dict[str, tuple[Callable[..., Any], tuple[Shape, ...]]] = {
        "mixture_sample": (draw, (hidden, weight, rows, Shape((2,), jnp.uint32), ids)),
        "token_logprobs": (score, (hidden, weight, ids)),
        "divergence": (measure, (hidden, weight)),
    }
    for name, (function, shapes) in programs.items():
        assert "tpu_custom_call" in one_chip(function, *shapes).as_text(), name
        here = jax.jit(function).lower(*shapes).as_text()
        assert "tpu_custom_call" not in here, name
        print("compiled", name)


def every_kernel() -> None:
    for *shape, kind, changes in SAMPLERS:
        axis = shape[3]
        one_chip(draws(lambda weight, a=axis, k=kind: Head(weight, a, **k), **changes), *draw_shapes(*shape))
        print("compiled mixture_sample", shape, kind, changes)
    for *shape, kind, frozen_head in SCORERS:
        axis = shape[3]
        one_chip(scores(lambda weight, a=axis, k=kind: Head(weight, a, **k), frozen_head), *score_shapes(*shape))
        print("compiled token_logprobs", shape, kind, "frozen" if frozen_head else "trained")

    for policy, ref, kind, shared in DIVERGENCES:
        heads = [lambda weight, a=shape[3], k=kind: Head(weight, a, **k) for shape in (policy, ref)]
        one_chip(apart(heads[0], None if shared else heads[1]), *apart_shapes(policy, ref))
        print("compiled divergence", policy, ref, kind, "one head" if shared else "two heads")

    for vocab, width, axis in ((50257, 768, 0), (2000, 256, 1), (1000, 64, 0)):
        head = partial(int8_head, axis=axis)
        hidden, weight = Shape((130, width), jnp.dtype("bfloat16")), head_shape(vocab, width, axis, "int8")
        one_chip(draws(head), hidden, weight, hidden, weight, *draw_shapes(130, vocab, width, axis, "bfloat16")[4:])
        one_chip(scores(head, True), hidden, weight, Shape((130,), jnp.int32))
        one_chip(apart(head, head), hidden, weight, hidden, weight)
        print("compiled heads in int8", vocab, width, axis)


def int8_head(weight: Array, axis: int = 0) -> Head:
    return Head(weight, axis, scales=jnp.ones(weight.shape[axis]))


def split_heads() -> None:
    """On eight chips, with axes checked: results are the same on all of them."""
    mesh, whole, split = chips("v5e:2x4", 8), P(), P("vocab", None)

    def head(weight: Array) -> Head:
        return Head(weight, mesh_axis="vocab")

    specs = (whole, split, whole, split, whole, whole)
    drawn = jax.shard_map(draws(head), mesh=mesh, in_specs=specs, out_specs=P())
    compiled(drawn, *draw_shapes(16, 128256, 1024, 0, "bfloat16"), mesh=mesh, specs=specs)
    print("compiled mixture_sample")
    specs = (whole, split, whole)
    scored = jax.shard_map(scores(head), mesh=mesh, in_specs=specs, out_specs=(P(), (P(), split)))
    compiled(scored, *score_shapes(512, 128256, 1024, 0, "bfloat16"), mesh=mesh, specs=specs)
    print("compiled token_logprobs")
    specs = (whole, split, whole, split)
    measured = jax.shard_map(apart(head, head), mesh=mesh, in_specs=specs, out_specs=P())
    compiled(measured, *apart_shapes(*[(512, 128256, 1024, 0, "bfloat16")] * 2), mesh=mesh, specs=specs)
    print("compiled divergence")


def vmem() -> None:
    """Formula and the compiler's own figure, which it says when the limit is below it."""
    head = Head(Shape((32128, 1024), jnp.bfloat16))  # type: ignore[arg-type]
    tiles = Tiles(256, 1024)
    rows = Shape((1024,), jnp.float32)
    hidden, ids, count = Shape((1024, 1024), jnp.bfloat16), Shape((1024,), jnp.int32), Shape((), jnp.int32)
    other = Head(Shape((32128, 1024), jnp.bfloat16))  # type: ignore[arg-type]
    layout = layout_of(128, head, other, jnp.bfloat16, 1.0, 32128, 2)
    programs = {
        "forward": (
            forward_pass.forward_bytes(head, jnp.bfloat16, Tiles(256, 512)),
            lambda x, w, t, c: forward_pass.forward(x, Head(w), t, c, Tiles(256, 512), False),
            (hidden, head.weight, ids, count),
        ),
        "backward": (
            backward_pass.backward_bytes(head, tiles),
            lambda x, w, t, one, two, c: backward_pass.backward(x, Head(w), t, one, two, c, tiles, False),
            (hidden, head.weight, ids, rows, rows, count),
        ),
        "frozen": (
            frozen_pass.frozen_bytes(head, jnp.bfloat16, tiles),
            lambda x, w, t, c: frozen_pass.frozen(x, Head(w), t, c, tiles, False),
            (hidden, head.weight, ids, count),
        ),
        "sampler": (
            layout.vmem_bytes,
            draws(Head, groups=2),
            draw_shapes(128, 32128, 1024, 0, "bfloat16"),
        ),
        "divergence": (
            distances.divergence_bytes(head, other, (jnp.bfloat16,) * 2, Tiles(256, 512)),
            lambda x, w, y, u, c: distances.divergence_sums(x, Head(w), y, Head(u), c, Tiles(256, 512), False),
            (hidden, head.weight, hidden, other.weight, count),
        ),
    }  # fmt: skip
    small = Shape((32128, 1024), jnp.int8)
    pair = [Head(Shape(small.shape, jnp.int8), scales=Shape((32128,), jnp.float32)) for _ in range(2)]  # type: ignore[arg-type]
    shape, others = pair[0], (ids, count)
    programs |= {
        "forward-int8": (
            forward_pass.forward_bytes(shape, jnp.bfloat16, Tiles(256, 512)),
            lambda x, w, t, c: forward_pass.forward(x, int8_head(w), t, c, Tiles(256, 512), False),
            (hidden, small, *others),
        ),
        "frozen-int8": (
            frozen_pass.frozen_bytes(shape, jnp.bfloat16, tiles),
            lambda x, w, t, c: frozen_pass.frozen(x, int8_head(w), t, c, tiles, False),
            (hidden, small, *others),
        ),
        "sampler-int8": (
            layout_of(128, *pair, jnp.bfloat16, 1.0, 32128, 2).vmem_bytes,
            draws(int8_head, groups=2),
            tuple(
                small if size.shape == small.shape else size for size in draw_shapes(128, 32128, 1024, 0, "bfloat16")
            ),
        ),
    }
    for name, (formula, function, shapes) in programs.items():
        for module in (sampling, tiling):
            module.vmem_limit = lambda limit=formula * 7 // 8: limit
        complaint = ""
        try:
            one_chip(function, *shapes)
        except jax.errors.JaxRuntimeError as error:
            complaint = str(error)
        size, unit = re.findall(r"size (\d+(?:\.\d+)?)([KM])", complaint)[0]
        print(name, formula, int(float(size) * {"K": 1 << 10, "M": 1 << 20}[unit]))
