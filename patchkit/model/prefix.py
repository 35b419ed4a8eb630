"""What the model keeps of the beginning of a text, once for all that goes on from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from patchkit.model.devices import at
from patchkit.model.forward import LayerRunner, empty_cache


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
        cache = before.growing_cache() if before else empty_cache(runner.depth)
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
