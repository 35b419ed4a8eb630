"""Gradients of facts' target loss at the edited modules, with every weight frozen.

They are taken by the modules' outputs (`traced`), so a backward pass ends at the first edited layer. The loss's
gradient by a weight is G K' with G (d_out, positions) and K (d_in, positions) the gradients and inputs at all
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.editing.suffixes import free_memory, graph_bytes
from patchkit.facts.requests import EditRequest, pad
from patchkit.model.devices import at, exact, home_of, sent, solve_device
from patchkit.model.forward import LayerRunner, traced, widen
from patchkit.model.inputs import SiteInput, watching_site
from patchkit.model.weights import Site


@dataclass(frozen=True)
class TargetGradients:
    """By layer, keys K (d_in, tokens) and gradients G (d_out, tokens) at the positions that predict target tokens:
    fact by fact, in each row by row, as solves there take them. loss: each fact's mean target loss, (n,), float64."""

    loss: Tensor
    keys: dict[int, Tensor]
    gradients: dict[int, Tensor]


@dataclass(frozen=True)
class _Group:
    """Some facts' rows, padded on the right. A point is a position that predicts a target token: of which fact, in
    which row, where, which token, and by how much its loss is divided in the fact's mean, each (points,). facts: how
    many."""

    inputs: dict[str, Any]
    fact: Tensor
    row: Tensor
    at: Tensor
    label: Tensor
    among: Tensor
    facts: int

    @staticmethod
    def of(requests: Sequence[EditRequest], first: int, device: torch.device) -> _Group:
        """The rows of `requests`, the first of which is fact number `first`."""
        rows = [(first + i, row) for i, request in enumerate(requests) for row in request.rows]
        ids, mask = pad([row.ids for _, row in rows], device)
        points = [
            (fact, n, at - 1, row.ids[at])
            for n, (fact, row) in enumerate(rows)
            for at in range(row.target, len(row.ids))
        ]
        fact, row, place, label = torch.tensor(points).T
        # Mean over a row's tokens, then over the fact's rows, as values are optimized for.
        rows_of = torch.tensor([len(request.rows) for request in requests])
        among = torch.bincount(row)[row] * rows_of[fact - first]
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        fact, row, place, label, among = (sent(each, device) for each in (fact, row, place, label, among))
        return _Group(inputs, fact, row, place, label, among, len(requests))

    def losses(self, runner: LayerRunner, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """What each point adds to its fact's loss, (points,); `hidden` as in `LayerRunner.run`."""
        logits = runner.run(self.inputs, start=start, hidden=hidden, logits_at=(self.row, self.at)).logits
        assert logits is not None
        return F.cross_entropy(widen(logits), self.label, reduction="none") / self.among


class TargetLoss:
    """The mean loss of facts' targets after their prompts in all contexts, for a model with frozen weights.

    Args:
        parallel: how many facts share a pass, at most; fewer where memory is short.

    Attributes:
        passes: how often it has been differentiated.
    """

    def __init__(self, runner: LayerRunner, requests: Sequence[EditRequest], parallel: int) -> None:
        self.runner, self.facts, self.passes = runner, len(requests), 0
        self._columns = [sum(len(row.ids) - row.target for row in request.rows) for request in requests]
        widest = max(len(row.ids) for request in requests for row in request.rows)
        fact = graph_bytes(runner, 0) * widest * max(len(request.rows) for request in requests)
        size = max(1, min(parallel, free_memory(runner.device) // 2 // fact))
        self.groups = [_Group.of(requests[i : i + size], i, runner.device) for i in range(0, len(requests), size)]

    @property
    def columns(self) -> list[int]:
        """How many target positions each fact has, over all of its rows."""
        return list(self._columns)

    @torch.no_grad()
    def per_fact(self) -> Tensor:
        """Each fact's loss, (n,), float64."""
        return self._per_fact([group.losses(self.runner) for group in self.groups])

    def gradients(self, sites: Sequence[Site]) -> TargetGradients:
        """Gradients of the sum of all facts' losses: one forward and backward pass for all sites."""
        self.passes += 1
        losses: list[Tensor] = []
        keys: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
        gradients: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
        for group in self.groups:
            with torch.enable_grad(), traced(sites, len(group.inputs["input_ids"])) as seen:
                losses.append(group.losses(self.runner))
            found = torch.autograd.grad(losses[-1].sum(), [leaf for _, leaf in seen.values()])
            for (layer, (inputs, _)), gradient in zip(seen.items(), found, strict=True):
                where = solve_device(self.runner.arch.sites[layer].module)
                with torch.no_grad():
                    keys[layer].append(exact(inputs.at(group.row, group.at).detach(), where))  # (points, d_in)
                gradients[layer].append(exact(at(gradient, group.row, group.at), where))  # (points, d_out)
        joined = [{layer: torch.cat(rows).T for layer, rows in parts.items()} for parts in (keys, gradients)]
        return TargetGradients(self._per_fact([each.detach() for each in losses]), *joined)

    def at(self, site: Site) -> SiteLoss:
        """The loss as a function of a change of the site's weight.

        What the layers below the site put out is computed here, once; nothing below may change from then on.
        """
        return SiteLoss(self, site, [self._below(group, site.layer) for group in self.groups])

    @torch.no_grad()
    def _below(self, group: _Group, layer: int) -> Tensor | None:
        start = self.runner.resumable(layer)
        return self.runner.run(group.inputs, stop=start).hidden if start else None

    def changed(self, group: _Group, site: Site, hidden: Tensor | None, change: Tensor | None) -> tuple[Tensor, Tensor]:
        like = torch.zeros(
            site.d_out, site.d_in, device=home_of(site.module), dtype=torch.promote_types(site.dtype, torch.float32)
        )
        leaf = (like if change is None else change.detach().to(like)).requires_grad_()

        def add(keys: SiteInput, output: Tensor) -> Tensor:
            return keys.through(leaf).to(output)

        with torch.enable_grad(), watching_site(site, len(group.inputs["input_ids"]), add):
            start = self.runner.resumable(site.layer) if hidden is not None else 0
            loss = group.losses(self.runner, start, hidden).sum()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def _per_fact(self, losses: Sequence[Tensor]) -> Tensor:
        found = exact(torch.cat(list(losses)))
        facts = torch.cat([group.fact for group in self.groups]).to(found.device)
        return found.new_zeros(self.facts).index_add(0, facts, found)


@dataclass(frozen=True)
class SiteLoss:
    """The mean loss over facts and its gradient (d_out, d_in), as a function of a change of a site's weight.

    below: by group, what enters the site's layer, None at the first one.
    """

    loss: TargetLoss
    site: Site
    below: Sequence[Tensor | None]

    def __call__(self, change: Tensor | None) -> tuple[float, Tensor]:
        """Over all facts."""
        return self.of(range(len(self.below)), change)

    def of(self, groups: Sequence[int], change: Tensor | None) -> tuple[float, Tensor]:
        """Over the facts of some groups alone."""
        self.loss.passes += 1
        where, site = solve_device(self.site.module), self.site
        gradient = torch.zeros(site.d_out, site.d_in, dtype=torch.float64, device=where)
        total, facts = gradient.new_zeros(()), 0
        for number in groups:
            group = self.loss.groups[number]
            found, part = self.loss.changed(group, site, self.below[number], change)
            total, gradient = total + exact(found, where), gradient + exact(part, where)
            facts += group.facts
        return float(total) / facts, gradient / facts
