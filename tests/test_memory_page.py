"""The guide to memory: its table is counted, its example goes through."""

from pathlib import Path

from memory_page import PAGE, memory, page
from small import PROMPTS, language_model
from test_docs import run, snippet

import fastpref


def test_the_table_is_counted() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "| adapters, AdamW, bfloat16 |" in text
    assert text == page(text)


def test_three_models_take_little_more_than_one_base() -> None:
    for dtype in ("float32", "bfloat16"):
        held = memory("Llama-3.1-8B", {"optimizer": "adamw", "dtype": dtype, "adapter": fastpref.AdapterConfig(rank=8)})
        assert held.policy + held.ref + held.round <= 1.05 * held.ref
        rounds = memory(
            "Llama-3.1-8B",
            {"optimizer": "adamw", "dtype": dtype, "adapter": fastpref.AdapterConfig(rank=8), "algorithm": "inpo"},
        )
        assert rounds.round > 0
        assert rounds.policy + rounds.ref + rounds.round <= 1.05 * rounds.ref


def test_the_example_goes_through(tmp_path: Path) -> None:
    fastpref.save(language_model(), tmp_path / "checkpoints" / "sft")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    judge = "judge = lambda prompts, first, second: [float(len(a) < len(b)) for a, b in zip(first, second)]\n"
    run(judge + snippet("fit_in_memory.md", "memory"), tmp_path)
    assert (tmp_path / "runs" / "adapter" / "policy" / "adapter_config.json").is_file()
    assert fastpref.load(tmp_path / "checkpoints" / "aligned").source == tmp_path / "checkpoints" / "aligned"
