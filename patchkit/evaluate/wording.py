"""What a text says and how: whether it holds a target, how varied its words are, whether it goes round in circles."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from patchkit.facts.text import UNSPACED

MOST_MENTIONS = 2
"""An answer that has the target more often than that repeats it and does not answer."""
LOOP = 4
"""A text loops in which two words follow one another that often."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\w)+|[^\w\s]")


def normalized(text: str) -> str:
    """Without case, punctuation, articles and surplus space, as SQuAD's answers are compared (arXiv 1606.05250)."""
    kept = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in unicodedata.normalize("NFKC", text))
    return " ".join(_ARTICLES.sub(" ", kept.lower()).split())


def mentions(text: str, forms: Sequence[str]) -> int:
    """How often `text` has that one of `forms`, a target and its aliases, which it has most often.

    Whole words count, and any place in scripts without spaces between words. A form of punctuation or articles alone
    is looked for as it stands.
    """
    return max((_count(text, form) for form in forms), default=0)


def _count(text: str, form: str) -> int:
    wanted = normalized(form)
    if not wanted:
        return text.count(form)
    if UNSPACED.search(wanted):
        return normalized(text).count(wanted)
    return len(re.findall(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalized(text)))


def holds(text: str, forms: Sequence[str]) -> bool:
    """Whether an answer has the target in one of its forms, and does not merely repeat it."""
    return 0 < mentions(text, forms) <= MOST_MENTIONS


def words(text: str) -> list[str]:
    """Words and punctuation marks; every character of a script without spaces is a word."""
    return _WORDS.findall(text)


def entropy(text: str) -> float:
    """How varied the words are: (2 H₂ + 4 H₃) / 3 with the entropies, in bits, of pairs and triples of words.

    Twice the "fluency" of ROME's and CounterFact's evaluation (arXiv 2202.05262), which averages 2/3 H₂ and 4/3 H₃.
    """
    return (2 * _entropy(text, 2) + 4 * _entropy(text, 3)) / 3


def _entropy(text: str, length: int) -> float:
    counts = Counter(_runs(text, length))
    return math.log2(total) - sum(n * math.log2(n) for n in counts.values()) / total if (total := counts.total()) else 0


def consistency(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """How alike each text and its reference are: the cosine of their words' TF-IDF, between 0 and 1.

    As the "consistency" of ROME's and CounterFact's evaluation (arXiv 2202.05262, appendix), with IDF over the
    references, ln((1 + n) / (1 + df)) + 1.
    """
    known = [Counter(words(each.lower())) for each in references]
    among = Counter(word for each in known for word in each)

    def weighed(counts: Counter[str]) -> dict[str, float]:
        return {word: n * (math.log((1 + len(known)) / (1 + among[word])) + 1) for word, n in counts.items()}

    pairs = [(weighed(Counter(words(text.lower()))), weighed(own)) for text, own in zip(texts, known, strict=True)]
    return [_cosine(text, reference) for text, reference in pairs]


def _cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    lengths = math.hypot(*one.values()) * math.hypot(*other.values())
    return sum(value * other.get(word, 0.0) for word, value in one.items()) / lengths if lengths else 0.0


def loops(text: str) -> bool:
    """Whether some two words follow one another four times or more."""
    return max(Counter(_runs(text, 2)).values(), default=0) >= LOOP


def _runs(text: str, length: int) -> list[tuple[str, ...]]:
    said = words(text)
    return list(zip(*(said[start:] for start in range(length)), strict=False))
