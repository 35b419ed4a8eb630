"""A patch as LoRA factors: B A = W' - W for each module it changes, cut to a rank or exact up to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.export.job import ExportedWeight, Job
from patchkit.maths.linalg import Delta
from patchkit.model.expert_names import ExpertPlace
from patchkit.model.weights import shape_of


@dataclass(frozen=True)
class Stack:
    """Low-rank changes of some of a layer's experts, by their numbers; `place` is that of one of them."""

    place: ExpertPlace
    deltas: Mapping[int, Delta]

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (E, rank, d_in) and B (E, d_out, rank), zeros where nothing changes."""
        like = next(iter(self.deltas.values()))
        a = like.right.new_zeros(self.place.count, rank, like.right.shape[1])
        b = like.left.new_zeros(self.place.count, like.left.shape[0], rank)
        for expert, delta in self.deltas.items():
            a[expert, : delta.rank], b[expert, :, : delta.rank] = delta.right, delta.left
        return a, b


@dataclass(frozen=True)
class LoraFactors:
    """Low-rank changes by module name.

    Attributes:
        deltas: left B (d_out, r) and right A (r, d_in) of every changed module, in the export's dtype.
        zeros: modules of other layers that are written with a change of nothing.
        weights: what the factors keep of each update.
        stacks: changes of experts, by the name of the parameter that they are slices of.
    """

    deltas: Mapping[str, Delta]
    zeros: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]
    weights: tuple[ExportedWeight, ...]
    dtype: torch.dtype
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The one that every module is written with: of the runtimes, most know one rank for all."""
        of_experts = [delta.rank for stack in self.stacks.values() for delta in stack.deltas.values()]
        return max([1, *(delta.rank for delta in self.deltas.values()), *of_experts])

    def padded(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Module name, A (rank, d_in) and B (d_out, rank), where zeros fill up lower ranks."""
        for module, delta in self.deltas.items():
            missing = self.rank - delta.rank
            yield module, F.pad(delta.right, (0, 0, 0, missing)), F.pad(delta.left, (0, missing))
        for module in self.zeros:
            d_out, d_in = self.shapes[module]
            yield (
                module,
                torch.zeros(self.rank, d_in, dtype=self.dtype),
                torch.zeros(d_out, self.rank, dtype=self.dtype),
            )


def lora_factors(job: Job, *, all_layers: bool) -> LoraFactors:
    """The patch's updates as factors of `job.options.rank` at most, in the job's dtype.

    all_layers: also name what the touched modules are in the other layers.

    Raises:
        InputError: as `Job.delta`.
    """
    deltas, weights = {}, []
    for weight, module in job.modules.items():
        wanted = job.delta(weight)
        deltas[module] = low_rank(wanted, job.options.rank).to(job.dtype)
        error = relative_error(deltas[module], wanted)
        weights.append(ExportedWeight(weight=weight, module=module, rank=deltas[module].rank, error=error))
    experts, places = dict[str, dict[int, Delta]](), dict[str, ExpertPlace]()
    for weight, place in job.experts.items():
        wanted = job.delta(weight)
        made = low_rank(wanted, job.options.rank).to(job.dtype)
        experts.setdefault(place.stack, {})[place.expert] = made
        places.setdefault(place.stack, place)
        error = relative_error(made, wanted)
        weights.append(ExportedWeight(weight=weight, module=place.module, rank=made.rank, error=error))
    zeros = untouched(job.tree, deltas) if all_layers else {}
    stacks = {name: Stack(places[name], parts) for name, parts in experts.items()}
    return LoraFactors(deltas, tuple(zeros), zeros, tuple(weights), job.dtype, stacks)


def low_rank(delta: Delta, rank: int | None = None) -> Delta:
    """The best approximation of `delta` of at most `rank`, in float64, with factors of equal norms.

    left = Q₁R₁ and right' = Q₂R₂ turn the SVD of the (d_out, d_in) matrix into that of R₁R₂' (r, r), which is optimal
    by Eckart and Young. Without `rank`, only singular values below float32's rounding are dropped.
    """
    q_left, r_left = torch.linalg.qr(delta.left.double())  # (d_out, r), (r, r)
    q_right, r_right = torch.linalg.qr(delta.right.double().T)  # (d_in, r), (r, r)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T)
    kept = int((values > values[:1] * torch.finfo(torch.float32).eps).sum())
    kept = kept if rank is None else min(kept, rank)
    root = values[:kept].sqrt()
    left = q_left @ (u[:, :kept] * root)  # (d_out, kept)
    return Delta(left, (root[:, None] * vt[:kept]) @ q_right.T)


def relative_error(made: Delta, wanted: Delta) -> float:
    """‖made - wanted‖/‖wanted‖ (Frobenius)."""
    difference = Delta.stack([wanted.to(torch.float64), Delta(-made.left, made.right).to(torch.float64)])
    norm = _norm(wanted)
    return _norm(difference) / norm if norm else 0.0


def _norm(delta: Delta) -> float:
    # `Delta.norm` takes squares, among which a difference of 1e-8 drowns.
    (_, left), (_, right) = torch.linalg.qr(delta.left.double()), torch.linalg.qr(delta.right.double().T)
    return float((left @ right.T).norm())


def untouched(tree: nn.Module, touched: Mapping[str, Delta]) -> dict[str, tuple[int, int]]:
    """Shapes (d_out, d_in) of the modules that are in the other layers what the touched ones are in theirs."""
    found: dict[str, tuple[int, int]] = {}
    for module in touched:
        before, layers, after = around_layer(tree, module)
        for name in (f"{before}.{index}.{after}" for index in range(layers)):
            if name not in touched:
                shape = shape_of(tree.get_submodule(name))
                assert shape is not None
                found[name] = shape
    return found


def around_layer(tree: nn.Module, module: str) -> tuple[str, int, str]:
    """The longest list of layers on the way to a module: its name, its length, and the module's name in the layer."""
    parts = module.split(".")
    ways = [(".".join(parts[:i]), ".".join(parts[i + 1 :])) for i in range(1, len(parts) - 1)]
    lists = [
        (before, len(layers), after)
        for before, after in ways
        if isinstance(layers := tree.get_submodule(before), nn.ModuleList)
    ]
    return max(lists, key=lambda found: found[1])
