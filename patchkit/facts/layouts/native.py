"""patchkit's own format: the fields of a fact under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from patchkit.facts.layout import Layout, answers, layout
from patchkit.facts.record import MISSING, Record, Refused, wrong_type
from patchkit.facts.schema import Answers, Condition, Fact, Locality, Probe


@layout
class Native(Layout):
    """A mistyped field is refused here, since it would be lost without a word."""

    name = "native"
    marks = (("prompt",), ("prompt", "target_new"))
    target_true = "target_true"
    aliases = "aliases"
    paraphrases = "paraphrases"
    rewordings = "rewordings"
    questions = "questions"
    about = "about"
    optional: ClassVar[tuple[str, ...]] = (
        *("id", "target_true", "aliases", "rewordings", "paraphrases", "questions", "about", "locality"),
        *("portability", "separator", "case", "source"),
    )
    synonyms: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("target_old", "target_original"), "target_true"),
        **dict.fromkeys(("rephrase", "rephrases"), "paraphrases"),
        **dict.fromkeys(("question", "queries"), "questions"),
        "alias": "aliases",
    }

    def read(self, record: Record) -> Fact:
        """The fact of a record."""
        self._refuse_missing(record)
        record.refuse_typos((*self.required(), *self.optional))
        return super().read(record)

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Objects with prompt and target, or pairs of them; one object alone is a list of one."""
        return listed_neighbors(record)

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """An object of groups, each a list of objects with prompt and answers."""
        value = record.get("portability")
        if value is None or value is MISSING:
            return {}
        if not isinstance(value, Mapping):
            wrong_type("portability", "an object of groups, each a list of objects with prompt and answers", value)
        return {str(group): _probes(record, listed, f"portability.{group}") for group, listed in value.items()}


def listed_neighbors(record: Record) -> tuple[Locality, ...]:
    """The `locality` of a record, a list as `Native.locality` has it."""
    value = record.get("locality")
    if value is None or value is MISSING:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        wrong_type("locality", "a list of objects with prompt and target", value)
    return tuple(_neighbor(record, item, f"locality[{i}]") for i, item in enumerate(value))


def _neighbor(record: Record, item: object, name: str) -> Locality:
    if isinstance(item, (list, tuple)) and len(item) == 2:
        item = {"prompt": item[0], "target": item[1]}
    if not isinstance(item, Mapping):
        wrong_type(name, "an object with prompt and target, or a pair [prompt, target]", item)
    part = record.child(item, name).known_as(dict.fromkeys(("answer", "ground_truth", "target_true"), "target"))
    part.refuse_typos(("prompt", "target", "aliases"))
    if "prompt" not in item:
        raise Refused(f"{name}.prompt", "missing; a locality entry has a prompt and may have a target")
    return Locality(prompt=part.text("prompt"), target=part.optional("target"), aliases=part.texts("aliases"))


_ANSWERS = dict.fromkeys(("answer", "ground_truth", "target"), "answers")


def _probes(record: Record, value: object, name: str) -> tuple[Probe, ...]:
    if not isinstance(value, (list, tuple)):
        wrong_type(name, "a list of objects with prompt and answers", value)
    return tuple(_probe(record, item, f"{name}[{i}]") for i, item in enumerate(value))


def _probe(record: Record, item: object, name: str) -> Probe:
    if not isinstance(item, Mapping):
        wrong_type(name, "an object with prompt and answers", item)
    part = record.child(item, name).known_as(_ANSWERS)
    part.refuse_typos(("prompt", "answers", "alternatives", "conditions"))
    asked = (each.known_as(_ANSWERS) for each in part.objects("conditions"))
    conditions = tuple(Condition(prompt=each.text("prompt"), answers=_held(each)) for each in asked)
    return Probe(
        prompt=part.text("prompt"), alternatives=part.texts("alternatives"), answers=_held(part), conditions=conditions
    )


def _held(part: Record) -> Answers:
    held = answers(part, "answers")
    if not held:
        raise Refused(part.named("answers"), "has no answer; name at least one")
    return held
