"""Matrix products of linear layers by oneDNN and by torch's own library, forward and backward.

    python -m tests.benchmarks.products [--threads 1]

Prints GFLOP/s for the shapes of SmolLM2-135M's layers and head. What it found stands in `patchkit/maths/onednn.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from patchkit.maths.onednn import available, linear

SHAPES = ((1536, 576), (576, 1536), (49152, 576))
ROWS = (8, 16, 64, 256)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    if not available():
        raise SystemExit("this torch or processor has no oneDNN")
    print("rows  d_out  d_in   forward: torch  oneDNN   backward: torch  oneDNN")
    for d_out, d_in in SHAPES:
        for rows in ROWS:
            forward, backward = rates(rows, d_out, d_in)
            cells = (*forward, *backward)
            print(
                f"{rows:4} {d_out:6} {d_in:5}"
                + "".join(f"{c:{w}.0f}" for c, w in zip(cells, (17, 8, 18, 8), strict=True))
            )


def rates(rows: int, d_out: int, d_in: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """GFLOP/s forward and backward, of torch and of oneDNN each."""
    x, weight = torch.randn(rows, d_in, requires_grad=True), torch.randn(d_out, d_in)
    slope, work = torch.randn(rows, d_out), 2e-9 * rows * d_out * d_in
    found = []
    for product in (F.linear, linear):
        out = product(x, weight)
        forward = fastest(lambda product=product: product(x.detach(), weight))
        backward = fastest(lambda out=out: torch.autograd.grad(out, x, slope, retain_graph=True))
        found.append((work / forward, work / backward))
    return (found[0][0], found[1][0]), (found[0][1], found[1][1])


def fastest(work: Callable[[], object], seconds: float = 0.3) -> float:
    """Least time of one call among those that fit into `seconds`."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
