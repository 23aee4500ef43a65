"""Jinja for templates that strangers wrote: no code of theirs runs, and time, loops and memory are bounded."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE = 2**20
"""Characters of a template."""
MAX_TEXT = 2**24
"""Characters of any text that a template makes."""
MAX_ROUNDS = 10**6
"""Rounds of all loops of one rendering."""
MAX_SECONDS = 10.0
"""Time of one rendering."""


def environment() -> "Bounded":
    """A sandbox with what Hugging Face's templates may use."""
    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    made.filters = {name: _bounded(call) for name, call in made.filters.items()}
    made.filters |= {"tojson": _to_json, ROUNDS: made.rounds, TEXT: _short}
    made.globals["raise_exception"] = _refuse
    return made


ROUNDS, TEXT = "_rounds", "_text"
"""Filters that the compiler of templates puts round what loops run over, and round joined texts."""


class Bounded(ImmutableSandboxedEnvironment):
    """A sandboxed environment that gives up on templates that take too long or make too much."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.begin()

    def begin(self) -> None:
        """Start counting anew, for the next rendering."""
        self._left = MAX_ROUNDS
        self._end = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        """Count a round of a loop."""
        self._left -= 1
        if self._left < 0 or time.monotonic() > self._end:
            raise jinja2.TemplateError(
                f"a chat template must finish within {MAX_ROUNDS} rounds of its loops and {MAX_SECONDS:.0f} s, but "
                "received one that goes on. Mend its loops."
            )

    def rounds(self, items: Iterable[Any]) -> "Iterable[Any]":
        """What a loop runs over, each round counted."""
        return _Sized(items, self) if isinstance(items, Sized) else _counted(items, self)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Meter().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Operators whose result may be large, refused before it is made."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and right * left.bit_length() > 4096:
            _too_long(right)
        for many, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(many, str | list | tuple) and isinstance(times, int):
                _check(len(many) * times)
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return _short(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls of methods, with arguments and results of bounded size."""
        __self.tick()
        for value in args:
            if isinstance(value, int):
                _check(value)
        if isinstance(owner := getattr(__obj, "__self__", None), str):
            _check_format(owner)
            if getattr(__obj, "__name__", "") == "replace" and len(args) > 1:
                _check(len(owner) + owner.count(str(args[0])) * len(str(args[1])))
        return _short(super().call(__context, __obj, *args, **kwargs))


class _Meter(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, ROUNDS, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, TEXT, [], [], None, None, lineno=node.lineno)


class _Sized:
    """Items whose number is known: `loop.length` needs it."""

    def __init__(self, items: Any, meter: Bounded) -> None:
        self._items, self._meter = items, meter

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return _counted(self._items, self._meter)


def _counted(items: Iterable[Any], meter: Bounded) -> Iterator[Any]:
    for item in items:
        meter.tick()
        yield item


def _check(size: int) -> None:
    if size > MAX_TEXT:
        _too_long(size)


def _too_long(size: int) -> None:
    raise jinja2.TemplateError(
        f"a chat template must make at most {MAX_TEXT} characters at once, but received one that makes {size}. Mend it."
    )


def _check_format(text: str) -> None:
    digits = "".join(character if character.isdigit() else " " for character in text).split()
    if "%" in text or "{" in text:
        _check(max((int(number[:20]) for number in digits), default=0))


def _short(value: Any) -> Any:
    """A value, refused where it is a text or list that is too long."""
    if isinstance(value, str | list | tuple):
        _check(len(value))
    return value


def _bounded(call: Any) -> Any:
    """A filter whose number arguments and results are bounded, with the marks that Jinja reads."""

    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _check(value)
            if isinstance(value, str):
                _check_format(value)
        return _short(call(*args, **kwargs))

    bounded.__dict__.update(getattr(call, "__dict__", {}))
    return bounded


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote; the text inside is written as it is."""

    tags: set[str] = {"generation"}  # noqa: RUF012  (its type is Jinja's)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def clock(day: datetime) -> Callable[[str], str]:
    """`strftime_now` on a given day."""

    def strftime_now(form: str) -> str:
        _check_format(form)
        return day.strftime(form)

    return strftime_now


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own escapes what HTML would.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
