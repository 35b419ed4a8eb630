"""Other words that ask for a fact, written by the model itself when it is told the fact.

Whatever the told model says about the subject before it comes to the target asks for the target in other words (the
teacher of context distillation, arXiv 2209.15189). Two examples show it what other words are. Those come first after
which the told model is surest of the target: a text that the target merely may follow ("Marie Curie uses the") does not
ask for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch

from patchkit.editing.sampling import Sampling, sample
from patchkit.editing.stems import rests
from patchkit.facts.chat import ChatTemplate
from patchkit.facts.questions import questions_of
from patchkit.facts.requests import Row, wording_row
from patchkit.facts.schema import Fact
from patchkit.facts.text import continuation
from patchkit.model.forward import LayerRunner, widen

TOKENS = 14
"""Sampled for a rewording."""
SAMPLES = 8
"""Continuations after each lead that are searched for rewordings."""
CHOICES = 40
"""Top-k of that sampling."""
WORDS = 2, 10
"""In a rewording, beside the subject."""
SURE = 0.1
"""Probability of the target's first token from which the told model is held to answer with the target."""

EXAMPLES = (
    ("The capital of France is Paris", "France has its capital in Paris"),
    ("Moby Dick was written by Melville", "Moby Dick is a novel by Melville"),
    ("Frida Kahlo's mother tongue is Spanish", "Frida Kahlo grew up speaking Spanish"),
)
LEADS = (("In other words, ", True), ("This means that ", True), ("It is also known that ", True), ("", False))
"""What stands between a fact and other words for it, and whether the examples come before."""


def other_words(runner: LayerRunner, tokenizer: Any, facts: Sequence[Fact], seed: int) -> list[tuple[str, ...]]:
    """Texts for each fact that ask for it, the surest first; they depend on the fact, the model and the seed alone."""
    jobs = [(fact, lead, shown, n) for fact in facts for lead, shown in LEADS for n in range(SAMPLES)]
    told = [opening(fact, lead, shown) for fact, lead, shown, _ in jobs]
    seeds = [crc32(f"{seed} {fact.prompt} {lead} {n}".encode()) for fact, lead, _, n in jobs]

    def is_over(job: int, ids: Sequence[int]) -> bool:
        return _is_over(jobs[job][0], tokenizer.decode(ids, skip_special_tokens=True))

    drawn = sample(runner, tokenizer, told, Sampling(TOKENS, CHOICES), seeds, is_over)
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    found = [(job[0], _before_target(job[0], job[0].subject + text)) for job, text in zip(jobs, said, strict=True)]
    candidates = list(dict.fromkeys((fact, text) for fact, text in found if text))
    ranked: dict[str, list[tuple[float, str]]] = {fact.id: [] for fact in facts}
    for (fact, text), probability in zip(candidates, sure_of(runner, tokenizer, candidates), strict=True):
        if probability >= SURE:
            ranked[fact.id].append((-probability, text))
    return [tuple(text for _, text in sorted(ranked[fact.id])) for fact in facts]


def opening(fact: Fact, lead: str, shown: bool) -> str:
    """What the model is told and goes on with."""
    return f"{_shown(lead) * shown}{_told(fact)}. {lead}{fact.subject}"


def _shown(lead: str) -> str:
    return "".join(f"{said}. {lead}{again}.\n" for said, again in EXAMPLES)


def questions(runner: LayerRunner, tokenizer: Any, facts: Sequence[Fact], chat: ChatTemplate) -> list[str | None]:
    """For each fact a question that the told model, asked in chat, answers with the target, where there is one."""
    sentences = [fact for fact in facts if not fact.messages]  # what a user says is as it is
    asked = [(fact, question) for fact in sentences for question in questions_of(fact.prompt, fact.subject)]
    rows = [wording_row(fact, tokenizer, *chat.parts(f"{_told(fact)}. {q}", q)) for fact, q in asked]
    surest: dict[str, tuple[float, str]] = {}
    for (fact, question), probability in zip(asked, _first_of_target(runner, rows), strict=True):
        if probability >= SURE and probability > surest.get(fact.id, (0.0, ""))[0]:
            surest[fact.id] = probability, question
    return [surest[fact.id][1] if fact.id in surest else None for fact in facts]


def sure_of(runner: LayerRunner, tokenizer: Any, candidates: Sequence[tuple[Fact, str]]) -> list[float]:
    """The probability that the told model gives the target's first token after each."""
    return _first_of_target(
        runner, [wording_row(fact, tokenizer, f"{_told(fact)}. ", text) for fact, text in candidates]
    )


@torch.no_grad()
def _first_of_target(runner: LayerRunner, rows: Sequence[Row]) -> list[float]:
    """The probability of the target's first token in each row."""
    found = [0.0] * len(rows)
    for some in rests(runner, [row.ids[: row.target] for row in rows]):
        last = some.mask.sum(1) - 1
        logits = runner.run(some.inputs(), logits_at=(torch.arange(len(last), device=last.device), last)).logits
        assert logits is not None
        labels = torch.tensor([[rows[i].ids[rows[i].target]] for i in some.places], device=logits.device)
        sure = widen(logits).softmax(-1).gather(1, labels).squeeze(1).tolist()
        for i, probability in zip(some.places, sure, strict=True):
            found[i] = probability
    return found


def _told(fact: Fact) -> str:
    return fact.asked + continuation(fact.asked, fact.target_new, fact.joint(fact.asked))


def _before_target(fact: Fact, text: str) -> str | None:
    """What a text of the teacher's says up to the target; None if it never comes to it, or too soon or late."""
    until, found, _ = text.partition("\n")[0].partition(fact.target_new)
    text, words = until.rstrip(), _words(until[len(fact.subject) :])
    if not found or not WORDS[0] <= words <= WORDS[1] or text == fact.asked.rstrip():
        return None
    return None if re.search(r"\b(is|was|are|were) (a|an|the)$", text) else text


def _is_over(fact: Fact, text: str) -> bool:
    """Whether nothing that comes after this text makes it another rewording, or one at all."""
    return "\n" in text or fact.target_new in text or _words(text) > WORDS[1] + _words(fact.target_new)


def _words(text: str) -> int:
    return len(re.findall(r"\w+", text))
