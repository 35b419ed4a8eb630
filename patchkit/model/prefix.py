"""What the model keeps of the beginning of a text, once for all that goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from patchkit.model.devices import at, sent
from patchkit.model.forward import LayerRunner
from patchkit.model.states import LayerStates


@dataclass(frozen=True)
class Prefix:
    """What the layers keep of a prefix, which suffixes are run after.

    layers: of each layer; mask: (rows, length), 1 where there is a token. Padding is on the left: sliding windows count
    by distance to the suffix, which padding in between would add to.
    """

    layers: tuple[LayerStates, ...]
    mask: Tensor

    @staticmethod
    def read(
        runner: LayerRunner,
        ids: Tensor,
        mask: Tensor,
        before: Prefix | None = None,
        start: int = 0,
        hidden: Tensor | None = None,
        stop: int | None = None,
    ) -> Prefix:
        """What the layers keep of right-padded texts (rows, seq), each after the same row of `before`.

        Layers start..stop-1 run, by default all, from `hidden` as in `LayerRunner.run`; the others get stubs. No
        layer's cache evicts, not even with sliding windows: prompts are short, and a cut cache could not be shared.
        """
        if not runner.runs_on:
            return _read(runner, ids, mask, before, start, hidden, stop)
        parts, order = list[Prefix](), list[int]()
        for rows, length in by_length(mask.sum(1).tolist()):
            some, width = sent(rows, ids.device), max(1, length)
            known, entering = before and before.rows(some), None if hidden is None else at(hidden, some)[:, :width]
            part = _read(runner, ids[some, :width], mask[some, :width], known, start, entering, stop)
            parts.append(part if length else part._as_after(known, start, stop))
            order += rows
        return reduce(Prefix.beside, parts).rows(sent(torch.tensor(order).argsort(), ids.device))

    def _as_after(self, before: Prefix | None, start: int, stop: int | None) -> Prefix:
        """Of texts without a token, which were run as if they had one: states that run are still those before."""
        none = torch.zeros(len(self.mask), dtype=torch.bool, device=self.mask.device)
        known = (before or self.seen_by(none)).layers
        layers = [
            LayerStates(own.attention, then.running) if index in range(len(known))[start:stop] else own
            for index, (own, then) in enumerate(zip(self.layers, known, strict=True))
        ]
        return Prefix(tuple(layers), self.mask)

    def _packed(self) -> Prefix:
        """The same prefixes without padding between or after a row's tokens."""
        order = self.mask.argsort(dim=1, stable=True)[:, -max(1, int(self.mask.sum(1).max())) :]  # (rows, length)
        where = order[:, None, :, None]

        def pick(states: Tensor) -> Tensor:
            return states.gather(2, where.to(states.device).expand(-1, states.shape[1], -1, states.shape[3]))

        return Prefix(tuple(each.mapped(pick) for each in self.layers), self.mask.gather(1, order))

    def inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Arguments of the model's forward over right-padded texts (rows, seq), each after the same row of these."""
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([self.mask, mask], 1),
            "position_ids": self.mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device),
            "past_key_values": self.cache(),
            "use_cache": True,
        }

    @property
    def token_bytes(self) -> int:
        """Bytes that what is kept of one position takes."""
        return sum(each.token_bytes for each in self.layers)

    @property
    def row_bytes(self) -> int:
        """Bytes that what is kept of a row takes whatever its length."""
        return sum(each.row_bytes for each in self.layers)

    def rows(self, rows: Tensor) -> Prefix:
        """The prefixes with these row numbers, each as often as it is named."""
        return Prefix(tuple(each.rows(rows) for each in self.layers), at(self.mask, rows))

    def seen_by(self, rows: Tensor) -> Prefix:
        """As if those rows had no prefix where `rows` (rows,) is false."""
        return Prefix(tuple(each.begun_in(rows) for each in self.layers), self.mask * rows.unsqueeze(1))

    def last(self, tokens: int) -> Prefix:
        """Without padding that all rows have, where none has more than so many tokens."""
        if tokens >= self.mask.shape[1]:
            return self
        return Prefix(
            tuple(each.mapped(lambda kept: kept[:, :, -tokens:]) for each in self.layers), self.mask[:, -tokens:]
        )

    def from_layer(self, start: int) -> Prefix:
        """Without what the layers below `start`, which never run again, keep; stubs keep the length, from which the
        model takes its positions."""
        return Prefix((*(each.stub() for each in self.layers[:start]), *self.layers[start:]), self.mask)

    def beside(self, other: Prefix) -> Prefix:
        """The rows of both prefixes in one batch, padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        pairs = zip(self.layers, other.layers, strict=True)
        masks = [F.pad(mask, (length - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        return Prefix(tuple(own.beside(its, length) for own, its in pairs), torch.cat(masks))

    def cache(self) -> Cache:
        """As the model's `past_key_values`; passes read it and leave it as it is, so it serves any number of them."""
        return Cache(layers=[each.read() for each in self.layers])

    def growing_cache(self) -> Cache:
        """As the model's `past_key_values`; each pass appends what it keeps, as in generation."""
        return Cache(layers=[each.growing() for each in self.layers])


def by_length(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Places of texts of one length, and that length: padding after a text would go into states that run on."""
    found: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        found.setdefault(length, []).append(place)
    return [(places, length) for length, places in sorted(found.items())]


def _read(
    runner: LayerRunner,
    ids: Tensor,
    mask: Tensor,
    before: Prefix | None,
    start: int,
    hidden: Tensor | None,
    stop: int | None,
) -> Prefix:
    known = mask[:, :0] if before is None else before.mask
    whole = torch.cat([known, mask], 1)  # (rows, length + seq)
    seen = whole.clone()
    # An empty text would leave its row nothing to attend to: NaN; the mask that is kept leaves it out again.
    seen[:, known.shape[1]] += 1 - whole.amax(1)
    positions = known.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
    cache = before.growing_cache() if before else runner.empty_cache()
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": seen, "position_ids": positions}
    ran = range(start, runner.depth if stop is None else stop)
    with torch.no_grad():
        inputs |= {"past_key_values": cache, "use_cache": True}
        runner.run(inputs, start=start, hidden=hidden, stop=ran.stop)
    layers = [
        LayerStates.of(layer) if index in ran else LayerStates.stub_of(layer, whole.to(runner.dtype))
        for index, layer in enumerate(cache.layers)
    ]
    return Prefix(tuple(layers), whole)._packed()
