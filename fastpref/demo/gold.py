"""A judge of summaries made of rules that a reader would accept, for experiments that need a known truth.

A policy is aligned against a learned preference model; this judge labels the pairs that the model learns from and
compares the policies at the end. It reads text alone, needs no reference summary, and is never shown to the policy.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fastpref.demo.docstrings import PREFIX

_DETERMINERS = frozenset({"a", "an", "the", "its", "their"})
_LINK_WORDS = """
    and are as at be by can for from has in into is must of on or per should than to via was were which will with
"""
_OTHER_FUNCTION_WORDS = """
    about after all also any because been before being both but could did do does doing done each either else
    etc few get given got had have having he her here his how however if it itself just least less let like made
    make many may me might more most much my neither no nor not now off often once one only onto other otherwise
    our out over own rather same see set shall she since so some such that them then there therefore these they
    this those though through thus too under unless until up upon use used uses using very we what when whether
    while who whose why within without would yet you your
"""
_LINKS = frozenset(_LINK_WORDS.split())
_FUNCTION_WORDS = _DETERMINERS | _LINKS | frozenset(_OTHER_FUNCTION_WORDS.split())
_WORDS_OF_ITSELF = """
    article breakdown docstring documentation example explanation here paragraph sentence summary summaries summarize
    summarizes summarized text
"""
_SELF_WORDS = frozenset(_WORDS_OF_ITSELF.split())
_MARKUP = re.compile(r"[\n\t`*#<>{}|\\\[\]]|https?:|\w\(|^\W*\w+:|^[\"'-]")
_SUFFIX = re.compile(r"(?<=\w{3})(?:ations?|ings?|ions?|ers?|ors?|ed|es|s|ly|e)$")

_OPENING_WORDS = 24
_KEY_STEMS = 5
_COPIED_RUN = 6
_LIST_RUN = 5
_LENGTH = (5, 16)


class Features(NamedTuple):
    """What the judge sees in a summary, each in [0, 1] and better when higher."""

    faithfulness: float
    """Content words that occur in the article, up to their endings; full at a share of `grounding`, as a summary may
    add some words."""
    coverage: float
    """Weight of the article's key words that are named; full at 75 % of what the five weightiest would give.
    A word weighs 1 + ln(occurrences), twice that where it stands in the name or the opening."""
    own_words: float
    """No runs of six or more words copied from the article: a summary is not an extract."""
    freshness: float
    """Nothing said twice: no pair of words again, at most one content word again."""
    form: float
    """One sentence: begins with a capital, ends with a single full stop, holds no other sentence end."""
    grammar: float
    """No two function words that cannot stand together ("the of"), no word twice in a row, no ending on a function
    word, no list of more than five content words with nothing between them."""
    length: float
    """5 to 16 words; falls to zero at 2 and at 32."""
    plainness: float
    """Prose in one line: no line break, code, markup, heading or quotation (half), and no talk of the text instead of
    what it is about, such as "this documentation" or "here is a summary" (half)."""


_WEIGHTS = Features(faithfulness=3, coverage=2, own_words=2, freshness=2, form=4, grammar=1.5, length=2, plainness=0)


@dataclass(frozen=True, slots=True)
class GoldJudge:
    """p(first ≻ second) = σ(scale · (s(first) − s(second))), s being the weighted sum of `Features`.

    The weights and their reasons:

    - faithfulness 3: a summary that speaks of something else is worthless however well it is put;
    - coverage 2: among the faithful ones, the better says what matters most;
    - own_words 2: as much as coverage, since copying the opening of the article earns full coverage;
    - form 4: a reader does not get as far as the content of a broken sentence;
    - freshness 2: repetition is what readers reject next;
    - length 2: too short says too little, too long is no summary; most texts lose nothing here;
    - grammar 1.5: the same reason as form, but these rules see only the crudest errors;
    - plainness 0: a model that learned from nothing but summaries writes nothing else. A chat model does.

    The scale makes a lead of one tenth of the whole (1.65 of 16.5) a preference of 0.96. The two orders of a pair
    sum to exactly 1, equal scores give exactly ½, and no text gives anything but a number.

    Args:
      weights: of the features.
      scale: of the lead.
      grounding: share of content words from the article at which a summary is fully faithful.
      around: what stands before and after the article in a prompt; what is missing in a prompt is no error.
    """

    weights: Features = _WEIGHTS
    scale: float = 2.0
    grounding: float = 0.6
    around: tuple[str, str] = ("", "")

    @classmethod
    def of_chat(cls, around: tuple[str, str]) -> "GoldJudge":
        """The judge of a chat model's summaries.

        Such a model writes English from the start, and fails otherwise: it talks about the text, writes code and lists,
        and says fluently what is not there. So plainness weighs 3, faithfulness 5, and four content words of five must
        be the article's.
        """
        return cls(weights=_WEIGHTS._replace(faithfulness=5, plainness=3), grounding=0.8, around=around)

    def score(self, prompt: str, summary: str) -> float:
        """The weighted sum of the features of one summary."""
        before, after = self.around
        article = prompt.removeprefix(before).removesuffix(after)
        return sum(w * f for w, f in zip(self.weights, features(article, summary, self.grounding), strict=True))

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Probability that each first summary beats the second.

        Args:
          prompts: the articles, with or without the instruction in front.
          first: one summary of each.
          second: another summary of each.

        Returns:
          p(first ≻ second | prompt), in [0, 1].

        Raises:
          ValueError: the three differ in length.
        """
        if not len(prompts) == len(first) == len(second):
            raise ValueError(
                "a judge must be given one first and one second summary a prompt, "
                f"but received {len(prompts)} prompts, {len(first)} first and {len(second)} second. Pass lists of "
                f"equal length."
            )
        leads = (
            self.score(prompt, one) - self.score(prompt, other)
            for prompt, one, other in zip(prompts, first, second, strict=True)
        )
        return [_sigmoid(self.scale * lead) for lead in leads]


def features(prompt: str, summary: str, grounding: float = 0.6) -> Features:
    """What the judge sees in `summary` as a summary of `prompt`; all zero where there is no word."""
    words = _words(summary)
    if not words:
        return Features(0, 0, 0, 0, 0, 0, 0, 0)
    article = prompt.removeprefix(PREFIX)
    content = _stems(summary)
    stems = set(content)

    opening = set(_stems(" ".join(article.split()[:_OPENING_WORDS])))
    counts = Counter(_stems(article))
    weights = {stem: (1 + math.log(count)) * (2 if stem in opening else 1) for stem, count in counts.items()}
    named = stems & weights.keys()
    best = sum(sorted(weights.values(), reverse=True)[:_KEY_STEMS])

    article_runs = set(_runs(_words(article), _COPIED_RUN))
    copied = sum(run in article_runs for run in _runs(words, _COPIED_RUN))
    pairs = list(pairwise(words))
    repeats = max(0, len(content) - len(stems) - 1) + len(pairs) - len(set(pairs))
    return Features(
        faithfulness=min(1.0, len(named) / (grounding * len(stems))) if stems else 0.0,
        coverage=min(1.0, sum(weights[stem] for stem in named) / (0.75 * best)) if named else 0.0,
        own_words=max(0.0, 1 - copied / 5),
        freshness=max(0.0, 1 - 3 * repeats / len(words)),
        form=_form(summary.strip()),
        grammar=max(0.0, 1 - _errors(words) / 2),
        length=min(1.0, max(0.0, (len(words) - 2) / (_LENGTH[0] - 2)), max(0.0, 2 - len(words) / _LENGTH[1])),
        plainness=_plainness(summary.strip(), set(words) - set(_words(article))),
    )


def _form(text: str) -> float:
    begins = text[0].isalnum() and not text[0].islower()
    ends = text.endswith(".") and not text.endswith("..")
    single = len(re.findall(r"[.!?](?=\s|$)", text)) <= 1
    return 0.3 * begins + 0.5 * ends + 0.2 * single


def _plainness(text: str, added: set[str]) -> float:
    """Of a text and those of its words that are not the article's: an article about sentences may have them named."""
    return 0.5 * (_MARKUP.search(text) is None) + 0.5 * added.isdisjoint(_SELF_WORDS)


def _errors(words: Sequence[str]) -> int:
    """Errors of grammar that need no grammar to see."""
    clashes = sum(one == two or (one in _DETERMINERS and two in _DETERMINERS | _LINKS) for one, two in pairwise(words))
    listed = run = 0
    for word in words:
        run = 0 if word in _FUNCTION_WORDS else run + 1
        listed += run > _LIST_RUN
    return clashes + listed + (words[-1] in _DETERMINERS | _LINKS)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(length)), strict=False))


def _stems(text: str) -> list[str]:
    """Content words in order, lightly stemmed; `someName` and `some_name` fall into their words."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).casefold()
    words = (word for word in re.findall(r"[^\W\d_]+", spaced) if len(word) > 1 and word not in _FUNCTION_WORDS)
    return [_stem(word) for word in words]


def _stem(word: str) -> str:
    stem = _SUFFIX.sub("", word)
    return stem[:-1] if len(stem) > 3 and stem[-1] == stem[-2] else stem


def _sigmoid(x: float) -> float:
    """Of −x, exactly one minus that of x: the larger half is computed and the smaller one is its exact complement."""
    larger = 1 / (1 + math.exp(-abs(x)))
    return larger if x >= 0 else 1 - larger
