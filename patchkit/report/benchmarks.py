"""The page of a benchmark's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from patchkit.bench.records import UNEDITED, Result, States
from patchkit.bench.results import Results
from patchkit.bench.tables import Column, ability, most, shown_columns
from patchkit.errors import InputError
from patchkit.evaluate.metric import Metric
from patchkit.evaluate.metrics import metrics
from patchkit.evaluate.report import Report
from patchkit.report.charts import Cloud, Lines, Series
from patchkit.report.page import Page, Table
from patchkit.words import counted

_Kind = TypeVar("_Kind", bound=BaseModel)


def bench_page(folder: Path, facts: bool = True) -> Page:
    """What a benchmark has found so far; without `facts` the numbers alone, in a small page.

    Raises:
        InputError: no results there, or not of this version.
    """
    results = Results(folder, "")
    rows = results.table(max((row.facts for row in results.rows()), default=0))
    if not rows:
        raise InputError(f"{folder}: no results of `patchkit bench` in it")
    edited = [row for row in rows if row.method != UNEDITED]
    names = list(dict.fromkeys(row.method for row in edited))
    columns = shown_columns(rows)
    first, rest = _curves(edited, names)
    return Page(
        title=f"{counted(len(names), 'method')} after up to {counted(max(row.edits for row in rows), 'edit')}",
        lead=[f"{', '.join(names) or 'Nothing'} edited, and measured beside the untouched model ({folder.name})."],
        headline=None,
        charts=[*first, *_abilities(rows, names)],
        tables=[
            Table("All rows", [c.heading or "" for c in columns], [[_cell(c, row) for c in columns] for row in rows])
        ],
        reports=_reports(folder, edited) if facts else {},
        rest=[*rest, *_states(folder, edited)],
    )


def _cell(column: Column, row: Result) -> str:
    """A number, and where it lies in 95 of 100 samples of as many facts."""
    low, high = row.intervals.get(column.name, (None, None))
    return column.cell(row) + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def _last(rows: Sequence[Result]) -> dict[str, Result]:
    """Each method's row of its last checkpoint."""
    return {row.method: row for row in rows}


def _reports(folder: Path, edited: Sequence[Result]) -> dict[str, Report]:
    """Each method's report of its last checkpoint; a folder may hold rows alone, where somebody has kept no more."""
    found = {}
    for method, row in _last(edited).items():
        if (folder / method / f"{row.edits}.json").is_file():
            found[f"{method}, {counted(row.edits, 'edit')}"] = Results(folder, "").report(row)
    return found


def _read(file: Path, kind: type[_Kind]) -> _Kind:
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise InputError(f"{file}: not of this version: {error.errors()[0]['msg']}") from None


def _states(folder: Path, edited: Sequence[Result]) -> Iterator[Lines | Cloud]:
    """How far states have moved, by layer, and where they lie."""
    last = _last(edited)
    series = [Series(name, list(enumerate(map(float, row.shift)))) for name, row in last.items()]
    yield Lines(
        "shift of states",
        "layer",
        series,
        caption="‖h' - h‖/‖h‖ at the end of prompts about other things, after the last checkpoint.",
    )
    angles = [Series(name, list(enumerate(_angles(row)))) for name, row in last.items() if _angles(row)]
    yield Lines(
        "angle spectrum",
        "tenths of a weight's directions",
        angles,
        caption="Degrees by which the weight that is turned most is turned, after the last checkpoint.",
    )
    for name, row in last.items():
        file = folder / name / f"{row.edits}.states.json"
        if file.is_file():
            states = _read(file, States)
            groups = [Series("base", states.before), Series(name, states.after)]
            what = f"The last layer at the end of {counted(states.prompts, 'prompt')} about other things."
            yield Cloud(f"states after {name}", groups, what)


def _angles(row: Result) -> tuple[float, ...]:
    """Those of the weight that is turned most."""
    return max((drift.angles for drift in row.weights.values()), default=())


def _curves(rows: Sequence[Result], names: Sequence[str]) -> tuple[list[Lines], list[Lines]]:
    """A chart for each number, with a line for each method: those few that stand for all, and the others."""
    measured = [
        (metric.headline, _chart(rows, names, metric.label, metric.of, _caption(metric), _bounds(metric)))
        for metric in metrics()
    ]
    first = [chart for headline, chart in measured if headline]
    right = "Share of the answers that a judge takes for right."
    first.append(_chart(rows, names, "judged", lambda row: row.judged, right, (0.0, 1.0)))
    first += [_chart(rows, names, name, of, what) for name, of, what in _WEIGHTS]
    rest = [chart for headline, chart in measured if not headline]
    rest += [
        _chart(rows, names, field.replace("_", " "), partial(most, name=field), what)
        for field, what in _OF_WEIGHTS.items()
    ]
    return first, rest


def _caption(metric: Metric) -> str:
    """What a metric counts, as a sentence, and which way is better where less is."""
    less = " Lower is better." if metric.better == "down" else ""
    return f"{metric.what[:1].upper()}{metric.what[1:]}.{less}"


def _bounds(metric: Metric) -> tuple[float, float] | None:
    return (0.0, 1.0) if metric.share else None


def _abilities(rows: Sequence[Result], names: Sequence[str]) -> Iterator[Lines]:
    """A chart for each task of lm-eval; the untouched model's number is in words below it."""
    edited = [row for row in rows if row.method != UNEDITED]
    for task, first in {name: each for row in rows for name, each in row.abilities.items()}.items():
        base = next(
            (row.abilities[task].value for row in rows if row.method == UNEDITED and task in row.abilities), None
        )
        said = "" if base is None else f" The untouched model has {base:.3f}."
        what = f"{first.metric.split(',')[0]} of lm-eval's task, {counted(first.questions, 'question')}.{said}"
        yield _chart(edited, names, task, partial(ability, task=task), what)


_WEIGHTS: tuple[tuple[str, Callable[[Result], float | None], str], ...] = (
    ("text KL", lambda row: row.text_kl, "KL(base ‖ patched) on plain text, nats per token."),
    ("norm change", lambda row: row.norm_change, "Largest relative change of an edited weight's Frobenius norm."),
    ("condition change", lambda row: row.condition_change, "The same of its condition number."),
    ("rank", lambda row: row.rank, "Largest rank of the change of one weight."),
    ("seconds of editing", lambda row: _editing(row), "Since the first fact, without measuring."),
)


_OF_WEIGHTS = {
    "spectral": "Largest relative change of an edited weight's largest singular value.",
    "size": "Frobenius norm of the change over that of the weight, the largest.",
    "effective_rank": "exp of the entropy of the change's singular values.",
    "overlap": "Mean |cos| between the input directions of single facts' changes.",
    "angle": "Largest angle, in degrees, by which an edited weight is turned.",
    "activation": "What other facts' changes add to a fact's output, over that output's norm.",
}


def _editing(row: Result) -> float | None:
    spent = [seconds for phase, seconds in row.seconds.items() if phase != "measuring"]
    return sum(spent) if spent else None


def _chart(
    rows: Sequence[Result],
    names: Sequence[str],
    title: str,
    of: Callable[[Result], float | None],
    caption: str,
    bounds: tuple[float, float] | None = None,
) -> Lines:
    series = []
    for name in names:
        points = [(float(row.edits), value) for row in rows if row.method == name and (value := of(row)) is not None]
        series.append(Series(name, points))
    return Lines(title, "edits", series, bounds, caption)
