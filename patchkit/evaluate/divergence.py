"""How far a model's next-token distributions have moved on texts that the base wrote itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.facts.requests import pad
from patchkit.model.forward import LayerRunner

_LOGITS, _POINTS = 1 << 24, 2048
"""Logits held at a time, and positions at most."""


@dataclass(frozen=True)
class Written:
    """A text of the base: what it was given (ids up to `first`) and what it wrote.

    hidden: (tokens written, d), the last layer's output where each was predicted; the head makes the base's
    distributions of it again, which would take a thousand times the memory.
    """

    ids: tuple[int, ...]
    first: int
    hidden: Tensor

    @property
    def count(self) -> int:
        """Tokens written."""
        return len(self.ids) - self.first


@torch.no_grad()
def written(runner: LayerRunner, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Written]:
    """What the model as it now is has in mind while it writes: `texts` are what it was given, and what it wrote."""
    plain = [Written((*given, *own), len(given), torch.empty(0)) for given, own in texts]
    found: dict[int, Written] = {}
    for places in _batches(runner, plain):
        batch = [plain[place] for place in places]
        ids, mask = pad([text.ids for text in batch], runner.device)
        hidden = runner.run({"input_ids": ids, "attention_mask": mask, "use_cache": False}, stop=runner.depth).hidden
        assert hidden is not None
        for place, text, row in zip(places, batch, hidden, strict=True):
            found[place] = Written(text.ids, text.first, row[text.first - 1 : len(text.ids) - 1].clone())
    return [found[place] for place in range(len(plain))]


@torch.no_grad()
def divergences(runner: LayerRunner, texts: Sequence[Written]) -> list[float]:
    """KL(base ‖ model as it now is) in nats per token that the base wrote, text by text."""
    found: dict[int, float] = {}
    for places in _batches(runner, texts):
        batch = [texts[place] for place in places]
        ids, mask = pad([text.ids for text in batch], runner.device)
        points = [(row, at - 1) for row, text in enumerate(batch) for at in range(text.first, len(text.ids))]
        where = torch.tensor(points, device=ids.device).T
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        now = runner.run(inputs, logits_at=(where[0], where[1])).logits  # (points, vocab)
        before = _logits(runner, torch.cat([text.hidden for text in batch]))
        assert now is not None
        new, old = now.float().log_softmax(-1), before.float().log_softmax(-1)
        kl = F.kl_div(new, old, reduction="none", log_target=True).sum(-1).clamp_min(0)  # (points,)
        parts = kl.split([text.count for text in batch])
        found |= {place: float(part.mean()) for place, part in zip(places, parts, strict=True)}
    return [found[place] for place in range(len(texts))]


def _logits(runner: LayerRunner, hidden: Tensor) -> Tensor:
    """The logits (points, vocab) after hidden states (points, d) of the last layer."""
    ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=runner.device)  # any token: no layer runs
    logits = runner.run({"input_ids": ids, "use_cache": False}, start=runner.depth, hidden=hidden[:, None]).logits
    assert logits is not None
    return logits[:, 0]


def _batches(runner: LayerRunner, texts: Sequence[Written]) -> Iterator[list[int]]:
    """Places of texts of like length, as many as there is room for the logits of."""
    room, places = min(_POINTS, _LOGITS // runner.vocabulary), list[int]()
    for place in sorted(range(len(texts)), key=lambda place: len(texts[place].ids)):
        if places and sum(texts[each].count for each in (*places, place)) > room:
            yield places
            places = []
        places.append(place)
    if places:
        yield places
