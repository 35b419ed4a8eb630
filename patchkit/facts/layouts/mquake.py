"""MQuAKE (Zhong et al. 2023), MQuAKE-CF, -CF-v2 and -T."""

from __future__ import annotations

from collections.abc import Iterable

from patchkit.facts.layout import Layout, any_of, asked, layout, stated
from patchkit.facts.record import Record, Refused
from patchkit.facts.schema import Probe


@layout
class Mquake(Layout):
    """A case of one or several rewrites, and questions that hang on all of them.

    What follows from a case stands at its first fact: the hops one by one, and the question over all of them, of which
    it is enough to answer one form.
    """

    name = "mquake"
    marks = (("requested_rewrite", "new_single_hops"),)
    target_new = "target_new.str"
    target_true = "target_true.str"
    aliases = "answer_new_aliases"
    questions = "question"
    metadata = (
        *("orig", "single_hops", "answer", "answer_alias", "answer_extended"),
        *("relation_id", "cloze"),
    )

    @classmethod
    def fit(cls, record: Record) -> int:
        """By its list of rewrites."""
        return 3 if isinstance(record.value.get("requested_rewrite"), (list, tuple)) else 0

    def split(self, record: Record) -> Iterable[Record]:
        """One part for each rewrite."""
        parts = record.objects("requested_rewrite")
        if not parts:
            raise Refused("requested_rewrite", "is empty; a case has at least one rewrite")
        return parts

    def identifier(self, record: Record) -> str | None:
        """The case's, with the number of the rewrite where it has several."""
        case, number = self.case(record), record.at.partition("[")[2].partition("]")[0]
        single = len(_whole(record).value["requested_rewrite"]) == 1
        return case if case is None or single else f"{case}.{int(number) + 1}"

    def case(self, record: Record) -> str | None:
        """All rewrites of a record are edited together."""
        return _whole(record).identifier("case_id")

    def further_prompts(self, record: Record, subject: str, target: str) -> tuple[str, ...]:
        """What the sentences of AKEW's paragraph, in its copy of MQuAKE, say before the target."""
        return stated(record.optional("fact_new_uns") or "", subject, target)

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """The hops, and the question over all of them."""
        whole = _whole(record)
        if not record.at.startswith("requested_rewrite[0]"):
            return {}
        hops = [asked(hop, "question", "answer", "answer_alias") for hop in whole.objects("new_single_hops")]
        found = {
            "single hops": tuple(probe for hop in hops for probe in hop),
            "multi-hop": any_of(asked(whole, "questions", "new_answer", "new_answer_alias")),
        }
        return {name: probes for name, probes in found.items() if probes}


def _whole(record: Record) -> Record:
    assert record.parent is not None
    return record.parent
