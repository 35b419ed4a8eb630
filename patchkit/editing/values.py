"""The value optimizer, the same for every method: which state at the subject's last token makes the model predict the
target?

Many facts share each step, every one with its own delta, and waiting facts take the place of finished ones. What a
delta cannot change is computed once: the layers up to the edited one, and above it the KV cache of all positions before
the subject's last token. A step then runs only the suffix from that token on, through the layers above, with logits at
the target positions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.editing.buckets import Bucket
from patchkit.editing.full_steps import FullSteps
from patchkit.editing.suffixes import Suffixes, in_parts
from patchkit.editing.value_config import ValueConfig
from patchkit.editing.value_log import ValueLog
from patchkit.editing.value_problem import NO_TERMS, ValueAt, ValueProblem, ValueTerms
from patchkit.facts.requests import EditRequest
from patchkit.model.devices import sent
from patchkit.model.forward import LayerRunner
from patchkit.model.weights import Site


@dataclass(frozen=True)
class ValueStates:
    """What a patch keeps of its facts' values: target states V and the states they started from, (d, n) each."""

    targets: Tensor
    start: Tensor

    def of(self, facts: Sequence[int]) -> ValueStates:
        """Those of the facts with these places."""
        chosen = sent(facts, self.targets.device, torch.long)
        return ValueStates(self.targets[:, chosen], self.start[:, chosen])


@dataclass(frozen=True)
class Values:
    """Per fact: target state V (d, n), its start (d, n), final target loss (n,) in nats, steps taken (n,)."""

    targets: Tensor
    start: Tensor
    loss: Tensor
    steps: Tensor

    def of(self, facts: Sequence[int]) -> Values:
        """Those of the facts with these places."""
        chosen = sent(facts, self.loss.device, torch.long)
        return Values(*(getattr(self, name)[..., chosen] for name in ("targets", "start", "loss", "steps")))

    def states(self) -> ValueStates:
        """The states alone."""
        return ValueStates(self.targets, self.start)


def optimize(
    runner: LayerRunner,
    requests: Sequence[EditRequest],
    site: Site,
    value_at: ValueAt,
    config: ValueConfig,
    advance: Callable[[int], None] = lambda finished: None,
    terms: ValueTerms = NO_TERMS,
    groups: Sequence[int] | None = None,
    log: ValueLog | None = None,
    layers: Sequence[int] = (),
) -> Values:
    """Optimize each request's value at `site`'s layer: -log P(target) + KL on the essence prompt + decay (ROME eq. 4).

    The drift term is KL(edited ‖ original) as in the published code. `advance` is told how many facts have finished.
    Requests with the same number in `groups` get one delta for all of them, with which all their targets are
    predicted: facts about one subject share a key, which can have only one value (MEMIT-Merge, arXiv 2502.07322).
    What `log` holds of the same call is gone on from, to the same values. `layers` is as in `ValueProblem`.

    Raises:
        InputError: there is not enough memory for a single prompt.
    """
    problem = ValueProblem(runner, site, value_at, terms, layers)
    return _Optimizer(problem, requests, config, groups, log or ValueLog()).run(advance)


_KEPT = ("start", "value", "mean", "square", "average", "scale", "loss", "seen")
"""The tensors of an optimizer's state."""


class _Optimizer:
    """The optimization state of all facts; the `active` ones are in the buckets, others wait or have finished.

    Per fact, n of them: start, value, mean, square, average (n, places, d), all but the first in units of scale
    (n, places, 1), mean and square Adam's, average that of the values so far; loss, steps (n,).
    """

    def __init__(
        self,
        problem: ValueProblem,
        requests: Sequence[EditRequest],
        config: ValueConfig,
        groups: Sequence[int] | None,
        log: ValueLog,
    ) -> None:
        self.problem, self.config, self.log = problem, config, log
        self.suffixes = Suffixes(problem.runner, requests, problem.start)
        self.pace = config.pace(self.suffixes.turns > 1)
        self.parallel = min(config.parallel or problem.runner.room.facts, self.suffixes.facts)
        self.group = list(groups or range(len(requests)))
        self.waiting = sorted(range(len(requests)), key=lambda fact: self.group.index(self.group[fact]))
        self.active: list[int] = []
        self._weights: dict[nn.Module, Tensor] = {}  # in 16 bits, where passes multiply in them
        self.buckets: list[Bucket] = []
        device, dtype = problem.runner.device, torch.promote_types(problem.runner.dtype, torch.float32)
        shape = (len(requests), 1 + problem.terms.attention, problem.site.d_out)
        self.start, self.value, self.mean, self.square, self.average = (
            torch.zeros(shape, device=device, dtype=dtype) for _ in "12345"
        )
        pace, room = self.pace, (shape[1], self.pace.steps, shape[2])
        self.full = FullSteps(room, self.start, pace.momentum, pace.memory) if pace.full else None
        self.scale, self.loss = self.start[..., :1].clone(), self.start[:, 0, 0].clone()
        self.steps, self.step = [0] * len(requests), 0
        # The target loss as last seen, of the rows of each turn, (n, turns).
        self.seen = torch.full((len(requests), self.suffixes.turns), torch.inf, device=device, dtype=dtype)

    def run(self, advance: Callable[[int], None]) -> Values:
        """Step until no fact is left."""
        self._resume(advance)
        while self.waiting or self.active:
            self._admit()
            places = sent(self.active, self.start.device)
            free = self._free(places)
            loss, gradient = self._evaluate(free)
            self.seen[places, self.step % self.suffixes.turns] = loss
            self.loss[places] = _mean_of_seen(self.seen[places])
            self.step += 1
            gradient = self._mean_over_groups(self.active, gradient)
            below, products = self._told(places, gradient)
            over = [d or self.steps[f] == self.pace.steps for f, d in zip(self.active, below, strict=True)]
            unfinished = {self.group[fact] for fact, o in zip(self.active, over, strict=True) if not o}
            done = [self.group[fact] not in unfinished for fact in self.active]
            advance(sum(done))
            if any(done):
                going = torch.tensor([i for i, d in enumerate(done) if not d], dtype=torch.long)
                there, products = sent(going, places.device), products[going]
                places, gradient = places[there], gradient[there]
                self._retire([fact for fact, d in zip(self.active, done, strict=True) if not d])
                self.log.retired[self.step] = list(self.active)
            if self.active:
                self._move(places, gradient, products)
            if self.log.due:
                self._keep()
        all_facts = self._free(torch.arange(len(self.start), device=self.start.device))
        deltas = all_facts.deltas(self.average if self.pace.averaged else self.value)
        targets = self.start[:, 0] + deltas[:, 0]
        return Values(targets.T, self.start[:, 0].T, self.loss, sent(self.steps, self.loss.device))

    def _told(self, places: Tensor, gradient: Tensor) -> tuple[list[bool], Tensor]:
        """Which of the active facts are below the loss at which they stop; and, where steps need them, the products of
        their gradients with those before, on the host. The one thing in a step that waits for the device."""
        below = self.seen[places].mean(1) < self.config.stop_loss  # (k,)
        if self.full is None:
            return below.tolist(), torch.zeros(len(below))
        products = self.full.meet(gradient, [self.steps[fact] for fact in self.active])  # (k, places, steps)
        told = torch.cat([below.to(products).unsqueeze(1), products.flatten(1)], 1).cpu()
        return (told[:, 0] > 0).tolist(), told[:, 1:].view(products.shape)

    def _state(self) -> dict[str, Tensor]:
        """The tensors that the next steps depend on."""
        own = {name: getattr(self, name) for name in _KEPT}
        return own if self.full is None else {**own, "past": self.full.past, "products": self.full.products}

    def _keep(self) -> None:
        """Write all that the next steps depend on but the buckets."""
        tensors = self._state()
        tokens = self.suffixes.tokens
        self.log.keep(tensors, steps=self.steps, step=self.step, parallel=self.parallel, tokens=tokens)

    def _resume(self, advance: Callable[[int], None]) -> None:
        """Go on from the log. The buckets are made once more of the same facts in the same order, without a step
        between, so that their rows have the same neighbors and all later steps the same numbers."""
        if (found := self.log.load()) is None:
            return
        tensors, notes = found
        self.parallel, self.suffixes.tokens = notes["parallel"], notes["tokens"]
        while self.step < notes["step"] and (self.waiting or self.active):
            self._admit()
            now, later = self._due()
            self.buckets = [*now, *later]
            self.step += 1
            if self.step in self.log.retired:
                advance(len(self.active) - len(self.log.retired[self.step]))
                self._retire(list(self.log.retired[self.step]))
        for name, tensor in self._state().items():
            tensor.copy_(tensors[name])
        self.steps = notes["steps"]

    def _free(self, facts: Tensor) -> _Free:
        return _Free(self.problem.terms, facts, self.start[facts], self.scale[facts])

    @torch.no_grad()
    def _admit(self) -> None:
        """Start waiting facts once half of the places are free, so that many prefixes are read in one pass."""
        if not self.waiting or len(self.active) > self.parallel // 2:
            return
        room = self.parallel - len(self.active)
        while room < len(self.waiting) and self.group[self.waiting[room]] == self.group[self.waiting[room - 1]]:
            room += 1  # a group is never split
        new, self.waiting = sorted(self.waiting[:room]), self.waiting[room:]
        buckets = self.suffixes.buckets(new)
        rows = torch.cat([self.problem.start_states(bucket).to(self.start) for bucket in buckets])  # (rows, places, d)
        order = sent(torch.cat([bucket.row.known for bucket in buckets]).argsort(), rows.device)
        states = rows[order].unflatten(0, (len(new), -1))  # (new, rows per fact, places, d)
        places = sent(new, rows.device)
        self.start[places] = states[:, 0]
        # The median over contexts: at position 0 a model without BOS keeps an attention sink hundreds of times longer.
        self.scale[places] = self._mean_over_groups(new, states.norm(dim=-1).median(1).values.unsqueeze(-1))
        self.active += new
        if self.full is not None:
            self.full.admit(len(new))
        self.buckets = self.suffixes.merged([*self.buckets, *(self._with_base(bucket) for bucket in buckets)])

    def _mean_over_groups(self, facts: Sequence[int], numbers: Tensor) -> Tensor:
        """Numbers (k, ...) of facts, each replaced by the mean over its group."""
        group = [self.group[fact] for fact in facts]
        if len(set(group)) == len(group):
            return numbers
        place = sent([group.index(each) for each in group], numbers.device)
        count = sent([max(1, group.count(each)) for each in group], numbers.device)
        sums = torch.zeros_like(numbers).index_add(0, place, numbers)
        return sums[place] / count.view(-1, *[1] * (numbers.ndim - 1))

    def _with_base(self, bucket: Bucket) -> Bucket:
        """With what the untouched model predicts after the essence prompts and in the kept texts."""
        if len(bucket.kept):
            none = self.start.new_zeros(len(bucket.row), *self.start.shape[1:])
            *_, kept = bucket.segments(self.problem.logits(bucket, none))
            bucket = replace(bucket, kept=bucket.kept.known(kept))
        essence = bucket.essence()
        if not len(essence.row):
            return bucket
        none = self.start.new_zeros(len(essence.row), *self.start.shape[1:])
        return replace(bucket, base=self.problem.logits(essence, none).log_softmax(-1))

    def _retire(self, going: list[int]) -> None:
        active = set(going)
        if self.full is not None:
            self.full.retire([i for i, fact in enumerate(self.active) if fact in active])
        self.active = going
        self.buckets = [left for bucket in self.buckets for left in bucket.of_facts(active)]

    def _evaluate(self, free: _Free) -> tuple[Tensor, Tensor]:
        """Target loss (k,) and the whole loss's gradient at the free parameters (k, places, d) of the active facts.

        One bucket's graph at a time is alive, so memory does not grow with the number of buckets.
        """
        relative, config = self.value[free.facts], self.config
        differentiate = any(self.steps[fact] < self.pace.steps for fact in self.active)
        loss = relative.new_zeros(len(relative))
        gradient = 2 * config.decay * relative + (free.penalty_gradient(relative) if differentiate else 0)
        place = free.facts.new_zeros(len(self.start))
        place[free.facts] = torch.arange(len(free.facts), device=place.device)

        def measure(bucket: Bucket) -> tuple[Tensor, Tensor | None]:
            leaf = relative.detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                target, drift = self._losses(bucket, place[bucket.fact_of.there], free.deltas(leaf))
                whole = (target + drift).sum()
            return target.detach(), torch.autograd.grad(whole, leaf)[0] if differentiate else None

        now, later = self._due()
        with self._products():
            done = [part for bucket in now for part in in_parts(measure, bucket, Bucket.halves)]
        self.buckets = [*(bucket for bucket, _ in done), *later]
        for _, (target, slope) in done:
            loss += target
            gradient += 0 if slope is None else slope
        return loss, gradient

    def _products(self) -> AbstractContextManager[None]:
        """In 16 bits, where the recipe has it so."""
        return self.problem.runner.in_16_bits(self._weights) if self.config.products == "bfloat16" else nullcontext()

    def _due(self) -> tuple[list[Bucket], list[Bucket]]:
        """The buckets that this step looks at, and the others."""
        due = [self.step % bucket.turn[1] == bucket.turn[0] for bucket in self.buckets]
        now = [bucket for bucket, wanted in zip(self.buckets, due, strict=True) if wanted]
        return now, [bucket for bucket, wanted in zip(self.buckets, due, strict=True) if not wanted]

    def _losses(self, bucket: Bucket, place: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """What the bucket's rows, at the given places (rows,) among deltas (k, places, d), add to each fact's target
        loss and to its weighted drift on the essence prompt and on kept texts, both (k,)."""
        config, (_, turns) = self.config, bucket.turn  # what is looked at in every n-th step counts n times as much
        asked, essence, kept = bucket.segments(self.problem.logits(bucket, deltas[place]))  # (points, vocab) each
        at = bucket.segments(place[bucket.point_row.there])  # (points,) each
        target = drift = deltas.new_zeros(len(deltas))
        losses = F.cross_entropy(asked, bucket.label, reduction="none") * bucket.weight
        target = target.index_add(0, at[0], turns * losses)
        if len(essence):
            edited = essence.log_softmax(-1)
            divergence = F.kl_div(bucket.base, edited, reduction="none", log_target=True).sum(-1)
            drift = drift.index_add(0, at[1], turns * config.kl_weight * divergence)
        if len(kept):
            losses = bucket.kept.drift(kept, config.leak_weight, config.kept_weight)
            drift = drift.index_add(0, at[2], turns * losses)
        return target, drift

    def _move(self, facts: Tensor, gradient: Tensor, products: Tensor) -> None:
        """One step, each fact at its own count, then clip to the longest allowed."""
        before = [self.steps[fact] for fact in self.active]
        for fact in self.active:
            self.steps[fact] += 1
        counts = torch.tensor([self.steps[fact] for fact in self.active], dtype=torch.float64)
        if self.full is None:
            moved = self.value[facts] - self._adam(facts, gradient, counts)
        else:
            moved = self.value[facts] - self.pace.learning_rate * self.full.step(products, before)
        self.value[facts] = moved = moved * (self.pace.clamp / moved.norm(dim=-1, keepdim=True)).clamp_max(1)
        share = sent((1 / counts).clamp_min(1 - self.pace.averaged)[:, None, None].to(moved.dtype), moved.device)
        self.average[facts] += share * (moved - self.average[facts])

    def _adam(self, facts: Tensor, gradient: Tensor, counts: Tensor) -> Tensor:
        """A step of Adam (Kingma & Ba, algorithm 1)."""
        momentum, memory = self.pace.momentum, self.pace.memory
        biases = torch.stack([1 - beta**counts for beta in (momentum, memory)])[:, :, None, None].to(gradient.dtype)
        mean_bias, square_bias = sent(biases, gradient.device)
        self.mean[facts] = mean = momentum * self.mean[facts] + (1 - momentum) * gradient
        self.square[facts] = square = memory * self.square[facts] + (1 - memory) * gradient.square()
        rate = self.pace.learning_rate / self.problem.site.d_out**0.5
        step: Tensor = rate * (mean / mean_bias) / ((square / square_bias).sqrt() + 1e-8)
        return step


def _mean_of_seen(losses: Tensor) -> Tensor:
    """The mean (k,) of losses (k, turns) of those turns that there was a step for."""
    seen = ~losses.isposinf()
    return losses.where(seen, 0).sum(1) / seen.sum(1).clamp_min(1)


@dataclass(frozen=True)
class _Free:
    """Free parameters in units of `scale`, and the deltas they make.

    Shapes: facts (k,); start (k, places, d); scale (k, places, 1).
    """

    terms: ValueTerms
    facts: Tensor
    start: Tensor
    scale: Tensor

    def deltas(self, relative: Tensor) -> Tensor:
        """What is added to the states, (k, places, d)."""
        deltas = relative * self.scale
        if self.terms.constrain is None:
            return deltas
        constrained = self.terms.constrain(self.facts, self.start[:, 0], deltas[:, 0])
        return torch.cat([constrained.unsqueeze(1), deltas[:, 1:]], 1)

    def penalty_gradient(self, relative: Tensor) -> Tensor:
        """Gradient of the method's own penalty, as `relative` (k, places, d)."""
        if self.terms.penalty is None:
            return torch.zeros_like(relative)
        leaf = relative.detach().requires_grad_()
        penalty = self.terms.penalty(self.facts, self.start[:, 0], self.deltas(leaf)[:, 0])  # (k,)
        return torch.autograd.grad(penalty.sum(), leaf)[0]
