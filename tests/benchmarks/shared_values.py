"""Many solves of the same facts: a model, its text statistics, and values that are optimized once for all rows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from patchkit.editing import values_together
from patchkit.editing.editor import edit
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.editing.state import EditRun
from patchkit.editing.value_problem import ValueTerms
from patchkit.editing.values import Values, optimize
from patchkit.evaluate.readings import EVAL_WINDOW
from patchkit.evaluate.report import Report
from patchkit.evaluate.trial import Trial
from patchkit.evaluate.verify import Answers, ask, compare
from patchkit.facts.reader import read_facts
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.model.loading import load_model
from patchkit.statistics.corpus import WINDOW, Corpus, read_corpus
from patchkit.statistics.moments import statistics


class SharedValues:
    """In one batch, values are optimized once with and once without the attention's delta, and all runs share them. In
    smaller batches every run optimizes its own, each value on the model as the earlier edits left it.

    facts: those that are edited, `options.skip` lines from the beginning on. others: facts that are only asked for,
    `options.others` of them from the end of the file.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        loaded = load_model(options.model, options.device)
        self.options, self.tokenizer = options, loaded.tokenizer
        self.runner = LayerRunner(inspect_model(loaded.model))
        read = read_facts(options.facts, skip_bad=True).facts
        self.facts: Sequence[Fact] = read[options.skip : options.skip + options.count]
        self.others: Sequence[Fact] = read[len(read) - options.others :]
        self.plain = read_corpus(options.eval_text, self.tokenizer, options.eval_tokens, EVAL_WINDOW)
        self._before = self._ask()
        self._covariances: dict[int, Mapping[int, Covariance]] = {}
        self._contexts: list[str] = []
        self._values: dict[bool, Values] = {}

    def run(self, method: str, settings: Sequence[str], window: int = WINDOW) -> tuple[EditRun, Report, Report]:
        """What editing left behind, how the facts turned out, and what became of the others."""
        config = load_recipe(method, None, [f"batch_size={self.options.batch_size}", *self.options.set, *settings])
        sites = plan(self.runner.arch, config).sites
        if window not in self._covariances:
            self._covariances[window] = statistics(self.runner, sites, self._text(window))
        with mock.patch.object(values_together, "optimize", self._optimize):
            run = edit(
                self.runner, self.tokenizer, self.facts, config, self._covariances[window], contexts=self._contexts
            )
        self._contexts = run.contexts
        with live_deltas(self.runner.arch, run.state.deltas(self.runner.arch)):
            after = self._ask()
        return run, compare(self.facts, self._before, after), compare(self.others, self._before, after)

    def _text(self, window: int) -> Corpus:
        return read_corpus(self.options.text, self.tokenizer, window=window)

    def _ask(self) -> Answers:
        return ask(Trial(self.runner, self.tokenizer, [*self.facts, *self.others], self.plain))

    def _optimize(self, *args: Any) -> Values:
        if self.options.batch_size < len(self.facts):
            return optimize(*args)
        attention = any(isinstance(arg, ValueTerms) and arg.attention for arg in args)
        if attention not in self._values:
            self._values[attention] = optimize(*args)
        return self._values[attention]


def parser(description: str | None, count: int = 25) -> argparse.ArgumentParser:
    """The options of a benchmark that uses it."""
    known = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model", required=True, help="folder of the model")
    known.add_argument("--facts", required=True, help="file of facts")
    known.add_argument("--skip", type=int, default=0, help="facts at the file's beginning to leave out")
    known.add_argument("--others", type=int, default=0, help="facts from the file's end, asked for and not edited")
    known.add_argument("--text", required=True, help="plain text for the statistics")
    known.add_argument("--eval-text", required=True, help="plain text for the perplexity")
    known.add_argument("--eval-tokens", type=int, default=5000)
    known.add_argument("--count", type=int, default=count, help="facts to edit")
    known.add_argument("--batch-size", type=int, default=count, help="facts solved for together")
    known.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that all rows share")
    known.add_argument("--threads", type=int, default=1)
    known.add_argument("--device", default="cpu")
    return known
