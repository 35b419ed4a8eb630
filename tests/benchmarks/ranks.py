"""Statistics and values of one process against those of several that torchrun starts, in seconds of the clock.

    python -m tests.benchmarks.ranks [--model DIR] [--facts F] [--count 16] [--tokens 20000] [--processes 2]

Each process has one thread and a core of its own, by --cores, so that the machine has to be quiet. Loading the model
and making the facts' texts is not counted; what is sent between processes is. Rows are the best of --times runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from patchkit.editing.editor import frozen
from patchkit.editing.value_edits import by_subject
from patchkit.editing.value_log import ValueLog
from patchkit.editing.value_problem import NO_TERMS
from patchkit.editing.values_together import optimize_together
from patchkit.ranks import together, world
from patchkit.statistics.corpus import default_text, read_corpus, window_of
from patchkit.statistics.moments import statistics

from .common import Bench, parser, prepared, show


def main() -> None:
    """Start the processes, or be one of them."""
    options = _options()
    if options.worker:
        _work(options)
        return
    alone = _seconds(options, 1)
    shared = _seconds(options, options.processes)
    rows = [
        {"what": what, "one process": alone[what], f"{options.processes} processes": shared[what]}
        | {"ratio": alone[what] / shared[what]}
        for what in alone
    ]
    show(rows, options.json)


def _seconds(options: argparse.Namespace, processes: int) -> dict[str, float]:
    """By what is done, the seconds that it takes so many processes."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    called = [sys.executable, *start, "-m", "tests.benchmarks.ranks", "--worker", *sys.argv[1:]]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(called, stdout=subprocess.PIPE, text=True, env=one, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with together():
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {options.cores[world().rank % len(options.cores)]})
        bench = prepared(options)
        corpus = read_corpus(default_text(options.model), bench.tokenizer, options.tokens, window_of(bench.model))
        requests = bench.requests
        found = {
            "statistics": _best(options.times, lambda: _statistics(bench, corpus)),
            "values": _best(options.times, lambda: _values(bench, requests)),
        }
        if world().first:
            print(json.dumps(found), flush=True)


def _statistics(bench: Bench, corpus: Any) -> None:
    folder = tempfile.TemporaryDirectory()
    with frozen(bench.model), folder as there:
        statistics(bench.runner, bench.plan.sites, corpus, world().from_first(lambda: there))  # type: ignore[arg-type]
        world().gathered(None)  # nobody reads there any more


def _values(bench: Bench, requests: Sequence[Any]) -> None:
    site, groups = bench.plan.sites[-1], by_subject(requests)
    with frozen(bench.model):
        optimize_together(
            bench.runner,
            requests,
            site,
            bench.plan.value_at,
            bench.config.value,
            lambda finished: None,
            NO_TERMS,
            groups,
            ValueLog(),
        )


def _best(times: int, work: Callable[[], None]) -> float:
    """Seconds until all processes have done it."""
    found = []
    for _ in range(times):
        world().gathered(None)
        began = time.perf_counter()
        work()
        world().gathered(None)
        found.append(time.perf_counter() - began)
    return min(found)


def _options() -> argparse.Namespace:
    known = parser(__doc__, count=16)
    known.add_argument("--tokens", type=int, default=20_000, help="of the text for the statistics")
    known.add_argument("--processes", type=int, default=2)
    known.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="one for each process")
    known.add_argument("--times", type=int, default=2)
    known.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return known.parse_args()


if __name__ == "__main__":
    main()
