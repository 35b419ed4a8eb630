"""The editing loop: batches of facts in sequence, sites from the lowest layer up, one solve per site.

Nothing is written to the model: deltas act through hooks while editing goes on, and are gone when it ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from patchkit import methods
from patchkit.editing.contexts import about, make_contexts
from patchkit.editing.journal import Journal
from patchkit.editing.loss_edits import FittedEdits, GradientEdits
from patchkit.editing.namesakes import namesakes
from patchkit.editing.neurons import LayerNeurons, OwnNeurons, opening_deltas
from patchkit.editing.recipe import EditConfig
from patchkit.editing.room import Room
from patchkit.editing.session import EditSession, Plan, ValueCache, plan
from patchkit.editing.state import EditRun, EditState
from patchkit.editing.value_edits import ValueEdits
from patchkit.editing.wordings import in_use_requests
from patchkit.facts.batches import batches
from patchkit.facts.requests import EditRequest, build_request, encode_prompt, ended
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.methods import Beside
from patchkit.model.devices import solve_device
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import LiveDelta, live_deltas, live_on
from patchkit.model.openers import opening_sites
from patchkit.model.weights import Site
from patchkit.ranks import world

Progress = Callable[[str, int, int], None]
_EDITS: Mapping[str, type[ValueEdits] | type[GradientEdits] | type[FittedEdits]] = {
    "values": ValueEdits,
    "gradients": GradientEdits,
    "none": FittedEdits,
}
"""By `Method.targets`, what edits a batch."""


class Guard(Protocol):
    """Looks at the model after batches, and may end a run early.

    Attributes:
        kept: the run as it was when the guard last let it go on, or before its first batch.
    """

    kept: EditRun

    def begin(self, run: EditRun) -> None:
        """`run` is about to edit its first batch."""

    def stops(self, run: EditRun, last: bool) -> bool:
        """Whether the run ends here, with what is `kept`; `last` says that no batch is left."""


def edit(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    config: EditConfig,
    covariances: Mapping[int, Covariance],
    progress: Progress = lambda phase, done, total: None,
    start: EditState | None = None,
    beside: Mapping[int, Beside] = MappingProxyType({}),
    known: ValueCache | None = None,
    contexts: Sequence[str] = (),
    journal: Journal | None = None,
    rooms: Mapping[int, Room] = MappingProxyType({}),
    guard: Guard | None = None,
    wrote: Callable[[EditRun], None] = lambda run: None,
) -> EditRun:
    """Compute the updates that make the model predict every fact's target. The model is as before when this returns.

    Args:
        covariances, beside: what the method is given by layer, as `LayerProblem` has it, where the method needs
            them.
        start: what earlier runs left; it stays as it is. The facts are edited on top of it, exactly as if they had
            been the next batches of the same run.
        known: values found on the untouched model: taken from here, and added.
        contexts: contexts to edit in; without any they are generated.
        rooms: by layer, which neurons subjects may have for their own; needed for neurons=on alone, and neurons=auto is
            off here (`neurons.settled` decides it).
        journal: of an earlier call with the same arguments that was cut off, to go on from to the same result.
        guard: looks at the model after every batch, and may end the run.
        wrote: told of the run after every batch that the guard lets pass, while the edits act on the model.

    Raises:
        InputError: a fact cannot be tokenized, or the edit is not finite.
    """
    beside = {layer: each.on(solve_device(runner.arch.sites[layer].module)) for layer, each in beside.items()}
    how, run = plan(runner.arch, config), EditRun(start.copy() if start else EditState(), list(contexts))
    state, done, journal = run.state, 0, journal or Journal()

    def advance(finished: int) -> None:
        nonlocal done
        done += finished
        progress("editing", done, len(facts))

    with frozen(runner.arch.model):
        with run.timed("contexts"):
            requests, known_contexts = world().from_first(lambda: journal.requests(facts))
            run.contexts[:] = known_contexts or run.contexts
            if not requests:
                if not run.contexts:  # before anything is attached: the untouched model's, whatever was edited earlier
                    run.contexts += world().from_first(lambda: make_contexts(runner, tokenizer, config))
                requests = requests_of(runner, tokenizer, facts, run.contexts, config, state.subjects)
                journal.keep_requests(requests, run.contexts)
            alike = world().from_first(lambda: _namesakes(runner, tokenizer, facts, config))
        with ExitStack() as stack:
            acting = {**dict.fromkeys(how.layers), **state.deltas(runner.arch)}
            live = stack.enter_context(live_deltas(runner.arch, acting))
            opening = stack.enter_context(live_on(opening_deltas(state, _listening(runner, how, config, state))))
            own = _own_neurons(runner, tokenizer, config, how, covariances, rooms, state, live, opening, alike)
            session = EditSession(runner, config, how, run, live, covariances, beside, known, journal, own)
            edits = _EDITS[session.method.targets](session)
            if guard:
                guard.begin(run)
            for number, batch in enumerate(batches(facts, solve_batch_size(config))):
                these = requests[batch.start : batch.stop]
                if own is not None:
                    own.meet(these)
                if session.finished_before(number, these):
                    advance(len(these))
                else:
                    edits.edit(these, advance)
                    journal.keep_batch(number, run.seconds)
                if guard and guard.stops(run, last=batch.stop == len(facts)):
                    run = guard.kept
                    break
                wrote(run)
    run.state.subjects |= {written.fact.subject for written in run.facts}
    return run


def _own_neurons(
    runner: LayerRunner,
    tokenizer: Any,
    config: EditConfig,
    how: Plan,
    covariances: Mapping[int, Covariance],
    rooms: Mapping[int, Room],
    state: EditState,
    live: Mapping[int, LiveDelta],
    opening: Mapping[str, LiveDelta],
    alike: Mapping[str, Sequence[str]],
) -> OwnNeurons | None:
    """What rewrites neurons of subjects' own, where the recipe has it so."""
    if config.neurons != "on":
        return None
    layers = {
        site.layer: LayerNeurons(
            runner, site, covariances[site.layer], rooms[site.layer], state, live[site.layer], opening
        )
        for site in how.sites
    }
    return OwnNeurons(layers, state, partial(encode_prompt, tokenizer), alike)


def _namesakes(
    runner: LayerRunner, tokenizer: Any, facts: Sequence[Fact], config: EditConfig
) -> dict[str, tuple[str, ...]]:
    """Names like each subject's, where subjects get neurons of their own."""
    if config.neurons != "on":
        return {}
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    return dict(zip(subjects, namesakes(runner, tokenizer, subjects, config.seed), strict=True))


def _listening(runner: LayerRunner, how: Plan, config: EditConfig, state: EditState) -> list[Site]:
    """The weights in which neurons have been rewritten, or will be."""
    layers = {neuron.layer for neuron in state.neurons} | ({*how.layers} if config.neurons == "on" else set())
    return [each for layer in sorted(layers) for each in opening_sites(runner.arch, runner.arch.sites[layer])]


def solve_batch_size(config: EditConfig) -> int:
    """How many facts are solved for together at most; see `batches`."""
    return 1 if methods.get(config.method).one_by_one else config.batch_size


def requests_of(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    config: EditConfig,
    written: Collection[str] = (),
) -> list[EditRequest]:
    """The facts of a run, each in its contexts. `written` are the subjects of earlier runs' facts.

    A fact keeps to its prompt where its batch or an earlier one has another about the same subject. What comes later
    does not count: facts that are added to a patch turn out as if they had been the next batches of one run.

    Raises:
        InputError: a fact cannot be tokenized.
    """
    found = _requests_of(runner, tokenizer, facts, contexts, config, written)
    end = tokenizer.eos_token_id
    return [ended(each, end) for each in found] if methods.get(config.method).ends and end is not None else found


def _requests_of(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    config: EditConfig,
    written: Collection[str],
) -> list[EditRequest]:
    known, shared = set(written), list[bool]()
    for batch in batches(facts, solve_batch_size(config)):
        subjects = [facts[place].subject for place in batch]
        shared += [subject in known or subjects.count(subject) > 1 for subject in subjects]
        known |= set(subjects)
    if config.in_use(tokenizer):
        return world().mapped(
            lambda some: in_use_requests(
                runner, tokenizer, [fact for fact, _ in some], contexts, config, [prompts for _, prompts in some]
            ),
            list(zip(facts, _changing(facts, config), strict=True)),
        )
    found = world().mapped(lambda some: about(runner, tokenizer, some, contexts, config), facts)
    each = zip(facts, found, shared, strict=True)
    return [build_request(fact, tokenizer, own, only_prompt) for fact, own, only_prompt in each]


def _changing(facts: Sequence[Fact], config: EditConfig) -> list[tuple[str, ...]]:
    """For each fact the prompts about its subject that its batch and earlier ones change the answers of."""
    by_subject, found = defaultdict[str, list[str]](list), list[tuple[str, ...]]()
    for batch in batches(facts, solve_batch_size(config)):
        for place in batch:
            by_subject[facts[place].subject].append(facts[place].prompt)
        found += [tuple(by_subject[facts[place].subject]) for place in batch]
    return found


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients on weights, both put back afterward."""
    training = [module for module in model.modules() if module.training]
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:  # one by one: train() would also switch what the caller had put in evaluation mode
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)
