"""The gold judge: each feature on its own, its agreement with real summaries, and that no text breaks it."""

import math
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastpref.demo.docstrings import PREFIX, Example, Source, harvest
from fastpref.demo.gold import Features, GoldJudge, features

ARTICLE = (
    "summarize: image blur: Each pixel becomes the mean of its neighbours. Borders are mirrored, so that the image "
    "keeps its size. Large radii make a stronger blur and cost no more time than small ones."
)
GOOD = "Blur an image with the mean of its pixels."


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Several hundred docstrings of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    names = ("asyncio", "email", "http", "json", "logging", "multiprocessing", "tkinter", "unittest", "xml")
    return harvest(
        tmp_path_factory.mktemp("cache"), sources=[Source(name, stdlib / name, "1") for name in names]
    ).examples


def body(prompt: str) -> list[str]:
    return prompt.split(": ", 2)[2].split()


def other_summary(examples: list[Example], i: int, rng: random.Random) -> str:
    return examples[(i + rng.randrange(1, len(examples))) % len(examples)].summary


def truncated(examples: list[Example], i: int, rng: random.Random) -> str:
    words = examples[i].summary.split()
    return " ".join(words[: len(words) // 2])


def truncated_with_a_stop(examples: list[Example], i: int, rng: random.Random) -> str:
    return truncated(examples, i, rng) + "."


def corrupted(examples: list[Example], i: int, rng: random.Random) -> str:
    words = examples[i].summary.split()
    strange = [word for other in rng.sample(examples, 20) for word in other.summary.split()]
    for position in rng.sample(range(len(words)), max(1, len(words) // 3)):
        words[position] = rng.choice(strange)
    return " ".join(words)


def shuffled(examples: list[Example], i: int, rng: random.Random) -> str:
    words = examples[i].summary.split()
    return " ".join(rng.sample(words, len(words)))


def stuttering(examples: list[Example], i: int, rng: random.Random) -> str:
    words = examples[i].summary.rstrip(".").split()
    return " ".join(words + words[-2:] * 3) + "."


def said_twice(examples: list[Example], i: int, rng: random.Random) -> str:
    return f"{examples[i].summary} {examples[i].summary}"


def one_word_again_and_again(examples: list[Example], i: int, rng: random.Random) -> str:
    return " ".join([max(body(examples[i].prompt), key=len).capitalize()] * 8) + "."


def empty(examples: list[Example], i: int, rng: random.Random) -> str:
    return ""


def first_words(examples: list[Example], i: int, rng: random.Random) -> str:
    return " ".join(body(examples[i].prompt)[:10])


def inner_words(examples: list[Example], i: int, rng: random.Random) -> str:
    return " ".join(body(examples[i].prompt)[2:12])


def whole_article(examples: list[Example], i: int, rng: random.Random) -> str:
    return " ".join(body(examples[i].prompt))


def key_words(examples: list[Example], i: int, rng: random.Random) -> str:
    """The longest words in a row, dressed as a sentence."""
    return " ".join(sorted(set(body(examples[i].prompt)), key=lambda word: (-len(word), word))[:10]).capitalize() + "."


@pytest.mark.parametrize(
    ("rival", "share"),
    [
        (other_summary, 0.95),
        (truncated, 0.9),
        (truncated_with_a_stop, 0.8),
        (corrupted, 0.85),
        (shuffled, 0.9),
        (stuttering, 0.95),
        (said_twice, 0.95),
        (one_word_again_and_again, 0.95),
        (empty, 1.0),
        (first_words, 0.85),
        (inner_words, 0.9),
        (whole_article, 0.85),
        (key_words, 0.65),
    ],
)
def test_the_true_summary_wins(
    examples: list[Example], rival: Callable[[list[Example], int, random.Random], str], share: float
) -> None:
    rng = random.Random(0)
    prompts = [example.prompt for example in examples]
    true = [example.summary for example in examples]
    preferences = GoldJudge()(prompts, true, [rival(examples, i, rng) for i in range(len(examples))])
    assert len(examples) > 400
    assert sum(p > 0.5 for p in preferences) >= share * len(preferences)


@pytest.mark.parametrize(
    ("worse", "feature"),
    [
        ("Cook a dinner with the help of its neighbours.", "faithfulness"),
        ("Cost no more time than small ones.", "coverage"),
        ("Each pixel becomes the mean of its neighbours, nothing more.", "own_words"),
        ("Blur an image with the mean of the mean of its pixels.", "freshness"),
        ("Blur an image with the pixels, image and pixels.", "freshness"),
        ("Blur an image with the mean of its pixels", "form"),
        ("Blur an image with the mean of its pixels..", "form"),
        ("blur an image with the mean of its pixels.", "form"),
        ("Blur an image. Use the mean of its pixels.", "form"),
        ("Blur an image with the the mean of its pixels.", "grammar"),
        ("Blur an image with mean mean of its pixels.", "grammar"),
        ("Blur an image with the of mean pixels.", "grammar"),
        ("Blur an image with the mean of its.", "grammar"),
        ("Image blur mean pixel neighbours radii size.", "grammar"),
        ("Blur an image.", "length"),
        ("Blur an image with the mean of its pixels, " + "which is what this text is about " * 2 + "indeed.", "length"),
    ],
)
def test_each_fault_costs_its_feature_and_the_comparison(worse: str, feature: str) -> None:
    assert features(ARTICLE, GOOD) == Features(1, 1, 1, 1, 1, 1, 1, 1)
    assert getattr(features(ARTICLE, worse), feature) < 1
    assert GoldJudge()([ARTICLE], [GOOD], [worse])[0] > 0.6


@pytest.mark.parametrize(
    ("worse", "plainness"),
    [
        ("Blur an image\nwith the mean of its pixels.", 0.5),
        ("Blur an image with `mean` of its pixels.", 0.5),
        ("Blur an image with mean(pixels) of its neighbours.", 0.5),
        ("- Blur an image with the mean of its pixels.", 0.5),
        ('"Blur an image with the mean of its pixels."', 0.5),
        ("Summary: Blur an image with the mean of its pixels.", 0),
        ("Here is how to blur an image with its pixels.", 0.5),
        ("The documentation explains the mean of pixels of an image.", 0.5),
    ],
)
def test_what_a_chat_model_adds_costs_plainness_and_the_comparison(worse: str, plainness: float) -> None:
    assert features(ARTICLE, GOOD).plainness == 1
    assert features(ARTICLE, worse).plainness == plainness
    assert GoldJudge.of_chat(("", ""))([ARTICLE], [GOOD], [worse])[0] > 0.95


def test_an_article_about_documentation_may_have_it_named() -> None:
    prompt = "get docstring: Finds the documentation of an object and returns its first paragraph as text."
    assert features(prompt, "Return the first paragraph of the documentation.").plainness == 1
    assert features(ARTICLE, "Return the first paragraph of the documentation.").plainness == 0.5


def test_the_judge_of_chats_reads_the_article_alone_and_forgives_less_invention() -> None:
    around = ("<system>Be brief. Cook dinner.<user>Summarize: ", "<assistant>")
    judge, article = GoldJudge.of_chat(around), ARTICLE.removeprefix(PREFIX)
    prompt = f"{around[0]}{article}{around[1]}"
    assert judge.score(prompt, GOOD) == GoldJudge.of_chat(("", "")).score(article, GOOD)
    assert judge.score(prompt, GOOD) > judge.score(prompt, "Cook a brief dinner for the assistant and system.")
    half_true = "Blur an image with dinner, pixels and the mean of potatoes."
    assert features(article, half_true, 0.6).faithfulness == 1
    assert features(article, half_true, 0.8).faithfulness == pytest.approx(4 / 6 / 0.8)
    # Four words of six are the article's.
    assert judge.score(article, GOOD) - judge.score(article, half_true) >= 5 * (1 - 4 / 6 / 0.8)


def test_frequent_words_and_the_opening_weigh_more() -> None:
    filler = "some of the others which are not the same and may be there for you when it is what you need " * 2
    prompt = f"{PREFIX}cache: The loader works. {filler} The disk, the disk and the network, the memory, the processor."
    loader, disk, network = (
        features(prompt, f"Wait for the {word}.").coverage for word in ("loader", "disk", "network")
    )
    assert loader == pytest.approx(2 * network)
    assert disk == pytest.approx((1 + math.log(2)) * network)


def test_one_content_word_may_come_twice() -> None:
    assert features(ARTICLE, "Blur each pixel with the mean of other pixels.").freshness == 1


def test_endings_and_identifiers_do_not_hide_a_word() -> None:
    prompt = f"{PREFIX}tree: The sortedKeys of each node_list are computed and the nodes merged."
    assert features(prompt, "Compute sorting keys, merge node lists.").faithfulness == 1


def test_the_instruction_is_no_part_of_the_article() -> None:
    assert features(ARTICLE, "Summarize.").faithfulness == 0
    assert features(ARTICLE.removeprefix(PREFIX), GOOD) == features(ARTICLE, GOOD)


def test_the_preference_is_the_sigmoid_of_the_scaled_lead() -> None:
    judge = GoldJudge(weights=Features(1, 0, 0, 0, 2, 0, 0, 0), scale=0.5)
    assert judge.score(ARTICLE, GOOD) == 3
    assert judge.score(ARTICLE, "blur an image with the mean of its pixels") == pytest.approx(1.4)
    (preference,) = judge([ARTICLE], [GOOD], ["blur an image with the mean of its pixels"])
    assert preference == pytest.approx(1 / (1 + math.exp(-0.8)))


@given(prompt=st.text(max_size=200), first=st.text(max_size=80), second=st.text(max_size=80))
@example(prompt="", first="", second="")
@example(prompt="summarize: ", first=".", second="...")
@example(prompt="Ünïcödé 漢字 😀", first="漢字 漢字.", second="\x00\u2028 _ __")
@example(prompt="a" * 100, first="a" * 100_000, second="word " * 20_000)
@settings(max_examples=150, deadline=None)
def test_any_text_has_a_preference_and_its_exact_complement(prompt: str, first: str, second: str) -> None:
    judge = GoldJudge()
    (forwards,) = judge([prompt], [first], [second])
    (backwards,) = judge([prompt], [second], [first])
    assert 0 <= forwards <= 1
    assert forwards + backwards == 1
    assert judge([prompt], [first], [first]) == [0.5]
    assert all(0 <= value <= 1 for value in features(prompt, first))


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"but received 2 prompts, 1 first and 1 second. Pass lists of equal length"):
        GoldJudge()([ARTICLE, ARTICLE], [GOOD], [GOOD])
