"""The folder with the benchmark's results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import ValidationError

from patchkit.bench.records import UNEDITED, Result, States
from patchkit.bench.tables import csv_table, markdown_table
from patchkit.errors import InputError
from patchkit.evaluate.report import Report
from patchkit.io.files import write_atomically
from patchkit.words import counted


class Results:
    """The rows in a folder. Runs in several processes may add to it at once, each with methods of its own."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self._title = folder, title
        self._file = folder / "results.jsonl"

    def rows(self) -> list[Result]:
        """All rows, in the order in which they were added.

        Raises:
            InputError: a line is no row.
        """
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        return [self._row(number, line) for number, line in enumerate(lines, 1)]

    def _row(self, number: int, line: str) -> Result:
        try:
            return Result.model_validate_json(line)
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise InputError(f"{self._file} line {number}: not a result of this version: {what}; delete it") from None

    def find(self, method: str, edits: int, facts: int) -> Result | None:
        """The row of `method` after `edits` edits, measured on `facts` facts."""
        return next((row for row in self.rows() if _place(row) == (method, edits, facts)), None)

    def table(self, facts: int) -> list[Result]:
        """The rows of a table of `facts` edits: the unedited model, then method by method; others stay out."""
        rows = [row for row in self.rows() if row.facts <= facts and (row.method != UNEDITED or row.facts == facts)]
        order = list(dict.fromkeys([UNEDITED, *(row.method for row in rows)]))
        return sorted(rows, key=lambda row: (order.index(row.method), row.edits))

    def add(self, row: Result, report: Report, facts: int, states: States | None = None) -> None:
        """Write a new row, its report, the states if there are any, and the tables of `facts` edits."""
        folder = self.folder / row.method
        whole = report.model_dump_json() + "\n"
        write_atomically(folder / f"{row.edits}.json", lambda path: _write(path, whole))
        if states:
            moved = states.model_dump_json() + "\n"
            write_atomically(folder / f"{row.edits}.states.json", lambda path: _write(path, moved))
        with FileLock(self.folder / ".lock"):
            self._write_rows([*self.rows(), row], facts)

    def report(self, row: Result) -> Report:
        """What was found with a row, fact by fact.

        Raises:
            InputError: it is gone, or not of this version.
        """
        file = self.folder / row.method / f"{row.edits}.json"
        try:
            return Report.model_validate_json(file.read_bytes())
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}; delete its row in {self._file}") from None
        except ValidationError as error:
            raise InputError(f"{file}: not of this version: {error.errors()[0]['msg']}") from None

    def replace(self, row: Result, facts: int) -> None:
        """Write a row in the place of the one that it was made of, and the tables of `facts` edits."""
        with FileLock(self.folder / ".lock"):
            self._write_rows([row if _place(known) == _place(row) else known for known in self.rows()], facts)

    def _write_rows(self, rows: Sequence[Result], facts: int) -> None:
        lines = "".join(f"{row.model_dump_json()}\n" for row in rows)
        write_atomically(self._file, lambda path: _write(path, lines))
        self.write_tables(facts)

    def note(self, run: Mapping[str, Any]) -> None:
        """Write down what a run was asked for, beside what earlier runs in the folder were: run.json, a list."""
        file = self.folder / "run.json"
        with FileLock(self.folder / ".lock"):
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
            if run not in known:
                text = json.dumps([*known, run], indent=1, ensure_ascii=False) + "\n"
                write_atomically(file, lambda path: _write(path, text))

    def write_tables(self, facts: int) -> None:
        """Write table.md and table.csv of `facts` edits."""
        rows = self.table(facts)
        markdown = f"{self._title}, {counted(facts, 'fact')}.\n\n{markdown_table(rows)}"
        write_atomically(self.folder / "table.md", lambda path: _write(path, markdown))
        write_atomically(self.folder / "table.csv", lambda path: _write(path, csv_table(rows)))

    def refuse_others(self, wanted: Callable[[str, int], Mapping[str, Any]]) -> None:
        """Refuse a folder that is no benchmark's, or a row whose setup is not as wanted for its method and number of
        facts, in the fields that `wanted` gives.

        Raises:
            InputError: the first such row, and what is different in it.
        """
        if self.folder.is_file() or (self.folder.is_dir() and not self._file.is_file() and any(self.folder.iterdir())):
            raise InputError(f"--out {self.folder}: it exists and holds no benchmark; choose another folder")
        for row in self.rows():
            other = [key for key, value in wanted(row.method, row.facts).items() if getattr(row.setup, key) != value]
            if other:
                what = " and ".join(other).replace("_", " ")
                raise InputError(
                    f"--out {self.folder}: its row of {row.method} after {counted(row.edits, 'edit')} is from a run "
                    f"with different {what}; choose another folder"
                )


def _place(row: Result) -> tuple[str, int, int]:
    return row.method, row.edits, row.facts


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
