"""Values of many facts, found by several processes: each has some of the facts, and all get the values of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchkit.editing.value_config import ValueConfig
from patchkit.editing.value_log import ValueLog
from patchkit.editing.value_problem import ValueAt, ValueTerms
from patchkit.editing.values import Values, optimize
from patchkit.facts.requests import EditRequest
from patchkit.model.devices import sent
from patchkit.model.forward import LayerRunner
from patchkit.model.weights import Site
from patchkit.ranks import world


def optimize_together(
    runner: LayerRunner,
    requests: Sequence[EditRequest],
    site: Site,
    value_at: ValueAt,
    config: ValueConfig,
    advance: Callable[[int], None],
    terms: ValueTerms,
    groups: Sequence[int],
    log: ValueLog,
    layers: Sequence[int] = (),
) -> Values:
    """`optimize` with the same arguments, the facts shared out among the ranks; those of one group stay together, since
    they get one delta. A fact's value is the same wherever it is found, but for rounding."""
    if world().size == 1:
        return optimize(runner, requests, site, value_at, config, advance, terms, groups, log, layers)
    finished = 0

    def tell(count: int) -> None:
        nonlocal finished
        finished += count
        advance(count)

    def find(some: Sequence[list[int]]) -> list[Values]:
        places = [fact for group in some for fact in group]
        own, numbers = [requests[fact] for fact in places], [groups[fact] for fact in places]
        at = [layers[fact] for fact in places] if layers else ()
        values = optimize(runner, own, site, value_at, config, tell, _of(terms, places), numbers, log, at)
        return [_on_cpu(values.of([places.index(fact) for fact in group])) for group in some]

    together = [[fact for fact, of in enumerate(groups) if of == group] for group in dict.fromkeys(groups)]
    together.sort(key=lambda some: sum(len(row.ids) for fact in some for row in requests[fact].rows))  # shared fairly
    found = world().mapped(find, together)
    advance(len(requests) - finished)
    order = torch.tensor([fact for group in together for fact in group]).argsort()
    return Values(*(_joined(found, name, order, runner.device) for name in ("targets", "start", "loss", "steps")))


def _of(terms: ValueTerms, places: Sequence[int]) -> ValueTerms:
    """The terms of the facts with these places, as facts that are numbered from 0."""
    constrain, penalty = terms.constrain, terms.penalty

    def numbers(facts: Tensor) -> Tensor:
        return sent(places, facts.device, torch.long)[facts]

    return replace(
        terms,
        constrain=constrain and (lambda facts, start, delta: constrain(numbers(facts), start, delta)),
        penalty=penalty and (lambda facts, start, delta: penalty(numbers(facts), start, delta)),
    )


def _on_cpu(values: Values) -> Values:
    return Values(values.targets.cpu(), values.start.cpu(), values.loss.cpu(), values.steps.cpu())


def _joined(found: Sequence[Values], name: str, order: Tensor, device: torch.device) -> Tensor:
    """One of the tensors of all facts, in the order of the requests."""
    return torch.cat([getattr(each, name) for each in found], -1)[..., order].to(device)
