"""The polar factor by matrix products against the SVD: time, and how far the two are apart.

    python -m tests.benchmarks.polar --size 4096 --threads 2

The matrix is as MOSE has it: a second moment of outputs, with a spectrum that falls over `--condition`, and 20 facts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from patchkit.maths.rotations import polar


def main() -> None:
    """Parse the options, measure each size, print one JSON line for each."""
    options = _options()
    torch.set_num_threads(options.threads)
    for size in options.size:
        print(json.dumps(measure(size, options.condition, options.device)), flush=True)


def measure(size: int, condition: float, device: str) -> dict[str, float]:
    """Both factors of one random matrix (size, size) in float64."""
    matrix = preserved_and_edited(size, condition).to(device)
    iteration, iterated = timed(lambda: polar(matrix))
    svd, exact = timed(lambda: _by_svd(matrix))
    return {
        "size": size,
        "iteration seconds": round(iteration, 3),
        "svd seconds": round(svd, 3),
        "times faster": round(svd / iteration, 2),
        "largest difference": float((iterated - exact).abs().max()),
    }


def preserved_and_edited(size: int, condition: float, facts: int = 20) -> Tensor:
    """W C W' + V (W K)' with random directions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    moment = (basis * torch.logspace(0, -float(torch.tensor(condition).log10()), size)) @ basis.T  # (size, size)
    targets, outputs = torch.randn(2, size, facts, generator=generator, dtype=torch.float64) / size**0.5
    both: Tensor = moment + targets @ outputs.T
    return both


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds and result of one call, all of the device's work included."""
    began = time.perf_counter()
    result = run()
    if result.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def _by_svd(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix)
    factor: Tensor = left @ right
    return factor


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--condition", type=float, default=1e4, help="largest over smallest preserved variance")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
