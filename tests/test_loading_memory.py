"""Loading takes the memory of the result and little more, measured from outside on files made for it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson
import pytest
from small import tokenizer

LOAD = """
import sys
import jax, jax.numpy as jnp
from fastpref import load, load_judge
jax.block_until_ready(jnp.zeros(8) + 1)
print("ready", flush=True)
sys.stdin.readline()
model = load_judge(sys.argv[1]) if sys.argv[3] == "judge" else load(sys.argv[1], dtype=jnp.dtype(sys.argv[2]))
print("done", flush=True)
sys.stdin.readline()
"""


PROGRAMS = 64 << 20
"""Bytes that compilers and threads may take meanwhile: much of a small result, little of a gigabyte."""


def private_bytes(process: int) -> int:
    """Memory that a process holds of its own: anonymous pages, without those of files that it maps or reads."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def write_model(folder: Path, *, rows: int, width: int, layers: int, kind: str, judge: bool = False) -> int:
    """A Llama, or one with a scalar head, whose weights are written in pieces; returns how many there are."""
    hidden, numbers = 2 * width, np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"score.weight": (1, width)} if judge else {}
    size = {"F32": 4, "BF16": 2}[kind]
    header, at = {}, 0
    for name, shape in shapes.items():
        length = size * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    encoded = orjson.dumps(header)
    # Small finite numbers of either type, again and again.
    pattern = (numbers.normal(0, 0.02, 1 << 20).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.uint8)
    pattern = pattern if kind == "F32" else pattern.reshape(-1, 4)[:, 2:].reshape(-1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for left in range(at, 0, -len(pattern)):
            file.write(pattern[:left].tobytes())
    config = {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save(folder)
    return sum(int(np.prod(shape)) for shape in shapes.values())


def excess(folder: Path, count: int, dtype: str, what: str = "model") -> float:
    """Peak of private memory while a process loads, above what it held and `PROGRAMS`, as a multiple of the result."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(folder), dtype, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        before = peak = private_bytes(process.pid)
        os.set_blocking(process.stdout.fileno(), False)
        print(file=process.stdin, flush=True)
        while not process.stdout.readline():
            assert process.poll() is None
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.002)
        held = private_bytes(process.pid) - before
        print(file=process.stdin, flush=True)
    result = count * {"float32": 4, "bfloat16": 2}[dtype]
    # The measurement sees the weights at all.
    assert held > 0.9 * result
    return (peak - before - PROGRAMS) / result


@pytest.mark.parametrize(
    ("kind", "dtype", "rows", "width", "layers"),
    [
        # Half of it one tensor.
        ("BF16", "float32", 60_000, 640, 8),
        pytest.param("F32", "float32", 100_000, 1024, 20, marks=pytest.mark.slow),
        pytest.param("BF16", "bfloat16", 250_000, 1024, 32, marks=pytest.mark.slow),
    ],
)
def test_loading_takes_at_most_a_fifth_more_than_the_result(
    kind: str, dtype: str, rows: int, width: int, layers: int, tmp_path: Path
) -> None:
    count = write_model(tmp_path, rows=rows, width=width, layers=layers, kind=kind)
    assert excess(tmp_path, count, dtype) < 1.2


def test_a_reward_model_takes_its_body_once(tmp_path: Path) -> None:
    count = write_model(tmp_path, rows=30_000, width=640, layers=8, kind="BF16", judge=True)
    assert excess(tmp_path, count, "float32", "judge") < 1.2
