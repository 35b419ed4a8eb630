"""Before anything is edited: facts whose edits would show where nobody expects it are told, and the worst refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from patchkit.editing.closeness import Closeness, closeness
from patchkit.editing.recipe import EditConfig
from patchkit.editing.state import EditState
from patchkit.editing.wordings import template_for
from patchkit.errors import InputError
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.model.weights import Site
from patchkit.patch.history import solve_records
from patchkit.patch.patch import Patch
from patchkit.ranks import world
from patchkit.runs.workspace import Workspace
from patchkit.words import counted

_SHOWN = 10
"""Warnings printed before "and N more"."""


@dataclass(frozen=True)
class KeyCheck:
    """Looks at the facts' keys at the lowest edited site, in the metric of its statistics."""

    workspace: Workspace
    config: EditConfig
    site: Site
    covariance: Covariance

    def run(
        self,
        facts: Sequence[Fact],
        earlier: Patch | None,
        state: EditState | None,
        say: Callable[[str], None],
        allow: bool,
    ) -> None:
        """Warn of facts whose keys are close to other ones, those of `earlier`, which left `state`, included.

        Raises:
            InputError: unless `allow` is given, where the key of a fact is one that every text or every chat has.
        """
        chat, tokenizer = template_for(self.workspace.tokenizer, self.config), self.workspace.tokenizer
        known = self._earlier(earlier, state) if earlier and state else {}
        runner = self.workspace.runner
        found = world().from_first(lambda: closeness(runner, tokenizer, facts, self.site, self.covariance, chat, known))
        refused = [] if allow else [each for each in found if each.refused]
        if refused:
            raise InputError(_refusal(refused, len(facts)))
        warnings = [line for each in found for line in each.warnings()]
        for line in warnings[:_SHOWN]:
            say(line)
        if len(warnings) > _SHOWN:
            say(f"and {counted(len(warnings) - _SHOWN, 'more warning')} of this kind")

    def _earlier(self, patch: Patch, state: EditState) -> dict[str, tuple[str, Tensor]]:
        """By id, the subjects of the patch's facts and the keys that they were solved with at the site."""
        history = state.sites.get(self.site.layer)
        if history is None:
            return {}
        keys, subjects = history.prior.matrix, {fact.id: fact.subject for fact in patch.manifest.facts}
        columns = [
            (fact, column)
            for record in solve_records(patch.manifest, self.site.layer)
            for fact, column in zip(record.facts, record.columns, strict=True)
        ]
        return {fact: (subjects[fact], keys[:, column]) for fact, column in columns}


def _refusal(refused: Sequence[Closeness], count: int) -> str:
    lines = [f"{len(refused)} of {counted(count, 'fact')} would change what the model says everywhere"]
    lines += [line for each in refused[:_SHOWN] for line in each.warnings()]
    if len(refused) > _SHOWN:
        lines.append(f"and {len(refused) - _SHOWN} more")
    advice = "choose a more specific subject, or write it all the same with --allow-close-keys and look at `unrelated`"
    return "\n".join([*lines, f"{advice} (in Python: allow_close_keys=True)"])
