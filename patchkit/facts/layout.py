"""What a format of fact records is: a class that names its fields, and overrides what it keeps in another way.

    @layout
    class Flat(Layout):
        name = "flat"
        marks = (("question", "answer_new"),)
        prompt, target_new = "question", "answer_new"

A format that is in `patchkit/facts/layouts`, or decorated before facts are read, is known to every command.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from patchkit.facts.chat import ChatTemplate
from patchkit.facts.record import MISSING, Record, Refused, quote
from patchkit.facts.schema import Fact, Locality, Probe
from patchkit.words import counted

ZsreTarget = Literal["alt", "answers"]
LAYOUTS: dict[str, type[Layout]] = {}


@dataclass(frozen=True)
class Options:
    """How records are read where there is a choice.

    zsre_target is what a ZsRE record teaches: "alt" or "answers". Without needs_subject, the subject of a record that
    has none is its whole prompt; otherwise subjectless names the methods that would take it, for the refusal. chat is
    the template that conversations are written in, and find_subject proposes a subject where a prompt is left without.
    """

    zsre_target: ZsreTarget = "alt"
    needs_subject: bool = True
    subjectless: tuple[str, ...] = ()
    chat: ChatTemplate | None = None
    find_subject: Callable[[str], str | None] | None = None


class Layout:
    """One format: the dotted names under which it keeps the parts of a fact, None for those it does not have.

    marks are sets of fields: a record that has all of a set is of this format, unless another format recognizes it by
    more fields. metadata are fields that say nothing about an edit, and need not be named as unused.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[tuple[str, ...], ...]]
    prompt: str = "prompt"
    subject: str = "subject"
    target_new: str = "target_new"
    target_true: str | None = None
    aliases: str | None = None
    paraphrases: str | None = None
    rewordings: str | None = None
    questions: str | None = None
    about: str | None = None
    id: str = "id"
    optional: ClassVar[tuple[str, ...]] = ()
    synonyms: ClassVar[dict[str, str]] = {}
    foreign: ClassVar[tuple[str, ...]] = ()  # native fields that would be lost here without a word
    metadata: ClassVar[tuple[str, ...]] = ()
    # Published data ends some prompts in a space by chance: its convention is that the target brings the space.
    drops_trailing_space: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        self.options = options

    @classmethod
    def fit(cls, record: Record) -> int:
        """By how many fields the record is recognized as one of this format; 0 where it is none."""
        return max((len(mark) for mark in cls.marks if all(name in record.value for name in mark)), default=0)

    def split(self, record: Record) -> Iterable[Record]:
        """The parts of a record that are a fact each."""
        return (record.known_as(self.synonyms),)

    def read(self, record: Record) -> Fact:
        """The fact of one part.

        Raises:
            Refused: a field is missing or holds what cannot be right.
        """
        self._refuse_missing(record)
        self._refuse_mixture(record)
        template, target = record.text(self.prompt), record.text(self.target_new).strip()
        subject = self._subject(record, template)
        prompt = self.filled(template, subject)
        if subject not in prompt:
            raise Refused(record.named(self.subject), _absent_subject(subject, prompt))
        return Fact(
            id=self.identifier(record) or _derived_id(prompt.rstrip(), target),
            prompt=prompt,
            subject=subject,
            target_new=target,
            target_true=record.optional(self.target_true),
            aliases=tuple(text.strip() for text in record.texts(self.aliases) if text.strip()),
            rewordings=self.further_prompts(record, subject, target),
            paraphrases=self.all_filled(record, self.paraphrases, subject),
            questions=self.all_filled(record, self.questions, subject),
            about=self.all_filled(record, self.about, subject),
            locality=self.locality(record),
            portability=self.portability(record),
            separator=record.optional_space("separator"),
            case=self.case(record),
            source=record.optional("source"),
        )

    def identifier(self, record: Record) -> str | None:
        """The id in the file, if it has one."""
        return record.identifier(self.id) or record.identifier("id")

    def case(self, record: Record) -> str | None:
        """What facts that are edited together have in common."""
        return record.identifier("case")

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Prompts whose continuations an edit should leave alone."""
        return ()

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """What follows from the fact, in groups."""
        return {}

    def further_prompts(self, record: Record, subject: str, target: str) -> tuple[str, ...]:
        """The fact's rewordings: other texts with the subject, after which the target is to come."""
        texts = [self.filled(text, subject) for text in record.texts(self.rewordings)]
        for i, text in enumerate(texts):
            if text.strip() and subject not in text:
                name = f"{record.named(str(self.rewordings))}[{i}]"
                raise Refused(name, _absent_subject(subject, text, "rewording"))
        return tuple(text for text in texts if text.strip())

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

    def required(self) -> tuple[str, ...]:
        """The fields without which there is no fact."""
        return self.prompt, self.subject, self.target_new

    def _subject(self, record: Record, prompt: str) -> str:
        if not self.options.needs_subject and record.get(self.subject) in (None, MISSING):
            return prompt.strip()
        if self.options.find_subject and record.get(self.subject) in (None, MISSING):
            found = self.options.find_subject(prompt)
            if found is None:
                raise Refused(
                    record.named(self.subject), f"missing, and no words in {quote(prompt)} look like one; name it"
                )
            return found
        return record.text(self.subject).strip()

    def _refuse_missing(self, record: Record) -> None:
        missing = [name for name in self.required() if record.get(name) is MISSING]
        if not self.options.needs_subject or self.options.find_subject:
            missing = [name for name in missing if name != self.subject]
        if not missing:
            return
        message = f"missing (and {', '.join(missing[1:])})" if len(missing) > 1 else "missing"
        if self.optional and (close := record.similar(missing[0], (*self.required(), *self.optional))):
            message += f" (is it {quote(close)}?)"
        if missing == [self.subject] and self.options.subjectless:
            message += f"; without a subject a fact can be written by {', '.join(self.options.subjectless)}"
        message += f"; a {self.name} record needs {', '.join(self.required())}"
        if self.optional:
            message += f" and may have {', '.join(self.optional)}"
        raise Refused(record.named(missing[0]), message)

    def _refuse_mixture(self, record: Record) -> None:
        for name in self.foreign:
            if record.has(name):
                marks = (mark for marks in self.marks for mark in marks if mark not in self.required())
                own = quote(next(mark for mark in marks if mark in record.value))
                raise Refused(name, f"is a native field, but {own} makes this a {self.name} record; use one format")


def layout(kind: type[Layout]) -> type[Layout]:
    """Class decorator: make a format known to every command."""
    LAYOUTS[kind.name] = kind
    return kind


# --- what several formats have in common ------------------------------------------------------------------------------


def pairs(record: Record, prompts: str, targets: str) -> tuple[Locality, ...]:
    """Prompts in one field, and what they are to say in another, as text or as lists of one length."""
    asked = record.texts(prompts)
    said: tuple[str | None, ...] = record.texts(targets) or (None,) * len(asked)
    if len(said) != len(asked):
        raise Refused(targets, f"has {counted(len(said), 'item')}, but {prompts} has {len(asked)}; pair them up")
    both = zip(asked, said, strict=True)
    return tuple(Locality(prompt=p.rstrip(" \t"), target=(t or "").strip() or None) for p, t in both if p.strip())


_ANSWERS = ("ground_truth", "answers", "answer", "target")
"""Names of a neighbor's or a probe's answer: records of one format have parts of another in them."""


def neighbors(parts: Iterable[Record], prompt: str = "prompt", target: str = "ground_truth") -> Iterator[Locality]:
    """Objects with one or several prompts and an answer in any of its forms; blank prompts are left out."""
    for part in parts:
        part = part.known_as(dict.fromkeys(_ANSWERS, target))
        forms = next(iter(answers(part, target)), ())
        for text in part.texts(prompt):
            if text.strip():
                yield Locality(prompt=text.rstrip(" \t"), target=forms[0] if forms else None, aliases=forms[1:])


def probes(parts: Iterable[Record], prompt: str = "prompt", target: str = "ground_truth") -> tuple[Probe, ...]:
    """Objects with one or several prompts and what has to be in the answer; without prompt or answer they are left
    out."""
    named = (part.known_as(dict.fromkeys(_ANSWERS, target)) for part in parts)
    found = ((text, answers(part, target)) for part in named for text in part.texts(prompt))
    return tuple(Probe(prompt=text.rstrip(" \t"), answers=held) for text, held in found if text.strip() and held)


def asked(record: Record, questions: str, *answer: str) -> tuple[Probe, ...]:
    """Questions in one field and their answers in others, each of which may list further forms of it."""
    forms = tuple(text.strip() for name in answer for text in record.texts(name) if text.strip())
    texts = [text for text in record.texts(questions) if text.strip()]
    return tuple(Probe(prompt=text, answers=(forms,)) for text in texts) if forms else ()


def any_of(probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Probes with one answer, and the same conditions, as a single one: it is enough if one prompt is answered."""
    if not probes:
        return ()
    first, rest = probes[0], probes[1:]
    return (first.model_copy(update={"alternatives": tuple(one.prompt for one in rest)}),)


def paired(record: Record, questions: str, answer: str) -> tuple[Probe, ...]:
    """Questions in one field and their answers in another, as text or as lists of one length."""
    both = pairs(record, questions, answer)
    return tuple(Probe(prompt=each.prompt, answers=((each.target,),)) for each in both if each.target)


def stated(text: str, subject: str, target: str) -> tuple[str, ...]:
    """What the sentences of a text say before they come to the target, of those that name the subject before it."""
    found = list[str]()
    for sentence in re.split(r"(?<=[.!?])\s+|\n+|(?<=[。！？])", text):
        said, there, _ = sentence.strip().partition(target)
        if there and subject in said and said.strip() != subject:
            found.append(said.rstrip(" \t"))
    return tuple(dict.fromkeys(found))


def grouped(record: Record, name: str) -> dict[str, tuple[Record, ...]]:
    """An object of lists of objects: the lists by their names, empty ones left out."""
    groups = record.inside(name)
    found = {str(group): groups.objects(str(group)) for group in groups.value} if groups else {}
    return {group: parts for group, parts in found.items() if parts}


def answers(record: Record, name: str) -> tuple[tuple[str, ...], ...]:
    """What an answer has to hold, each item in any of its forms: a text, a list of forms, or a list of such lists."""
    value = record.get(name)
    nested = isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in value)
    items: Sequence[object] = value if nested and isinstance(value, (list, tuple)) else [value]
    fields = {f"{record.written.get(name, name)}{f'[{i}]' if nested else ''}": item for i, item in enumerate(items)}
    listed = Record({field: None if item is MISSING else item for field, item in fields.items()}, record.at)
    found = (tuple(text.strip() for text in listed.texts(field) if text.strip()) for field in fields)
    return tuple(forms for forms in found if forms)


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
