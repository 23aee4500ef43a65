"""Positions of judging models: one that has too few for what it would read is refused before anything is written."""

import warnings
from collections.abc import Iterable
from itertools import islice

from fastpref.judging.identity import name_of
from fastpref.judging.models import PreferenceModel, RewardModel
from fastpref.method.errors import CutWarning, ModelError

CHUNK = 4096
"""Prompts that are encoded together."""


def check_positions(judge: object, prompts: Iterable[str], max_new_tokens: int) -> None:
    """Raise ModelError where a judging model has too few positions for the prompts and for what is written to them.

    Prompts are counted as the model reads them, by its own template and limit; completions as the tokens of the policy,
    of which the model's tokenizer may make more.

    Args:
      judge: anything; only a `PreferenceModel` or `RewardModel` is looked at.
      prompts: all that it will be asked about.
      max_new_tokens: longest completion of the policy, EOS included.
    """
    if not isinstance(judge, PreferenceModel | RewardModel):
        return
    limit = judge.model.max_positions
    if limit is None:
        return
    pair = isinstance(judge, PreferenceModel)
    most = judge.max_tokens if isinstance(judge, PreferenceModel) else judge.max_prompt_tokens
    # The end of a completion is counted with its prompt.
    written = 2 * max_new_tokens if pair else max_new_tokens - 1
    left, longest = iter(prompts), 0
    while part := list(islice(left, CHUNK)):
        with warnings.catch_warnings():
            # Said where they are judged.
            warnings.simplefilter("ignore", CutWarning)
            heads, tails = judge.readings(part, *[[""] * len(part)] * (2 if pair else 1))
        if most is not None and most + max(map(len, tails)) + written <= limit:
            return
        longest = max(longest, *(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)))
    if longest and longest + written > limit:
        raise ModelError(
            f"a judge must have positions for what it reads, but received a {name_of(judge).rpartition('.')[2]} with "
            f"{limit} of them, where its longest prompt has {longest} tokens and completions of max_new_tokens="
            f"{max_new_tokens} take {written} more. Lower max_new_tokens or the judge's "
            f"{'max_tokens' if pair else 'max_prompt_tokens'}, or leave out the longest prompts."
        )
