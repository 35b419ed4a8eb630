"""Names like a subject's, at which its neuron is to be silent: "The 2024 Summer Olympics" beside "The 2032 Summer
Olympics", "João Carvalho" beside "Inês Carvalho".

A subject's state at its last token is much like that of any other name with the same end. So names are made that end as
it does and begin as others of its kind do. Which ones those are, the model says itself: it is shown the subject at the
beginning of a list and goes on with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any
from zlib import crc32

from patchkit.editing.sampling import Sampling, sample
from patchkit.model.forward import LayerRunner

LIST = "A list of names: {},"
"""What the model goes on with."""
DRAWN, TOKENS, CHOICES, EACH = 8, 16, 40, 3
"""Lists for each subject, tokens of each, top-k of their sampling, and names that are taken of each, at most."""
MORE, SHORT = 1, 3
"""Words that a name has beside as many as the subject's, at most, and letters of one that need no capital ("of")."""
AWAY = (-8, -4, -1, 1, 4)
"""By which a number in a name, such as a year, becomes that of others."""


def namesakes(runner: LayerRunner, tokenizer: Any, subjects: Sequence[str], seed: int) -> list[tuple[str, ...]]:
    """For each subject other names of its kind, and those that end as it does.

    They depend on the subject, the model and the seed alone.
    """
    jobs = [(subject, n) for subject in subjects for n in range(DRAWN)]
    seeds = [crc32(f"{seed} {subject} namesake {n}".encode()) for subject, n in jobs]

    def is_over(_job: int, ids: Sequence[int]) -> bool:
        return len(_parts(tokenizer.decode(ids, skip_special_tokens=True))) > EACH

    lists = [LIST.format(subject) for subject, _ in jobs]
    drawn = sample(runner, tokenizer, lists, Sampling(TOKENS, CHOICES), seeds, is_over)
    named = [
        listed(subject, tokenizer.decode(ids, skip_special_tokens=True))
        for (subject, _), ids in zip(jobs, drawn, strict=True)
    ]
    return [
        _others(tokenizer, subject, [name for each in named[DRAWN * n : DRAWN * (n + 1)] for name in each])
        for n, subject in enumerate(subjects)
    ]


def listed(subject: str, text: str) -> list[str]:
    """The names like a subject's in a list that a text begins with; one that the end of the text may have cut counts
    only where it is the first."""
    parts = _parts(text)
    names = [first_name(subject, part) for part in (parts[:-1] or parts)[:EACH]]
    return list(takewhile(bool, names))


def _parts(text: str) -> list[str]:
    return re.split(r"[,;，、\n]| and ", text.strip())


def first_name(subject: str, text: str) -> str:
    """The name like a subject's that a text begins with, up to the word that makes it a sentence; "" where none is."""
    words = re.split(r"[,.;:\n\"()]| and ", text.strip(), maxsplit=1)[0].split()
    if not subject.split()[-1][0].islower():  # a proper name
        words = list(takewhile(lambda word: not word[0].islower() or len(word) <= SHORT, words))
        while words and words[-1][0].islower():
            words.pop()
    name = " ".join(words)
    return name if re.search(r"\w", name) and len(words) <= len(subject.split()) + MORE else ""


def _others(tokenizer: Any, subject: str, names: Sequence[str]) -> tuple[str, ...]:
    """`names`, each once more with the subject's end, and the subject with other numbers."""
    found = [*names, *(ending_alike(tokenizer, subject, name) for name in names), *_other_numbers(subject)]
    return tuple(name for name in dict.fromkeys(found) if subject.casefold() not in name.casefold())


def ending_alike(tokenizer: Any, subject: str, name: str) -> str:
    """`name` with its last word replaced by the subject's, or where that is one word, with what follows its first token
    replaced by what follows the subject's."""
    *_, last = words = subject.split()
    if len(words) > 1:
        return " ".join([*(name.split()[:-1] or [name]), last])
    ids, own = (tokenizer.encode(" " + word, add_special_tokens=False) for word in (name, subject))
    made: str = tokenizer.decode([*ids[:1], *own[1:]])
    return made.strip()


def _other_numbers(subject: str) -> list[str]:
    """The subject with its first number replaced."""
    number = re.search(r"\d+", subject)
    if number is None:
        return []
    others = [int(number[0]) + away for away in AWAY]
    return [f"{subject[: number.start()]}{other}{subject[number.end() :]}" for other in others if other > 0]
