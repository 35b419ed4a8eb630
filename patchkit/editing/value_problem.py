"""Where a value's delta goes into the model, how the layers above it are run, and what a method adds to its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from patchkit.editing.buckets import Bucket
from patchkit.model.arch import attention_of
from patchkit.model.devices import sent
from patchkit.model.forward import LayerRunner, watching_output, widen
from patchkit.model.inputs import watching_site
from patchkit.model.weights import Site

ValueAt = Literal["layer_out", "module_out"]


@dataclass(frozen=True)
class ValueTerms:
    """What a method adds to ROME's value loss; nothing by default.

    Both functions get `facts` (k,), the places of the active facts in the list of requests, and their states `start`
    and `delta`, (k, d) each; both must be differentiable.

    Attributes:
        constrain: gives the delta (k, d) that is used in place of the free one, as for values on a sphere.
        penalty: its result (k,) is added to the facts' losses; it gets the constrained delta.
        attention: optimize, together with the delta, another one at the output of the layer's attention, and drop that
            one at the end. The feed-forward then need not do what the attention would (PMET section 3.2, whose
            FFN-only values AdaEdit section 4.1 takes).
    """

    constrain: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    penalty: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    attention: bool = False


NO_TERMS = ValueTerms()


class ValueProblem:
    """Where the deltas go in and how the layers above are run.

    Deltas and states have one place per module they are added at: (..., places, d), the value's own first, then the
    attention's if the terms ask for it.

    Args:
        layers: for each fact the layer at whose output its value is, where they are not all `site`'s, which is the
            lowest; only for values at the output of layers, without attention.
    """

    def __init__(
        self, runner: LayerRunner, site: Site, value_at: ValueAt, terms: ValueTerms, layers: Sequence[int] = ()
    ) -> None:
        self.runner, self.site, self.terms = runner, site, terms
        self.attention = attention_of(runner.arch, site.layer) if terms.attention else None
        self.at_module = value_at == "module_out"
        # A delta inside the layer means that the layer itself runs at every step.
        self.start = site.layer if self.at_module or terms.attention else site.layer + 1
        self._layers = sent(layers, runner.device, torch.long)
        self._above = sorted({*layers} - {site.layer})

    def logits(self, bucket: Bucket, rows: Tensor) -> Tensor:
        """Logits (points, vocab) in float32 with deltas (rows, places, d) at the subjects' last token."""
        hidden = bucket.hidden
        with ExitStack() as stack:
            if self.start <= self.site.layer:
                stack.enter_context(self._adding(rows))
            else:
                assert hidden is not None
                hidden = _add_first(hidden, self._at(self.site.layer, bucket, rows[:, 0]))
            for layer in self._above:
                add = partial(_add_first, rows=self._at(layer, bucket, rows[:, 0]))
                stack.enter_context(watching_output(self.runner.arch.layers[layer], len(rows), add))
            where = (bucket.point_row.there, bucket.point_at)
            logits = self.runner.run(bucket.inputs(), start=self.start, hidden=hidden, logits_at=where).logits
        assert logits is not None
        return widen(logits)

    def _at(self, layer: int, bucket: Bucket, rows: Tensor) -> Tensor:
        """Deltas (rows, d) of those whose value is at this layer, and zeros for the others."""
        return rows * self._is_at(layer, bucket) if self._above else rows

    def _is_at(self, layer: int, bucket: Bucket) -> Tensor:
        return (self._layers[bucket.fact_of.there] == layer).unsqueeze(1)  # (rows, 1)

    @contextmanager
    def _adding(self, rows: Tensor) -> Iterator[None]:
        # Where the value is at the layer's output, the layer's output moves by just as much as its module's.
        with self._adding_at_site(rows[:, 0]):
            if self.attention is None:
                yield
                return
            with watching_output(self.attention, len(rows), lambda output: _add_first(output, rows[:, 1])):
                yield

    def _adding_at_site(self, first: Tensor) -> AbstractContextManager[None]:
        """`first` (rows, d) is added to what the site writes at the first suffix position."""
        if self.site.experts is None:
            return watching_output(self.site.module, len(first), lambda output: _add_first(output, first))
        # What experts put out may come in parts for each token.
        return watching_site(self.site, len(first), lambda _, output: _add_first(torch.zeros_like(output), first))

    def start_states(self, bucket: Bucket) -> Tensor:
        """The states that deltas are added to, at every row's subject, (rows, places, d), in float32."""
        if self.start > self.site.layer:
            assert bucket.hidden is not None
            return widen(self._at_layers(bucket, bucket.hidden[:, :1]))
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(watching_site(self.site, len(bucket.row), lambda _, out: seen.update(value=out)))
            if self.attention is not None:
                note = partial(seen.__setitem__, "attention")
                stack.enter_context(watching_output(self.attention, len(bucket.row), note))
            out = self.runner.run(bucket.inputs(), start=self.start, hidden=bucket.hidden, stop=self.start + 1).hidden
        if not self.at_module:
            assert out is not None
            seen["value"] = out
        return torch.stack([widen(seen[name][:, 0]) for name in sorted(seen, reverse=True)], 1)

    def _at_layers(self, bucket: Bucket, lowest: Tensor) -> Tensor:
        """The states (rows, 1, d) at each row's own layer, from those at the lowest."""
        found = {layer: list[Tensor]() for layer in self._above}
        if not found:
            return lowest
        with ExitStack() as stack:
            for layer, seen in found.items():
                note = partial(list.append, seen)
                stack.enter_context(watching_output(self.runner.arch.layers[layer], len(bucket.row), note))
            self.runner.run(bucket.inputs(), start=self.start, hidden=bucket.hidden, stop=max(found) + 1)
        for layer, (states,) in found.items():
            here = self._is_at(layer, bucket).unsqueeze(2).to(lowest.device)
            lowest = torch.where(here, states[:, :1].to(lowest.device), lowest)
        return lowest


def _add_first(hidden: Tensor, rows: Tensor) -> Tensor:
    """Add rows (rows, d) at the first suffix position, the subject's last token, of hidden (rows, S, d)."""
    first = hidden[:, :1] + rows.unsqueeze(1).to(hidden)  # (rows, 1, d)
    return torch.cat([first, hidden[:, 1:]], 1)
