"""One batch's solve after many earlier edits against the dense d_in x d_in system of the published procedure.

    python -m tests.benchmarks.solve --d-in 14336 --facts 100 --earlier 2000

Random keys. What published code keeps between batches, P and the sum of the earlier keys' products, is not timed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from patchkit.maths.linalg import NullSpace, PriorKeys, preserving_solve

from .common import seconds, show, spread


def main() -> None:
    """Parse the options, measure, print."""
    options = _options()
    torch.set_num_threads(options.threads)
    show([measure(options.d_in, options.facts, options.earlier, options.d_out)], options.json)


def measure(d_in: int, facts: int, earlier: int, d_out: int = 64) -> dict[str, Any]:
    """Seconds of one solve of `facts` keys on top of `earlier` ones that came in batches of the same size."""
    covariance = spread(d_in)
    metric = NullSpace(covariance, 0.3, 0.15)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(d_in, facts, generator=generator).double() for _ in range(1 + earlier // facts)]
    prior = PriorKeys(batches[0][:, :0])
    for keys in batches[:-1]:
        prior.inverse(metric)
        prior = prior.extended(keys)
    keys, residual = batches[-1], torch.randn(d_out, facts, generator=generator).double()
    # The batch before was solved with; this one takes its keys in and solves.
    ours_s, found = seconds(lambda: preserving_solve(residual, keys, prior, metric))
    kept = torch.arange(d_in) < covariance.null_rank(metric.energy)
    projector, earlier_sum = torch.diag(kept.double()), prior.matrix @ prior.matrix.T  # (d_in, d_in)

    def dense() -> Any:
        system = projector @ (earlier_sum + keys @ keys.T)
        system.diagonal().add_(metric.l2)
        return torch.linalg.solve(system, projector @ keys @ residual.T).T

    dense_s, expected = seconds(dense)
    return {
        "d_in": d_in,
        "facts": facts,
        "earlier": len(prior),
        "ours_s": ours_s,
        "dense_s": dense_s,
        "ratio": dense_s / ours_s,
        "difference": float((found.dense() - expected).norm() / expected.norm()),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("d-in", 14336), ("facts", 100), ("earlier", 2000), ("d-out", 4096), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
