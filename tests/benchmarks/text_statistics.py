"""The pass that gathers second moments against a plain forward pass of the same tokens up to the last edited layer.

python -m tests.benchmarks.text_statistics --tokens 8192

"plain" is the model's forward as torch computes it, "onednn" with the linear layers that patchkit uses as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from patchkit.statistics.corpus import PACKAGE_TEXT, read_corpus
from patchkit.statistics.moments import accumulate
from patchkit.statistics.passes import BATCH, Sums

from .common import Bench, parser, prepared, seconds, show


def main() -> None:
    """Parse the options, measure, print."""
    known = parser(__doc__, count=1)
    known.add_argument("--text", default=str(PACKAGE_TEXT))
    known.add_argument("--tokens", type=int, default=8192)
    options = known.parse_args()
    torch.set_num_threads(options.threads)
    show([measure(prepared(options), options.text, options.tokens)], options.json, options.device)


@torch.no_grad()
def measure(bench: Bench, text: str, tokens: int) -> dict[str, Any]:
    """Tokens per second of both, taking turns by batch."""
    corpus, sites, runner = read_corpus(text, bench.tokenizer, tokens), bench.plan.sites, bench.runner
    windows = [window for window in corpus.windows if len(window) == len(corpus.windows[0])]
    sums: Sums = {}
    spent = {"ours": 0.0, "plain": 0.0, "onednn": 0.0}
    size = BATCH // corpus.window
    for first in range(0, len(windows), size):
        batch = windows[first : first + size]
        inputs = {"input_ids": torch.tensor(batch, device=runner.device), "use_cache": False}
        spent["ours"] += seconds(partial(accumulate, runner, sites, batch, sums), bench.device)[0]
        forward = partial(runner.run, inputs, stop=sites[-1].layer + 1)
        spent["onednn"] += seconds(forward, bench.device)[0]
        with without_onednn():
            spent["plain"] += seconds(forward, bench.device)[0]
    count = sum(len(window) for window in windows)
    rates = {f"{name}_tokens_per_s": count / taken for name, taken in spent.items()}
    ratios = {"ratio": spent["plain"] / spent["ours"], "ratio_to_onednn": spent["onednn"] / spent["ours"]}
    return {"tokens": count, "sites": len(sites), **rates, **ratios}


@contextmanager
def without_onednn() -> Iterator[None]:
    """Linear layers as torch computes them."""
    was: Any = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was


if __name__ == "__main__":
    main()
