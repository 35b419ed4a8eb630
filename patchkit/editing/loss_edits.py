"""Batches of methods without values, whose updates are made from the loss of the facts' targets itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from patchkit.editing.gradients import SiteLoss, TargetLoss
from patchkit.editing.session import EditSession
from patchkit.editing.state import SiteHistory, storable
from patchkit.editing.values import Values
from patchkit.facts.requests import EditRequest
from patchkit.maths.linalg import PriorKeys
from patchkit.maths.updates import Full, Update, delta_of
from patchkit.methods import LayerProblem
from patchkit.model.weights import Site

PARALLEL = 32
"""Facts that share a pass through the model, forward and back, where the recipe does not say."""


class _LossEdits(ABC):
    """What both kinds share: problems made from the loss, sweep after sweep, and the record of a batch."""

    def __init__(self, session: EditSession) -> None:
        self.session = session

    def edit(self, requests: Sequence[EditRequest], advance: Callable[[int], None]) -> None:
        """Edit `requests` on top of all earlier batches; `advance` is told how many facts have finished."""
        session, count = self.session, len(requests)
        loss = TargetLoss(session.runner, requests, session.config.value.parallel or PARALLEL)
        prior = session.prior_keys()
        for _ in range(session.plan.sweeps):
            for site, problem in self.problems(loss, prior):
                session.solve(site, problem)
        with session.run.timed("gradients"):
            after = loss.per_fact()
            none = torch.zeros(session.plan.sites[-1].d_out, count, device=after.device)
        values = Values(none, none, after.float(), torch.full((count,), loss.passes))
        session.finish([r.fact for r in requests], values, session.plan.layers, self.columns(loss, count))
        advance(count)

    @abstractmethod
    def problems(self, loss: TargetLoss, prior: Mapping[int, PriorKeys]) -> Iterator[tuple[Site, LayerProblem]]:
        """The problem at every site, in the order in which they are to be solved."""

    @abstractmethod
    def columns(self, loss: TargetLoss, count: int) -> list[int]:
        """How many keys each of `count` facts has in a solve."""


class GradientEdits(_LossEdits):
    """Edits against the gradients of the loss: keys and gradients at the positions that predict a target token."""

    def problems(self, loss: TargetLoss, prior: Mapping[int, PriorKeys]) -> Iterator[tuple[Site, LayerProblem]]:
        """All sites' gradients are taken before any site is solved."""
        sites = self.session.plan.sites
        with self.session.run.timed("gradients"):
            found = loss.gradients(sites)
        for site in sites:
            keys, gradients = storable(found.keys[site.layer]), storable(found.gradients[site.layer])
            yield site, self.session.problem(site, keys, gradients, prior.get(site.layer))

    def columns(self, loss: TargetLoss, count: int) -> list[int]:
        """One for each target token in each context."""
        return loss.columns


class FittedEdits(_LossEdits):
    """Edits by fitting the loss as a function of the weight's update: fine-tuning, without keys."""

    def problems(self, loss: TargetLoss, prior: Mapping[int, PriorKeys]) -> Iterator[tuple[Site, LayerProblem]]:
        """Each site's loss counts the sites below as they are by then."""
        for site in self.session.plan.sites:
            none = SiteHistory.empty(site)
            keys, residual = none.keys, none.residuals
            problem = self.session.problem(site, keys, residual, prior.get(site.layer))
            at_site = loss.at(site)

            every = range(len(at_site.below))
            parts = [partial(_of_update, at_site, problem, [group]) for group in every]
            yield site, problem.replace(loss=partial(_of_update, at_site, problem, every), part_losses=parts)

    def columns(self, loss: TargetLoss, count: int) -> list[int]:
        """None."""
        return [0] * count


def _of_update(
    at_site: SiteLoss, problem: LayerProblem, groups: Sequence[int], update: Update | None
) -> tuple[float, Tensor]:
    """The loss of some groups of facts as a function of an update, as methods ask for it."""
    if update is None or isinstance(update, Full):  # as a product, a full update would cost its cube
        return at_site.of(groups, None if update is None else update.matrix)
    return at_site.of(groups, delta_of((update,), lambda: problem.weight).dense())
