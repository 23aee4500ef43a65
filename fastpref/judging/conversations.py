"""What a judging model reads: a conversation by its own chat template, whatever template wrote the prompt."""

from fastpref.data import ChatTemplate
from fastpref.data.chat import written_by
from fastpref.data.messages import joined
from fastpref.data.rendered import Conversation, Rendered, is_finished


def written(template: ChatTemplate | None, prompt: str, completion: str) -> tuple[str, str]:
    """A prompt and its completion as the template writes them, where the prompt is a conversation; text as it is.

    Raises:
      ChatError: there is no template, or it refuses the conversation.
    """
    said = prompt.conversation if isinstance(prompt, Rendered) else None
    if said is None or template is None:
        return written_by(template, [prompt])[0], completion
    opened, (body,) = template.answered(said, [[_reply(completion)]])
    finished = is_finished(completion)
    return opened, body if finished else Rendered(body, literals=body.literals, finished=False)


def whole(template: ChatTemplate | None, prompt: str, completion: str) -> Rendered | None:
    """A conversation and its answer to the very end, as reward models of the hub read it; None for any other text."""
    said = prompt.conversation if isinstance(prompt, Rendered) else None
    if said is None or template is None or not is_finished(completion):
        return None
    messages, reply = list(said.messages), _reply(completion)
    begun = messages[-1]["role"] == "assistant"
    turns = [*messages[:-1], joined(messages[-1], reply)] if begun else [*messages, reply]
    text = template.whole(Conversation(turns, said.tools, said.options))
    # It holds its own end.
    return Rendered(text, literals=text.literals, finished=False)


def _reply(completion: str) -> dict[str, str]:
    return {"role": "assistant", "content": str(completion)}
