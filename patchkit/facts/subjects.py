"""What a prompt may be about, for records that leave the subject out: names, else other phrases."""

from __future__ import annotations

import re

from patchkit.facts.text import UNSPACED

# Words that no subject is made of, though a name may have some of them inside ("University of Lima").
_SMALL = re.compile(
    "a|an|and|are|as|at|be|been|born|by|called|did|do|does|for|from|had|has|have|he|her|his|how|i|in|into|is|it|its|"
    "known|lies|located|made|me|my|name|named|of|on|or|our|says?|she|situated|that|the|their|they|this|to|was|we|were|"
    "what|when|where|which|who|whom|whose|why|will|with|you|your",
    re.IGNORECASE,
)
_INSIDE = re.compile("al|and|bin|da|de|del|den|der|di|du|for|la|le|of|the|van|von", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+(?:[-.'’&][^\W_]+)*")


def candidates(prompt: str) -> tuple[str, ...]:
    """Capitalized spans of the prompt, longest first; where there are none, runs of words that are no small ones.

    None in scripts without spaces, where nothing shows what a word is.
    """
    words = [(found.start(), re.sub(r"['’]s$", "", found.group())) for found in _WORD.finditer(prompt)]
    words = [(start, word) for start, word in words if not UNSPACED.search(word)]
    names = [_is_name(word, first=place == 0) for place, (_, word) in enumerate(words)]
    runs = _runs(words, names, joined=True)
    if not runs:
        runs = _runs(words, [not _SMALL.fullmatch(word) for _, word in words], joined=False)
    spans = dict.fromkeys(prompt[words[a][0] : words[b][0] + len(words[b][1])] for a, b in runs)
    return tuple(sorted(spans, key=len, reverse=True))


def _is_name(word: str, first: bool) -> bool:
    return word[0].isupper() and word != "I" and not (first and _SMALL.fullmatch(word))


def _runs(words: list[tuple[int, str]], wanted: list[bool], joined: bool) -> list[tuple[int, int]]:
    """First and last places of words that follow one another; `joined` also over small words between two of them."""
    runs: list[tuple[int, int]] = []
    for place, want in enumerate(wanted):
        if not want:
            continue
        between = [word for _, word in words[runs[-1][1] + 1 : place]] if runs else []
        if runs and (not between or (joined and len(between) <= 2 and all(map(_INSIDE.fullmatch, between)))):
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    return runs
