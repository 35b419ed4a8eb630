"""One method's way through the benchmark's facts."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from patchkit.api import apply
from patchkit.bench.health import weight_drift
from patchkit.bench.measuring import Bench
from patchkit.bench.records import Result
from patchkit.editing.recipe import EditConfig
from patchkit.errors import InputError
from patchkit.facts.schema import Fact
from patchkit.patch.manifest import Manifest
from patchkit.patch.patch import Patch, read_manifest
from patchkit.ranks import world
from patchkit.runs.settle import departures
from patchkit.words import listed

SAVE_EVERY = 10


@dataclass
class Clock:
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


@dataclass(frozen=True)
class MethodRun:
    """One method's way through the facts.

    Attributes:
        config: the recipe, its layers located.
        options: of `patchkit.apply`.
        save_every: batches after which a patch is saved on the way to the next checkpoint.
    """

    bench: Bench
    name: str
    config: EditConfig
    options: Mapping[str, Any]
    save_every: int = SAVE_EVERY

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

    def run_to(self, mark: int, clock: Clock) -> Patch:
        """Edit on up to the first `mark` facts. Every patch on the way is saved, and only those at checkpoints kept.

        Raises:
            InputError: an edit is not finite.
        """
        count, folder = world().from_first(lambda: self.start_for(mark))
        patch = Patch.load(folder) if folder else None
        while patch is None or count < mark:
            stop = min(mark, count + self.save_every * self.config.batch_size)
            with clock.timed("edit", stop - count):
                patch = self._apply(patch, count, stop)
            if world().first:
                patch.save(self.folder / (str(mark) if stop == mark else "unfinished"))
            count = clock.at[self.name] = stop
        if world().first:
            shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
        return patch

    def _apply(self, onto: Patch | None, count: int, stop: int) -> Patch:
        """Edit facts up to `stop`. Values depend on what was edited before them, so those of methods that start alike
        (same sites, value settings and contexts) are shared for the first batch and for no other."""
        bench = self.bench

        def passed_on(phase: str, done: int, total: int) -> None:
            if phase == "editing":
                phase, done, total = self.name, count + done, len(bench.facts)
            bench.progress(phase, done, total)

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

    def add_row(self, mark: int, patch: Patch, clock: Clock) -> Result:
        """Measure `patch` after `mark` edits and write down what was found."""
        bench, folder, began = self.bench, self.folder / str(mark), time.perf_counter()
        with clock.timed("measure", mark):
            report = bench.measure(mark, lambda: patch.attached(bench.model))
            drifts = weight_drift(bench.model, patch, bench.spectra)
            states = bench.states(lambda: patch.attached(bench.model))
            moved = bench.text_kl(lambda: patch.attached(bench.model))
        row = Result.of(
            self.name,
            mark,
            report,
            bench.setup(mark, self.config.digest()),
            drifts,
            bytes=(folder / "patch.safetensors").stat().st_size,
            rank=_rank(patch.manifest),
            shift=states.shift if states else (),
            text_kl=moved,
            seconds={**_phases(patch.manifest), "measuring": round(time.perf_counter() - began, 3)},
        )
        patch.with_metrics(report.summary(), report.outcomes()).save(folder)
        bench.results.add(row, report, len(bench.facts), states)
        with clock.timed("measure", 0):
            return bench.with_abilities(bench.with_verdicts(row), lambda: patch.attached(bench.model))

    def catch_up(self, checkpoints: Sequence[int]) -> None:
        """Ask what rows that are there already lack of the judge's verdicts and of the tasks of lm-eval.

        Raises:
            InputError: the answers or the patch of such a row are gone.
            PatchkitError: the judge does not answer.
        """
        bench = self.bench
        for found in (bench.results.find(self.name, mark, mark) for mark in checkpoints):
            row = bench.with_verdicts(found) if found else None
            if row and bench.abilities and bench.abilities.lacking(row):
                patch = Patch.load(self.folder / str(row.edits))
                bench.with_abilities(row, partial(patch.attached, bench.model))

    def _saved(self) -> Iterator[tuple[Path, Manifest]]:
        for file in sorted(self.folder.glob("*/manifest.json")):
            if not file.parent.name.startswith("."):  # what a killed run was about to write
                yield file.parent, read_manifest(file.parent)

    def _difference(self, manifest: Manifest) -> str | None:
        ours = [Fact.model_validate(f.model_dump(include=set(Fact.model_fields))) for f in manifest.facts]
        shared = min(len(ours), len(self.bench.facts))
        if tuple(ours[:shared]) != self.bench.facts[:shared]:
            return "other facts"
        if other := departures(self.config, manifest, self.bench.tokenizer, self.bench.runner.arch):
            return f"another recipe ({listed(other)})"
        text = self.bench.reading(self.config.uses_chat).record
        if not all(text.same_reading(run.text) for run in manifest.history):
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
