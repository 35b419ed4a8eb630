"""A neuron of its own for every subject: what an edit writes there is heard after that subject and nowhere else.

A method in closed form finds a change of the output projection W that gives the subject's key k its value. Any other
key that has something in common with k gets a share of it, and with d_in in the hundreds or thousands all have: a
percent of an edit at every token, from each of many facts, changes what a model answers to unrelated questions, null
space or not (docs/in_use.md has the measurements). So the key is made one that nothing else shares. The neuron of the
feed-forward that matters least on the text is rewritten: it fires at the subject's last token, in whatever sentence,
and its gate is shut at all others. Then the method solves on the subject's own dimension of the key, which no
token of the text has anything in; the text's null space, MEMIT's second moment and the keys of earlier edits are kept
to by construction.

That a mistake is worth one neuron is Transformer-Patcher's idea (arXiv 2301.09785), which adds neurons to the last
layer; here none is added, so that the model keeps its shape and any runtime can serve it. That a subject is looked up
at its last token in the middle layers is ROME's.

With x (hidden,) what the feed-forward reads, s = w·x is fitted to be 1 at the subject in all of the fact's rows and 0
in the text; m·x is 1 everywhere as far as a linear function can be, in place of the bias that most feed-forward blocks
do not have. The gate's row becomes SHARPNESS·(w - THRESHOLD·m), and the other opener's, where there is one, w times
what makes the neuron fire at FIRING times the length of the text's keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patchkit import methods
from patchkit.editing.keys import SubjectStates
from patchkit.editing.recipe import EditConfig, resolve_layers
from patchkit.editing.state import EditState, Neuron, base_weight, made_up_for, rewritten, storable
from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest, pad
from patchkit.maths.linalg import Covariance, Delta
from patchkit.model.arch import Architecture
from patchkit.model.forward import LayerRunner, watching
from patchkit.model.hooks import LiveDelta
from patchkit.model.openers import Openers, openers
from patchkit.model.weights import Site, read_weight

SHARE = 0.05
"""Neurons of a layer that may be rewritten: the least important ones, which nothing else is made to rely on."""
SAMPLE = 16384
"""Tokens of the text that subjects are told apart from, at least four times the width of the stream."""
SHARPNESS, THRESHOLD = 20.0, 0.4
"""Of the gate: steep enough for SiLU and GELU to be shut at s = 0 and open at s = 1, whatever the sentence."""
FIRING = 3.0
TEXT_WEIGHT, OTHERS_WEIGHT, RIDGE = 1e-3, 0.1, 1e-4
"""In the fit of w: the text's tokens, the other subjects of a batch, and every direction's own energy, without which w
would rest on directions that 16 bits cannot tell from noise."""
ROWS = 64


def capacity(site: Site) -> int:
    """How many neurons of the site's layer may be rewritten."""
    return int(SHARE * site.d_in)


def can_take(name: str) -> bool:
    """Whether the method called `name` solves for an additive change of W from keys and values alone."""
    method = methods.get(name)
    bound = method.constrain or method.penalty or method.choose
    return method.update == "delta" and method.targets == "values" and not bound


def settled(config: EditConfig, tokenizer: Any, arch: Architecture, subjects: int = 1, taken: int = 0) -> EditConfig:
    """The recipe with neurons=auto decided, for a run that adds facts about `subjects` where `taken` neurons have been
    rewritten before.

    Raises:
        InputError: neurons=on, and the method or the model cannot.
    """
    if config.neurons == "off" or (config.neurons == "auto" and not config.in_use(tokenizer)):
        return config.model_copy(update={"neurons": "off"})
    own = config.model_copy(update={"neurons": "on"})
    layer = resolve_layers(own.depth, len(arch.layers))[-1]
    try:
        if not can_take(config.method):
            raise InputError(f"neurons=on: {config.method} does not solve for keys and values alone; use neurons=off")
        openers(arch, arch.sites[layer])
    except InputError:
        if config.neurons == "on":
            raise
        return config.model_copy(update={"neurons": "off"})
    enough = subjects + taken <= capacity(arch.sites[layer])
    return own if config.neurons == "on" or enough else config.model_copy(update={"neurons": "off"})


@dataclass
class OwnNeurons:
    """Rewrites neurons of one site's feed-forward, beside those that were rewritten before.

    Attributes:
        covariance: second moments of the text's keys at the site.
        text: windows of the text's tokens.
        live, opening: what acts on the site's module, and by module name on the openers'.
    """

    runner: LayerRunner
    site: Site
    openers: Openers
    covariance: Covariance
    text: Sequence[Sequence[int]]
    state: EditState
    live: LiveDelta
    opening: Mapping[str, LiveDelta]
    of_subject: dict[str, int] = field(default_factory=dict)

    def open(self, requests: Sequence[EditRequest], value_at: str) -> None:
        """Rewrite one neuron for each subject of a batch; it acts on the model from here on.

        Raises:
            InputError: all that may be rewritten are taken.
        """
        subjects = list(dict.fromkeys(request.fact.subject for request in requests))
        places = self._free(len(subjects))
        self.of_subject = dict(zip(subjects, places, strict=True))
        states = self._states(requests)  # (rows, hidden)
        owner = [subjects.index(r.fact.subject) for r in requests for _ in (*r.rows, *r.kept)]
        listen = self._listening(states, torch.tensor(owner, device=states.device), len(subjects))
        constant, gate, amount = self._constant, self.openers.gate, self.openers.amount
        rows = {gate: SHARPNESS * (listen - THRESHOLD * constant)} | ({} if amount is None else {amount: listen})
        before = len(self.state.neurons)
        self.state.neurons += self._rewrite(places, rows)
        self._act()
        if amount is not None:
            firing = SubjectStates(self.runner, requests, [self.site], value_at).read(self.site)[0]  # type: ignore[arg-type]
            each = torch.stack([firing[self.of_subject[r.fact.subject], i] for i, r in enumerate(requests)])
            place = torch.tensor([subjects.index(r.fact.subject) for r in requests], device=each.device)
            mean = torch.zeros(len(subjects), device=each.device, dtype=each.dtype).index_add(0, place, each)
            mean /= place.bincount()
            wanted = FIRING * self.covariance.matrix.diagonal().sum().sqrt()
            rows[amount] = listen * (wanted.to(mean) / mean).to(listen).unsqueeze(1)
            self.state.neurons[before:] = self._rewrite(places, rows)
            self._act()

    def only(self, keys: Tensor) -> Tensor:
        """Keys (d_in, n) in the dimensions of rewritten neurons alone."""
        own = torch.zeros_like(keys)
        places = torch.tensor([n.place for n in self.state.neurons_at(self.site.layer)], device=keys.device)
        own[places] = keys[places]
        return own

    # --- which neurons ------------------------------------------------------------------------------------------------

    @cached_property
    def _weight(self) -> Tensor:
        """W of the untouched base, (d_out, d_in)."""
        weight: Tensor = base_weight(self.site).cpu()
        return weight

    @cached_property
    def _pool(self) -> list[int]:
        """Those that may be rewritten, the one that says least on the text first: E[k_j²]·‖W_j‖²."""
        said = self.covariance.matrix.diagonal().cpu() * self._weight.square().sum(0)
        return [int(place) for place in said.argsort()[: capacity(self.site)]]

    def _free(self, count: int) -> list[int]:
        taken = {neuron.place for neuron in self.state.neurons_at(self.site.layer)}
        free = [place for place in self._pool if place not in taken]
        if len(free) < count:
            raise InputError(
                f"neurons=on: layer {self.site.layer} has {capacity(self.site)} neurons that may be rewritten, "
                f"{len(free)} of them free, and {count} subjects want one; use neurons=off, or --layers with another"
            )
        return free[:count]

    @cached_property
    def _instead(self) -> Tensor:
        """(pool, d_in): each neuron of the pool less what those outside of it tell of it by least squares on the text,
        from C⁻¹ by blocks: C_pn C_nn⁻¹ = -(C⁻¹_pp)⁻¹ C⁻¹_pn."""
        pool = torch.tensor(self._pool)
        eye = torch.eye(self.site.d_in, dtype=self._weight.dtype)[:, pool]
        inverse = self.covariance.solve(eye.to(self.covariance.matrix), 1e-3).cpu()  # (d_in, pool)
        told: Tensor = torch.linalg.solve(inverse[pool], inverse.T)  # (pool, d_in)
        told[:, pool] = torch.eye(len(pool), dtype=told.dtype)
        return told

    # --- what they listen to ------------------------------------------------------------------------------------------

    @cached_property
    def _sample(self) -> Tensor:
        """What the feed-forward reads at tokens of the text, (tokens, hidden)."""
        wanted = max(SAMPLE, 4 * self.openers.gate.d_in)
        every = max(1, sum(map(len, self.text)) // wanted)
        return torch.cat([found for _, found in self._read(self.text[::every], [None] * len(self.text[::every]))])

    @cached_property
    def _moments(self) -> Tensor:
        sample = self._sample.double()
        return sample.T @ sample / len(sample)  # (hidden, hidden)

    @cached_property
    def _constant(self) -> Tensor:
        """m (hidden,)."""
        damped = self._moments + RIDGE * self._moments.diagonal().diag()
        found: Tensor = torch.linalg.solve(damped, self._sample.double().mean(0))
        return found

    def _listening(self, states: Tensor, owner: Tensor, count: int) -> Tensor:
        """w of each subject, (count, hidden), from all subjects' states (rows, hidden)."""
        states = states.double()
        moments = TEXT_WEIGHT * self._moments + RIDGE * TEXT_WEIGHT * self._moments.diagonal().diag()
        moments = moments + OTHERS_WEIGHT * states.T @ states / len(states)
        spread = torch.linalg.solve(moments, states.T)  # (hidden, rows)
        found = []
        for subject in range(count):
            own = (owner == subject).nonzero().squeeze(1)
            gram = states[own] @ spread[:, own] + len(own) * torch.eye(len(own), dtype=states.dtype, device=own.device)
            w = spread[:, own] @ torch.linalg.solve(gram, gram.new_ones(len(own)))
            found.append(w / (states[own] @ w).mean())
        return torch.stack(found)

    def _states(self, requests: Sequence[EditRequest]) -> Tensor:
        """What the feed-forward reads at the subject in every row, (rows, hidden)."""
        rows = [row for request in requests for row in (*request.rows, *request.kept)]
        order = sorted(range(len(rows)), key=lambda i: rows[i].subject)
        read = self._read([rows[i].ids[: rows[i].subject + 1] for i in order], [rows[i].subject for i in order])
        found = torch.cat([states for _, states in read])
        return found[torch.tensor(order, device=found.device).argsort()]

    @torch.no_grad()
    def _read(
        self, texts: Sequence[Sequence[int]], at: Sequence[int | None]
    ) -> Iterator[tuple[Sequence[Sequence[int]], Tensor]]:
        """What the feed-forward reads in texts of token ids, at one position of each or at all, (tokens, hidden)."""
        for first in range(0, len(texts), ROWS):
            some, seen = texts[first : first + ROWS], list[Tensor]()
            ids, mask = pad(some, self.runner.device)
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            with watching(self.openers.gate.module, len(some), lambda x, _, seen=seen: seen.append(x)):  # type: ignore[misc]
                self.runner.run(inputs, stop=self.site.layer + 1)
            ends = at[first : first + ROWS]
            here = seen[0].device
            if None in ends:
                yield some, seen[0][mask.to(here).bool()]
            else:
                yield some, seen[0][torch.arange(len(some), device=here), torch.tensor(ends, device=here)]

    # --- rewriting ----------------------------------------------------------------------------------------------------

    def _rewrite(self, places: Sequence[int], rows: Mapping[Site, Tensor]) -> list[Neuron]:
        """The neurons at `places`, whose openers' rows become `rows` (n, hidden), less what their biases add."""
        before = {site: read_weight(site)[list(places)].double() for site in rows}
        changes = {
            site: storable((rows[site] - self._biases(site, places) - old).cpu()) for site, old in before.items()
        }
        pool, lost = self._pool, storable(-self._weight[:, list(places)])
        return [
            Neuron(
                self.site.layer,
                place,
                {site.module_name: change[i] for site, change in changes.items()},
                lost[:, i],
                storable(self._instead[pool.index(place)]),
            )
            for i, place in enumerate(places)
        ]

    def _biases(self, site: Site, places: Sequence[int]) -> Tensor:
        bias = getattr(site.module, "bias", None)
        if bias is None:
            return torch.zeros(len(places), 1, dtype=torch.double, device=self._constant.device)
        own: Tensor = bias.detach().double()[list(places)].unsqueeze(1)
        return own * self._constant

    def _act(self) -> None:
        neurons = self.state.neurons_at(self.site.layer)
        for site in self.openers.sites:
            self.opening[site.module_name].set([rewritten(neurons, site.module_name, site.d_out)])
        history = self.state.sites.get(self.site.layer)
        edits = history.delta(lambda: self._weight) if history else None
        self.live.set([made_up_for(neurons), *([edits] if edits is not None else [])])


def opening_deltas(state: EditState, sites: Sequence[Site]) -> dict[str, tuple[Site, list[Delta]]]:
    """By module name each of these openers with the change that rewritten neurons make of it."""
    found = {}
    for site in sites:
        neurons = state.neurons_at(site.layer)
        found[site.module_name] = (site, [rewritten(neurons, site.module_name, site.d_out)] if neurons else [])
    return found
