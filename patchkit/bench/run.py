"""The papers' sequential benchmark: methods edit fact after fact; at checkpoints all facts so far are measured.

OUT/
  results.jsonl           one `Row` per method and checkpoint, and one of the unedited model
  table.md, table.csv     the same for people
  <method>/<edits>/       the patch after so many edits, a patch like any other
  <method>/<edits>.json   what `verify` found with it, fact by fact
  <method>/unfinished/    the patch between two checkpoints

What is there already is not computed again, and a run that was killed goes on from the last patch it saved: continuing
a patch is bit for bit the same as never having stopped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from statistics import harmonic_mean
from typing import Any

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.api import EVAL_TOKENS, EVAL_WINDOW, apply
from patchkit.editing.editor import Progress, frozen
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.editing.session import ValueCache, plan
from patchkit.errors import InputError, PatchkitError
from patchkit.evaluate.metrics import Trial, metrics, summary_line
from patchkit.evaluate.report import Report, Summary
from patchkit.evaluate.verify import Answers, ask_base, ask_unpatched, compare, verify
from patchkit.facts.reader import read_facts
from patchkit.facts.requests import build_request
from patchkit.facts.schema import Fact, FactFile
from patchkit.io.files import write_atomically
from patchkit.maths.updates import Chain, delta_of, mapped
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import LoadedModel, ModelChoice, load_model, load_tokenizer
from patchkit.model.weights import Site, model_digest, read_weight
from patchkit.patch.manifest import Manifest
from patchkit.patch.patch import Patch, read_manifest
from patchkit.runs.prepare import count_tokens
from patchkit.statistics.moments import default_text, read_corpus, window_of
from patchkit.words import counted

UNEDITED = "unedited"
SAVE_EVERY = 10
"""Batches after which a patch is saved on the way to the next checkpoint."""
Say = Callable[[str], None]


# --- what is written down ---------------------------------------------------------------------------------------------


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setup(_Record):
    """Digests of everything that decides a row's numbers; `facts` is that of the facts measured in it."""

    model: str
    dtype: str
    facts: str
    text: str
    eval_text: str
    recipe: str | None


class Drift(_Record):
    """How much of itself a weight has gained (0.01) or lost (-0.01) in Frobenius norm and in condition number."""

    norm: float
    condition: float


class Row(Summary):
    """One line of results.jsonl: a method after so many edits, measured on all facts edited so far.

    norm_change, condition_change: the largest among the edited weights, without sign; weights: each of them; bytes:
    size of patch.safetensors; rank: the largest of a weight's updates together; seconds: by phase, editing since the
    first fact; score: harmonic mean of exact efficacy, generalization success (exact where no fact has a target_true)
    and unchanged locality.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: str
    edits: int
    score: float | None
    norm_change: float | None = None
    condition_change: float | None = None
    weights: dict[str, Drift] = Field(default_factory=dict)
    bytes: int | None = None
    rank: int | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    setup: Setup

    @classmethod
    def of(
        cls, method: str, edits: int, report: Report, setup: Setup, weights: Mapping[str, Drift], **more: Any
    ) -> Row:
        """A row from what was found; `more` are its other fields."""
        return cls(
            method=method,
            edits=edits,
            score=score(report),
            norm_change=max((abs(drift.norm) for drift in weights.values()), default=None),
            condition_change=max((abs(drift.condition) for drift in weights.values()), default=None),
            weights=dict(weights),
            setup=setup,
            **report.model_dump(exclude={"per_fact"}),
            **more,
        )


def score(report: Report) -> float | None:
    """Harmonic mean of exact efficacy, generalization success and unchanged locality; None where one is unknown."""
    parts = (report.efficacy.exact, report.generalization.success_or_exact, report.locality.unchanged)
    known = [part for part in parts if part is not None]
    return harmonic_mean(known) if len(known) == len(parts) else None


# --- drift of the weights ---------------------------------------------------------------------------------------------

Spectra = dict[str, tuple[float, float]]  # by name of the weight: Frobenius norm, condition number


def weight_drift(model: PreTrainedModel, patch: Patch, spectra: Spectra) -> dict[str, Drift]:
    """How norm and condition number of every weight that `patch` touches differ from the base's, in float64.

    Args:
        spectra: those of unedited weights, filled in here for the next call.

    Raises:
        InputError: the patch is for another model.
    """
    sites = patch.sites(inspect_model(model))
    changes = {name: _change(sites[name], chain) for name, chain in patch.updates.items()}
    return {name: site_drift(sites[name], moved, spectra) for name, moved in changes.items()}


def _change(site: Site, chain: Chain) -> Tensor:
    """W' - W, (d_out, d_in), in float64 throughout: the small singular values that a rotation keeps need it."""
    wide = [mapped(update, Tensor.double) for update in chain]
    return delta_of(wide, lambda: read_weight(site).double()).dense()


def site_drift(site: Site, moved: Tensor, spectra: Spectra) -> Drift:
    """The same for one site and W' - W, (d_out, d_in)."""
    weight = read_weight(site).double()
    weight = weight if weight.is_cuda else weight.cpu()
    if site.weight_name not in spectra:
        spectra[site.weight_name] = _norm_and_condition(weight)
    norm, condition = spectra[site.weight_name]
    new_norm, new_condition = _norm_and_condition(weight + moved.to(weight))
    return Drift(norm=new_norm / norm - 1, condition=new_condition / condition - 1)


def _norm_and_condition(weight: Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(weight)  # (min(d_out, d_in),), descending
    # Below that, float64 cannot tell a singular value from zero.
    least = values[-1].clamp_min(values[0] * torch.finfo(values.dtype).eps)
    return float(values.norm()), float(values[0] / least)


# --- the folder -------------------------------------------------------------------------------------------------------


class Results:
    """The rows in a folder. Runs in several processes may add to it at once, each with methods of its own."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self._title = folder, title
        self._file = folder / "results.jsonl"

    def rows(self) -> list[Row]:
        """All rows, in the order in which they were added.

        Raises:
            InputError: a line is no row.
        """
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        return [self._row(number, line) for number, line in enumerate(lines, 1)]

    def _row(self, number: int, line: str) -> Row:
        try:
            return Row.model_validate_json(line)
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise InputError(f"{self._file} line {number}: no row of this version: {what}; delete it") from None

    def find(self, method: str, edits: int, facts: int) -> Row | None:
        """The row of `method` after `edits` edits, measured on `facts` facts."""
        return next((r for r in self.rows() if (r.method, r.edits, r.facts) == (method, edits, facts)), None)

    def table(self, facts: int) -> list[Row]:
        """The rows of a table of `facts` edits: the unedited model, then method by method; others stay out."""
        rows = [row for row in self.rows() if row.facts <= facts and (row.method != UNEDITED or row.facts == facts)]
        order = list(dict.fromkeys([UNEDITED, *(row.method for row in rows)]))
        return sorted(rows, key=lambda row: (order.index(row.method), row.edits))

    def add(self, row: Row, report: Report, facts: int) -> None:
        """Write a new row, its report, and the tables of `facts` edits."""
        folder = self.folder / row.method
        whole = report.model_dump_json() + "\n"
        write_atomically(folder / f"{row.edits}.json", lambda path: _write(path, whole))
        with FileLock(self.folder / ".lock"):
            lines = "".join(f"{known.model_dump_json()}\n" for known in (*self.rows(), row))
            write_atomically(self._file, lambda path: _write(path, lines))
            self.write_tables(facts)

    def write_tables(self, facts: int) -> None:
        """Write table.md and table.csv of `facts` edits."""
        rows = self.table(facts)
        markdown = f"{self._title}, {facts} facts.\n\n{markdown_table(rows)}"
        write_atomically(self.folder / "table.md", lambda path: _write(path, markdown))
        write_atomically(self.folder / "table.csv", lambda path: _write(path, csv_table(rows)))

    def refuse_others(self, wanted: Callable[[str, int], Mapping[str, Any]]) -> None:
        """Refuse a folder that is no benchmark's, or a row whose setup is not as wanted for its method and number of
        facts, in the fields that `wanted` gives.

        Raises:
            InputError: the first such row, and what is different in it.
        """
        if self.folder.is_file() or (self.folder.is_dir() and not self._file.is_file() and any(self.folder.iterdir())):
            raise InputError(f"--out {self.folder}: it is there and holds no benchmark; choose another folder")
        for row in self.rows():
            other = [key for key, value in wanted(row.method, row.facts).items() if getattr(row.setup, key) != value]
            if other:
                what = " and ".join(other).replace("_", " ")
                raise InputError(
                    f"--out {self.folder}: its row of {row.method} after {row.edits} edits is from a run with "
                    f"different {what}; choose another folder"
                )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column: its name in the CSV file, its heading for people (None: not for them), its value and how to show it."""

    name: str
    heading: str | None
    value: Callable[[Row], Any]
    form: str = ""

    def cell(self, row: Row) -> str:
        """The value as text for people."""
        value = self.value(row)
        return "-" if value is None else format(value, self.form)


def _columns() -> tuple[_Column, ...]:
    """All columns, the metrics' as their table has them."""
    return (
        _Column("method", "method", lambda r: r.method),
        _Column("edits", "edits", lambda r: r.edits),
        _Column("score", "score", lambda r: r.score, ".3f"),
        *(_Column(metric.key, metric.column, metric.of, metric.decimals) for metric in metrics()),
        _Column("norm_change", "norm change", lambda r: r.norm_change, ".1e"),
        _Column("condition_change", "condition change", lambda r: r.condition_change, ".1e"),
        _Column("rank", "rank", lambda r: r.rank),
        _Column("bytes", None, lambda r: r.bytes),
        _Column("kilobytes", "kB", lambda r: None if r.bytes is None else r.bytes / 1e3, ",.0f"),
        _Column("seconds_editing", "seconds", lambda r: _editing(r.seconds), ".1f"),
        _Column("seconds_measuring", None, lambda r: r.seconds.get("measuring")),
    )


def _shown() -> tuple[_Column, ...]:
    """Those for people."""
    return tuple(column for column in _columns() if column.heading)


def _editing(seconds: Mapping[str, float]) -> float | None:
    phases = [spent for phase, spent in seconds.items() if phase != "measuring"]
    return sum(phases) if phases else None


def markdown_table(rows: Sequence[Row]) -> str:
    """One line per row, as Markdown; numbers to the right."""
    columns = _shown()
    headings = " | ".join(column.heading or "" for column in columns)
    rules = "|".join(["---", *("---:" for _ in columns[1:])])
    body = "".join(f"| {' | '.join(column.cell(row) for column in columns)} |\n" for row in rows)
    return f"| {headings} |\n|{rules}|\n{body}"


def csv_table(rows: Sequence[Row]) -> str:
    """All columns, numbers in full; an empty cell for what is not known."""
    text, columns = io.StringIO(), _columns()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in columns)
    writer.writerows([column.value(row) for column in columns] for row in rows)
    return text.getvalue()


def rich_table(rows: Sequence[Row]) -> Table:
    """The same as the Markdown, for a terminal."""
    table, columns = Table(box=None, padding=(0, 2, 0, 0), header_style="bold"), _shown()
    for place, column in enumerate(columns):
        heading = (column.heading or "").replace(" ", "\n")
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table


# --- measuring --------------------------------------------------------------------------------------------------------


class Bench:
    """A model, the facts to edit in order, the texts, and the folder with the results."""

    def __init__(
        self,
        loaded: LoadedModel,
        facts: Sequence[Fact],
        results: Results,
        text: str | Path | None = None,
        eval_text: str | Path | None = None,
    ) -> None:
        """Raises InputError for a text that cannot be read, a fact without tokens, a model that cannot be edited."""
        self.model, self.tokenizer, self.results = loaded.model, loaded.tokenizer, results
        self.facts, self.text = tuple(facts), text or default_text(loaded.name)
        self.runner = LayerRunner(inspect_model(loaded.model))
        self.corpus = read_corpus(self.text, self.tokenizer, window=window_of(self.model))
        plain = eval_text or default_text(loaded.name, "eval")
        self.plain = read_corpus(plain, self.tokenizer, EVAL_TOKENS, window_of(self.model, EVAL_WINDOW))
        self.spectra: Spectra = {}
        self.known: ValueCache = {}
        for fact in self.facts:
            build_request(fact, self.tokenizer)

    @cached_property
    def base(self) -> Answers:
        """What the unedited model answers to all facts: asked once, for every method and checkpoint."""
        with frozen(self.model):
            return ask_base(self._trial)

    @property
    def _trial(self) -> Trial:
        return Trial(self.runner, self.tokenizer, self.facts, self.plain)

    def measure(
        self,
        count: int,
        attached: Callable[[], AbstractContextManager[Any]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Report:
        """What `verify` says of the first `count` facts."""
        facts, base = self.facts[:count], self.base
        with frozen(self.model):
            return verify(self.runner, self.tokenizer, facts, attached, self.plain, progress, base)

    def add_unedited(self) -> None:
        """Add the row of the unedited model, unless it is there."""
        count = len(self.facts)
        if self.results.find(UNEDITED, 0, count) is None:
            with frozen(self.model):
                report = compare(self.facts, self.base, ask_unpatched(self._trial, self.base))
            row = Row.of(UNEDITED, 0, report, self.setup(count, None), {})
            self.results.add(row, report, count)

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
        return model_digest(self.model.named_parameters())


def _digest(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


@dataclass
class _Clock:
    """Guesses how long what is left will take, at the pace of what is done.

    todo: checkpoints left, by method; at: facts edited so far, by method; facts, seconds: what was done, by its kind.
    """

    todo: Mapping[str, list[int]]
    at: dict[str, int]
    facts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, kind: str, facts: int) -> Iterator[None]:
        """Count `facts` facts, and the seconds inside."""
        began = time.perf_counter()
        yield
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - began
        self.facts[kind] += facts

    def estimate(self) -> str:
        """The time left, in words."""
        edits = sum(marks[-1] - self.at[name] for name, marks in self.todo.items() if marks)
        left = {"edit": edits, "measure": sum(map(sum, self.todo.values()))}
        seconds = sum(self.seconds[kind] / self.facts[kind] * left[kind] for kind in self.seconds)
        return f"about {seconds / 60:.0f} min left" if seconds >= 60 else f"about {seconds:.0f} s left"


# --- one method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequence:
    """One method's way through the facts."""

    bench: Bench
    name: str
    config: EditConfig
    options: Mapping[str, Any]  # of patchkit.apply

    @property
    def folder(self) -> Path:
        """Where its patches are."""
        return self.bench.results.folder / self.name

    def missing(self, checkpoints: Sequence[int]) -> list[int]:
        """Those of the checkpoints that have no row."""
        return [mark for mark in checkpoints if self.bench.results.find(self.name, mark, mark) is None]

    def start_for(self, mark: int) -> tuple[int, Path | None]:
        """The furthest patch saved on the way to `mark`: how many facts it holds, and its folder.

        A patch that ends within a batch lies on the way to no later checkpoint.
        """
        found: tuple[int, Path | None] = (0, None)
        for folder, manifest in self._saved():
            count = len(manifest.facts)
            if found[0] < count <= mark and (count == mark or count % self.config.batch_size == 0):
                found = count, folder
        return found

    def refuse_others(self) -> None:
        """Raises InputError where a saved patch is not one of this run's."""
        for folder, manifest in self._saved():
            if other := self._difference(manifest):
                raise InputError(f"{folder}: a patch from a run with {other}; choose another --out, or delete it")

    def run_to(self, mark: int, clock: _Clock, progress: Progress) -> Patch:
        """Edit on up to the first `mark` facts. Every patch on the way is saved, and only those at checkpoints kept.

        Raises:
            InputError: an edit is not finite.
        """
        count, folder = self.start_for(mark)
        patch = Patch.load(folder) if folder else None
        while patch is None or count < mark:
            stop = min(mark, count + SAVE_EVERY * self.config.batch_size)
            with clock.timed("edit", stop - count):
                patch = self._apply(patch, count, stop, progress)
            patch.save(self.folder / (str(mark) if stop == mark else "unfinished"))
            count = clock.at[self.name] = stop
        shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
        return patch

    def _apply(self, onto: Patch | None, count: int, stop: int, progress: Progress) -> Patch:
        """Edit facts up to `stop`. Values depend on what was edited before them, so those of methods that start alike
        (same sites, value settings and contexts) are shared for the first batch and for no other."""
        bench = self.bench

        def passed_on(phase: str, done: int, total: int) -> None:
            if phase == "editing":
                phase, done, total = self.name, count + done, len(bench.facts)
            progress(phase, done, total)

        return apply(
            bench.model,
            bench.tokenizer,
            bench.facts[count:stop],
            self.name,
            onto=onto,
            text=bench.text,
            progress=passed_on,
            say=lambda note: None,
            values=bench.known,
            **self.options,
        )

    def add_row(self, mark: int, patch: Patch, clock: _Clock, progress: Progress) -> Row:
        """Measure `patch` after `mark` edits and write down what was found."""
        bench, folder, began = self.bench, self.folder / str(mark), time.perf_counter()
        with clock.timed("measure", mark):
            report = bench.measure(
                mark, lambda: patch.attached(bench.model), lambda done, total: progress("measuring", done, total)
            )
            drifts = weight_drift(bench.model, patch, bench.spectra)
        row = Row.of(
            self.name,
            mark,
            report,
            bench.setup(mark, self.config.digest()),
            drifts,
            bytes=(folder / "patch.safetensors").stat().st_size,
            rank=_rank(patch.manifest),
            seconds={**_phases(patch.manifest), "measuring": round(time.perf_counter() - began, 3)},
        )
        patch.with_metrics(report.summary(), report.outcomes()).save(folder)
        bench.results.add(row, report, len(bench.facts))
        return row

    def _saved(self) -> Iterator[tuple[Path, Manifest]]:
        for file in sorted(self.folder.glob("*/manifest.json")):
            if not file.parent.name.startswith("."):  # what a killed run was about to write
                yield file.parent, read_manifest(file.parent)

    def _difference(self, manifest: Manifest) -> str | None:
        ours = [Fact.model_validate(f.model_dump(include=set(Fact.model_fields))) for f in manifest.facts]
        shared = min(len(ours), len(self.bench.facts))
        if tuple(ours[:shared]) != self.bench.facts[:shared]:
            return "other facts"
        if any(run.recipe_digest != self.config.digest() for run in manifest.history):
            return "another recipe"
        if not all(self.bench.corpus.is_from(run.text) for run in manifest.history):
            return "another text for the statistics"
        return None


def _rank(manifest: Manifest) -> int:
    ranks: Counter[str] = Counter()
    for update in manifest.updates:
        ranks[update.weight] += update.rank
    return max(ranks.values(), default=0)


def _phases(manifest: Manifest) -> dict[str, float]:
    """Seconds by phase, over all runs."""
    total: dict[str, float] = {}
    for run in manifest.history:
        for phase, spent in run.seconds.items():
            total[phase] = round(total.get(phase, 0.0) + spent, 3)
    return total


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What `patchkit bench` prints; `stopped` says of methods that could not go on why."""

    folder: Path
    rows: tuple[Row, ...]
    stopped: dict[str, str]

    def as_json(self) -> str:
        """One JSON object for machines."""
        rows = [row.model_dump(mode="json") for row in self.rows]
        return json.dumps({"out": str(self.folder), "rows": rows, "stopped": self.stopped})


def run_bench(
    data: str,
    chosen: ModelChoice,
    out: Path,
    *,
    methods: Sequence[str],
    edits: int | None = None,
    batch_size: int = 1,
    checkpoints: Sequence[int] = (),
    recipe: str | None = None,
    settings: Sequence[str] = (),
    text: str | None = None,
    eval_text: str | None = None,
    stats: str | None = None,
    zsre_target: Any = "alt",
    skip_bad: bool = False,
    progress: Progress = lambda phase, done, total: None,
    say: Say = lambda line: None,
) -> Outcome:
    """Edit the first `edits` facts of `data` with each of `methods`, measure at the checkpoints, write it all to `out`.

    Args:
        edits: without it the last checkpoint, or else all facts; always a checkpoint itself.
        batch_size: facts solved for together; checkpoints are whole batches, but for the last one.
        recipe, settings: as in `patchkit.apply`, for all methods alike.
        text, eval_text: plain text for the statistics, and for the perplexity.
        say: told of every row, with an estimate of the time left.

    Raises:
        InputError: anything about the input, or `out` holds results of another configuration; nothing was done then.
    """
    overrides = (*settings, f"batch_size={batch_size}")
    configs = {name: load_recipe(name, recipe, overrides) for name in dict.fromkeys(methods)}
    marks = _checkpoints(checkpoints, edits, batch_size)
    read = _read(data, chosen, marks[-1] if marks else None, zsre_target, skip_bad)
    if read.rejected:
        say(f"{len(read.rejected)} bad facts left out")
    marks = marks or [len(read.facts)]
    loaded = load_model(chosen.name, chosen.device, chosen.dtype)
    title = f"{PurePath(loaded.name).name}, {PurePath(read.path).name} in batches of {batch_size}"
    bench = Bench(loaded, read.facts, Results(out, title), text, eval_text)
    options = {"recipe": recipe, "set": overrides, "stats": stats}
    sequences = [_Sequence(bench, name, config, options) for name, config in configs.items()]
    for sequence in sequences:
        plan(bench.runner.arch, sequence.config)  # a layer that the model does not have
    bench.refuse_others({name: config.digest() for name, config in configs.items()})
    for sequence in sequences:
        sequence.refuse_others()
    out.mkdir(parents=True, exist_ok=True)
    bench.add_unedited()
    stopped = _run(sequences, marks, progress, say)
    bench.results.write_tables(marks[-1])
    return Outcome(out, tuple(bench.results.table(marks[-1])), stopped)


def _checkpoints(given: Sequence[int], edits: int | None, batch_size: int) -> list[int]:
    """Ascending, the number of edits among them; none if neither is given."""
    marks = sorted({*given, *([edits] if edits else [])})
    for mark in marks:
        if mark < 1:
            raise InputError(f"--checkpoints {mark}: a checkpoint is a number of edits, 1 or more")
        if edits and mark > edits:
            raise InputError(f"--checkpoints {mark}: beyond the {edits} facts of --edits; raise it, or leave that out")
        if mark % batch_size and mark != marks[-1]:
            raise InputError(f"--checkpoints {mark}: in the middle of a batch; give a multiple of {batch_size}")
    return marks


def _read(data: str, chosen: ModelChoice, count: int | None, zsre_target: Any, skip_bad: bool) -> FactFile:
    tokenizer = load_tokenizer(chosen.name)
    read = read_facts(
        data,
        zsre_target=zsre_target,
        skip_bad=skip_bad,
        token_count=lambda target: count_tokens(tokenizer, target),
        limit=count,
    )
    if count and (there := len(read.facts)) < count:
        raise InputError(f"{read.path}: {there} facts, and --edits or --checkpoints ask for {count}; ask for fewer")
    return read


def _run(sequences: Sequence[_Sequence], marks: Sequence[int], progress: Progress, say: Say) -> dict[str, str]:
    """Every method to its last checkpoint; one that cannot go on does not keep the others from it."""
    todo = {sequence.name: sequence.missing(marks) for sequence in sequences}
    starts = {s.name: s.start_for(todo[s.name][0])[0] for s in sequences if todo[s.name]}
    clock, stopped = _Clock(todo, starts), dict[str, str]()
    for sequence in sequences:
        left = todo[sequence.name]
        while left:
            try:
                patch = sequence.run_to(left[0], clock, progress)
            except PatchkitError as error:
                stopped[sequence.name] = f"stopped on the way to {left[0]} edits: {error}"
                say(f"{sequence.name}: {stopped[sequence.name]}")
                left.clear()
                continue
            row = sequence.add_row(left.pop(0), patch, clock, progress)
            say(f"{_in_words(row)}; {clock.estimate()}")
    return stopped


def _in_words(row: Row) -> str:
    score = "-" if row.score is None else f"{row.score:.3f}"
    return f"{row.method}, {counted(row.edits, 'edit')}: score {score}, {summary_line(row)}"
