"""What edits leave alone, by the text statistics' window and by what a method weighs them with: the table of
docs/statistics.md.

    python -m tests.benchmarks.preserving --model M --facts F --text T --eval-text E [--skip 1000] [--count 40]
        [--batch-size 40] [--others 150] [--row METHOD[@WINDOW][:KEY=VALUE[,KEY=VALUE]] ...]

One neighbor's prompt per fact tells shares no better than to 5 points among 50 facts. So the prompts of `--others`
facts that nobody edits are read as well: what happens to them is what happens to any prompt about something else.
"""

from __future__ import annotations

import torch

from patchkit.evaluate.report import Report
from patchkit.statistics.corpus import WINDOW
from tests.benchmarks.shared_values import SharedValues, parser

ROWS = (
    "memit@256",
    "memit",
    "alphaedit@256",
    "alphaedit",
    "alphaedit:ridge=0.15",
    "alphaedit:ridge=0.6",
)
HEADINGS = ("method", "window", "settings", "efficacy", "paraphrases", "neighbors", "other prompts", "perplexity")


def main() -> None:
    """Parse the options, edit and measure row after row."""
    known = parser(__doc__, count=40)
    known.set_defaults(others=150)
    known.add_argument("--row", dest="rows", action="append", metavar="METHOD[@WINDOW][:KEY=VALUE,...]")
    options = known.parse_args()
    torch.set_num_threads(options.threads)
    bench = SharedValues(options)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    for row in options.rows or ROWS:
        what, _, settings = row.partition(":")
        method, _, window = what.partition("@")
        _, edited, others = bench.run(method, settings.split(",") if settings else (), int(window or WINDOW))
        print(_line(method, window or str(WINDOW), settings, edited, others), flush=True)


def _line(method: str, window: str, settings: str, edited: Report, others: Report) -> str:
    assert edited.perplexity is not None
    exact = (edited.efficacy.exact, edited.generalization.exact)
    unchanged = (edited.locality.unchanged, others.locality.unchanged)
    cells = [
        method,
        window,
        settings,
        *(f"{rate or 0:.3f}" for rate in (*exact, *unchanged)),
        f"{edited.perplexity.ratio:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
