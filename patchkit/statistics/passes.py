"""A pass over a text that adds something up at every site, a batch of windows at a time, and can be interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from patchkit.model.devices import solve_device
from patchkit.model.weights import Site
from patchkit.ranks import world
from patchkit.statistics.corpus import Corpus
from patchkit.statistics.store import Partial

BATCH = 2048
"""Tokens read in one batch."""
SAVE_EVERY = 30.0
"""Seconds after which the sums so far are saved again."""
Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""
Sums = dict[int, Tensor]
"""By layer, in float64."""


def summed(
    sites: Sequence[Site],
    corpus: Corpus,
    partial: Partial,
    accumulate: Callable[[Sequence[Sequence[int]], Sums], None],
    progress: Progress,
) -> Sums:
    """The sum of what `accumulate` adds at each site for every batch of windows.

    An interrupted pass goes on from what `partial` has, which is the caller's to remove. Where several processes do it
    together, each takes every so many-th batch.
    """
    sums, done = _resumed(partial, sites)
    size, ranks = max(1, BATCH // corpus.window), world()
    batches = [corpus.windows[i : i + size] for i in range(0, len(corpus.windows), size)]
    mine = range(ranks.rank, len(batches), ranks.size)
    saved = time.monotonic()
    try:
        for i in range(done, len(mine)):
            progress(sum(len(w) for b in batches[: mine[i]] for w in b), corpus.tokens)
            added = dict(sums)  # an interrupt in the middle of a batch leaves `sums` without any of it
            accumulate(batches[mine[i]], added)
            sums, done = added, i + 1
            if time.monotonic() - saved > SAVE_EVERY:
                _save(partial, sums, done)
                saved = time.monotonic()
    except (KeyboardInterrupt, Exception):
        if done:
            with suppress(OSError):  # where the disk is full, that is what is raised
                _save(partial, sums, done)
        raise
    whole = ranks.summed(sums)
    progress(corpus.tokens, corpus.tokens)
    return whole


def _save(partial: Partial, sums: Sums, done: int) -> None:
    partial.save({str(layer): total for layer, total in sums.items()}, done)


def _resumed(partial: Partial, sites: Sequence[Site]) -> tuple[Sums, int]:
    stored, done = partial.load()
    devices = {site.layer: solve_device(site.module) for site in sites}
    return {layer: stored[str(layer)].to(device) for layer, device in devices.items() if stored}, done
