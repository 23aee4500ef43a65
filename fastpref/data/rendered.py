"""Text that a chat template wrote, with what tells its control tokens from a user's words that look like them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastpref.method.errors import DataError

Message = Mapping[str, Any]
"""`role`, `content` (text, or parts of `type` "text"), and whatever else the template reads."""

Span = tuple[int, int]
"""Begin and end of some characters of a text."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given.

    Args:
      messages: with a `role` each.
      tools: JSON schemas of the functions that the model may call, or None.
      options: further names for the template, such as `enable_thinking`; see `ChatTemplate`.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Rendered(str):
    """A text as a chat template wrote it: it holds its special tokens already, and is encoded without adding any.

    Args:
      text: the text.
      literals: places where a message itself names a special token; these are text, not control tokens.
      end: of a completion, the special token that closed it, which the text no longer holds; "" for none.
      conversation: of a prompt, what it was made of; a judge with a template of its own reads this.
      template: what wrote it, where it may be asked for a shorter one: a `ChatTemplate`.
      tail: what the template wrote behind the text, and was taken off because answers do not begin with it.
      finished: False of a completion that was cut off, as for `Unfinished`.
    """

    __slots__ = ("conversation", "end", "finished", "literals", "tail", "template")
    literals: tuple[Span, ...]
    end: str
    conversation: Conversation | None
    template: Any
    tail: str
    finished: bool

    def __new__(
        cls,
        text: str,
        *,
        literals: Sequence[Span] = (),
        end: str = "",
        conversation: Conversation | None = None,
        template: Any = None,
        tail: str = "",
        finished: bool = True,
    ) -> "Rendered":
        """The text with its marks."""
        made = super().__new__(cls, text)
        made.literals = tuple(literals)
        made.end = end
        made.conversation = conversation
        made.template = template
        made.tail = tail
        made.finished = finished
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        # All but the template, which is a program.
        names = ("literals", "end", "conversation", "tail", "finished")
        return (str(self),), {name: getattr(self, name) for name in names}

    def __getstate__(self) -> None:
        return None

    def pack(self) -> bytes:
        """The text with its marks and conversation, as JSON; `unpack` reads it back."""
        return json.dumps([str(self), self.literals, _parts(self)], default=repr).encode()

    @classmethod
    def unpack(cls, content: bytes) -> "Rendered":
        """What `pack` wrote."""
        text, literals, made_of = json.loads(content)
        conversation = None if made_of is None else Conversation(*made_of)
        return cls(text, literals=[(start, end) for start, end in literals], conversation=conversation)


def conversation_of(text: str) -> str | None:
    """The conversation that a template wrote a text from, as JSON; None for any other text.

    A judge with a template of its own reads this. Where the template of the text leaves something out, such as tools,
    one text is that of several conversations.
    """
    parts = _parts(text)
    return None if parts is None else json.dumps(parts, default=repr)


def _parts(text: str) -> list[Any] | None:
    said = text.conversation if isinstance(text, Rendered) else None
    return None if said is None else [list(said.messages), said.tools, dict(said.options)]


class Unfinished(str):
    """A completion that was cut off before it ended: it is encoded without EOS behind it."""

    __slots__ = ()
    finished = False


def is_finished(completion: str) -> bool:
    """False for a completion that was cut off; recorded ones have ended."""
    return bool(getattr(completion, "finished", True))


class Frame(NamedTuple):
    """How a template begins conversations, opens answers and closes them."""

    openings: tuple[str, ...]
    header: str
    closing: str

    def wrote(self, text: str, places: Sequence[Span]) -> bool:
        """Whether a text begins as the template does and opens an answer.

        Args:
          text: a prompt.
          places: where it holds special tokens; text without any is no template's.

        Raises:
          DataError: it begins as the template does, with a special token, and opens no answer.
        """
        begun = next((opening for opening in self.openings if text.startswith(opening)), None)
        header = self.header.strip()
        if begun is None or not places or not header:
            return False
        if header in text[len(begun.rstrip()) :]:
            return True
        if places[0][0] > 0:
            return False
        raise DataError(
            f"a prompt that begins as the chat template does, with {text[: places[0][1]]!r}, must also open the answer "
            f"with {header!r}, but received {text!r:.60}. Give its messages, or a text without the token."
        )


def unended(text: str, ends: Iterable[str]) -> tuple[str, str]:
    """A completion without the special tokens that close it, and the first of these; "" where none does.

    Some templates put a line end behind the token, some a second token behind that.
    """
    first = ""
    while end := max((end for end in ends if text.rstrip().endswith(end)), key=len, default=""):
        text, first = text.rstrip().removesuffix(end), end
    return text, first


def alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of what two texts, or two lists of token ids, begin with alike."""
    if second[: len(first)] == first:
        return len(first)
    return next(at for at, (one, other) in enumerate(zip(first, [*second, None], strict=False)) if one != other)
