"""ZsRE (Levy et al. 2017) as published with MEND (Mitchell et al. 2022)."""

from __future__ import annotations

from patchkit.facts.layout import Layout, Options, layout, pairs
from patchkit.facts.record import Record
from patchkit.facts.schema import Locality


@layout
class ZsRE(Layout):
    """Teaches `alt`, the counterfactual answer, with `pred`, the answer before the edit, as the true one; or `answers`.

    `loc` keeps its "nq question: " prefix: published ZsRE figures ask the question in just these words.
    """

    name = "zsre"
    marks = (("src",), ("src", "alt"))
    prompt = "src"
    target_new = "alt"
    target_true: str | None = "pred"
    paraphrases = "rephrase"
    id = "case_id"
    metadata = ("cond", "answers", "alt", "pred")
    drops_trailing_space = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.zsre_target == "answers":
            # `pred` is often itself one of the true answers here, so it is no counterpart to the target.
            self.target_new, self.target_true = "answers", None

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """An unrelated question and its answer."""
        return pairs(record, "loc", "loc_ans")
