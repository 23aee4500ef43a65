"""The harvest of docstrings: what is read, what is cut away, how it is kept and dealt out, and the tokenizer."""

import itertools
import os
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.demo.docstrings import (
    PREFIX,
    Example,
    Harvest,
    Source,
    Splits,
    harvest,
    installed_sources,
    splits,
    train_tokenizer,
)

NUMPYDOC = '''
class BoxFilter:
    def applyTo(image, size):
        r"""Smooth an image with a box filter of the given size.

        Each pixel becomes the mean of the *square* around it, see :func:`~scipy.ndimage.uniform_filter`.
        At the borders the ``image`` is mirrored, so that it keeps its `shape`_ and the [mean](https://mean.org).

        out[i, j] = sum(x[i + a, j + b] for a in range(-1, 2) for b in range(-1, 2)) / 9

        Parameters
        ----------
        image : array_like
            The pixels that nobody should find in the article.

        Notes
        -----
        The cost does not depend on the size of the box.

        Examples
        --------
        >>> smooth([1, 2, 3], 3)
        """
'''
GOOGLE = '''
def parse_dates(lines):
    """Parse the dates at the beginning of each line. Lines without a date are left out.

    Dates are expected in the ISO format, for example::

        the first line of such a file and some words behind it

    and any time zone behind them is dropped without a word of complaint.

    Args:
      lines: hidden from the article.

    Returns:
      Also hidden.
    """
'''
ARTICLE = "This text explains in more than a dozen words what the {0} of the {1} does with its {0} and when."
BYTES = train_tokenizer(["Return the text and the words of the text."], 280)


def function(name: str, summary: str, body: str) -> str:
    return f'def {name}():\n    """{summary}\n\n    {body}\n    """\n'


def write(root: Path, files: Mapping[str, str | bytes]) -> Source:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source("library", root, "1.0")


def article(first: str, second: str) -> dict[str, str]:
    """One file with one usable docstring about two things."""
    return {f"{first}.py": function(f"get_{first}", f"Get the {first} of the {second}.", ARTICLE.format(first, second))}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    """A part of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = [Source(name, stdlib / name, "1") for name in ("email", "logging", "tkinter", "unittest")]
    return harvest(tmp_path_factory.mktemp("cache"), sources=sources)


def only(found: Harvest) -> Example:
    (example,) = found.examples
    return example


def test_prose_sections_stay_and_tables_examples_and_markup_go(tmp_path: Path, cache: Path) -> None:
    example = only(harvest(cache, sources=[write(tmp_path / "a", {"image.py": NUMPYDOC})]))
    assert example.summary == "Smooth an image with a box filter of the given size."
    assert example.prompt == (
        "summarize: box filter apply to: Each pixel becomes the mean of the square around it, see "
        "scipy.ndimage.uniform_filter. At the borders the image is mirrored, so that it keeps its shape and the mean. "
        "The cost does not depend on the size of the box."
    )


def test_a_second_sentence_of_the_first_line_belongs_to_the_article(tmp_path: Path, cache: Path) -> None:
    example = only(harvest(cache, sources=[write(tmp_path / "a", {"dates.py": GOOGLE})]))
    assert example.summary == "Parse the dates at the beginning of each line."
    assert example.prompt == (
        "summarize: parse dates: Lines without a date are left out. Dates are expected in the ISO format, for example: "
        "and any time zone behind them is dropped without a word of complaint."
    )


def test_a_long_body_is_cut(tmp_path: Path, cache: Path) -> None:
    files = {"long.py": function("get_words", "Get the words of the text.", "the words of a long text are many " * 40)}
    body = only(harvest(cache, sources=[write(tmp_path / "a", files)])).prompt.removeprefix(f"{PREFIX}get words: ")
    assert len(body.split()) == 64
    assert body.startswith("the words of a long text")


@pytest.mark.parametrize(
    ("summary", "body"),
    [
        ("Get the colour of the paint.", "Too short for an article."),
        ("Get it.", ARTICLE.format("colour", "paint")),
        ("get_colour(paint) -> colour of the paint", ARTICLE.format("colour", "paint")),
        ("Get the colour of the paint:", ARTICLE.format("colour", "paint")),
        ("The reader could never guess such unrelated things.", ARTICLE.format("colour", "paint")),
        ("Die Farbe der Wand holen.", "Diese Funktion holt die Farbe einer Wand und gibt sie dann dem Maler weiter."),
        ("Get the colour of the paint.", "x = f(y)[0] + {1: 2}; z = x ** 2 - 3 / (4 + y) % 5 == 6 or (7, 8, 9, 10)"),
    ],
)
def test_what_is_no_article_with_a_summary_is_left_out(tmp_path: Path, cache: Path, summary: str, body: str) -> None:
    files = {"bad.py": function("get", summary, body), **article("weight", "box")}
    found = harvest(cache, sources=[write(tmp_path / "a", files)])
    assert only(found).summary == "Get the weight of the box."
    assert found.docstrings == 2


def test_broken_files_are_counted_and_nothing_is_imported(tmp_path: Path, cache: Path) -> None:
    files: dict[str, str | bytes] = {
        "syntax.py": "def f(:\n",
        "null.py": b"x = 1\x00",
        "latin.py": b'"""Caf\xe9."""\n',
        "deep.py": "(" * 5000,
        "raises.py": f"raise SystemExit('imported')\n{article('tail', 'dog')['tail.py']}",
        "tests/skipped.py": function("get_head", "Get the head of the dog.", ARTICLE),
        "test_skipped.py": function("get_leg", "Get the leg of the dog.", ARTICLE),
        "notes.txt": "Not Python.",
        **article("nose", "cat"),
    }
    found = harvest(cache, sources=[write(tmp_path / "a", files)])
    assert (found.files, found.unreadable) == (6, 4)
    assert {example.summary for example in found.examples} == {"Get the nose of the cat.", "Get the tail of the dog."}
    assert found.counts() == {"library": 2}


def test_a_stray_backslash_warns_nobody(tmp_path: Path, cache: Path, recwarn: pytest.WarningsRecorder) -> None:
    text = function("get_slash", "Get the slash of the path.", ARTICLE.format("slash", "path") + r" \d")
    assert len(harvest(cache, sources=[write(tmp_path / "a", {"slash.py": text})]).examples) == 1
    assert not list(recwarn)


def test_equal_summaries_and_equal_bodies_appear_once(tmp_path: Path, cache: Path) -> None:
    body = ARTICLE.format("colour", "paint")
    files = {
        "a.py": function("get_colour", "Get the colour of the paint.", body),
        "b.py": function("fetch_colour", "Fetch the colour of a paint.", body),
        "c.py": function("colour", "get the Colour of the `paint`", "Another text: " + body),
        **article("weight", "box"),
    }
    found = harvest(cache, sources=[write(tmp_path / "a", files)])
    assert [example.summary for example in found.examples] == [
        "Get the colour of the paint.",
        "Get the weight of the box.",
    ]


def test_the_order_is_that_of_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    things = [("nose", "cat"), ("tail", "dog"), ("wing", "bird"), ("fin", "fish")]
    source = write(tmp_path / "a", {name: text for pair in things for name, text in article(*pair).items()})
    write(tmp_path / "a" / "inner", article("trunk", "elephant"))
    forwards = harvest(tmp_path / "one", sources=[source])
    walk = os.walk

    def backwards(root: Path) -> Iterator[Any]:
        for folder, folders, names in walk(root):
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert harvest(tmp_path / "two", sources=[source]) == forwards
    assert [example.prompt.split()[2].rstrip(":") for example in forwards.examples] == [
        "fin", "trunk", "nose", "tail", "wing",
    ]  # fmt: skip


def test_a_kept_harvest_serves_until_the_version_changes(tmp_path: Path, cache: Path) -> None:
    source = write(tmp_path / "a", article("nose", "cat"))
    calls: list[tuple[int, int]] = []
    first = harvest(cache, sources=[source], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 1)]
    write(tmp_path / "a", article("tail", "dog"))
    assert harvest(cache, sources=[source], progress=lambda *_: pytest.fail("read again")) == first
    second = harvest(cache, sources=[source._replace(version="1.1")])
    assert len(second.examples) == 2


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_broken_kept_harvest_is_written_anew(tmp_path: Path, cache: Path, damage: bytes | None) -> None:
    source = write(tmp_path / "a", article("nose", "cat"))
    first = harvest(cache, sources=[source])
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert harvest(cache, sources=[source]) == first
    assert file.read_bytes() == whole
    assert list(cache.iterdir()) == [file]


def test_a_kept_table_of_another_shape_is_written_anew(tmp_path: Path, cache: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = write(tmp_path / "a", article("nose", "cat"))
    first = harvest(cache, sources=[source])
    (file,) = cache.iterdir()
    for table in (pa.table({"prompt": ["x"]}), pq.read_table(file).replace_schema_metadata({})):
        pq.write_table(table, file)
        assert harvest(cache, sources=[source]) == first


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    source = write(tmp_path / "a", article("nose", "cat"))
    (tmp_path / "file").write_text("not a folder")
    assert len(harvest(tmp_path / "file", sources=[source]).examples) == 1


def test_the_users_cache_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    harvest(sources=[write(tmp_path / "a", article("nose", "cat"))])
    assert len(list((tmp_path / "xdg" / "fastpref").glob("docstrings-*.parquet"))) == 1


def test_a_harvest_without_examples_says_where_it_looked(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"one docstring with a body, but received none from .*empty. Add sources"):
        harvest(cache, sources=[Source("empty", tmp_path / "empty", "1")])
    with pytest.raises(ValueError, match="but received none from no folder"):
        harvest(cache, sources=[])


def test_a_limit_keeps_the_order_and_grows(tmp_path: Path) -> None:
    files = {name: text for i in range(20) for name, text in article(f"part{'x' * i}", f"thing{'y' * i}").items()}
    source = write(tmp_path / "a", files)
    whole = harvest(tmp_path, sources=[source]).examples
    five, six = (harvest(tmp_path, sources=[source], limit=n).examples for n in (5, 6))
    assert len(whole) == 20
    assert (len(five), len(six)) == (5, 6)
    assert five == [example for example in whole if example in five]
    assert set(five) < set(six) < set(whole)
    assert harvest(tmp_path, sources=[source], limit=100).examples == whole
    assert sum(bool(part) for part in splits(six)) > 1, "a limit must not favour one part"
    with pytest.raises(ValueError, match="limit must be at least 1, but received 0"):
        harvest(tmp_path, sources=[source], limit=0)


def test_the_standard_library_gives_articles(real: Harvest) -> None:
    assert len(real.examples) > 250
    assert real.unreadable == 0
    assert set(real.counts()) == {"email", "logging", "tkinter", "unittest"}
    for prompt, summary, _ in real.examples:
        title, body = prompt.removeprefix(PREFIX).split(": ", 1)
        assert title == title.lower()
        assert 12 <= len(body.split()) <= 64
        assert 4 <= len(summary.split()) <= 18
        assert "\n" not in prompt + summary
        assert ">>>" not in prompt
    assert len({example.summary for example in real.examples}) == len(real.examples)


def test_the_installed_sources_exist() -> None:
    sources = installed_sources()
    assert {"python", "numpy", "jax", "optax"} <= {source.name for source in sources}
    assert all(source.root.is_dir() and source.version for source in sources)


def test_splits_are_disjoint_complete_and_stable(real: Harvest) -> None:
    parts = splits(real.examples)
    assert sorted(itertools.chain(*parts)) == sorted(real.examples)
    bodies = [{example.prompt.split(": ", 2)[2] for example in part} for part in parts]
    assert len(set[str]().union(*bodies)) == sum(map(len, bodies))
    for part, share in zip(parts, (0.5, 0.18, 0.2, 0.12), strict=True):
        assert len(part) / len(real.examples) == pytest.approx(share, abs=0.08)
    half = splits(real.examples[::2])
    assert all(set(some) <= set(every) for some, every in zip(half, parts, strict=True))


def test_a_summary_is_dealt_out_whatever_its_article(real: Harvest) -> None:
    example = real.examples[0]
    part = splits([example, Example("summarize: other: text", example.summary.upper(), "other")])
    assert sorted(map(len, part)) == [0, 0, 0, 2]


def test_shares_decide_and_are_checked(real: Harvest) -> None:
    assert splits(real.examples, (0.0, 1.0, 0.0, 0.0)) == Splits([], real.examples, [], [])
    with pytest.raises(ValueError, match=r"sum to 1, but received \(0.5, 0.5, 0.5, 0.5\)"):
        splits(real.examples, (0.5, 0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="shares must be at least 0"):
        splits(real.examples, (1.5, -0.5, 0.0, 0.0))


@pytest.fixture(scope="module")
def texts(real: Harvest) -> list[str]:
    return [text for example in real.examples for text in (example.prompt, example.summary)]


def test_the_tokenizer_has_the_promised_tokens(texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts, 700)
    assert tokenizer.get_vocab_size() == 700
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    for answer in "12":
        assert tokenizer.encode(answer).ids == [tokenizer.token_to_id(answer), 1]
        assert tokenizer.encode(f"summary {answer}2").ids[-3] == tokenizer.token_to_id(answer)
    assert tokenizer.encode("").ids == [1]
    assert tokenizer.encode("a", "b").tokens == ["a", "</s>", "b", "</s>"]
    assert sum(len(tokenizer.encode(text).ids) for text in texts) < 0.6 * sum(map(len, texts))


def test_digits_are_never_merged() -> None:
    tokenizer = train_tokenizer(["answer 12 or 121 or 12 12 12 12"] * 20, 300)
    assert tokenizer.encode("answer 12").tokens[-3:] == ["1", "2", "</s>"]


def test_training_repeats_itself(texts: list[str]) -> None:
    assert train_tokenizer(texts, 700).to_str() == train_tokenizer(iter(texts), 700).to_str()


@given(text=st.text(max_size=60).filter(lambda text: "<" not in text))
@settings(max_examples=60, deadline=None)
def test_every_text_comes_back(text: str) -> None:
    encoded = BYTES.encode(text)
    assert BYTES.decode(encoded.ids) == text
    assert 2 not in encoded.ids
    assert encoded.ids[-1] == 1


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 259, one for each byte, but received 258"):
        train_tokenizer(["text"], 258)
