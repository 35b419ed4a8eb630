"""What a model says about a subject by itself: sentences that are kept while a fact about the subject is edited.

A value takes everything that is said after the subject with it. What it must leave alone is first of all what else the
model knows of the subject, and that is told by nobody better than by the model: it goes on from the subject's name
alone, and what it says are its other facts. Those sentences that say what the edited fact is about are left out: a
value cannot keep them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from zlib import crc32

from patchkit.editing.contexts import sample
from patchkit.facts.requests import Row, kept_row
from patchkit.facts.schema import Fact
from patchkit.model.forward import LayerRunner

DRAWN = 32
"""Sentences among which a subject's are chosen."""
TOKENS = 14
"""Of a sentence, which may go on with another one."""
CHOICES = 50
"""Top-k of the sampling."""
ANSWER = 4
"""Tokens of what the model says after a prompt, in which its answer is looked for."""
ALIKE = 2
"""First tokens of two sentences that begin alike."""
STEM, IDEOGRAPHS = 4, "\u2e80"
"""Letters by which a word is known, half as many where it is written in ideographs, which are all above this one."""


def own_sentences(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    edited: Sequence[Sequence[str]],
    befores: Sequence[str],
    count: int,
    seed: int,
) -> list[tuple[Row, ...]]:
    """Up to `count` kept rows for each fact, those first that begin otherwise than the ones before.

    What a fact gets depends on the fact, what is in `edited` for it, the model and the seed.

    Args:
        edited: for each fact the prompts, its own among them, whose answers are about to change.
        befores: texts of which one comes before each sentence, in turn.
    """
    jobs = [(place, befores[n % len(befores)], n) for place in range(len(facts)) for n in range(DRAWN)]
    openings = [before + facts[place].subject for place, before, _ in jobs]
    seeds = [crc32(f"{seed} {facts[place].subject} sentence {n}".encode()) for place, _, n in jobs]
    drawn = sample(runner, tokenizer, openings, seeds, TOKENS, CHOICES)
    changing, found = _stems(runner, tokenizer, edited), [dict[tuple[int, ...], Row]() for _ in facts]
    for (place, before, _), ids in zip(jobs, drawn, strict=True):
        row, said = kept_row(facts[place], tokenizer, before, facts[place].subject, ids), tokenizer.decode(ids)
        # The first token of a text without BOS is an attention sink, and its state is no subject's.
        if row.subject and not any(stem in said for stem in changing[place]):
            found[place].setdefault(tuple(ids), row)
    return [_unlike(rows)[:count] for rows in found]


def _unlike(rows: dict[tuple[int, ...], Row]) -> tuple[Row, ...]:
    """Rows by what is said in them, those first that begin otherwise than the ones before."""
    first: dict[tuple[int, ...], tuple[int, ...]] = {}
    for said in rows:
        first.setdefault(said[:ALIKE], said)
    chosen = list(first.values())
    return tuple(rows[said] for said in dict.fromkeys([*chosen, *rows]))


def _stems(runner: LayerRunner, tokenizer: Any, edited: Sequence[Sequence[str]]) -> list[set[str]]:
    """For each fact the beginnings of the words by which the model's answers to the prompts are known."""
    prompts = list(dict.fromkeys(prompt for some in edited for prompt in some))
    said = sample(runner, tokenizer, prompts, [0] * len(prompts), ANSWER, choices=1)
    stem = {
        prompt: stem_of(tokenizer.decode(ids, skip_special_tokens=True))
        for prompt, ids in zip(prompts, said, strict=True)
    }
    return [{stem[prompt] for prompt in some} - {""} for some in edited]


def stem_of(answer: str) -> str:
    """The beginning of the word that an answer is known by, its first of some length: "the French Republic" by "Fren",
    which "France" does not have but "Frenchman" does. Empty where there is no word."""
    words = re.findall(r"\w+", re.split(r"[.!?\n]", answer.lstrip())[0])
    long = [word for word in words if len(word) >= STEM or word[0] >= IDEOGRAPHS]
    word = long[0] if long else max(words, key=len, default="")
    return word[: STEM // 2] if word[:1] >= IDEOGRAPHS else word[:STEM]
