"""What a recipe leaves open until the model and the facts are known: layers, sweeps, neurons of subjects' own, and
sentences that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from patchkit import methods
from patchkit.editing.editor import Progress
from patchkit.editing.neurons import settled
from patchkit.editing.recipe import LOCATE, EditConfig
from patchkit.editing.session import plan
from patchkit.editing.value_config import ValueConfig
from patchkit.errors import InputError
from patchkit.facts.chat import chat_template
from patchkit.facts.schema import Fact
from patchkit.methods import Beside
from patchkit.model.arch import Architecture
from patchkit.model.forward import LayerRunner
from patchkit.patch.manifest import EditedFact, Manifest
from patchkit.runs.locate import locate
from patchkit.runs.prepare import Prepared
from patchkit.runs.workspace import Workspace
from patchkit.words import counted

SENTENCES = 8
"""Kept of each subject where a layer with experts is edited in plain text."""
TRACED = 20
"""Facts that are traced, the first ones."""
Say = Callable[[str], None]


def settle(prepared: Prepared, workspace: Workspace, say: Say = lambda note: None) -> EditConfig:
    """The recipe with everything decided that it leaves open, for the run's new facts beside those of the patch that it
    continues.

    Raises:
        InputError: no fact can be located, or neurons=on, and the method or the model cannot.
    """
    facts, runner, tokenizer = prepared.incoming.new, workspace.runner, workspace.tokenizer
    config, going = prepared.config, prepared.incoming.superseded
    if facts:
        config = located(config, runner, tokenizer, facts, workspace.progress, say)
    earlier = prepared.onto.manifest.facts if prepared.onto else ()
    return decided(config, tokenizer, runner.arch, facts, [fact for fact in earlier if fact.id not in going])


def located(
    config: EditConfig,
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    progress: Progress = lambda phase, done, total: None,
    say: Say = lambda note: None,
) -> EditConfig:
    """The recipe with layers=locate replaced by the layers that tracing the first facts recommends.

    Raises:
        InputError: no fact can be located.
    """
    if config.layers != LOCATE:
        return config
    try:
        found = locate(runner, tokenizer, facts[:TRACED], progress=progress)
    except InputError as error:
        raise InputError(f"layers=locate: {error}, or name the layers") from None
    say(
        f"layers {found.recommended}, by tracing {counted(found.counted, 'fact')}; "
        "`patchkit locate --page F` draws where facts live"
    )
    return config.model_copy(update={"layers": found.recommended})


def decided(
    config: EditConfig, tokenizer: Any, arch: Architecture, facts: Iterable[Fact], earlier: Iterable[EditedFact]
) -> EditConfig:
    """The recipe with neurons=auto, sentences and how often it goes over the layers decided, for a run that writes
    `facts` where `earlier` ones are written already.

    Raises:
        InputError: neurons=on, and the method or the model cannot.
    """
    taken = {fact.subject for fact in earlier if fact.neuron is not None}
    config = settled(config, tokenizer, arch, len({fact.subject for fact in facts}), len(taken))
    config = with_steps(with_sentences(config, tokenizer, arch), tokenizer)
    return config.model_copy(update={"sweeps": plan(arch, config).sweeps})


def with_sentences(config: EditConfig, tokenizer: Any, arch: Architecture) -> EditConfig:
    """The recipe with `sentences` decided, and prompts=auto where that hangs on it: layers with experts are edited in
    use with the model's own sentences kept, unless the model is asked in a chat template, where that has not been
    measured (docs/experts.md)."""
    chatting = config.uses_chat and chat_template(tokenizer) is not None
    to_values = methods.get(config.method).targets == "values"
    routed = to_values and any(site.blocks > 1 for site in plan(arch, config).sites)
    by_itself = SENTENCES if routed and not chatting else 0
    count = by_itself if config.sentences is None else config.sentences
    if by_itself and count and config.prompts == "auto":
        config = config.model_copy(update={"prompts": "in-use"})
    if not (count and config.in_use(tokenizer)):
        return config.model_copy(update={"sentences": 0})
    return config.model_copy(update={"sentences": count, "value": _beside_sentences(config.value)})


def _beside_sentences(value: ValueConfig) -> ValueConfig:
    """With what is decided otherwise where sentences of the model's own are kept (docs/experts.md)."""
    weight = 6.0 if value.keep_weight is None else value.keep_weight
    return value.model_copy(update={"clamp": value.clamp or 1.0, "keep_weight": weight})


def with_steps(config: EditConfig, tokenizer: Any) -> EditConfig:
    """The recipe with it decided what steps are scaled by: the whole second moment where facts are edited in use in a
    chat template. The embedded model, which has none, carries facts over to other words less with it
    (`tests/benchmarks/results`)."""
    chatting = config.uses_chat and chat_template(tokenizer) is not None and config.in_use(tokenizer)
    if not chatting or config.value.second_moment is not None:
        return config
    return config.model_copy(update={"value": config.value.model_copy(update={"second_moment": "full"})})


def with_network(config: EditConfig, beside: Mapping[int, Beside]) -> EditConfig:
    """The recipe with the digest of the network that it edits with, where its method has one and the recipe names
    none."""
    digest = next((each.digest for each in beside.values() if each.digest is not None), None)
    if digest is None or config.settings.get("network"):
        return config
    return config.model_copy(update={"settings": {**config.settings, "network": digest}})


def departures(asked: EditConfig, manifest: Manifest, tokenizer: Any, arch: Architecture) -> list[str]:
    """The settings in which a patch's runs are none of `asked`, whose layers are located already: neither as it is
    decided for a run's facts nor, since a run that goes on keeps what was decided before it, as in the run before.

    A network that `asked` does not name is any: the method itself refuses to go on with another one.
    """
    before = list[dict[str, Any]]()
    for number, run in enumerate(manifest.history):
        facts = [fact for fact in manifest.facts if fact.run == number]
        earlier = [fact for fact in manifest.facts if fact.run < number]
        wanted = decided(asked, tokenizer, arch, facts, earlier).model_dump()
        if not wanted["settings"].get("network") and (network := run.recipe["settings"].get("network")):
            wanted["settings"] = {**wanted["settings"], "network": network}
        if run.recipe not in (wanted, *before[-1:]):
            return [name for name, value in run.recipe.items() if value != wanted.get(name)] or ["settings"]
        before.append(dict(run.recipe))
    return []
