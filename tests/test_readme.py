"""The README is true: its code runs, its settings parse, its commands and names exist, its figures are recorded."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import orjson
import pytest
from small import PROMPTS, language_model

from fastpref.cli import KEYS, parser
from fastpref.method.algorithms import ALGORITHMS, table
from fastpref.method.config import TrainConfig
from fastpref.method.tables import from_mapping
from fastpref.models import save

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippet(name: str) -> str:
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, name
    return found[1]


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_training_example_runs(tmp_path: Path) -> None:
    save(language_model(), tmp_path / "checkpoints" / "sft")
    (tmp_path / "prompts.jsonl").write_bytes(b"\n".join(orjson.dumps({"prompt": prompt}) for prompt in PROMPTS))
    code = snippet("train")
    assert "steps=1000" in code
    assert "max_new_tokens=64" in code
    short = code.replace("steps=1000", "steps=1").replace("max_new_tokens=64", "max_new_tokens=4")
    # One step: the policy is the reference still, but for the rounding of two forwards.
    assert float(run(short, tmp_path).splitlines()[-1]) == pytest.approx(0, abs=1e-5)
    assert (tmp_path / "runs" / "shorter" / "policy" / "adapter_model.safetensors").exists()


def test_the_comparison_example_runs(tmp_path: Path) -> None:
    for run_dir in ("checkpoints/sft", "runs/ipo-0", "runs/ipo-1", "runs/dpo"):
        save(language_model(), tmp_path / run_dir)
    judge = "judge = lambda prompts, first, second: [0.5 + 0.5 * (a > b) for a, b in zip(first, second)]"
    given = f"prompts = validation = {PROMPTS[:4]}\n{judge}\n"
    code = snippet("compare")
    chosen = re.search(r"best = .*\n", code)
    assert chosen
    short = code.replace(chosen[0], "").replace("=64", "=3").replace("=1000", "=1").replace("every=100", "every=1")
    run(given + short, tmp_path)
    assert (tmp_path / "compared" / "win_rates.png").exists()
    assert (tmp_path / "runs" / "tau" / "results.md").exists()


def test_the_kernel_example_runs(tmp_path: Path) -> None:
    assert run(snippet("kernels"), tmp_path)


def test_the_data_example_runs(tmp_path: Path) -> None:
    save(language_model(), tmp_path / "checkpoints" / "sft")
    rows = [{"prompt": prompt, "chosen": "w1 w2", "rejected": "w3"} for prompt in PROMPTS]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    # A model whose log-probs equal the reference's would give log 2; this one has no reference, and little to say.
    assert 0 < float(run(snippet("data").replace("2048", "128"), tmp_path)) < 10


def test_the_new_algorithm_runs(tmp_path: Path) -> None:
    ask = "print(config.method.mixture_betas(1.0), config.method.pairs, fastpref.ALGORITHMS['inpo'].pairs)"
    assert run(snippet("algorithm") + ask, tmp_path).strip() == "(0.0, 0.0) both tournament"


def test_the_toml_example_is_a_configuration() -> None:
    found = re.search(r"```toml\n(.*?)```", README, re.DOTALL)
    assert found
    values = tomllib.loads(found[1])
    assert set(values) <= set(KEYS["train"])
    assert from_mapping(TrainConfig, values["settings"]).tau == 0.1


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", README))
    assert {"demo", "test", "bench"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_command_of_the_program_exists() -> None:
    grammar = parser().format_help()
    for command in set(re.findall(r"`?fastpref (demo|sft|preference|train|evaluate|sweep|reproduce)\b", README)):
        assert command in grammar


def test_the_table_of_algorithms_is_written_from_the_source() -> None:
    assert table() in README
    assert table().count("\n") == len(ALGORITHMS) + 2


TREE = README[README.index("## The house") :]


def test_every_room_stands_in_the_tree() -> None:
    for path in (ROOT / "fastpref").iterdir():
        if path.is_dir() and (path / "__init__.py").is_file() and path.name != "kernels":
            assert f"\n  {path.name}/ " in TREE, path.name


@pytest.mark.parametrize(("room", "text"), re.findall(r"^ *(\w+)/ +(.*)$", TREE, re.M))
def test_the_tree_names_what_is_there(room: str, text: str) -> None:
    folder = next((path for path in (ROOT / room, ROOT / "fastpref" / room) if path.is_dir()), None)
    assert folder is not None
    for name, public in re.findall(r"(\w+)\.py(?: \(([^)]*)\))?", text):
        assert (folder / f"{name}.py").is_file(), name
        for value in public.split():
            module = importlib.import_module(f"fastpref.{room}.{name}")
            assert hasattr(module, value), f"{room}/{name}.py has no {value}"
    for name in re.findall(r"(\w+)/", text):
        assert (folder / name).is_dir(), name


NAMES = r"float32|bfloat16|Python 3\.\d+|C\+\+20|\bT5(-\w+)?|\(v1\.1 |Llama-[\w.-]+|\bv\d[ep]\b"


def prose(text: str) -> str:
    """What is said in words: no code, no addresses, nothing that is generated, no names that have digits."""
    text = text.replace(table(), "")
    for part in (r"```.*?```", r"<!-- figures: .*?<!-- end -->", r"<!--.*?-->", r"`[^`]*`", r"\]\([^)]*\)", NAMES):
        text = re.sub(part, "", text, flags=re.DOTALL)
    return text


def test_no_figure_stands_outside_what_is_generated() -> None:
    assert re.findall(r"[^\n]*\d[^\n]*", prose(README)) == []
    assert prose("It takes 3 ms on a v5e.") == "It takes 3 ms on a ."


def test_no_generated_part_of_a_sentence_begins_a_line() -> None:
    """Markdown would take the line for HTML and end the paragraph."""
    for text in (README, (ROOT / "docs" / "papers.md").read_text()):
        assert not re.search(r"^<!-- (figures: [\w-]+|end) -->.", text, re.M)
