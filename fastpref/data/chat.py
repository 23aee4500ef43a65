"""Conversations to text, by the chat template of a checkpoint: Jinja in a sandbox, set up as Hugging Face does."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from fastpref.data.sandbox import MAX_TEMPLATE, environment
from fastpref.data.tokenizer import Rendered, Tokenizer, read_json
from fastpref.method.errors import ChatError

Message = Mapping[str, Any]
"""`role` and `content`, both text, and whatever else the template reads."""


class ChatTemplate:
    """Writes conversations as the text that a model was trained on.

    What a template writes holds its own special tokens, and is `Rendered`, so that encoding adds none. Templates have
    no clock here: where Hugging Face offers the function `strftime_now` they find none, and those that ask whether it
    is there write their own fixed date. So the same data gives the same tokens on every day.

    Args:
      text: the template, in Jinja.
      tokens: special tokens by name (`bos_token`, `eos_token`, ...), which templates refer to.

    Raises:
      ChatError: the text is no template.
    """

    def __init__(self, text: str, tokens: Mapping[str, str] | None = None) -> None:
        self.text = text
        self.tokens: dict[str, str] = dict(tokens or {})
        if len(text) > MAX_TEMPLATE:
            raise ChatError(
                f"a chat template must have at most {MAX_TEMPLATE} characters, but received {len(text)}. Shorten it."
            )
        try:
            self._environment = environment()
            self._template = self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatError(
                f"a chat template must be Jinja, but received one that does not compile: {error}. Copy it again."
            ) from error

    @staticmethod
    def of(tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a tokenizer's directory: `chat_template.jinja`, else that of `tokenizer_config.json`.

        Where the configuration has several, the one named "default" is taken.

        Raises:
          ChatError: there is none.
        """
        found = ChatTemplate.find(tokenizer)
        if found is None:
            raise ChatError(
                "a tokenizer must bring a chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), but received none. Make a ChatTemplate from text, or use plain text."
            )
        return found

    @staticmethod
    def find(tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template that `of` gives, or None where there is none."""
        config = read_json(tokenizer.files, "special_tokens_map.json")
        config |= read_json(tokenizer.files, "tokenizer_config.json")
        text = config.get("chat_template")
        if isinstance(text, list):
            text = next((item["template"] for item in text if item.get("name") == "default"), None)
        if "chat_template.jinja" in tokenizer.files:
            text = tokenizer.files["chat_template.jinja"].decode()
        if not isinstance(text, str):
            return None
        # Some checkpoints number their end of sequence and do not name it.
        tokens: dict[str, str] = {"eos_token": tokenizer.backend.id_to_token(tokenizer.eos_id) or ""}
        for name, value in config.items():
            if name.endswith("_token") and (content := _content(value)) is not None:
                tokens[name] = content
        return ChatTemplate(text, tokens)

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """The text that the assistant's next message follows.

        Raises:
          ChatError: the template refuses the conversation, or it ends with a message of the assistant.
        """
        if not messages or messages[-1]["role"] == "assistant":
            raise ChatError(
                "a prompt must end with a message that is not the assistant's, but received one that does. Take it out."
            )
        return Rendered(self._render(messages, True))

    def completion(self, messages: Sequence[Message], reply: Sequence[Message]) -> Rendered:
        """What follows `prompt(messages)` where `reply` is the answer, without a closing end-of-sequence token.

        Raises:
          ChatError: the template refuses the conversation, or writes the prompt otherwise once it is answered.
        """
        if not reply:
            raise ChatError("a completion must hold at least one message of the assistant, but received none")
        prompt, whole = self.prompt(messages), self._render([*messages, *reply], False)
        if not whole.startswith(prompt):
            raise ChatError(
                "a chat template must write a prompt alike with and without its answer, but received one that does not"
            )
        text = whole.removeprefix(prompt)
        eos = self.tokens.get("eos_token")
        # Tokenization ends every completion with EOS itself; some templates put a line end behind theirs.
        if eos and (bare := text.rstrip()).endswith(eos):
            return Rendered(bare.removesuffix(eos))
        return Rendered(text)

    def texts(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
        """A conversational record as one of text, with the same columns.

        Messages are lists of mappings with a `role` and a `content`, both text. They may stand
        - under `prompt`, and `completion` or `chosen` and `rejected`; text alone is the user's or the assistant's;
        - under `completion`, or `chosen` and `rejected`, as whole conversations, which share all but the end;
        - under `messages`, whose last ones, the assistant's, are the completion; they are left out of a prompt alone.

        Args:
          row: the record.
          columns: `prompt`, and the completions to make.

        Returns:
          Text by column, of those.

        Raises:
          ChatError: the messages do not fit the above, or the template refuses them.
        """
        names = [name for name in columns if name in ("completion", "chosen", "rejected")]
        if all(name in row for name in names) and (names or "prompt" in row):
            replies = [_messages(row[name], "assistant") for name in names]
            if all(reply[0]["role"] == "assistant" for reply in replies):
                prompt = _messages(row.get("prompt"), "user")
            else:
                prompt, replies = _shared(replies)
        elif len(names) < 2 and "messages" in row:
            prompt, reply = _divided(_messages(row["messages"], "user"))
            replies = [reply] * len(names)
        else:
            raise ChatError(
                f"a conversational record must hold {', '.join(columns)}, but received {', '.join(row) or 'none'}"
            )
        written: dict[str, str] = {"prompt": self.prompt(prompt)}
        return written | {name: self.completion(prompt, reply) for name, reply in zip(names, replies, strict=True)}

    def _render(self, messages: Sequence[Message], open_answer: bool) -> str:
        try:
            self._environment.begin()
            return self._template.render(messages=messages, add_generation_prompt=open_answer, **self.tokens)
        except Exception as error:  # templates are programs, and fail like programs
            raise ChatError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error


def is_conversation(row: Mapping[str, Any], columns: Iterable[str]) -> bool:
    """Whether a record must go through a chat template: it holds messages where text is wanted."""
    wanted = [name for name in columns if name != "preference"]
    if any(isinstance(row.get(name), list | tuple) for name in wanted):
        return True
    return "messages" in row and any(name not in row for name in wanted)


def _messages(value: object, speaker: str) -> list[Message]:
    """Checked messages, without the empty entries that tables fill up with; text alone is the speaker's."""
    if isinstance(value, str | bytes):
        value = [{"role": speaker, "content": value}]
    if not isinstance(value, list | tuple) or not value:
        raise ChatError(f"a conversation must be a list of messages, but received {value!r:.50}")
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, Mapping):
            raise ChatError(f"a message must map role and content to text, but received {message!r:.50}")
        known = {name: _decoded(entry) for name, entry in message.items() if entry is not None}
        for name in ("role", "content"):
            if not isinstance(known.get(name), str):
                raise ChatError(
                    f"a message must map role and content to text, but received {name} {message.get(name)!r:.50}"
                )
        messages.append(known)
    return messages


def _decoded(entry: object) -> object:
    """Text for the bytes that tables hold."""
    return entry.decode() if isinstance(entry, bytes) else entry


def _divided(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The messages before the last ones of the assistant, and those."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end], messages[end:]


def _shared(conversations: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    prompts, replies = zip(*map(_divided, conversations), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise ChatError("whole conversations must share all but the assistant's last messages")
    return prompts[0], list(replies)


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
