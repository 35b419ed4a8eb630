"""Running a span of a model's decoder layers on the model's own forward pass, whatever the family.

Masks, rotary tables and per-layer arguments are prepared by the model itself: layers below the span are passed
through, the span's first layer is handed stored hidden states, and an exception ends the pass after its last. That is
what lets statistics, keys and value optimization leave out every layer they do not need, on any decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from patchkit.model.arch import Architecture
from patchkit.model.devices import at, home_of
from patchkit.model.inputs import SiteInput, watching_site
from patchkit.model.linears import Linears
from patchkit.model.threads import forward_in_this_thread, in_this_thread
from patchkit.model.twin import twin_of
from patchkit.model.weights import Site, weight_of


class _EndOfSpan(Exception):
    """Unwinds a forward pass after the span's last layer."""


class _PrefixLayer(DynamicLayer):
    """Keys and values of a prefix that later passes may look at and never extend, so one prefix serves many steps."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prefix and new states joined (rows, heads, prefix + new, head_dim); nothing is stored."""
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


@dataclass(frozen=True)
class Prefix:
    """The KV cache of a prefix, which suffixes are run after.

    layers: per layer keys and values (rows, heads, length, head_dim); mask: (rows, length), 1 where there is a token.
    Padding is on the left: sliding windows count by distance to the suffix, which padding in between would add to.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    @staticmethod
    def read(
        runner: LayerRunner,
        ids: Tensor,
        mask: Tensor,
        before: Prefix | None = None,
        start: int = 0,
        hidden: Tensor | None = None,
        stop: int | None = None,
    ) -> Prefix:
        """The KV cache of right-padded texts (rows, seq), each after the same row of `before`.

        Layers start..stop-1 run, by default all, from `hidden` as in `LayerRunner.run`; the others get stubs. No
        layer's cache evicts, not even with sliding windows: prompts are short, and a cut cache could not be shared.
        """
        known = mask[:, :0] if before is None else before.mask
        whole = torch.cat([known, mask], 1)  # (rows, length + seq)
        seen = whole.clone()
        # An empty text would leave its row nothing to attend to: NaN; the mask that is kept leaves it out again.
        seen[:, known.shape[1]] += 1 - whole.amax(1)
        positions = known.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        cache = before.growing_cache() if before else Cache(layers=[DynamicLayer() for _ in range(runner.depth)])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": seen, "position_ids": positions}
        ran = range(start, runner.depth if stop is None else stop)
        with torch.no_grad():
            inputs |= {"past_key_values": cache, "use_cache": True}
            runner.run(inputs, start=start, hidden=hidden, stop=ran.stop)
        stub = torch.zeros(*whole.shape, 1, 1, device=ids.device, dtype=runner.dtype).transpose(1, 2)
        layers: Any = cache.layers
        pairs = tuple((each.keys, each.values) if i in ran else (stub, stub) for i, each in enumerate(layers))
        return Prefix(pairs, whole)._packed()

    def _packed(self) -> Prefix:
        """The same prefixes without padding between or after a row's tokens."""
        order = self.mask.argsort(dim=1, stable=True)[:, -max(1, int(self.mask.sum(1).max())) :]  # (rows, length)
        where = order[:, None, :, None]

        def pick(states: Tensor) -> Tensor:
            return states.gather(2, where.to(states.device).expand(-1, states.shape[1], -1, states.shape[3]))

        return Prefix(tuple((pick(keys), pick(values)) for keys, values in self.layers), self.mask.gather(1, order))

    def inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Arguments of the model's forward over right-padded texts (rows, seq), each after the same row of these."""
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([self.mask, mask], 1),
            "position_ids": self.mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device),
            "past_key_values": self.cache(),
            "use_cache": True,
        }

    @property
    def token_bytes(self) -> int:
        """Bytes that the keys and values of one position take."""
        return sum(part[0, :, 0].numel() * part.element_size() for pair in self.layers for part in pair)

    def rows(self, rows: Tensor) -> Prefix:
        """The prefixes with these row numbers, each as often as it is named."""
        return Prefix(tuple((at(keys, rows), at(values, rows)) for keys, values in self.layers), at(self.mask, rows))

    def seen_by(self, rows: Tensor) -> Prefix:
        """As if those rows had no prefix where `rows` (rows,) is false."""
        return Prefix(self.layers, self.mask * rows.unsqueeze(1))

    def last(self, tokens: int) -> Prefix:
        """Those of so many tokens at most, without padding that all rows have."""
        if tokens >= self.mask.shape[1]:
            return self
        return Prefix(tuple((k[:, :, -tokens:], v[:, :, -tokens:]) for k, v in self.layers), self.mask[:, -tokens:])

    def from_layer(self, start: int) -> Prefix:
        """Without the keys and values of the layers below `start`, which never run again; stubs keep the length, from
        which the model takes its positions."""
        stubs = ((keys[:, :1, :, :1].clone(), values[:, :1, :, :1].clone()) for keys, values in self.layers[:start])
        return Prefix((*stubs, *self.layers[start:]), self.mask)

    def beside(self, other: Prefix) -> Prefix:
        """The rows of both prefixes in one batch, padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def joined(a: Tensor, b: Tensor, dim: int) -> Tensor:
            blank = (0,) * (2 * (a.dim() - dim - 1))
            return torch.cat([F.pad(x, (*blank, length - x.shape[dim], 0)) for x in (a, b)])

        pairs = zip(self.layers, other.layers, strict=True)
        layers = tuple((joined(k, k2, 2), joined(v, v2, 2)) for (k, v), (k2, v2) in pairs)
        return Prefix(layers, joined(self.mask, other.mask, 1))

    def cache(self) -> Cache:
        """As the model's `past_key_values`; passes read it and leave it as it is, so it serves any number of them."""
        return Cache(layers=[_PrefixLayer(keys, values) for keys, values in self.layers])

    def growing_cache(self) -> Cache:
        """As the model's `past_key_values`; each pass appends its keys and values, as in generation."""
        layers: Any = [DynamicLayer() for _ in self.layers]
        for layer, states in zip(layers, self.layers, strict=True):
            layer.update(*states)
        return Cache(layers=layers)


@dataclass(frozen=True)
class Span:
    """Output of one pass: hidden states (rows, seq, d) after the last layer run, or logits of a full pass."""

    hidden: Tensor | None = None
    logits: Tensor | None = None


class LayerRunner:
    """Runs spans of `arch`'s layers. Holds no state of a pass; every hook is gone when a call returns."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self._linears = Linears(arch.model)
        self._arity = self._output_arity()

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

    @property
    def vocabulary(self) -> int:
        """Size of the output vocabulary."""
        return weight_of(self.arch.head).shape[0]

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
                layer.forward = forward_in_this_thread(layer, _pass_through(arity))
            yield
        finally:
            for layer, forward in zip(layers, saved, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward

    def _output_arity(self) -> list[int]:
        """Per layer 0 for a bare tensor, else the length of the tuple it returns, seen in a one-token pass."""
        seen: list[int] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(len(output) if isinstance(output, tuple) else 0)

        twin = twin_of(self.arch.model)
        for layer in twin.get_submodule(self.arch.layers_name).children():
            layer.register_forward_hook(note)
        with torch.no_grad():
            twin(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        return seen


def _pass_through(arity: int) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if arity == 0 else (hidden_states, *[None] * (arity - 1))

    return forward


@contextmanager
def _feeding(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    handle = layer.register_forward_pre_hook(in_this_thread(swap), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _ending_after(layer: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def end(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _EndOfSpan

    handle = layer.register_forward_hook(in_this_thread(end))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _gathering(head: nn.Module, where: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Let the head see only the hidden states at `where`, so that scaling and soft-capping after it still apply."""
    rows, positions = where

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (at(args[0], rows, positions).unsqueeze(0),)  # (1, points, d)

    handle = head.register_forward_pre_hook(in_this_thread(gather))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watching(module: nn.Module, rows: int, see: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see(input, output)` whenever `module` runs; a tensor that it returns replaces the output.

    `rows` is the number of sequences in the pass: some families flatten (rows, seq, d) to two dimensions before a
    module (OPT), and `see` always gets and gives three.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        seen = see(args[0].view(rows, -1, args[0].shape[-1]), output.view(rows, -1, output.shape[-1]))
        return None if seen is None else seen.view_as(output)

    handle = module.register_forward_hook(in_this_thread(hook))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watching_output(module: nn.Module, rows: int, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """As `watching`, for modules of any signature, attention with its tuples among them: `see(output)` only."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        seen = see(first.view(rows, -1, first.shape[-1]))
        if seen is None:
            return None
        return (seen.view_as(first), *output[1:]) if isinstance(output, tuple) else seen.view_as(first)

    handle = module.register_forward_hook(in_this_thread(hook))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watching_input(layer: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `see(hidden)` with a decoder layer's input hidden states (rows, seq, d) at each run."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = layer.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
