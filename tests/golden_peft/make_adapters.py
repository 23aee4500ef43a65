"""Write adapters by `peft` on golden checkpoints, and the logits that `transformers` computes with them.

Needs `torch`, `transformers` and `peft`, which the project itself does not depend on: `python make_adapters.py`.
`python make_adapters.py DIR` compares an adapter that was saved here with the logits in its `logits.safetensors`.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"

ADAPTERS = {
    "llama": ("llama_1", {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}),
    "llama_some": ("llama_2", {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "llama_head": ("llama3_rope", {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "lm_head"]}),
    "patterns": (
        "qwen3_1",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"o_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 12},
        },
    ),
    "phi3": ("phi3_1", {"r": 3, "lora_alpha": 3, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "gpt2": ("gpt2_1", {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gemma2": ("gemma2_1", {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}),
    "t5": ("t5_original", {"r": 3, "lora_alpha": 6, "target_modules": ["q", "v", "wo"]}),
}


def model_of(base: Path):
    kind = json.loads((base / "config.json").read_text())["model_type"]
    auto = transformers.AutoModelForSeq2SeqLM if kind in ("t5", "mt5") else transformers.AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval(), kind in ("t5", "mt5")


@torch.no_grad()
def logits(model, encoder_decoder: bool, tokens: np.ndarray) -> np.ndarray:
    ids = torch.tensor(tokens, dtype=torch.long)
    if not encoder_decoder:
        return model(input_ids=ids).logits.numpy()
    start = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    return model(input_ids=ids, decoder_input_ids=torch.cat([start, ids[:, :-1]], 1)).logits.numpy()


def main() -> None:
    rng = np.random.default_rng(0)
    for name, (base, settings) in ADAPTERS.items():
        torch.manual_seed(len(name))
        model, encoder_decoder = model_of(GOLDEN / base)
        kind = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(**settings, task_type=kind, init_lora_weights=False, lora_dropout=0.0)
        ).eval()
        tokens = rng.integers(3, model.config.get_text_config().vocab_size, (2, 11)).astype(np.int32)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        entries = json.loads((folder / "adapter_config.json").read_text())
        entries["base_model_name_or_path"] = f"../golden/{base}"
        (folder / "adapter_config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
        result = logits(adapted, encoder_decoder, tokens)
        save_file({"tokens": tokens, "logits": result}, HERE / f"{name}.safetensors")
        moved = float(np.abs(result - logits(model_of(GOLDEN / base)[0], encoder_decoder, tokens)).max())
        print(name, result.shape, f"moved by {moved:.2f}")


def compare(folder: Path) -> None:
    entries = json.loads((folder / "adapter_config.json").read_text())
    model, encoder_decoder = model_of(Path(entries["base_model_name_or_path"]))
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    known = load_file(folder / "logits.safetensors")
    print(folder.name, float(np.abs(logits(adapted, encoder_decoder, known["tokens"]) - known["logits"]).max()))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        compare(Path(argument))
    if len(sys.argv) == 1:
        main()
