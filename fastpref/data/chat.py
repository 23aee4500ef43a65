"""Conversations to text, by the chat template of a checkpoint: Jinja in a sandbox, set up as Hugging Face does."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jinja2

from fastpref.data.messages import (
    BEGIN,
    END,
    divided,
    joined,
    marked,
    messages_of,
    named_options,
    names_special,
    reasoning,
    shared,
    tools_of,
    with_system,
)
from fastpref.data.rendered import Conversation, Frame, Message, Rendered, Span, alike, unended
from fastpref.data.sandbox import MAX_TEMPLATE, clock, environment
from fastpref.method.errors import ChatError

DATE = "2024-07-26"
"""The day on which templates are written unless an option says another: the same data gives the same tokens on every
day. It is the one that Llama's templates fall back to."""

_TAG, _ASKED, _SAID = "\ufdd2", "\ufdd3asked", "\ufdd3said"
"""Texts that no message holds: behind a message that is continued, and two messages by which a template is known."""


@runtime_checkable
class Templated(Protocol):
    """What brings a chat template: a `Tokenizer`."""

    @property
    def template(self) -> "ChatTemplate | None":
        """Its template, or None."""


class ChatTemplate:
    """Writes conversations as the text that a model was trained on.

    A template is given all names that Hugging Face gives it: `messages`, `tools` and `documents` (None where there are
    none), `add_generation_prompt`, the special tokens that the checkpoint names, `strftime_now`, and options. What it
    writes holds its own special tokens, and is `Rendered`, so that encoding adds none.

    Args:
      text: the default template, in Jinja; None where a checkpoint has only named ones.
      tokens: special tokens by name (`bos_token`, `eos_token`, ...), which templates refer to.
      named: further templates by name. "tool_use" is taken where there are tools; the option `chat_template` names
        another.
      special: special tokens that are text where a message names them; None for those of `tokens`.
      ends: special tokens that end a completion; None for `eos_token`.
      options: further names for the templates, such as `enable_thinking`, which those of a record override.
        `chat_template` is the name of a template, `strftime_now` the day that it is, such as "2026-11-25".

    Raises:
      ChatError: a text is no template, or an option has a name that is taken.
    """

    def __init__(
        self,
        text: str | None,
        tokens: Mapping[str, str] | None = None,
        *,
        named: Mapping[str, str] | None = None,
        special: Iterable[str] | None = None,
        ends: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.text = text
        self.tokens: dict[str, str] = dict(tokens or {})
        self.named: dict[str, str] = dict(named or {})
        self.special = tuple(sorted({*(self.tokens.values() if special is None else special)} - {""}))
        self.ends = tuple(ends) if ends is not None else tuple(filter(None, [self.tokens.get("eos_token")]))
        self.options = named_options(options)
        self._environment = environment()
        texts = {name: text for name, text in {"": text, **self.named}.items() if text is not None}
        self._templates = {name: self._compiled(text) for name, text in texts.items()}
        self._takes_parts: dict[int, bool] = {}
        self._special = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")

    def _compiled(self, text: str) -> jinja2.Template:
        if len(text) > MAX_TEMPLATE:
            raise ChatError(
                f"a chat template must have at most {MAX_TEMPLATE} characters, but received {len(text)}. Shorten it."
            )
        try:
            return self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatError(
                f"a chat template must be Jinja, but received one that does not compile: {error}. Copy it again."
            ) from error

    @staticmethod
    def of(tokenizer: Templated, options: Mapping[str, Any] | None = None) -> "ChatTemplate":
        """The template of a tokenizer's directory: `chat_template.jinja`, else that of `tokenizer_config.json`.

        Where there are several, the one named "default" is taken, unless the option `chat_template` names another.

        Args:
          tokenizer: brings the template.
          options: further names for it.

        Raises:
          ChatError: there is none.
        """
        found = ChatTemplate.find(tokenizer, options)
        if found is None:
            raise ChatError(
                "a tokenizer must bring a chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), but received none. Make a ChatTemplate from text, or use plain text."
            )
        return found

    @staticmethod
    def find(tokenizer: Templated, options: Mapping[str, Any] | None = None) -> "ChatTemplate | None":
        """The template that `of` gives, or None where there is none."""
        found = tokenizer.template
        if found is None or not options:
            return found
        return ChatTemplate(
            found.text,
            found.tokens,
            named=found.named,
            special=found.special,
            ends=found.ends,
            options=found.options | dict(options),
        )

    @property
    def identity(self) -> list[Any]:
        """All that decides what is written, as JSON values."""
        return [self.text, self.tokens, self.named, self.special, self.ends, self.options]

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The text that the assistant's next message follows, or, where the last message is the assistant's, goes on.

        Args:
          messages: the conversation.
          tools: JSON schemas of the functions that the model may call.
          options: further names for the template, before those of the run.

        Raises:
          ChatError: the template refuses the conversation.
        """
        return self._prompt(Conversation(messages_of(messages), tools_of(tools), named_options(options)))

    def _prompt(self, said: Conversation) -> Rendered:
        text, literals = self._written(said, opened=True)
        return Rendered(text, literals=literals, conversation=said, template=self)

    def completion(self, messages: Sequence[Message], reply: Sequence[Message]) -> Rendered:
        """What makes a prompt the conversation with `reply` as the answer; see `answered`."""
        said = Conversation(messages_of(messages))
        return self.answered(said, [messages_of(reply) if reply else []])[1][0]

    def answered(self, said: Conversation, replies: Sequence[Sequence[Message]]) -> tuple[Rendered, list[Rendered]]:
        """A prompt and the completions that make it the conversation with each reply as the answer.

        The prompt is what the text for the next message and the answered conversations begin with alike: a template
        may open a block, such as `<think>`, that answers do not have.

        Args:
          said: the conversation before the answer; it may end with the beginning of it.
          replies: the messages of each answer.

        Returns:
          The prompt, and each completion without the special token that closes it, which is its `end`.

        Raises:
          ChatError: the template refuses a conversation, or writes the messages before an answer otherwise with it.
        """
        messages = list(said.messages)
        begun = messages[-1]["role"] == "assistant"
        prompt = self._prompt(said)
        least = len(prompt) if begun else self._header(said, prompt)
        wholes = []
        for reply in replies:
            if not reply or reply[0]["role"] != "assistant":
                raise ChatError(
                    "a completion must hold at least one message of the assistant, but received none. Add its answer."
                )
            turns = [*messages[:-1], joined(messages[-1], reply[0]), *reply[1:]] if begun else [*messages, *reply]
            wholes.append(self._written(Conversation(turns, said.tools, said.options), opened=False))
        cut = min([len(prompt), *(alike(prompt, whole) for whole, _ in wholes)])
        for literals in (prompt.literals, *(literals for _, literals in wholes)):
            cut = min([cut, *(start for start, end in literals if start < cut < end)])
        if cut < least:
            raise ChatError(
                "a chat template must write a prompt alike with and without its answer, but received one that does "
                "not. Give prompts and completions as text."
            )
        common = Rendered(
            prompt[:cut],
            literals=[span for span in prompt.literals if span[1] <= cut],
            conversation=said,
            template=self,
            tail=prompt[cut:],
        )
        return common, [self._completion(whole, literals, cut) for whole, literals in wholes]

    def whole(self, said: Conversation) -> Rendered:
        """A conversation to its end, with all that closes its last message, as `apply_chat_template` writes it.

        Raises:
          ChatError: the template refuses the conversation.
        """
        text, literals = self._written(said, opened=False)
        return Rendered(text, literals=literals)

    def _completion(self, whole: str, literals: Sequence[Span], cut: int) -> Rendered:
        text, end = unended(whole[cut:], self.ends)
        spans = [(start - cut, stop - cut) for start, stop in literals if start >= cut]
        return Rendered(text, literals=[span for span in spans if span[1] <= len(text)], end=end)

    def _header(self, said: Conversation, prompt: str) -> int:
        """Characters of a prompt before what opens the answer."""
        try:
            return alike(prompt, self._text(said, opened=False))
        except ChatError:  # it writes only conversations that are answered
            return 0

    def wrote(self, prompt: str) -> bool:
        """Whether this template, with these options or where it has none, wrote a prompt."""
        writer = getattr(prompt, "template", None)
        known = isinstance(writer, ChatTemplate) and writer.identity[:-1] == self.identity[:-1]
        return known and self.options in ({}, getattr(writer, "options", {}))

    def shorter(self, prompt: Rendered) -> Rendered | None:
        """A prompt without its oldest turn, that is up to the next message of the user; None where it has one alone."""
        said = prompt.conversation
        if said is None:
            return None
        messages = list(said.messages)
        start = next((at for at, message in enumerate(messages) if message["role"] not in SYSTEM), len(messages))
        later = [at for at, message in enumerate(messages) if message["role"] == "user" and at > start]
        if not later:
            return None
        made = self._prompt(Conversation(messages[:start] + messages[later[0] :], said.tools, said.options))
        if not made.endswith(prompt.tail):
            return None
        end = len(made) - len(prompt.tail)
        literals = [span for span in made.literals if span[1] <= end]
        return Rendered(made[:end], literals=literals, conversation=made.conversation, template=self, tail=prompt.tail)

    def texts(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
        """A conversational record as one of text, with the same columns.

        Messages are lists of mappings with a `role` and a `content`, text or parts of text. They may stand
        - under `prompt`, and `completion` or `chosen` and `rejected`; text alone is the user's or the assistant's;
        - under `completion`, or `chosen` and `rejected`, as whole conversations, which share all but the end;
        - under `messages`, or in JSON, whose last ones, the assistant's, are the completion, and no part of a prompt.

        A prompt that ends with a message of the assistant is continued. Beside them may stand `tools`, `system`, a
        text that becomes the first message, and `chat_template_kwargs`, options of this record.

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
            replies = [messages_of(row[name], "assistant") for name in names]
            if all(reply[0]["role"] == "assistant" for reply in replies):
                prompt = messages_of(row.get("prompt"), "user")
            else:
                prompt, replies = shared(replies)
        elif len(names) < 2 and "messages" in row:
            prompt, reply = divided(messages_of(row["messages"], None))
            replies = [reply] * len(names)
        else:
            raise ChatError(
                f"a conversational record must hold {', '.join(columns)}, but received {', '.join(row) or 'none'}. "
                "Add what is missing."
            )
        prompt = with_system(prompt, row.get("system"))
        if not prompt:
            raise ChatError("a conversation must hold a message before its answer, but received none. Add a prompt.")
        said = Conversation(prompt, tools_of(row.get("tools")), named_options(row.get("chat_template_kwargs")))
        if not names:
            return {"prompt": self._prompt(said)}
        opened, completions = self.answered(said, replies)
        written: dict[str, str] = {"prompt": opened}
        return written | dict(zip(names, completions, strict=True))

    @cached_property
    def frame(self) -> Frame | None:
        """What its texts are recognised by, and the end of its answers; None where it refuses the simplest of them."""
        asked, said = ({"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID})
        try:
            prompt = self._text(Conversation([asked]), opened=True)
            whole = self._text(Conversation([asked, said]), opened=False)
            start = self._header(Conversation([asked]), prompt)
            # Without a block that only a prompt for the next answer opens.
            header = prompt[start : alike(prompt, whole)] or prompt[start:] or prompt.rpartition(_ASKED)[2]
        except ChatError:
            return None
        try:
            guided = self._text(Conversation([{"role": "system", "content": _ASKED}, asked]), opened=True)
        except ChatError:
            guided = prompt
        openings = {text.partition(_ASKED)[0] for text in (prompt, guided)}
        return Frame(tuple(sorted(openings - {""})), header, unended(whole.rpartition(_SAID)[2], self.ends)[1])

    def _written(self, said: Conversation, *, opened: bool) -> tuple[str, list[Span]]:
        """The text of a conversation, and where it names special tokens that the template did not write."""
        text = self._text(said, opened=opened)
        spans: list[Span] = []
        if not names_special(self._special, [*said.messages, *(said.tools or ())]):
            return text, spans
        messages, tools = marked(list(said.messages), self._special), marked(said.tools, self._special)
        clean = ""
        for piece in re.split(f"([{BEGIN}{END}])", self._text(Conversation(messages, tools, said.options), opened)):
            if piece == BEGIN:
                spans.append((len(clean), len(clean)))
            elif piece == END and spans:
                spans[-1] = (spans[-1][0], len(clean))
            elif piece not in (BEGIN, END):
                clean += piece
        if clean != text:
            raise ChatError(
                "a chat template must leave special tokens of a message as they are, but received one that changes "
                "them. Take them out, or read them as control tokens: special_text=True."
            )
        return text, [span for span in spans if span[0] < span[1]]

    def _text(self, said: Conversation, opened: bool) -> str:
        """What the template writes; an answer that has begun is left open where one is to be opened."""
        options = {**self.options, **said.options}
        template = self._chosen(options.pop("chat_template", None), said.tools)
        messages = reasoning(self._plain(said.messages, template))
        continued = opened and bool(messages) and messages[-1]["role"] == "assistant"
        if continued:
            messages[-1] = joined(messages[-1], {"content": f"{_TAG} "})
        written = self._run(template, messages, said.tools, options, opened and not continued)
        if not continued:
            return written
        before, tag, after = written.rpartition(_TAG)
        if not tag:
            raise ChatError(
                "a chat template must write the assistant's last message for it to be continued, but received one "
                "that leaves it out. Take the message out."
            )
        # Where the blank behind the tag is gone, the template has trimmed the message.
        return before if after.startswith(" ") else before.rstrip()

    def _run(
        self,
        template: jinja2.Template,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        options: Mapping[str, Any],
        opened: bool,
    ) -> str:
        names = {"documents": None, **self.tokens, **options}
        try:
            day = datetime.fromisoformat(names.pop("strftime_now", DATE))
        except (TypeError, ValueError) as error:
            raise ChatError(
                f"strftime_now must be a day such as {DATE!r}, but received {options['strftime_now']!r}. Write it so."
            ) from error
        names |= {"messages": messages, "tools": tools, "add_generation_prompt": opened, "strftime_now": clock(day)}
        try:
            self._environment.begin()
            return template.render(**names)
        except Exception as error:  # templates are programs, and fail like programs
            raise ChatError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error

    def _chosen(self, name: object, tools: Sequence[Any] | None) -> jinja2.Template:
        known = "tool_use" if name is None and tools is not None and "tool_use" in self.named else name
        key = "" if known is None or (known == "default" and "default" not in self.named) else known
        if not isinstance(key, str) or key not in self._templates:
            raise ChatError(
                f"a chat template must be one of those of the checkpoint ({', '.join(self.named) or 'default'}), but "
                f"received {'none' if name is None else repr(name)}. Name it in chat_template_kwargs: "
                '{"chat_template": ...}.'
            )
        return self._templates[key]

    def _plain(self, messages: Sequence[Message], template: jinja2.Template) -> list[dict[str, Any]]:
        """Messages whose parts are one text, where the template does not read parts."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return [dict(message) for message in messages]
        if id(template) not in self._takes_parts:
            probe = [{"role": "user", "content": [{"type": "text", "text": _ASKED}]}]
            try:
                written = self._run(template, probe, None, {}, True)
            except ChatError:
                written = ""
            self._takes_parts[id(template)] = _ASKED in written and "type" not in written
        if self._takes_parts[id(template)]:
            return [dict(message) for message in messages]
        return [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            if isinstance(message.get("content"), list)
            else dict(message)
            for message in messages
        ]


SYSTEM = ("system", "developer")
"""Roles of messages that stay when a conversation loses its oldest turns."""


def is_conversation(row: Mapping[str, Any], columns: Iterable[str]) -> bool:
    """Whether a record must go through a chat template: it holds messages where text is wanted."""
    wanted = [name for name in columns if name != "preference"]
    if any(isinstance(row.get(name), list | tuple) for name in wanted):
        return True
    return "messages" in row and any(name not in row for name in wanted)
