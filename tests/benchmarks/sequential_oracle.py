"""The published procedure in the protocol of `patchkit bench`: AlphaEdit as published beside patchkit's own.

    patchkit bench --model FOLDER --data FACTS --methods alphaedit,memit --checkpoints 10,25,50 --out DIR
    python -m tests.benchmarks.sequential_oracle --model FOLDER --data FACTS --checkpoints 10,25,50 --out DIR

Either may come first. The row is called "alphaedit (published)"; it has no patch, hence neither bytes nor rank.
Statistics and settings are those that patchkit has; contexts are texts before the prompt, as published.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import torch

from patchkit import methods
from patchkit.bench.health import site_drift
from patchkit.bench.measuring import Bench
from patchkit.bench.records import Result
from patchkit.bench.results import Results
from patchkit.bench.tables import markdown_table
from patchkit.editing.contexts import texts_before
from patchkit.editing.editor import frozen
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.editing.session import plan
from patchkit.facts.reader import read_facts
from patchkit.facts.requests import build_request
from patchkit.model.loading import load_model
from patchkit.statistics.moments import statistics

from .oracle import _Run, _set_aside, added


def main() -> None:
    """Parse the options, edit and measure, print the table."""
    options = _options()
    torch.set_num_threads(options.threads)
    marks = sorted(options.checkpoints)
    config = load_recipe(options.method, None, [*options.set, f"batch_size={options.batch_size}"])
    loaded = load_model(options.model, options.device)
    facts = read_facts(options.data, skip_bad=options.skip_bad, limit=marks[-1]).facts
    title = f"{PurePath(loaded.name).name}, {PurePath(options.data).name} in batches of {options.batch_size}"
    bench = Bench(loaded, facts, Results(options.out, title), options.text, options.eval_text)
    name = f"{config.method} (published)"
    bench.refuse_others({name: config.digest()})
    options.out.mkdir(parents=True, exist_ok=True)
    bench.add_unedited()
    if any(bench.results.find(name, mark, mark) is None for mark in marks):
        for row in edit_and_measure(bench, config, name, marks):
            print(f"{row.method}, {row.edits} edits: score {row.score}", flush=True)
    print(markdown_table(bench.results.table(marks[-1])))


def edit_and_measure(bench: Bench, config: EditConfig, name: str, marks: Sequence[int]) -> Iterator[Result]:
    """Edit batch after batch in place; at each of `marks` put the weights back, add a row and yield it."""
    arch, sites = bench.runner.arch, plan(bench.runner.arch, config).sites
    with frozen(bench.model):
        contexts = ["", *texts_before(bench.runner, bench.tokenizer, config)]
    requests = [build_request(fact, bench.tokenizer, contexts) for fact in bench.facts]
    size = 1 if methods.get(config.method).one_by_one else config.batch_size
    run = _Run(arch, config, statistics(bench.runner, sites, bench.corpus))
    for start, mark in zip([0, *marks], marks, strict=False):
        with _set_aside(bench.model, sites), added(arch, run.deltas):
            for first in range(start, mark, size):
                run.batch(requests[first : min(first + size, mark)])
        began = time.perf_counter()
        report = bench.measure(mark, lambda: added(arch, run.deltas))
        row = Result.of(
            name,
            mark,
            report,
            bench.setup(mark, config.digest()),
            {site.weight_name: site_drift(site, run.deltas[site.layer], bench.spectra) for site in sites},
            seconds={**run.seconds, "measuring": time.perf_counter() - began},
        )
        if bench.results.find(name, mark, mark) is None:
            bench.results.add(row, report, len(bench.facts))
        yield row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the published procedure, written plainly, in the sequential protocol")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="file of facts")
    parser.add_argument("--checkpoints", required=True, type=lambda given: [int(mark) for mark in given.split(",")])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--out", required=True, type=Path, help="folder of the results, perhaps of `patchkit bench`")
    parser.add_argument("--text", help="plain text for the statistics")
    parser.add_argument("--eval-text", help="plain text for the perplexity")
    parser.add_argument("--skip-bad", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="alphaedit", choices=["alphaedit", "memit", "rome"])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
