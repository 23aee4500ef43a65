"""Makes the SentencePiece models of this folder, and the ids that transformers gives to texts of many kinds.

Run by hand where torch-free transformers 5, sentencepiece and protobuf are installed: `python make.py`. The models are
trained on our own sentences; `ids.json` holds, for each directory, its files and the ids of each text.
"""

import json
import tempfile
from pathlib import Path

import sentencepiece
import transformers

HERE = Path(__file__).parent
TEXT = (
    "the river rose three feet after a storm and every mill had to close for one week while people waited upstream "
    "good summaries say what changed, why it matters; bad ones repeat words. Answer: yes or no? 1 2 3 40 1998 naïve "
    "café São Paulo Straße über Москва 東京 今日 def main(): return x + 1 print hello world user assistant system"
)
WORDS = TEXT.split(" ")
SENTENCES = [
    " ".join(WORDS[(start * step + start) % len(WORDS)] for start in range(5 + step % 7)) + end
    for step in range(1, 200)
    for end in (".", "!", " …")
]
TEXTS = [
    "The river rose.",
    " a blank before",
    "  two blanks  between   and behind  ",
    "lines\nof\n\ntext\r\nand\ttabs",
    "\nfirst a line end",
    "",
    " ",
    "naïve café São Paulo",
    "ﬁ ligature, ｆｕｌｌ width, e\u0301 combining",
    "東京 今日は Москва",
    "emoji 🙂 and 👩‍👩‍👧 unknown ☃",
    "a\u00a0no-break\u200bzero-width",
    "</s> in the text <s> and <pad> <unk>",
    "<extra_id_0> filled <extra_id_1>",
    "[INST] hello [/INST] <<SYS>>",
    "▁ a block and ▁▁two",
    "def main():\n    return x + 1  # 1998",
    "<0x41> is letters",
    "x" * 40,
    "word</s>word </s> word",
    "\ufeffbom and \x00 nul",
]
CASES = {
    "t5": ("t5.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}, {"model_type": "t5"}),
    "t5 without settings": ("t5.model", {}, {"model_type": "t5"}),
    "mt5": ("t5.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}, {"model_type": "mt5"}),
    "t5 symbols": ("t5_symbols.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}, {"model_type": "mt5"}),
    "llama": (
        "llama.model",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False},
        {"model_type": "llama"},
    ),
    "llama legacy": (
        "llama.model",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True},
        {"model_type": "llama"},
    ),
    "llama ends": (
        "llama.model",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True},
        {"model_type": "llama"},
    ),
    "llama without settings": ("llama.model", {"tokenizer_class": "LlamaTokenizer"}, {"model_type": "llama"}),
    "llama no blank": (
        "llama.model",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_prefix_space": False},
        {"model_type": "llama"},
    ),
    "llama chat": (
        "llama.model",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "added_tokens_decoder": {
                str(number): {
                    "content": content,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for number, content in {0: "<unk>", 1: "<s>", 2: "</s>", 420: "<|user|>", 421: "<|end|>"}.items()
            },
            "eos_token": "<|end|>",
        },
        {"model_type": "llama"},
    ),
}


def train(name: str, **options: object) -> None:
    """Train a model of 420 pieces or fewer."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(HERE / name),
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    (HERE / f"{name}.vocab").unlink()


def main() -> None:
    """Write the models and `ids.json`."""
    ends = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    train("t5", model_type="unigram", vocab_size=120, **ends)
    train(
        "t5_symbols",
        model_type="unigram",
        vocab_size=130,
        user_defined_symbols=["▁<extra_id_1>", "<cls>"],
        normalization_rule_name="identity",
        **ends,
    )
    train(
        "llama",
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.98,
    )
    result = {}
    for name, (model, settings, config) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            file = "tokenizer.model" if model.startswith("llama") else "spiece.model"
            (Path(folder) / file).write_bytes((HERE / model).read_bytes())
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
            (Path(folder) / "config.json").write_text(json.dumps(config))
            made = transformers.AutoTokenizer.from_pretrained(folder)
        print(name, type(made).__name__, len(made), made.special_tokens_map)
        result[name] = {
            "model": model,
            "file": file,
            "tokenizer_config": settings,
            "config": config,
            "eos": made.eos_token_id,
            "ids": [[text, made.encode(text), made.encode(text, add_special_tokens=False)] for text in TEXTS],
            "decoded": [made.decode(made.encode(text), skip_special_tokens=True) for text in TEXTS],
        }
    text = json.dumps({"transformers": transformers.__version__, "cases": result}, ensure_ascii=True, indent=0)
    (HERE / "ids.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
