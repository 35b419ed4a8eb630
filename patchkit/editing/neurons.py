"""A neuron of its own for every subject: what an edit writes there is heard after that subject and nowhere else.

A method in closed form finds a change of the output projection W that gives the subject's key k its value. Any other
key that has something in common with k gets a share of it, and with d_in in the hundreds or thousands all have: a
percent of an edit at every token, from each of many facts, changes what a model answers to unrelated questions, null
space or not (docs/in_use.md has the measurements). So the key is made one that nothing else shares. Of the neurons of
all layers that are edited, the one that matters least (`patchkit.editing.room`) is rewritten: it fires at the
subject's last token, in whatever sentence, and its gate is shut at all others. Then the method solves on the subject's
own dimension of the key, which no token of the text has anything in; the text's null space, MEMIT's second moment and
the keys of earlier edits are kept to by construction.

That a mistake is worth one neuron is Transformer-Patcher's idea (arXiv 2301.09785), which adds neurons to the last
layer; here none is added, so that the model keeps its shape and any runtime can serve it. That a subject is looked up
at its last token in the middle layers is ROME's.

With x (hidden,) what the feed-forward reads, s = w·x is fitted to be 1 at the subject in all of the fact's rows and 0
in the text; m·x is 1 everywhere as far as a linear function can be, in place of the bias that most feed-forward blocks
do not have. The gate's row becomes SHARPNESS·(w - THRESHOLD·m). The other opener's, where there is one, is a w of its
own: the gate tells the subject from all text, and this one from the few things that the gate lets pass, which are names
like the subject's. It is as long as makes the neuron fire at FIRING times the length of the text's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit import methods
from patchkit.editing.recipe import EditConfig, layers_of
from patchkit.editing.room import Room, capacity, reading
from patchkit.editing.state import EditState, Neuron, base_weight, made_up_for, rewritten, storable
from patchkit.editing.stems import rests
from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest
from patchkit.maths.covariance import Covariance
from patchkit.maths.linalg import Delta
from patchkit.model.arch import Architecture
from patchkit.model.devices import solve_device
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import LiveDelta
from patchkit.model.openers import Opener, Openers, firing, openers
from patchkit.model.weights import Site, read_weight
from patchkit.words import counted

SHARPNESS, THRESHOLD = 20.0, 0.5
"""Of the gate: steep enough for SiLU and GELU to be shut at s = 0 and open at s = 1, whatever the sentence."""
FIRING = 3.0
ABOUT = ("There is a book about {}", "Somebody told me about {}", "What is there to know about {}")
"""Texts in which the subjects of other layers, batches and runs are met. An edit further down moves a subject's state
by more than its own length, to where no text is; unmet, it may set off the neuron of another (docs/in_use.md). Names
like the batch's own subjects (`patchkit.editing.namesakes`) are met in them, too, each in one."""


@dataclass(frozen=True)
class Silence:
    """How much it counts, in the fit of a w, that it is 0 where it should be.

    Attributes:
        text: at the text's tokens.
        names: at the names like one subject's, all together.
        batch: at the subjects of the batch.
        met: at the subjects that were met in other layers, batches and runs. With a tenth of it as many unrelated
            answers stayed on CounterFact 2000-2019.
    """

    text: float
    names: float
    batch: float = 0.1
    met: float = 1.0


GATE, AMOUNT = Silence(text=1e-2, names=1e-4), Silence(text=1e-3, names=0.03)
"""Of what opens a gate, and of what says how much passes. A gate that has to be silent at names as much is heard here
and there in the text (`tests/benchmarks/results`)."""
RIDGE = 1e-6
"""Of every direction's own energy, without which a w would rest on directions that 16 bits cannot tell from noise."""
MET = 256
"""Other subjects that are met at most, drawn by their names, so that it is the same whichever run they came with."""
CONSTANT_RIDGE = 1e-4
"""The same in the fit of m, where the text's weight is 1."""
DEAD = 1e-9
"""Of the mean energy of directions, what one has at least."""
SPACIOUS = 16
"""How many neurons a layer has to have to spare for prompts=auto to turn to them in a model without a chat template;
in narrower ones, which are toys, a neuron more is much of what there is. Nor does it where a norm comes after the
feed-forward, as Gemma 3's does, which has not been measured."""
NOTHING = 1e-6
"""Of what it costs to rewrite a neuron, in nats a token: less than this nobody notices."""


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
    if config.neurons == "off" or (config.neurons == "auto" and config.prompts == "contexts"):
        return config.model_copy(update={"neurons": "off"})
    own = config.model_copy(update={"neurons": "on"})
    sites = [arch.sites[layer] for layer in layers_of(own, len(arch.layers))]
    try:
        if not can_take(config.method):
            raise InputError(f"neurons=on: {config.method} does not solve for keys and values alone; use neurons=off")
        for site in sites:
            openers(arch, site)
    except InputError:
        if config.neurons == "on":
            raise
        return config.model_copy(update={"neurons": "off"})
    enough = subjects + taken <= at_most(config, tokenizer, arch)
    return own if config.neurons == "on" or enough else config.model_copy(update={"neurons": "off"})


def at_most(config: EditConfig, tokenizer: Any, arch: Architecture) -> int:
    """How many subjects get neurons of their own where neurons=auto, in a model that has any to give."""
    own = config.model_copy(update={"neurons": "on"})
    sites = [arch.sites[layer] for layer in layers_of(own, len(arch.layers))]
    rooms = [capacity(site) for site in sites]
    wide = config.in_use(tokenizer) or (min(rooms) >= SPACIOUS and all(site.direct for site in sites))
    return sum(rooms) if wide else 0


@dataclass
class OwnNeurons:
    """Gives each subject of a run its neuron, in one of the layers that are edited.

    Attributes:
        layers: what rewrites neurons, by layer.
        encode: token ids of a text.
        namesakes: of each subject of the run.
        subjects: those that have been met.
    """

    layers: dict[int, LayerNeurons]
    state: EditState
    encode: Callable[[str], list[int]] = lambda text: []
    namesakes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    subjects: set[str] = field(default_factory=set)

    def meet(self, requests: Sequence[EditRequest]) -> None:
        """A batch that is about to be edited: the neurons of its subjects are told from one another, and from those of
        all that were met before."""
        self.subjects |= self.state.subjects | {request.fact.subject for request in requests}

    def open(self, layer: int, requests: Sequence[EditRequest]) -> None:
        """Rewrite one neuron of a layer for each subject of some of the batch."""
        own = dict.fromkeys(request.fact.subject for request in requests)
        drawn = sorted(self.subjects - own.keys(), key=lambda subject: (crc32(subject.encode()), subject))[:MET]
        met = [self.encode(text.format(subject)) for subject in drawn for text in ABOUT]
        alike = dict.fromkeys(name for subject in own for name in self.namesakes.get(subject, ()))
        unedited = [name for name in alike if name not in self.subjects]
        like = [self.encode(ABOUT[n % len(ABOUT)].format(name)) for n, name in enumerate(unedited)]
        self.layers[layer].open(requests, met, like)

    def shared_out(self, requests: Sequence[EditRequest]) -> dict[int, list[int]]:
        """By layer, ascending, the places of the requests whose subjects get a neuron there: so many subjects in each
        layer that together they take the neurons, among all that are free, that matter least. Below NOTHING they are
        all alike, and the lowest layers come first: further up, values are learned less surely, and names that begin
        alike are told apart worse (docs/in_use.md).

        Raises:
            InputError: all that may be rewritten are taken.
        """
        subjects = list(dict.fromkeys(request.fact.subject for request in requests))
        free = sorted((max(cost, NOTHING), layer) for layer, each in self.layers.items() for cost in each.free_costs())
        if len(free) < len(subjects):
            raise InputError(
                f"neurons=on: {counted(len(free), 'neuron')} of layers {min(self.layers)} to {max(self.layers)} may "
                f"still be rewritten for {counted(len(subjects), 'subject')}; use neurons=off, or more --layers"
            )
        layer_of = dict(zip(subjects, sorted(layer for _, layer in free[: len(subjects)]), strict=True))
        found: dict[int, list[int]] = {layer: [] for layer in sorted(set(layer_of.values()))}
        for place, request in enumerate(requests):
            found[layer_of[request.fact.subject]].append(place)
        return found

    @property
    def of_subject(self) -> dict[str, int]:
        """The neuron of each subject that was rewritten for, in its layer."""
        return {subject: place for each in self.layers.values() for subject, place in each.of_subject.items()}


@dataclass
class LayerNeurons:
    """Rewrites neurons of one site's feed-forward, beside those that were rewritten before.

    Attributes:
        covariance: second moments of the text's keys at the site.
        room: which neurons may be rewritten, and what the feed-forward reads.
        live, opening: what acts on the site's module, and by module name on the openers'.
    """

    runner: LayerRunner
    site: Site
    covariance: Covariance
    room: Room
    state: EditState
    live: LiveDelta
    opening: Mapping[str, LiveDelta]
    of_subject: dict[str, int] = field(default_factory=dict)

    def free_costs(self) -> list[float]:
        """What rewriting each neuron that is free would cost, in nats a token."""
        free = set(self._free())
        return [float(cost) for place, cost in zip(self.room.places, self.room.costs, strict=True) if place in free]

    def open(
        self,
        requests: Sequence[EditRequest],
        met: Sequence[list[int]] = (),
        names: Sequence[list[int]] = (),
    ) -> None:
        """Rewrite one neuron for each subject of a batch, for whom there are enough; it acts on the model from here
        on. All of them are silent at the end of the texts, given as token ids, that name other subjects (`met`) and
        `names` like the batch's."""
        subjects = list(dict.fromkeys(request.fact.subject for request in requests))
        places = self._free()[: len(subjects)]
        self.of_subject |= dict(zip(subjects, places, strict=True))
        own = [
            (subjects.index(request.fact.subject), row)
            for request in requests
            for row in (*request.rows, *request.kept)
        ]
        states = self._ends([row.ids[: row.subject + 1] for _, row in own])  # (rows, hidden)
        owner = torch.tensor([subject for subject, _ in own], device=states.device)
        others = {"met": self._ends(met), "names": self._ends(names)}
        gate, amount = self.openers.gate, self.openers.amount
        gates = self._listening(states, owner, others, GATE)
        heard = {gate: SHARPNESS * (gates - THRESHOLD * self._constant)}
        if amount is not None:
            heard[amount] = self._listening(states, owner, others, AMOUNT)
        before = len(self.state.neurons)
        self.state.neurons += self._rewrite(places, heard)
        self._act()
        if amount is not None:
            asked = torch.tensor([not row.kept for _, row in own], device=states.device)
            fired = firing(self.runner.arch, self.site, states[asked])[:, places].to(heard[amount])  # (rows, subjects)
            mine = F.one_hot(owner[asked]).to(fired)
            mean = (fired * mine).sum(0) / mine.sum(0)
            wanted = FIRING * self.covariance.matrix.diagonal().sum().sqrt()
            heard[amount] = heard[amount] * (wanted.to(mean) / mean).unsqueeze(1)
            self.state.neurons[before:] = self._rewrite(places, heard)
            self._act()

    def only(self, keys: Tensor) -> Tensor:
        """Keys (d_in, n) in the dimensions of rewritten neurons alone."""
        own = torch.zeros_like(keys)
        places = torch.tensor([n.place for n in self.state.neurons_at(self.site.layer)], device=keys.device)
        own[places] = keys[places]
        return own

    # --- which neurons ------------------------------------------------------------------------------------------------

    def _free(self) -> list[int]:
        """Those that no subject has yet, the one that matters least first."""
        taken = {neuron.place for neuron in self.state.neurons_at(self.site.layer)}
        return [place for place in self.room.places if place not in taken]

    @cached_property
    def _weight(self) -> Tensor:
        """W of the untouched base, (d_out, d_in)."""
        weight: Tensor = base_weight(self.site).cpu()
        return weight

    # --- what they listen to ------------------------------------------------------------------------------------------

    @cached_property
    def openers(self) -> Openers:
        """What opens the feed-forward."""
        return openers(self.runner.arch, self.site)

    @cached_property
    def _moments(self) -> Tensor:
        return self.room.moments.to(solve_device(self.site.module))  # (hidden, hidden)

    @cached_property
    def _energy(self) -> Tensor:
        """Every direction's own, (hidden,); some where there is none, as a norm's weight may be zero."""
        own = self._moments.diagonal()
        return own.clamp_min(DEAD * float(own.mean()))

    @cached_property
    def _constant(self) -> Tensor:
        """m (hidden,)."""
        damped = self._moments + CONSTANT_RIDGE * self._energy.diag()
        found: Tensor = torch.linalg.solve(damped, self.room.mean.to(damped))
        return found

    def _listening(self, states: Tensor, owner: Tensor, others: Mapping[str, Tensor], silence: Silence) -> Tensor:
        """w of each subject, (count, hidden), from all subjects' states (rows, hidden) and those of others, which are
        (n, hidden) each."""
        states, count = states.double(), int(owner.max()) + 1
        moments = silence.text * self._moments + RIDGE * self._energy.diag()
        weights = {"batch": silence.batch, "met": silence.met, "names": count * silence.names}
        for name, group in {"batch": states, **others}.items():
            moments = moments + weights[name] * group.double().T @ group.double() / max(1, len(group))
        spread = torch.linalg.solve(moments, states.T)  # (hidden, rows)
        found = []
        for subject in range(count):
            own = (owner == subject).nonzero().squeeze(1)
            gram = states[own] @ spread[:, own] + len(own) * torch.eye(len(own), dtype=states.dtype, device=own.device)
            w = spread[:, own] @ torch.linalg.solve(gram, gram.new_ones(len(own)))
            found.append(w / (states[own] @ w).mean())
        return torch.stack(found)

    def _ends(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """What the feed-forward reads at the end of each text of token ids, (texts, hidden)."""
        found, order, layer = list[Tensor](), list[int](), self.site.layer
        for some in rests(self.runner, texts, stop=layer + 1):
            here = reading(self.runner, {layer: self.openers}, some.inputs())[layer]
            ends = some.mask.sum(1) - 1
            found.append(here[torch.arange(len(ends), device=here.device), ends.to(here.device)])
            order += some.places
        if not found:
            return self.room.mean.new_zeros(0, len(self.room.mean)).to(self._moments.device)
        return torch.cat(found)[torch.tensor(order, device=found[0].device).argsort()]

    # --- rewriting ----------------------------------------------------------------------------------------------------

    def _rewrite(self, places: Sequence[int], rows: Mapping[Opener, Tensor]) -> list[Neuron]:
        """The neurons at `places`, whose openers' rows become `rows` (n, hidden), less what their biases add."""
        changes = dict[str, list[Tensor]]()
        for opener in self.openers.all:
            if opener in rows:
                where = [opener.first + place for place in places]
                wanted = rows[opener] - self._biases(opener.site, where)
                change = storable((wanted - read_weight(opener.site)[where].double()).cpu())  # (n, hidden)
                changes.setdefault(opener.site.module_name, []).append(change)
        listening = {name: torch.stack(parts, 1) for name, parts in changes.items()}  # (n, rows of one, hidden)
        lost = storable(-self._weight[:, list(places)])
        return [
            Neuron(
                self.site.layer,
                place,
                {name: each[i] for name, each in listening.items()},
                lost[:, i],
                storable(self.room.instead[self.room.places.index(place)]),
            )
            for i, place in enumerate(places)
        ]

    def _biases(self, site: Site, rows: Sequence[int]) -> Tensor:
        bias = getattr(site.module, "bias", None)
        if bias is None:
            return torch.zeros(len(rows), 1, dtype=torch.double, device=self._constant.device)
        own: Tensor = bias.detach().double()[list(rows)].unsqueeze(1)
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
