"""Patches merged into a GGUF file: a copy in which only the touched tensors' bytes are others, each in its own type.

A 4-bit type rounds away most of a small change, which is measured on the file that was written and said; an adapter
(`patchkit export --format gguf`) keeps all of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.export.gguf_names import architecture, in_gguf_order, library, stack_name, tensor_name
from patchkit.export.job import Job
from patchkit.io.files import write_atomically
from patchkit.io.records import FrozenRecord
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import additive, delta_of
from patchkit.model.reference import is_gguf
from patchkit.patch.bases import base_to_load, public_name
from patchkit.patch.manifest import Manifest
from patchkit.patch.patch import Patch
from patchkit.patch.together import refuse_shared_neurons
from patchkit.version import patchkit_version

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Those that the gguf package can write; K-quants it only reads."""


class GgufTensor(FrozenRecord):
    """What is left of the change of one tensor, of the type `kind`.

    unchanged: share of its entries that are the base's. error: ‖W'_stored - W'‖/‖W' - W‖ (Frobenius), read back from
    the file.
    """

    weight: str
    tensor: str
    kind: str
    unchanged: float
    error: float


class GgufMerged(FrozenRecord):
    """<file>.patchkit.json, beside a merged GGUF file."""

    format_version: int = 1
    action: Literal["merge"] = "merge"
    format: Literal["gguf"] = "gguf"
    base: str
    parents: tuple[Manifest, ...]
    tensors: tuple[GgufTensor, ...]
    patchkit: str


def merge_gguf(
    patches: Sequence[Patch], file: str | Path, out: str | Path, say: Callable[[str], None] = lambda line: None
) -> GgufMerged:
    """Write the GGUF file `file` with `patches` merged into it, in the order given, to the file `out`.

    It is known for the patches' base by architecture, names and shapes only: GGUF keeps few models' exact numbers.

    Raises:
        InputError: another model's file, a type that cannot be written, an `out` that exists, or two patches that have
            rewritten the same neuron.
    """
    refuse_shared_neurons({f"{place}": patch.manifest for place, patch in enumerate(patches, 1)})
    source, target = Path(file), Path(out)
    if target.exists():
        raise InputError(f"{target}: exists; choose another name for the merged file")
    reader = _reader(source)
    deltas = _deltas(patches, reader, source)
    found: list[GgufTensor] = []

    def write(copy: Path) -> None:
        shutil.copyfile(source, copy)
        found.extend(_merge_tensor(weight, tensor, delta, copy) for weight, (tensor, delta) in deltas.items())

    write_atomically(target, write)
    merged = GgufMerged(
        base=public_name(str(source)),
        parents=tuple(patch.manifest for patch in patches),
        tensors=tuple(found),
        patchkit=patchkit_version(),
    )
    merged.write(target.with_name(f"{target.name}.patchkit.json"))
    say(f"{source}: taken for {patches[0].manifest.base.name} by architecture, names and shapes, not by its numbers")
    return merged


def _reader(file: Path) -> Any:
    try:
        if not file.is_file():
            raise ValueError("no plain file")
        return library().GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise InputError(f"{file}: cannot be read as GGUF: {error}") from None


@dataclass(frozen=True)
class ExpertsChange:
    """What is added to the weights (count, d_out, d_in) of a layer's experts, by their numbers."""

    count: int
    deltas: dict[int, Delta]

    def dense(self) -> Tensor:
        """All of it, (count, d_out, d_in)."""
        like = next(iter(self.deltas.values())).dense()
        whole = like.new_zeros(self.count, *like.shape)
        for expert, delta in self.deltas.items():
            whole[expert] = delta.dense()
        return whole


Change = Delta | ExpertsChange


def _deltas(patches: Sequence[Patch], reader: Any, file: Path) -> dict[str, tuple[Any, Change]]:
    """By on-disk name of each weight its tensor in the file, and what the patches add to it, as its rows lie there; the
    experts of a layer are one tensor, under their name in the model."""
    there = {tensor.name: tensor for tensor in reader.tensors}
    field = reader.get_field("general.architecture")
    deltas: dict[str, tuple[Any, Change]] = {}
    for patch in patches:
        name = patch.manifest.base.name
        job = Job(patch, str(file) if is_gguf(name) else base_to_load(name), "")
        config, arch = job.tree.config, architecture(job.tree.config)
        if field is None or field.contents() != arch:
            raise InputError(f"{file}: holds no {arch} model, for which the patch is; give the GGUF file of its base")
        layers = config.get_text_config().num_hidden_layers
        for weight, module in job.modules.items():
            name = tensor_name(arch, layers, module)
            tensor = _checked(there, name, patch.shapes[weight], file)
            delta = _delta(patch, weight, tensor, partial(_ordered, arch, name, config))
            before = deltas[weight][1] if weight in deltas else None
            earlier = [before] if isinstance(before, Delta) else []
            deltas[weight] = tensor, Delta.stack([*earlier, delta])
        _add_experts(deltas, job, there, file, partial(stack_name, arch, layers, job.tree))
    return deltas


def _add_experts(
    deltas: dict[str, tuple[Any, Change]],
    job: Job,
    there: Mapping[str, Any],
    file: Path,
    named: Callable[[str, int], str],
) -> None:
    """Add what a patch changes of layers' experts, each layer's being one tensor."""
    for weight, place in job.experts.items():
        shape = job.patch.shapes[weight]
        tensor = _checked(there, named(place.stack, place.count), (place.count, *shape), file)
        numbers = partial(_numbers, tensor.data, tensor.tensor_type)
        own = delta_of(job.patch.updates[weight], lambda numbers=numbers, at=place.expert: numbers()[at])  # type: ignore[misc]
        whole = deltas.setdefault(place.stack, (tensor, ExpertsChange(place.count, {})))[1]
        assert isinstance(whole, ExpertsChange)
        earlier = [whole.deltas[place.expert]] if place.expert in whole.deltas else []
        whole.deltas[place.expert] = Delta.stack([*earlier, own.to(torch.float64)])


def _ordered(arch: str, name: str, config: Any, rows: Tensor) -> Tensor:
    return in_gguf_order(arch, name, rows, config)


def _checked(there: Mapping[str, Any], name: str, shape: tuple[int, ...], file: Path) -> Any:
    tensor = there.get(name)
    if tensor is None or tuple(int(n) for n in reversed(tensor.shape)) != shape:
        found = "not there" if tensor is None else f"{tuple(int(n) for n in reversed(tensor.shape))}"
        raise InputError(f"{file}: {name} is {found}, the patch is for {shape}; give the GGUF file of its base")
    if tensor.tensor_type.name not in TYPES:
        raise InputError(
            f"{file}: {name} is stored as {tensor.tensor_type.name}, which is only read here, not written; export the "
            "patch with --format gguf, which leaves the file as it is, or merge into a Q8_0 or F16 one"
        )
    return tensor


def _delta(patch: Patch, weight: str, tensor: Any, ordered: Callable[[Tensor], Tensor]) -> Delta:
    chain = patch.updates[weight]
    rows = torch.arange(patch.shapes[weight][0])[:, None]
    if not additive(chain) and not torch.equal(ordered(rows), rows):
        raise InputError(
            f"{weight}: a rotation, of a weight whose rows lie in another order in GGUF; export it to peft"
        )
    delta = delta_of(chain, lambda: _numbers(tensor.data, tensor.tensor_type))
    return Delta(ordered(delta.left.double()), delta.right.double())


def _numbers(data: Any, kind: Any) -> Tensor:
    """A tensor (d_out, d_in) as float32."""
    return torch.from_numpy(library().quants.dequantize(data, kind).copy()).float()


def _merge_tensor(weight: str, tensor: Any, delta: Change, copy: Path) -> GgufTensor:
    """Write W + Δ over a tensor in the copied file, and read back what came of it."""
    before = _numbers(tensor.data, tensor.tensor_type)
    change = delta.dense()  # (d_out, d_in), float64
    packed = library().quants.quantize((before.double() + change).float().numpy(), tensor.tensor_type)
    with copy.open("r+b") as out:
        out.seek(int(tensor.data_offset))
        out.write(packed.tobytes())
    again = next(each for each in _reader(copy).tensors if each.name == tensor.name)
    after = _numbers(again.data, again.tensor_type)
    return GgufTensor(
        weight=weight,
        tensor=tensor.name,
        kind=tensor.tensor_type.name,
        unchanged=float((after == before).float().mean()),
        error=float((after.double() - before.double() - change).norm() / change.norm()),
    )
