"""The shapes that the kernel benchmarks time, and the limits that they are held to."""

from dataclasses import dataclass, field

WIDTH, VOCAB = 512, 32128
"""T5-small's head."""


@dataclass(frozen=True)
class SamplerCase:
    rows: int
    dtype: str = "float32"
    vocab_axis: int = 0
    shared: bool = False
    limits: dict[str, float] = field(default_factory=dict)
    """Largest median of (time of the kernel) / (time of the other), by the other's name."""

    @property
    def name(self) -> str:
        layout = "[V, D]" if self.vocab_axis == 0 else "[D, V]"
        return f"B = {self.rows}, {self.dtype}, {'one shared head' if self.shared else 'two heads'} {layout}"


@dataclass(frozen=True)
class LossCase:
    lengths: str
    """"equal" pairs, or "ragged" ones with a quarter of the rows ignored."""
    pairs: int = 16
    rows: int = 2048
    dtype: str = "float32"
    frozen_head: bool = False
    limits: dict[str, float] = field(default_factory=dict)
    memory_limit: float = 0.15
    """Largest (temporary memory of the kernel) / (that of the reference)."""

    @property
    def name(self) -> str:
        head = "frozen head" if self.frozen_head else "trained head"
        return f"N = {self.rows}, {self.pairs} {self.lengths} pairs, {self.dtype}, {head}"


SAMPLER = [
    SamplerCase(1),
    SamplerCase(8, limits={"two products": 1.25, "ordinary JAX": 1 / 1.6}),
    SamplerCase(64, limits={"two products": 1.25, "ordinary JAX": 1 / 2.5}),
    SamplerCase(64, vocab_axis=1),
    SamplerCase(64, shared=True),
    SamplerCase(8, dtype="bfloat16"),
    SamplerCase(64, dtype="bfloat16"),
]
LOSS = [
    LossCase("equal", limits={"ordinary JAX": 1.1}),
    LossCase("ragged"),
    LossCase("equal", pairs=4),
    LossCase("equal", frozen_head=True),
    LossCase("equal", dtype="bfloat16"),
]
