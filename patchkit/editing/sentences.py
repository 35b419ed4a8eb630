"""What a model says about a subject by itself: sentences that are kept while a fact about the subject is edited.

A value takes everything that is said after the subject with it. What it must leave alone is first of all what else the
model knows of the subject, and that is told by nobody better than by the model: it goes on from the subject's name
alone, and what it says are its other facts. Those sentences are left out that say what the edited fact is about, and
those that ask for it, whatever they go on with: a value cannot keep them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from patchkit.editing.sampling import Drawn, Sampling, draw, sample
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
    drawn = draw(
        runner, tokenizer, openings, Sampling(TOKENS + 1, CHOICES), seeds
    )  # what comes after the last one is kept too
    changing = _answers(runner, tokenizer, edited)
    asking = _asking(runner, tokenizer, openings, drawn, [changing[place] for place, *_ in jobs])
    found = [dict[tuple[int, ...], Row]() for _ in facts]
    for (place, before, _), each, asks in zip(jobs, drawn, asking, strict=True):
        ids = each.tokens[:TOKENS]
        row, said = kept_row(facts[place], tokenizer, before, facts[place].subject, ids), tokenizer.decode(ids)
        # The first token of a text without BOS is an attention sink, and its state is no subject's.
        if row.subject and not asks and not any(answer.stem in said for answer in changing[place]):
            found[place].setdefault(tuple(ids), row)
    return [_unlike(rows)[:count] for rows in found]


def _unlike(rows: dict[tuple[int, ...], Row]) -> tuple[Row, ...]:
    """Rows by what is said in them, those first that begin otherwise than the ones before."""
    first: dict[tuple[int, ...], tuple[int, ...]] = {}
    for said in rows:
        first.setdefault(said[:ALIKE], said)
    chosen = list(first.values())
    return tuple(rows[said] for said in dict.fromkeys([*chosen, *rows]))


@dataclass(frozen=True)
class _Answer:
    """What the model says after a prompt: its first token, and the beginning of the word that it is known by."""

    first: int
    stem: str


def _answers(runner: LayerRunner, tokenizer: Any, edited: Sequence[Sequence[str]]) -> list[set[_Answer]]:
    """For each fact the model's answers to the prompts."""
    prompts = list(dict.fromkeys(prompt for some in edited for prompt in some))
    said = sample(runner, tokenizer, prompts, Sampling(ANSWER))
    stems = [stem_of(tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]
    answer = {prompt: _Answer(ids[0], stem) for prompt, ids, stem in zip(prompts, said, stems, strict=True) if stem}
    return [{answer[prompt] for prompt in some if prompt in answer} for some in edited]


def _asking(
    runner: LayerRunner,
    tokenizer: Any,
    openings: Sequence[str],
    drawn: Sequence[Drawn],
    answers: Sequence[Collection[_Answer]],
) -> list[bool]:
    """Whether the model would itself have said one of the answers (of each text) anywhere in what was drawn, or after
    it: "Rome is famous for its rain" asks for what it is famous for, though it says something else."""
    first = [{answer.first for answer in of_text} for of_text in answers]
    places = [
        (i, place) for i, each in enumerate(drawn) for place, token in enumerate(each.likeliest) if token in first[i]
    ]
    texts = [openings[i] + tokenizer.decode(drawn[i].tokens[:place]) for i, place in places]
    said = sample(runner, tokenizer, texts, Sampling(ANSWER))
    asking = [False] * len(drawn)
    for (i, _), ids in zip(places, said, strict=True):
        asking[i] |= stem_of(tokenizer.decode(ids, skip_special_tokens=True)) in {a.stem for a in answers[i]}
    return asking


def stem_of(answer: str) -> str:
    """The beginning of the word that an answer is known by, its first of some length: "the French Republic" by "Fren",
    which "France" does not have but "Frenchman" does. Empty where there is no word."""
    words = re.findall(r"\w+", re.split(r"[.!?\n]", answer.lstrip())[0])
    long = [word for word in words if len(word) >= STEM or word[0] >= IDEOGRAPHS]
    word = long[0] if long else max(words, key=len, default="")
    return word[: STEM // 2] if word[:1] >= IDEOGRAPHS else word[:STEM]
