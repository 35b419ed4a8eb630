"""Facts as the page's script reads them: every text once, and what was said before and after in rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from patchkit.evaluate.report import FactReport, Report, said
from patchkit.words import visible


@dataclass
class Texts:
    """Texts by number, each kept once: most of what a patched model says is what the base said."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: object) -> int:
        """The number of a text."""
        return self.numbers.setdefault(visible(str(text)), len(self.numbers))

    def all(self) -> list[str]:
        """All texts in their order."""
        return list(self.numbers)


@dataclass(frozen=True)
class Shown:
    """The few words of a fact that stand for all: what is asked, and what both models say to it.

    question: empty where its prompt is gone on with.
    """

    prompt: str
    question: str
    target: str
    before: str
    after: str
    holds: bool


def shown(report: Report) -> list[Shown]:
    """A report's facts, in their order."""
    return [
        Shown(
            fact.prompt,
            fact.outcome.question or "",
            fact.target_new,
            said(fact.outcome_before, fact.target_new),
            said(fact.outcome, fact.target_new),
            fact.holds,
        )
        for fact in report.per_fact
    ]


def shown_in(data: Mapping[str, Any]) -> list[Shown]:
    """The same of the data in a page's script, whose facts that do not hold come first.

    Raises:
        LookupError, TypeError, ValueError: it is no such data.
    """
    texts, first = list(map(str, data["texts"])), data["sets"][:1]
    names = ("prompt", "question", "target", "before", "after")
    facts = [fact for each in first for fact in each["facts"]]
    return [Shown(**{name: texts[fact[name]] for name in names}, holds=bool(fact["holds"])) for fact in facts]


@dataclass(frozen=True)
class Row:
    """One text with what both models said to it.

    good: whether it is as it should be after the edit, None where nothing says so; remark: in words what is not.
    """

    label: str
    text: str
    before: str
    after: str
    good: bool | None = None
    remark: str = ""

    def packed(self, texts: Texts) -> list[Any]:
        """As the script reads it."""
        words = [texts.number(each) for each in (self.label, self.text, self.before, self.after, self.remark)]
        return [*words, None if self.good is None else int(self.good)]


def packed_report(name: str, report: Report, texts: Texts) -> dict[str, Any]:
    """One patch's facts, those that do not hold first, and what it says to texts that are about none of them."""
    ordered = sorted(report.per_fact, key=lambda fact: fact.holds)  # stable: else the order of the file
    return {
        "name": texts.number(name),
        "facts": [_packed(fact, texts) for fact in ordered],
        "others": [row.packed(texts) for row in _unrelated(report)],
    }


def _packed(fact: FactReport, texts: Texts) -> dict[str, Any]:
    sections = [(title, list(rows(fact))) for title, rows in _SECTIONS]
    before, after = fact.outcome_before, fact.outcome
    known = {
        "id": fact.id,
        "prompt": fact.prompt,
        "target": fact.target_new,
        "true": fact.target_true or "",
        "question": after.question or "",
        "before": said(before, fact.target_new),
        "after": said(after, fact.target_new),
        "why": fact.why.because if fact.why else "",
        "advice": fact.why.advice if fact.why else "",
    }
    return {
        **{key: texts.number(text) for key, text in known.items()},
        "holds": int(fact.holds),
        "chance": [_chance(fact.probability_before), _chance(fact.probability_after)],
        "unasked": int(any(row.good is False for row in _about(fact))),
        "moved": int(any(not near.unchanged for near in fact.neighbors)),
        "sections": [[texts.number(title), [row.packed(texts) for row in rows]] for title, rows in sections if rows],
    }


def _chance(share: float) -> float | None:
    """A probability, None where it is not a number."""
    return round(share, 4) if math.isfinite(share) else None


# --- what one fact was asked ------------------------------------------------------------------------------------------


def _prompt(fact: FactReport) -> Iterator[Row]:
    good = None if fact.efficacy.exact is None else bool(fact.efficacy.exact)
    yield Row("prompt", fact.prompt, fact.says_before, fact.says_after, good)


def _asked(fact: FactReport) -> Iterator[Row]:
    for each in _of(fact, "in_use", "asked"):
        yield Row(each["form"], each["question"], each["before"], each["after"], each["holds"])


def _about(fact: FactReport) -> Iterator[Row]:
    for each in _of(fact, "in_use", "about"):
        faults = ["brings up the target unasked"] * each["blurts"] + ["goes round in circles"] * each["loops"]
        yield Row("text", each["text"], each["before"], each["after"], not faults, ", ".join(faults))


def _paraphrases(fact: FactReport) -> Iterator[Row]:
    for each in fact.paraphrases:
        yield Row("paraphrase", each.prompt, each.before, each.after, each.exact)


def _neighbors(fact: FactReport) -> Iterator[Row]:
    for near in fact.neighbors:
        own = f"its own target: {near.target}" if near.target else ""
        yield Row("neighbor", near.prompt, near.before, near.after, near.unchanged, own)


def _portability(fact: FactReport) -> Iterator[Row]:
    for each in _of(fact, "portability", "probes"):
        belongs = "; ".join(" or ".join(forms) for forms in each["answers"])
        yield Row(each["group"], each["prompt"], each["before"], each["after"], each["holds"], f"expected: {belongs}")


def _more(fact: FactReport) -> Iterator[Row]:
    """Numbers of metrics that were added from outside."""
    for group, found in fact.more.items():
        for name, value in found.items():
            if isinstance(value, (int, float, str)):
                yield Row(group, name, "", str(value))


_SECTIONS: tuple[tuple[str, Callable[[FactReport], Iterator[Row]]], ...] = (
    ("Asked", _asked),
    ("The prompt, gone on with", _prompt),
    ("Paraphrases, gone on with", _paraphrases),
    ("What follows from it", _portability),
    ("Neighbors, which should stay", _neighbors),
    ("Texts about the subject", _about),
    ("Other measures", _more),
)


def _of(fact: FactReport, group: str, name: str) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = fact.more.get(group, {}).get(name, ())
    return found


def _unrelated(report: Report) -> Iterator[Row]:
    for each in report.details.get("in_use", {}).get("unrelated", ()):
        yield Row("unrelated", each["text"], each["before"], each["after"], each["same"], f"KL {each['kl']:.3f}")
