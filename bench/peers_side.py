"""One side of bench/bench_peers.py, in a process of its own: a trainer that makes a step for each line that it reads.

    python bench/peers_side.py random|chat FOLDER
    python bench/peers_side.py ours|trl METHOD FOLDER SETTINGS

The first makes a folder with a checkpoint and prompts; the second reads them, in the interpreter that has the library.
What both sides must share stands here.
"""

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Prompts = list[str] | list[list[dict[str, str]]]
"""Texts, or conversations that each side writes by the chat template of the checkpoint."""

THREADS = 2
TAU, MIXTURE_BETA, MAX_GRAD_NORM = 0.1, 0.25, 1.0
MANY = 10**6
"""Steps that no side reaches: the end of the input ends it."""
END = "<end of no completion>"
"""What ends a completion on both sides: a token that no model has a logit for, so that every completion is full."""
QUESTIONS = (
    "Why is the sky blue? Answer in one sentence.",
    "Write one line that sums up what a hash table is.",
    "Explain to a child why leaves fall in autumn.",
    "Give me a short title for an article about sleep and memory.",
    "What is the difference between a list and a tuple in Python?",
    "Name three things to check before a long journey by car.",
    "How would you ask a neighbour politely to turn the music down?",
    "Describe the taste of a fresh lemon without using the word sour.",
)


def different_words(completion: str) -> int:
    return len(set(completion.split()))


def prefers(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that costs next to nothing: the completion of more different words wins, and the first if they tie."""
    return [float(different_words(a) >= different_words(b)) for a, b in zip(first, second, strict=True)]


class Turns:
    """Steps by turns with other processes: a line in begins a step, a line out ends it, the end of input ends all."""

    def __init__(self) -> None:
        # The libraries print as well: that goes where errors go.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._began = self._cpu = 0.0

    def ready(self, **facts: Any) -> None:
        self._wait(facts)

    def done(self, **measured: Any) -> None:
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        self._wait({"seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": peak_rss_bytes(), **measured})

    def _wait(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        if not sys.stdin.readline():
            raise SystemExit(0)
        self._began, self._cpu = time.perf_counter(), time.process_time()


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Where a process was started by a larger one, getrusage reports that one's peak.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def ours(method: str, folder: Path, prompts: Prompts, settings: dict[str, Any]) -> None:
    from fastpref import AdapterConfig, LanguageModel, Step, Tokenizer, TrainConfig, load, train
    from fastpref.data import ChatTemplate

    turns, model = Turns(), load(folder / "model")
    backend, files = model.tokenizer.backend, model.tokenizer.files
    backend.add_special_tokens([END])
    tokenizer = Tokenizer(backend, eos_id=backend.token_to_id(END), pad_id=model.tokenizer.pad_id, files=files)
    texts = [text if isinstance(text, str) else ChatTemplate.of(tokenizer).prompt(text) for text in prompts]

    def on_step(step: Step) -> None:
        metrics = step.metrics
        # Metrics of what a mixture wrote are named after their writer.
        (nats,) = (metrics[name] for name in metrics if name.startswith("objective/") and name.endswith("entropy"))
        laps = {name: value for name, value in metrics.items() if name.startswith("time/")}
        turns.done(tokens=int(metrics["tokens/generated"]), loss=metrics["loss"], nats=nats, laps=laps)

    turns.ready(prompts=tokenizer.encode_prompts(texts), versions=versions("jax", "jaxlib", "flax", "optax"))
    config = TrainConfig(
        algorithm=method,
        tau=TAU,
        mixture_beta=MIXTURE_BETA,
        steps=MANY,
        batch_size=len(prompts),
        max_shapes=1,
        max_new_tokens=settings["new_tokens"],
        optimizer="adamw",
        learning_rate=settings["learning_rate"],
        max_grad_norm=MAX_GRAD_NORM,
        gradient_accumulation=settings["parts"],
        adapter=AdapterConfig(rank=settings["rank"]) if settings["rank"] else None,
    )
    records = [{"prompt": prompt} for prompt in prompts]
    train(LanguageModel(model.module, tokenizer), records, prefers, config, callbacks=[on_step], quiet=True)


def trl(method: str, folder: Path, prompts: Prompts, settings: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.nash_md import NashMDConfig, NashMDTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    torch.set_num_threads(THREADS)
    turns, tokenizer = Turns(), AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"eos_token": END})
    texts = [
        text
        if isinstance(text, str)
        else tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        for text in prompts
    ]

    class WaitingTrainer(OnlineDPOTrainer):
        def training_step(self, *arguments: Any, **options: Any) -> Any:
            loss = super().training_step(*arguments, **options)
            self.measured = {
                "tokens": self.tokens,
                "loss": float(loss),
                "nats": self.stats["objective/entropy"][-1] / settings["new_tokens"],
            }
            return loss

    class OnlineIPO(WaitingTrainer):
        def _generate(self, *arguments: Any, **options: Any) -> Any:
            generated = super()._generate(*arguments, **options)
            self.tokens = int(generated[-1].sum())
            return generated

    class NashMD(WaitingTrainer, NashMDTrainer):
        def _compute_rewards(self, first: Any, second: Any, start: int) -> Any:
            """The judge's answers; TRL would ask a reward model, and takes nothing else here."""
            both = [
                tokenizer.batch_decode(data["input_ids"][:, start:], skip_special_tokens=True)
                for data in (first, second)
            ]
            self.tokens = sum(int(data["attention_mask"][:, start:].sum()) for data in (first, second))
            # TRL takes the sigmoid of the difference, which is 0 or 1 so far out.
            rewards = 1e4 * (2 * torch.tensor(prefers(first["raw"], *both)) - 1)
            return rewards, torch.zeros_like(rewards)

    class Wait(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done(**trainer.measured)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(different_words(completion)) for completion in completions]

    kind, config, special = {
        # With a cache its mixture is another distribution: see bench_peers.UNCACHED.
        "nash-md": (
            NashMD,
            NashMDConfig,
            {"mixture_coef": [MIXTURE_BETA], "generation_kwargs": {"use_cache": False}},
        ),
        "online-ipo": (OnlineIPO, OnlineDPOConfig, {"loss_type": "ipo"}),
    }[method]
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=reward,
        args=config(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            # It would save memory that is there, take time, and switch the cache off.
            gradient_checkpointing=False,
            beta=[TAU],
            max_steps=MANY,
            per_device_train_batch_size=len(prompts),
            max_new_tokens=settings["new_tokens"],
            temperature=1.0,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **special,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Wait()],
    )
    turns.ready(
        prompts=tokenizer(texts, add_special_tokens=False)["input_ids"],
        versions=versions("trl", "transformers", "torch", "accelerate", "datasets"),
    )
    trainer.train()


def random(folder: Path) -> Prompts:
    """Write the model of bench_train.py; return prompts for it."""
    from bench_train import PROMPTS, language_model, prompt_texts

    from fastpref import save

    save(language_model(), folder / "model")
    return prompt_texts()[:PROMPTS]


def chat(folder: Path) -> Prompts:
    """Write the demo's model; return questions for it."""
    from fastpref.demo.smollm2 import checkpoint

    (folder / "model").symlink_to(checkpoint())
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


def main() -> None:
    program, *rest = sys.argv[1:]
    if program in ("random", "chat"):
        folder = Path(rest[0])
        folder.mkdir()
        prompts = {"random": random, "chat": chat}[program](folder)
        (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    else:
        method, place, given = rest
        folder, settings = Path(place), json.loads(given)
        prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))[: settings["prompts"]]
        {"ours": ours, "trl": trl}[program](method, folder, prompts, settings)


if __name__ == "__main__":
    main()
