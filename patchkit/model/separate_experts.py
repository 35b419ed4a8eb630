"""The routed experts of a layer where each is a module of its own, in a list, as older checkpoints' code has them.

The module that has the list chooses experts for tokens, runs them on these, and adds up what they put out times its
gates, with a shared expert perhaps; how it does that is its own affair. What is asked of it is found by trying:

- *Gates.* It is run with output projections that put out a vector of their own each, whatever they read: what comes out
  for a token then has, in the entry that belongs to an expert, that expert's gate (`SeparateExperts.gates`).
- *Keys.* An expert is run by itself on what it reads, and its output projection's input is kept.

That Σ g W k is what comes out, beside what comes out where all experts put out nothing, is verified on a call of the
model; where it is not, as where an expert reads something else than the module does, the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patchkit.errors import InputError
from patchkit.model.experts import Call, Experts, Pairs, explained, tolerance
from patchkit.model.feed_forward import linear_widths, output_projections
from patchkit.model.twin import twin_of
from patchkit.model.weights import is_transposed, oriented, weight_of

MARK = 2.0**10
"""What an output projection puts out for its gate to be read: so much larger than what else the module adds that little
of the gate is lost in rounding, and within float16."""


@dataclass(frozen=True)
class SeparateExperts(Experts):
    """A module with a list of experts.

    Attributes:
        members: their names in the module.
        projection: the name of the output projection in each of them.
    """

    members: tuple[str, ...]
    projection: str

    # --- weights ------------------------------------------------------------------------------------------------------

    @property
    def weight_name(self) -> str:
        """The list's name and the projection's, as if there were one for all."""
        inside = self.members[0].rpartition(".")[0]
        return ".".join(part for part in (self.name, inside, self.projection) if part)

    def linear_name(self, expert: int) -> str:
        """Of an expert's output projection, in the model."""
        return f"{self.name}.{self.members[expert]}.{self.projection}"

    def linear(self, expert: int) -> nn.Module:
        """An expert's output projection."""
        return self.module.get_submodule(f"{self.members[expert]}.{self.projection}")

    def stored(self, expert: int) -> Tensor:
        """See `Experts`."""
        return weight_of(self.linear(expert)).detach()

    def oriented(self, tensor: Tensor) -> Tensor:
        """See `Experts`."""
        return oriented(self.linear(0), tensor)

    # --- calls --------------------------------------------------------------------------------------------------------

    def tokens(self, call: Call) -> int:
        """See `Experts`."""
        return len(_hidden(call))

    def pairs(self, call: Call) -> Pairs:
        """See `Experts`."""
        hidden, gates = _hidden(call), self.gates(call)
        token, expert = gates.detach().nonzero().unbind(1)
        return Pairs(hidden[token], token, token, expert, gates[token, expert])

    def gates(self, call: Call) -> Tensor:
        """(tokens, E), zero for the experts that a token did not choose."""
        silent = self.put_out(call, None)  # what else the module adds
        parts = []
        for first in range(0, self.count, self.d_out):
            marked = self.put_out(call, first) - silent
            parts.append(marked[:, : self.count - first] / MARK)
        return torch.cat(parts, 1)

    def put_out(self, call: Call, first: int | None) -> Tensor:
        """What the module puts out, (tokens, d_out), where the output projection of expert first + i has `MARK` in its
        entry i and nothing else, and without `first` all have nothing."""
        twin = twin_of(self.module)
        for expert, member in enumerate(self.members):
            entry = None if first is None or not 0 <= expert - first < self.d_out else expert - first
            twin.get_submodule(f"{member}.{self.projection}").__dict__["forward"] = partial(_mark, self.d_out, entry)
        return _rows(twin(*call[0], **call[1]))

    def ask(self, call: Call, hidden: Tensor, expert: Tensor) -> Tensor:
        """See `Experts`."""
        found = hidden.new_zeros(len(hidden), self.width)
        for number in expert.unique().tolist():
            at = (expert == number).nonzero().squeeze(1)
            found = found.index_copy(0, at, self._keys(number, hidden[at]).to(found))
        return found

    def _keys(self, expert: int, hidden: Tensor) -> Tensor:
        """What an expert's output projection reads, (n, width), where the expert reads `hidden` (n, hidden)."""
        seen: list[Tensor] = []

        def keep(keys: Tensor) -> Tensor:
            seen.append(keys)
            return _mark(self.d_out, None, keys)

        twin = twin_of(self.module.get_submodule(self.members[expert]))
        twin.get_submodule(self.projection).__dict__["forward"] = keep
        twin(hidden)
        return seen[0].flatten(0, -2)

    def summed(self, call: Call, output: Any) -> Tensor:
        """See `Experts`; with what a shared expert adds."""
        return _rows(output)

    def plus(self, call: Call, output: Any, change: Tensor) -> Any:
        """See `Experts`."""
        if not isinstance(output, Tensor):
            return (self.plus(call, output[0], change), *output[1:])
        return output + change.to(output).view_as(output)


def _hidden(call: Call) -> Tensor:
    """What the module reads, (tokens, hidden)."""
    given = (*call[0], *call[1].values())
    hidden = next(each for each in given if isinstance(each, Tensor) and each.is_floating_point())
    return hidden.flatten(0, -2)


def _rows(output: Any) -> Tensor:
    """A module's output (tokens, d_out), without what some return beside it."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor.flatten(0, -2)


def _mark(d_out: int, entry: int | None, keys: Tensor) -> Tensor:
    """(..., d_out), the same whatever the keys (..., width) are."""
    row = keys.new_zeros(d_out)
    if entry is not None:
        row[entry] = MARK
    return row.expand(*keys.shape[:-1], d_out)


# --- finding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertList:
    """A list of feed-forward blocks built alike: whose it is, as a name in the layer that was looked at, and the names
    of the modules there and of the output projection in each."""

    owner: str
    members: tuple[str, ...]
    projection: str


def expert_lists(parts: list[tuple[str, nn.Module]], hidden_size: int) -> list[ExpertList]:
    """Those among the named modules of a block. A list that is called itself is its own owner; else the module is that
    has it."""
    return list(_expert_lists(parts, hidden_size))


def _expert_lists(parts: list[tuple[str, nn.Module]], hidden_size: int) -> Iterator[ExpertList]:
    for name, module in parts:
        members = list(module.named_children()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
        built = [_built(member, hidden_size) for _, member in members]
        if len(built) < 2 or built[0] is None or any(each != built[0] for each in built):
            continue
        called = type(module).forward is not nn.Module.forward
        owner, own = (name, "") if called else (name.rpartition(".")[0], f"{name.rpartition('.')[2]}.")
        yield ExpertList(owner, tuple(f"{own}{number}" for number, _ in members), built[0][0])


def _built(member: nn.Module, hidden_size: int) -> tuple[str, object] | None:
    """The name of a feed-forward's output projection, and what all that are built alike have in common; None for what
    is no feed-forward."""
    widths = linear_widths(member.named_modules())
    outputs = output_projections(widths, hidden_size)
    return (outputs[0], (type(member), tuple(widths.items()))) if len(outputs) == 1 else None


@torch.no_grad()
def find_separate(
    name: str, module: nn.Module, found: ExpertList, call: Call, refuse: Callable[[str], InputError]
) -> SeparateExperts:
    """What `module`, called as in `call` by a pass of the model, makes of its list of experts.

    Raises:
        InputError: it is made otherwise; `refuse` gives it, told what was found.
    """
    first = module.get_submodule(f"{found.members[0]}.{found.projection}")
    d_out, width = oriented(first, weight_of(first)).shape
    experts = SeparateExperts(name, module, len(found.members), width, d_out, found.members, found.projection)
    linear = [experts.linear(expert) for expert in range(experts.count)]
    if len({id(weight_of(each)) for each in linear}) < experts.count:
        raise refuse(f"{type(module).__name__}, whose experts share weights")
    if len({is_transposed(each) for each in linear}) > 1:
        raise refuse(f"{type(module).__name__}, whose experts' weights lie in different ways")
    try:
        bare = _rows(twin_of(module)(*call[0], **call[1])) - experts.put_out(call, None)
        own = [getattr(each, "bias", None) for each in linear]
        biases = [bias for bias in own if isinstance(bias, Tensor)]
        bare = bare - experts.gates(call).to(bare) @ torch.stack(biases).to(bare) if biases else bare
        share = explained(experts, call, bare)
    except (TypeError, IndexError, StopIteration, RuntimeError, AttributeError) as error:
        raise refuse(f"{type(module).__name__}, called in a way that is not known ({error})") from None
    if not share <= tolerance(bare.dtype):
        raise refuse(f"{type(module).__name__}, whose output is not the gated sum of its experts'")
    return experts
