"""Texts that begin alike, with a system prompt, a context or the words of a question: what they share is run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from patchkit.facts.requests import pad
from patchkit.model.devices import sent
from patchkit.model.forward import LayerRunner
from patchkit.model.prefix import Prefix

PADDING = 0.15
"""The share of a pass that may be padding, where that is more than a pass of its own is worth."""
ROWS, TOKENS = 256, 4096
"""In a pass, padding included."""
HELD = 2**15
"""Positions of texts, padding included, whose stems' states are held at a time."""
Text = Sequence[int]


def alike(lengths: Sequence[int], spare: int, fits: Callable[[list[int]], bool]) -> list[list[int]]:
    """Places of texts in groups of similar length, the shortest first, that fit a pass and have little padding, or
    less than `spare` tokens of it."""
    groups: list[list[int]] = []
    real = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        more, width = [*(groups[-1] if groups else []), place], lengths[place]
        total = width * len(more)
        if groups and total - real - width <= max(PADDING * total, spare) and fits(more):
            groups[-1], real = more, real + width
        else:
            groups.append([place])
            real = width
    return groups


def stem_lengths(texts: Sequence[Text]) -> list[int]:
    """How much of each text is a stem that others have too, so that reading stems once saves the most tokens. A text's
    last token is never of its stem."""
    whole = [tuple(text[:-1]) for text in texts]
    order, found = sorted(range(len(texts)), key=whole.__getitem__), [0] * len(texts)
    for first, after, length in _stems([whole[place] for place in order]):
        for place in order[first:after]:
            found[place] = length
    return found


@dataclass
class _Span:
    """Sorted texts from `first` on that share `length` tokens, or, where they also end there, one that counts as half:
    the most that stems of theirs save, and these stems: from which text to which, and how long."""

    first: int
    length: float
    saved: int = 0
    stems: list[tuple[int, int, int]] = field(default_factory=list)

    def close(self, after: int) -> None:
        """Either all of them up to `after` have one stem, or the spans within are seen to by themselves."""
        whole = (after - self.first - 1) * int(self.length)
        if whole > self.saved:
            self.saved, self.stems = whole, [(self.first, after, int(self.length))]


def _stems(texts: Sequence[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """The stems of sorted texts that save the most tokens. A span is open as long as the next text shares as much."""
    spans = [_Span(0, 0)]
    for after in range(1, len(texts) + 1):
        here, then = texts[after - 1], texts[after] if after < len(texts) else ()
        shared, first = _shared(here, then) + 0.5 * (here == then != ()), after - 1
        while spans[-1].length > shared:
            span = spans.pop()
            span.close(after)
            first = span.first
            if spans[-1].length < shared:
                spans.append(_Span(first, shared))
            spans[-1].saved += span.saved
            spans[-1].stems += span.stems
        if spans[-1].length < shared:
            spans.append(_Span(first, shared))
    return spans[0].stems


def _shared(one: Text, other: Text) -> int:
    """How many first tokens two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Rest:
    """What some texts have after their stems, for one pass: their places, ids and mask (rows, seq), and the stems'
    states, where there are any."""

    places: list[int]
    ids: Tensor
    mask: Tensor
    before: Prefix | None

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward over the rests."""
        if self.before is None:
            return {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}
        return self.before.inputs(self.ids, self.mask)


def cut(texts: Sequence[Text], spare: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The stems of texts, and each text's; none where they save no more than `spare` tokens."""
    lengths = stem_lengths(texts)
    own = [tuple(text[:length]) for text, length in zip(texts, lengths, strict=True)]
    stems = list(dict.fromkeys(stem for stem in own if stem))
    return (stems, own) if sum(lengths) - sum(map(len, stems)) > spare else ([], [()] * len(texts))


def tokens_read(texts: Sequence[Text], spare: int) -> int:
    """How many tokens of the texts are run, where a pass is worth `spare` of them."""
    stems, own = cut(texts, spare)
    left = sum(map(len, texts)) - sum(map(len, own))
    return left + (tokens_read(stems, spare) if stems else 0)


def rests(runner: LayerRunner, texts: Sequence[Text], stop: int | None = None) -> Iterator[Rest]:
    """Passes over all texts that run what they share once, in layers 0..stop-1. No text is empty."""
    for places in _portions(texts):
        for rest in _rests(runner, [texts[place] for place in places], stop):
            yield replace(rest, places=[places[place] for place in rest.places])


def _portions(texts: Sequence[Text]) -> list[list[int]]:
    """Places of texts in lists whose stems are held at a time, those that begin alike next to each other."""
    if len(texts) * max(map(len, texts), default=0) <= HELD:
        return [list(range(len(texts)))]
    found, longest = [list[int]()], 0
    for place in sorted(range(len(texts)), key=lambda place: tuple(texts[place])):
        longest = max(longest, len(texts[place]))
        if found[-1] and (len(found[-1]) + 1) * longest > HELD:
            found.append([])
            longest = len(texts[place])
        found[-1].append(place)
    return found


def _rests(runner: LayerRunner, texts: Sequence[Text], stop: int | None) -> Iterator[Rest]:
    spare = runner.room.a_pass
    stems, own = cut(texts, spare)
    row = {(): 0} | {stem: place for place, stem in enumerate(stems)}
    before = read(runner, stems, stop) if stems else None
    left = [text[len(stem) :] for text, stem in zip(texts, own, strict=True)]
    widths = [len(text) for text in left]
    for places in alike(widths, spare, lambda some: len(some) <= ROWS and widths[some[-1]] * len(some) <= TOKENS):
        ids, mask = pad([left[place] for place in places], runner.device, width=1)
        some = [own[place] for place in places]
        known = before and before.rows(sent([row[stem] for stem in some], ids.device))
        yield Rest(places, ids, mask, known and known.seen_by(sent([bool(stem) for stem in some], ids.device)))


def read(runner: LayerRunner, texts: Sequence[Text], stop: int | None = None) -> Prefix:
    """The KV cache of texts, in layers 0..stop-1, by default all."""
    parts, order = list[Prefix](), list[int]()
    for rest in rests(runner, texts, stop):
        parts.append(Prefix.read(runner, rest.ids, rest.mask, before=rest.before, stop=stop))
        order += rest.places
    whole = reduce(Prefix.beside, parts)
    return whole if order == sorted(order) else whole.rows(sent(torch.tensor(order).argsort(), runner.device))
