"""Values and keys of the same facts: patchkit's engine against the published procedure, in turns of a few facts.

    python -m tests.benchmarks.value_engine --facts FACTS --count 20

Turns, so that both sides see the machine in the same state.
"""

from __future__ import annotations

from typing import Any

import torch

from patchkit.editing.keys import SubjectStates
from patchkit.editing.values import optimize

from .common import Bench, fresh_peak, parser, peak_memory, prepared, seconds, show
from .oracle import _key, _state, optimize_value


def main() -> None:
    """Parse the options, measure, print."""
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    show(measure(prepared(options)), options.json, options.device)


def measure(bench: Bench) -> list[dict[str, Any]]:
    """A result for the values and one for the keys; ours are timed in one piece, half before and half after."""
    requests, site, device = bench.requests, bench.plan.sites[-1], bench.device
    config = bench.config.value

    def ours() -> Any:
        return optimize(bench.runner, requests, site, bench.plan.value_at, config)

    def oracle() -> Any:
        return [optimize_value(bench.runner.arch, request, bench.plan, config) for request in requests]

    with fresh_peak(device):
        first, found = seconds(ours, device)
        ours_peak = peak_memory(device)
    with fresh_peak(device):
        oracle_s, expected = seconds(oracle, device)
        oracle_peak = peak_memory(device)
    ours_s = (first + seconds(ours, device)[0]) / 2
    targets = torch.stack([target for target, _ in expected], 1)  # (d, n)
    values = {
        "what": "values",
        "facts": len(requests),
        "steps": int(found.steps.sum()),
        "ours_s": ours_s,
        "oracle_s": oracle_s,
        "ratio": oracle_s / ours_s,
        "peak_ratio": ours_peak / oracle_peak,
        "difference": float(((found.targets - targets).norm(dim=0) / targets.norm(dim=0)).max()),
    }
    return [values, _keys(bench)]


def _keys(bench: Bench) -> dict[str, Any]:
    requests, sites, arch = bench.requests, bench.plan.sites, bench.runner.arch

    def ours() -> None:
        reader = SubjectStates(bench.runner, requests, sites, bench.plan.value_at)
        for site in sites:
            reader.read(site)

    def oracle() -> None:
        for site in sites:
            for request in requests:
                _key(arch, request, site), _state(arch, request, bench.plan)

    before, oracle_s = seconds(ours, bench.device)[0], seconds(oracle, bench.device)[0]
    ours_s = (before + seconds(ours, bench.device)[0]) / 2
    return {"what": "keys", "sites": len(sites), "ours_s": ours_s, "oracle_s": oracle_s, "ratio": oracle_s / ours_s}


if __name__ == "__main__":
    main()
