"""CounterFact (Meng et al. 2022), and formats that keep a fact in its `requested_rewrite`."""

from __future__ import annotations

from collections.abc import Mapping

from patchkit.facts.layout import Layout, layout, pairs, stated
from patchkit.facts.record import Record
from patchkit.facts.schema import Locality


@layout
class CounterFact(Layout):
    """As published with ROME: `{}` for the subject; neighbors share the relation and its true object."""

    name = "counterfact"
    marks = (("requested_rewrite",),)
    prompt = "requested_rewrite.prompt"
    subject = "requested_rewrite.subject"
    target_new = "requested_rewrite.target_new.str"
    target_true = "requested_rewrite.target_true.str"
    paraphrases = "paraphrase_prompts"
    about = "generation_prompts"
    id = "case_id"
    metadata = ("pararel_idx",)
    drops_trailing_space = True

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """The neighbors, each with the true object that the edit must not disturb."""
        true = record.optional(self.target_true)
        near = record.texts("neighborhood_prompts")
        return tuple(Locality(prompt=text.rstrip(" \t"), target=true) for text in near if text.strip())


@layout
class Akew(CounterFact):
    """AKEW (Wu et al. 2024): CounterFact and WikiUpdate with questions, aliases and an unrelated question.

    Of the paragraph `fact_new_uns`, from which AKEW's unstructured half learns, the sentences that name the subject and
    then the target become rewordings, up to the target. What else the paragraph claims is not written.
    """

    name = "akew"
    aliases = "requested_rewrite.answer_new_aliases"
    questions = "requested_rewrite.question"

    @classmethod
    def fit(cls, record: Record) -> int:
        """By what CounterFact's own records do not have."""
        rewrite = record.value.get("requested_rewrite")
        return 2 if isinstance(rewrite, Mapping) and ("fact_new_uns" in rewrite or "answer_new" in rewrite) else 0

    def further_prompts(self, record: Record, subject: str, target: str) -> tuple[str, ...]:
        """What the paragraph's sentences say before the target."""
        return stated(record.optional("requested_rewrite.fact_new_uns") or "", subject, target)

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """CounterFact's neighbors, and `loc`."""
        return (*super().locality(record), *pairs(record, "loc", "loc_ans"))


@layout
class RomeRequest(Layout):
    """The requests of ROME's and MEMIT's code: `target_new` is an object with `str`."""

    name = "rome-request"
    marks = (("prompt", "subject", "target_new"),)
    target_new = "target_new.str"
    target_true = "target_true.str"
    id = "case_id"
    metadata = ("relation_id",)
    drops_trailing_space = True

    @classmethod
    def fit(cls, record: Record) -> int:
        """By the object that holds the target."""
        return 3 if isinstance(record.value.get("target_new"), Mapping) and "prompt" in record.value else 0
