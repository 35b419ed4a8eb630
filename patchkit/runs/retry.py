"""Facts that a run wrote and that do not hold: edited once more, with more steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from patchkit import methods
from patchkit.editing.editor import frozen
from patchkit.editing.recipe import EditConfig
from patchkit.editing.value_config import ValueConfig
from patchkit.errors import GateError
from patchkit.evaluate.trial import Trial
from patchkit.evaluate.verify import facts_held
from patchkit.facts.schema import Fact
from patchkit.patch.history import sort_incoming
from patchkit.patch.patch import Patch
from patchkit.ranks import world
from patchkit.runs.execute import run, take_out
from patchkit.runs.guard import Guard
from patchkit.runs.prepare import Prepared
from patchkit.runs.workspace import Workspace
from patchkit.words import agreeing, counted, listed

MORE, LOWER = 2, 0.1
"""The second time a value gets so many times the steps, and goes on to so much less loss than it first stopped at."""


@dataclass(frozen=True)
class Retried:
    """The patch, and the ids of the facts that were edited again."""

    patch: Patch
    facts: tuple[str, ...] = ()


def retried(
    prepared: Prepared, workspace: Workspace, patch: Patch, guard: Guard | None, quick: bool, say: Callable[[str], None]
) -> Retried:
    """Take the new facts that do not hold out of the patch and edit them once more, with twice the steps
    and down to a tenth of the loss.

    The second patch counts where more of the new facts hold in it; its history has what was taken out and written
    again. Methods without values have no steps to give; where the guard has ended the run, nothing is added, and where
    it would end the second, the first counts; and where more than half do not hold, it is not for want of steps
    (another layer or method may do).

    Args:
        quick: a fact holds where its prompt is completed with the target; the model is not asked.
    """
    written = {fact.id for fact in patch.manifest.facts}
    facts = [fact for fact in prepared.incoming.new if fact.id in written]
    if methods.get(prepared.config.method).targets != "values" or (guard and guard.reason):
        return Retried(patch)
    lost = _lost(workspace, patch, facts, quick)
    if not lost or 2 * len(lost) > len(facts):
        return Retried(patch)
    value = prepared.config.value
    made = EditConfig.model_validate(patch.manifest.history[-1].recipe)  # with what was left to patchkit decided
    steps = MORE * value.pace(made.in_use(workspace.tokenizer)).steps
    value = value.model_copy(update={"steps": steps, "stop_loss": LOWER * value.stop_loss})
    names = listed([fact.in_short for fact in lost])
    verb = agreeing(len(lost), "do")
    say(f"{counted(len(lost), 'fact')} of {len(facts)} {verb} not hold, edited again with {steps} steps: {names}")
    second = _again(prepared, workspace, patch, lost, value, guard and guard.afresh())
    if second is None:
        say("the guard would have ended that; the first edit is kept")
        return Retried(patch)
    still = _lost(workspace, second, facts, quick)
    if len(still) >= len(lost):
        say("no more facts hold than before; the first edit is kept")
        return Retried(patch)
    return Retried(second, tuple(fact.id for fact in lost))


def _lost(workspace: Workspace, patch: Patch, facts: Collection[Fact], quick: bool) -> list[Fact]:
    def held() -> Mapping[str, bool]:
        trial = Trial(workspace.runner, workspace.tokenizer, tuple(facts), quick=quick)
        with frozen(workspace.model), patch.attached(workspace.model):
            return facts_held(trial)

    holds = world().from_first(held)
    return [fact for fact in facts if not holds[fact.id]]


def _again(
    prepared: Prepared, workspace: Workspace, patch: Patch, facts: list[Fact], value: ValueConfig, guard: Guard | None
) -> Patch | None:
    """The patch with the facts taken out and written once more; None where the guard ends that."""
    less = take_out(workspace, patch, [fact.id for fact in facts])
    layers = patch.manifest.history[-1].recipe["layers"]  # also where tracing has found them, for all facts together
    config = prepared.config.model_copy(update={"value": value, "layers": layers})
    incoming = sort_incoming(facts, less.manifest.facts)
    ready = replace(prepared, config=config, incoming=incoming, onto=less)
    try:
        second = run(ready, workspace, allow_close_keys=True, guard=guard)
    except GateError:
        return None
    return None if guard and guard.reason else second
