"""How close a fact's key is to keys that stand for something else: an edit changes what is said there as well.

An update that gives the key k its new value gives a part of it to every other key q, in the measure in which the two
are alike in the metric of the solve, the inverse of plain text's second moments. Three things are looked at, at the
lowest edited layer, before anything is edited:

- template: the largest cosine with a key of what the chat template writes around a message, its default system prompt
  included. Every conversation goes through those.
- common: how much more of the value than usual plain text gets. k' G k is what a solve has to itself at k; that of
  plain text's keys is tr(C G) in the mean, and common is the quotient of the two. Of experts, those that the fact goes
  to count: tokens that go elsewhere do not meet it.
- other: the largest cosine with the key of a fact about another subject.

G = (C + mean(eigenvalues) I)⁻¹. With this much damping what the two kinds have is furthest apart: with less, rare
directions drown the template's, and plain cosines (G = I) of all keys are large at some layers, where a few directions
have nearly all of the length.

The bounds are from SmolLM2-135M-Instruct and from Gemma 3 270M, which has no template, both at layer 4, with statistics
of the packaged text and of WikiText, of 120 subjects of CounterFact, 40 of ZsRE and 20 others, beside subjects that
nobody should edit. Template: the ordinary ones have 0.04 in the median and 0.17 at most; "an AI assistant" 0.67 and
0.76 in two prompts, the names in the system prompt 0.62 and 0.68, "You" 0.24 and 0.52, "The assistant" 0.24. Common:
the ordinary ones have 0.5 in the median and 1.5 at most (Gemma: 0.7 and 2.0); "You" 2.7, "the" 3.9, "A person" 4.1.
Other: pairs of ordinary subjects have 0.41 at most (Gemma: 0.67, names with a last syllable in common); "the Eiffel
Tower" and "Eiffel Tower" 0.93 and more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.facts.chat import ChatTemplate
from patchkit.facts.requests import Row, encode, pad, wording_row
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.model.devices import exact, sent, solve_device
from patchkit.model.forward import LayerRunner
from patchkit.model.inputs import watching_site
from patchkit.model.weights import Site

TEMPLATE, TEMPLATE_REFUSED = 0.2, 0.5
"""Cosines from which on a fact is warned of, and refused."""
COMMON, COMMON_REFUSED = 2.5, 3.5
OTHER = 0.8
DAMPING = 1.0
"""In units of the mean eigenvalue."""
ROWS = 64
_BEFORE = "This is known. "
_MESSAGES = ("Hello", "How many legs does a spider have?", "Give me a short recipe for tomato soup.")


@dataclass(frozen=True)
class Closeness:
    """What a fact's key is close to; `token` is the template's, `other` the id and subject of another fact."""

    fact: Fact
    template: float
    token: str
    common: float
    other: tuple[str, str] | None
    other_cosine: float

    @property
    def refused(self) -> bool:
        """Whether the edit would show everywhere."""
        return self.template >= TEMPLATE_REFUSED or self.common >= COMMON_REFUSED

    def warnings(self) -> Iterator[str]:
        """What should be said about it, each as the end of a sentence about the fact."""
        name = f'fact {self.fact.id}: the key of "{self.fact.subject}"'
        if self.template >= TEMPLATE:
            yield (
                f"{name} is close to that of {json.dumps(self.token, ensure_ascii=False)} in the chat template (cosine "
                f"{self.template:.2f}; ordinary subjects have 0.05), so every answer in chat may change with it"
            )
        if self.common >= COMMON:
            yield (
                f"{name} is like those all over plain text (plain text gets {self.common:.1f} times its usual share of "
                "an edit there), so any text may change with it"
            )
        if self.other and self.other_cosine >= OTHER:
            yield (
                f'{name} is close to that of "{self.other[1]}" of fact {self.other[0]} (cosine '
                f"{self.other_cosine:.2f}), so each may be taken for the other; name one thing in the same words"
            )


@torch.no_grad()
def closeness(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    site: Site,
    covariance: Covariance,
    chat: ChatTemplate | None = None,
    earlier: Mapping[str, tuple[str, Tensor]] = {},
) -> list[Closeness]:
    """What each fact's key at `site` is close to; a few passes through the layers up to it.

    A fact's key is the mean over its prompt and, with a template, its prompt as a message.

    Args:
        earlier: facts written before, by id: the subject and the key (d_in,) at the site.
    """
    keys = _fact_keys(runner, tokenizer, facts, site, chat)  # (d_in, n)
    covariance = covariance.on(keys.device)
    solved, typical = covariance.solve(keys, DAMPING), covariance.typical(keys, DAMPING)
    own = (keys * solved).sum(0)  # k' G k, (n,)
    template, tokens = _template_cosines(runner, tokenizer, solved / own.sqrt(), site, covariance, chat)
    known = [(fact.id, fact.subject) for fact in facts] + [(name, subject) for name, (subject, _) in earlier.items()]
    others = _others(keys, solved, own, covariance, known, [key.to(keys.device) for _, key in earlier.values()])
    return [
        Closeness(fact, template[i], tokens[i], float(typical[i] / own[i]), *others[i]) for i, fact in enumerate(facts)
    ]


def _fact_keys(
    runner: LayerRunner, tokenizer: Any, facts: Sequence[Fact], site: Site, chat: ChatTemplate | None
) -> Tensor:
    rows = [[_inner_row(fact, tokenizer), *([_message_row(fact, tokenizer, chat)] if chat else [])] for fact in facts]
    texts = [row.ids[: row.subject + 1] for each in rows for row in each]
    wanted = [[len(text) - 1] for text in texts]
    last = torch.cat(_keys(runner, texts, wanted, site))  # (rows of all facts, d_in)
    return last.view(len(facts), -1, last.shape[1]).mean(1).T


def _inner_row(fact: Fact, tokenizer: Any) -> Row:
    """The prompt, after other words where it begins with the subject's last token: an attention sink would be there,
    with the key that any first token has."""
    row = wording_row(fact, tokenizer, "", fact.prompt)
    return row if row.subject else wording_row(fact, tokenizer, _BEFORE, fact.prompt)


def _message_row(fact: Fact, tokenizer: Any, chat: ChatTemplate) -> Row:
    if fact.messages:
        return _inner_row(fact, tokenizer)
    return wording_row(fact, tokenizer, *chat.parts(fact.prompt, fact.prompt))


def _keys(
    runner: LayerRunner, texts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], site: Site
) -> list[Tensor]:
    """The keys (n, d_in) at the wanted positions of each text, as solves at the site take them."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), ROWS):
        places = order[first : first + ROWS]
        each = [wanted[place] for place in places]
        keys = exact(_batch_keys(runner, [texts[place] for place in places], each, site), solve_device(site.module))
        found |= dict(zip(places, keys.split([len(at) for at in each]), strict=True))
    return [found[place] for place in range(len(texts))]


def _batch_keys(
    runner: LayerRunner, texts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], site: Site
) -> Tensor:
    """Keys (n, d_in) at the wanted positions, text by text."""
    seen = list[Tensor]()
    ids, mask = pad(texts, runner.device)
    row, position = torch.tensor([(row, at) for row, each in enumerate(wanted) for at in each]).view(-1, 2).T
    with watching_site(site, len(texts), lambda keys, _: seen.append(keys.at(row, position))):
        runner.run({"input_ids": ids, "attention_mask": mask, "use_cache": False}, stop=site.layer + 1)
    return seen[0]


def _template_cosines(
    runner: LayerRunner, tokenizer: Any, solved: Tensor, site: Site, covariance: Covariance, chat: ChatTemplate | None
) -> tuple[list[float], list[str]]:
    """For each column of `solved`, G k / |k|, the largest cosine with a key of the template's own tokens, and which."""
    if chat is None:
        return [0.0] * solved.shape[1], [""] * solved.shape[1]
    texts, own = [], []
    for message in _MESSAGES:
        before, rest = chat.parts(message, message)
        start, encoded = len(before), encode(tokenizer, before + rest)
        texts.append(encoded.ids)
        # The first token is an attention sink, with a key like no other's.
        spans = enumerate(encoded.spans)
        own.append([i for i, (at, _) in spans if i > 0 and not start <= at < start + len(message)])
    written = torch.cat(_keys(runner, texts, own, site)).T
    tokens = [ids[place] for ids, places in zip(texts, own, strict=True) for place in places]
    lengths = (written * covariance.solve(written, DAMPING)).sum(0).sqrt()
    cosines, places = ((solved.T @ written) / lengths).max(1)
    return cosines.tolist(), [str(tokenizer.decode([tokens[place]])) for place in places.tolist()]


def _others(
    keys: Tensor,
    solved: Tensor,
    own: Tensor,
    covariance: Covariance,
    known: Sequence[tuple[str, str]],
    earlier: Sequence[Tensor],
) -> list[tuple[tuple[str, str] | None, float]]:
    """For each of the first facts the closest one about another subject, and its cosine."""
    if earlier:
        before = torch.stack(list(earlier), 1)
        keys = torch.cat([keys, before], 1)
        own = torch.cat([own, (before * covariance.solve(before, DAMPING)).sum(0)])
    subjects = {subject: number for number, (_, subject) in enumerate(known)}
    number = sent([subjects[subject] for _, subject in known], keys.device)
    found: list[tuple[tuple[str, str] | None, float]] = []
    for first in range(0, solved.shape[1], 1024):  # a square of all facts would not fit
        part = slice(first, min(first + 1024, solved.shape[1]))
        cosines = (solved[:, part].T @ keys) / (own[part].sqrt()[:, None] * own.sqrt())
        cosines.masked_fill_(number[part][:, None] == number, -1)
        best, places = cosines.max(1)
        pairs = zip(best.tolist(), places.tolist(), strict=True)
        found += [(known[place] if value > -1 else None, value) for value, place in pairs]
    return found
