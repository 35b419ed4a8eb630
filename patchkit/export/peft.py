"""A patch as a LoRA adapter that PEFT, vLLM, TGI and llama.cpp load: one uniform rank, alpha = rank, no patterns.

my-adapter/
  adapter_config.json        peft.LoraConfig
  adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, d_in) and .lora_B.weight (d_out, r)
  patchkit-manifest.json     Exported: the patch's manifest, and what the adapter keeps of each update
  README.md                  model card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn

from patchkit.errors import InputError
from patchkit.export.record import MANIFEST
from patchkit.io.checkpoint import find_checkpoint, stored_tensors
from patchkit.io.files import is_folder_with, is_free, write_folder
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import delta_of
from patchkit.model.loading import DTYPES
from patchkit.model.weights import find_module, find_weight, is_transposed, oriented, shape_of, skeleton
from patchkit.patch.card import Card
from patchkit.patch.manifest import Manifest
from patchkit.patch.patch import Patch
from patchkit.version import patchkit_version

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
_OWN_FILES = ("adapter_model.safetensors", "README.md", MANIFEST, "adapter_config.json")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ExportedWeight(_Record):
    """One update in the adapter. error: ‖BA - Δ‖/‖Δ‖ (Frobenius), from truncation and from rounding to the dtype."""

    weight: str
    module: str
    rank: int
    error: float


class Exported(_Record):
    """patchkit-manifest.json of an adapter. Every layer has this rank; zeros fill up lower ones."""

    format_version: int = 1
    action: Literal["export"] = "export"
    format: Literal["peft"] = "peft"
    rank: int
    dtype: str
    weights: tuple[ExportedWeight, ...]
    zero_layers: tuple[str, ...]
    parents: tuple[Manifest, ...]
    patchkit: str

    @property
    def vllm_rank(self) -> int | None:
        """The --max-lora-rank a vLLM server needs, None where no allowed one suffices."""
        return next((allowed for allowed in VLLM_RANKS if allowed >= self.rank), None)

    def card(self, title: str, **published: Any) -> str:
        """The adapter's README.md; `published` is what else `patchkit.patch.card.Card` should say."""
        worst = max((weight.error for weight in self.weights), default=0.0)
        details = (
            f"It is a LoRA of rank {self.rank} on {len(self.weights)} weights in {self.dtype}, and differs from the "
            f"patch by at most {worst:.2g} of each weight's change (Frobenius norm)."
        )
        card = Card(self.parents, title, "adapter", details=details, vllm_rank=self.vllm_rank)
        return replace(card, **published).markdown()


def export_peft(
    patch: Patch,
    out: str | Path,
    base: str | None = None,
    *,
    rank: int | None = None,
    all_layers: bool = False,
    dtype: str = "float32",
) -> Exported:
    """Write `patch` as a LoRA adapter to the folder `out`; exact up to rounding unless `rank` cuts it.

    An adapter that is there is replaced; other files in the folder stay.

    Args:
        base: folder or Hub name of the base, of which only config.json is read; by default the one the patch names.
        rank: at most this rank, by the best approximation there is of each update.
        all_layers: also write zeros for the layers the patch does not touch, for servers that want every layer.
        dtype: of the factors.

    Raises:
        InputError: the base's config.json is not at hand, it is another architecture, or `out` holds something else.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of: {', '.join(DTYPES)}")
    folder = Path(out)
    if not is_free(folder) and not is_folder_with(folder, "adapter_config.json"):
        raise InputError(f"--out {folder}: it exists and is not an adapter; choose another folder")
    name, commit = _base_of(patch.manifest, base)
    tree = skeleton(name, commit)  # says what PEFT calls the modules, which the checkpoint's names may not
    factors, weights = {}, []
    for weight, chain in patch.updates.items():
        module = _module_of(tree, weight, patch.shapes[weight])
        delta = delta_of(chain, partial(_weight_on_disk, name, commit, module, tree.get_submodule(module)))
        factors[module] = low_rank(delta, rank).to(DTYPES[dtype])
        error = _error(factors[module], delta)
        weights.append(ExportedWeight(weight=weight, module=module, rank=factors[module].rank, error=error))
    zeros = _untouched(tree, factors, DTYPES[dtype]) if all_layers else {}
    exported = Exported(
        rank=max([1, *(delta.rank for delta in factors.values())]),
        dtype=dtype,
        weights=tuple(weights),
        zero_layers=tuple(zeros),
        parents=(patch.manifest,),
        patchkit=patchkit_version(),
    )
    transposed = any(is_transposed(tree.get_submodule(module)) for module in factors)
    config = _lora_config(patch.manifest, exported, transposed, base)
    title = folder.absolute().name
    write_folder(folder, _OWN_FILES, lambda into: _write(into, exported, config, factors | zeros, title))
    return exported


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


def _error(made: Delta, wanted: Delta) -> float:
    difference = Delta.stack([wanted.to(torch.float64), Delta(-made.left, made.right).to(torch.float64)])
    norm = _norm(wanted)
    return _norm(difference) / norm if norm else 0.0


def _norm(delta: Delta) -> float:
    # `Delta.norm` takes squares, among which a difference of 1e-8 drowns.
    (_, left), (_, right) = torch.linalg.qr(delta.left.double()), torch.linalg.qr(delta.right.double().T)
    return float((left @ right.T).norm())


def _base_of(manifest: Manifest, base: str | None) -> tuple[str, str | None]:
    """Name and commit of the base: the patch's own unless `base` says otherwise."""
    name = base or manifest.base.name
    return name, manifest.base.commit if name == manifest.base.name else None


def _weight_on_disk(name: str, commit: str | None, module_name: str, module: nn.Module) -> Tensor:
    """W (d_out, d_in) from the base's files, which it takes to make a LoRA of a rotation."""
    folder = find_checkpoint(name, commit)
    stored = stored_tensors(folder)
    advice = "which a rotation needs; name the patch's base with --model"
    found = find_weight(f"{module_name}.weight", stored, str(folder), advice)
    return oriented(module, stored[found].read()).float()


def _module_of(tree: nn.Module, weight: str, shape: tuple[int, int]) -> str:
    name, module = find_module(tree, weight, "name the patch's own base with --model")
    if (there := shape_of(module)) != shape:
        raise InputError(f"{weight}: {there} in {type(tree).__name__}, {shape} in the patch; it is another model")
    return name


def _untouched(tree: nn.Module, touched: Mapping[str, Delta], dtype: torch.dtype) -> dict[str, Delta]:
    """Empty updates for the modules that are in the other layers what the touched ones are in theirs."""
    found: dict[str, Delta] = {}
    for module in touched:
        before, layers, after = _around_layer(tree, module)
        for name in (f"{before}.{index}.{after}" for index in range(layers)):
            if name not in touched:
                shape = shape_of(tree.get_submodule(name))
                assert shape is not None
                d_out, d_in = shape
                found[name] = Delta(torch.zeros(d_out, 0, dtype=dtype), torch.zeros(0, d_in, dtype=dtype))
    return found


def _around_layer(tree: nn.Module, module: str) -> tuple[str, int, str]:
    """The longest list of layers on the way to a module: its name, its length, and the module's name in the layer."""
    parts = module.split(".")
    ways = [(".".join(parts[:i]), ".".join(parts[i + 1 :])) for i in range(1, len(parts) - 1)]
    lists = [
        (before, len(layers), after)
        for before, after in ways
        if isinstance(layers := tree.get_submodule(before), nn.ModuleList)
    ]
    return max(lists, key=lambda found: found[1])


def _lora_config(manifest: Manifest, exported: Exported, transposed: bool, base: str | None) -> dict[str, Any]:
    # Full module names: with suffixes, PEFT and vLLM would look for adapters in layers that have none.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=exported.rank,
        lora_alpha=exported.rank,
        lora_dropout=0.0,
        target_modules=[*(weight.module for weight in exported.weights), *exported.zero_layers],
        fan_in_fan_out=transposed,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base or manifest.base.name,
        revision=manifest.base.commit if base in (None, manifest.base.name) else None,
    )
    fields: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    # PEFT keeps the names in a set, whose order would make the file another one at every run.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}


def _write(into: Path, exported: Exported, config: Mapping[str, Any], factors: Mapping[str, Delta], title: str) -> None:
    tensors = {}
    for module, delta in factors.items():
        missing = exported.rank - delta.rank
        tensors[f"base_model.model.{module}.lora_A.weight"] = F.pad(delta.right, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = F.pad(delta.left, (0, missing)).contiguous()
    save_file(tensors, into / "adapter_model.safetensors", {"format": "pt"})
    (into / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (into / MANIFEST).write_text(exported.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (into / "README.md").write_text(exported.card(title), encoding="utf-8")
