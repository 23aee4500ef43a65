"""A GGUF file of SmolLM2's kind, small enough for every test: its converted checkpoint is a chat model of bytes."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 24, 32, 3, 3, 1, 8
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm") -> dict[str, np.ndarray]:
    """Write the file; return its float32 tensors as they are in it, by name."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, architecture)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ t", "h e", "Ġt he"]
    tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in merges)]
    writer.add_context_length(128)
    writer.add_vocab_size(len(tokens))
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (WIDTH,),
            f"blk.{layer}.attn_q": (HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_output": (WIDTH, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm": (WIDTH,),
            f"blk.{layer}.ffn_gate": (HIDDEN, WIDTH),
            f"blk.{layer}.ffn_up": (HIDDEN, WIDTH),
            f"blk.{layer}.ffn_down": (WIDTH, HIDDEN),
        }
    tensors = {}
    for name, shape in shapes.items():
        values = random.normal(size=shape)
        tensors[name] = (1 + 0.1 * values if len(shape) == 1 else 0.2 * values).astype(np.float32)
        writer.add_tensor(f"{name}.weight", tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
