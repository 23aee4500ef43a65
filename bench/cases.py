"""The shapes that the kernel benchmarks time, and the limits that every one of them is held to.

A limit is the largest median of (time of the kernel) / (time of another side), by that side's name. The results say
which cases keep theirs; tests never time.
"""

from dataclasses import dataclass

WIDTH, VOCAB = 512, 32128
"""T5-small's head."""


@dataclass(frozen=True)
class SamplerCase:
    rows: int
    dtype: str = "float32"
    vocab_axis: int = 0
    shared: bool = False

    @property
    def limits(self) -> dict[str, float]:
        """A quarter more than the logits alone; of ordinary JAX less, the more rows are drawn."""
        ordinary = next(share for most, share in ((1, 1.0), (8, 1 / 1.6), (64, 1 / 2.5)) if self.rows <= most)
        limits = {"two products": 1.25, "ordinary JAX": ordinary}
        return limits | {f"{side}, vocabulary first": limit for side, limit in limits.items()}

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
    memory_limit: float = 0.15
    """Largest (temporary memory of the kernel) / (that of ordinary JAX)."""

    @property
    def limits(self) -> dict[str, float]:
        """As fast as ordinary JAX, but for a tenth: what the kernel saves is memory."""
        return {"ordinary JAX": 1.1}

    @property
    def name(self) -> str:
        head = "frozen head" if self.frozen_head else "trained head"
        return f"N = {self.rows}, {self.pairs} {self.lengths} pairs, {self.dtype}, {head}"


@dataclass(frozen=True)
class DivergenceCase:
    rows: int = 2048
    ignored: float = 0.0
    """Share of the rows."""
    dtype: str = "float32"
    shared: bool = False

    @property
    def limits(self) -> dict[str, float]:
        """As fast as ordinary JAX, but for a tenth: what the kernel saves is memory, and the rows that are ignored."""
        return {"ordinary JAX": 1.1 * (1 - self.ignored)}

    @property
    def name(self) -> str:
        rows = f"N = {self.rows}" + f", {self.ignored:.0%} ignored" * (self.ignored > 0)
        return f"{rows}, {self.dtype}, {'one shared head' if self.shared else 'two heads'}"


SAMPLER = [
    SamplerCase(1),
    SamplerCase(8),
    SamplerCase(64),
    SamplerCase(64, vocab_axis=1),
    SamplerCase(64, shared=True),
    SamplerCase(8, dtype="bfloat16"),
    SamplerCase(64, dtype="bfloat16"),
]
LOSS = [
    LossCase("equal"),
    LossCase("ragged"),
    LossCase("equal", pairs=4),
    LossCase("equal", frozen_head=True),
    LossCase("equal", dtype="bfloat16"),
]
DIVERGENCE = [
    DivergenceCase(),
    DivergenceCase(ignored=0.25),
    DivergenceCase(shared=True),
    DivergenceCase(dtype="bfloat16"),
]
