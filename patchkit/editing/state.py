"""What a run of the editor starts from and leaves behind: the edit history of each site, and what was written.

`EditState` goes on to the next run; `EditRun` is about one run alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from patchkit.editing.values import Values, ValueStates
from patchkit.facts.schema import Fact
from patchkit.maths.blocks import compact, joined, split
from patchkit.maths.linalg import Delta, PriorKeys
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import Chain, Update, delta_of, folded, mapped
from patchkit.model.arch import Architecture
from patchkit.model.devices import exact, sent, solve_device
from patchkit.model.weights import Site, read_weight


class SiteHistory:
    """Edit history of one site: its updates, and the keys and residuals they were solved from.

    Columns are in the order of the solves: by batch, then sweep, then fact (`patch.history.solve_records` finds them).
    """

    def __init__(self, chain: Chain, keys: Tensor, residuals: Tensor, gradient_columns: Sequence[int] = ()) -> None:
        """With keys (d_in, n) and residuals (d_out, n); `gradient_columns` are those whose residuals are gradients."""
        self._updates: list[Update] = list(chain)
        self.prior = PriorKeys(keys)
        self._residuals = [residuals]
        self._gradient_columns = list(gradient_columns)

    @staticmethod
    def empty(site: Site) -> SiteHistory:
        """Of a site that has not been edited."""
        none = torch.zeros(0, dtype=torch.float64, device=solve_device(site.module))
        keys, residuals = none.view(site.d_in, 0), none.view(site.d_out, 0)
        return SiteHistory((), keys, residuals) if site.blocks == 1 else BlockHistory({}, site.blocks, keys, residuals)

    def add(self, update: Update, keys: Tensor, residual: Tensor, gradients: bool = False) -> None:
        """Append a solve; `gradients` says whether its residual (d_out, n) is made of gradients."""
        self._append(update)
        if gradients:
            self._gradient_columns += range(len(self.prior), len(self.prior) + keys.shape[1])
        self.prior = self.prior.extended(keys)
        self._residuals.append(residual)

    def _append(self, update: Update) -> None:
        _append(self._updates, update)

    @property
    def chain(self) -> Chain:
        """All updates, neighbors of one kind as one."""
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

    def delta(self, weight: Callable[[], Tensor]) -> Delta | None:
        """All updates as one low-rank delta of the base weight, which `weight` gives (d_out, d_in)."""
        return delta_of(self.chain, weight) if self._updates else None

    def gradient_columns(self, before: int) -> tuple[Tensor, Tensor]:
        """Keys (d_in, m) and residuals (d_out, m) of those of the first `before` columns that hold gradients."""
        known = [column for column in self._gradient_columns if column < before]
        columns = sent(known, self.keys.device, torch.long)
        return self.keys[:, columns], self.residuals[:, columns]

    def copy(self) -> SiteHistory:
        """A copy to add to while this one stays as it is."""
        copied = SiteHistory(self.chain, self.keys, self.residuals, self._gradient_columns)
        copied.prior = self.prior  # it never changes, and keeps what earlier solves have computed
        return copied


def _append(updates: list[Update], update: Update) -> None:
    last = updates[-1] if updates else None
    if isinstance(update, Rotation) and isinstance(last, Rotation) and last.side == update.side:
        # Rounded each time as a patch's file will hold it, so that going on from the file is the same.
        updates[-1] = mapped(last.then(update), storable)
    else:
        updates.append(update)


class BlockHistory(SiteHistory):
    """Edit history of a site that is several weights side by side: each block has updates of its own, and all of them
    share the keys and residuals."""

    def __init__(
        self,
        chains: Mapping[int, Chain],
        blocks: int,
        keys: Tensor,
        residuals: Tensor,
        gradient_columns: Sequence[int] = (),
    ) -> None:
        """With the updates of those of its `blocks` that have any."""
        super().__init__((), keys, residuals, gradient_columns)
        self.blocks = blocks
        self._of_block: dict[int, list[Update]] = {block: list(chain) for block, chain in chains.items() if chain}

    def _append(self, update: Update) -> None:
        for block, part in split(update, self.blocks):
            _append(self._of_block.setdefault(block, []), part)

    @property
    def chains(self) -> dict[int, Chain]:
        """All updates by block, neighbors of one kind as one, and each in no more columns than it needs."""
        for block, updates in self._of_block.items():
            small = (compact(update) if isinstance(update, Delta) else update for update in folded(updates))
            self._of_block[block] = list(small)
        return {block: tuple(updates) for block, updates in sorted(self._of_block.items())}

    @property
    def chain(self) -> Chain:
        """Not one chain, but many."""
        raise NotImplementedError

    def delta(self, weight: Callable[[], Tensor]) -> Delta | None:
        """All updates as one low-rank delta of the weights side by side, (d_out, d_in)."""
        width = len(self.keys) // self.blocks

        def of(block: int) -> Tensor:
            return weight()[:, block * width : (block + 1) * width]

        parts = {block: delta_of(chain, partial(of, block)) for block, chain in sorted(self._of_block.items())}
        return joined(parts, self.blocks) if parts else None

    def copy(self) -> BlockHistory:
        """A copy to add to while this one stays as it is."""
        chains = {block: tuple(updates) for block, updates in self._of_block.items()}
        copied = BlockHistory(chains, self.blocks, self.keys, self.residuals, self._gradient_columns)
        copied.prior = self.prior
        return copied


@dataclass(frozen=True)
class Neuron:
    """A neuron that was rewritten to fire at one subject alone (`patchkit.editing.neurons`).

    Attributes:
        layer: of the feed-forward it is in.
        place: its number there.
        rows: by the module name of each weight that opens the feed-forward, the change of its rows there, (1, hidden),
            or (2, hidden) of a fused one.
        lost: what the text hears no more from it: less its column of the output projection, (d_out,).
        instead: how much of that each neuron (d_in,) is to make up for, itself 1.
    """

    layer: int
    place: int
    rows: Mapping[str, Tensor]
    lost: Tensor
    instead: Tensor


def rewritten(neurons: Sequence[Neuron], module: str, width: int) -> Delta:
    """The change of a weight (width, hidden) that opens a feed-forward, by its module name."""
    rows = torch.stack([neuron.rows[module] for neuron in neurons])  # (n, 1 or 2, hidden)
    each = rows.shape[1]
    first = torch.tensor([neuron.place for neuron in neurons]).unsqueeze(1)
    places = (first + width // each * torch.arange(each)).flatten()
    return Delta(torch.eye(width, dtype=rows.dtype)[:, places], rows.flatten(0, 1))


def made_up_for(neurons: Sequence[Neuron]) -> Delta:
    """The change of the output projection (d_out, d_in) by which the others make up for what rewritten neurons did."""
    return Delta(torch.stack([n.lost for n in neurons], 1), torch.stack([n.instead for n in neurons]))


@dataclass
class EditState:
    """What all runs so far have left, and the next one starts from.

    Attributes:
        sites: by layer, the edit history of its site.
        values: the facts' states at the value site, in the order in which they were written.
        subjects: those of all facts.
        neurons: those that were rewritten, in the order in which they were.
    """

    sites: dict[int, SiteHistory] = field(default_factory=dict)
    values: list[ValueStates] = field(default_factory=list)
    subjects: set[str] = field(default_factory=set)
    neurons: list[Neuron] = field(default_factory=list)

    def deltas(self, arch: Architecture) -> dict[int, Delta]:
        """By layer, the whole change of its weight, (d_out, d_in) in factors; layers without one are left out."""
        found = {layer: history.delta(partial(base_weight, arch.sites[layer])) for layer, history in self.sites.items()}
        edits = {layer: delta for layer, delta in found.items() if delta is not None}
        made_up = {layer: made_up_for(self.neurons_at(layer)) for layer in {n.layer for n in self.neurons}}
        both = {layer: [each[layer] for each in (made_up, edits) if layer in each] for layer in {*edits, *made_up}}
        return {layer: Delta.stack([part.to(parts[-1].left) for part in parts]) for layer, parts in both.items()}

    def neurons_at(self, layer: int) -> list[Neuron]:
        """Those in one layer, in their order."""
        return [neuron for neuron in self.neurons if neuron.layer == layer]

    def copy(self) -> EditState:
        """A copy to add to while this one stays as it is."""
        sites = {layer: history.copy() for layer, history in self.sites.items()}
        return EditState(sites, list(self.values), set(self.subjects), list(self.neurons))


@dataclass(frozen=True)
class WrittenFact:
    """A fact that a run has written.

    Attributes:
        batch: the number of the batch it was solved with, from 0.
        layers: where it was written.
        columns: how many keys it has in each solve.
        loss: the target's mean token loss that its value reached, in nats.
        steps: optimizer steps that this took.
        neuron: the number of its subject's own neuron, where it has one.
    """

    fact: Fact
    batch: int
    layers: tuple[int, ...]
    columns: int
    loss: float
    steps: int
    neuron: int | None = None


@dataclass
class EditRun:
    """One run of the editor.

    Attributes:
        state: the state it started from, with everything it added.
        contexts: the contexts it edited in.
        facts: what it wrote, in the order in which it was solved for.
        seconds: time spent, by phase.
    """

    state: EditState
    contexts: list[str]
    facts: list[WrittenFact] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def batches(self) -> list[int]:
        """How many facts each batch has."""
        return list(Counter(written.batch for written in self.facts).values())

    def copy(self) -> EditRun:
        """A copy that stays as it is while this run goes on."""
        return EditRun(self.state.copy(), list(self.contexts), list(self.facts), dict(self.seconds))

    def add_batch(
        self,
        facts: Sequence[Fact],
        values: Values,
        layers: Sequence[int],
        columns: Sequence[int] | None = None,
        neurons: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Record that `facts` were solved for together, for these values; `columns` of each, 1 where not given, and
        the own `neurons` of their subjects."""
        batch = self.facts[-1].batch + 1 if self.facts else 0
        columns, own = columns or [1] * len(facts), [neurons.get(fact.subject) for fact in facts]
        rows = zip(facts, columns, values.loss.tolist(), values.steps.tolist(), own, strict=True)
        self.facts += [WrittenFact(fact, batch, tuple(layers), *row) for fact, *row in rows]
        self.state.values.append(values.states())

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds[phase]`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def base_weight(site: Site) -> Tensor:
    """W of the untouched base at `site`, (d_out, d_in), in float64, where solves there are made."""
    return exact(read_weight(site), solve_device(site.module))


def storable(tensor: Tensor) -> Tensor:
    """`tensor` in float64, its numbers rounded to those that float32 holds."""
    return tensor.float().double()
