"""One step of online preference training on a CPU: draw pairs, ask a judge, update. IPO-MD and plain online IPO.

    python bench/bench_train.py --write

times both and writes bench/results/ipo_md_step_cpu.json and .md. Each round makes one step of each algorithm, one after
the other. A step is the one of `fastpref.train`, made of the same compiled functions, except that no token ends a
completion, so that every step writes the same number of tokens.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import tokenizers
from flax import nnx

from fastpref.data import PromptBatcher, Ragged, pack_pairs
from fastpref.data.tokenizer import Tokenizer
from fastpref.judging.protocol import ask
from fastpref.learning import optimizers
from fastpref.learning import update as learner
from fastpref.learning.row_plan import plan_rows
from fastpref.method.algorithms import ALGORITHMS
from fastpref.method.config import TrainConfig
from fastpref.method.schedules import value_at
from fastpref.models import Decoder, DecoderConfig, LanguageModel
from fastpref.sampling.generate import decode, generate_jit, num_valid_tokens

MODEL = DecoderConfig(vocab_size=512, width=256, hidden=1024, layers=4, heads=4, kv_heads=4, head_dim=64)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, COMPLETIONS = 8, 32, 64, 2
STEPS = {
    "IPO-MD": TrainConfig(algorithm="ipo-md", mixture_beta=0.25, tau=0.1, optimizer="adamw", learning_rate=1e-4),
    "online IPO": TrainConfig(algorithm="online-ipo", tau=0.1, optimizer="adamw", learning_rate=1e-4),
}
PARTS = ("generate", "judge", "learn")
ROUNDS, WARMUP, LIMIT = 30, 2, 0.8
Laps = dict[str, tuple[float, float]]
"""Wall and CPU seconds of each part."""


def language_model() -> LanguageModel:
    words = ["<pad>", "</s>", *(f"w{number}" for number in range(MODEL.vocab_size - 2))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return LanguageModel(Decoder(MODEL, rngs=nnx.Rngs(0)), Tokenizer(backend, eos_id=1, pad_id=0))


def prompt_texts() -> list[str]:
    words = np.random.default_rng(0).integers(0, MODEL.vocab_size - 2, (64 * PROMPTS, PROMPT_TOKENS))
    return [" ".join(f"w{word}" for word in row) for row in words]


def likes_low_words(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that costs next to nothing: the text with more words below w256 wins."""

    def low(text: str) -> int:
        return sum(int(word[1:]) < 256 for word in text.split())

    difference = [low(a) - low(b) for a, b in zip(first, second, strict=True)]
    return [0.5 + 0.5 * np.sign(value) for value in difference]


def stepper(model: LanguageModel, config: TrainConfig, chain: Any, compiling: dict[str, Any]) -> Callable[[], Laps]:
    """A function that makes the next step; what its two programs cost to compile is noted in `compiling`."""
    algorithm, key = ALGORITHMS[config.algorithm], jax.random.key(0)
    definition, ref_params = nnx.split(model.module)
    params = jax.tree.map(jnp.copy, ref_params)
    opt_state = optimizers.initial_state(chain, params)
    texts, step = prompt_texts(), count()
    prompts = Ragged.from_rows(model.tokenizer.encode_prompts(texts))
    batcher = PromptBatcher(prompts, batch_size=PROMPTS, max_tokens=PROMPT_TOKENS)
    step_config = replace(config, batch_size=PROMPTS, max_new_tokens=NEW_TOKENS)
    packing = plan_rows(step_config, decoder_start=None, prompts=prompts)
    betas = np.array(algorithm.mixture_betas(value_at(config.mixture_beta, 0)), np.float32)
    betas = np.broadcast_to(betas, (PROMPTS, COMPLETIONS))
    rows = np.arange(PROMPTS * COMPLETIONS, dtype=np.int32).reshape(PROMPTS, COMPLETIONS)
    drawing = {
        "eos_id": None,
        "max_new_tokens": NEW_TOKENS,
        "num_valid_tokens": num_valid_tokens(model),
        "temperature": config.temperature,
    }
    learning = {"optimizer": chain, "objective": algorithm.objective}

    def take() -> Any:
        return next(batcher)

    def draw(batch: Any, number: int) -> tuple[Any, ...]:
        models = (definition, params, definition, ref_params)
        return *models, batch.tokens, batch.lengths, betas, jax.random.fold_in(key, number), rows

    def note(name: str, function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        start = time.perf_counter()
        lowered = function.lower(*arguments, **options)
        middle = time.perf_counter()
        program = lowered.compile()
        compiling[name] = {
            "lower_s": middle - start,
            "compile_s": time.perf_counter() - middle,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }

    def advance() -> Laps:
        nonlocal params, opt_state
        clocks = [(time.perf_counter(), time.process_time())]
        batch, number = take(), next(step)
        completions: Any = jax.tree.map(np.asarray, generate_jit(*draw(batch, number), **drawing))
        clocks.append((time.perf_counter(), time.process_time()))
        asked = [texts[int(index)] for index in batch.ids]
        first, second = zip(*decode(model, completions, asked), strict=True)
        preference: Any = ask(likes_low_words, asked, first, second)
        clocks.append((time.perf_counter(), time.process_time()))
        pairs, _ = pack_pairs(
            batch.tokens,
            batch.lengths,
            completions.tokens,
            completions.lengths,
            ref_logps=completions.ref_logps,
            preference=preference,
            where=(completions.tokens[:, 0] != completions.tokens[:, 1]).any(-1),
            counts=packing.counts,
            **packing.shape,
        )
        update = (definition, params, opt_state, pairs, np.float32(value_at(config.tau, 0)))
        if "update" not in compiling:
            note("update", learner.update, update, learning)
        params, opt_state, measured = learner.update(*update, **learning)
        metrics = {name: float(value) for name, value in measured.items()}
        jax.tree.map(lambda leaf: leaf.block_until_ready(), (params, opt_state))
        clocks.append((time.perf_counter(), time.process_time()))
        if metrics["updates/skipped"] or int(completions.lengths.sum()) != rows.size * NEW_TOKENS:
            raise RuntimeError(f"a step must learn from full completions, but step {number} gave {metrics}")
        laps = zip(PARTS, clocks, clocks[1:], strict=False)
        return {name: (end[0] - begin[0], end[1] - begin[1]) for name, begin, end in laps}

    if "generate" not in compiling:
        note("generate", generate_jit, draw(take(), 0), drawing)
    return advance


def flops() -> dict[str, float]:
    """Operations of the matrix products of each part, a multiplication and an addition counting as two."""
    c = MODEL
    layer = 2 * c.width * c.head_dim * (c.heads + c.kv_heads) + 3 * c.width * c.hidden
    rows = PROMPTS * COMPLETIONS
    written = rows * NEW_TOKENS
    # Attention meets each key twice: in the scores and in the values. Half of a causal square counts.
    meets = 4 * c.layers * c.heads * c.head_dim
    prompts = PROMPTS * PROMPT_TOKENS * (2 * c.layers * layer + meets * PROMPT_TOKENS / 2)
    completions = written * (2 * (c.layers * layer + c.width * c.vocab_size) + meets * (PROMPT_TOKENS + NEW_TOKENS / 2))
    return {"generate": 2 * (prompts + completions), "learn": 3 * (prompts + completions)}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "min": min(values), "quartile_low": low, "quartile_high": high}


def summary(rounds: list[Laps]) -> dict[str, Any]:
    """Wall seconds of the step and of its parts, CPU seconds beside them, and rates of the median."""
    whole = [tuple(map(sum, zip(*laps.values(), strict=True))) for laps in rounds]
    columns = {"step": whole} | {name: [laps[name] for laps in rounds] for name in PARTS}
    seconds = {
        name: quartiles([wall for wall, _ in values]) | {"cpu_median": float(np.median([cpu for _, cpu in values]))}
        for name, values in columns.items()
    }
    written = PROMPTS * COMPLETIONS * NEW_TOKENS
    return {
        "seconds": seconds,
        "generated_tokens_per_s": written / seconds["generate"]["median"],
        "learner_tokens_per_s": (written + PROMPTS * PROMPT_TOKENS) / seconds["learn"]["median"],
    }


def test_step(benchmark: Any) -> None:
    model = language_model()
    compiling: dict[str, Any] = {}
    # One optimiser for all: the update is compiled for it, and so once.
    chain = optimizers.build(STEPS["IPO-MD"])
    steps = {name: stepper(model, config, chain, compiling) for name, config in STEPS.items()}
    rounds: dict[str, list[Laps]] = {name: [] for name in STEPS}

    def advance(name: str) -> None:
        rounds[name].append(steps[name]())

    ours, other = STEPS
    asked = int(os.environ.get("BENCH_ROUNDS", ROUNDS))
    benchmark.pedantic(advance, args=(ours,), setup=lambda: advance(other), rounds=asked, warmup_rounds=WARMUP)
    info: dict[str, Any] = {"compiling": compiling, "flops": flops()}
    if benchmark.enabled:
        info["steps"] = {name: summary(laps[-asked:]) for name, laps in rounds.items()}
    kilo = 1 if sys.platform == "darwin" else 1024
    info["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
    benchmark.extra_info.update(info)


def floors(entry: dict[str, Any], rates: dict[str, Any]) -> dict[str, float]:
    """Seconds that the products of each part take at the rate of one large product."""
    parts = {name: value / rates["float32_flops"] for name, value in entry["flops"].items()}
    return {"step": sum(parts.values())} | parts


def table(entry: dict[str, Any], rates: dict[str, Any]) -> list[str]:
    floor = floors(entry, rates)
    lines = []
    for name, result in entry["steps"].items():
        config = STEPS[name]
        beta = ALGORITHMS[config.algorithm].mixture_betas(value_at(config.mixture_beta, 0))[0]
        lines += [
            f"**{name}**, both samples with mixture weight β = {beta}",
            "",
            "| what | median s (quartiles) | fastest | CPU seconds, median | floor |",
            "| --- | --- | --- | --- | --- |",
        ]
        for part, value in result["seconds"].items():
            spread = f"{value['median']:.3f} ({value['quartile_low']:.3f} to {value['quartile_high']:.3f})"
            least = f"{floor[part]:.3f}" if part in floor else ""
            lines.append(f"| {part} | {spread} | {value['min']:.3f} | {value['cpu_median']:.3f} | {least} |")
        lines += [
            "",
            f"{result['generated_tokens_per_s']:.0f} generated tokens/s; {result['learner_tokens_per_s']:.0f} learner "
            "tokens/s, prompts counted once.",
            "",
        ]
    lines += ["| compiled once | lowering | compilation | temporary memory |", "| --- | --- | --- | --- |"]
    for name, cost in entry["compiling"].items():
        memory = f"{cost['temporary_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {name} | {cost['lower_s']:.1f} s | {cost['compile_s']:.1f} s | {memory} |")
    return [*lines, "", f"Peak memory of the process, compiler included: {entry['peak_rss_bytes'] / 1e6:.0f} MB."]


def text(report: dict[str, Any]) -> str:
    rates, median = report["rates"], report["steps"]["IPO-MD"]["seconds"]["step"]["median"]
    lines = [
        "# One step of IPO-MD on a CPU",
        "",
        f"`{report['command']}` on {report['machine']}; {machine.described(report)}.",
        "",
        f"A random Llama of 4.46 M parameters (V = {MODEL.vocab_size}, D = {MODEL.width}, {MODEL.layers} layers) in "
        f"float32, {PROMPTS} prompts of {PROMPT_TOKENS} random words, {COMPLETIONS} completions of exactly "
        f"{NEW_TOKENS} tokens each, AdamW at {STEPS['IPO-MD'].learning_rate}. Two models decode in both algorithms: "
        f"the log-probs of the reference come out of the draw. {report['rounds']} steps of each, in turn, after "
        f"{WARMUP} that do not count. The judge's part turns tokens into text and counts words. The limit for IPO-MD "
        f"is {LIMIT} s: {'kept' if median <= LIMIT else 'not kept'}.",
        "",
        f"The floor is the flops of the matrix products over the {rates['float32_flops'] / 1e9:.0f} GF/s that one "
        "float32 product of side 2048 reaches in this run. CPU seconds are those of all threads.",
        "",
        *table(report, rates),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Time the steps; record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/results/ipo_md_step_cpu.json and .md")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each algorithm that count")
    options = parser.parse_args()
    before = machine.require_quiet() if options.write else machine.use()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        # The project's own options check types at every call, which would be timed too.
        arguments = [__file__, "-q", "-o", "addopts=", f"--benchmark-json={raw}"]
        environment = os.environ | {"BENCH_ROUNDS": str(options.rounds)}
        code = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment).returncode
        if code:
            return code
        (entry,) = (entry["extra_info"] for entry in json.loads(raw.read_text())["benchmarks"])
    rates, after = machine.rates(), machine.use()
    rounds = "" if options.rounds == ROUNDS else f" --rounds {options.rounds}"
    report = {
        "command": f"python bench/bench_train.py --write{rounds}",
        "machine": machine.name("jax", "jaxlib", "flax", "optax", "numpy"),
        "before": before,
        "rates": rates,
        "rounds": options.rounds,
        "floor_s": floors(entry, rates),
        **entry,
        "after": after,
    }
    print(text(report))
    if options.write:
        machine.record("ipo_md_step_cpu", report, text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
