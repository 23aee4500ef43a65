"""Real text that every machine has: the docstrings of Python and of the installed libraries, as a summarisation task.

The body of a docstring is the article and its first sentence the summary. Files are parsed with `ast` and never
imported. The same library versions give the same examples, in the same order, in the same splits, on every machine.
"""

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import string
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fastpref.data.files import replacing

PREFIX = "summarize: "
"""The instruction in front of every prompt; the rest of a prompt is the article."""

_FORMAT = 1
"""Part of the cache key: raise it whenever the examples of one version of a library change."""

_DISTRIBUTIONS = {
    "absl": "absl-py",
    "etils": "etils",
    "flax": "flax",
    "fontTools": "fonttools",
    "fsspec": "fsspec",
    "huggingface_hub": "huggingface_hub",
    "humanize": "humanize",
    "jax": "jax",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "packaging": "packaging",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "rich": "rich",
    "scipy": "scipy",
    "tensorboardX": "tensorboardX",
    "treescope": "treescope",
}
"""Import name and distribution name of the libraries that are read: what this package installs, down to their needs."""

_SKIPPED = frozenset(
    # Tests, copies of other libraries, generated tables, and folders whose long files hold few docstrings.
    {"test", "testing", "tests", "internal_test_util", "idlelib", "turtledemo", "__pycache__"}
    | {"_vendor", "_vendored_packages", "vendor", "extern", "externals", "ensurepip", "site-packages", "dist-packages"}
    | {"_unicode_data", "encodings", "lib2to3", "pydoc_data", "experimental", "f2py", "mosaic", "mosaic_gpu", "ttLib"}
)
_BODY_WORDS = (12, 64)
_SUMMARY_WORDS = (4, 18)

_PROSE_SECTIONS = frozenset({"note", "notes", "description", "details", "extended summary", "overview"})
_SECTION = re.compile(
    r"(args?|arguments?|attributes?|examples?|example usage|fields|inputs?|keyword arguments|keyword args|kwargs|"
    r"methods|notes?|options|other parameters|outputs?|parameters|params|properties|raises|references?|returns?|"
    r"see also|todo|typical usage( example)?|usage|warnings?|warns|yields?) ?::?",
    re.IGNORECASE,
)
_RULE = re.compile(r"([-=~^*#_+|])\1{2,}[-=~^*#_+| ]*")
_NOISE = re.compile(r"^\s*(>>>|\.\.\. |\.\. |```|~~~|\$ |@\w|:\w[^:]*:(?!`)|\||[{<]\w)|[-=~^_*#]{4}", re.MULTILINE)
_SIGNATURE = re.compile(r"->|^\s*[\w.]+\([^)]*\)\s*$|^\s*[\w.]+\(.*\) (-|=|:)", re.MULTILINE)
_ROLE = re.compile(r"(?::[a-zA-Z:+-]+:)`[~!.]?([^`<]*?)\s*(?:<[^`]*>)?`|\[([^]]+)\]\([^)]*\)")
_MARK = re.compile(r"`+_{0,2}|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|(?<!\w)~\.?(?=\w)|\s*\[\d+\]_|(?m:^\s*[-*+•] +)")
_SENTENCE_END = re.compile(r"(?<=[a-z)]\.)(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!cf\.)(?<!etc\.) +(?=[A-Z])")
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PLAIN = str.maketrans("", "", string.ascii_letters + " \n,.'-")
_COMMON_WORDS = """
    a an and are as at be but by can does for from has have if in into is it its may must not of on or should so
    than that the then there these this to use used using was when where which will with you
"""
_COMMON = frozenset(_COMMON_WORDS.split())

Progress = Callable[[int, int], None]
"""Called with the files read so far and the files in all."""


class Source(NamedTuple):
    """A folder of Python files. A name and a version stand for the same files wherever they lie."""

    name: str
    root: Path
    version: str


class Example(NamedTuple):
    """A prompt, the summary that its author wrote, and the library that both come from."""

    prompt: str
    summary: str
    source: str


class Splits(NamedTuple):
    """Disjoint parts of a harvest, one for each stage of an alignment run."""

    sft: list[Example]
    preference: list[Example]
    online: list[Example]
    held_out: list[Example]


@dataclass(frozen=True, slots=True)
class Harvest:
    """Examples, sorted by the qualified name of what they document, and what was met on the way."""

    examples: list[Example]
    files: int
    """Files read."""
    unreadable: int
    """Files among them that could not be opened, decoded or parsed."""
    docstrings: int
    """Docstrings found, most of them too short to be an article."""

    def counts(self) -> dict[str, int]:
        """Examples from each source, the largest first."""
        return dict(Counter(example.source for example in self.examples).most_common())


def cache_folder() -> Path:
    """Folder of what the demo keeps between runs: `fastpref` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpref"


def installed_sources() -> list[Source]:
    """The standard library and those of the libraries that this package needs which are installed here."""
    sources = [Source("python", Path(sysconfig.get_path("stdlib")), platform.python_version())]
    for package, distribution in _DISTRIBUTIONS.items():
        spec = importlib.util.find_spec(package)
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        roots = spec.submodule_search_locations if spec is not None else None
        sources += [Source(package, Path(root), version) for root in roots or ()]
    return sources


def harvest(
    cache_dir: Path | str | None = None,
    *,
    sources: Sequence[Source] | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Harvest:
    """Read every usable docstring of `sources`, or what an earlier call kept of them.

    The result is kept as one Parquet file for each set of source versions. A file that cannot be read back is
    written anew; a folder that cannot be written to costs only the time of the next harvest.

    Args:
      cache_dir: folder of the kept harvests; `fastpref` in `$XDG_CACHE_HOME` or `~/.cache` when None.
      sources: what to read; `installed_sources()` when None.
      limit: keep only this many examples, chosen by a hash of their text.
      progress: called after each file of a harvest that reads sources; never when the kept one serves.

    Returns:
      The examples and the counts.

    Raises:
      ValueError: `limit` below 1, or no source gave an example.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, but received {limit}. Leave it out to keep every example.")
    sources = installed_sources() if sources is None else sources
    key = repr((_FORMAT, sorted((source.name, source.version) for source in sources)))
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    file = folder / f"docstrings-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.parquet"
    found = _load(file)
    if found is None:
        with _collector_off():
            found = _read(sources, progress)
        if not found.examples:
            names = ", ".join(str(source.root) for source in sources) or "no folder"
            raise ValueError(
                f"a harvest must have at least one docstring with a body, but received none from {names}. Add sources."
            )
        _store(file, found)
    if limit is None or limit >= len(found.examples):
        return found
    kept = set(sorted(found.examples, key=lambda example: _hash(example, "limit"))[:limit])
    examples = [example for example in found.examples if example in kept]
    return Harvest(examples, found.files, found.unreadable, found.docstrings)


def splits(examples: Iterable[Example], shares: tuple[float, float, float, float] = (0.5, 0.18, 0.2, 0.12)) -> Splits:
    """Deal examples out by a hash of their summary, so that machines with other examples agree on the common ones.

    Args:
      examples: any examples; those with the same summary go to the same part.
      shares: expected fraction of each part, in the order of `Splits`; they must sum to 1.

    Returns:
      The parts, each in the order of `examples`.

    Raises:
      ValueError: negative shares, or shares that do not sum to 1.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be at least 0 and sum to 1, but received {shares}. Give four fractions.")
    ends = [sum(shares[: i + 1]) for i in range(3)]
    parts = Splits([], [], [], [])
    for example in examples:
        parts[sum(_hash(example, "split") >= end for end in ends)].append(example)
    return parts


def train_tokenizer(texts: Iterable[str], vocab_size: int = 3072) -> Tokenizer:
    """Train a byte-level BPE tokenizer in the manner of T5: `<pad>` is 0, `</s>` is 1 and ends every text.

    Every text has an encoding and comes back from it exactly, unless it spells a special token. Digits stand alone,
    so that "1" and "2" are one token each. The same texts give the same tokenizer, in any process.

    Args:
      texts: what to learn from: prompts and summaries.
      vocab_size: tokens in all, at least 259: the three special ones and the bytes. Few texts may give fewer.

    Returns:
      The tokenizer.

    Raises:
      ValueError: `vocab_size` below 259.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", "<unk>"]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(special)}, one for each byte, but received "
            f"{vocab_size}. "
            "2048 to 4096 suits docstrings."
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def _hash(example: Example, use: str) -> float:
    """A number in [0, 1) that depends on the summary alone; another use gives an independent one."""
    digest = hashlib.blake2b(_plain(example.summary).encode(), digest_size=6, person=use.encode()).digest()
    return int.from_bytes(digest) / 2**48


def _plain(text: str) -> str:
    """Letters and digits only: what two texts share when a reader would call them the same."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Syntax trees hold no cycles, yet looking for some in their many nodes would take a quarter of the harvest."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read(sources: Sequence[Source], progress: Progress | None) -> Harvest:
    files = [(source, path) for source in sources for path in _python_files(source.root)]
    unreadable = 0
    found: list[tuple[str, str, Example]] = []
    docstrings = 0
    for i, (source, path) in enumerate(files):
        try:
            # A stray backslash in somebody's docstring is not this program's warning.
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            unreadable += 1
            tree = ast.Module([], [])
        parts = path.relative_to(source.root).with_suffix("").parts
        module = tuple(part for part in parts if part != "__init__") or (source.name,)
        for scope, docstring in _docstrings(tree):
            docstrings += 1
            # A module is known by its last name, anything else by its name within the module.
            example = _example(" ".join(scope) or module[-1], docstring, source.name)
            if example is not None:
                found.append((".".join((source.name, *module, *scope)), docstring, example))
        if progress is not None:
            progress(i + 1, len(files))
    examples: list[Example] = []
    seen: set[str] = set()
    for _, _, example in sorted(found):
        body = example.prompt.split(": ", 2)[2]
        keys = {_plain(example.summary), " ".join(_plain(body).split()[: _BODY_WORDS[0]])}
        if seen.isdisjoint(keys):
            examples.append(example)
            seen |= keys
    return Harvest(examples, len(files), unreadable, docstrings)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith(("test_", "conftest")):
                yield path


def _docstrings(tree: ast.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """The scope within the module and the docstring of the module, its classes and functions, and their methods."""
    pending: list[tuple[tuple[str, ...], ast.AST]] = [((), tree)]
    while pending:
        scope, node = pending.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            scope = (*scope, node.name)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield scope, docstring
        # Functions within functions are helpers that nobody documents for a reader: not looked for.
        if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
            pending.extend((scope, child) for child in node.body)


def _example(name: str, docstring: str, source: str) -> Example | None:
    if len(docstring.split()) < _SUMMARY_WORDS[0] + _BODY_WORDS[0]:
        return None
    opening, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    if _NOISE.search(opening) or opening.endswith(":"):
        return None
    summary, _, more = _SENTENCE_END.sub("\n", _unmark(opening), count=1).partition("\n")
    words = summary.split()
    if not _SUMMARY_WORDS[0] <= len(words) <= _SUMMARY_WORDS[1] or not _is_prose(summary, 0.9):
        return None
    body = " ".join(f"{more} {_prose(rest)}".split()[: _BODY_WORDS[1]])
    if len(body.split()) < _BODY_WORDS[0] or not _is_english(body):
        return None
    title = " ".join(_NAME_WORD.findall(name)).lower()
    if not title or not _is_grounded(summary, f"{title} {body}"):
        return None
    return Example(f"{PREFIX}{title}: {body}", summary, source)


def _prose(text: str) -> str:
    """The sentences of a docstring's body: no parameters, examples, code, tables, directives or markup."""
    kept: list[str] = []
    lines = text.split("\n")
    wanted = True
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        heading = line.strip().rstrip(":").casefold()
        if (line.strip() and _RULE.fullmatch(below.strip())) or _SECTION.fullmatch(line):
            wanted = heading in _PROSE_SECTIONS
        elif wanted and not _RULE.fullmatch(line.strip()):
            kept.append(line)
            continue
        kept.append("")
    paragraphs: list[str] = []
    in_block = False
    for paragraph in re.split(r"\n\s*\n", "\n".join(kept).strip("\n")):
        in_block = in_block and paragraph.startswith(" ")
        if not in_block and not _NOISE.search(paragraph) and _is_prose(paragraph, 0.8):
            paragraphs.append(_unmark(paragraph))
        in_block = in_block or paragraph.endswith("::") or paragraph.startswith(".. ")
    return " ".join(paragraphs)


def _unmark(text: str) -> str:
    """One line without reStructuredText or Markdown marks."""
    text = _ROLE.sub(r"\1\2", text)
    return " ".join(_MARK.sub("", text).replace("::", ":").split())


def _is_prose(text: str, share: float) -> bool:
    """Whether letters, spaces and plain punctuation make up `share` of the text, and it is no call signature."""
    return len(text.translate(_PLAIN)) <= (1 - share) * len(text) and not _SIGNATURE.search(text)


def _is_english(text: str) -> bool:
    words = text.casefold().split()
    return sum(word in _COMMON for word in words) >= 0.15 * len(words)


def _is_grounded(summary: str, article: str) -> bool:
    """Whether a third of the summary's longer words, up to their endings, stand in the article: nobody could have
    written the others from it.
    """
    roots = {word[:5] for word in _plain(summary).split() if len(word) > 3 and word not in _COMMON}
    return 3 * sum(root in article.casefold() for root in roots) >= max(1, len(roots))


def _load(file: Path) -> Harvest | None:
    """The kept harvest, or None where there is none or it cannot be read: then the sources are the better copy."""
    try:
        table = pq.read_table(file)
        columns = [table.column(name).to_pylist() for name in Example._fields]
        counts = json.loads(table.schema.metadata[b"counts"])
        return Harvest([Example(*row) for row in zip(*columns, strict=True)], **counts)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _store(file: Path, found: Harvest) -> None:
    counts = {"files": found.files, "unreadable": found.unreadable, "docstrings": found.docstrings}
    columns = dict(zip(Example._fields, zip(*found.examples, strict=True), strict=False))
    table = pa.table({name: pa.array(columns.get(name, ()), pa.string()) for name in Example._fields})
    with contextlib.suppress(OSError), replacing(file) as new:
        pq.write_table(table.replace_schema_metadata({"counts": json.dumps(counts)}), new)
