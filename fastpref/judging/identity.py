"""Identity of a judge, or of any other function or object that decides what a run computes.

    fingerprint = {"judge": identity(judge).fingerprint()}

A run belongs to its judge: another one is refused, and answers that one judge gave are never used for another. So a
judge is told from others by content:

    a model         weights, tokenizer and settings (`PreferenceModel`, `RewardModel`)
    a function      module, name, code, defaults, values of its closure, and what of its module it refers to
    a partial       the function, and every bound argument
    an object       its class (name, code), and its state, as pickle would see it

Functions and classes of installed packages are told apart by name and version, those of the user by their code.
What has no such content (an open connection, a lock) cannot be told apart: it is never taken for the same one again.
Nothing here sees what code reads from outside: files, servers, modules that a function imports inside.

A judge may say itself who it is: its attribute `identity`, a text or any JSON value, replaces all of this. It suits
judges behind a network, and those that hold what does not decide their answers: a counter, a connection, a cache.
"""

import builtins
import copyreg
import dis
import functools
import inspect
import sys
import types
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orjson
import xxhash

LIBRARY_FOLDERS = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Identity:
    """Parts that tell a judge from another.

    Args:
      name: of its function or class, with the module.
      parts: JSON values by name, equal for equal judges.
      unknown: reason that it cannot be told from another, or None.
      key: names the judge in the log of what was judged: equal for equal judges, and new each time where it is unknown.
    """

    name: str
    parts: Mapping[str, Any]
    unknown: str | None
    key: str

    def fingerprint(self) -> dict[str, Any]:
        """JSON object for the fingerprint of a run; of an unknown judge only its name and the reason."""
        if self.unknown is None:
            # One that says who it is may be moved and renamed.
            return dict(self.parts) if OWN in self.parts else {"name": self.name, **self.parts}
        return {"name": self.name, "unknown": self.unknown}


OWN = "identity"
"""Attribute by which a judge says itself who it is."""


class _Unknown(Exception):
    """Something without content that could be compared; the message says where it is."""


def identity(judge: Any) -> Identity:
    """The identity of a judge: see the top of this file."""
    name = name_of(judge)
    try:
        parts = _parts(judge)
    except _Unknown as error:
        return Identity(name, {}, str(error), f"unknown {uuid.uuid4().hex}")
    content = orjson.dumps(parts if OWN in parts else [name, parts], option=orjson.OPT_SORT_KEYS)
    return Identity(name, parts, None, xxhash.xxh3_128_hexdigest(content))


def digest(value: Any) -> str:
    """Hash of any value by its content: data, arrays, functions, classes and objects that can be pickled.

    Raises:
      ValueError: part of it has no content that could be compared; the message says which.
    """
    try:
        return _Digest().of(value)
    except _Unknown as error:
        raise ValueError(f"a value must be made of data, functions and classes, but received {error}.") from None


def _parts(judge: Any) -> dict[str, Any]:
    own = getattr(judge, OWN, None)
    if own is not None and not callable(own):
        try:
            return {OWN: orjson.loads(orjson.dumps(own))}
        except TypeError as error:
            raise _Unknown(f"its attribute `identity` is not JSON: {error}") from error
    if isinstance(judge, functools.partial):
        return {
            "function": {"name": name_of(judge.func), **_parts(judge.func)},
            "arguments": {str(at): _shown(value, f"argument {at}") for at, value in enumerate(judge.args)},
            "keywords": {key: _shown(value, f"argument {key}") for key, value in judge.keywords.items()},
        }
    if isinstance(judge, types.MethodType):
        return {"function": _parts(judge.__func__), "self": {"name": name_of(judge.__self__), **_parts(judge.__self__)}}
    if isinstance(judge, types.FunctionType):
        return {name: value for name, value in _function(judge).items() if value}
    if isinstance(judge, type | types.BuiltinFunctionType):
        return {"code": _Digest().of(judge)}
    state = getattr(judge, "__dict__", None)
    if isinstance(state, dict) and _plain_state(judge):
        own_state = {key: _shown(value, f"attribute {key}") for key, value in state.items()}
        return {"code": _Digest().of(type(judge)), "state": own_state}
    return {"content": _Digest().of(judge)}


def _function(function: types.FunctionType) -> dict[str, Any]:
    if _library(function.__module__):
        code: dict[str, Any] = {"version": _version(function.__module__)}
        uses: Iterable[tuple[str, Any]] = ()
    else:
        code = {"code": _Digest().of(function.__code__), "python": ".".join(map(str, sys.version_info[:2]))}
        uses = _uses(function)
    return {
        **code,
        "defaults": {str(at): _shown(value, f"default {at}") for at, value in enumerate(function.__defaults__ or ())},
        "keyword defaults": {
            key: _shown(value, f"default {key}") for key, value in (function.__kwdefaults__ or {}).items()
        },
        "closure": {key: _shown(value, f"closure {key}") for key, value in _closure(function)},
        "uses": {key: _shown(value, f"global {key}") for key, value in uses},
        "attributes": {key: _shown(value, f"attribute {key}") for key, value in function.__dict__.items()},
    }


def _shown(value: Any, place: str) -> Any:
    """Numbers as they are, so that a refusal can show them; texts, which may be secrets, and the rest as a hash."""
    if value is None or (type(value) in (bool, int, float) and abs(value) < 2**53):
        return value
    try:
        return _Digest().of(value)
    except _Unknown as error:
        raise _Unknown(f"{place} ({name_of(value)}): {error}") from None


def name_of(value: Any) -> str:
    """Module and qualified name of a function, or of the class of an object, for people."""
    if isinstance(value, functools.partial):
        return f"partial of {name_of(value.func)}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def _closure(function: types.FunctionType) -> list[tuple[str, Any]]:
    cells = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells.append((name, cell.cell_contents))
        except ValueError:
            # Empty until the function around it goes on.
            cells.append((name, None))
    return cells


def _uses(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function of the user refers to in its module, without what Python itself brings."""
    names = set()
    pending = [function.__code__]
    while pending:
        code = pending.pop()
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        names |= {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    known = function.__globals__
    return sorted((name, known[name]) for name in names if name in known and not hasattr(builtins, name))


def _library(module: str | None) -> bool:
    """Whether a module comes with Python or an installed package, this one included."""
    top = (module or "builtins").partition(".")[0]
    if top in sys.stdlib_module_names or top == "fastpref":
        return top != "__main__"
    file = getattr(sys.modules.get(module or ""), "__file__", None) or getattr(sys.modules.get(top), "__file__", None)
    return file is not None and not LIBRARY_FOLDERS.isdisjoint(Path(file).parts)


@functools.cache
def _version(module: str | None) -> str:
    """Version of the package that a module comes with; the content of its file where the package does not say."""
    name = module or "builtins"
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return ".".join(map(str, sys.version_info[:2]))
    version = getattr(sys.modules.get(top), "__version__", None)
    if version is not None:
        return str(version)
    file = getattr(sys.modules.get(name), "__file__", None)
    return "" if file is None else xxhash.xxh3_128_hexdigest(Path(file).read_bytes())


def _plain_state(value: Any) -> bool:
    """Whether an object is its class and its attributes, without words of its own on how to copy it."""
    kind = type(value)
    return all(
        getattr(kind, name, None) is getattr(object, name, None)
        for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs_ex__", "__getnewargs__", "__new__")
    )


def _decides(key: str, value: Any) -> bool:
    """Whether an entry of a class decides what it does: not the names and notes that Python keeps there."""
    if key.startswith("__") and key.endswith("__"):
        return isinstance(value, types.FunctionType | staticmethod | classmethod | property) and key != "__annotate__"
    return key not in ("_abc_impl", "_is_protocol", "_is_runtime_protocol")


class _Digest:
    """One hash of nested values. A value inside itself is hashed as how far up it stands."""

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._done: dict[int, tuple[str, Any]] = {}

    def of(self, value: Any) -> str:
        if id(value) in self._done:
            return self._done[id(value)][0]
        if id(value) in self._stack:
            return f"above {len(self._stack) - self._stack.index(id(value))}"
        self._stack.append(id(value))
        try:
            parts = list(self._content(value))
        except RecursionError:
            raise _Unknown("it is nested too deeply") from None
        finally:
            self._stack.pop()
        state = xxhash.xxh3_128()
        for part in parts:
            content = part if isinstance(part, bytes) else part.encode()
            state.update(len(content).to_bytes(8, "little"))
            state.update(content)
        # With the value, so that no other takes its place in memory meanwhile.
        self._done[id(value)] = state.hexdigest(), value
        return state.hexdigest()

    def _content(self, value: Any) -> Iterable[str | bytes]:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if value is None or value is ... or kind in (bool, int, float, complex):
            return name, repr(value)
        if kind is str:
            return name, value.encode("utf-8", "surrogatepass")
        if kind in (bytes, bytearray):
            return name, bytes(value)
        if kind in (list, tuple):
            return name, *map(self.of, value)
        if kind in (set, frozenset):
            return name, *sorted(map(self.of, value))
        if kind in (dict, types.MappingProxyType):
            return name, *sorted(self.of(key) + self.of(entry) for key, entry in value.items())
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return name, str(value.dtype), self.of(np.asarray(jax.random.key_data(value)))
        if isinstance(value, np.ndarray | np.generic | jax.Array) and not getattr(value.dtype, "hasobject", False):
            array = np.asarray(value)
            return "array", f"{array.dtype}{array.shape}", array.tobytes()
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.MethodType):
            return name, self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, functools.partial):
            return name, self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.BuiltinFunctionType):
            inside = value.__self__
            own = "" if inside is None or isinstance(inside, types.ModuleType) else self.of(inside)
            return name, f"{value.__module__}.{value.__qualname__}", own
        if isinstance(value, types.CellType):
            return name, self.of(value.cell_contents)
        if isinstance(value, property | staticmethod | classmethod | functools.cached_property):
            functions = [getattr(value, part, None) for part in ("fget", "fset", "fdel", "func", "__func__")]
            return name, *map(self.of, functions)
        if _library(kind.__module__) and callable(wrapped := getattr(value, "__wrapped__", None)):
            # Compiled, or with a cache of its answers.
            return name, self.of(wrapped)
        if inspect.isgetsetdescriptor(value) or inspect.ismemberdescriptor(value) or inspect.ismethoddescriptor(value):
            return name, value.__name__
        if callable(value) and hasattr(value, "__qualname__") and _library(getattr(value, "__module__", None)):
            # Of an extension module.
            return name, f"{value.__module__}.{value.__qualname__}", _version(value.__module__)
        return self._reduced(value)

    def _module(self, module: types.ModuleType) -> Iterable[str | bytes]:
        file = getattr(module, "__file__", None)
        if _library(module.__name__) or file is None:
            return "module", module.__name__, _version(module.__name__)
        try:
            return "module", module.__name__, Path(file).read_bytes()
        except OSError as error:
            raise _Unknown(f"module {module.__name__} cannot be read: {error}") from error

    def _code(self, code: types.CodeType) -> Iterable[str | bytes]:
        constants = [self.of(constant) for constant in code.co_consts]
        names = [*code.co_names, "", *code.co_varnames, "", *code.co_freevars, "", *code.co_cellvars]
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return "code", code.co_code, *constants, repr(names), repr(shape)

    def _of_function(self, function: types.FunctionType) -> Iterable[str | bytes]:
        name = f"{function.__module__}.{function.__qualname__}"
        own = [function.__defaults__, function.__kwdefaults__, dict(_closure(function)), function.__dict__]
        if _library(function.__module__):
            return "function", name, _version(function.__module__), *map(self.of, own)
        return "function", name, self.of(function.__code__), *map(self.of, own), self.of(dict(_uses(function)))

    def _class(self, kind: type) -> Iterable[str | bytes]:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if _library(kind.__module__):
            return "class", name, _version(kind.__module__)
        own = {key: value for key, value in vars(kind).items() if _decides(key, value)}
        return "class", name, self.of(kind.__bases__), self.of(own)

    def _reduced(self, value: Any) -> Iterable[str | bytes]:
        """Any other object, as pickle would see it."""
        reducer: Callable[..., Any] | None = copyreg.dispatch_table.get(type(value))
        try:
            reduced = reducer(value) if reducer else value.__reduce_ex__(4)
        except Exception as error:
            raise _Unknown(str(error) or type(error).__name__) from error
        if isinstance(reduced, str):
            return "named", f"{type(value).__module__}.{reduced}"
        function, arguments, *rest = reduced
        state, entries, items = ([*rest, None, None, None])[:3]
        return (
            "object",
            self.of(function),
            self.of(arguments),
            self.of(state),
            self.of(list(entries or ())),
            self.of(dict(items or ())),
        )
