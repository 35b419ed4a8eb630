"""Why a fact of a patch does not hold, and what to try: from what was measured and from how it was written."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from patchkit import methods
from patchkit.evaluate.report import FactReport, Report, Why
from patchkit.patch.history import solve_records
from patchkit.patch.manifest import EditedFact, Manifest
from patchkit.patch.patch import Patch
from patchkit.patch.resolve import Sites
from patchkit.words import counted

LEARNED = math.log(2)
"""Nats: a value that predicts the target's tokens with less than a half each was never found."""
ALIKE = 0.5
"""Cosine of two facts' keys, averaged over the edited weights, from which on one may have overwritten the other."""

_MORE = {
    "values": "try more steps (--set value.steps=N), a longer change (--set value.clamp=X)",
    "gradients": "try more sweeps (--set sweeps=N), a larger step (--set rate=X)",
    "none": "try more steps (--set steps=N), a larger bound (--set bound=X)",
}
"""What to try, by what the method's solves are for (`Method.targets`)."""


def with_reasons(report: Report, patch: Patch, sites: Sites) -> Report:
    """The report with `why` for every fact of the patch that does not hold; other facts have nothing to tell it by."""
    written = {(fact.id, fact.prompt): fact for fact in patch.manifest.facts}
    failed = {each.id: written.get((each.id, each.prompt)) for each in report.per_fact if not each.holds}
    if not any(failed.values()):
        return report
    keys = _unit_keys(patch, sites)
    facts = (
        each.model_copy(update={"why": _why(each, fact, patch.manifest, keys)})
        if (fact := failed.get(each.id))
        else each
        for each in report.per_fact
    )
    return report.model_copy(update={"per_fact": tuple(facts)})


def _why(found: FactReport, fact: EditedFact, manifest: Manifest, keys: Mapping[str, list[Tensor]]) -> Why:
    if fact.target_loss > LEARNED:
        return _never_learned(fact, manifest.history[fact.run].method)
    if found.efficacy.exact:
        return Why(
            kind="not in other words",
            because="learned, but not in other words: the prompt is completed with the target, a question is answered "
            "otherwise",
            advice="give it `rewordings`, or edit with --set prompts=in-use",
        )
    return _overwritten(fact, manifest, keys)


def _never_learned(fact: EditedFact, method: str) -> Why:
    known = method in methods.available()  # of one that is not installed here, no settings can be named
    targets = methods.get(method).targets if known else "values"
    after = f"after {counted(fact.steps, 'step')}" if targets == "values" else "after the edit"
    return Why(
        kind="never learned",
        because=f"never learned: {after} its target's tokens have a mean probability of "
        f"{math.exp(-fact.target_loss):.0%}",
        advice=f"{_MORE[targets]}, or a shorter target",
    )


def _overwritten(fact: EditedFact, manifest: Manifest, keys: Mapping[str, list[Tensor]]) -> Why:
    """Learned, and yet not there: it may be a fact with a similar key that was solved for with it or later."""
    after = [each for each in manifest.facts if each.id != fact.id and (each.run, each.batch) >= (fact.run, fact.batch)]
    close = {each.id: 1.0 if each.subject == fact.subject else _cosine(keys, fact.id, each.id) for each in after}
    worst = max(after, key=lambda each: close[each.id], default=None)
    if worst is not None and close[worst.id] >= ALIKE:
        how = "the same subject" if worst.subject == fact.subject else f"keys with a cosine of {close[worst.id]:.2f}"
        return Why(
            kind="broken",
            because=f'learned, but broken by fact {worst.id} ("{worst.subject}": {how})',
            advice="revert one of the two, or name their subjects more unlike",
            by=worst.id,
        )
    others = counted(len(after), "other fact")
    together = any((each.run, each.batch) == (fact.run, fact.batch) for each in after)
    return Why(
        kind="lost",
        because=f"learned, but lost among the {others} written with it or later" if after else "learned, but not kept",
        advice=f"try {'a smaller --batch-size, ' if together else ''}more layers (--layers), or --method rome "
        "(fact by fact)",
    )


def _unit_keys(patch: Patch, sites: Sites) -> dict[str, list[Tensor]]:
    """By fact its key at each edited weight, of length 1; none for a patch without its state."""
    found: dict[str, list[Tensor]] = {}
    for name, site in sites.items():
        if f"{name}.keys" not in patch.state:
            continue
        columns = patch.state[f"{name}.keys"].double()
        units = columns / columns.norm(dim=0).clamp_min(1e-30)
        for record in solve_records(patch.manifest, site.layer):
            for fact, column in zip(record.facts, record.columns, strict=True):
                found.setdefault(fact, []).append(units[:, column])
    return found


def _cosine(keys: Mapping[str, list[Tensor]], one: str, other: str) -> float:
    pairs = list(zip(keys.get(one, ()), keys.get(other, ()), strict=False))
    return float(torch.stack([a @ b for a, b in pairs]).mean()) if pairs else 0.0
