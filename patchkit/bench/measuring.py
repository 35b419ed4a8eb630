"""Measuring in the benchmark: the base once, every patch beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from patchkit.bench.abilities import Abilities
from patchkit.bench.health import Spectra, last_states, moved_states, prompts_of
from patchkit.bench.judge import Judge
from patchkit.bench.records import UNEDITED, Result, Setup, States
from patchkit.bench.results import Results
from patchkit.editing.editor import Progress, frozen
from patchkit.editing.session import ValueCache
from patchkit.evaluate.answers import Ask, Said
from patchkit.evaluate.divergence import as_said, divergences
from patchkit.evaluate.readings import EVAL_TOKENS, EVAL_WINDOW
from patchkit.evaluate.report import Report
from patchkit.evaluate.trial import Trial
from patchkit.evaluate.verify import Answers, ask_base, ask_unpatched, compare, verify
from patchkit.facts.requests import build_request
from patchkit.facts.schema import Fact
from patchkit.model.arch import inspect_model
from patchkit.model.digests import model_digest
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import LoadedModel
from patchkit.model.weights import stored_parameters
from patchkit.statistics.corpus import Corpus, default_text, read_corpus, window_of

TEXT_TOKENS = 1024
"""Tokens of the plain text that distributions are compared on; the perplexity reads more."""


class Bench:
    """A model, the facts to edit in order, the texts, and the folder with the results."""

    def __init__(
        self,
        loaded: LoadedModel,
        facts: Sequence[Fact],
        results: Results,
        text: str | Path | None = None,
        eval_text: str | Path | None = None,
        progress: Progress = lambda phase, done, total: None,
        quick: bool = False,
        judge: Judge | None = None,
        abilities: Abilities | None = None,
    ) -> None:
        """With `quick` the model writes no texts at any checkpoint; else it does at each. `judge` judges its answers;
        `abilities` are asked at each, too.

        Raises InputError for a text that cannot be read, a fact without tokens, a model that cannot be edited.
        """
        self.model, self.tokenizer, self.results, self.progress = loaded.model, loaded.tokenizer, results, progress
        self.facts, self.text = tuple(facts), text or default_text(loaded.name)
        self.runner = LayerRunner(inspect_model(loaded.model))
        self.corpus = self.reading(chat=False)
        plain = eval_text or default_text(loaded.name, "eval")
        self.plain = read_corpus(plain, self.tokenizer, EVAL_TOKENS, window_of(self.model, EVAL_WINDOW))
        self.quick, self.judge, self.abilities = quick, judge, abilities
        self.prompts = [] if quick else prompts_of(self.facts)
        self.spectra: Spectra = {}
        self.known: ValueCache = {}
        for fact in self.facts:
            build_request(fact, self.tokenizer)

    def reading(self, chat: bool) -> Corpus:
        """The text for the statistics as a run reads it: with `chat`, as conversations too for a chat model."""
        return read_corpus(self.text, self.tokenizer, window=window_of(self.model), chat=chat)

    @cached_property
    def base(self) -> Answers:
        """What the unedited model answers to all facts: asked once, for every method and checkpoint."""
        with frozen(self.model):
            self.progress("the base", 0, 1)
            answers = ask_base(self._trial)
        self.progress("the base", 1, 1)
        return answers

    def _measuring(self, done: int, total: int) -> None:
        self.progress("measuring", done, total)

    @property
    def _trial(self) -> Trial:
        return Trial(self.runner, self.tokenizer, self.facts, self.plain, self.quick)

    def measure(self, count: int, attached: Callable[[], AbstractContextManager[Any]]) -> Report:
        """What `verify` says of the first `count` facts."""
        facts, base = self.facts[:count], self.base
        with frozen(self.model):
            return verify(self.runner, self.tokenizer, facts, attached, self.plain, self._measuring, base, self.quick)

    @cached_property
    def _base_states(self) -> Tensor:
        return last_states(self.runner, self.tokenizer, self.prompts)

    def states(self, attached: Callable[[], AbstractContextManager[Any]]) -> States | None:
        """How far states at the end of the facts' neighbors' prompts have moved; None where texts are not measured."""
        if not self.prompts:
            return None
        with frozen(self.model):
            before = self._base_states
            with attached():
                return moved_states(before, last_states(self.runner, self.tokenizer, self.prompts))

    @cached_property
    def _base_text(self) -> Mapping[Ask, Said]:
        windows = self.plain.windows
        with frozen(self.model):
            return as_said(self.runner, windows[: max(1, TEXT_TOKENS // max(map(len, windows)))])

    def text_kl(self, attached: Callable[[], AbstractContextManager[Any]]) -> float:
        """KL(base ‖ patched) on plain text, nats per token: mean over windows."""
        before = self._base_text
        with frozen(self.model), attached():
            return fmean(divergences(self.runner, before).values())

    def add_unedited(self) -> None:
        """Add the row of the unedited model, unless it is there."""
        count = len(self.facts)
        row = self.results.find(UNEDITED, 0, count)
        if row is None:
            with frozen(self.model):
                report = compare(self.facts, self.base, ask_unpatched(self._trial, self.base))
            row = Result.of(UNEDITED, 0, report, self.setup(count, None), {}, text_kl=0.0)
            self.results.add(row, report, count)
        self.with_abilities(self.with_verdicts(row), nullcontext)

    def with_verdicts(self, row: Result) -> Result:
        """The row with the share of its answers that the judge takes for right, where there is one: of the answers
        that were written down with the row, whenever that was.

        Raises:
            InputError: they are gone.
            PatchkitError: the judge does not answer.
        """
        if self.judge is None or row.judge == self.judge.model:
            return row
        share = self.judge.share(self.results.report(row), self.facts)
        row = row.model_copy(update={"judged": share, "judge": self.judge.model})
        self.results.replace(row, len(self.facts))
        return row

    def with_abilities(self, row: Result, attached: Callable[[], AbstractContextManager[Any]]) -> Result:
        """The row with the tasks that it lacks, each written down as soon as it is asked.

        Raises:
            InputError: lm-eval cannot ask this model.
        """
        for task in self.abilities.lacking(row) if self.abilities else ():
            assert self.abilities
            with frozen(self.model), attached():
                found = self.abilities.ask(task, self.model, self.tokenizer, self.progress)
            row = row.with_abilities(found)
            self.results.replace(row, len(self.facts))
        return row

    def setup(self, count: int, recipe: str | None) -> Setup:
        """The setup of a row about the first `count` facts."""
        return Setup(
            model=self._model_digest,
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            facts=_digest(fact.model_dump_json() for fact in self.facts[:count]),
            text=f"{self.corpus.digest} in windows of {self.corpus.window}",
            eval_text=self.plain.digest,
            recipe=recipe,
        )

    def refuse_others(self, recipes: Mapping[str, str]) -> None:
        """Refuse a folder with rows of another setup; `recipes` are the digests of this run's, by method.

        Raises:
            InputError: as `Results.refuse_others` does.
        """

        def wanted(method: str, facts: int) -> dict[str, Any]:
            unknown = {*(["facts"] if facts > len(self.facts) else []), *([] if method in recipes else ["recipe"])}
            return self.setup(facts, recipes.get(method)).model_dump(exclude=unknown)

        self.results.refuse_others(wanted)

    @cached_property
    def _model_digest(self) -> str:
        return model_digest(stored_parameters(self.model))


def _digest(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()
