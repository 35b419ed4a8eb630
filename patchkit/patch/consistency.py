"""What has to agree in a manifest, beside the kinds of its values: checked once, when it is read.

Everything that reads a manifest may then rely on it: that a fact's run is in the history, that updates are in the order
of their places, and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from patchkit.editing.recipe import SWEEPS

if TYPE_CHECKING:
    from patchkit.patch.manifest import EditedFact, Manifest, Run, UpdateInfo


def check(manifest: Manifest) -> None:
    """Raises ValueError with the first thing in the manifest that contradicts another."""
    for faults in (_history(manifest), _facts(manifest), _changes(manifest), _updates(manifest)):
        if fault := next(faults, None):
            raise ValueError(fault)


def _history(manifest: Manifest) -> Iterator[str]:
    if not manifest.history:
        yield "history: empty, there must be a run that made the patch"
    for number, run in enumerate(manifest.history):
        if run.action == "apply" and not run.layers:
            yield f"history[{number}]: an apply that edited no layer"
        sweeps = run.recipe.get("sweeps", 1)
        if type(sweeps) is not int or not 1 <= sweeps <= SWEEPS:
            yield f"history[{number}].recipe.sweeps: not a number from 1 to {SWEEPS}"
        if run.recipe.get("method", run.method) != run.method:
            yield f"history[{number}].recipe.method: another one than the run's"
        if (run.action == "import") != (run.source is not None):
            yield f"history[{number}].source: imports have one, and nothing else"


def _facts(manifest: Manifest) -> Iterator[str]:
    if twice := _twice(fact.id for fact in manifest.facts):
        yield f"facts: the id {twice} twice"
    here = len(manifest.history)
    yield from _of_runs("facts", manifest.facts, manifest.history, here)
    yield from _of_runs("superseded", manifest.superseded, manifest.history, here)
    for number, run in enumerate(manifest.history):
        yield from _of_runs(f"history[{number}].removed", run.removed, manifest.history, number)
    if unknown := manifest.outcomes.keys() - {fact.id for fact in manifest.facts}:
        yield f"outcomes: {min(unknown)} is the id of no fact"
    order = [(fact.run, fact.batch) for fact in manifest.facts]
    if order != sorted(order):
        yield "facts: not in the order of their runs and batches"


def _of_runs(name: str, facts: Iterable[EditedFact], history: tuple[Run, ...], before: int) -> Iterator[str]:
    """Facts belong to applies that come before run `before`."""
    for place, fact in enumerate(facts):
        if fact.run >= before or history[fact.run].action != "apply":
            yield f"{name}[{place}].run: {fact.run} is no apply in the history before it"
        elif fact.batch >= len(history[fact.run].batches):
            yield f"{name}[{place}].batch: run {fact.run} has {len(history[fact.run].batches)}"


def _changes(manifest: Manifest) -> Iterator[str]:
    """What runs say that they did to facts can be told from the facts."""
    written = {(fact.run, fact.id) for fact in manifest.facts}
    written |= {(fact.run, fact.id) for run in manifest.history for fact in run.removed}
    for number, run in enumerate(manifest.history):
        for fact in run.removed:
            new = run.superseded.get(fact.id)
            if new is not None and (number, new) not in written:
                yield f"history[{number}].superseded: {new} is no fact of that run"


def _updates(manifest: Manifest) -> Iterator[str]:
    places = Counter[str]()
    shapes = dict[str, tuple[int, int]]()
    for number, info in enumerate(manifest.updates):
        at = f"updates[{number}]"
        if info.weight not in manifest.base.weights:
            yield f"{at}.weight: {info.weight} is not among the base's"
        if info.place != places[info.weight]:
            yield f"{at}.place: {info.place}, where {places[info.weight]} comes next"
        places[info.weight] += 1
        if shapes.setdefault(info.weight, info.shape) != info.shape:
            yield f"{at}.shape: not that of the weight's other updates"
        yield from _of_kind(at, info)


def _of_kind(at: str, info: UpdateInfo) -> Iterator[str]:
    if (info.kind == "rotation") != (info.side is not None):
        yield f"{at}.side: rotations have one, and nothing else"
    if info.angles is not None and info.kind != "rotation":
        yield f"{at}.angles: of a {info.kind}"


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
