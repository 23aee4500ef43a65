"""Write what `transformers` makes of the demo's GGUF file by itself: token ids, a chat prompt, logits.

Of the tokenizer it leaves out that every digit stands alone, as the original tokenizer and llama.cpp have it. No merge
joins the digits 0 to 9, so that this is seen in signs such as ½ only, which the texts here do without.

Needs `torch`, `transformers`, `accelerate` and `gguf`; the project itself needs only the last. Run it in this folder:
`python make_smollm2.py PATH/OF/SmolLM2-135M-Instruct.Q4_1.gguf`. The versions that made the committed file are in it.
"""

import json
import platform
import sys
from pathlib import Path

import torch
import transformers
import xxhash

HERE = Path(__file__).parent
EVERY = 1536
"""Logits of so many ids apart are kept."""
TEXTS = (
    "Return the mean of an array, or of its columns where an axis is given.",
    "In 2024 it cost 1,234.50 euros (12.5 % more); phone 0049-30-901820.",
    "def mean(x, axis=None):\n    return x.sum(axis) / x.shape[0]  # naïve\n\n\n",
    "  leading,   inner  and trailing spaces\t\ttabs  ",
    "Größe, café, žluťoučký kůň, 日本語の文, مرحبا, 👍🏽 and 🇬🇧 are text too.",
    "I'm sure they'll say it's what we've heard: don't!",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "",
)
MESSAGES = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Summarize the documentation in one sentence."},
        {
            "role": "user",
            "content": "image blur: Each pixel becomes the mean of its neighbours.\nBorders are mirrored.",
        },
    ],
)
ANSWER = "Blur an image with the mean of its pixels.<|im_end|>"


def main() -> None:
    """Write `smollm2.json`."""
    file = Path(sys.argv[1])
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in MESSAGES
    ]
    ids = tokenizer(prompts[-1] + ANSWER).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    top = logits.topk(3)
    golden = {
        "versions": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (torch, transformers)},
            "file": xxhash.xxh3_64_hexdigest(file.read_bytes()),
        },
        "script": xxhash.xxh3_64_hexdigest(Path(__file__).read_bytes()),
        "texts": [{"text": text, "ids": tokenizer(text).input_ids} for text in TEXTS],
        "chats": [{"messages": each, "prompt": prompt} for each, prompt in zip(MESSAGES, prompts, strict=True)],
        "ids": ids,
        "every": EVERY,
        "logits": [[round(value, 5) for value in row] for row in logits[:, ::EVERY].tolist()],
        "logsumexp": [round(value, 5) for value in logits.logsumexp(-1).tolist()],
        "top_ids": top.indices.tolist(),
        "top_logits": [[round(value, 5) for value in row] for row in top.values.tolist()],
    }
    (HERE / "smollm2.json").write_text(json.dumps(golden, indent=None, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
