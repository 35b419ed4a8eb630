"""Fact files: JSON in, validated facts out; every refusal names the file, the line and the field.

The format of each record is recognized by its fields (`patchkit.facts.layouts`).

Prompts are kept as they are written, and surrounding whitespace of targets and subjects is dropped: what comes between
the two is decided where they are joined (`patchkit.facts.text`). An optional field that is null or blank is absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from patchkit.errors import InputError
from patchkit.facts.layouts import Layout, Options, ZsreTarget, layouts, recognize
from patchkit.facts.record import Record, Refused, quote, wrong_type
from patchkit.facts.schema import Fact, FactFile, Rejected
from patchkit.facts.sources import Entry, file_entries, object_entries
from patchkit.facts.text import same_wording

_SHOWN = 20  # problems printed before "and N more"


def read_facts(
    path: str | Path,
    *,
    zsre_target: ZsreTarget = "alt",
    skip_bad: bool = False,
    token_count: Callable[[str], int] | None = None,
    limit: int | None = None,
    needs_subject: bool = True,
) -> FactFile:
    """Reads a file of facts: one JSON object a line, or one JSON array (told apart by the content, not the name).

    `path` "-" is standard input. `zsre_target` picks what a ZsRE record teaches: "alt", the counterfactual answer, with
    `pred` (the answer before the edit) as `target_true`; or "answers", the first true answer, with no `target_true`.
    `token_count` says how many tokens a text becomes, so that a target that vanishes is refused here. Reading stops
    after `limit` usable facts. With `skip_bad`, records that cannot be used are returned in `rejected`. Without
    `needs_subject`, the subject of a record that has none is its whole prompt.

    Of two records alike in everything one is kept; a later record with an earlier one's prompt or id is refused.

    Raises InputError with one line per unusable record, or when there is no usable fact at all.
    """
    known = layouts(Options(zsre_target, needs_subject))
    name, entries = file_entries(path)
    return _Reading(name, f"{name} ", "--skip-bad", known, token_count).run(entries, limit, skip_bad)


def parse_facts(
    records: Iterable[Mapping[str, Any] | Fact],
    *,
    zsre_target: ZsreTarget = "alt",
    skip_bad: bool = False,
    token_count: Callable[[str], int] | None = None,
    limit: int | None = None,
    needs_subject: bool = True,
) -> FactFile:
    """`read_facts` for records already in memory, as mappings or `Fact`s; messages say `facts[3]` for the fourth.

    Raises InputError as `read_facts` does.
    """
    if isinstance(records, (Mapping, BaseModel, str, bytes)):
        raise InputError("facts: expected a list of facts, found a single value; put it in a list")
    reading = _Reading("facts", "", "skip_bad=True", layouts(Options(zsre_target, needs_subject)), token_count)
    return reading.run(object_entries(records), limit, skip_bad)


def write_rejected(path: str | Path, rejected: Iterable[Rejected]) -> None:
    """Writes one JSON object a line, {"line", "field", "error", "record"}; the file appears whole or not at all.

    `record` is the original record, or its text where that is not JSON. Raises InputError if the path is unwritable.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.writelines(_rejected_line(item) for item in rejected)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{target}: cannot be written ({error.strerror}); name a file in a writable folder") from error


def _rejected_line(item: Rejected) -> bytes:
    try:
        record = json.loads(item.raw)
    except (ValueError, RecursionError):
        record = item.raw
    shown = {"line": item.line, "field": item.field, "error": item.message, "record": record}
    # A lone surrogate becomes its own JSON escape this way, and everything else stays readable.
    return (json.dumps(shown, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@dataclass
class _Reading:
    """Facts and refusals gathered so far, and where each prompt and id was seen."""

    name: str
    prefix: str
    skip_option: str
    known: tuple[Layout, ...]
    token_count: Callable[[str], int] | None
    count: int = 0
    facts: list[Fact] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    formats: set[str] = field(default_factory=set)
    prompts: dict[str, tuple[Fact, str]] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def run(self, entries: Iterator[Entry], limit: int | None, skip_bad: bool) -> FactFile:
        if limit is not None and limit < 1:
            raise InputError(f"limit: expected at least 1, found {limit}")
        for entry in entries:
            self.count += 1
            self._take(entry)
            if len(self.facts) == limit:
                break
        if self.count == 0:
            raise InputError(
                f"{self.name}: no facts in it; a fact is one JSON object a line, such as "
                '{"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target_new": "Rome"}'
            )
        if self.problems and not (skip_bad and self.facts):
            raise InputError(self._report(skip_bad))
        (layout,) = self.formats if len(self.formats) == 1 else {"mixed"}
        return FactFile(tuple(self.facts), tuple(self.rejected), self.name, layout, tuple(self.lines))

    def _take(self, entry: Entry) -> None:
        try:
            fact, layout = self._fact(entry.value)
            if self._is_repeat(fact, layout):
                return
        except Refused as bad:
            at = f"{bad.field}: " if bad.field else ""
            self.problems.append(f"{self.prefix}{entry.where}: {at}{bad.message}")
            self.rejected.append(Rejected(entry.line, bad.field, bad.message, entry.raw))
            return
        self.facts.append(fact)
        self.lines.append(entry.line)
        self.formats.add(layout.name)
        self.prompts[same_wording(fact.prompt)] = fact, entry.where
        self.ids[fact.id] = entry.where

    def _fact(self, value: object) -> tuple[Fact, Layout]:
        if isinstance(value, Refused):
            raise value
        if not isinstance(value, Mapping):
            wrong_type(None, "a JSON object", value)
        record = Record(value)
        layout = recognize(record, self.known)
        fact = layout.read(record)
        if self.token_count is not None and self.token_count(f" {fact.target_new}") == 0:
            raise Refused(layout.target_new, f"{quote(fact.target_new)} becomes no token; put visible text in it")
        return fact, layout

    def _is_repeat(self, fact: Fact, layout: Layout) -> bool:
        """Whether an equal fact is there already. Raises Refused for one that clashes with an earlier fact."""
        earlier, where = self.prompts.get(same_wording(fact.prompt), (None, ""))
        if earlier == fact:
            return True
        if earlier is not None and earlier.target_new == fact.target_new:
            raise Refused(layout.prompt, f"repeats the prompt and target of {where} with other details; merge the two")
        if earlier is not None:
            raise Refused(
                layout.target_new,
                f"{quote(fact.target_new)} contradicts {where}, where the target of the same prompt "
                f"{quote(fact.prompt)} is {quote(earlier.target_new)}; keep one of them",
            )
        if fact.id in self.ids:
            raise Refused(layout.id, f"{quote(fact.id)} is taken by {self.ids[fact.id]}; give each fact its own id")
        return False

    def _report(self, skip_bad: bool) -> str:
        lines = [f"{self.name}: {len(self.problems)} of {self.count} facts cannot be used", *self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"and {len(self.problems) - _SHOWN} more")
        if skip_bad:
            lines.append("no usable fact is left")
        elif self.facts:
            lines.append(f"correct them, or leave them out with {self.skip_option}")
        else:
            lines.append(f"correct them ({self.skip_option} would leave no fact at all)")
        return "\n".join(lines)
