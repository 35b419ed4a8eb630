"""AdaEdit's r and k: what they cost in exactness and save in bytes, beside MEMIT. Prints a Markdown table.

    python -m tests.benchmarks.adaedit --model M --facts F --text T --eval-text E [--count 25] [--batch-size 25]
        [--try RANK:LEFT:RIGHT ...]

In one batch, values are optimised once with and once without the attention's delta, and all rows share them. In smaller
batches every row is a run of its own, each value being optimised on the model as the earlier edits left it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch

from patchkit import editor
from patchkit.arch import inspect_model
from patchkit.editor import EditState, edit, plan
from patchkit.facts import Fact, read_facts
from patchkit.forward import LayerRunner
from patchkit.linalg import Covariance
from patchkit.models import load_model
from patchkit.recipe import load_recipe
from patchkit.runtime import live_deltas
from patchkit.stats import read_corpus, statistics
from patchkit.updates import tensors_of
from patchkit.values import Values, ValueShape, optimise
from patchkit.verify import Report, ask, verify

TRIES = ("1:1:1", "1:0.45:0.45", "1:0.9:0.28", "1:0.7:0.36", "1:0.25:0.53", "1:0.4:0.15", "0.6:0.8:0.7")
HEADINGS = ("method", "r", "k left", "k right", "kB", "of MEMIT", "exact", "success", "locality", "perplexity")


def main() -> None:
    """Parse the options, edit and measure row after row."""
    options = _options()
    torch.set_num_threads(options.threads)
    bench = _Bench(options)
    memit = bench.run("memit")
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    print(_row("memit", ("", "", ""), memit, memit[0]), flush=True)
    for tried in options.tries or TRIES:
        rank, left, right = tried.split(":")
        found = bench.run("adaedit", f"rank={rank}", f"keep_left={left}", f"keep_right={right}")
        print(_row("adaedit", (rank, left, right), found, memit[0]), flush=True)


class _Bench:
    """The model, the facts, and what every row shares."""

    def __init__(self, options: argparse.Namespace) -> None:
        loaded = load_model(options.model, options.device)
        self.options, self.tokenizer = options, loaded.tokenizer
        self.runner = LayerRunner(inspect_model(loaded.model))
        read = read_facts(options.facts, skip_bad=True).facts
        self.facts: Sequence[Fact] = read[options.skip : options.skip + options.count]
        self.covariances: Mapping[int, Covariance] = {}
        self.corpus = read_corpus(options.text, self.tokenizer)
        self.plain = read_corpus(options.eval_text, self.tokenizer, options.eval_tokens)
        self.before = ask(self.runner, self.tokenizer, self.facts, self.plain)
        self.contexts: list[str] = []
        self._values: dict[bool, Values] = {}

    def run(self, method: str, *settings: str) -> tuple[int, Report]:
        """Bytes of the updates, and how the edit turned out."""
        config = load_recipe(method, None, [f"batch_size={self.options.batch_size}", *self.options.set, *settings])
        if not self.covariances:
            self.covariances = statistics(self.runner, plan(self.runner.arch, config).sites, self.corpus)
        start = EditState(contexts=list(self.contexts))
        with mock.patch.object(editor, "optimise", self._optimise):
            state = edit(self.runner, self.tokenizer, self.facts, config, self.covariances, start=start)
        self.contexts = state.contexts
        changes = state.changes(self.runner.arch)
        report = verify(
            self.runner,
            self.tokenizer,
            self.facts,
            lambda: live_deltas(self.runner.arch, changes),
            self.plain,
            before=self.before,
        )
        updates = [update for solved in state.sites.values() for update in solved.chain]
        return sum(_stored(tensor) for u in updates for tensor in tensors_of(u).values()), report

    def _optimise(self, *args: Any) -> Values:
        if self.options.batch_size < len(self.facts):
            return optimise(*args)
        attention = any(isinstance(arg, ValueShape) and arg.attention for arg in args)
        if attention not in self._values:
            self._values[attention] = optimise(*args)
        return self._values[attention]


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
    parser = argparse.ArgumentParser(description="AdaEdit's r and k beside MEMIT")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--facts", required=True, help="file of facts")
    parser.add_argument("--skip", type=int, default=0, help="facts at the file's beginning to leave out")
    parser.add_argument("--text", required=True, help="plain text for the statistics")
    parser.add_argument("--eval-text", required=True, help="plain text for the perplexity")
    parser.add_argument("--eval-tokens", type=int, default=5000)
    parser.add_argument("--count", type=int, default=25, help="facts to edit")
    parser.add_argument("--batch-size", type=int, default=25, help="facts solved for together")
    parser.add_argument(
        "--try", dest="tries", action="append", metavar="RANK:LEFT:RIGHT", help="r and both k, as shares"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that all rows share")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
