"""Rows of tokens that are run together, and what is known of them: which facts, which points, what the base predicts.

Which rows and points are of which fact is known on the host as well as on the device, so that rows are taken out and
joined without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.model.devices import at, sent
from patchkit.model.prefix import Prefix

TOP = 48
"""Tokens whose probabilities in a kept text are remembered, of each prediction."""
EXPECTED = 0.1
"""From this probability on, the untouched model itself may go on with the target's first token."""


class Index:
    """Whole numbers (n,) that the host knows, `known`, and that index tensors on the device, `there`."""

    def __init__(self, known: Tensor, device: torch.device, there: Tensor | None = None) -> None:
        self.known = known
        self.there = sent(known, device) if there is None else there

    def __len__(self) -> int:
        return len(self.known)

    def take(self, index: Index) -> Index:
        """Those at some places."""
        return Index(self.known[index.known], self.there.device, self.there[index.there])

    def beside(self, other: Index) -> Index:
        """Its own before those of `other`."""
        joined = torch.cat([self.there, other.there])
        return Index(torch.cat([self.known, other.known]), joined.device, joined)

    def part(self, first: int, after: int | None = None) -> Index:
        """Those from place `first` on."""
        return Index(self.known[first:after], self.there.device, self.there[first:after])

    def plus(self, shift: int) -> Index:
        """All of them, larger by `shift`."""
        return Index(self.known + shift, self.there.device, self.there + shift)


@dataclass(frozen=True)
class Bucket:
    """Rows of similar suffix length, which run together.

    Shapes: row (rows,) numbers them over all facts; fact_of (rows,); ids, mask, position_ids (rows, S); hidden (rows,
    S, d), None where the model starts from tokens. Points are the positions whose logits count, the targets' before
    the essence prompts' before the kept texts': point_row, point_at (points,); label, weight (target points,), the
    weights of a fact adding up to 1; base (essence points, vocab), the untouched model's log-probabilities; kept, what
    the untouched model predicts in the kept texts. `turn` = (i, n): the bucket's rows are looked at in every n-th step.
    """

    row: Index
    fact_of: Index
    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    prefix: Prefix
    hidden: Tensor | None
    point_row: Index
    point_at: Tensor
    label: Tensor
    weight: Tensor
    base: Tensor
    kept: Kept
    turn: tuple[int, int] = (0, 1)

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward over the suffixes."""
        return {
            "input_ids": self.ids,
            "attention_mask": torch.cat([self.prefix.mask, self.mask], 1),
            "position_ids": self.position_ids,
            "past_key_values": self.prefix.cache(),
            "use_cache": True,
        }

    def take(self, rows: Tensor) -> Bucket:
        """The rows with these indices, in ascending order, on the host."""
        chosen, device = Index(rows, self.ids.device), self.ids.device
        new_row = torch.full((len(self.row),), -1)
        new_row[rows] = torch.arange(len(rows))
        points = Index((new_row[self.point_row.known] >= 0).nonzero().squeeze(1), device)
        targets, kept = (int((points.known < end).sum()) for end in self._ends())
        of_targets, of_essence, of_kept = points.part(0, targets), points.part(targets, kept), points.part(kept)
        return Bucket(
            self.row.take(chosen),
            self.fact_of.take(chosen),
            self.ids[chosen.there],
            self.mask[chosen.there],
            self.position_ids[chosen.there],
            self.prefix.rows(chosen.there),
            None if self.hidden is None else at(self.hidden, chosen.there),
            Index(new_row[self.point_row.known[points.known]], device),
            self.point_at[points.there],
            self.label[of_targets.there],
            self.weight[of_targets.there],
            self.base[of_essence.there - len(self.label)] if len(self.base) else self.base,
            self.kept.take(of_kept.there - self._ends()[1]),
            self.turn,
        )

    def _ends(self) -> tuple[int, int]:
        """Where the targets' points end, and the essence prompts'."""
        return len(self.label), len(self.point_row) - len(self.kept)

    def of_facts(self, facts: Collection[int]) -> Iterator[Bucket]:
        """Itself with the rows of these facts, or nothing where there are none."""
        rows = [i for i, fact in enumerate(self.fact_of.known.tolist()) if fact in facts]
        if rows:
            yield self if len(rows) == len(self.row) else self.take(torch.tensor(rows))

    def essence(self) -> Bucket:
        """Its essence prompts."""
        first, after = self._ends()
        return self.take(self.point_row.known[first:after].sort().values)

    def halves(self) -> list[Bucket]:
        """Two of about half the rows, or itself where it has one."""
        rows = torch.arange(len(self.row))
        return [self.take(part) for part in rows.tensor_split(2)] if len(rows) > 1 else [self]

    def beside(self, other: Bucket) -> Bucket:
        """The rows of both, whose suffixes are of one length."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(self, name), getattr(other, name)])

        parts = [
            each
            for mine, its in zip(self._parts(), other._parts(), strict=True)
            for each in (mine, (its[0].plus(len(self.row)), its[1]))
        ]
        point_row = parts[0][0]
        for rows, _ in parts[1:]:
            point_row = point_row.beside(rows)
        return Bucket(
            self.row.beside(other.row),
            self.fact_of.beside(other.fact_of),
            **{name: joined(name) for name in ("ids", "mask", "position_ids", "label", "weight")},
            prefix=self.prefix.beside(other.prefix),
            hidden=None if self.hidden is None else joined("hidden"),
            point_row=point_row,
            point_at=torch.cat([places for _, places in parts]),
            base=joined("base") if len(self.base) and len(other.base) else max(self.base, other.base, key=len),
            kept=self.kept.beside(other.kept),
            turn=self.turn,
        )

    def _parts(self) -> list[tuple[Index, Tensor]]:
        """Row and position of the points in three parts, as `segments` has them."""
        first, after = self._ends()
        spans = ((0, first), (first, after), (after, len(self.point_row)))
        return [(self.point_row.part(*span), self.point_at[slice(*span)]) for span in spans]

    def segments(self, of_points: Tensor) -> tuple[Tensor, ...]:
        """Numbers of all points in three parts: the targets', the essence prompts', the kept texts'."""
        targets, kept = len(self.label), len(self.kept)
        asked, essence, texts = of_points.split([targets, len(of_points) - targets - kept, kept])
        return asked, essence, texts


@dataclass(frozen=True)
class Kept:
    """What the untouched model predicts at points (k,) of neutral texts: its likeliest tokens (k, TOP) with their
    log-probabilities (k, TOP), empty until they are known; a point's weight (k,); the first token of the fact's target
    (k,), and the weight of its probability there (k,)."""

    weight: Tensor
    target: Tensor
    leak: Tensor
    tokens: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    def take(self, points: Tensor) -> Kept:
        """Those of some points."""
        return Kept(*(each[points] if len(each) else each for each in self._tensors()))

    def beside(self, other: Kept) -> Kept:
        """The points of both."""
        return Kept(*(torch.cat(pair) for pair in zip(self._tensors(), other._tensors(), strict=True)))

    def known(self, logits: Tensor) -> Kept:
        """With the predictions of the untouched model, from its logits (k, vocab)."""
        log_probs = logits.log_softmax(-1)
        likeliest = log_probs.topk(min(TOP, log_probs.shape[1]))
        expected = log_probs.gather(1, self.target.unsqueeze(1)).squeeze(1).exp() >= EXPECTED
        return Kept(self.weight, self.target, self.weight * ~expected, likeliest.indices, likeliest.values)

    def drift(self, logits: Tensor, leak_weight: float, keep_weight: float) -> Tensor:
        """The weighted loss at each point (k,) of an edited model's logits (k, vocab): KL(original ‖ edited) over the
        original's likeliest tokens, all others counted as one, and -log(1 - P(target))."""
        # Of the vocabulary one sum alone and one choice: each that is more costs as much as a third of the product.
        chosen = torch.cat([self.tokens, self.target.unsqueeze(1)], 1)
        edited = logits.gather(1, chosen) - logits.logsumexp(-1, keepdim=True)
        ours, target, theirs = edited[:, :-1], edited[:, -1].exp(), self.log_probs
        rest, other = (_remainder(each) for each in (theirs, ours))
        divergence = (theirs.exp() * (theirs - ours)).sum(-1) + rest * (rest.log() - other.log())
        leak = -(1 - target).clamp_min(1e-4).log()
        return keep_weight * self.weight * divergence + leak_weight * self.leak * leak

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.target, self.leak, self.tokens, self.log_probs


def _remainder(log_probs: Tensor) -> Tensor:
    """The probability (k,) of all tokens that are not among these (k, TOP)."""
    return (1 - log_probs.exp().sum(-1)).clamp_min(1e-6)
