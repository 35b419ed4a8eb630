"""Tables where there is no room for their columns."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

NARROW = 70
"""Columns of text below which a table is no longer read across."""


@dataclass(frozen=True)
class Adapting:
    """A table; where there are fewer columns of text than it takes, its rows one below the other, a line for each cell
    that has something in it."""

    table: Table
    takes: int = NARROW

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= self.takes:
            yield self.table
            return
        headings = [str(column.header) for column in self.table.columns]
        for first, *rest in zip(*(column.cells for column in self.table.columns), strict=True):
            yield Text(str(first), style="bold")
            for heading, cell in zip(headings[1:], rest, strict=True):
                if str(cell):
                    yield _line(heading, cell)


def _line(heading: str, cell: RenderableType) -> Text:
    text = cell if isinstance(cell, Text) else Text(str(cell))
    return Text.assemble(f"  {heading}: " if heading else "  ", text)
