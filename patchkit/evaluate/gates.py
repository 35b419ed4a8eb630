"""Bounds on what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from patchkit.errors import GateError
from patchkit.evaluate.metrics import GROUPS, gated
from patchkit.evaluate.report import Summary


@dataclass(frozen=True)
class Gates:
    """Bounds by gate's name, each on the metric that has that gate in the table of metrics."""

    bounds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def published(cls) -> Gates:
        """What `patchkit apply --merge` and `--push` ask of a patch unless told otherwise."""
        return cls({name: gate.published for name, (_, gate) in gated().items() if gate.published is not None})

    def within(self, usual: Gates) -> Gates:
        """These bounds, with the usual ones where nothing is asked for."""
        return Gates({**usual.bounds, **self.bounds})

    def written(self) -> list[str]:
        """Those of the bounds that stand on texts which the model writes."""
        slow = {group.name for group in GROUPS if group.slow}
        return [name for name, (metric, _) in gated().items() if name in self.bounds and metric.group in slow]

    def check(self, found: Summary) -> None:
        """Raises:
        GateError: at least one bound does not hold, or there is nothing to measure it on; all are named.
        """
        failed = []
        for name, (metric, _) in gated().items():
            bound, value = self.bounds.get(name), metric.of(found)
            if bound is None or (value is not None and (value >= bound if metric.better == "up" else value <= bound)):
                continue
            reached = "not measured" if value is None else f"{value:.4g}"
            limit = "at least" if metric.better == "up" else "at most"
            failed.append(f"{name.replace('_', ' ')} {reached}, asked for {limit} {bound:g}")
        if failed:
            raise GateError("gate failed: " + "; ".join(failed))
