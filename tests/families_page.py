"""The page of families, written from their table: `python tests/families_page.py` in the project's folder."""

from collections.abc import Iterable
from pathlib import Path

from fastpref.models.configs import PROJECTIONS, SUPPORTED, T5_SCHEMA
from fastpref.models.decoder_entries import UNUSED
from fastpref.models.families import FAMILIES, SCHEMA
from fastpref.models.layers import ACTIVATIONS
from fastpref.models.rope import KINDS
from fastpref.models.rope_entries import ROPE_ENTRIES

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
INTRODUCTION = """# Checkpoints that are read and written

A directory in Hugging Face's layout is read by the `model_type` of its `config.json`. Each of these families gives the
logits of `transformers` within 1e-4 in float32 (`tests/golden`), and is saved as it came. Where logits are large, with
a standard deviation of 3 to 4, float32 itself errs by more than that: there ours are at most twice as far from those of
float64 as the float32 logits of `transformers` are (`phi3_large1` to `3`). An entry that changes a model in a way that
is not written here is refused by its name, with the values that are read; entries that change no logit (dropout,
caches, tokens) are kept and ignored. A file with `rope_parameters` and an older one with `rope_theta` and
`rope_scaling` mean the same, and what is left out means what it means in `transformers`.

Of a `gemma3` with images the language model is read, with a warning, and saved as `gemma3_text`.

Frequencies of the kinds `dynamic` and `longrope` change with the length of a text, which keys that are kept cannot
follow. They are read for texts within the first context (`max_position_embeddings`, or
`original_max_position_embeddings` for `longrope`), where they do not change; longer prompts with completions are
refused. So are texts longer than the learned positions of `gpt2`.
"""


def names(several: Iterable[str]) -> str:
    """Names in the form of code."""
    return ", ".join(f"`{name}`" for name in several) or "none"


def refused(kind: str) -> str:
    """Options of other families, and values of its own, that a family refuses."""
    family = FAMILIES[kind]
    options = [name for name in UNUSED if name not in family.reads and name not in family.options]
    ropes = [f"rope `{name}`" for name in KINDS if name not in family.ropes] if family.ropes else []
    return ", ".join([*(f"`{name}`" for name in options), *ropes])


def page() -> str:
    """The whole page."""
    decoders = "\n".join(
        f"| `{kind}` | {names(family.reads)} | {names(family.ropes)} | {refused(kind)} |"
        for kind, family in sorted(FAMILIES.items())
    )
    common = [name for name in SCHEMA if name != "rope_theta"]
    return f"""{INTRODUCTION}
## Decoders

All read {names(common)}; `gpt2` and Gemma call some by the names of their own files. Activations:
{names(sorted(ACTIVATIONS))}. Rotary positions: {names(ROPE_ENTRIES)}, `short_factor`, `long_factor`.

| family | also read | kinds of rotary positions | refused unless neutral |
| --- | --- | --- | --- |
{decoders}

## Encoder-decoders

| family | read | refused |
| --- | --- | --- |
| `t5`, `mt5` | {names(T5_SCHEMA)} | `feed_forward_proj` but {names(PROJECTIONS)} |

## Not read

Every other `model_type` than {names(SUPPORTED)}; quantised weights (`quantization_config`); weights that are not
safetensors.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
