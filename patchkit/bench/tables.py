"""Results as tables: Markdown, CSV, and for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from patchkit.bench.records import Result
from patchkit.evaluate.metric import Metric
from patchkit.evaluate.metrics import metrics


@dataclass(frozen=True)
class Column:
    """A column: its name in the CSV file, its heading for people (None: not for them), its value and how to show it."""

    name: str
    heading: str | None
    value: Callable[[Result], Any]
    form: str = ""

    def cell(self, row: Result) -> str:
        """The value as text for people."""
        value = self.value(row)
        return "-" if value is None else format(value, self.form)


def _columns(rows: Sequence[Result]) -> tuple[Column, ...]:
    """All columns, the metrics' as their table has them, and one for each task that some row has asked."""
    tasks = dict.fromkeys(name for row in rows for name in row.abilities)
    judged = any(row.judged is not None for row in rows)
    return (
        Column("method", "method", lambda r: r.method),
        Column("edits", "edits", lambda r: r.edits),
        Column("score", "score", lambda r: r.score, ".3f"),
        *(column for metric in metrics() for column in _of_metric(metric)),
        Column("text_kl", "text KL", lambda r: r.text_kl, ".3f"),
        Column("judged", "judged" if judged else None, lambda r: r.judged, ".3f"),
        *(column for task in tasks for column in _of_task(task)),
        Column("norm_change", "norm change", lambda r: r.norm_change, ".1e"),
        Column("condition_change", "condition change", lambda r: r.condition_change, ".1e"),
        *(Column(name, None, partial(most, name=name)) for name in ("spectral", "size", "effective_rank")),
        *(Column(name, None, partial(most, name=name)) for name in ("overlap", "activation", "angle")),
        Column("shift_last_layer", None, lambda r: r.shift[-1] if r.shift else None),
        Column("rank", "rank", lambda r: r.rank),
        Column("bytes", None, lambda r: r.bytes),
        Column("kilobytes", "kB", lambda r: None if r.bytes is None else r.bytes / 1e3, ",.0f"),
        Column("seconds_editing", "seconds", lambda r: _editing(r.seconds), ".1f"),
        Column("seconds_measuring", None, lambda r: r.seconds.get("measuring")),
    )


def _of_metric(metric: Metric) -> Iterator[Column]:
    """The metric, and where it lies in 95 of 100 samples of as many facts."""
    yield Column(metric.key, metric.column, metric.of, metric.decimals)
    yield from _ends(metric.key)


def _of_task(task: str) -> Iterator[Column]:
    """The number that stands for a task of lm-eval, and 1.96 standard errors on either side of it."""
    yield Column(f"ability_{task}", task, partial(ability, task=task), ".3f")
    yield from _ends(f"ability_{task}")


def ability(row: Result, task: str) -> float | None:
    """The number that stands for a task of lm-eval."""
    return row.abilities[task].value if task in row.abilities else None


def _ends(key: str) -> Iterator[Column]:
    for place, end in enumerate(("low", "high")):
        yield Column(f"{key}_{end}", None, partial(_end, key=key, place=place))


def _end(row: Result, key: str, place: int) -> float | None:
    return row.intervals[key][place] if key in row.intervals else None


def most(row: Result, name: str) -> float | None:
    """The largest of the edited weights, without sign."""
    found = [getattr(drift, name) for drift in row.weights.values()]
    return max((abs(value) for value in found if value is not None), default=None)


def shown_columns(rows: Sequence[Result]) -> tuple[Column, ...]:
    """Those for people."""
    return tuple(column for column in _columns(rows) if column.heading)


def _editing(seconds: Mapping[str, float]) -> float | None:
    phases = [spent for phase, spent in seconds.items() if phase != "measuring"]
    return sum(phases) if phases else None


def markdown_table(rows: Sequence[Result]) -> str:
    """One line per row, as Markdown; numbers to the right."""
    columns = shown_columns(rows)
    headings = " | ".join(column.heading or "" for column in columns)
    rules = "|".join(["---", *("---:" for _ in columns[1:])])
    body = "".join(f"| {' | '.join(column.cell(row) for column in columns)} |\n" for row in rows)
    return f"| {headings} |\n|{rules}|\n{body}"


def csv_table(rows: Sequence[Result]) -> str:
    """All columns, numbers in full; an empty cell for what is not known."""
    text, columns = io.StringIO(), _columns(rows)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in columns)
    writer.writerows([column.value(row) for column in columns] for row in rows)
    return text.getvalue()


def rich_table(rows: Sequence[Result]) -> Table:
    """The same as the Markdown, for a terminal."""
    table, columns = Table(box=None, padding=(0, 2, 0, 0), header_style="bold"), shown_columns(rows)
    for place, column in enumerate(columns):
        heading = (column.heading or "").replace(" ", "\n")
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table
