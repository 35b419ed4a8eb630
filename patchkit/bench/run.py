"""The papers' sequential benchmark: methods edit fact after fact; at checkpoints all facts so far are measured.

OUT/
  results.jsonl           one `Result` per method and checkpoint, and one of the unedited model
  table.md, table.csv     the same for people
  <method>/<edits>/       the patch after so many edits, a patch like any other
  <method>/<edits>.json   what `verify` found with it, fact by fact
  <method>/<edits>.states.json   how far hidden states have moved
  run.json                what was asked for: facts, recipes, versions
  judged.jsonl            what a judge said
  <method>/unfinished/    the patch between two checkpoints

What is there already is not computed again, and a run that was killed goes on from the last patch it saved: continuing
a patch is bit for bit the same as never having stopped. Of several processes (`patchkit.ranks`) all edit, and the first
one alone measures and writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch
import transformers

from patchkit.bench.abilities import Abilities
from patchkit.bench.judge import Judge
from patchkit.bench.measuring import Bench
from patchkit.bench.method import SAVE_EVERY, Clock, MethodRun
from patchkit.bench.records import Result
from patchkit.bench.results import Results
from patchkit.editing.editor import Progress
from patchkit.editing.recipe import LOCATE, EditConfig, load_recipe
from patchkit.editing.session import plan
from patchkit.errors import InputError, PatchkitError
from patchkit.evaluate.metrics import summary_line
from patchkit.facts.chat import chat_template
from patchkit.facts.limits import GENERATED, Limits, fitting
from patchkit.facts.reader import read_facts
from patchkit.facts.schema import FactFile
from patchkit.model.loading import ModelChoice
from patchkit.ranks import Lost, world
from patchkit.runs.settle import located
from patchkit.version import patchkit_version
from patchkit.words import counted

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What `patchkit bench` prints; `stopped` says of methods that could not go on why."""

    folder: Path
    rows: tuple[Result, ...]
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
    overrides: Sequence[str] = (),
    text: str | None = None,
    eval_text: str | None = None,
    stats: str | None = None,
    zsre_target: Any = "alt",
    skip_bad: bool = False,
    save_every: int = SAVE_EVERY,
    quick: bool = False,
    judge: str | None = None,
    judge_model: str = "default",
    abilities: Sequence[str] = (),
    abilities_limit: int | None = None,
    progress: Progress = lambda phase, done, total: None,
    say: Say = lambda line: None,
) -> Outcome:
    """Edit the first `edits` facts of `data` with each of `methods`, measure at the checkpoints, write it all to `out`.

    Args:
        edits: without it the last checkpoint, or else all facts; always a checkpoint itself.
        batch_size: facts solved for together; checkpoints are whole batches, but for the last one.
        recipe, overrides: as in `patchkit.apply`, for all methods alike.
        text, eval_text: plain text for the statistics, and for the perplexity.
        save_every: batches after which a patch is saved on the way to the next checkpoint.
        quick: the model writes no texts to measure (the group in_use), and no states are compared, at any checkpoint.
        judge: address of an OpenAI-compatible server that judges the answers, and judge_model, the model it is asked
            for; what it says is kept in judged.jsonl, and asked for once.
        abilities: tasks of lm-eval to ask at each checkpoint, and abilities_limit, how many questions of each.
        say: told of every row, with an estimate of the time left.

    Raises:
        InputError: anything about the input, or `out` holds results of another configuration; nothing was done then.
    """
    if judge and quick:
        raise InputError("--judge: with --quick no answers are written that could be judged; leave out one of the two")
    if "batch_size" in (override.partition("=")[0].strip() for override in overrides):
        raise InputError("--set batch_size: checkpoints have to be whole batches here; give --batch-size instead")
    overrides = (*overrides, f"batch_size={batch_size}")
    tasks = Abilities.of(abilities, abilities_limit) if abilities else None
    configs = {name: load_recipe(name, recipe, overrides, once=True) for name in dict.fromkeys(methods)}
    marks = _checkpoints(checkpoints, edits, batch_size)
    read = _read(data, chosen, marks[-1] if marks else None, zsre_target, skip_bad)
    if read.rejected:
        say(f"{counted(len(read.rejected), 'bad fact')} left out")
    marks = marks or [len(read.facts)]
    loaded = chosen.load()
    title = f"{PurePath(loaded.name).name}, {PurePath(read.path).name} in batches of {batch_size}"
    judging = Judge(judge, out / "judged.jsonl", judge_model) if judge else None
    bench = Bench(loaded, read.facts, Results(out, title), text, eval_text, progress, quick, judging, tasks)
    configs = _located(bench, configs, say)
    options = {"recipe": recipe, "stats": stats}
    runs = [
        MethodRun(bench, name, each, {**options, "overrides": (*overrides, f"layers={each.layers}")}, save_every)
        for name, each in configs.items()
    ]
    for run in runs:
        plan(bench.runner.arch, run.config)  # a layer that the model does not have
    world().from_first(lambda: _begin(bench, runs, _asked_for(bench, read, marks, configs), marks))
    stopped = _run(runs, marks, say)
    return Outcome(out, world().from_first(lambda: _ended(bench.results, marks[-1])), stopped)


def _begin(bench: Bench, runs: Sequence[MethodRun], asked_for: Mapping[str, Any], marks: Sequence[int]) -> None:
    """Refuse a folder of another run, and add what is there before anything is edited."""
    bench.refuse_others({run.name: run.config.digest() for run in runs})
    for run in runs:
        run.refuse_others()
    bench.results.folder.mkdir(parents=True, exist_ok=True)
    bench.results.note(asked_for)
    bench.add_unedited()
    for run in runs:
        run.catch_up(marks)


def _ended(results: Results, facts: int) -> tuple[Result, ...]:
    results.write_tables(facts)
    return tuple(results.table(facts))


def _located(bench: Bench, configs: Mapping[str, EditConfig], say: Say) -> dict[str, EditConfig]:
    """The recipes with layers=locate settled, by tracing the first facts once for all methods and stretches."""
    traced = next((config for config in configs.values() if config.layers == LOCATE), None)
    if traced is None:
        return dict(configs)
    layers = {"layers": located(traced, bench.runner, bench.tokenizer, bench.facts, bench.progress, say).layers}
    return {name: each.model_copy(update=layers if each.layers == LOCATE else {}) for name, each in configs.items()}


def _checkpoints(given: Sequence[int], edits: int | None, batch_size: int) -> list[int]:
    """Ascending, the number of edits among them; none if neither is given."""
    marks = sorted({*given, *([edits] if edits else [])})
    for mark in marks:
        if mark < 1:
            raise InputError(f"--checkpoints {mark}: a checkpoint is a number of edits, 1 or more")
        if edits and mark > edits:
            raise InputError(
                f"--checkpoints {mark}: beyond the {counted(edits, 'fact')} of --edits; raise it, or leave that out"
            )
        if mark % batch_size and mark != marks[-1]:
            raise InputError(f"--checkpoints {mark}: in the middle of a batch; give a multiple of {batch_size}")
    return marks


def _read(data: str, chosen: ModelChoice, count: int | None, zsre_target: Any, skip_bad: bool) -> FactFile:
    tokenizer = chosen.tokenizer()
    read = read_facts(
        data,
        zsre_target=zsre_target,
        skip_bad=skip_bad,
        check=fitting(tokenizer, Limits.of(chosen.config()), GENERATED),
        limit=count,
        chat=chat_template(tokenizer),
    )
    if count and (there := len(read.facts)) < count:
        raise InputError(
            f"{read.path}: {counted(there, 'fact')}, and --edits or --checkpoints ask for {count}; ask for fewer"
        )
    return read


def _asked_for(bench: Bench, read: FactFile, marks: Sequence[int], configs: Mapping[str, EditConfig]) -> dict[str, Any]:
    """The facts, recipes with their seeds, and versions: what somebody else needs to run it again."""
    return {
        "model": PurePath(str(bench.model.config._name_or_path)).name,
        "data": PurePath(read.path).name,
        "facts": [fact.id for fact in bench.facts],
        "checkpoints": list(marks),
        "methods": {name: config.model_dump(mode="json") for name, config in configs.items()},
        "quick": bench.quick,
        "judge": bench.judge.model if bench.judge else None,
        "abilities": list(bench.abilities.tasks) if bench.abilities else [],
        "versions": {
            "patchkit": patchkit_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({"lm-eval": version("lm-eval")} if bench.abilities else {}),
        },
    }


def _run(runs: Sequence[MethodRun], marks: Sequence[int], say: Say) -> dict[str, str]:
    """Every method to its last checkpoint; one that cannot go on does not keep the others from it."""
    todo = world().from_first(lambda: {run.name: run.missing(marks) for run in runs})
    starts = world().from_first(lambda: {s.name: s.start_for(todo[s.name][0])[0] for s in runs if todo[s.name]})
    clock, stopped = Clock(todo, starts), dict[str, str]()
    for run in runs:
        left = todo[run.name]
        while left:
            try:
                patch = run.run_to(left[0], clock)
            except Lost:
                raise
            except PatchkitError as error:
                stopped[run.name] = f"stopped on the way to {counted(left[0], 'edit')}: {error}"
                say(f"{run.name}: {stopped[run.name]}")
                left.clear()
                continue
            mark = left.pop(0)
            row = world().from_first(lambda: run.add_row(mark, patch, clock))  # noqa: B023
            say(f"{_in_words(row)}; {clock.estimate()}")
    return stopped


def _in_words(row: Result) -> str:
    score = "-" if row.score is None else f"{row.score:.3f}"
    asked = "".join(f", {name} {each.value:.3f}" for name, each in row.abilities.items())
    judged = "" if row.judged is None else f", judged {row.judged:.1%}"
    return f"{row.method}, {counted(row.edits, 'edit')}: score {score}, {summary_line(row)}{judged}{asked}"
