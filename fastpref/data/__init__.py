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

`tokenized` reads and encodes in one call, and keeps the tokens in a mapped file where it is given a `cache`; for data
that does not fit, `RecordStream` and `TokenStream` hand over the same records and tokens in parts. Conversations are
written by `ChatTemplate.of(tokenizer)`, passed as `template`.

The parts: `json_files`, `sources`, `readers` and `chat` make records of files, `tokenization` token ids of records, and
`cache` keeps them; `batchers` pads, `packing` packs pairs into the rows of `row_shapes`, and `columns` checks what both
are given. The last three alone import the native extension.
"""

from fastpref._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
