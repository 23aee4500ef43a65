"""What a judging model reads: a conversation by its own chat template, whatever template wrote the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.data import ChatTemplate
from fastpref.data.messages import joined
from fastpref.data.readers import written_by
from fastpref.data.rendered import Conversation, Rendered, alike, is_finished
from fastpref.data.tokenization import fit_prompts
from fastpref.data.tokenizer import Tokenizer


def readings(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    max_prompt_tokens: int | None,
    to_the_end: bool,
    pad_id: int | None,
    chat_template_kwargs: Mapping[str, Any],
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and of what follows them, as a reward model reads them.

    A decoder's are those of the whole text, cut at the seam; behind a finished completion stands EOS.

    Args:
      tokenizer: of the reward model.
      prompts: N texts; conversations are written by the tokenizer's own template.
      completions: one of each, `Unfinished` where it was cut off.
      max_prompt_tokens: longest prompt; longer ones are cut by `fit_prompts`.
      to_the_end: read all that the template writes behind a finished answer, instead of EOS.
      pad_id: tokens of this id are left off the end.
      chat_template_kwargs: options of the template.

    Raises:
      ChatError: a prompt is a conversation, and the tokenizer brings no template, or one that refuses it.
      DataError: a chat above the limit has no turn that could be left out.
    """
    template = ChatTemplate.find(tokenizer, chat_template_kwargs)
    pairs = list(zip(prompts, completions, strict=True))
    texts = [_written(template, *pair) for pair in pairs]
    opened, bodies = [prompt for prompt, _ in texts], [body for _, body in texts]
    heads = tokenizer.encode_prompts(opened)
    limit = max(map(len, heads), default=0) if max_prompt_tokens is None else max_prompt_tokens
    long = [at for at, ids in enumerate(heads) if len(ids) > limit]
    cut = fit_prompts(opened, tokenizer, max_prompt_tokens=limit) if long else heads
    if tokenizer.encoder_decoder:
        return cut, tokenizer.encode_completions(bodies)
    ends = [_to_the_end(template, *pair) if to_the_end else None for pair in pairs]
    closed = iter(tokenizer.encode_prompts([end for end in ends if end is not None]))
    wholes = [tokenizer.joined(*text) for text in texts]
    begin, read = tokenizer.affixes[0], []
    for end, text, head, ids in zip(ends, wholes, heads, tokenizer.encode_completions(wholes), strict=True):
        opening = [] if isinstance(text, Rendered) else head[:begin]
        read.append([*opening, *ids] if end is None else next(closed))
    for at in long:
        ((_, tail),) = tokenizer.encode_records([opened[at]], [[bodies[at]]])
        read[at] = [*cut[at], *(tail if is_finished(bodies[at]) else tail[:-1])]
    for ids in read:
        while len(ids) > 1 and ids[-1] == pad_id:
            ids.pop()
    seams = [max(1, alike(head, ids)) for head, ids in zip(cut, read, strict=True)]
    before = [ids[:at] for at, ids in zip(seams, read, strict=True)]
    return before, [ids[at:] for at, ids in zip(seams, read, strict=True)]


def _written(template: ChatTemplate | None, prompt: str, completion: str) -> tuple[str, str]:
    """A prompt and its completion as the template writes them, where the prompt is a conversation; text as it is.

    Raises:
      ChatError: there is no template, or it refuses the conversation.
    """
    said = prompt.conversation if isinstance(prompt, Rendered) else None
    if said is None or template is None:
        return written_by(template, [prompt])[0], completion
    if isinstance(completion, Rendered) and template.wrote(prompt):
        # Of a recorded conversation: all of it was written at once.
        return prompt, completion
    opened, (body,) = template.answered(said, [[_reply(completion)]])
    finished = is_finished(completion)
    return opened, body if finished else Rendered(body, literals=body.literals, finished=False)


def _to_the_end(template: ChatTemplate | None, prompt: str, completion: str) -> Rendered | None:
    """A conversation and its answer to the very end, as reward models of the hub read it; None for any other text."""
    said = prompt.conversation if isinstance(prompt, Rendered) else None
    if said is None or template is None or not is_finished(completion):
        return None
    messages, reply = list(said.messages), _reply(completion)
    begun = messages[-1]["role"] == "assistant"
    turns = [*messages[:-1], joined(messages[-1], reply)] if begun else [*messages, reply]
    return template.whole(Conversation(turns, said.tools, said.options))


def _reply(completion: str) -> dict[str, str]:
    return {"role": "assistant", "content": str(completion)}
