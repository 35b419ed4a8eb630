"""Formats of fact records: one class each, found by scanning this folder.

A format names its fields where they are a fact's parts one to one, and overrides what it keeps in another way:

    @layout
    class Flat(Layout):
        name = "flat"
        marks = (("question", "answer_new"),)
        prompt, target_new = "question", "answer_new"
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from patchkit.errors import InputError
from patchkit.facts.record import MISSING, Record, Refused, quote
from patchkit.facts.schema import Fact, Locality, Probe

ZsreTarget = Literal["alt", "answers"]


@dataclass(frozen=True)
class Options:
    """How records are read where there is a choice.

    zsre_target is what a ZsRE record teaches: "alt" or "answers". Without needs_subject, the subject of a record that
    has none is its whole prompt.
    """

    zsre_target: ZsreTarget = "alt"
    needs_subject: bool = True


class Layout:
    """One format: the dotted names under which it keeps the parts of a fact.

    marks are sets of fields; a record that has all of a set is of this format, unless another format recognizes it by
    more fields. metadata are fields that are known and say nothing about what is to be edited.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[tuple[str, ...], ...]]
    prompt: str = "prompt"
    subject: str = "subject"
    target_new: str = "target_new"
    target_true: str | None = None
    paraphrases: str | None = None
    rewordings: str | None = None
    questions: str | None = None
    about: str | None = None
    aliases: str | None = None
    id: str = "id"
    # Published data ends some prompts in a space by chance: its convention is that the target brings the space.
    drops_trailing_space: ClassVar[bool] = False
    optional: ClassVar[tuple[str, ...]] = ()
    foreign: ClassVar[tuple[str, ...]] = ()  # native fields that would be lost here without a word

    def __init__(self, options: Options) -> None:
        self.options = options

    @classmethod
    def fit(cls, record: Record) -> int:
        """By how many fields the record is recognized as one of this format; 0 where it is none."""
        return max((len(mark) for mark in cls.marks if all(name in record.value for name in mark)), default=0)

    def read(self, record: Record) -> Fact:
        """The fact of a record.

        Raises:
            Refused: a field is missing or holds what cannot be right.
        """
        self._refuse_missing(record)
        self._refuse_mixture(record)
        template, target = record.text(self.prompt), record.text(self.target_new).strip()
        subject = self._subject(record, template)
        prompt = self.filled(template, subject)
        if subject not in prompt:
            raise Refused(f"{record.at}{self.subject}", _absent_subject(subject, prompt))
        return Fact(
            id=record.identifier(self.id) or record.identifier("id") or _derived_id(prompt.rstrip(), target),
            prompt=prompt,
            subject=subject,
            target_new=target,
            target_true=self.true_target(record, target),
            aliases=tuple(text.strip() for text in record.texts(self.aliases) if text.strip()),
            rewordings=self._rewordings(record, subject),
            paraphrases=self.all_filled(record, self.paraphrases, subject),
            questions=self.all_filled(record, self.questions, subject),
            about=self.all_filled(record, self.about, subject),
            locality=self.locality(record),
            portability=self.portability(record),
            separator=record.optional_space("separator"),
            case=record.identifier("case"),
            source=record.optional("source"),
        )

    def filled(self, template: str, subject: str) -> str:
        """A text with the subject in the place of `{}`."""
        # A subject standing there as a word of its own means that "{}" is meant literally, as in a prompt about code;
        # inside a longer word ("Ha" in "has") it is a coincidence.
        if "{}" in template and not re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", template):
            template = template.replace("{}", subject)
        return template.rstrip(" \t") if self.drops_trailing_space else template

    def all_filled(self, record: Record, name: str | None, subject: str) -> tuple[str, ...]:
        """The texts of a field, blank ones left out, with the subject in the place of `{}`."""
        return tuple(self.filled(text, subject) for text in record.texts(name) if text.strip())

    def true_target(self, record: Record, target: str) -> str | None:
        """What the base should say before an edit to `target`, where that is known."""
        return record.optional(self.target_true)

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Prompts whose continuations an edit should leave alone."""
        return ()

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """What follows from the fact, in groups."""
        return {}

    def _required(self) -> tuple[str, ...]:
        return self.prompt, self.subject, self.target_new

    def _subject(self, record: Record, prompt: str) -> str:
        if not self.options.needs_subject and record.get(self.subject) in (None, MISSING):
            return prompt.strip()
        return record.text(self.subject).strip()

    def _rewordings(self, record: Record, subject: str) -> tuple[str, ...]:
        texts = [self.filled(text, subject) for text in record.texts(self.rewordings)]
        for i, text in enumerate(texts):
            if text.strip() and subject not in text:
                raise Refused(f"{record.at}{self.rewordings}[{i}]", _absent_subject(subject, text, "rewording"))
        return tuple(text for text in texts if text.strip())

    def _refuse_missing(self, record: Record) -> None:
        missing = [name for name in self._required() if record.get(name) is MISSING]
        if not self.options.needs_subject:
            missing = [name for name in missing if name != self.subject]
        if not missing:
            return
        message = f"missing (and {', '.join(missing[1:])})" if len(missing) > 1 else "missing"
        if self.optional and (close := record.similar(missing[0], (*self._required(), *self.optional))):
            message += f" (is it {quote(close)}?)"
        message += f"; a {self.name} record needs {', '.join(self._required())}"
        if self.optional:
            message += f" and may have {', '.join(self.optional)}"
        raise Refused(f"{record.at}{missing[0]}", message)

    def _refuse_mixture(self, record: Record) -> None:
        for name in self.foreign:
            if record.get(name) not in (None, MISSING):
                marks = (mark for marks in self.marks for mark in marks if mark not in self._required())
                own = quote(next(mark for mark in marks if mark in record.value))
                raise Refused(name, f"is a native field, but {own} makes this a {self.name} record; use one format")


_LAYOUTS: dict[str, type[Layout]] = {}


def layout(kind: type[Layout]) -> type[Layout]:
    """Class decorator: make a format known to every command."""
    _LAYOUTS[kind.name] = kind
    return kind


@cache
def _scan() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def layouts(options: Options) -> tuple[Layout, ...]:
    """Every known format.

    Raises:
        InputError: zsre_target is neither "alt" nor "answers".
    """
    if options.zsre_target not in ("alt", "answers"):
        raise InputError(f'zsre_target: expected "alt" or "answers", found {quote(str(options.zsre_target))}')
    _scan()
    return tuple(kind(options) for kind in _LAYOUTS.values())


def recognize(record: Record, known: tuple[Layout, ...]) -> Layout:
    """The format that most of the record's fields speak for; native where nothing does."""
    native = next(one for one in known if one.name == "native")
    return max((native, *known), key=lambda one: one.fit(record))


def pairs(record: Record, prompts: str, targets: str) -> tuple[Locality, ...]:
    """Prompts in one field, and what they are to say in another, as text or as lists of one length."""
    asked = record.texts(prompts)
    said: tuple[str | None, ...] = record.texts(targets) or (None,) * len(asked)
    if len(said) != len(asked):
        raise Refused(targets, f"has {len(said)} entries, but {prompts} has {len(asked)}; pair them up")
    both = zip(asked, said, strict=True)
    return tuple(Locality(prompt=p.rstrip(" \t"), target=(t or "").strip() or None) for p, t in both if p.strip())


def answers(record: Record, name: str) -> tuple[tuple[str, ...], ...]:
    """What an answer has to hold, each item in any of its forms: a text, a list of forms, or a list of such lists."""
    value = record.get(name)
    items = value if isinstance(value, (list, tuple)) and any(isinstance(x, (list, tuple)) for x in value) else [value]
    listed = Record({f"{name}[{i}]": item for i, item in enumerate(items)}, record.at)
    found = (tuple(text.strip() for text in listed.texts(field) if text.strip()) for field in listed.value)
    kept = tuple(forms for forms in found if forms)
    if not kept:
        raise Refused(f"{record.at}{name}", "has no answer; name at least one")
    return kept


def _absent_subject(subject: str, prompt: str, kind: str = "prompt") -> str:
    message = f"{quote(subject)} is not in {kind} {quote(prompt)}"
    if subject.casefold() in prompt.casefold():
        message += " in this letter case"
    elif _plain(subject) in _plain(prompt):
        message += " in the same Unicode characters"
    return f"{message}; put the subject verbatim in the {kind}"


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _derived_id(prompt: str, target: str) -> str:
    # From the content alone, so that reordering a file or adding to it keeps every id.
    return hashlib.sha256(json.dumps([prompt, target]).encode()).hexdigest()[:10]
