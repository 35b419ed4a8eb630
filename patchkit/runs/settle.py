"""What a recipe leaves open until the model and the facts are known: layers, sweeps, neurons of subjects' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from patchkit.editing.neurons import settled
from patchkit.editing.recipe import LOCATE, EditConfig
from patchkit.editing.session import plan
from patchkit.errors import InputError
from patchkit.facts.schema import Fact
from patchkit.methods import Beside
from patchkit.runs.locate import locate
from patchkit.runs.prepare import Prepared
from patchkit.runs.workspace import Workspace
from patchkit.words import counted

TRACED = 20
"""Facts that are traced, the first ones."""


def settle(
    prepared: Prepared, workspace: Workspace, taken: int, say: Callable[[str], None] = lambda note: None
) -> EditConfig:
    """The recipe with layers=locate, neurons=auto and how often it goes over the layers decided for the new facts,
    where `taken` neurons were rewritten before.

    Raises:
        InputError: no fact can be located, or neurons=on, and the method or the model cannot.
    """
    facts, arch = prepared.incoming.new, workspace.runner.arch
    config = prepared.config
    if config.layers == LOCATE and facts:
        config = config.model_copy(update={"layers": _located(facts, workspace, say)})
    config = settled(config, workspace.tokenizer, arch, len({fact.subject for fact in facts}), taken)
    return config.model_copy(update={"sweeps": plan(arch, config).sweeps})


def with_network(config: EditConfig, beside: Mapping[int, Beside]) -> EditConfig:
    """The recipe with the digest of the network that it edits with, where its method has one and the recipe names
    none."""
    digest = next((each.digest for each in beside.values() if each.digest is not None), None)
    if digest is None or config.settings.get("network"):
        return config
    return config.model_copy(update={"settings": {**config.settings, "network": digest}})


def _located(facts: Sequence[Fact], workspace: Workspace, say: Callable[[str], None]) -> str:
    """The layers that tracing the first facts recommends."""
    try:
        found = locate(workspace.runner, workspace.tokenizer, facts[:TRACED], progress=workspace.progress)
    except InputError as error:
        raise InputError(f"layers=locate: {error}, or name the layers") from None
    say(
        f"layers {found.recommended}, by tracing {counted(found.counted, 'fact')}; "
        "`patchkit locate --page F` draws where facts live"
    )
    return found.recommended
