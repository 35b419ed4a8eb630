"""The routed experts of a layer, in one module that holds all of their weights, as transformers has them.

Nothing is known by a model's name. Which of the module's parameters is the output projection, how it lies, and whether
gates come before the experts or after them is found by trying (`find_stacked`); which experts a token chose and with
which gates is read off each call. What an expert's output projection is multiplied with, its key, is asked for by
running the module once more with that projection replaced by one that hands its input on (`ask`), whatever
comes before: activations, biases and how gate and up are laid out are the module's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from patchkit.errors import InputError
from patchkit.model.experts import Call, Experts, Pairs, explained, tolerance
from patchkit.model.twin import twin_of

ASKED = 1 << 15
"""Pairs of a token and an expert whose keys are asked for at once."""


@dataclass(frozen=True)
class StackedExperts(Experts):
    """A module of E experts whose output projections are slices of one parameter.

    Attributes:
        parameter: its name in the module: (E, d_out, width), or with `transposed` (E, width, d_out).
        silenced: names of the biases (E, d_out) that are added to what W_e puts out.
    """

    parameter: str
    transposed: bool
    silenced: tuple[str, ...] = ()

    # --- weights ------------------------------------------------------------------------------------------------------

    @property
    def weight_name(self) -> str:
        """Of the parameter, in the state dict."""
        return f"{self.name}.{self.parameter}"

    @property
    def stack(self) -> Tensor:
        """The parameter as it is stored."""
        return self.module.get_parameter(self.parameter)

    def stored(self, expert: int) -> Tensor:
        """One expert's slice as it is stored, a view."""
        return self.stack.detach()[expert]

    def oriented(self, tensor: Tensor) -> Tensor:
        """See `Experts`."""
        return tensor.transpose(-1, -2) if self.transposed else tensor

    # --- calls --------------------------------------------------------------------------------------------------------

    def pairs(self, call: Call) -> Pairs:
        """See `Experts`."""
        hidden, index, gates = _parts(call)
        if index is None:  # every expert gets all tokens, times gates that are zero for those that did not choose it
            tokens = len(hidden) // self.count
            row = hidden.detach().any(1).nonzero().squeeze(1)
            return Pairs(hidden[row], row % tokens, row, row // tokens, hidden.new_ones(len(row)))
        assert gates is not None
        chosen = index.flatten()
        flat = (chosen < self.count).nonzero().squeeze(1)  # others are not on this machine, or padding
        token = flat // index.shape[1]
        gate = gates.flatten() if gates.shape == index.shape else gates.gather(1, index).flatten()
        return Pairs(hidden[token], token, token, chosen[flat], gate[flat])

    def tokens(self, call: Call) -> int:
        """See `Experts`."""
        hidden, index, _ = _parts(call)
        return len(hidden) // self.count if index is None else len(hidden)

    def ask(self, call: Call, hidden: Tensor, expert: Tensor) -> Tensor:
        """See `Experts`."""
        if not len(hidden):
            return hidden.new_zeros(0, self.width)
        found = []
        for part in range(0, len(hidden), ASKED):
            some, whose = hidden[part : part + ASKED], expert[part : part + ASKED]
            chunks = [
                self._run(call, some, whose, {self.parameter: self._handing_on(some, first), **self._silence(some)})
                for first in range(0, self.width, self.d_out)
            ]
            found.append(torch.cat(chunks, 1)[:, : self.width])
        return torch.cat(found)

    def add(self, output: Tensor, pairs: Pairs, change: Tensor) -> Tensor:
        """The module's output with `change` (P, d_out), what the experts themselves put out more, gated and added."""
        gated = pairs.gate.unsqueeze(1).to(change) * change
        return output.index_add(0, pairs.row, gated.to(output))

    def summed(self, call: Call, output: Tensor) -> Tensor:
        """See `Experts`; a token's output may come in parts."""
        return output.view(-1, self.tokens(call), output.shape[-1]).sum(0)

    def plus(self, call: Call, output: Tensor, change: Tensor) -> Tensor:
        """See `Experts`."""
        count = self.tokens(call)
        if len(output) == count:
            return output + change.to(output)
        return torch.cat([output[:count] + change.to(output), output[count:]])

    def _run(self, call: Call, hidden: Tensor, expert: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """What the experts (P,) put out for `hidden` (P, hidden), without gates, by other parameters."""
        if _parts(call)[1] is not None:
            ones = hidden.new_ones(len(hidden), 1)
            return _called(self.module, _like(call, hidden, expert.unsqueeze(1), ones), parameters)
        sizes = expert.bincount(minlength=self.count)
        most = int(sizes.max())
        order = expert.argsort(stable=True)
        first = (sizes.cumsum(0) - sizes)[expert[order]]
        place = expert[order] * most + torch.arange(len(order), device=expert.device) - first
        row = torch.empty_like(place).index_copy(0, order, place)
        filled = hidden.new_zeros(self.count * most, hidden.shape[1]).index_copy(0, row, hidden)
        return _called(self.module, _like(call, filled, None, None), parameters)[row]

    def _handing_on(self, like: Tensor, first: int) -> Tensor:
        matrix = _selector(self.d_out, self.width, first, like.dtype, like.device)
        return self.oriented(matrix).expand(self.stack.shape)

    def _silence(self, like: Tensor) -> dict[str, Tensor]:
        return {name: like.new_zeros(1, 1).expand(self.count, self.d_out) for name in self.silenced}


@lru_cache(maxsize=8)
def _selector(d_out: int, width: int, first: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(d_out, width), whose output i is entry first + i of the input, or 0 where that is beyond the width."""
    with torch.inference_mode(False):
        matrix = torch.zeros(d_out, width, dtype=dtype, device=device)
        matrix.diagonal(first).fill_(1)
    return matrix


# --- reading a call ---------------------------------------------------------------------------------------------------


def _parts(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the experts read (tokens, hidden), and where tokens choose inside the module, the experts' numbers
    (tokens, k) and gates, (tokens, k) or (tokens, E)."""
    tensors = [each for each in (*call[0], *call[1].values()) if isinstance(each, Tensor)]
    numbers = [each for each in tensors if each.is_floating_point()]
    index = next((each for each in tensors if not each.is_floating_point()), None)
    return numbers[0], index, numbers[1] if index is not None and len(numbers) > 1 else None


def _like(call: Call, hidden: Tensor, index: Tensor | None, gates: Tensor | None) -> Call:
    """The call with other tensors in the places of its own."""
    instead = {id(old): new for old, new in zip(_parts(call), (hidden, index, gates), strict=True) if old is not None}
    args = tuple(instead.get(id(each), each) for each in call[0])
    return args, {name: instead.get(id(each), each) for name, each in call[1].items()}


def _called(module: nn.Module, call: Call, parameters: Mapping[str, Tensor]) -> Tensor:
    """The module's output with some of its parameters replaced, by a twin that nobody else runs. It computes expert by
    expert: other ways of computing would copy what is replaced for every token."""
    twin = twin_of(module)
    for name, tensor in parameters.items():
        twin._parameters.pop(name)
        twin.__dict__[name] = tensor  # a view will do, which is no parameter
    config: Any = twin.__dict__.get("config")
    if hasattr(config, "_experts_implementation_internal"):
        twin.__dict__["config"] = plain = copy(config)
        plain._experts_implementation_internal = "eager"
    output: Tensor = twin(*call[0], **call[1])
    return output


# --- finding ----------------------------------------------------------------------------------------------------------


def stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that are stacks of matrices."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return {}
    return {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}


@torch.no_grad()
def find_stacked(name: str, module: nn.Module, call: Call, refuse: Callable[[str], InputError]) -> StackedExperts:
    """What `module`, called as in `call` by a pass of the model, is made of.

    The output projection is the parameter of which a change in one row, or column if it lies transposed, changes one
    entry of the output alone. That W x is what the module puts out is verified on the call.

    Raises:
        InputError: it is made otherwise; `refuse` gives it, told what was found.
    """
    hidden, index, gates = _parts(call)
    if hidden.ndim != 2 or (index is not None and (gates is None or index.ndim != 2)):
        raise refuse(f"{type(module).__name__}, called in a way that is not known")
    before = _called(module, call, {})
    found = [(each, axis) for each in stacks(module) for axis in (1, 2) if _is_output(module, call, each, axis, before)]
    if len(found) != 1:
        raise refuse(f"{type(module).__name__} with {len(found)} output projections in one parameter")
    parameter, axis = found[0]
    stack = module.get_parameter(parameter)
    bare = StackedExperts(
        name, module, len(stack), stack.shape[3 - axis], stack.shape[axis], parameter=parameter, transposed=axis == 2
    )
    experts = _without_biases(bare, call, refuse)
    biases = _called(module, call, {parameter: torch.zeros_like(stack[:1, :1, :1]).expand(stack.shape)})
    if not explained(experts, call, experts.summed(call, before - biases)) <= tolerance(before.dtype):
        raise refuse(f"{type(module).__name__}, whose output is not the gated sum of its experts'")
    return experts


def _is_output(module: nn.Module, call: Call, parameter: str, axis: int, before: Tensor) -> bool:
    stack = module.get_parameter(parameter).detach()
    changed = stack.clone()
    changed.select(axis, 0).add_(stack.float().std().to(stack.dtype))
    moved = (_called(module, call, {parameter: changed}) - before).abs().float().amax(0)  # (d_out,)
    return bool(moved[0] > 0 and moved[1:].max() <= 1e-3 * moved[0])


def _without_biases(experts: StackedExperts, call: Call, refuse: Callable[[str], InputError]) -> StackedExperts:
    """With the names of the biases that have to be silenced for W = 0 to put out nothing."""
    module, stack = experts.module, experts.stack
    zero = {experts.parameter: stack.new_zeros(1, 1, 1).expand(stack.shape)}
    if not _called(module, call, zero).any():
        return experts
    shape = (experts.count, experts.d_out)
    biases = [name for name, each in module.named_parameters(recurse=False) if each.shape == shape]
    silent = {name: stack.new_zeros(1, 1).expand(shape) for name in biases}
    chosen = [name for name in biases if not _called(module, call, {**zero, name: silent[name]}).any()]
    if len(chosen) != 1:
        raise refuse(f"{type(module).__name__}, which adds to its experts' outputs in a way that is not known")
    return replace(experts, silenced=tuple(chosen))
