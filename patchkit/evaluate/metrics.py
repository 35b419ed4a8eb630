"""What a patch did: every reading is taken twice, on the untouched base and with the patch attached.

Teacher-forced and freely generated results are kept apart, because published editors fall from 97 % to 39 % between
the two ("The Mirage of Model Editing", arXiv 2502.11177).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from transformers import GenerationConfig

from patchkit.facts.requests import encode_target, pad
from patchkit.facts.schema import Fact
from patchkit.model.forward import LayerRunner
from patchkit.statistics.moments import Corpus

ROWS = 32
Progress = Callable[[int, int], None]


class Rates(BaseModel):
    """Shares in 0..1. success: P(new) > P(true) on mean token log-probability, None where no fact has a target_true;
    exact: every target token is the teacher-forced argmax; generated: greedy generation starts with the target."""

    model_config = ConfigDict(frozen=True)
    success: float | None
    exact: float | None
    generated: float | None

    @property
    def success_or_exact(self) -> float | None:
        """success, or exact where no fact has a target_true to compare with."""
        return self.exact if self.success is None else self.success


class LocalityRates(BaseModel):
    """success: the neighbour's own target is likelier than target_new; unchanged: the base's argmax tokens stay."""

    model_config = ConfigDict(frozen=True)
    success: float | None
    unchanged: float | None


class Perplexity(BaseModel):
    """Perplexity of plain text on the base and with the patch."""

    model_config = ConfigDict(frozen=True)
    before: float
    after: float
    ratio: float


class FactReport(BaseModel):
    """One fact: probabilities are geometric means over the target's tokens; `says` is the greedy continuation."""

    model_config = ConfigDict(frozen=True)
    id: str
    prompt: str
    target_new: str
    target_true: str | None
    says_before: str
    says_after: str
    probability_before: float
    probability_after: float
    efficacy: Rates
    generalization: Rates
    locality: LocalityRates


class Report(BaseModel):
    """What `patchkit verify --json` prints. None stands for a rate that no fact has the data for."""

    model_config = ConfigDict(frozen=True)
    facts: int
    efficacy: Rates
    generalization: Rates
    locality: LocalityRates
    perplexity: Perplexity | None
    per_fact: tuple[FactReport, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the single facts, as a manifest keeps it."""
        return self.model_dump(mode="json", exclude={"per_fact"})


@dataclass(frozen=True)
class Reading:
    """One target behind one prompt: mean token log-probability, whether every token is the argmax, those argmaxes."""

    log_probability: float
    exact: bool
    argmax: tuple[int, ...]


Pair = tuple[str, str]  # prompt, target


@dataclass(frozen=True)
class Answers:
    """What one model, base or patched, makes of facts: readings, greedy continuations, perplexity of plain text."""

    readings: Mapping[Pair, Reading]
    said: Mapping[Pair, str]
    perplexity: float | None


def verify(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    attached: Callable[[], AbstractContextManager[Any]],
    corpus: Corpus | None = None,
    progress: Progress = lambda done, total: None,
    before: Answers | None = None,
) -> Report:
    """Measure `facts` on the base and inside `attached()`; perplexity too where a corpus is given.

    `before` is what the base answers to these facts, and perhaps to more, if that is known already.
    """
    steps = 3 if corpus else 2
    if before is None:
        before = ask(runner, tokenizer, facts, corpus, lambda done: progress(done, 2 * steps), paraphrases=False)
    with attached():
        after = ask(runner, tokenizer, facts, corpus, lambda done: progress(steps + done, 2 * steps))
    return compare(facts, before, after)


def ask(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    corpus: Corpus | None = None,
    progress: Callable[[int], None] = lambda done: None,
    paraphrases: bool = True,
) -> Answers:
    """What the model, as it is now, answers to `facts`; without `paraphrases` it continues their prompts alone."""
    readings = read_targets(runner, tokenizer, _asked(facts))
    progress(1)
    prompts = [(p, f.target_new) for f in facts for p in (f.prompt, *(f.paraphrases if paraphrases else ()))]
    said = generate(runner, tokenizer, prompts)
    progress(2)
    found = perplexity(runner, corpus) if corpus else None
    if corpus:
        progress(3)
    return Answers(readings, said, found)


def compare(facts: Sequence[Fact], before: Answers, after: Answers) -> Report:
    """The report on `facts` from what the base answers and what the patched model does."""
    reports = tuple(_report(fact, before, after) for fact in facts)
    old, new = before.perplexity, after.perplexity
    return Report(
        facts=len(facts),
        efficacy=_mean_rates(r.efficacy for r in reports),
        generalization=_mean_rates(r.generalization for r in reports),
        locality=_mean_locality(r.locality for r in reports),
        perplexity=None if old is None or new is None else Perplexity(before=old, after=new, ratio=new / old),
        per_fact=reports,
    )


def _asked(facts: Iterable[Fact]) -> list[Pair]:
    """Every (prompt, target) that the metrics look at, once."""
    pairs: dict[Pair, None] = {}
    for fact in facts:
        targets = [t for t in (fact.target_new, fact.target_true) if t]
        pairs |= dict.fromkeys((p, t) for p in (fact.prompt, *fact.paraphrases) for t in targets)
        for near in fact.locality:
            pairs |= dict.fromkeys((near.prompt, t) for t in (near.target or fact.target_new, fact.target_new))
    return list(pairs)


@torch.no_grad()
def read_targets(runner: LayerRunner, tokenizer: Any, pairs: Sequence[Pair]) -> dict[Pair, Reading]:
    """Teacher-forced readings of every pair; the head runs at target positions only."""
    encoded = {pair: encode_target(tokenizer, *pair) for pair in pairs}
    order = sorted(encoded, key=lambda pair: len(encoded[pair][0]))  # like lengths together: little padding
    readings: dict[Pair, Reading] = {}
    for i in range(0, len(order), ROWS):
        chunk = order[i : i + ROWS]
        readings |= _read_chunk(runner, chunk, [encoded[pair] for pair in chunk])
    return readings


def _read_chunk(
    runner: LayerRunner, pairs: Sequence[Pair], encoded: Sequence[tuple[list[int], int]]
) -> dict[Pair, Reading]:
    ids, mask = pad([row for row, _ in encoded], runner.device)
    points = [(i, t) for i, (row, first) in enumerate(encoded) for t in range(first, len(row))]
    rows, at = torch.tensor(points, device=ids.device).T
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    logits = runner.run(inputs, logits_at=(rows, at - 1)).logits
    assert logits is not None
    log_probs = logits.float().log_softmax(-1)  # (points, vocab)
    wanted = ids[rows, at]
    token = log_probs.gather(1, wanted.unsqueeze(1)).squeeze(1).tolist()
    argmax = log_probs.argmax(-1).tolist()
    found: dict[Pair, Reading] = {}
    start = 0
    for pair, (row, first) in zip(pairs, encoded, strict=True):
        stop = start + len(row) - first
        best = tuple(argmax[start:stop])
        found[pair] = Reading(sum(token[start:stop]) / (stop - start), best == tuple(row[first:]), best)
        start = stop
    return found


@torch.no_grad()
def generate(runner: LayerRunner, tokenizer: Any, pairs: Sequence[Pair], extra: int = 3) -> dict[Pair, str]:
    """Greedy continuation of each prompt, as many tokens as its target has and `extra` more.

    Only prompts of equal length share a batch: no padding, so the batch has no influence on what is said.
    """
    groups: dict[int, list[tuple[Pair, list[int], int]]] = defaultdict(list)
    for pair in dict.fromkeys(pairs):
        ids, first = encode_target(tokenizer, *pair)
        groups[first].append((pair, ids[:first], len(ids) - first + extra))
    said: dict[Pair, str] = {}
    for group in groups.values():
        for i in range(0, len(group), ROWS):
            chunk = group[i : i + ROWS]
            prompts = torch.tensor([ids for _, ids, _ in chunk], device=runner.device)
            wanted = max(count for _, _, count in chunk)
            out = runner.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=GenerationConfig(
                    max_new_tokens=wanted,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
                    eos_token_id=tokenizer.eos_token_id,
                ),
            )
            for (pair, ids, count), row in zip(chunk, out.tolist(), strict=True):
                said[pair] = tokenizer.decode(row[len(ids) : len(ids) + count], skip_special_tokens=True)
    return said


@torch.no_grad()
def perplexity(runner: LayerRunner, corpus: Corpus) -> float:
    """exp of the mean next-token loss over the corpus's windows."""
    total, count = 0.0, 0
    for window in corpus.windows:
        if len(window) < 2:
            continue
        ids = torch.tensor([window], device=runner.device)
        logits = runner.run({"input_ids": ids, "use_cache": False}).logits
        assert logits is not None
        total += float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
        count += len(window) - 1
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def _report(fact: Fact, before: Answers, after: Answers) -> FactReport:
    pair = (fact.prompt, fact.target_new)
    return FactReport(
        id=fact.id,
        prompt=fact.prompt,
        target_new=fact.target_new,
        target_true=fact.target_true,
        says_before=before.said[pair].strip(),
        says_after=after.said[pair].strip(),
        probability_before=_probability(before.readings[pair]),
        probability_after=_probability(after.readings[pair]),
        efficacy=_rates(fact, [fact.prompt], after),
        generalization=_rates(fact, fact.paraphrases, after),
        locality=_locality(fact, before.readings, after.readings),
    )


def _probability(reading: Reading) -> float:
    return float(torch.tensor(reading.log_probability).exp())


def _rates(fact: Fact, prompts: Sequence[str], after: Answers) -> Rates:
    new = [after.readings[prompt, fact.target_new] for prompt in prompts]
    true = [after.readings[prompt, fact.target_true] for prompt in prompts] if fact.target_true else []
    return Rates(
        success=_mean(n.log_probability > t.log_probability for n, t in zip(new, true, strict=bool(true))),
        exact=_mean(n.exact for n in new),
        generated=_mean(after.said[p, fact.target_new].strip().startswith(fact.target_new) for p in prompts),
    )


def _locality(fact: Fact, before: Mapping[Pair, Reading], after: Mapping[Pair, Reading]) -> LocalityRates:
    own = [(near.prompt, near.target or fact.target_new) for near in fact.locality]
    known = [(near.prompt, near.target) for near in fact.locality if near.target and near.target != fact.target_new]
    return LocalityRates(
        success=_mean(
            after[prompt, target].log_probability > after[prompt, fact.target_new].log_probability
            for prompt, target in known
        ),
        unchanged=_mean(before[pair].argmax == after[pair].argmax for pair in own),
    )


def _mean(values: Iterable[float | bool | None]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _mean_rates(rates: Iterable[Rates]) -> Rates:
    rates = list(rates)
    return Rates(**{name: _mean(getattr(r, name) for r in rates) for name in Rates.model_fields})


def _mean_locality(rates: Iterable[LocalityRates]) -> LocalityRates:
    rates = list(rates)
    return LocalityRates(**{name: _mean(getattr(r, name) for r in rates) for name in LocalityRates.model_fields})
