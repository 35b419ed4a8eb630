"""What methods ask of second moments C against all of C's eigenvectors, in seconds of one core.

    python -m tests.benchmarks.factors --d-in 14336 --full 2048 --decay 1.0
    python -m tests.benchmarks.factors --model M --tokens 20000 --left 0.3 0.5

With --model the C are those of layers of a model; shown is how many directions null spaces leave out. Without it C has
eigenvalues i^-decay times e^(-i/d_in · fall), and eigenvectors that are known without computing them. All eigenvectors
are computed at the size --full, and their time is scaled by the third power of the size. Seconds are of the processor,
so that other work on the machine adds little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.maths.covariance import Covariance
from patchkit.maths.leading import leading
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import load_model
from patchkit.statistics.corpus import default_text, read_corpus, window_of
from patchkit.statistics.moments import statistics

from .common import show


def main() -> None:
    """Parse the options, measure, print."""
    options = _options()
    torch.set_num_threads(1)
    show(directions(options) if options.model else measure(options), options.json)


def directions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each layer that the default recipe edits and each share of the energy: how many directions hold all but
    that, and the seconds of finding them, or of trying, beside those of all eigenvectors."""
    loaded = load_model(options.model, dtype="float32")
    runner = LayerRunner(inspect_model(loaded.model))
    text = default_text(options.model)
    corpus = read_corpus(text, loaded.tokenizer, options.tokens, window_of(loaded.model))
    config = load_recipe("alphaedit", None, ["neurons=off"])
    rows = []
    for layer, covariance in statistics(runner, plan(runner.arch, config).sites, corpus).items():
        size, matrix = len(covariance.matrix), covariance.matrix.double()
        full_s, _ = cpu_seconds(lambda: torch.linalg.eigh(matrix))  # noqa: B023
        for left in options.left:
            seconds, found = cpu_seconds(lambda: leading(matrix, left))  # noqa: B023
            row = {"layer": layer, "d_in": size, "all_but": left, "directions": size - covariance.null_rank(left)}
            alone = "by themselves" if found else "with all others"
            rows.append({**row, "found": alone, "seconds": seconds, "all eigenvectors": full_s})
    return rows


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each thing that is asked of C, and for all eigenvectors."""
    _, _, small = moments(options.full, options.decay, options.fall)
    full_s = cpu_seconds(lambda: torch.linalg.eigh(small))[0] * (options.d_in / options.full) ** 3
    values, vectors, matrix = moments(options.d_in, options.decay, options.fall)
    keys = torch.randn(options.d_in, options.facts, generator=torch.Generator().manual_seed(1)).double()
    rows = [{"what": "all eigenvectors", "seconds": full_s, "scaled_from": options.full}]
    for left in options.left:
        covariance = Covariance(matrix, 1)
        seconds, found = cpu_seconds(lambda: covariance.project_null(keys, left))  # noqa: B023
        count = int((values.cumsum(0) > left * values.sum()).sum())
        assert count == len(covariance.leading(left).values)
        chosen = vectors(count)
        exact = keys - chosen @ (chosen.T @ keys)
        rows.append(
            {
                "what": f"null space of {left:g} of the energy",
                "seconds": seconds,
                "ratio": full_s / seconds,
                "directions": count,
                "difference": float((found - exact).norm() / exact.norm()),
                "bound": covariance.leading(left).error,
            }
        )
    covariance = Covariance(matrix, 1)
    for damping in options.damping:
        seconds, _ = cpu_seconds(lambda: covariance.solve(keys, damping))  # noqa: B023
        rows.append({"what": f"solve damped by {damping:g}", "seconds": seconds, "ratio": full_s / seconds})
    return rows


def moments(d_in: int, decay: float, fall: float) -> tuple[Tensor, Callable[[int], Tensor], Tensor]:
    """Eigenvalues, ascending; the largest so many eigenvectors; and C = H diag(values) H with the reflection H."""
    order = torch.arange(1, d_in + 1, dtype=torch.float64)
    values = (order**-decay * torch.exp(-fall * order / d_in)).flip(0)
    mirror = torch.randn(d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mirror /= mirror.norm()
    weighted = values * mirror
    matrix = torch.outer(mirror, (4 * (mirror @ weighted)) * mirror - 2 * weighted)
    matrix.addr_(weighted, mirror, alpha=-2).diagonal().add_(values)

    def largest(count: int) -> Tensor:
        found = -2 * torch.outer(mirror, mirror[-count:])
        found[-count:].diagonal().add_(1)
        return found

    return values, largest, matrix


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor that `work` takes, and what it returns."""
    began = time.process_time()
    made = work()
    return time.process_time() - began, made


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--d-in", type=int, default=14336)
    parser.add_argument("--full", type=int, default=3584, help="size at which all eigenvectors are computed")
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--fall", type=float, default=0.0)
    parser.add_argument("--left", type=float, nargs="*", default=[0.3], help="shares of energy that null spaces hold")
    parser.add_argument("--damping", type=float, nargs="*", default=[1e-2], help="of solves, in mean eigenvalues")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
