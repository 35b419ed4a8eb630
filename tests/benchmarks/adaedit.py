"""AdaEdit's r and k: what they cost in exactness and save in bytes, beside MEMIT. Prints a Markdown table.

    python -m tests.benchmarks.adaedit --model M --facts F --text T --eval-text E [--count 25] [--batch-size 25]
        [--try RANK:LEFT:RIGHT ...]

In one batch, values are optimized once with and once without the attention's delta, and all rows share them. In smaller
batches every row is a run of its own, each value being optimized on the model as the earlier edits left it.
"""

from __future__ import annotations

import argparse

import torch

from patchkit.evaluate.report import Report
from patchkit.maths.updates import tensors_of
from tests.benchmarks.shared_values import SharedValues, parser

TRIES = ("1:1:1", "1:0.45:0.45", "1:0.7:0.36", "1:0.25:0.53", "0.6:0.8:0.7")
HEADINGS = ("method", "r", "k left", "k right", "kB", "of MEMIT", "exact", "success", "locality", "perplexity")


def main() -> None:
    """Parse the options, edit and measure row after row."""
    options = _options()
    torch.set_num_threads(options.threads)
    bench = SharedValues(options)
    memit = _run(bench, "memit")
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    print(_row("memit", ("", "", ""), memit, memit[0]), flush=True)
    for tried in options.tries or TRIES:
        rank, left, right = tried.split(":")
        found = _run(bench, "adaedit", f"rank={rank}", f"keep_left={left}", f"keep_right={right}")
        print(_row("adaedit", (rank, left, right), found, memit[0]), flush=True)


def _run(bench: SharedValues, method: str, *settings: str) -> tuple[int, Report]:
    """Bytes of the updates, and how the edit turned out."""
    run, report, _ = bench.run(method, settings)
    updates = [update for history in run.state.sites.values() for update in history.chain]
    return sum(_stored(tensor) for u in updates for tensor in tensors_of(u).values()), report


def _stored(tensor: torch.Tensor) -> int:
    """Bytes it takes in a patch, which keeps real numbers in float32."""
    return tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())


def _row(method: str, tried: tuple[str, str, str], found: tuple[int, Report], memit: int) -> str:
    size, report = found
    cells = [
        *(method, *tried, f"{size / 1000:.0f}", f"{size / memit:.0%}"),
        *(f"{rate or 0:.3f}" for rate in (report.efficacy.exact, report.generalization.success)),
        f"{report.locality.unchanged or 0:.3f}",
        f"{report.perplexity.ratio if report.perplexity else 0:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def _options() -> argparse.Namespace:
    known = parser(__doc__)
    known.add_argument(
        "--try", dest="tries", action="append", metavar="RANK:LEFT:RIGHT", help="r and both k, as shares"
    )
    return known.parse_args()


if __name__ == "__main__":
    main()
