"""Write `rewards.json`: token ids and scores by transformers of the reward models of `reward_checkpoints.py`.

Needs `torch` and `transformers`, which the project itself does not depend on: `python make_rewards.py`.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
import xxhash

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from reward_checkpoints import CHATS, KINDS, REPLIES, write_checkpoint  # noqa: E402

LOADED = {"dtype": torch.float32, "attn_implementation": "eager"}
"""Other implementations of attention leave Gemma 2's bound of its scores out."""


def value_head(path: Path):
    """TRL's scalar head: a linear map of the last states."""
    from safetensors.torch import load_file

    weights = load_file(path / "model.safetensors")
    body = transformers.AutoModelForCausalLM.from_pretrained(path, **LOADED).eval()

    def score(ids):
        states = body(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
        return float(weights["v_head.summary.weight"][0] @ states + weights["v_head.summary.bias"][0])

    return score


def classifier(path: Path, pad):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, **LOADED).eval()

    def score(ids):
        alone = float(model(torch.tensor([ids])).logits[0, 0])
        if pad is not None:
            padded = torch.tensor([[*ids, *[pad] * 5]])
            mask = torch.tensor([[1] * len(ids) + [0] * 5])
            together = float(model(padded, attention_mask=mask).logits[0, 0])
            assert abs(alone - together) < 1e-5, (alone, together)
        return alone

    return score


@torch.no_grad()
def main() -> None:
    found = {}
    for kind, known in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write_checkpoint(Path(folder) / kind, kind)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            score = value_head(path) if kind == "value_head" else classifier(path, known["pad"])
            entries = {"chat": [], "cut chat": [], "text": []}
            for chat, reply in zip(CHATS, REPLIES, strict=True):
                answered = [*chat, {"role": "assistant", "content": reply}]
                text = tokenizer.apply_chat_template(answered, tokenize=False)
                whole = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=True)["input_ids"]
                cut = tokenizer(text[: text.rindex(tokenizer.eos_token)], add_special_tokens=False)["input_ids"]
                plain = [*tokenizer(f"{chat[-1]['content']} {reply}")["input_ids"], tokenizer.eos_token_id]
                for name, ids in (("chat", whole), ("cut chat", cut), ("text", plain)):
                    entries[name].append({"ids": ids, "score": score(ids)})
            weights = xxhash.xxh3_64_hexdigest((path / "model.safetensors").read_bytes())
            found[kind] = {"weights": weights, **entries}
    versions = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    (HERE / "rewards.json").write_text(json.dumps({"versions": versions, "models": found}) + "\n")


if __name__ == "__main__":
    main()
