"""What packed rows save the learner: loss and gradients of a batch, padded as the trainer pads today and packed.

    python bench/bench_packing.py --write

Each form gets pairs from one pool of 512 and does the same to them: teacher-forced states, preference loss, gradients
of all parameters. Rates count real tokens: a prompt once, both completions. Pairs are packed whole, best fit
decreasing, and the batch is a random choice of the rows. The forms of a workload take turns.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import machine
import numpy as np
from bench_train import MODEL as WIDE
from bench_train import quartiles
from flax import nnx
from jax import Array

from fastpref.data.batches import PackedPairs
from fastpref.data.tokenizer import Tokenizer
from fastpref.demo import docstrings
from fastpref.demo import small as demo
from fastpref.kernels import preference_loss
from fastpref.method import losses
from fastpref.models import T5, Decoder, DecoderConfig, T5Config, masks
from fastpref.models.policy import hidden_states

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from slow_packing import PaddedPairs, pack

ROUNDS, POOL = 9, 512
TAU = 0.03
NARROW = DecoderConfig(vocab_size=3072, width=128, hidden=256, layers=4, heads=4, kv_heads=4, head_dim=32, tied=True)


class Rows(NamedTuple):
    """A shape of packed rows."""

    layout: str
    length: int
    prompt_length: int = 0
    blocks: bool = True

    def __str__(self) -> str:
        stream = f", S = {self.prompt_length}" if self.prompt_length else f", {self.layout} prompts"
        return f"packed, L = {self.length}{stream}" + ("" if self.blocks else ", whole rows attended to")


class Workload(NamedTuple):
    config: T5Config | DecoderConfig
    lengths: Callable[[], tuple[np.ndarray, np.ndarray]]
    bounds: tuple[int, int]
    """Longest prompt and longest completion: the padded shape."""
    rows: Sequence[Rows]
    pairs: int = 32
    """In the padded batch."""


def docstring_lengths() -> tuple[np.ndarray, np.ndarray]:
    """Prompts and summaries of the demo's online split, in its own tokens."""
    parts = docstrings.splits(docstrings.harvest().examples)
    texts = (text for example in parts.sft for text in (example.prompt, example.summary))
    tokenizer = Tokenizer(docstrings.train_tokenizer(texts, demo.VOCAB_SIZE), eos_id=1, pad_id=0)
    prompts = tokenizer.encode_prompts([example.prompt for example in parts.online])
    summaries = tokenizer.encode_completions([example.summary for example in parts.online])
    return np.array([len(tokens) for tokens in prompts]), np.array([len(tokens) for tokens in summaries])


def lognormal_lengths() -> tuple[np.ndarray, np.ndarray]:
    """A quarter of chat-like lengths: lognormal, prompts of median 37 and completions of median 60."""
    random = np.random.default_rng(1)
    return (random.lognormal(np.log(37), 0.8, 4096).astype(int), random.lognormal(np.log(60), 0.7, 4096).astype(int))


WORKLOADS = {
    "the demo's T5 and its lengths: prompts cut at 64, at most 24 new tokens": Workload(
        demo.T5_CONFIG,
        docstring_lengths,
        (demo.MAX_PROMPT_TOKENS, demo.MAX_NEW_TOKENS),
        [Rows("encoder-decoder", 64, 128), Rows("encoder-decoder", 128, 256)],
    ),
    "the demo's T5, docstrings not cut": Workload(
        demo.T5_CONFIG,
        docstring_lengths,
        (256, 80),
        [Rows("encoder-decoder", 160, 256), Rows("encoder-decoder", 192, 512)],
    ),
    "a decoder of the demo's width and its lengths": Workload(
        NARROW, docstring_lengths, (64, 24), [Rows("shared", 192), Rows("shared", 256)]
    ),
    "the Llama of the step benchmark, lognormal lengths": Workload(
        WIDE,
        lognormal_lengths,
        (256, 256),
        [Rows("shared", 768), Rows("shared", 1024), Rows("shared", 1024, blocks=False), Rows("separate", 1024)],
        pairs=12,
    ),
}


def draw(work: Workload) -> PaddedPairs:
    """A pool of pairs of random tokens with the lengths of the workload, padded to its bounds."""
    random = np.random.default_rng(0)
    prompts, completions = (np.minimum(size, bound) for size, bound in zip(work.lengths(), work.bounds, strict=True))
    vocabulary = work.config.vocab_size
    batch: Any = PaddedPairs(
        prompt_tokens=random.integers(2, vocabulary, (POOL, work.bounds[0]), np.int32),
        prompt_lengths=np.maximum(random.choice(prompts, POOL), 1).astype(np.int32),
        completion_tokens=random.integers(2, vocabulary, (POOL, 2, work.bounds[1]), np.int32),
        completion_lengths=np.maximum(random.choice(completions, (POOL, 2)), 1).astype(np.int32),
        ref_logps=np.zeros((POOL, 2), np.float32),
        preference=np.ones(POOL, np.float32),
        scores=np.zeros((POOL, 2), np.float32),
        where=np.ones(POOL, bool),
    )
    return batch


def take(batch: PaddedPairs, which: Sequence[int]) -> Any:
    return PaddedPairs(*(np.asarray(field)[which] for field in batch))


def plan(batch: PaddedPairs, rows: Rows) -> list[list[int]]:
    """The pairs of each row: best fit decreasing of the whole pool."""
    prompts, texts = np.asarray(batch.prompt_lengths), np.asarray(batch.completion_lengths).sum(1)
    beside = {"shared": prompts - 1, "separate": 2 * prompts - 2, "encoder-decoder": 0 * prompts}[rows.layout]
    size = np.array([rows.length, max(rows.prompt_length, 1)])
    need = np.stack([beside + texts, prompts if rows.prompt_length else 0 * prompts], 1)
    bins: list[tuple[np.ndarray, list[int]]] = []
    for pair in sorted(range(POOL), key=lambda pair: -float((need[pair] / size).max())):
        fitting = [one for one in bins if (one[0] >= need[pair]).all()]
        if not fitting:
            bins.append((size.copy(), []))
            fitting = bins[-1:]
        left, members = min(fitting, key=lambda one: float(((one[0] - need[pair]) / size).sum()))
        left -= need[pair]
        members.append(pair)
    return [members for _, members in bins]


def packed_batch(batch: PaddedPairs, rows: Rows, places: int) -> tuple[PackedPairs, int, float]:
    """Rows of about so many places in all, their real tokens, and pairs a row in the whole plan."""
    bins = plan(batch, rows)
    count = max(1, round(places / (rows.length + rows.prompt_length)))
    chosen = np.random.default_rng(2).permutation(len(bins))[:count]
    slots = max(map(len, bins))
    shape = {"rows": 1, "length": rows.length, "slots": slots, "prompt_length": rows.prompt_length}
    singles = [pack(take(batch, bins[row]), layout=rows.layout, **shape) for row in chosen]
    packed: Any = PackedPairs(*(np.concatenate(fields) for fields in zip(*singles, strict=True)))
    first = 2 * slots * np.arange(len(chosen), dtype=np.int32)[:, None]
    packed = packed._replace(sequences=np.where(packed.sequences < 0, -1, packed.sequences + first))
    return packed, tokens_of(take(batch, [pair for row in chosen for pair in bins[row]])), POOL / len(bins)


def tokens_of(batch: PaddedPairs) -> int:
    return int(batch.prompt_lengths.sum() + batch.completion_lengths.sum())


class Form(NamedTuple):
    step: Callable[[], Any]
    tokens: int
    places: int
    pairs: int


def forms(work: Workload) -> dict[str, Form]:
    """Every form of the workload, compiled."""
    kind: Any = T5 if isinstance(work.config, T5Config) else Decoder
    graph, state = nnx.split(kind(work.config, rngs=nnx.Rngs(0)))
    batch = draw(work)

    def loss(policy: Any, states: Array, targets: Array, segments: Array, batch: Any) -> Array:
        return preference_loss(
            states.reshape(-1, states.shape[-1]),
            policy.head(),
            targets.reshape(-1),
            segments.reshape(-1),
            batch.ref_logps,
            batch.preference,
            loss=losses.bind(losses.ipo, tau=TAU),
            where=batch.where,
        ).loss

    def padded_loss(state: Any, batch: PaddedPairs) -> Array:
        policy = nnx.merge(graph, state)
        prompt = jnp.arange(batch.prompt_tokens.shape[1])[None, :] < batch.prompt_lengths[:, None]
        real = jnp.arange(batch.completion_tokens.shape[2])[None, None, :] < batch.completion_lengths[:, :, None]
        segments = jnp.arange(2 * len(prompt), dtype=jnp.int32).reshape(-1, 2, 1)
        states = hidden_states(policy, batch.prompt_tokens, prompt, batch.completion_tokens)
        return loss(policy, states, batch.completion_tokens, jnp.where(real, segments, -1), batch)

    def packed_loss(state: Any, batch: PackedPairs) -> Array:
        policy = nnx.merge(graph, state)
        return loss(policy, policy.packed_hidden_states(batch), batch.targets, batch.sequences, batch)

    def form(loss: Any, batch: Any, tokens: int, places: int, pairs: int) -> Form:
        program = jax.jit(jax.value_and_grad(loss)).lower(state, batch).compile()
        return Form(lambda: jax.block_until_ready(program(state, batch)), tokens, places, pairs)

    def padded(prompt: int, completion: int) -> Form:
        few = take(batch, range(work.pairs))
        few = few._replace(
            prompt_tokens=few.prompt_tokens[:, :prompt], completion_tokens=few.completion_tokens[:, :, :completion]
        )
        return form(padded_loss, few, tokens_of(few), work.pairs * (prompt + 2 * completion), work.pairs)

    found = {"padded to the bounds": padded(*work.bounds)}
    few = take(batch, range(work.pairs))
    longest = int(few.prompt_lengths.max()), int(few.completion_lengths.max())
    if longest != work.bounds:
        found["padded to the longest of the batch"] = padded(*longest)
    least = masks.LEAST
    # As many places as the real tokens of the padded batch, so that steps are about as large.
    for rows in work.rows:
        packed, tokens, _ = packed_batch(batch, rows, tokens_of(few))
        masks.LEAST = least if rows.blocks else 1 << 20
        places = packed.tokens.size + packed.prompt_tokens.size
        found[str(rows)] = form(packed_loss, packed, tokens, places, int((packed.ids >= 0).sum()))
    masks.LEAST = least
    return found


def measure(work: Workload, rounds: int) -> dict[str, Any]:
    """Wall and CPU seconds of each form, rates of their medians."""
    ready = forms(work)
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for number in range(rounds + 1):
        for name, form in ready.items():
            wall, cpu = time.perf_counter(), time.process_time()
            form.step()
            if number:
                clocks[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {
            "pairs": form.pairs,
            "tokens": form.tokens,
            # Shared prompts take a place less than they have tokens, which may be more than lie empty.
            "waste": max(0.0, 1 - form.tokens / form.places),
            "seconds": (wall := quartiles([one for one, _ in clocks[name]])),
            "cpu_seconds": (cpu := quartiles([one for _, one in clocks[name]])),
            "tokens_per_s": form.tokens / wall["median"],
            "tokens_per_cpu_s": form.tokens / cpu["median"],
        }
        for name, form in ready.items()
    }


def table(results: dict[str, Any]) -> list[str]:
    base = next(iter(results.values()))
    lines = [
        "| form | pairs | waste | median s (quartiles) | CPU s | real tokens/s | per CPU second | against padded |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in results.items():
        wall = one["seconds"]
        lines.append(
            f"| {name} | {one['pairs']} | {100 * one['waste']:.0f} % | {wall['median']:.3f} "
            f"({wall['quartile_low']:.3f} to {wall['quartile_high']:.3f}) | {one['cpu_seconds']['median']:.3f} | "
            f"{one['tokens_per_s']:.0f} | {one['tokens_per_cpu_s']:.0f} | "
            f"{one['tokens_per_cpu_s'] / base['tokens_per_cpu_s']:.2f} |"
        )
    return lines


def text(report: dict[str, Any]) -> str:
    lines = [
        "# The learner on packed rows, on a CPU",
        "",
        f"`{report['command']}` on {report['machine']}; {machine.described(report)}.",
        "",
        "Loss and gradients of one batch in float32. Rates count real tokens, a prompt once; the waste of shared and "
        "encoded prompts is what lies empty, and that of separate ones counts the second copy too. The last column "
        "compares tokens per CPU second.",
        "",
    ]
    for name, forms in report["workloads"].items():
        lines += [f"## {name[0].upper()}{name[1:]}", "", *table(forms), ""]
    return "\n".join(lines)


def main() -> int:
    """Time the forms; record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/results/packing_cpu.json and .md")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each form that count")
    parser.add_argument("--only", default="", help="workloads whose name contains this; nothing can be written then")
    options = parser.parse_args()
    if options.only and options.write:
        parser.error("a result has all workloads: leave --only out to write it")
    before = machine.require_quiet() if options.write else machine.use()
    results = {}
    for name, work in WORKLOADS.items():
        if options.only not in name:
            continue
        results[name] = measure(work, options.rounds)
        print("\n".join(["", name, *table(results[name])]), flush=True)
        jax.clear_caches()
    rounds = "" if options.rounds == ROUNDS else f" --rounds {options.rounds}"
    report = {
        "command": f"python bench/bench_packing.py --write{rounds}",
        "machine": machine.name("jax", "jaxlib", "flax", "optax", "numpy"),
        "before": before,
        "rounds": options.rounds,
        "workloads": results,
        "after": machine.use(),
    }
    if options.write:
        machine.record("packing_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
