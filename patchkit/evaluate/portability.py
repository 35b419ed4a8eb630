"""What follows from the facts: whether the patched model answers it, and whether the base did already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from patchkit.evaluate import wording
from patchkit.evaluate.answers import Ask, Said, answer, fits, is_chat
from patchkit.evaluate.interview import ANSWER_TOKENS
from patchkit.evaluate.trial import Found, Trial
from patchkit.facts.schema import Answers, Probe


@dataclass(frozen=True)
class _Answer:
    """A probe of a fact with what both models say to its prompts, joined by " | " where it has alternatives."""

    fact: str
    group: str
    prompt: str
    answers: Answers
    before: str
    after: str
    held_before: bool
    holds: bool


class Portability:
    """The instrument of the group portability."""

    def base(self, trial: Trial) -> Mapping[Ask, Said]:
        """What the base says to all probes and to the conditions that they count under."""
        probes = _Probes(trial)
        return probes.said([ask for probe in probes.all for ask in probes.asks(probe, conditions=True)])

    def patched(self, trial: Trial, base: Mapping[Ask, Said]) -> Found:
        """What the model as it now is says to the probes that count."""
        probes = _Probes(trial)
        counted = [each for each in probes.of_facts if probes.counts(each[2], base)]
        asks = [ask for *_, probe in counted for ask in probes.asks(probe)]
        after = base if trial.untouched else probes.said(asks)
        return _found([_answer(probes, *each, base, after) for each in counted])


@dataclass(frozen=True)
class _Probes:
    """The probes of a trial's facts, but for what has more tokens than the model has positions."""

    trial: Trial

    @cached_property
    def of_facts(self) -> list[tuple[str, str, Probe]]:
        """Fact, group and probe."""
        every = (
            (fact.id, group, probe)
            for fact in self.trial.facts
            for group, probes in fact.portability.items()
            for probe in probes
        )
        return [each for each in every if all(map(self._fits, self.asks(each[2], conditions=True)))]

    @property
    def all(self) -> Iterator[Probe]:
        """Every one."""
        return (probe for *_, probe in self.of_facts)

    def asks(self, probe: Probe, conditions: bool = False) -> list[Ask]:
        """Its prompt and the alternatives to it, and with `conditions` what the base has to know."""
        texts = [probe.prompt, *probe.alternatives]
        return [self._ask(text) for text in (*texts, *(c.prompt for c in probe.conditions if conditions))]

    def counts(self, probe: Probe, base: Mapping[Ask, Said]) -> bool:
        """Whether the base answers all of its conditions: nothing follows from what it does not know."""
        return all(_holds([base[self._ask(each.prompt)].text], each.answers) for each in probe.conditions)

    def said(self, asks: Sequence[Ask]) -> dict[Ask, Said]:
        """What the model as it now is says."""
        return answer(self.trial.runner, self.trial.tokenizer, dict.fromkeys(asks, ANSWER_TOKENS))

    def _ask(self, text: str) -> Ask:
        """A message to a chat model; for another one a question is asked, and any other text is to be gone on with."""
        return Ask(text, message=is_chat(self.trial.tokenizer) or text.rstrip().endswith("?"))

    def _fits(self, ask: Ask) -> bool:
        return fits(self.trial.runner, self.trial.tokenizer, ask, ANSWER_TOKENS)


def _holds(texts: Sequence[str], answers: Answers) -> bool:
    """Whether one of the texts has every item of the answer in any of its forms."""
    return any(all(wording.holds(text, forms) for forms in answers) for text in texts)


def _answer(
    probes: _Probes, fact: str, group: str, probe: Probe, base: Mapping[Ask, Said], patched: Mapping[Ask, Said]
) -> _Answer:
    before, after = ([said[ask].text for ask in probes.asks(probe)] for said in (base, patched))
    prompt = " | ".join((probe.prompt, *probe.alternatives))
    holds = [_holds(texts, probe.answers) for texts in (before, after)]
    return _Answer(fact, group, prompt, probe.answers, " | ".join(before), " | ".join(after), *holds)


def _found(rows: Sequence[_Answer]) -> Found:
    groups = defaultdict[str, list[_Answer]](list)
    per_fact: dict[str, dict[str, Any]] = {}
    for row in rows:
        groups[row.group].append(row)
        said = asdict(row)
        per_fact.setdefault(said.pop("fact"), {"probes": []})["probes"].append(said)
    values = {"held": _by_fact(rows, "holds"), "before": _by_fact(rows, "held_before")}
    shares = {group: {"held": _by_fact(of, "holds"), "probes": len(of)} for group, of in groups.items()}
    return Found(values, {"held": len(rows)}, per_fact, details={"groups": shares} if shares else {})


def _by_fact(rows: Sequence[_Answer], what: str) -> float | None:
    """The mean over facts of the share of a fact's probes."""
    facts = defaultdict[str, list[bool]](list)
    for row in rows:
        facts[row.fact].append(getattr(row, what))
    return fmean(fmean(each) for each in facts.values()) if facts else None
