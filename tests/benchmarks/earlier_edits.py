"""What a fact costs on top of 0 to 10,000 facts that the patch holds already.

    python -m tests.benchmarks.earlier_edits --count 10 --earlier 0 100 1000 10000

The earlier facts' keys are random ones of the text's second moments, and their updates all but nothing, so that every
run edits the same model and takes the same steps. Whatever a run works out about them when it starts counts.
"""

from __future__ import annotations

from typing import Any

import torch

from patchkit.editing.editor import edit
from patchkit.editing.state import EditRun, EditState, SiteHistory
from patchkit.maths.covariance import Covariance
from patchkit.maths.linalg import Delta
from patchkit.statistics.corpus import PACKAGE_TEXT, read_corpus
from patchkit.statistics.moments import statistics

from .common import Bench, parser, prepared, seconds, show


def main() -> None:
    """Parse the options, measure, print."""
    known = parser(__doc__, count=10)
    known.add_argument("--text", default=str(PACKAGE_TEXT))
    known.add_argument("--earlier", type=int, nargs="+", default=[0, 1, 100, 1000, 10000])
    options = known.parse_args()
    torch.set_num_threads(options.threads)
    bench = prepared(options)
    show(measure(bench, options.text, options.earlier), options.json, options.device)


def measure(bench: Bench, text: str, earlier: list[int]) -> list[dict[str, Any]]:
    """A result for each number of earlier facts; the first run, to warm up, is thrown away."""
    covariances = statistics(bench.runner, bench.plan.sites, read_corpus(text, bench.tokenizer))
    results: list[dict[str, Any]] = []
    for count in [earlier[0], *earlier]:
        state = EditState({s.layer: edited(s, covariances[s.layer], count) for s in bench.plan.sites if count})
        taken, found = seconds(lambda: _edit(bench, covariances, state), bench.device)  # noqa: B023
        steps = sum(written.steps for written in found.facts)
        results.append({"earlier": count, "s_per_fact": taken / len(bench.facts), "steps": steps})
        results[-1]["ratio"] = results[-1]["s_per_fact"] / results[min(1, len(results) - 1)]["s_per_fact"]
    return results[1:]


def edited(site: Any, covariance: Covariance, count: int) -> SiteHistory:
    """A site after `count` facts that have left no trace in the weight."""
    generator = torch.Generator().manual_seed(site.layer)
    values, vectors = covariance.eigh
    drawn = torch.randn(len(values), count, generator=generator, dtype=torch.float64)
    keys = (vectors @ (values.sqrt().unsqueeze(1) * drawn)).float().double()  # (d_in, count)
    left = torch.full((site.d_out, count), 1e-12, dtype=torch.float64)
    return SiteHistory((Delta(left, keys.T),), keys, left)


def _edit(bench: Bench, covariances: dict[int, Covariance], state: EditState) -> EditRun:
    return edit(
        bench.runner, bench.tokenizer, bench.facts, bench.config, covariances, start=state, contexts=bench.contexts
    )


if __name__ == "__main__":
    main()
