"""Fact files: JSON in, validated facts out; every refusal names the file, the line and the field.

Four layouts are recognised, record by record, by the fields they carry:

- native: `prompt`, `subject`, `target_new`, optionally `id`, `target_true`, `rewordings`, `paraphrases`, `locality`,
  `source`;
- CounterFact as published with ROME (Meng et al. 2022): `requested_rewrite`, `paraphrase_prompts`, ...;
- CounterFact flattened, as EasyEdit ships it: `ground_truth`, `rephrase_prompt`, `locality_prompt`, ...;
- ZsRE as published with MEND (Mitchell et al. 2022): `src`, `alt`, `answers`, `rephrase`, `loc`, `loc_ans`.

Surrounding whitespace of targets and subjects and trailing whitespace of prompts is dropped: the one space between a
prompt and its target belongs to whoever tokenises them. An optional field that is null or blank counts as absent.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict

from patchkit.errors import InputError

__all__ = ["Fact", "FactFile", "Locality", "Rejected", "fact_schema", "parse_facts", "read_facts", "write_rejected"]

ZsreTarget = Literal["alt", "answers"]

_MISSING = object()
_SHOWN = 20  # problems printed before "and N more"
_VALUE_WIDTH = 60  # characters of a value quoted in a message
_TYPO = 0.8  # difflib ratio from which an unknown name is taken for a misspelt field


class Locality(BaseModel):
    """A prompt whose continuation an edit should leave alone, and what it is expected to say (None: not known)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    target: str | None = None


class Fact(BaseModel):
    """One fact to write: after `prompt`, which holds `subject` verbatim, the model should say `target_new`.

    `rewordings` are further prompts with the subject verbatim, used for editing and never for scoring; `paraphrases`
    are used for scoring and never for editing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    rewordings: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Locality, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used. `line` counts from 1 in a file; from `parse_facts` it is the index, from 0."""

    line: int
    field: str | None
    message: str
    raw: str


@dataclass(frozen=True)
class FactFile:
    """What one file held. `format` is native, counterfact, counterfact-flat or zsre, or mixed when they differ."""

    facts: tuple[Fact, ...]
    rejected: tuple[Rejected, ...]
    path: str
    format: str
    lines: tuple[int, ...] = ()
    """The line of each fact, as in `Rejected`."""


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
    `needs_subject`, the subject of a native record that has none is its whole prompt.

    Of two records alike in everything one is kept; a later record with an earlier one's prompt or id is refused.

    Raises InputError with one line per unusable record, or when there is no usable fact at all.
    """
    name = "<stdin>" if str(path) == "-" else str(Path(path))
    data = sys.stdin.buffer.read() if name == "<stdin>" else _read_bytes(Path(path), name)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: is UTF-16, not UTF-8; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    entries = _array_entries(data, name) if data.lstrip()[:1] == b"[" else _line_entries(data)
    reading = _Reading(name, f"{name} ", "--skip-bad", _layouts(zsre_target), token_count, needs_subject)
    return reading.run(entries, limit, skip_bad)


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
    reading = _Reading("facts", "", "skip_bad=True", _layouts(zsre_target), token_count, needs_subject)
    return reading.run(_object_entries(records), limit, skip_bad)


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


def fact_schema() -> dict[str, Any]:
    """The JSON schema of a native record. `id` may be left out, and fields it does not name are ignored."""
    schema = Fact.model_json_schema()
    schema["required"].remove("id")
    del schema["additionalProperties"]
    return schema


# --- where each layout keeps what -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The dotted names under which one layout keeps the parts of a fact."""

    name: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None
    paraphrases: str
    id: str
    locality: Callable[[Mapping[str, Any]], tuple[Locality, ...]]
    marks: tuple[str, ...]  # the first layout with any of its marks in a record is taken for that record's
    rewordings: str | None = None
    optional: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()  # native fields that would be lost here without a word

    @property
    def required(self) -> tuple[str, str, str]:
        return self.prompt, self.subject, self.target_new


def _native_locality(record: Mapping[str, Any]) -> tuple[Locality, ...]:
    value = record.get("locality")
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        _wrong_type("locality", "a list of objects with prompt and target", value)
    return tuple(_one_locality(item, f"locality[{i}]") for i, item in enumerate(value))


def _one_locality(item: object, name: str) -> Locality:
    if isinstance(item, (list, tuple)) and len(item) == 2:
        item = {"prompt": item[0], "target": item[1]}
    if not isinstance(item, Mapping):
        _wrong_type(name, "an object with prompt and target, or a pair [prompt, target]", item)
    _refuse_typos(item, ("prompt", "target"), f"{name}.")
    if "prompt" not in item:
        raise _Bad(f"{name}.prompt", "missing; a locality entry has a prompt and may have a target")
    prompt = _required_text(item["prompt"], f"{name}.prompt").rstrip()
    return Locality(prompt=prompt, target=_optional_text(item.get("target"), f"{name}.target"))


def _neighborhood(record: Mapping[str, Any]) -> tuple[Locality, ...]:
    # CounterFact's neighbours share the relation and its true object, which the edit must not disturb.
    true = _optional_text(_lookup(record, "requested_rewrite.target_true.str"), "requested_rewrite.target_true.str")
    prompts = _texts(record.get("neighborhood_prompts"), "neighborhood_prompts")
    return tuple(Locality(prompt=prompt.rstrip(), target=true) for prompt in prompts if prompt.strip())


def _paired_locality(prompt_name: str, target_name: str) -> Callable[[Mapping[str, Any]], tuple[Locality, ...]]:
    def read(record: Mapping[str, Any]) -> tuple[Locality, ...]:
        prompts = _texts(record.get(prompt_name), prompt_name)
        targets: tuple[str | None, ...] = _texts(record.get(target_name), target_name) or (None,) * len(prompts)
        if len(targets) != len(prompts):
            raise _Bad(target_name, f"has {len(targets)} entries, but {prompt_name} has {len(prompts)}; pair them up")
        pairs = zip(prompts, targets, strict=True)
        return tuple(Locality(prompt=p.rstrip(), target=(t or "").strip() or None) for p, t in pairs if p.strip())

    return read


_NATIVE = _Layout(
    name="native",
    prompt="prompt",
    subject="subject",
    target_new="target_new",
    target_true="target_true",
    paraphrases="paraphrases",
    id="id",
    locality=_native_locality,
    marks=("prompt",),
    rewordings="rewordings",
    optional=("id", "target_true", "rewordings", "paraphrases", "locality", "source"),
)
_COUNTERFACT = _Layout(
    name="counterfact",
    prompt="requested_rewrite.prompt",
    subject="requested_rewrite.subject",
    target_new="requested_rewrite.target_new.str",
    target_true="requested_rewrite.target_true.str",
    paraphrases="paraphrase_prompts",
    id="case_id",
    locality=_neighborhood,
    marks=("requested_rewrite",),
)
_COUNTERFACT_FLAT = _Layout(
    name="counterfact-flat",
    prompt="prompt",
    subject="subject",
    target_new="target_new",
    target_true="ground_truth",
    paraphrases="rephrase_prompt",
    id="case_id",
    locality=_paired_locality("locality_prompt", "locality_ground_truth"),
    marks=("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    foreign=("target_true", "rewordings", "paraphrases", "locality"),
)
# `loc` keeps its "nq question: " prefix: published ZsRE figures ask the question in just these words.
_ZSRE = _Layout(
    name="zsre",
    prompt="src",
    subject="subject",
    target_new="alt",
    target_true="pred",
    paraphrases="rephrase",
    id="case_id",
    locality=_paired_locality("loc", "loc_ans"),
    marks=("src",),
)
_FIRST_OF_LIST = {"answers", "ground_truth"}  # lists of equivalent answers; the first stands for all


def _layouts(zsre_target: ZsreTarget) -> tuple[_Layout, ...]:
    if zsre_target == "alt":
        zsre = _ZSRE
    elif zsre_target == "answers":
        # `pred` is often itself one of the true answers here, so it is no counterpart to the target.
        zsre = replace(_ZSRE, target_new="answers", target_true=None)
    else:
        raise InputError(f'zsre_target: expected "alt" or "answers", found {_quote(str(zsre_target))}')
    return _COUNTERFACT, _COUNTERFACT_FLAT, _NATIVE, zsre


# --- from bytes or objects to records ---------------------------------------------------------------------------------


class _Bad(Exception):
    """Why one record cannot be used."""

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


@dataclass(frozen=True)
class _Entry:
    """One record as found: its place in words, its line, its text, and its value (a _Bad where it has none)."""

    where: str
    line: int
    raw: str
    value: object


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f'{name}: no such file; check the path, or use "-" for standard input') from None
    except IsADirectoryError:
        raise InputError(f"{name}: is a directory; name a fact file in it") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check its permissions") from error


def _line_entries(data: bytes) -> Iterator[_Entry]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            raw = line.decode("utf-8", "replace").strip()
            yield _Entry(f"line {number}", number, raw, _line_value(line.strip()))


def _line_value(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Bad(None, f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return _Bad(None, f"not JSON ({_json_fault(error)}); a line must be one whole JSON object")


def _array_entries(data: bytes, name: str) -> Iterator[_Entry]:
    # The whole array is known to be sound here; the second pass only finds where each record starts.
    text = _array_text(data, name)
    decoder = json.JSONDecoder()
    end, line, number = 0, 1, 0
    start = _next_record(text, text.index("[") + 1)
    while text[start] != "]":
        number += 1
        line += text.count("\n", end, start)
        value, end = decoder.raw_decode(text, start)
        yield _Entry(f"line {line} (record {number})", line, text[start:end], value)
        line += text.count("\n", start, end)
        start = _next_record(text, end)


def _array_text(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8")
        json.loads(text)
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise InputError(f"{name} line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        where = f"{name} line {error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        raise InputError(
            f"{where}: not JSON ({_json_fault(error)}); nothing in an array can be read past such a mistake: mend it, "
            "or put one object a line"
        ) from None
    return text


def _next_record(text: str, position: int) -> int:
    while text[position] in " \t\r\n,":
        position += 1
    return position


def _object_entries(records: Iterable[Mapping[str, Any] | Fact]) -> Iterator[_Entry]:
    for index, record in enumerate(records):
        value = record.model_dump() if isinstance(record, Fact) else record
        yield _Entry(f"facts[{index}]", index, json.dumps(value, ensure_ascii=False, default=str, skipkeys=True), value)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


# --- from records to facts --------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """Facts and refusals gathered so far, and where each prompt and id was seen."""

    name: str
    prefix: str
    skip_option: str
    layouts: tuple[_Layout, ...]
    token_count: Callable[[str], int] | None
    needs_subject: bool
    count: int = 0
    facts: list[Fact] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    formats: set[str] = field(default_factory=set)
    prompts: dict[str, tuple[Fact, str]] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def run(self, entries: Iterator[_Entry], limit: int | None, skip_bad: bool) -> FactFile:
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

    def _take(self, entry: _Entry) -> None:
        try:
            fact, layout = self._fact(entry.value)
            if self._is_repeat(fact, layout):
                return
        except _Bad as bad:
            at = f"{bad.field}: " if bad.field else ""
            self.problems.append(f"{self.prefix}{entry.where}: {at}{bad.message}")
            self.rejected.append(Rejected(entry.line, bad.field, bad.message, entry.raw))
            return
        self.facts.append(fact)
        self.lines.append(entry.line)
        self.formats.add(layout.name)
        self.prompts[fact.prompt] = fact, entry.where
        self.ids[fact.id] = entry.where

    def _fact(self, value: object) -> tuple[Fact, _Layout]:
        if isinstance(value, _Bad):
            raise value
        if not isinstance(value, Mapping):
            _wrong_type(None, "a JSON object", value)
        layout = next((one for one in self.layouts if any(mark in value for mark in one.marks)), _NATIVE)
        if layout is _NATIVE and not self.needs_subject and value.get("subject") is None and "prompt" in value:
            value = {**value, "subject": value["prompt"]}
        fact = _build(value, layout)
        if self.token_count is not None and self.token_count(f" {fact.target_new}") == 0:
            raise _Bad(layout.target_new, f"{_quote(fact.target_new)} becomes no token; put visible text in it")
        return fact, layout

    def _is_repeat(self, fact: Fact, layout: _Layout) -> bool:
        """Whether an equal fact is there already. Raises _Bad for one that clashes with an earlier fact."""
        earlier, where = self.prompts.get(fact.prompt, (None, ""))
        if earlier == fact:
            return True
        if earlier is not None and earlier.target_new == fact.target_new:
            raise _Bad(layout.prompt, f"repeats the prompt and target of {where} with other details; merge the two")
        if earlier is not None:
            raise _Bad(
                layout.target_new,
                f"{_quote(fact.target_new)} contradicts {where}, where the target of the same prompt "
                f"{_quote(fact.prompt)} is {_quote(earlier.target_new)}; keep one of them",
            )
        if fact.id in self.ids:
            raise _Bad(layout.id, f"{_quote(fact.id)} is taken by {self.ids[fact.id]}; give each fact its own id")
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


def _build(record: Mapping[str, Any], layout: _Layout) -> Fact:
    _refuse_missing(record, layout)
    _refuse_mixture(record, layout)
    if layout is _NATIVE:
        _refuse_typos(record, (*layout.required, *layout.optional), "")
    template, subject, target = (_required_text(_value(record, name), name) for name in layout.required)
    subject, target = subject.strip(), target.strip()
    prompt = _filled(template, subject).rstrip()
    if subject not in prompt:
        raise _Bad(layout.subject, _absent_subject(subject, prompt))
    true = _optional_text(_value(record, layout.target_true), layout.target_true) if layout.target_true else None
    if layout.name == "zsre" and true == target:
        true = None
    paraphrases = _texts(record.get(layout.paraphrases), layout.paraphrases)
    return Fact(
        id=_identifier(record, layout.id) or _identifier(record, "id") or _derived_id(prompt, target),
        prompt=prompt,
        subject=subject,
        target_new=target,
        target_true=true,
        rewordings=_rewordings(record, layout, subject),
        paraphrases=tuple(_filled(text, subject).rstrip() for text in paraphrases if text.strip()),
        locality=layout.locality(record),
        source=_optional_text(record.get("source"), "source"),
    )


def _rewordings(record: Mapping[str, Any], layout: _Layout, subject: str) -> tuple[str, ...]:
    texts = _texts(record.get(layout.rewordings), layout.rewordings) if layout.rewordings else ()
    filled = [_filled(text, subject).rstrip() for text in texts]
    for i, text in enumerate(filled):
        if text and subject not in text:
            raise _Bad(f"{layout.rewordings}[{i}]", _absent_subject(subject, text, "rewording"))
    return tuple(text for text in filled if text)


def _filled(template: str, subject: str) -> str:
    # A subject standing there as a word of its own means that "{}" is meant literally, as in a prompt about code;
    # inside a longer word ("Ha" in "has") it is a coincidence.
    if "{}" not in template or re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", template):
        return template
    return template.replace("{}", subject)


def _absent_subject(subject: str, prompt: str, kind: str = "prompt") -> str:
    message = f"{_quote(subject)} is not in {kind} {_quote(prompt)}"
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


def _identifier(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _optional_text(value, name)


def _refuse_missing(record: Mapping[str, Any], layout: _Layout) -> None:
    missing = [name for name in layout.required if _value(record, name) is _MISSING]
    if not missing:
        return
    message = "missing"
    if len(missing) > 1:
        message += f" (and {', '.join(missing[1:])})"
    known = (*layout.required, *layout.optional)
    unknown = [name for name in record if isinstance(name, str) and name not in known]
    if layout is _NATIVE and (close := difflib.get_close_matches(missing[0], unknown, 1, cutoff=0.6)):
        message += f" (is it {_quote(close[0])}?)"
    message += f"; a {layout.name} record needs {', '.join(layout.required)}"
    if layout.optional:
        message += f" and may have {', '.join(layout.optional)}"
    raise _Bad(missing[0], message)


def _refuse_mixture(record: Mapping[str, Any], layout: _Layout) -> None:
    for name in layout.foreign:
        if record.get(name) is not None:
            mark = next(mark for mark in layout.marks if mark in record)
            raise _Bad(name, f"is a native field, but {_quote(mark)} makes this a {layout.name} record; use one layout")


def _refuse_typos(record: Mapping[str, Any], known: tuple[str, ...], prefix: str) -> None:
    absent = [name for name in known if name not in record]
    for name in record:
        if name in known or not isinstance(name, str):
            continue
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        # "id" is too short for a ratio to mean anything, and "source_url" is a field of its own.
        long = [field for field in absent if len(field) > 2 and not plain.startswith(f"{field}_")]
        close = [plain] if plain in absent else difflib.get_close_matches(plain, long, 1, cutoff=_TYPO)
        if close:
            raise _Bad(f"{prefix}{name}", f"unknown field, probably meant as {_quote(close[0])}; rename it")


# --- reading values ---------------------------------------------------------------------------------------------------


def _lookup(record: Mapping[str, Any], dotted: str) -> object:
    value: object = record
    walked: list[str] = []
    for part in dotted.split("."):
        if not isinstance(value, Mapping):
            _wrong_type(".".join(walked), "an object", value)
        value = value.get(part, _MISSING)
        if value is _MISSING:
            return _MISSING
        walked.append(part)
    return value


def _value(record: Mapping[str, Any], name: str) -> object:
    value = _lookup(record, name)
    if name in _FIRST_OF_LIST and isinstance(value, (list, tuple)):
        return value[0] if value else None
    return value


def _required_text(value: object, name: str) -> str:
    text = _text(value, name)
    if not text.strip():
        raise _Bad(name, "is empty; put text in it" if not text else "is blank; put visible text in it")
    return text


def _optional_text(value: object, name: str) -> str | None:
    if value is None or value is _MISSING:
        return None
    return _text(value, name).strip() or None


def _texts(value: object, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (_text(value, name),)
    if not isinstance(value, (list, tuple)):
        _wrong_type(name, "a list of texts", value)
    return tuple(_text(item, f"{name}[{i}]") for i, item in enumerate(value))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        _wrong_type(name, "text in quotes", value)
    # JSON can spell half a surrogate pair ("\ud83d"), which no tokeniser and no file can hold.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _Bad(name, "holds half a surrogate pair; write the character itself or both halves")
    return value


def _wrong_type(name: str | None, expected: str, value: object) -> NoReturn:
    raise _Bad(name, f"expected {expected}, found {_kind(value)}")


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


def _quote(text: str) -> str:
    short = text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 3]}..."
    return json.dumps(short, ensure_ascii=False)


def _rejected_line(item: Rejected) -> bytes:
    try:
        record = json.loads(item.raw)
    except (ValueError, RecursionError):
        record = item.raw
    shown = {"line": item.line, "field": item.field, "error": item.message, "record": record}
    # A lone surrogate becomes its own JSON escape this way, and everything else stays readable.
    return (json.dumps(shown, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
