"""The kinds of update a patch stores, how several of one weight are joined, and their sum as one delta.

An update maps a weight W (d_out, d_in) to W'. A weight's updates form a chain: a tuple of them, in the order in which
they act. Of whatever kinds, a chain comes down to one additive low-rank delta W' - W, which is how it runs and merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.maths.rotations import Rotation


@dataclass(frozen=True)
class Sparse:
    """W' = W + Σ u_i v_i' with sparse u_i and v_i: their nonzero entries, and a bitmap of where those are.

    left: the nonzero entries of all u_i, one vector after the other, in ascending order of their indices; left_at
    (r, ceil(d_out / 8)): the bitmap, the first entry in the highest bit of a byte. right, right_at: the same for the
    v_i and d_in. shape: (2,) = (d_out, d_in). Beside 32-bit numbers a bitmap is smaller than a list of indices if more
    than one entry in 32 is kept.
    """

    left_at: Tensor
    left: Tensor
    right_at: Tensor
    right: Tensor
    shape: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Sparse:
        """From dense vectors (d_out, r) and (d_in, r), whose zeros are left out."""
        shape = torch.tensor([len(left), len(right)], dtype=torch.int32)
        return cls(_bits(left.T != 0), left.T[left.T != 0], _bits(right.T != 0), right.T[right.T != 0], shape)

    @property
    def rank(self) -> int:
        """Number of vector pairs."""
        return len(self.left_at)

    def delta(self, weight: Tensor | None = None) -> Delta:
        """The same change with dense vectors."""
        d_out, d_in = self.shape.tolist()
        left, right = _dense(self.left, self.left_at, d_out), _dense(self.right, self.right_at, d_in)
        return Delta(left.T, right)

    def then(self, after: Sparse) -> Sparse:
        """Both changes."""
        return Sparse(
            torch.cat([self.left_at, after.left_at]),
            torch.cat([self.left, after.left]),
            torch.cat([self.right_at, after.right_at]),
            torch.cat([self.right, after.right]),
            self.shape,
        )


def _bits(flags: Tensor) -> Tensor:
    """Flags (r, d) as bytes (r, ceil(d / 8)), the first flag in the highest bit."""
    eights = F.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))  # (r, bytes, 8)
    packed: Tensor = (eights * _values(flags)).sum(-1).to(torch.uint8)
    return packed


def _dense(numbers: Tensor, places: Tensor, width: int) -> Tensor:
    """The numbers at the places whose bits are set, zeros elsewhere, (r, width)."""
    where = (places.unsqueeze(-1) & _values(places)).bool().flatten(1)[:, :width]
    return numbers.new_zeros(where.shape).masked_scatter_(where, numbers)


def _values(like: Tensor) -> Tensor:
    """Values of a byte's bits, (8,), the highest first."""
    return torch.tensor([1 << bit for bit in range(7, -1, -1)], dtype=torch.uint8, device=like.device)


@dataclass(frozen=True)
class Full:
    """W' = W + matrix, (d_out, d_in): for methods whose change has no structure that would make it smaller."""

    matrix: Tensor

    @property
    def rank(self) -> int:
        """The highest that a matrix of this shape can have."""
        return min(self.matrix.shape)

    def delta(self, weight: Tensor | None = None) -> Delta:
        """The same change as a product, with the identity on the shorter side."""
        d_out, d_in = self.matrix.shape
        eye = torch.eye(self.rank, dtype=self.matrix.dtype, device=self.matrix.device)
        return Delta(eye, self.matrix) if d_out <= d_in else Delta(self.matrix, eye)

    def then(self, after: Full) -> Full:
        """Their sum."""
        return Full(self.matrix + after.matrix)


Update: TypeAlias = Delta | Sparse | Full | Rotation
Chain: TypeAlias = tuple[Update, ...]

KINDS: dict[str, type[Delta] | type[Sparse] | type[Full] | type[Rotation]] = {
    "delta": Delta,
    "sparse": Sparse,
    "full": Full,
    "rotation": Rotation,
}


def kind_of(update: Update) -> str:
    """Its name in a manifest."""
    return next(name for name, kind in KINDS.items() if isinstance(update, kind))


def tensors_of(update: Update) -> dict[str, Tensor]:
    """Its tensors by field name, as a patch stores them."""
    return {f.name: getattr(update, f.name) for f in fields(update) if isinstance(getattr(update, f.name), Tensor)}


def mapped(update: Update, function: Callable[[Tensor], Tensor]) -> Update:
    """With `function` applied to each of its tensors of real numbers."""
    tensors = tensors_of(update).items()
    new: dict[str, Any] = {name: function(tensor) for name, tensor in tensors if tensor.is_floating_point()}
    return replace(update, **new)


def moved(update: Update, device: torch.device | str) -> Update:
    """With all of its tensors on `device`."""
    placed: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors_of(update).items()}
    return replace(update, **placed)


def folded(updates: Iterable[Update]) -> Chain:
    """The same change in as few updates as there are runs of one kind."""
    chain: list[Update] = []
    deltas: list[Delta] = []
    for update in updates:
        if isinstance(update, Delta):
            deltas.append(update)
            continue
        if deltas:
            chain.append(Delta.stack(deltas))
            deltas = []
        joined = _joined(chain[-1], update) if chain else None
        if joined is None:
            chain.append(update)
        else:
            chain[-1] = joined
    return (*chain, Delta.stack(deltas)) if deltas else tuple(chain)


def _joined(first: Update, after: Update) -> Update | None:
    """Both as one update, if they are of a kind that can be."""
    if isinstance(first, Rotation) and isinstance(after, Rotation):
        return first.then(after) if first.side == after.side else None
    if isinstance(first, Full) and isinstance(after, Full):
        return first.then(after)
    if isinstance(first, Sparse) and isinstance(after, Sparse):
        return first.then(after)
    return None


def additive(chain: Sequence[Update]) -> bool:
    """Whether the chain adds the same delta to any weight."""
    return not any(isinstance(update, Rotation) for update in chain)


def delta_of(chain: Sequence[Update], weight: Callable[[], Tensor]) -> Delta:
    """The chain as one low-rank delta: W' - W (d_out, d_in), in factors.

    Args:
        weight: gives W (d_out, d_in); called only if there is a rotation in the chain.
    """
    total: Delta | None = None
    base: Tensor | None = None
    for update in folded(chain):
        if isinstance(update, Rotation):
            base = weight() if base is None else base
            base = base.to(update.planes)
            turned = update.delta(base if total is None else base + total.dense())
            total = turned if total is None else Delta.stack([total, turned])
        else:
            added = update if isinstance(update, Delta) else update.delta()
            total = added if total is None else Delta.stack([total, added])
    assert total is not None, "an empty chain"
    return total
