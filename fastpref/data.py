"""Batches of token ids in few static shapes, from the native core: seeded, exactly resumable, taken without a copy.

    tokenizer = Tokenizer.load("checkpoints/sft")
    records, dropped = read_records("pairs.jsonl", columns=("prompt", "chosen", "rejected"))
    tokens, cut = tokenize_completions(records, tokenizer, max_prompt_tokens=512, max_completion_tokens=256)
    with PairBatcher(
        tokens.prompts, *tokens.completions, tokens.preference, ids=tokens.ids, rows=8, row_tokens=4096
    ) as batches:
        for batch in batches:  # PackedPairs: whole pairs in rows of 4096 places
            ...
        state = batches.state()  # restore(state) goes on with the very next batch

The parts: `readers` and `tokenization` make token ids of files; `batchers` pads, `packing` packs pairs; `columns`
checks what both are given. The last three alone import the native extension.
"""

from fastpref.batchers import CompletionBatcher, PaddedPairBatcher, PromptBatcher
from fastpref.packing import Packing, PairBatcher, pack_pairs, row_counts
from fastpref.readers import DataError, DropReport, Record, read_records
from fastpref.records import PackedPairs
from fastpref.tokenization import Encoder, Ragged, TokenRecords, tokenize_completions, tokenize_prompts

__all__ = [
    "CompletionBatcher",
    "DataError",
    "DropReport",
    "Encoder",
    "PackedPairs",
    "Packing",
    "PaddedPairBatcher",
    "PairBatcher",
    "PromptBatcher",
    "Ragged",
    "Record",
    "TokenRecords",
    "pack_pairs",
    "read_records",
    "row_counts",
    "tokenize_completions",
    "tokenize_prompts",
]
