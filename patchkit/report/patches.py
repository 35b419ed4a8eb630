"""The page of one patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from patchkit.evaluate.metrics import headlines
from patchkit.evaluate.report import Report, Summary
from patchkit.patch.card import base_name
from patchkit.patch.manifest import Manifest, Run, UpdateInfo
from patchkit.report.charts import Bars, Lines, Series
from patchkit.report.page import Page, Table
from patchkit.words import agreeing, counted


def patch_page(name: str, manifest: Manifest, report: Report | None) -> Page:
    """What a patch did, from its manifest and from what was measured now; without a report only from the manifest.

    Args:
        name: of the patch, for the title.
    """
    return Page(
        title=f"{PurePath(name).name}: a patch for {PurePath(manifest.base.name).name}",
        lead=list(_lead(manifest, report)),
        headline=report or manifest.measured(),
        charts=[_norms(manifest), *_history(manifest)],
        tables=[_weights(manifest.updates), _runs(manifest.history)],
        reports={"the patch": report} if report else {},
    )


def _lead(manifest: Manifest, report: Report | None) -> Iterator[str]:
    base, methods = manifest.base, ", ".join(dict.fromkeys(run.method for run in manifest.history))
    commit = f" at commit {base.commit}" if base.commit else ""
    layers = sorted({layer for run in manifest.history for layer in run.layers})
    where = f", in {counted(len(layers), 'layer')} ({', '.join(map(str, layers))})" if layers else ""
    yield f"{counted(len(manifest.facts), 'fact')} written into {base_name(base.name)}{commit} by {methods}{where}."
    if report:
        lost = sum(not fact.holds for fact in report.per_fact)
        held = report.facts - lost
        hold = f"{held} {agreeing(held, 'hold')}, {lost} {agreeing(lost, 'do')} not."
        yield f"Measured beside the untouched base on {counted(report.facts, 'fact')}: {hold}"
    else:
        yield "The facts were not asked for; the numbers are those that the patch's last run has measured."
    yield digest_line(manifest)


def digest_line(manifest: Manifest) -> str:
    """The sentence by which a page is known for that of one patch."""
    return f"Digest {manifest.digest}."


def _last(updates: Sequence[UpdateInfo]) -> list[UpdateInfo]:
    """The last update of each weight, whose norm is that of the whole change."""
    return list({update.weight: update for update in updates}.values())


def _norms(manifest: Manifest) -> Bars:
    rows = [(short(each.weight), each.norm / each.weight_norm) for each in _last(manifest.updates) if each.weight_norm]
    own = any(fact.neuron is not None for fact in manifest.facts)
    steep = (
        " Subjects have neurons of their own here: of the projections that open the feed-forward their rows alone have "
        "changed, and are steep by design."
    )
    what = f"Frobenius norm of W' - W, divided by that of W.{steep if own else ''}"
    return Bars("How much of each weight has changed", rows, caption=what)


def short(weight: str) -> str:
    """A weight's name without what all of them have."""
    return weight.removeprefix("model.").removesuffix(".weight")


def _history(manifest: Manifest) -> Iterator[Lines]:
    """The few numbers that stand for all, after each run that was measured; a single run is no curve."""
    measured = [(number, found) for number, run in enumerate(manifest.history, 1) if (found := _measured(run))]
    for metric in headlines():
        points = [(float(number), value) for number, found in measured if (value := metric.of(found)) is not None]
        if len(points) > 1:
            yield Lines(
                metric.label, "run of the history", [Series(metric.label, points)], (0, 1) if metric.share else None
            )


def _measured(run: Run) -> Summary | None:
    return run.measured()


def _weights(updates: Sequence[UpdateInfo]) -> Table:
    rows = [
        (
            each.weight,
            f"{each.shape[0]} x {each.shape[1]}",
            f"{each.rank}",
            f"{each.norm:.4g}",
            f"{each.weight_norm:.4g}",
            f"{each.norm / each.weight_norm:.3%}" if each.weight_norm else "-",
        )
        for each in _last(updates)
    ]
    return Table("Weights", ("weight", "shape", "rank", "‖W' - W‖", "‖W‖", "changed by"), rows)


def _runs(history: Sequence[Run]) -> Table:
    rows = [
        (
            f"{number}",
            run.action,
            run.when[:16].replace("T", " "),
            run.method,
            ", ".join(map(str, run.layers)),
            f"{len(run.facts):,}",
            run.text.source,
        )
        for number, run in enumerate(history, 1)
    ]
    return Table("History", ("run", "what", "when", "method", "layers", "facts", "text"), rows, numbers=False)
