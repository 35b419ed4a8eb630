"""One record of a fact file, read field by field; what cannot be right is refused by the field's name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from patchkit.words import one_line

MISSING = object()
_VALUE_WIDTH = 60  # characters of a value quoted in a message
_TYPO = 0.8  # difflib ratio from which an unknown name is taken for a misspelled field
_EQUIVALENT = {"answers", "ground_truth"}  # fields that may list equivalent answers; the first stands for all


class Refused(Exception):
    """Why one record cannot be used, and the field where that shows."""

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


@dataclass(frozen=True)
class Record:
    """A JSON object and its place in the record of the file: "locality[0]." before its fields' names, or nothing.

    Fields are named with dots: `text("requested_rewrite.target_new.str")`. `written` has the names under which the file
    keeps fields that are known by another one. What has been read is remembered, so that the rest can be told.
    """

    value: Mapping[str, Any]
    at: str = ""
    parent: Record | None = None
    written: Mapping[str, str] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set, compare=False, repr=False)
    _children: list[Record] = field(default_factory=list, compare=False, repr=False)

    def known_as(self, synonyms: Mapping[str, str]) -> Record:
        """The record with other names for its fields, written -> known, where a field is not there by its own name."""
        written = {known: name for name, known in synonyms.items() if name in self.value and known not in self.value}
        return replace(self, written=written)

    def child(self, value: Mapping[str, Any], at: str) -> Record:
        """An object inside this record."""
        child = Record(value, f"{self.at}{at}.", self)
        self._children.append(child)
        return child

    def named(self, name: str) -> str:
        """A field as messages name it."""
        return self.at + self.written.get(name, name)

    def has(self, name: str) -> bool:
        """Whether there is anything in the field, without reading it."""
        return self.value.get(self.written.get(name, name)) is not None

    def get(self, name: str) -> object:
        """The value of a field, MISSING where there is none."""
        value: object = self.value
        walked: list[str] = []
        for part in self.written.get(name, name).split("."):
            if not isinstance(value, Mapping):
                wrong_type(self.at + ".".join(walked), "an object", value)
            if not walked:
                self._used.add(part)
            value = value.get(part, MISSING)
            if value is MISSING:
                return MISSING
            walked.append(part)
        return value

    def unused(self) -> Iterator[str]:
        """The fields that nothing has read, those of objects inside included, without numbers of places."""
        for name, value in self.value.items():
            if name not in self._used and isinstance(name, str) and value not in (None, "", [], {}):
                yield re.sub(r"\[\d+\]", "[]", self.at) + name
        for child in self._children:
            yield from child.unused()

    def inside(self, name: str) -> Record | None:
        """The object in a field; None where the field is missing or null."""
        value = self.get(name)
        if value is None or value is MISSING:
            return None
        if not isinstance(value, Mapping):
            wrong_type(self.named(name), "an object", value)
        return self.child(value, self.written.get(name, name))

    def objects(self, name: str) -> tuple[Record, ...]:
        """A list of objects; one object alone is a list of one, a missing or null field is empty."""
        value = self.get(name)
        if value is None or value is MISSING:
            return ()
        items = [value] if isinstance(value, Mapping) else value
        if not isinstance(items, (list, tuple)):
            wrong_type(self.named(name), "a list of objects", value)
        return tuple(self._object(item, f"{self.written.get(name, name)}[{i}]") for i, item in enumerate(items))

    def _object(self, value: object, at: str) -> Record:
        if not isinstance(value, Mapping):
            wrong_type(self.at + at, "an object", value)
        return self.child(value, at)

    def text(self, name: str) -> str:
        """Text that has something to see in it."""
        text = _text(self._first(name), self.named(name))
        if not text.strip():
            raise Refused(self.named(name), f"is {'blank; put visible' if text else 'empty; put'} text in it")
        return text

    def optional(self, name: str | None) -> str | None:
        """Text without whitespace around it, or None where the field is missing, null or blank."""
        value = MISSING if name is None else self._first(name)
        if name is None or value is None or value is MISSING:
            return None
        return _text(value, self.named(name)).strip() or None

    def optional_space(self, name: str) -> str | None:
        """Text as it stands, which may be empty or blank; None where the field is missing or null."""
        value = self.get(name)
        return None if value is None or value is MISSING else _text(value, self.named(name))

    def texts(self, name: str | None) -> tuple[str, ...]:
        """A list of texts, blank ones included; one text alone is a list of one, a missing or null field is empty."""
        value = MISSING if name is None else self.get(name)
        if name is None or value is None or value is MISSING:
            return ()
        if isinstance(value, str):
            return (_text(value, self.named(name)),)
        if not isinstance(value, (list, tuple)):
            wrong_type(self.named(name), "a list of texts", value)
        return tuple(_text(item, f"{self.named(name)}[{i}]") for i, item in enumerate(value))

    def _first(self, name: str) -> object:
        value = self.get(name)
        if name in _EQUIVALENT and isinstance(value, (list, tuple)):
            return value[0] if value else None
        return value

    def identifier(self, name: str) -> str | None:
        """Text or a whole number, as text on one line: tables and messages name a record by it."""
        value = self.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return one_line(self.optional(name) or "") or None

    def refuse_typos(self, known: Sequence[str]) -> None:
        """Refuse a field with almost the name of a known one that is not there."""
        absent = [name for name in known if name not in self.value and name not in self.written]
        for name in self.value:
            if name in known or not isinstance(name, str) or name in self.written.values():
                continue
            plain = name.strip().lower().replace("-", "_").replace(" ", "_")
            # "id" is too short for a ratio to mean anything, and "source_url" is a field of its own.
            long = [field for field in absent if len(field) > 2 and not plain.startswith(f"{field}_")]
            close = [plain] if plain in absent else difflib.get_close_matches(plain, long, 1, cutoff=_TYPO)
            if close:
                raise Refused(f"{self.at}{name}", f"unknown field, probably meant as {quote(close[0])}; rename it")

    def similar(self, name: str, known: Iterable[str]) -> str | None:
        """A field that is not among the known ones and may have been meant as `name`."""
        unknown = [field for field in self.value if isinstance(field, str) and field not in known]
        return next(iter(difflib.get_close_matches(name, unknown, 1, cutoff=0.6)), None)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        wrong_type(name, "text in quotes", value)
    # JSON can spell half a surrogate pair ("\ud83d"), which no tokenizer and no file can hold.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Refused(name, "holds half a surrogate pair; write the character itself or both halves")
    return value


def wrong_type(name: str | None, expected: str, value: object) -> NoReturn:
    """Refuse a value that is not what the field holds."""
    raise Refused(name, f"expected {expected}, found {_kind(value)}")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "text"),
        ((list, tuple), "a list"),
        (Mapping, "an object"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}")


def quote(text: str) -> str:
    """A value as messages show it: in quotes, on one line, cut where it is long."""
    short = text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 3]}..."
    return json.dumps(short, ensure_ascii=False)
