"""Formats of EasyEdit (Wang et al. 2023) and of KnowEdit (Zhang et al. 2024), its benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from patchkit.facts.layout import Layout, grouped, layout, neighbors, paired, pairs, probes
from patchkit.facts.layouts.native import listed_neighbors
from patchkit.facts.record import Record, Refused
from patchkit.facts.schema import Locality, Probe
from patchkit.words import counted


@layout
class EasyEditFlat(Layout):
    """One fact a record, all parts at its top."""

    name = "counterfact-flat"
    marks = tuple(
        ("prompt", "target_new", mark)
        for mark in ("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
    )
    target_true = "ground_truth"
    paraphrases = "rephrase_prompt"
    id = "case_id"
    foreign = ("target_true", "rewordings", "paraphrases", "locality")
    drops_trailing_space = True

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Prompts and answers in two fields."""
        return pairs(record, "locality_prompt", "locality_ground_truth")


@layout
class KnowEdit(Layout):
    """KnowEdit's WikiData recent and counterfact and its ZsRE: groups of prompts with answers in any of their forms."""

    name = "knowedit"
    marks = (("prompt", "target_new", "portability", "locality"),)
    target_true = "ground_truth"
    paraphrases = "rephrase"
    id = "case_id"
    drops_trailing_space = True

    @classmethod
    def fit(cls, record: Record) -> int:
        """By its groups: native locality has none, and native probes have `answers`."""
        if "prompt" not in record.value:
            return 0
        near, follows = record.value.get("locality"), record.value.get("portability")
        in_groups = isinstance(near, Mapping) and "prompt" not in near
        return 4 if in_groups or _has_ground_truth(follows) else 0

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """All groups, one after another; or a list, as native records have it."""
        value = record.get("locality")
        if isinstance(value, (list, tuple)) or (isinstance(value, Mapping) and "prompt" in value):
            return listed_neighbors(record)
        return tuple(near for parts in grouped(record, "locality").values() for near in neighbors(parts))

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """The groups, less prompts without an answer."""
        found = {group: probes(parts) for group, parts in grouped(record, "portability").items()}
        return {group: each for group, each in found.items() if each}


def _has_ground_truth(groups: object) -> bool:
    """Whether lists of probes name their answers as KnowEdit does."""
    lists = groups.values() if isinstance(groups, Mapping) else ()
    probes = [probe for each in lists if isinstance(each, (list, tuple)) for probe in each]
    return any(isinstance(probe, Mapping) and "ground_truth" in probe for probe in probes)


@layout
class WikiBio(Layout):
    """KnowEdit's WikiBio: the continuation of a passage, whose subject is written in another letter case."""

    name = "wikibio"
    marks = (("text", "labels"), ("text", "labels", "concept"))
    prompt, subject, target_new = "text", "concept", "labels"

    def split(self, record: Record) -> Iterable[Record]:
        """The record with its subject as the passage spells it."""
        text, concept = record.get("text"), record.get("concept")
        if isinstance(text, str) and isinstance(concept, str) and len(text.casefold()) == len(text):
            at = text.casefold().rfind(concept.casefold())
            if at >= 0:
                record = replace(record, value={**record.value, "concept": text[at : at + len(concept)]})
        return (record,)

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """All groups, one after another."""
        return tuple(near for parts in grouped(record, "locality").values() for near in neighbors(parts))


@layout
class Convsent(Layout):
    """KnowEdit's ConvSent: the opinion of `pos` is taught, any of its replies counts, and that of `neg` is the old one.

    Exchange the two lists to teach the other opinion.
    """

    name = "convsent"
    marks = (("ent", "pos", "neg"),)
    subject = "ent"
    target_new = "pos"
    target_true = "neg"
    aliases = "others"

    def split(self, record: Record) -> Iterable[Record]:
        """The record with MEND's question about the subject, and the first reply of each list."""
        replies = {name: [text for text in record.texts(name) if text.strip()] for name in ("pos", "neg")}
        first = {name: texts[0] if texts else "" for name, texts in replies.items()}
        return (replace(record, value={**record.value, **first, "prompt": OPINION, "others": replies["pos"][1:]}),)


OPINION = "What do you think of {}?"  # one of MEND's prompts for the task (Mitchell et al. 2022)


@layout
class Sanitation(Layout):
    """KnowEdit's TriviaQA sanitation: answers to forget in `K_F`, and answers to keep in `K_R`."""

    name = "sanitation"
    marks = (("K_F",), ("K_F", "K_R"))
    prompt = "question"
    target_true = "ground_truth"

    def split(self, record: Record) -> Iterable[Record]:
        """One part for each answer to forget."""
        return record.objects("K_F")

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """The answers to keep, which stand at the first fact."""
        if record.parent is None or not record.at.startswith("K_F[0]"):
            return ()
        return tuple(neighbors(record.parent.objects("K_R"), "question"))


@layout
class ParallelLists(Layout):
    """The arguments of EasyEdit's editor: one list for the prompts, one for the targets, and so on."""

    name = "parallel-lists"
    marks = (("prompts", "target_new"),)
    target_true = "ground_truth"
    paraphrases = "rephrase"
    drops_trailing_space = True

    def split(self, record: Record) -> Iterable[Record]:
        """One part for each prompt, with the entries that stand at its place in every list."""
        count = len(record.texts("prompts"))
        parts: list[dict[str, Any]] = [{} for _ in range(count)]
        for name, single in _LISTS.items():
            if record.has(name):
                for part, value in zip(parts, _of_length(record, name, count), strict=True):
                    part[single] = value
        for name in ("locality", "portability"):
            groups = record.inside(f"{name}_inputs")
            for group in groups.value if groups else ():
                _spread(groups.inside(str(group)) if groups else None, parts, name, str(group), count)
        return [record.child(part, f"[{i}]") for i, part in enumerate(parts)]

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """The entries of `locality_inputs` at this place."""
        return tuple(near for parts in grouped(record, "locality").values() for near in neighbors(parts))

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """The entries of `portability_inputs` at this place."""
        return {group: found for group, parts in grouped(record, "portability").items() if (found := probes(parts))}


_LISTS = {  # its lists, and what an entry of each is
    **{name: name for name in ("subject", "target_new", "ground_truth", "id")},
    **{"prompts": "prompt", "rephrase_prompts": "rephrase"},
}


def _of_length(record: Record, name: str, count: int) -> list[Any]:
    value = record.get(name)
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(listed) != count:
        raise Refused(record.named(name), f"has {counted(len(listed), 'item')}, but prompts has {count}; pair them up")
    return listed


def _spread(group: Record | None, parts: list[dict[str, Any]], name: str, key: str, count: int) -> None:
    if group is None:
        return
    prompts, said = (_of_length(group, field, count) for field in ("prompt", "ground_truth"))
    for part, prompt, answer in zip(parts, prompts, said, strict=True):
        if prompt:
            part.setdefault(name, {})[key] = [{"prompt": prompt, "ground_truth": answer}]


@layout
class CKnowEdit(Layout):
    """CKnowEdit (Fang et al. 2025): Chinese facts, with what the model said before in `target_old`."""

    name = "cknowedit"
    marks = tuple(("prompt", "target_new", "target_old", more) for more in ("portability_prompt", "locality_answer"))
    target_true = "target_old"
    paraphrases = "rephrase"

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Prompts and answers in two fields."""
        return pairs(record, "locality_prompt", "locality_answer")

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """Prompts and answers in two fields."""
        found = paired(record, "portability_prompt", "portability_answer")
        return {"portability": found} if found else {}


@layout
class ConceptEdit(Layout):
    """ConceptEdit (Wang et al. 2024): another definition for a concept."""

    name = "conceptedit"
    marks = (("phrase_prompt", "target_new_desc", "label"),)
    subject = "label"
    target_new = "target_new_desc"
    paraphrases = "phrase_prompt"

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Prompts and answers in two fields."""
        return pairs(record, "locality_prompt", "locality_answer")
