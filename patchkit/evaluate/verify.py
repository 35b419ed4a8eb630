"""What a patch did: every reading is taken twice, on the untouched base and with the patch attached.

Teacher-forced and freely generated results are kept apart, because published editors fall from 97 % to 39 % between
the two ("The Mirage of Model Editing", arXiv 2502.11177).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from patchkit.evaluate.in_use import asked_alone
from patchkit.evaluate.metrics import instruments
from patchkit.evaluate.readings import Reading, generate, perplexity, read_targets
from patchkit.evaluate.report import (
    Counts,
    FactReport,
    LocalityRates,
    Rates,
    Report,
)
from patchkit.evaluate.texts import NeighborReport, ParaphraseReport, Perplexity
from patchkit.evaluate.trial import Found, Trial
from patchkit.facts.schema import Fact, Locality, Pair
from patchkit.model.forward import LayerRunner
from patchkit.statistics.corpus import Corpus

Progress = Callable[[int, int], None]
Step = Callable[[], None]


@dataclass(frozen=True)
class Answers:
    """What one model, base or patched, makes of facts: readings, greedy continuations, perplexity of plain text.

    tokens: how many the perplexity stands on. bases: what the groups of metrics with an instrument of their own took
    from the base; found: what they found with it; both by the group's name.
    """

    readings: Mapping[Pair, Reading]
    said: Mapping[Pair, str]
    perplexity: float | None
    tokens: int = 0
    bases: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Found] = field(default_factory=dict)


def verify(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    attached: Callable[[], AbstractContextManager[Any]],
    corpus: Corpus | None = None,
    progress: Progress = lambda done, total: None,
    before: Answers | None = None,
    quick: bool = False,
) -> Report:
    """Measure `facts` on the base and inside `attached()`; perplexity too where a corpus is given.

    `before` is what the base answers to these facts, and perhaps to more, if that is known already. `quick` leaves out
    the groups of metrics for which the model writes texts.
    """
    trial = Trial(runner, tokenizer, facts, corpus, quick)
    steps = 2 + (corpus is not None) + len(instruments(trial))
    step = _counter(progress, 2 * steps, steps if before else 0)
    if before is None:
        before = ask_base(trial, step)
    with attached():
        after = ask_patched(trial, before, step)
    return compare(facts, before, after)


def ask_base(trial: Trial, step: Step = lambda: None) -> Answers:
    """What the base answers to the facts of `trial`."""
    answers, bases = ask(trial, step), {}
    for name, instrument in instruments(trial).items():
        bases[name] = instrument.base(trial)
        step()
    return replace(answers, bases=bases)


def ask_patched(trial: Trial, base: Answers, step: Step = lambda: None) -> Answers:
    """What the model as it now is answers to the facts of `trial`, `base` being what the base made of them."""
    return _measured_by_instruments(trial, ask(trial, step), base, step)


def ask_unpatched(trial: Trial, base: Answers) -> Answers:
    """What the base answers, taken for a patched model's: the reading of a patch that does nothing."""
    return _measured_by_instruments(replace(trial, untouched=True), base, base, lambda: None)


def ask(trial: Trial, step: Step = lambda: None) -> Answers:
    """What the model as it now is answers to the facts of `trial`, without the groups that have an instrument."""
    readings = read_targets(trial.runner, trial.tokenizer, asked_pairs(trial.facts))
    step()
    prompts = [f.pair(p) for f in trial.facts for p in (f.prompt, *f.paraphrases)]
    said = generate(trial.runner, trial.tokenizer, prompts)
    step()
    if trial.corpus is None:
        return Answers(readings, said, None)
    found = perplexity(trial.runner, trial.corpus)
    step()
    return Answers(readings, said, found, sum(max(0, len(window) - 1) for window in trial.corpus.windows))


def compare(facts: Sequence[Fact], before: Answers, after: Answers) -> Report:
    """The report on `facts` from what the base answers and what the patched model does."""
    reports = tuple(_report(fact, before, after) for fact in facts)
    old, new = before.perplexity, after.perplexity
    known = old is not None and new is not None
    counts = _summed([report.counts for report in reports])
    counts["perplexity"] = {"ratio": after.tokens if known else 0}
    counts |= {name: dict(found.counts) for name, found in after.found.items()}
    return Report(
        facts=len(facts),
        efficacy=_mean_rates([report.efficacy for report in reports]),
        generalization=_mean_rates([report.generalization for report in reports]),
        locality=_mean_locality([report.locality for report in reports]),
        perplexity=None if old is None or new is None else Perplexity(before=old, after=new, ratio=new / old),
        counts=counts,
        more={name: dict(found.values) for name, found in after.found.items()},
        per_fact=reports,
        details={name: dict(found.details) for name, found in after.found.items() if found.details},
    )


def facts_held(trial: Trial) -> dict[str, bool]:
    """By fact whether the model as it now is holds it, as `FactReport.holds` says, and nothing else."""
    readings = read_targets(trial.runner, trial.tokenizer, [fact.pair(fact.prompt) for fact in trial.facts])
    exact = {fact.id: readings[fact.pair(fact.prompt)].exact for fact in trial.facts}
    return exact if trial.quick else exact | asked_alone(trial)


# --- asking -----------------------------------------------------------------------------------------------------------


def _counter(progress: Progress, total: int, done: int) -> Step:

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return step


def _measured_by_instruments(trial: Trial, answers: Answers, base: Answers, step: Step) -> Answers:
    found = {}
    for name, instrument in instruments(trial).items():
        found[name] = instrument.patched(trial, base.bases[name])
        step()
    return replace(answers, found=found)


def asked_pairs(facts: Iterable[Fact]) -> list[Pair]:
    """Every pair of a prompt and a target that the metrics look at, once."""
    pairs: dict[Pair, None] = {}
    for fact in facts:
        targets = [t for t in (fact.target_new, fact.target_true) if t]
        pairs |= dict.fromkeys(fact.pair(p, t) for p in (fact.prompt, *fact.paraphrases) for t in targets)
        for near in fact.locality:
            pairs |= dict.fromkeys((near.prompt, t) for t in (near.target or fact.target_new, fact.target_new))
    return list(pairs)


# --- one fact ---------------------------------------------------------------------------------------------------------


class _Share(NamedTuple):
    """A share, and of how many; None of 0."""

    value: float | None
    of: int

    @classmethod
    def true(cls, values: Iterable[bool]) -> _Share:
        """The share of true ones."""
        values = list(values)
        return cls(sum(values) / len(values) if values else None, len(values))


_Shares = dict[str, _Share]


def _report(fact: Fact, before: Answers, after: Answers) -> FactReport:
    pair = fact.pair(fact.prompt)
    shares = {
        "efficacy": _rates(fact, [fact.prompt], after),
        "generalization": _rates(fact, fact.paraphrases, after),
        "locality": _locality(fact, before.readings, after.readings),
    }
    values = {group: {name: share.value for name, share in found.items()} for group, found in shares.items()}
    return FactReport(
        id=fact.id,
        prompt=fact.prompt,
        subject=fact.subject,
        target_new=fact.target_new,
        target_true=fact.target_true,
        says_before=before.said[pair].strip(),
        says_after=after.said[pair].strip(),
        probability_before=_probability(before.readings[pair]),
        probability_after=_probability(after.readings[pair]),
        efficacy=Rates(**values["efficacy"]),
        generalization=Rates(**values["generalization"]),
        locality=LocalityRates(**values["locality"]),
        counts={group: {name: share.of for name, share in found.items()} for group, found in shares.items()},
        paraphrases=tuple(_paraphrase(fact, prompt, before, after) for prompt in fact.paraphrases),
        neighbors=tuple(_neighbor(fact, near, before.readings, after.readings) for near in fact.locality),
        more={name: dict(found.per_fact.get(fact.id, {})) for name, found in after.found.items()},
        asked=next((found.asked[fact.id] for found in after.found.values() if fact.id in found.asked), None),
    )


def _paraphrase(fact: Fact, prompt: str, before: Answers, after: Answers) -> ParaphraseReport:
    pair = fact.pair(prompt)
    said = (each.said[pair].strip() for each in (before, after))
    return ParaphraseReport(prompt=prompt, before=next(said), after=next(said), exact=after.readings[pair].exact)


def _neighbor(
    fact: Fact, near: Locality, before: Mapping[Pair, Reading], after: Mapping[Pair, Reading]
) -> NeighborReport:
    old, new = (readings[near.prompt, near.target or fact.target_new] for readings in (before, after))
    return NeighborReport(
        prompt=near.prompt,
        target=near.target,
        before=old.said.strip(),
        after=new.said.strip(),
        unchanged=old.argmax == new.argmax,
    )


def _probability(reading: Reading) -> float:
    return float(torch.tensor(reading.log_probability).exp())


def _rates(fact: Fact, prompts: Sequence[str], after: Answers) -> _Shares:
    new = [after.readings[fact.pair(prompt)] for prompt in prompts]
    true = [after.readings[fact.pair(prompt, fact.target_true)] for prompt in prompts] if fact.target_true else []
    return {
        "success": _Share.true(n.log_probability > t.log_probability for n, t in zip(new, true, strict=bool(true))),
        "exact": _Share.true(n.exact for n in new),
        "generated": _Share.true(after.said[fact.pair(p)].strip().startswith(fact.target_new) for p in prompts),
    }


def _locality(fact: Fact, before: Mapping[Pair, Reading], after: Mapping[Pair, Reading]) -> _Shares:
    own = [(near.prompt, near.target or fact.target_new) for near in fact.locality]
    known = [(near.prompt, near.target) for near in fact.locality if near.target and near.target != fact.target_new]
    return {
        "success": _Share.true(
            after[prompt, target].log_probability > after[prompt, fact.target_new].log_probability
            for prompt, target in known
        ),
        "unchanged": _Share.true(before[pair].argmax == after[pair].argmax for pair in own),
    }


# --- all facts --------------------------------------------------------------------------------------------------------


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean_rates(rates: Sequence[Rates]) -> Rates:
    return Rates(**{name: _mean(getattr(each, name) for each in rates) for name in Rates.model_fields})


def _mean_locality(rates: Sequence[LocalityRates]) -> LocalityRates:
    return LocalityRates(**{name: _mean(getattr(each, name) for each in rates) for name in LocalityRates.model_fields})


def _summed(counts: Sequence[Counts]) -> Counts:
    """How many items there are over all facts."""
    total: Counts = {}
    for each in counts:
        for group, of in each.items():
            so_far = total.setdefault(group, {})
            for name, count in of.items():
                so_far[name] = so_far.get(name, 0) + count
    return total
