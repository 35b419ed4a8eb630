"""Benchmarks that ask questions: WikiBigEdit, QAEdit, UltraEditBench, UnKE, HalluEditBench; and FastEdit's files."""

from __future__ import annotations

from patchkit.facts.layout import Layout, asked, layout, neighbors, paired, pairs
from patchkit.facts.record import Record
from patchkit.facts.schema import Locality, Probe


@layout
class WikiBigEdit(Layout):
    """WikiBigEdit (Thede et al. 2025): `update` is the question; personas ask it in other voices."""

    name = "wikibigedit"
    marks = (("update", "ans"),)
    prompt = "update"
    target_new = "ans"
    paraphrases = "rephrase"
    metadata = ("tag", "relation", "object", "subject_id", "relation_id", "object_id")
    drops_trailing_space = True

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """An unrelated question and its answer."""
        return pairs(record, "loc", "loc_ans")

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """The question in other voices, and one a hop further."""
        voices = [name for name in record.value if isinstance(name, str) and name.startswith("personas")]
        found = {
            "personas": tuple(probe for name in voices for probe in asked(record, name, "ans")),
            "multi-hop": asked(record, "mhop", "mhop_ans"),
        }
        return {group: probes for group, probes in found.items() if probes}


@layout
class QAEdit(Layout):
    """QAEdit (Yang et al. 2025): questions of natural QA data sets, each with unrelated ones."""

    name = "qaedit"
    marks = (("prompt", "target", "subject"), ("prompt", "target", "subject", "locality", "rephrase"))
    target_new = "target"
    paraphrases = "rephrase"
    drops_trailing_space = True

    @classmethod
    def fit(cls, record: Record) -> int:
        """By its neighbors, so that no mistyped native record is taken for one."""
        near = record.value.get("locality")
        found = isinstance(near, (list, tuple)) and near and isinstance(near[0], dict) and "loc" in near[0]
        return super().fit(record) + 1 if found else 0

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Unrelated questions and their answers."""
        return tuple(neighbors(record.objects("locality"), "loc", "loc_ans"))


@layout
class UltraEditBench(Layout):
    """UltraEditBench (Gu et al. 2025): no subject is named."""

    name = "ultraeditbench"
    marks = (("prompt", "rephrase_prompt", "ans"),)
    target_new = "ans"
    paraphrases = "rephrase_prompt"
    drops_trailing_space = True

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """An unrelated question and its answer."""
        return pairs(record, "loc", "loc_ans")


@layout
class Unke(Layout):
    """UnKE (Deng et al. 2025) and EditEverything (Jiang et al. 2025): long answers, and no subject is named."""

    name = "unke"
    marks = (("question", "answer"), ("question", "answer", "para_question"))
    prompt = "question"
    target_new = "answer"
    paraphrases = "para_question"

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """Questions about parts of the answer."""
        found = paired(record, "sub_question", "sub_answer")
        return {"sub-questions": found} if found else {}


@layout
class HalluEditBench(Layout):
    """HalluEditBench (Huang et al. 2025), a CSV file: a question, the same in other forms, and what follows."""

    name = "hallueditbench"
    marks = (("subject", "relation", "object", "question"),)
    prompt = "question"
    target_new = "object"
    paraphrases = "paraphrased_question"
    metadata = ("relation", "label", "topic", "triple")

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """An unrelated question; what the base answers is to stay."""
        return tuple(Locality(prompt=text) for text in record.texts("locality_question") if text.strip())

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """Yes and no, several choices, the relation the other way round, and up to five hops further."""
        fixed = {"yes_question": "Yes", "no_question": "No"}
        found = {
            "yes or no": tuple(
                Probe(prompt=text, answers=((answer,),))
                for name, answer in fixed.items()
                for text in record.texts(name)
                if text.strip()
            ),
            "multiple choice": asked(record, "multiple_choice_with_letters", "multiple_choice_labels"),
            "reversed": asked(record, "reversed_relation_question", "subject"),
            "multi-hop": tuple(
                probe for n in range(2, 7) for probe in asked(record, f"question_{n}hop", f"answer_{n}hop")
            ),
        }
        return {group: probes for group, probes in found.items() if probes}


@layout
class FastEdit(Layout):
    """FastEdit's requests: `target`, and in `queries` what to ask the edited model."""

    name = "fastedit"
    marks = (("prompt", "subject", "target", "queries"),)
    target_new = "target"
    paraphrases = "queries"
    drops_trailing_space = True
