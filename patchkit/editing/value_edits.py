"""Batches of methods that edit toward values: a value target per fact, its key and residual at each site, a solve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from patchkit.editing.keys import SubjectStates
from patchkit.editing.session import EditSession
from patchkit.editing.side_by_side import constrain_block_by_block
from patchkit.editing.state import storable
from patchkit.editing.value_problem import ValueTerms
from patchkit.editing.values import Values
from patchkit.editing.values_together import optimize_together
from patchkit.facts.requests import EditRequest
from patchkit.maths.linalg import PriorKeys
from patchkit.methods import LayerProblem
from patchkit.model.devices import exact
from patchkit.model.weights import Site


class ValueTargets:
    """Finds the value targets of a batch: which state of each fact's subject makes the model predict its target?"""

    def __init__(self, session: EditSession) -> None:
        self.session = session

    def find(
        self,
        requests: Sequence[EditRequest],
        site: Site,
        advance: Callable[[int], None] = lambda finished: None,
        layers: Sequence[int] = (),
    ) -> Values:
        """Values (d, n) of all requests at `site`, those found earlier on the untouched model where they are known.

        Args:
            advance: told how many facts have finished.
            layers: as in `ValueProblem`.
        """
        session = self.session
        terms, value_at, config = self._terms(requests, site), session.plan.value_at, session.config.value
        key = (site.layer, *layers, value_at, config, tuple(requests))
        shared = None if session.run.state.sites or terms != ValueTerms() else session.known
        if shared is not None and key in shared:
            advance(len(requests))
            return shared[key]
        with session.run.timed("values"):
            groups, log = by_subject(requests), session.journal.values_in_flight()
            values = optimize_together(
                session.runner, requests, site, value_at, config, advance, terms, groups, log, layers
            )
        if shared is not None:
            shared[key] = values
        return values

    def _terms(self, requests: Sequence[EditRequest], site: Site) -> ValueTerms:
        """What the method adds to the values' loss, or restricts them to, at the value site."""
        session, method, settings = self.session, self.session.method, self.session.settings
        if method.constrain is None and method.penalty is None:
            return ValueTerms(attention=method.attention)
        with session.run.timed("keys"):
            keys = SubjectStates(session.runner, requests, [site], session.plan.value_at).read(site)[0]
        problem = session.problem(
            site, keys, keys.new_zeros(site.d_out, len(requests)), session.prior_keys().get(site.layer)
        )
        count = len(session.plan.sites)
        problem = problem.replace(sites=min(count, 1 + 2 * method.neighbors) if selects_layers(session) else count)
        constrain = method.constrain
        if constrain and method.block_by_block and problem.blocks > 1:
            constrain = partial(constrain_block_by_block, method)
        return ValueTerms(
            constrain=constrain and constrain(problem, settings),
            penalty=method.penalty and method.penalty(problem, settings),
            attention=method.attention,
        )


@dataclass(frozen=True)
class _Part:
    """Facts of a batch that are solved for together: their places in the batch, the sites, and their values."""

    members: tuple[int, ...]
    sites: tuple[Site, ...]
    values: Values


class ValueEdits:
    """Edits a batch toward its value targets."""

    def __init__(self, session: EditSession) -> None:
        self.session, self.targets = session, ValueTargets(session)

    def edit(self, requests: Sequence[EditRequest], advance: Callable[[int], None]) -> None:
        """Edit `requests` on top of all earlier batches; `advance` is told how many facts have finished."""
        session = self.session
        if session.method.ends_only and session.own is None and len(session.plan.sites) > 1:
            self._edit_ends(requests, advance)
            return
        for part in self._parts(requests, advance):
            prior = session.prior_keys()
            session.open_neurons([requests[i] for i in part.members], [site.layer for site in part.sites])
            chosen, targets = [requests[i] for i in part.members], part.values.targets
            for _ in range(session.plan.sweeps):
                self._sweep(chosen, part.sites, targets, prior)
            session.finish([request.fact for request in chosen], part.values, [site.layer for site in part.sites])

    def _edit_ends(self, requests: Sequence[EditRequest], advance: Callable[[int], None]) -> None:
        """Each site toward values of its own, optimized once the sites below are edited; a patch keeps the last's."""
        session, sites = self.session, self.session.plan.sites
        prior = session.prior_keys()
        for site in sites:
            last = site is sites[-1]
            values = self.targets.find(requests, site, advance) if last else self.targets.find(requests, site)
            for _ in range(session.plan.sweeps):
                self._sweep(requests, (site,), values.targets, prior)
        session.finish([request.fact for request in requests], values, [site.layer for site in sites])

    def _sweep(
        self, requests: Sequence[EditRequest], sites: Sequence[Site], targets: Tensor, prior: Mapping[int, PriorKeys]
    ) -> None:
        """One solve per site from the lowest layer up, for value targets (d, n)."""
        reader = SubjectStates(self.session.runner, requests, sites, self.session.plan.value_at)
        for i, site in enumerate(sites):
            with self.session.run.timed("keys"):
                keys, current = reader.read(site)
            # MEMIT eq. 20: each site takes an equal share of what is still missing; PMET's takes 1/√k of it.
            left = len(sites) - i
            share = left if self.session.method.spread == "equal" else left**0.5
            residual = storable((exact(targets, current.device) - current) / share)  # (d_out, n)
            problem = self.session.problem(site, storable(keys), residual, prior.get(site.layer))
            self.session.solve(site, problem)

    def _parts(self, requests: Sequence[EditRequest], advance: Callable[[int], None]) -> list[_Part]:
        """The whole batch with its values; or the facts of one layer at a time, if layers are selected per fact."""
        sites, own = self.session.plan.sites, self.session.own
        if own is not None:
            shares = own.shared_out(requests)
            values_of = self._values_by_layer(requests, shares, advance)
            by_layer = {site.layer: site for site in sites}
            return [_Part(tuple(members), (by_layer[layer],), values_of[layer]) for layer, members in shares.items()]
        if not selects_layers(self.session):
            values = self.targets.find(requests, sites[-1], advance)
            return [_Part(tuple(range(len(requests))), sites, values)]
        values_at = [self.targets.find(requests, site) for site in sites[:-1]]
        values_at.append(self.targets.find(requests, sites[-1], advance))
        selected, around = self._select(requests, values_at), self.session.method.neighbors
        parts = list[_Part]()
        for place in sorted(set(selected)):
            members = tuple(i for i, wanted in enumerate(selected) if wanted == place)
            upper = min(place + around, len(sites) - 1)
            parts.append(_Part(members, sites[max(0, place - around) : upper + 1], values_at[upper].of(members)))
        return parts

    def _values_by_layer(
        self, requests: Sequence[EditRequest], shares: Mapping[int, Sequence[int]], advance: Callable[[int], None]
    ) -> dict[int, Values]:
        """The values of those requests whose places each layer has, at its site; in passes for all of them together,
        where a value is at the output of its layer."""
        site_of = {site.layer: site for site in self.session.plan.sites}
        if self.session.plan.value_at == "layer_out" and not self.session.method.attention and len(shares) > 1:
            layer_of = {place: layer for layer, members in shares.items() for place in members}
            layers = [layer_of[place] for place in range(len(requests))]
            values = self.targets.find(requests, site_of[min(shares)], advance, layers)
            return {layer: values.of(members) for layer, members in shares.items()}
        return {
            layer: self.targets.find([requests[place] for place in members], site_of[layer], advance)
            for layer, members in shares.items()
        }

    def _select(self, requests: Sequence[EditRequest], values_at: Sequence[Values]) -> list[int]:
        """For each fact, the place among the plan's sites that the method selects, given its values at all of them."""
        session, problems = self.session, list[LayerProblem]()
        choose = session.method.choose
        assert choose is not None
        for site, values in zip(session.plan.sites, values_at, strict=True):
            with session.run.timed("keys"):
                reader = SubjectStates(session.runner, requests, [site], session.plan.value_at)
                keys, current = reader.read(site)
            problems.append(session.problem(site, keys, exact(values.targets, current.device) - current, None))
        return [
            choose([p.replace(keys=p.keys[:, [i]], residual=p.residual[:, [i]]) for p in problems], session.settings)
            for i in range(len(requests))
        ]


def selects_layers(session: EditSession) -> bool:
    """Whether the method selects layers per fact."""
    return session.method.choose is not None and getattr(session.settings, "choose_layer", True)


def by_subject(requests: Sequence[EditRequest]) -> list[int]:
    """For each request, the place of the first one about its subject."""
    first: dict[str, int] = {}
    return [first.setdefault(request.fact.subject, place) for place, request in enumerate(requests)]
