"""SHiRA (https://arxiv.org/abs/2406.13175) as PEFT loads it: the entries of a weight that change, and where they are.

my-adapter/
  adapter_config.json        peft.ShiraConfig
  adapter_model.safetensors  base_model.model.<module>.shira_weight (k,) and .shira_indices (2, k): row and column
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import torch
from peft import ShiraConfig
from safetensors.torch import save_file
from torch import Tensor

from patchkit.errors import InputError
from patchkit.export.formats import exporter
from patchkit.export.formats.peft import LOADING, write_config
from patchkit.export.job import Exported, ExportedWeight, Job
from patchkit.model.weights import is_transposed


@exporter(
    "shira",
    files=("adapter_model.safetensors", "adapter_config.json"),
    library="peft",
    commands=lambda exported: ("# PEFT alone loads it; the Python above is all there is",),
    python=LOADING,
    takes=(),
)
def shira(job: Job, into: Path) -> Exported:
    """A sparse high-rank adapter for PEFT: of a sparse patch, just the entries that change."""
    job.refuse_experts("shira")
    dense = {module: job.delta(weight).dense() for weight, module in job.modules.items()}
    rank = max(map(_rank_for, dense.values()))
    tensors, weights = dict[str, Tensor](), list[ExportedWeight]()
    for (weight, module), change in zip(job.modules.items(), dense.values(), strict=True):
        if is_transposed(job.tree.get_submodule(module)):
            raise InputError(f"{weight}: PEFT's SHiRA takes no Conv1D; export it to peft")
        if rank * sum(change.shape) > change.numel():
            share = float((change != 0).float().mean())
            raise InputError(f"{weight}: {share:.0%} of its entries change, too many for SHiRA; export it to peft")
        where = _places(change, rank * sum(change.shape))
        kept = change[where[0], where[1]].to(job.dtype)
        tensors[f"base_model.model.{module}.shira_weight"] = kept
        tensors[f"base_model.model.{module}.shira_indices"] = where.int().contiguous()
        weights.append(ExportedWeight(weight=weight, module=module, rank=rank, error=_error(change, where, kept)))
    save_file(tensors, into / "adapter_model.safetensors", {"format": "pt"})
    exported = job.exported("shira", rank, tuple(weights), ())
    write_config(into / "adapter_config.json", _config(job, exported))
    return exported


def _rank_for(change: Tensor) -> int:
    """PEFT keeps r (d_out + d_in) entries of every weight; the smallest r that has room for all that change."""
    return max(1, ceil(int((change != 0).sum()) / sum(change.shape)))


def _places(change: Tensor, count: int) -> Tensor:
    """Row and column (2, count) of every entry that changes, and of as many others as there is room for."""
    order = (change.flatten() != 0).int().argsort(descending=True, stable=True)[:count].sort().values
    return torch.stack([order // change.shape[1], order % change.shape[1]])


def _error(change: Tensor, where: Tensor, kept: Tensor) -> float:
    return float((change[where[0], where[1]] - kept.to(change.dtype)).norm() / change.norm())


def _config(job: Job, exported: Exported) -> dict[str, Any]:
    config = ShiraConfig(
        task_type="CAUSAL_LM",
        r=exported.rank,
        random_seed=0,  # of the mask that is made at loading and then replaced by the stored one
        target_modules=[weight.module for weight in exported.weights],
        inference_mode=True,
        base_model_name_or_path=job.base,
        revision=job.commit,
    )
    fields: dict[str, Any] = config.to_dict()
    return fields
