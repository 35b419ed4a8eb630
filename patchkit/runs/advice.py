"""What to try where the guard has ended a run: what the run has not done already, and what fits why it ended."""

from __future__ import annotations

from patchkit import methods
from patchkit.editing.neurons import at_most, can_take, settled
from patchkit.editing.recipe import BY_ITSELF, EditConfig
from patchkit.errors import InputError
from patchkit.runs.guard import Guard
from patchkit.runs.prepare import Prepared
from patchkit.statistics.corpus import PACKAGE_TEXT

PARTS = 4
"""A first batch in which a run ends is to be so many the next time."""


def advice(prepared: Prepared, guard: Guard) -> list[str]:
    """What a user may try, what helps most first; `prepared` is the run as it was settled."""
    method, found = methods.get(prepared.config.method), []
    if guard.batch > 1:
        found.append(f"--batch-size {max(1, guard.batch // PARTS)}, so that batches that are good are kept")
    elif guard.looked_at == 1:
        found.append(f'the facts without "{prepared.incoming.new[0].id}"')
    if own := _neurons(prepared, guard):
        found.append(own)
    elif method.update == "full":
        found.append(f"a method that keeps more (--method {BY_ITSELF})")
    elif guard.grown and method.update != "rotation":
        found.append("a method that keeps norms as they are (--method mose-right)")
    if method.needs_statistics and guard.workspace.texts[0] == PACKAGE_TEXT:
        found.append("more text for the statistics (--text FILE)")
    return [*found, "less strict bounds (--guard NAME=X, --no-guard)"]


def _neurons(prepared: Prepared, guard: Guard) -> str:
    """How subjects would get neurons of their own, which plain text does not hear; "" where they have them, or where
    the model has none to give."""
    config, space = prepared.config, guard.workspace
    if config.neurons == "on":
        return ""
    takes = can_take(config.method)
    free = EditConfig(method=config.method if takes else BY_ITSELF)
    earlier = prepared.onto.manifest.facts if prepared.onto else ()
    taken = len({fact.subject for fact in earlier if fact.neuron is not None})
    try:
        able = settled(free, space.tokenizer, space.runner.arch, 0, taken).neurons == "on"
    except InputError:
        return ""
    left = at_most(free, space.tokenizer, space.runner.arch) - taken if able else 0
    if left <= 0:
        return ""
    how = "--set prompts=auto --set neurons=auto" if takes else f"--method {BY_ITSELF}"
    many = len({fact.subject for fact in prepared.incoming.new}) > left
    return f"neurons of subjects' own ({how}{f', and at most {left} subjects' if many else ''})"
