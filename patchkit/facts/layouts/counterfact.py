"""CounterFact (Meng et al. 2022), as published with ROME and flattened as EasyEdit ships it."""

from __future__ import annotations

from patchkit.facts.layouts import Layout, layout, pairs
from patchkit.facts.record import Record
from patchkit.facts.schema import Locality


@layout
class CounterFact(Layout):
    """`requested_rewrite` with `{}` for the subject; neighbors share the relation and its true object."""

    name = "counterfact"
    marks = (("requested_rewrite",),)
    prompt = "requested_rewrite.prompt"
    subject = "requested_rewrite.subject"
    target_new = "requested_rewrite.target_new.str"
    target_true = "requested_rewrite.target_true.str"
    paraphrases = "paraphrase_prompts"
    about = "generation_prompts"
    id = "case_id"
    drops_trailing_space = True

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """The neighbors, each with the true object that the edit must not disturb."""
        true = record.optional(self.target_true)
        near = record.texts("neighborhood_prompts")
        return tuple(Locality(prompt=text.rstrip(" \t"), target=true) for text in near if text.strip())


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
    drops_trailing_space = True
    foreign = ("target_true", "rewordings", "paraphrases", "locality")

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Prompts and answers in two fields."""
        return pairs(record, "locality_prompt", "locality_ground_truth")
