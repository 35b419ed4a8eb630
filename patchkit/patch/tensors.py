"""The tensors of a patch's folder, read and checked against its manifest: names, shapes, ranks, counts, finiteness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchkit.errors import InputError
from patchkit.maths.linalg import Delta
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import KINDS, Chain, Full, Sparse, tensors_of
from patchkit.patch.manifest import EditedFact, Manifest, UpdateInfo
from patchkit.words import counted

UPDATES, STATE = "patch.safetensors", "state.safetensors"
_VALUES = ("targets", "start")
NORMS = ("row_norms", "column_norms")
"""What the state has of a weight that was quantized: those of its rows (d_out, 1) and of its columns (d_in, 1)."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        InputError: it is no safetensors file, or holds a number that is not finite.
    """
    if not file.is_file():  # opening a pipe would wait
        raise InputError(f"{file}: is missing, or no plain file; get it again")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{file}: its tensors cannot be read: {_line(error)}; get it again") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{file}: {key}: holds numbers that are not finite; get it again")
    return tensors


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def updates_in(manifest: Manifest, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Chain]:
    """The updates that a manifest lists, by on-disk name of their weights.

    Raises:
        InputError: they are not those of the manifest.
    """
    updates, known = dict[str, Chain](), set[str]()
    for info in manifest.updates:
        prefix, kind = f"{info.weight}.{info.place}.", KINDS[info.kind]
        names = [f.name for f in fields(kind) if f.name != "side"]
        parts: dict[str, Any] = {name: tensors[prefix + name] for name in names if prefix + name in tensors}
        if len(parts) < len(names) or not _fits(info, parts):
            raise InputError(f"{folder}: {UPDATES} is not the one in manifest.json; get the patch again")
        if kind is Rotation:
            parts["side"] = info.side
        update = kind(**parts)
        updates[info.weight] = (*updates.get(info.weight, ()), update)
        known |= {prefix + name for name in names}
    if tensors.keys() - known:
        raise InputError(f"{folder}: {UPDATES} is not the one in manifest.json; get the patch again")
    return updates


def _fits(info: UpdateInfo, parts: Mapping[str, Tensor]) -> bool:
    """Whether tensors make an update of this kind, rank and shape; `parts` has all that the kind needs."""
    d_out, d_in = info.shape
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    real = all(tensor.is_floating_point() for name, tensor in parts.items() if not name.endswith(("_at", "shape")))
    if not real:
        return False
    kind = KINDS[info.kind]
    if kind is Delta:
        return shapes == {"left": (d_out, info.rank), "right": (info.rank, d_in)}
    if kind is Full:
        return shapes == {"matrix": (d_out, d_in)}
    if kind is Rotation:
        size = d_out if info.side == "left" else d_in
        pairs, odd = divmod(info.rank, 2)
        return not odd and info.rank <= size and shapes == {"planes": (size, info.rank), "angles": (pairs,)}
    return kind is Sparse and _fits_sparse(info, parts)


def _fits_sparse(info: UpdateInfo, parts: Mapping[str, Tensor]) -> bool:
    shape = parts["shape"]
    if shape.is_floating_point() or tuple(shape.shape) != (2,) or tuple(shape.tolist()) != info.shape:
        return False
    for side, width in zip(("left", "right"), info.shape, strict=True):
        bits, numbers = parts[f"{side}_at"], parts[side]
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (info.rank, -(-width // 8)) or numbers.ndim != 1:
            return False
        counts = enumerate(torch.bincount(bits.flatten().int(), minlength=256).tolist())
        if sum(byte.bit_count() * count for byte, count in counts) != len(numbers):
            return False
    return True


def numbers_of(updates: Mapping[str, Chain]) -> dict[str, Tensor]:
    """The tensors of updates by their names in patch.safetensors."""
    return {
        f"{name}.{place}.{part}": tensor.contiguous()
        for name, chain in updates.items()
        for place, update in enumerate(chain)
        for part, tensor in tensors_of(update).items()
    }


def check_state(manifest: Manifest, state: Mapping[str, Tensor], folder: Path) -> None:
    """Raises InputError where the state cannot be that of the manifest's facts."""
    if fault := next(_faults(manifest, state), None):
        raise InputError(f"{folder}: {STATE} does not belong to manifest.json: {fault}; get the patch again")


def _faults(manifest: Manifest, state: Mapping[str, Tensor]) -> Iterator[str]:
    shapes = {info.weight: info.shape for info in manifest.updates}
    known = {f"values.{kind}" for kind in _VALUES} | {f"values.superseded.{kind}" for kind in _VALUES}
    for weight in _with_columns(manifest):
        known |= {f"{weight}{own}.{kind}" for own in ("", ".superseded") for kind in ("keys", "residuals")}
        known |= {f"{weight}.{kind}" for kind in NORMS}
    for name, tensor in state.items():
        if name not in known:
            yield f"{name} is of nothing in it"
        if tensor.ndim != 2 or not tensor.is_floating_point():
            yield f"{name} is no matrix"
        weight, _, kind = name.rpartition(".")
        sides = shapes.get(weight.removesuffix(".superseded"))
        experts = manifest.base.stacks.get(weight.removesuffix(".superseded"), 1)
        odd = kind == "keys" and tensor.shape[0] % experts
        if odd or (sides and tensor.shape[0] != sides[1 if kind in ("keys", "column_norms") else 0]):
            yield f"{name} has {tensor.shape[0]} rows"
        if kind in NORMS and tensor.shape[1] != 1:
            yield f"{name} has {tensor.shape[1]} columns"
    for group in ("values", *_with_columns(manifest)):
        for kind in _VALUES if group == "values" else ("keys", "residuals"):
            both = [state[name] for name in (f"{group}.{kind}", f"{group}.superseded.{kind}") if name in state]
            if len({len(tensor) for tensor in both}) > 1:
                yield f"{group}.{kind} and those of superseded facts have other rows"
    for own, facts in (("", manifest.facts), (".superseded", manifest.superseded)):
        yield from _wrong_counts(manifest, state, own, facts)


def _with_columns(manifest: Manifest) -> list[str]:
    """Names under which the state may have columns: of weights, and of those of a layer's experts together."""
    return [*manifest.base.weights, *manifest.base.stacks]


def _wrong_counts(
    manifest: Manifest, state: Mapping[str, Tensor], own: str, facts: tuple[EditedFact, ...]
) -> Iterator[str]:
    """Columns: one for each fact among the values, and at a weight as many as the facts of one layer have."""
    targets, start = (state.get(f"values{own}.{kind}") for kind in _VALUES)
    if targets is not None and start is not None and targets.shape != start.shape:
        yield f"values{own}.targets and start are of two sizes"
    for kind in _VALUES:
        values = state.get(f"values{own}.{kind}")
        if values is not None and values.shape[1] != len(facts):
            yield f"values{own}.{kind} has {counted(values.shape[1], 'column')} for {counted(len(facts), 'fact')}"
    counts = dict[int, int]()
    for fact in facts:
        run = manifest.history[fact.run]
        for layer in set(fact.layers or run.layers):
            counts[layer] = counts.get(layer, 0) + fact.columns * int(run.recipe.get("sweeps", 1))
    for weight in _with_columns(manifest):
        keys, residuals = (state.get(f"{weight}{own}.{kind}") for kind in ("keys", "residuals"))
        if keys is None or residuals is None:
            continue
        if keys.shape[1] != residuals.shape[1] or keys.shape[1] not in {0, *counts.values()}:
            yield f"{weight}{own}.keys has {keys.shape[1]} columns, and residuals {residuals.shape[1]}"


def check_rows(state: Mapping[str, Tensor], weight: str, d_out: int, d_in: int) -> None:
    """Raises InputError where columns of a weight's facts are not of the weight's size, as a model has it."""
    for kind, size in (("keys", d_in), ("residuals", d_out)):
        for name in (f"{weight}.{kind}", f"{weight}.superseded.{kind}"):
            if name in state and len(state[name]) != size:
                raise InputError(f"{STATE}: {name} has {len(state[name])} rows, the model {size}; get the patch again")


def columns(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of the state.

    Raises:
        InputError: it is not there.
    """
    if name not in state:
        raise InputError(f"{STATE}: {name} is missing, it does not belong to the patch's manifest; get the patch again")
    return state[name]
