"""Fact files: JSON in, validated facts out; every refusal names the file, the line and the field.

The format of each record is recognized by its fields (`patchkit.facts.layouts`).

Prompts are kept as they are written, and surrounding whitespace of targets and subjects is dropped: what comes between
the two is decided where they are joined (`patchkit.facts.text`). An optional field that is null or blank is absent.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from patchkit.errors import InputError
from patchkit.facts.chat import ChatTemplate
from patchkit.facts.checks import Check, tidied, visible
from patchkit.facts.containers import Entry
from patchkit.facts.layout import Layout, Options, ZsreTarget
from patchkit.facts.layouts import layouts, recognize
from patchkit.facts.record import Record, Refused, quote, wrong_type
from patchkit.facts.schema import Fact, FactFile, Rejected
from patchkit.facts.sources import file_entries, object_entries
from patchkit.facts.text import same_wording
from patchkit.facts.typed import typed_entries
from patchkit.words import counted, listed

_SHOWN = 20  # problems printed before "and N more"
_NAME = 40  # characters of a field's name in a note


def read_facts(
    path: str | Path,
    *,
    zsre_target: ZsreTarget = "alt",
    skip_bad: bool = False,
    token_count: Callable[[str], int] | None = None,
    check: Check | None = None,
    limit: int | None = None,
    needs_subject: bool = True,
    subjectless: Sequence[str] = (),
    chat: ChatTemplate | None = None,
    find_subject: Callable[[str], str | None] | None = None,
) -> FactFile:
    """Read a file of facts, in any of the formats and kinds of file in docs/formats.md.

    Of two records alike in everything one is kept; a later record with an earlier one's prompt or id is refused.

    Args:
        path: a file, "-" for standard input, or "hf://datasets/ORG/NAME/FILE" on the Hub.
        zsre_target: what a ZsRE record teaches: "alt", the counterfactual answer, with `pred` (the answer before the
            edit) as `target_true`; or "answers", the first true answer, with no `target_true`.
        skip_bad: return records that cannot be used in `rejected` instead of refusing the file.
        token_count: how many tokens a text becomes, so that a target that vanishes is refused here.
        check: refuses whatever else a tokenizer or a model cannot take (`patchkit.facts.limits`).
        limit: stop after that many usable facts.
        needs_subject: False makes the whole prompt the subject of a record that has none.
        subjectless: names of the methods that take a fact without a subject, for the refusal.
        chat: the template that facts with `messages` are written in.
        find_subject: proposes a subject for the prompt of a record that has none, or None.

    Returns:
        A `FactFile`: the facts, their lines, the format, what was rejected, and notes for the user.

    Raises:
        InputError: one line per unusable record, or no usable fact at all.

    Examples:
        >>> read = patchkit.read_facts("examples/facts.jsonl", limit=2)
        >>> read.format, read.lines
        ('native', (1, 2))
        >>> read.facts[0].prompt, read.facts[0].target_new
        ('Pine Kelmel was born in the city of', 'Liscombe')
    """
    known = layouts(Options(zsre_target, needs_subject, tuple(subjectless), chat, find_subject))
    name, entries, digest = file_entries(path)
    reading = _Reading(name, f"{name} ", "--skip-bad", known, _all_checks(token_count, check))
    return replace(reading.run(entries, limit, skip_bad), digest=digest)


def parse_facts(
    records: Iterable[Mapping[str, Any] | Fact],
    *,
    zsre_target: ZsreTarget = "alt",
    skip_bad: bool = False,
    token_count: Callable[[str], int] | None = None,
    check: Check | None = None,
    limit: int | None = None,
    needs_subject: bool = True,
    subjectless: Sequence[str] = (),
    chat: ChatTemplate | None = None,
    find_subject: Callable[[str], str | None] | None = None,
) -> FactFile:
    """`read_facts` for records already in memory, as mappings or `Fact`s; messages say `facts[3]` for the fourth.

    Args and errors are those of `read_facts`.
    """
    if isinstance(records, (Mapping, BaseModel, str, bytes)):
        raise InputError("facts: expected a list of facts, found a single value; put it in a list")
    known = layouts(Options(zsre_target, needs_subject, tuple(subjectless), chat, find_subject))
    reading = _Reading("facts", "", "skip_bad=True", known, _all_checks(token_count, check))
    return reading.run(object_entries(records), limit, skip_bad)


def read_typed(
    texts: Sequence[str],
    *,
    skip_bad: bool = False,
    check: Check | None = None,
    needs_subject: bool = True,
    subjectless: Sequence[str] = (),
    chat: ChatTemplate | None = None,
    find_subject: Callable[[str], str | None] | None = None,
    name: str = "--fact",
) -> FactFile:
    """`read_facts` for facts that were typed in the form "prompt | subject | target"; several are counted
    from 1, after the name of what they were typed as."""
    known = layouts(Options("alt", needs_subject, tuple(subjectless), chat, find_subject))
    reading = _Reading(name, "", "--skip-bad", known, _all_checks(None, check), typed=True)
    return reading.run(typed_entries(texts, name), None, skip_bad)


def _all_checks(token_count: Callable[[str], int] | None, check: Check | None) -> Check:
    checks = [one for one in (visible(token_count) if token_count else None, check) if one]

    def all_checks(fact: Fact) -> None:
        for one in checks:
            one(fact)

    return all_checks


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
    check: Check
    typed: bool = False
    count: int = 0
    facts: list[Fact] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    formats: set[str] = field(default_factory=set)
    prompts: dict[str, tuple[Fact, str]] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    def run(self, entries: Iterator[Entry], limit: int | None, skip_bad: bool) -> FactFile:
        if limit is not None and limit < 1:
            raise InputError(f"limit: expected at least 1, found {limit}")
        for entry in entries:
            self.count += 1
            self._take(entry)
            if limit is not None and len(self.facts) >= limit:
                break
        if self.count == 0:
            raise InputError(
                f"{self.name}: no facts in it; a fact is one JSON object a line, such as "
                '{"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target_new": "Rome"}'
            )
        if self.problems and not (skip_bad and self.facts):
            raise InputError(self._report(skip_bad))
        (layout,) = self.formats if len(self.formats) == 1 else {"mixed"}
        kept = tuple(self.facts[:limit]), tuple(self.lines[:limit])
        return FactFile(kept[0], tuple(self.rejected), self.name, layout, kept[1], tuple(self._notes()))

    def _take(self, entry: Entry) -> None:
        """Take the facts of one record, or refuse it as a whole."""
        try:
            record = _record(entry.value)
            layout = recognize(record, self.known)
            facts = [(self._checked(layout, part), part) for part in layout.split(record)]
            if not facts:
                raise Refused(None, f"a {layout.name} record without a fact in it; leave it out")
            new = [(fact, part) for fact, part in facts if not self._is_repeat(fact, layout, part)]
        except Refused as bad:
            at = f"{bad.field}: " if bad.field else ""
            self.problems.append(f"{self.prefix}{entry.where}: {at}{bad.message}")
            self.rejected.append(Rejected(entry.line, bad.field, bad.message, entry.raw))
            return
        self.formats.add(layout.name)
        unused = set(record.unused()) - set(layout.metadata)
        self.unused.update({name for name in unused if name.rpartition(".")[2] not in layout.metadata})
        for fact, _ in new:
            self._add(fact, entry)

    def _add(self, fact: Fact, entry: Entry) -> None:
        fact, remarks = tidied(fact)
        for remark in remarks:
            self.remarks.setdefault(remark, []).append(entry.where)
        self.facts.append(fact)
        self.lines.append(entry.line)
        self.prompts[same_wording(fact.prompt)] = fact, entry.where
        self.ids[fact.id] = entry.where

    def _checked(self, layout: Layout, part: Record) -> Fact:
        fact = layout.read(part)
        try:
            self.check(fact)
        except Refused as bad:  # by the name of the fact's field, which in the file may have another
            name, bracket, place = str(bad.field).partition("[")
            own = getattr(layout, name, None)
            name = part.named(own if isinstance(own, str) else name)
            raise Refused(f"{name}{bracket}{place}", bad.message) from None
        return fact

    def _is_repeat(self, fact: Fact, layout: Layout, part: Record) -> bool:
        """Whether an equal fact is there already. Raises Refused for one that clashes with an earlier fact."""
        earlier, where = self.prompts.get(same_wording(fact.prompt), (None, ""))
        if earlier == tidied(fact)[0]:
            return True
        if earlier is not None and earlier.target_new == fact.target_new:
            message = f"repeats the prompt and target of {where} with other details; merge the two"
            raise Refused(part.named(layout.prompt), message)
        if earlier is not None:
            raise Refused(
                part.named(layout.target_new),
                f"{quote(fact.target_new)} contradicts {where}, where the target of the same prompt "
                f"{quote(fact.prompt)} is {quote(earlier.target_new)}; keep one of them",
            )
        if fact.id in self.ids:
            message = f"{quote(fact.id)} is taken by {self.ids[fact.id]}; give each fact its own id"
            raise Refused(part.named(layout.id), message)
        return False

    def _notes(self) -> Iterator[str]:
        if self.unused:
            named = [f"{name[:_NAME]} ({counted(count, 'record')})" for name, count in self.unused.most_common()]
            yield f"{self.name}: not used: {listed(named)}"
        for remark, places in self.remarks.items():
            yield f"{self.name}: {remark}: {listed(places)}"

    def _report(self, skip_bad: bool) -> str:
        if self.typed and self.count == 1:
            return self.problems[0]
        them = "it" if len(self.problems) == 1 else "them"
        lines = [f"{self.name}: {len(self.problems)} of {counted(self.count, 'fact')} cannot be used"]
        lines += self.problems[:_SHOWN]
        if len(self.problems) > _SHOWN:
            lines.append(f"and {len(self.problems) - _SHOWN} more")
        if skip_bad:
            lines.append("no usable fact is left")
        elif self.facts:
            lines.append(f"correct {them}, or leave {them} out with {self.skip_option}")
        else:
            lines.append(f"correct {them} ({self.skip_option} would leave no fact at all)")
        return "\n".join(lines)


def _record(value: object) -> Record:
    if isinstance(value, Refused):
        raise value
    if not isinstance(value, Mapping):
        wrong_type(None, "a JSON object", value)
    return Record(value)
