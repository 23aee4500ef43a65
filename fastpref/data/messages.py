"""Messages, tools and options of a record, checked and plain, as chat templates read them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from fastpref.data.rendered import Message
from fastpref.method.errors import ChatError

OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message")
"""Names that a template is given anyway; no option may have them."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message's reasoning is kept; templates read the first, or the second."""

BEGIN, END = "\ufdd0", "\ufdd1"
"""Characters of no text, round a special token that a message names."""


def messages_of(value: object, speaker: str | None = "user") -> list[Message]:
    """Checked messages, without the empty entries that tables fill up with.

    Args:
      value: the messages; or text alone, which is the speaker's.
      speaker: a role; None where text is the JSON of messages.

    Raises:
      ChatError: something else.
    """
    if isinstance(value, str | bytes):
        value = _from_json("messages", value) if speaker is None else [{"role": speaker, "content": value}]
    if not isinstance(value, list | tuple) or not value:
        raise ChatError(
            f"a conversation must be a list of messages, but received {value!r:.50}. Write one role and content each."
        )
    return [_message(message) for message in value]


def _message(message: object) -> Message:
    if not isinstance(message, Mapping):
        raise ChatError(
            f"a message must map role and content to text, but received {message!r:.50}. Write both of them."
        )
    known: dict[str, Any] = {name: value for name, value in plain(message).items() if value is not None}
    if "content" not in known and any(name in known for name in ("tool_calls", *REASONING)):
        wanted = ["role"]
    else:
        wanted = ["role", "content"]
    if isinstance(known.get("content"), list | tuple):
        known["content"] = [_part(part) for part in known["content"]]
    for name in wanted:
        if not isinstance(known.get(name), str) and not (name == "content" and isinstance(known.get(name), list)):
            raise ChatError(
                f"a message must map role and content to text, but received {name} {message.get(name)!r:.50}. "
                "Write it as text."
            )
    return known


def _part(part: object) -> dict[str, Any]:
    """A part of a message's content: text, also where it is not said to be one."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    known = {name: value for name, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if known.get("type", "text") != "text" or not isinstance(known.get("text"), str):
        raise ChatError(
            f"parts of a message's content must be of type 'text', but received {part!r:.50}. Leave out what is no "
            "text."
        )
    return {"type": "text", **known}


def plain(value: Any) -> Any:
    """Values as JSON has them. Those of a table have bytes for text, and None for each entry that another row has."""
    table = _any(lambda part: isinstance(part, bytes), value)

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: bare(part) for name, part in value.items() if part is not None or not table}
        if isinstance(value, list | tuple):
            return [bare(part) for part in value]
        return value.decode() if isinstance(value, bytes) else value

    return bare(value)


def _any(holds: Callable[[Any], Any], value: Any) -> bool:
    """Whether some entry of a nested value keeps a rule."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_any(holds, part) for part in value)
    return bool(holds(value))


def names_special(special: re.Pattern[str], values: Sequence[Any]) -> bool:
    """Whether messages or tools name one of the special tokens."""
    return _any(lambda part: isinstance(part, str) and special.search(part), list(values))


def marked(value: Any, special: re.Pattern[str]) -> Any:
    """A nested value with the special tokens that its texts name between `BEGIN` and `END`; roles stay."""
    if isinstance(value, str):
        return special.sub(lambda match: f"{BEGIN}{match[0]}{END}", value)
    if isinstance(value, Mapping):
        return {name: part if name == "role" else marked(part, special) for name, part in value.items()}
    return [marked(part, special) for part in value] if isinstance(value, list | tuple) else value


def tools_of(value: object) -> list[Any] | None:
    """The `tools` of a record, a list of JSON schemas or the JSON of one; None where there are none, or it is empty.

    Raises:
      ChatError: something else.
    """
    tools = _from_json("tools", value)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ChatError(
            f"tools must be a list of JSON schemas, but received {value!r:.50}. Write one for each function."
        )
    return tools or None


def named_options(value: object) -> dict[str, Any]:
    """Options of a template, a mapping or the JSON of one, without those that are None.

    Raises:
      ChatError: something else, or a name that is taken.
    """
    options = _from_json("chat_template_kwargs", value)
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ChatError(f"chat_template_kwargs must be a mapping, but received {value!r:.50}. Write names and values.")
    if taken := [name for name in OWN if name in options]:
        raise ChatError(
            f"chat_template_kwargs must have other names than {', '.join(OWN)}, but received {taken[0]}. Take it out; "
            "tools have a column of their own."
        )
    return {name: option for name, option in options.items() if option is not None}


def _from_json(name: str, value: object) -> Any:
    if not isinstance(value, str | bytes):
        return plain(value)
    try:
        return orjson.loads(value) if value.strip() else None
    except orjson.JSONDecodeError as error:
        raise ChatError(
            f"{name} given as text must be JSON, but received an error at character {error.pos}: {error.msg}. "
            "Write it as JSON."
        ) from error


def with_system(messages: list[Message], text: object) -> list[Message]:
    """A conversation that begins with the `system` text of its record, where there is one.

    Raises:
      ChatError: it is not text, or the conversation has another.
    """
    text = plain(text)
    if text is None or text == "":
        return messages
    if not isinstance(text, str):
        raise ChatError(f"system must be text, but received {text!r:.50}. Write a message for anything else.")
    first = {"role": "system", "content": text}
    if not messages or messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0].get("content") != text:
        raise ChatError(
            f"a record must have one system text, but received {text!r:.50} beside a system message. Take one out."
        )
    return messages


def joined(begun: Message, rest: Message) -> dict[str, Any]:
    """A message that goes on with another."""
    first, second = begun.get("content", ""), rest.get("content", "")
    if isinstance(first, list) and isinstance(second, str):
        second = [{"type": "text", "text": second}]
    if isinstance(second, list) and isinstance(first, str):
        first = [{"type": "text", "text": first}]
    if isinstance(first, list) and first and isinstance(second, list) and second:
        # One part, so that a template that trims parts leaves the seam alone.
        seam = {**first[-1], "text": first[-1]["text"] + second[0]["text"]}
        return {**begun, **rest, "role": begun["role"], "content": [*first[:-1], seam, *second[1:]]}
    return {**begun, **rest, "role": begun["role"], "content": first + second}


def reasoning(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with their reasoning under each name that templates read it by."""
    found: list[dict[str, Any]] = []
    for message in messages:
        thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
        named = {} if thought is None else {"reasoning_content": thought}
        found.append({**({} if thought is None else {"thinking": thought}), **message, **named})
    return found


def divided(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The messages before the last ones of the assistant, and those."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end], messages[end:]


def shared(conversations: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """What whole conversations begin with alike, and how each goes on.

    Raises:
      ChatError: they differ before the assistant's last messages.
    """
    prompts, replies = zip(*map(divided, conversations), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise ChatError(
            "whole conversations must share all but the assistant's last messages, but received others. Give the "
            "prompt that they have in common."
        )
    return prompts[0], list(replies)
