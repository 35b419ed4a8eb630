"""What all batches of a run share: where it edits, what the method is shown at a site, and the solve itself."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patchkit import methods
from patchkit.editing.journal import Journal
from patchkit.editing.neurons import OwnNeurons
from patchkit.editing.recipe import EditConfig, layers_of
from patchkit.editing.side_by_side import solve_block_by_block
from patchkit.editing.state import EditRun, SiteHistory, base_weight, storable
from patchkit.editing.value_problem import ValueAt
from patchkit.editing.values import Values
from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.maths.linalg import PriorKeys
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import Update, delta_of, mapped, moved, tensors_of
from patchkit.methods import NOTHING, Beside, LayerProblem, Method, MethodConfig
from patchkit.model.arch import Architecture, attention_of
from patchkit.model.devices import solve_device
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import LiveDelta
from patchkit.model.states import refuse_between
from patchkit.model.weights import Site
from patchkit.ranks import world

ValueCache = dict[Hashable, Values]
"""Values found on one untouched model, by everything that decides them: methods that ask for the same share them."""


@dataclass(frozen=True)
class Plan:
    """Which sites a run edits, where its values live, and how often it goes over the sites with each batch, once model
    and configuration are known."""

    sites: tuple[Site, ...]
    value_at: ValueAt
    sweeps: int

    @property
    def layers(self) -> list[int]:
        """Layer numbers, ascending."""
        return [site.layer for site in self.sites]


def plan(arch: Architecture, config: EditConfig) -> Plan:
    """Resolve the layers of `config` on `arch`.

    Where a norm follows the MLP, the residual stream does not receive what a module writes as it is, so a residual at a
    later layer cannot be spread over earlier ones: such a model is edited at one site, with the value at the module's
    output. Where subjects have neurons of their own, the sites are those that these may be in: each is in one of them.

    Raises:
        InputError: a layer that the model does not have, from which on it cannot be run, or without the attention that
            the method needs.
    """
    method = methods.get(config.method)
    sites = [arch.sites[layer] for layer in layers_of(config, len(arch.layers))]
    last = sites[-1]
    if config.neurons == "on":
        sites = [site for site in sites if site.direct and site.layer < len(arch.layers) - 1] or sites[-1:]
    elif method.ends_only and len(sites) > 1:
        sites = [sites[0], last]
    value_at: ValueAt = "module_out"
    if method.single_site:
        sites = [last]
    if method.targets == "values":
        if last.direct and last.layer < len(arch.layers) - 1:
            value_at = method.value_at or "layer_out"
        else:
            sites = [last]
        if method.attention:
            attention_of(arch, last.layer)
        # Values are sought from the site on, or from the layer after it.
        refuse_between(arch.model, last.layer + (value_at == "layer_out"), len(arch.layers))
    return Plan(tuple(sites), value_at, _sweeps(config, method, sites))


def _sweeps(config: EditConfig, method: Method, sites: Sequence[Site]) -> int:
    """How often a batch goes over the sites. Where several have experts, the solve at one changes what the routers
    above it read, so that some subjects go elsewhere than where the first pass wrote for them; a second pass meets what
    is missing by then (docs/experts.md has the measurements)."""
    if config.sweeps is not None:
        return config.sweeps
    routed = len(sites) > 1 and any(site.blocks > 1 for site in sites)
    return 2 if routed and method.targets == "values" and not method.ends_only else 1


@dataclass(frozen=True)
class EditSession:
    """A run while it edits.

    Attributes:
        plan: the sites, and where values live.
        run: what has been written so far.
        live: by layer, the delta that acts on the model through a hook.
        covariances, beside: what the method is given by layer, as `LayerProblem` has it.
        known: values found on the untouched model, which are shared with other runs; None shares nothing.
        journal: what is finished goes there, for the same run to go on from.
        own: rewrites a neuron for each subject, where the recipe has it so.
    """

    runner: LayerRunner
    config: EditConfig
    plan: Plan
    run: EditRun
    live: Mapping[int, LiveDelta]
    covariances: Mapping[int, Covariance]
    beside: Mapping[int, Beside]
    known: ValueCache | None
    journal: Journal
    own: OwnNeurons | None = None

    @cached_property
    def method(self) -> Method:
        """The method of the recipe, wrappers included."""
        return methods.get(self.config.method)

    @cached_property
    def settings(self) -> MethodConfig:
        """The method's own settings."""
        return self.config.method_config()

    @cached_property
    def _constants(self) -> dict[int, dict[Hashable, Any]]:
        """By layer, what methods have computed of its base weight."""
        return {}

    def prior_keys(self) -> dict[int, PriorKeys]:
        """By layer, the keys of all batches so far. All sweeps of a batch solve against those from before it began."""
        return {layer: history.prior for layer, history in self.run.state.sites.items()}

    def problem(self, site: Site, keys: Tensor, residual: Tensor, prior: PriorKeys | None) -> LayerProblem:
        """What the method is shown at `site`: keys (d_in, n) and residual (d_out, n), beside keys of earlier edits."""
        history, covariance = self.run.state.sites.get(site.layer), self.covariances.get(site.layer)
        own = self.own is not None
        found = problem_at(
            site,
            self.own.layers[site.layer].only(keys) if self.own else keys,
            residual,
            covariance,
            history,
            prior,
            self.beside.get(site.layer, NOTHING),
            own_neurons=own,
        )
        return found.replace(constants=self._constants.setdefault(site.layer, {}))

    def solve(self, site: Site, problem: LayerProblem) -> None:
        """Solve `problem`, and let the update act on the model from here on.

        Raises:
            InputError: the edit is not finite.
        """
        with self.run.timed("solve"):
            self._take(site, problem, solve_at(self.method, self.settings, site, problem))

    def _take(self, site: Site, problem: LayerProblem, update: Update) -> None:
        # An update that was fitted to the loss took passes of the model; any other is a matter of moments.
        fitted = update if self.method.targets == "none" else None
        self.journal.solved(site.layer, problem.keys, problem.residual, fitted)
        history = self.run.state.sites.setdefault(site.layer, SiteHistory.empty(site))
        history.add(update, problem.keys, problem.residual, self.method.targets == "gradients")
        if isinstance(update, Rotation):  # it turns what was there before as well
            whole = history.delta(problem.read_base)
            self.live[site.layer].set([] if whole is None else [whole])
        else:
            self.live[site.layer].add(delta_of((update,), problem.read_base))

    def finish(
        self, facts: Sequence[Fact], values: Values, layers: Sequence[int], columns: Sequence[int] | None = None
    ) -> None:
        """Record that `facts` were solved for together; arguments as in `EditRun.add_batch`."""
        self.run.add_batch(facts, values, layers, columns, self.own.of_subject if self.own else {})
        self.journal.added([fact.id for fact in facts], values, layers, columns)

    def open_neurons(self, requests: Sequence[EditRequest], layers: Sequence[int]) -> None:
        """Rewrite a neuron for each subject of facts that are about to be solved for at these layers, where the recipe
        has it so."""
        if self.own is not None:
            with self.run.timed("neurons"):
                self.own.open(layers[-1], requests)

    def finished_before(self, number: int, requests: Sequence[EditRequest]) -> bool:
        """Whether the journal has batch `number`, which then is as if it had just been edited: the solves are made once
        more, of the same keys and residuals in the same order, so that all later ones have the same numbers."""
        found = world().from_first(lambda: self.journal.batch(number))
        if found is None:
            return False
        facts, sites = {request.fact.id: request.fact for request in requests}, self.plan.sites
        for part in found.parts:
            prior = self.prior_keys()
            self.open_neurons([each for each in requests if each.fact.id in set(part.facts)], part.layers)
            for done in part.solves:
                site = next(site for site in sites if site.layer == done.layer)
                where = solve_device(site.module)
                keys, residual = done.keys.to(where), done.residual.to(where)
                problem = self.problem(site, keys, residual, prior.get(site.layer))
                if done.fitted is None:
                    self.solve(site, problem)
                else:
                    self._take(site, problem, moved(done.fitted, where))
            self.finish([facts[name] for name in part.facts], part.values, part.layers, part.columns)
        self.journal.forget_batch()
        self.run.seconds.update(found.seconds)
        return True


def problem_at(
    site: Site,
    keys: Tensor,
    residual: Tensor,
    covariance: Covariance | None,
    history: SiteHistory | None,
    prior: PriorKeys | None,
    beside: Beside = NOTHING,
    own_neurons: bool = False,
) -> LayerProblem:
    """A solve at `site`, with keys and residual as `solve_device` and `exact` place them, after the edits in `history`;
    `prior` are the keys it has to spare. Statistics come from wherever they are, once.

    With `own_neurons` the keys have nothing outside of their subjects' own neurons, at which the text has nothing.
    """
    count = 0 if prior is None else len(prior)
    if own_neurons and covariance is not None:
        covariance = covariance.silent_at(keys.abs().amax(1).nonzero().squeeze(1))
    return LayerProblem(
        keys,
        residual,
        covariance and covariance.on(keys.device),
        PriorKeys(keys[:, :0]) if prior is None else prior,
        lambda: base_weight(site),
        lambda: history.delta(lambda: base_weight(site)) if history else None,
        beside.on(keys.device),
        gradient_columns=lambda: history.gradient_columns(count) if history and count else None,
        blocks=site.blocks,
    )


def solve_at(method: Method, settings: MethodConfig, site: Site, problem: LayerProblem) -> Update:
    """The method's own solve at `site`.

    The update comes back in float64, holding numbers that float32 holds too: what acts while editing is then what a
    patch's file will hold, and a run that starts from the file goes on as the one that wrote it would have.

    Raises:
        InputError: the edit is not finite, or the equations for it cannot be solved.
    """
    each = problem.blocks > 1 and method.block_by_block
    try:
        update = solve_block_by_block(method, settings, problem) if each else method.solve(problem, settings)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # a state that somebody made up, say
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{site.weight_name}: {method.name} cannot be solved for these keys and settings ({reason}); try others"
        ) from None
    finite = [tensor.isfinite().all() for tensor in tensors_of(update).values() if tensor.is_floating_point()]
    if not torch.stack(finite).all():
        raise InputError(
            f"{site.weight_name}: the edit is not finite; the model's activations overflow in this dtype, "
            "try --dtype float32 or bfloat16"
        )
    return mapped(update, storable)
