"""What each layer of a model keeps of a text: keys and values of every token, states that run along it, or nothing.

Attention keeps keys and values. Linear attention, state spaces and convolutions keep states of one size whatever the
text's length: what the convolution still sees of the last tokens, and the recurrence's state after them (Qwen3-Next,
Qwen3.5, LFM2, Granite 4's hybrids, Falcon-H1). A layer that reads another's keys and values keeps nothing (Gemma 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from patchkit.errors import InputError
from patchkit.model.devices import at

Running = Mapping[tuple[str, int], Tensor]
"""States (rows, ...) by kind, "conv" or "recurrent", and number."""
_KINDS = ("conv", "recurrent")
AHEAD = 32
"""Tokens for whose keys and values there is room when a text begins to grow."""


class _Read(DynamicLayer):
    """Keys and values of a text that passes may look at and never extend, so that one serves many steps."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The text's and the new states joined (rows, heads, length + new, head_dim); nothing is stored."""
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


class _Growing(DynamicLayer):
    """Keys and values with room ahead, so that those of a new token are written beside the others, which are copied
    only where the room is at its end."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms, self._length = (keys, values), keys.shape[2]
        self.lazy_initialization(keys, values)
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All states so far (rows, heads, length, head_dim), the new ones at the end."""
        known, self._length = self._length, self._length + key_states.shape[2]
        if self._length > self._rooms[0].shape[2]:
            self._rooms = self._with_room(self._rooms[0][:, :, :known]), self._with_room(self._rooms[1][:, :, :known])
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, known : self._length] = new
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Only these rows from now on, each as often as it is named."""
        self._rooms = at(self._rooms[0], beam_idx), at(self._rooms[1], beam_idx)
        self._show()

    def _with_room(self, states: Tensor) -> Tensor:
        return F.pad(states, (0, 0, 0, self._length + AHEAD - states.shape[2]))

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._rooms[0][:, :, : self._length], self._rooms[1][:, :, : self._length]
        return self.keys, self.values


class _Copies(dict[int, Tensor | None]):
    """Tensors of which a reader gets copies, as a pass over one token writes into what it reads."""

    def __getitem__(self, number: int) -> Tensor:
        found = super().__getitem__(number)
        assert found is not None
        return found.clone()


class _ReadRunning(LinearAttentionLayer):
    """States after a text that passes go on from and never change."""

    def __init__(self, running: Running) -> None:
        super().__init__(_count(running))
        self.conv_states, self.recurrent_states = (
            _Copies({number: state for (own, number), state in running.items() if own == kind}) for kind in _KINDS
        )
        self.has_previous_state = dict.fromkeys(self.has_previous_state, True)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, *args: Any, **kwargs: Any) -> Tensor:
        """What is seen of the text, and the new tokens' (rows, channels, seen + new); nothing is stored."""
        known = self.conv_states[state_idx]
        assert known is not None
        return torch.cat([known, conv_states], -1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """The state that the pass came to, as it is; nothing is stored."""
        return recurrent_states


class _ReadBoth(_ReadRunning, _Read):  # type: ignore[misc, override]  # as transformers' own of both
    """Of a layer with attention and a state space side by side."""

    def __init__(self, running: Running, keys: Tensor, values: Tensor) -> None:
        _Read.__init__(self, keys, values)
        _ReadRunning.__init__(self, running)
        self.dtype, self.device = keys.dtype, keys.device  # type: ignore[assignment]


def _count(running: Running) -> int:
    """How many states of a kind there are."""
    return 1 + max(number for _, number in running)


@dataclass(frozen=True)
class LayerStates:
    """What one layer keeps of some texts.

    attention: keys and values (rows, heads, length, head_dim), None where the layer keeps none.
    running: None where it keeps none.
    """

    attention: tuple[Tensor, Tensor] | None = None
    running: Running | None = None

    @staticmethod
    def of(layer: Any) -> LayerStates:
        """Those in a layer of a cache, after a pass."""
        keys, values, running = getattr(layer, "keys", None), getattr(layer, "values", None), None
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            states = zip(_KINDS, (layer.conv_states, layer.recurrent_states), strict=True)
            found = {(kind, number): state for kind, some in states for number, state in some.items()}
            running = {which: state for which, state in found.items() if state is not None}
        return LayerStates(None if keys is None or values is None else (keys, values), running)

    @staticmethod
    def stub_of(layer: Any, text: Tensor) -> LayerStates:
        """For a layer of a cache that has not run over a text (rows, length): as `stub`."""
        attention, running = None, None
        if isinstance(layer, DynamicLayer):
            nothing = text.new_zeros(len(text), 1, text.shape[1], 1)
            attention = (nothing, nothing)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            running = {("conv", number): text.new_zeros(len(text), 0) for number in range(layer.number_of_states)}
        return LayerStates(attention, running)

    def mapped(
        self, of_attention: Callable[[Tensor], Tensor], of_running: Callable[[Tensor], Tensor] | None = None
    ) -> LayerStates:
        """The same of other tensors."""
        of_running = of_running or (lambda state: state)
        return LayerStates(
            None if self.attention is None else (of_attention(self.attention[0]), of_attention(self.attention[1])),
            None if self.running is None else {which: of_running(state) for which, state in self.running.items()},
        )

    def rows(self, rows: Tensor) -> LayerStates:
        """Those of some rows, each as often as it is named."""
        return self.mapped(lambda states: at(states, rows), lambda state: at(state, rows))

    def begun_in(self, rows: Tensor) -> LayerStates:
        """As if a text had only begun where `rows` (rows,) is false; keys and values are for a mask to hide."""

        def kept(state: Tensor) -> Tensor:
            return state * rows.to(state).view(-1, *[1] * (state.dim() - 1))

        return self.mapped(lambda states: states, kept)

    def stub(self) -> LayerStates:
        """For a layer that never runs: of keys and values one head and dimension, for the length, else nothing."""
        return self.mapped(lambda states: states[:, :1, :, :1].clone(), lambda state: state[:, :0].clone())

    def beside(self, other: LayerStates, length: int) -> LayerStates:
        """The rows of both, padded on the left to so many positions."""

        def padded(states: Tensor) -> Tensor:
            return F.pad(states, (0, 0, length - states.shape[2], 0))

        attention, running = None, None
        if self.attention is not None and other.attention is not None:
            pairs = zip(self.attention, other.attention, strict=True)
            keys, values = (torch.cat([padded(mine), padded(its)]) for mine, its in pairs)
            attention = (keys, values)
        if self.running is not None and other.running is not None:
            running = {which: torch.cat([state, other.running[which]]) for which, state in self.running.items()}
        return LayerStates(attention, running)

    @property
    def token_bytes(self) -> int:
        """Bytes that one position takes."""
        return sum(part[0, :, 0].numel() * part.element_size() for part in self.attention or ())

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes whatever its length."""
        return sum(state[0].numel() * state.element_size() for state in (self.running or {}).values())

    def read(self) -> Any:
        """As a layer of a cache that passes read and leave as it is."""
        if self.running is None:
            return DummyLayer() if self.attention is None else _Read(*self.attention)
        return _ReadRunning(self.running) if self.attention is None else _ReadBoth(self.running, *self.attention)

    def growing(self) -> Any:
        """As a layer of a cache that each pass appends to."""
        if self.running is None:
            return DummyLayer() if self.attention is None else _Growing(*self.attention)
        both = self.attention is not None
        layer: Any = (LinearAttentionAndFullAttentionLayer if both else LinearAttentionLayer)(_count(self.running))
        if self.attention is not None:
            layer.update(*self.attention)
        for (kind, number), state in self.running.items():
            layer.lazy_initialization(**{f"{kind}_states": state}, state_idx=number)
            getattr(layer, f"{kind}_states")[number] = state.clone()
            layer.has_previous_state[number] = True
        return layer


def empty_cache(config: Any, depth: int) -> Cache:
    """For a model of `depth` layers with nothing read yet; no layer forgets, whatever its window."""
    made = DynamicCache(config=config).layers
    return Cache(
        layers=[_empty(layer) for layer in made] if len(made) == depth else [DynamicLayer() for _ in range(depth)]
    )


def _empty(layer: Any) -> Any:
    if isinstance(layer, DummyLayer):
        return DummyLayer()
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return DynamicLayer()
    both = isinstance(layer, DynamicLayer)
    return (LinearAttentionAndFullAttentionLayer if both else LinearAttentionLayer)(layer.number_of_states)


def is_read(layer: Any) -> bool:
    """Whether a pass has left in a layer of an empty cache what such a layer keeps."""
    runs = isinstance(layer, LinearAttentionCacheLayerMixin)
    if runs and not any(layer.has_previous_state.values()):
        return False
    attends = isinstance(layer, DynamicLayer)
    return bool(layer.is_initialized) if attends else True


@dataclass(frozen=True)
class Lending:
    """Layers from `reader` on read, instead of their own, keys and values of layers from `lender` on."""

    lender: int
    reader: int


def lending(model: Any) -> Lending | None:
    """Which layers read others' keys and values (`kv_sharing_modes` in Gemma 4's configuration), where any do."""
    text = model.config.get_text_config(decoder=True)
    modes = list(enumerate(getattr(text, "kv_sharing_modes", None) or ()))
    readers = [index for index, mode in modes if mode == "reuse"]
    types = {text.layer_types[index] for index in readers}
    lenders = [index for index, mode in modes if mode == "store" and text.layer_types[index] in types]
    return Lending(min(lenders), readers[0]) if lenders else None


def refuse_between(model: Any, start: int, stop: int) -> None:
    """Refuse a span of layers start..stop-1 some of which read the keys and values of a layer below the span.

    Raises:
        InputError: it is such a span.
    """
    found = lending(model)
    if found is not None and found.lender < start < stop and stop > found.reader:
        raise InputError(
            f"{type(model).__name__}: layers from {found.reader} on read the keys and values of layer {found.lender}, "
            f"so that those below {found.lender} can be edited; choose them with --layers"
        )
