"""The editing loop: batches of facts in sequence, sites from the lowest layer up, one solve per site.

Nothing is written to the model: deltas act through hooks while editing goes on, and are gone when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from patchkit import methods
from patchkit.editing.contexts import about, make_contexts
from patchkit.editing.gradients import TargetLoss
from patchkit.editing.keys import SubjectStates
from patchkit.editing.recipe import EditConfig, resolve_layers
from patchkit.editing.values import ValueAt, Values, ValueShape, optimise
from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest, build_request
from patchkit.facts.schema import Fact
from patchkit.maths.linalg import Covariance, Delta, PriorKeys
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import Chain, Full, Update, change, folded, mapped, tensors_of
from patchkit.methods import LayerProblem
from patchkit.model.arch import Architecture
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import LiveDelta, live_deltas
from patchkit.model.weights import Site, read_weight

ValueCache = dict[Hashable, Values]
"""Values found on one untouched model, by everything that decides them: methods that ask for the same share them."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """Which sites a run edits and where its values live, once model and configuration are known."""

    sites: tuple[Site, ...]
    value_at: ValueAt

    @property
    def layers(self) -> list[int]:
        """Layer numbers, ascending."""
        return [site.layer for site in self.sites]


class Solved:
    """What runs have left at one site: the updates, and the keys and residuals they were solved from.

    Columns are in the order of the solves: batch after batch, in each sweep after sweep, in each the batch's facts
    (`history.solves` finds them again).
    """

    def __init__(self, chain: Chain, keys: Tensor, residuals: Tensor, gradients: Sequence[int] = ()) -> None:
        self._updates: list[Update] = list(chain)
        self.prior = PriorKeys(keys)
        self._residuals = [residuals]
        self._gradients = list(gradients)  # columns whose residuals are gradients

    @classmethod
    def nothing(cls, site: Site) -> Solved:
        """Of a site that has not been edited."""
        return cls((), torch.zeros(site.d_in, 0).double(), torch.zeros(site.d_out, 0).double())

    def add(self, update: Update, keys: Tensor, residual: Tensor, gradients: bool = False) -> None:
        """One solve more; `gradients` says whether its residual is made of them."""
        last = self._updates[-1] if self._updates else None
        if isinstance(update, Rotation) and isinstance(last, Rotation) and last.side == update.side:
            # Rounded each time as a patch's file will hold it, so that going on from the file is the same.
            self._updates[-1] = mapped(last.then(update), storable)
        else:
            self._updates.append(update)
        if gradients:
            self._gradients += range(len(self.prior), len(self.prior) + keys.shape[1])
        self.prior = self.prior.extended(keys)
        self._residuals.append(residual)

    @property
    def chain(self) -> Chain:
        """All updates, neighbours of one kind as one."""
        self._updates = list(folded(self._updates))
        return tuple(self._updates)

    @property
    def keys(self) -> Tensor:
        """(d_in, n)."""
        return self.prior.matrix

    @property
    def residuals(self) -> Tensor:
        """(d_out, n)."""
        self._residuals = [torch.cat(self._residuals, 1)]
        return self._residuals[0]

    def copy(self) -> Solved:
        """One that can be added to while this one stays as it is."""
        copied = Solved(self.chain, self.keys, self.residuals, self._gradients)
        copied.prior = self.prior  # it never changes, and holds what solving with it has worked out
        return copied

    def measured(self, before: int) -> tuple[Tensor, Tensor]:
        """Keys (d_in, m) and residuals (d_out, m) of the columns before `before` that were made of gradients."""
        columns = [column for column in self._gradients if column < before]
        return self.keys[:, columns], self.residuals[:, columns]


@dataclass
class EditState:
    """What runs leave behind for the next: per layer what was solved there, and the values (d, n) at the value site,
    one column per fact; subjects, of every fact. These are of all runs. Of the last one are: batches, the number of
    facts in each; order, the place among the run's facts of each one written, layers, where it was, and columns, how
    many keys it had; contexts; seconds.
    """

    sites: dict[int, Solved] = field(default_factory=dict)
    values: list[Values] = field(default_factory=list)
    subjects: set[str] = field(default_factory=set)
    batches: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    layers: list[tuple[int, ...]] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def changes(self, arch: Architecture) -> dict[int, Delta]:
        """By layer, what the weight has been changed by."""
        return {
            layer: change(solved.chain, lambda layer=layer: read_weight(arch.sites[layer]).double().cpu())  # type: ignore[misc]
            for layer, solved in self.sites.items()
            if solved.chain
        }

    def onward(self, contexts: Sequence[str] = ()) -> EditState:
        """A copy for the next run to add to; contexts given here are not generated anew."""
        sites = {layer: solved.copy() for layer, solved in self.sites.items()}
        return EditState(sites, list(self.values), set(self.subjects), contexts=list(contexts))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds[phase]`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def plan(arch: Architecture, config: EditConfig) -> Plan:
    """Resolve the layers of `config` on `arch`.

    Where a norm follows the MLP, what a module writes is not what the stream receives, so a residual at a later layer
    cannot be spread over earlier ones: such a model is edited at one site, with the value at the module's output.

    Raises:
        InputError: a layer the model does not have.
    """
    method = methods.get(config.method)
    sites = [arch.sites[layer] for layer in resolve_layers(config.layers, len(arch.layers))]
    last = sites[-1]
    if method.targets != "values":
        return Plan((last,) if method.single_site else tuple(sites), "module_out")
    if not last.direct or last.layer == len(arch.layers) - 1:
        return Plan((last,), "module_out")
    value_at = method.value_at or "layer_out"
    return Plan((last,) if method.single_site else tuple(sites), value_at)


def edit(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    config: EditConfig,
    covariances: Mapping[int, Covariance],
    progress: Progress = lambda phase, done, total: None,
    start: EditState | None = None,
    gradients: Mapping[int, Tensor] = MappingProxyType({}),
    known: ValueCache | None = None,
) -> EditState:
    """Compute the updates that make the model say every fact's target. The model is as before when this returns.

    `covariances` and `gradients` are what plain text says about each layer, as `LayerProblem` has them, where the
    method asks for them. `start` is what earlier runs left: the facts are edited on top of it, exactly as if they had
    been the next batches of the same run. Values sought on the untouched model are taken from and added to `known`.

    Raises:
        InputError: a fact cannot be tokenised, or the edit is not finite.
    """
    how = plan(runner.arch, config)
    state = start or EditState()
    with frozen(runner.arch.model):
        if not state.contexts:  # before anything is attached: the untouched model's, whatever was edited earlier
            with state.timed("contexts"):
                state.contexts = make_contexts(runner, tokenizer, config)
        with state.timed("contexts"):
            requests = requests_of(runner, tokenizer, facts, state.contexts, config, state.subjects)
        size = together(config)
        with live_deltas(runner.arch, {**dict.fromkeys(how.layers), **state.changes(runner.arch)}) as live:
            for first in range(0, len(requests), size):
                batch = requests[first : first + size]
                _Batch(runner, config, how, state, live, covariances, gradients, known).run(
                    batch,
                    lambda done, first=first: progress("editing", first + done, len(requests)),  # type: ignore[misc]
                )
        state.subjects |= {fact.subject for fact in facts}
    return state


def together(config: EditConfig) -> int:
    """How many facts are solved for at once."""
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
        InputError: a fact cannot be tokenised.
    """
    known, shared = set(written), list[bool]()
    for first in range(0, len(facts), together(config)):
        subjects = [fact.subject for fact in facts[first : first + together(config)]]
        shared += [subject in known or subjects.count(subject) > 1 for subject in subjects]
        known |= set(subjects)
    found = about(runner, tokenizer, facts, contexts, config)
    each = zip(facts, found, shared, strict=True)
    return [build_request(fact, tokenizer, own, only_prompt) for fact, own, only_prompt in each]


def problem_at(
    site: Site,
    keys: Tensor,
    residual: Tensor,
    covariance: Covariance | None,
    earlier: Solved | None,
    prior: PriorKeys | None,
    gradient: Tensor | None = None,
) -> LayerProblem:
    """What a method gets to see at `site`, in float64 on the CPU, where `earlier` was solved before."""
    count = 0 if prior is None else len(prior)

    def base() -> Tensor:
        return read_weight(site).double().cpu()

    return LayerProblem(
        keys,
        residual,
        covariance,
        PriorKeys(keys[:, :0]) if prior is None else prior,
        base,
        lambda: change(earlier.chain, base) if earlier and earlier.chain else None,
        gradient,
        measured=lambda: earlier.measured(count) if earlier and count else None,
    )


def solve(config: EditConfig, site: Site, problem: LayerProblem) -> Update:
    """The method's own solve at `site`.

    The update comes back in float64, holding numbers that float32 holds too: what acts while editing is then what a
    patch's file will say, and a run that starts from the file goes on as the one that wrote it would have.

    Raises:
        InputError: the edit is not finite.
    """
    update = methods.get(config.method).solve(problem, config.method_config())
    if not all(tensor.isfinite().all() for tensor in tensors_of(update).values()):
        raise InputError(
            f"{site.weight_name}: the edit is not finite; the model's activations overflow in this dtype, "
            "try --dtype float32 or bfloat16"
        )
    return mapped(update, storable)


def by_subject(facts: Sequence[Fact]) -> list[int]:
    """For each fact, the place of the first one with its subject."""
    first: dict[str, int] = {}
    return [first.setdefault(fact.subject, place) for place, fact in enumerate(facts)]


def storable(tensor: Tensor) -> Tensor:
    """`tensor` in float64, its numbers rounded to those that float32 holds."""
    return tensor.float().double()


@dataclass(frozen=True)
class _Part:
    """Facts of a batch that are solved for together: their places in it, where, and for which values."""

    members: tuple[int, ...]
    sites: tuple[Site, ...]
    values: Values


class _Batch:
    """One batch: values first, then keys, residual share and solve at each site."""

    def __init__(
        self,
        runner: LayerRunner,
        config: EditConfig,
        how: Plan,
        state: EditState,
        live: Mapping[int, LiveDelta],
        covariances: Mapping[int, Covariance],
        gradients: Mapping[int, Tensor],
        known: ValueCache | None,
    ) -> None:
        self.runner, self.config, self.plan, self.known = runner, config, how, known
        self.state, self.live, self.covariances, self.gradients = state, live, covariances, gradients

    def run(self, requests: Sequence[EditRequest], progress: Callable[[int], None]) -> None:
        """Edit `requests` on top of all earlier batches."""
        if methods.get(self.config.method).targets != "values":
            self._by_loss(requests)
            progress(len(requests))
            return
        state, first, done = self.state, sum(self.state.batches), 0

        def advance(finished: int) -> None:
            nonlocal done
            done += finished
            progress(done)

        for part in self._parts(requests, advance):
            prior = {layer: solved.prior for layer, solved in state.sites.items()}
            chosen, target = [requests[i] for i in part.members], part.values.targets.double().cpu()
            for _ in range(self.config.sweeps):
                self._sweep(chosen, part.sites, target, prior)
            state.values.append(part.values)
            state.batches.append(len(chosen))
            state.order.extend(first + i for i in part.members)
            state.layers.extend([tuple(site.layer for site in part.sites)] * len(chosen))
            state.columns.extend([1] * len(chosen))

    def _by_loss(self, requests: Sequence[EditRequest]) -> None:
        """The same where the method has no values: what it changes is made from the targets' loss itself."""
        state, first, count = self.state, sum(self.state.batches), len(requests)
        gradients = methods.get(self.config.method).targets == "gradients"
        loss = TargetLoss(self.runner, requests, self.config.value.parallel)
        prior = {layer: solved.prior for layer, solved in state.sites.items()}
        for _ in range(self.config.sweeps):
            for site, problem in self._measured(loss, prior) if gradients else self._to_fit(loss, prior):
                with state.timed("solve"):
                    self._solve(site, problem)
        with state.timed("gradients"):
            after, none = loss.per_fact(), torch.zeros(self.plan.sites[-1].d_out, count)
        state.values.append(Values(none, none, after.float(), torch.full((count,), loss.passes)))
        state.batches.append(count)
        state.order.extend(range(first, first + count))
        state.layers.extend([tuple(self.plan.layers)] * count)
        state.columns.extend(loss.columns if gradients else [0] * count)

    def _measured(self, loss: TargetLoss, prior: Mapping[int, PriorKeys]) -> Iterator[tuple[Site, LayerProblem]]:
        """A problem at every site, with keys and gradients at the positions that predict a target; all are measured
        before any is solved."""
        with self.state.timed("gradients"):
            found = loss.gradients(self.plan.sites)
        for site in self.plan.sites:
            keys, gradients = storable(found.keys[site.layer]), storable(found.gradients[site.layer])
            yield site, self._problem(site, keys, gradients, prior.get(site.layer))

    def _to_fit(self, loss: TargetLoss, prior: Mapping[int, PriorKeys]) -> Iterator[tuple[Site, LayerProblem]]:
        """A problem at each site without keys, and with the loss as a function of the weight's change."""
        for site in self.plan.sites:
            keys, residual = torch.zeros(site.d_in, 0).double(), torch.zeros(site.d_out, 0).double()
            problem, at_site = self._problem(site, keys, residual, prior.get(site.layer)), loss.at(site)

            def of_update(update: Update | None, at_site: Any = at_site, problem: LayerProblem = problem) -> Any:
                if update is None or isinstance(update, Full):  # as a product, a full update would cost its cube
                    return at_site(update and update.matrix)
                return at_site(change((update,), lambda: problem.weight).dense())

            yield site, problem.but(loss=of_update)

    def _parts(self, requests: Sequence[EditRequest], advance: Callable[[int], None]) -> list[_Part]:
        """The batch's facts with their values: all of them, or those of one layer at a time if each has its own."""
        method, sites = methods.get(self.config.method), self.plan.sites
        if not self._chooses():
            values = self._values(requests, sites[-1], advance)
            return [_Part(tuple(range(len(requests))), sites, values)]
        found = [self._values(requests, site, advance if site is sites[-1] else None) for site in sites]
        chosen, parts = self._choose(requests, found), list[_Part]()
        for place in sorted(set(chosen)):
            members = tuple(i for i, wanted in enumerate(chosen) if wanted == place)
            upper = min(place + method.neighbours, len(sites) - 1)
            around = sites[max(0, place - method.neighbours) : upper + 1]
            parts.append(_Part(members, around, found[upper].of(members)))
        return parts

    def _chooses(self) -> bool:
        """Whether each fact has layers of its own."""
        settings = self.config.method_config()
        return methods.get(self.config.method).choose is not None and getattr(settings, "choose_layer", True)

    def _choose(self, requests: Sequence[EditRequest], values: Sequence[Values]) -> list[int]:
        """The place among the plan's sites that the method chooses for each fact."""
        method, problems = methods.get(self.config.method), list[LayerProblem]()
        assert method.choose is not None
        for site, each in zip(self.plan.sites, values, strict=True):
            with self.state.timed("keys"):
                reader = SubjectStates(self.runner, requests, [site], self.plan.value_at)
                keys, current = (part.cpu() for part in reader.read(site))
            problems.append(self._problem(site, keys, each.targets.double().cpu() - current, None))
        settings = self.config.method_config()
        return [
            method.choose([p.but(keys=p.keys[:, [i]], residual=p.residual[:, [i]]) for p in problems], settings)
            for i in range(len(requests))
        ]

    def _values(
        self, requests: Sequence[EditRequest], site: Site, advance: Callable[[int], None] | None = None
    ) -> Values:
        shape, value_at, settings = self._shape(requests, site), self.plan.value_at, self.config.value
        advance, key = advance or (lambda finished: None), (site.layer, value_at, settings, tuple(requests))
        shared = None if self.state.sites or shape != ValueShape() else self.known
        if shared is not None and key in shared:
            advance(len(requests))
            return shared[key]
        with self.state.timed("values"):
            groups = by_subject([request.fact for request in requests])
            values = optimise(self.runner, requests, site, value_at, settings, advance, shape, groups)
        if shared is not None:
            shared[key] = values
        return values

    def _shape(self, requests: Sequence[EditRequest], site: Site) -> ValueShape:
        """What the method asks of the values at the value site."""
        method = methods.get(self.config.method)
        if method.constrain is None and method.penalty is None:
            return ValueShape(attention=method.attention)
        with self.state.timed("keys"):
            keys = SubjectStates(self.runner, requests, [site], self.plan.value_at).read(site)[0].cpu()
        earlier = self.state.sites.get(site.layer)
        prior = earlier.prior if earlier else None
        problem = self._problem(site, keys, keys.new_zeros(site.d_out, len(requests)), prior)
        shared = min(len(self.plan.sites), 1 + 2 * method.neighbours) if self._chooses() else len(self.plan.sites)
        problem, settings = problem.but(sites=shared), self.config.method_config()
        return ValueShape(
            constrain=method.constrain and method.constrain(problem, settings),
            penalty=method.penalty and method.penalty(problem, settings),
            attention=method.attention,
        )

    def _sweep(
        self,
        requests: Sequence[EditRequest],
        sites: Sequence[Site],
        target: Tensor,
        prior: Mapping[int, PriorKeys],
    ) -> None:
        state = self.state
        reader = SubjectStates(self.runner, requests, sites, self.plan.value_at)
        for i, site in enumerate(sites):
            with state.timed("keys"):
                keys, current = (part.cpu() for part in reader.read(site))
            with state.timed("solve"):
                # MEMIT eq. 20: each site takes an equal share of what is still missing.
                residual = storable((target - current) / (len(sites) - i))  # (d_out, n)
                self._solve(site, self._problem(site, storable(keys), residual, prior.get(site.layer)))

    def _solve(self, site: Site, problem: LayerProblem) -> None:
        """Solve `problem` and let the update act from here on."""
        update = solve(self.config, site, problem)
        gradients = methods.get(self.config.method).targets == "gradients"
        solved = self.state.sites.setdefault(site.layer, Solved.nothing(site))
        solved.add(update, problem.keys, problem.residual, gradients)
        if isinstance(update, Rotation):  # it turns what was there before as well
            self.live[site.layer].set([change(solved.chain, problem.base)])
        else:
            self.live[site.layer].add(change((update,), problem.base))

    def _problem(self, site: Site, keys: Tensor, residual: Tensor, prior: PriorKeys | None) -> LayerProblem:
        earlier, covariance = self.state.sites.get(site.layer), self.covariances.get(site.layer)
        return problem_at(site, keys, residual, covariance, earlier, prior, self.gradients.get(site.layer))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients on weights, both put back afterwards."""
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
