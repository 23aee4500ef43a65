"""The demo's model: what is read of its GGUF file, against `transformers`' own reading of it; and the conversion."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from fastpref.data.chat import ChatTemplate
from fastpref.demo import smollm2
from fastpref.models import LanguageModel, load

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
    assert model.tokenizer.encode_prompts(texts) == ids
    for text, row in zip(texts, ids, strict=True):
        assert model.tokenizer.backend.decode(row, skip_special_tokens=False) == text
    assert model.tokenizer.decode(ids[-2:-1]) == ["user\nHi\n"]
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

    @jax.jit
    def logits(tokens: Any) -> Any:
        prompt, completion = tokens[None, :1], tokens[None, None, 1:]
        hidden = model.module.hidden_states(
            prompt, jnp.ones_like(prompt, bool), jnp.pad(completion, ((0, 0), (0, 0), (0, 1)))
        )
        return model.module.head().logits(hidden[0, 0])

    ours = np.asarray(logits(ids), np.float64)
    tolerance = {"rtol": 1e-4, "atol": 2e-3}
    np.testing.assert_allclose(ours[:, :: EXPECTED["every"]], EXPECTED["logits"], **tolerance)
    np.testing.assert_allclose(np.logaddexp.reduce(ours, axis=1), EXPECTED["logsumexp"], **tolerance)
    top = np.array(EXPECTED["top_ids"])
    np.testing.assert_allclose(np.take_along_axis(ours, top, 1), EXPECTED["top_logits"], **tolerance)
    assert (ours.argmax(1) == top[:, 0]).all()
