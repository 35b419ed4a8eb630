"""Running a span of a model's decoder layers on the model's own forward pass, whatever the family.

Masks, rotary tables and per-layer arguments are prepared by the model itself: layers below the span are passed
through, the span's first layer is handed stored hidden states, and an exception ends the pass after its last. That is
what lets statistics, keys and value optimization leave out every layer they do not need, on any decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from patchkit.model.arch import Architecture
from patchkit.model.devices import at, home_of
from patchkit.model.inputs import SiteInput, watching_site
from patchkit.model.linears import Linears
from patchkit.model.states import empty_cache, lending, refuse_between
from patchkit.model.threads import forward_in_this_thread, in_this_thread
from patchkit.model.trial import arities, pass_through
from patchkit.model.tuning import Room, room_on
from patchkit.model.weights import Site, weight_of


class _EndOfSpan(Exception):
    """Unwinds a forward pass after the span's last layer."""


@dataclass(frozen=True)
class Span:
    """Output of one pass: hidden states (rows, seq, d) after the last layer run, or logits of a full pass."""

    hidden: Tensor | None = None
    logits: Tensor | None = None


class LayerRunner:
    """Runs spans of `arch`'s layers. Holds no state of a pass; every hook is gone when a call returns.

    Raises:
        InputError: layers cannot be run in spans, or what they keep of a text is nothing to go on from.
    """

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self._linears = Linears(arch.model)
        self._arity = arities(arch)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.arch.layers)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings."""
        return home_of(self.arch.model.get_input_embeddings())  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        """What the edited weights, and so the hidden states, are held in."""
        return self.arch.sites[0].dtype

    @cached_property
    def room(self) -> Room:
        """How much goes into one pass here."""
        return room_on(self.device, self.arch.shape)

    @property
    def vocabulary(self) -> int:
        """Size of the output vocabulary."""
        return weight_of(self.arch.head).shape[0]

    def empty_cache(self) -> Cache:
        """As the model's `past_key_values`, with nothing read yet."""
        return empty_cache(self.arch.model.config, self.depth)

    @cached_property
    def runs_on(self) -> bool:
        """Whether layers keep states that run along a text, into which padding after it would go."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.empty_cache().layers)

    def resumable(self, layer: int) -> int:
        """The highest layer up to `layer` from which the model can be run: some read keys and values of a lower one."""
        lent = lending(self.arch.model)
        return min(layer, lent.lender) if lent and layer < self.depth else layer

    def run(
        self,
        inputs: dict[str, Any],
        *,
        start: int = 0,
        stop: int | None = None,
        hidden: Tensor | None = None,
        logits_at: tuple[Tensor, Tensor] | None = None,
    ) -> Span:
        """Run layers start..stop-1; with stop=None also the final norm and the head.

        Args:
            inputs: keyword arguments of the model's forward (input_ids, attention_mask, position_ids, ...).
            start: first layer to run; needs `hidden` (rows, seq, d), its input, when above 0. The depth itself runs no
                layer: `hidden` is what comes after the last one.
            stop: one past the last layer to run, or None for the whole model.
            logits_at: (row, position) index tensors: the head runs at those positions only and `logits` is
                (len(row), vocab); None with stop=None gives logits (rows, seq, vocab).
        """
        found: list[Tensor] = []
        refuse_between(self.arch.model, start, self.depth if stop is None else stop)
        with ExitStack() as stack:
            stack.enter_context(self._linears.by_onednn())
            if start > 0:
                stack.enter_context(self._passing_through(range(start)))
            if hidden is not None:
                stack.enter_context(_feeding(self.arch.layers[min(start, self.depth - 1)], hidden))
            if stop is not None:
                stack.enter_context(_ending_after(self.arch.layers[stop - 1], found))
            elif logits_at is not None:
                stack.enter_context(_gathering(self.arch.head, logits_at))
            try:
                output = self.arch.model(**inputs)
            except _EndOfSpan:
                return Span(hidden=found[0])
        return Span(logits=output.logits.squeeze(0) if logits_at is not None else output.logits)

    def generate(self, **arguments: Any) -> Tensor:
        """The model's own `generate`, (rows, tokens)."""
        with self._linears.by_onednn():
            tokens: Tensor = self.arch.model.generate(**arguments)  # type: ignore[operator]
        return tokens

    @contextmanager
    def in_16_bits(self, weights: dict[nn.Module, Tensor]) -> Iterator[None]:
        """Within the block products of passes are made in bfloat16 where that is faster: see `Linears.in_16_bits`."""
        with self._linears.in_16_bits(self.arch.head, weights):
            yield

    @contextmanager
    def _passing_through(self, indices: range) -> Iterator[None]:
        """Replace these layers' forward by one that returns its input in the layer's own output form."""
        layers = [self.arch.layers[i] for i in indices]
        saved = [layer.__dict__.get("forward") for layer in layers]
        try:
            for layer, arity in zip(layers, self._arity, strict=False):
                layer.forward = forward_in_this_thread(layer, pass_through(arity))
            yield
        finally:
            for layer, forward in zip(layers, saved, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward


@contextmanager
def _feeding(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    with layer.register_forward_pre_hook(in_this_thread(swap), with_kwargs=True):
        yield


@contextmanager
def _ending_after(layer: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def end(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _EndOfSpan

    with layer.register_forward_hook(in_this_thread(end)):
        yield


@contextmanager
def _gathering(head: nn.Module, where: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Let the head see only the hidden states at `where`, so that scaling and soft-capping after it still apply."""
    rows, positions = where

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (at(args[0], rows, positions).unsqueeze(0),)  # (1, points, d)

    with head.register_forward_pre_hook(in_this_thread(gather)):
        yield


@contextmanager
def watching(module: nn.Module, rows: int, see: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see(input, output)` whenever `module` runs; a tensor that it returns replaces the output.

    `rows` is the number of sequences in the pass: some families flatten (rows, seq, d) to two dimensions before a
    module (OPT), and `see` always gets and gives three.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        seen = see(args[0].view(rows, -1, args[0].shape[-1]), output.view(rows, -1, output.shape[-1]))
        return None if seen is None else seen.view_as(output)

    with module.register_forward_hook(in_this_thread(hook)):
        yield


@contextmanager
def watching_output(module: nn.Module, rows: int, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """As `watching`, for modules of any signature, attention with its tuples among them: `see(output)` only."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        seen = see(first.view(rows, -1, first.shape[-1]))
        if seen is None:
            return None
        return (seen.view_as(first), *output[1:]) if isinstance(output, tuple) else seen.view_as(first)

    with module.register_forward_hook(in_this_thread(hook)):
        yield


@contextmanager
def watching_input(layer: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `see(hidden)` with a decoder layer's input hidden states (rows, seq, d) at each run."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    with layer.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True):
        yield


@contextmanager
def traced(sites: Sequence[Site], rows: int) -> Iterator[dict[int, tuple[SiteInput, Tensor]]]:
    """Inside the block, a pass over `rows` rows puts by layer the site's input and a zero leaf (rows, seq, d_out) that
    is added to its output: the leaf's gradient is the output's, and no weight's is computed."""
    seen: dict[int, tuple[SiteInput, Tensor]] = {}

    def note(layer: int, keys: SiteInput, output: Tensor) -> Tensor:
        leaf = torch.zeros_like(output, requires_grad=True)
        seen[layer] = (keys, leaf)
        return leaf

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(watching_site(site, rows, partial(note, site.layer)))
        yield seen


def widen(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
