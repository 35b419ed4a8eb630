"""LoRA as PEFT, vLLM and TGI load it: one uniform rank, alpha = rank, no patterns.

my-adapter/
  adapter_config.json        peft.LoraConfig
  adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, d_in) and .lora_B.weight (d_out, r); of a
                             layer's E experts (E·r, d_in) and (d_out, r·E), under `target_parameters`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from patchkit.export.formats import exporter
from patchkit.export.job import Exported, Job
from patchkit.export.lora import Stack, lora_factors
from patchkit.model.weights import is_transposed

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
LOADING = """from peft import PeftModel
from transformers import AutoModelForCausalLM

{load}
model = PeftModel.from_pretrained(model, "{title}")"""


def vllm_rank(rank: int) -> int | None:
    """The --max-lora-rank a vLLM server needs for an adapter of `rank`, None where no allowed one suffices."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def vllm(exported: Exported) -> Sequence[str]:
    """How vLLM serves it."""
    if any(".experts" in weight.module for weight in exported.weights):
        return ("# vLLM takes adapters of experts in another form: merge the patch, and serve the merged model",)
    if needed := vllm_rank(exported.rank):
        return (f"vllm serve {{base}} --enable-lora --max-lora-rank {needed} --lora-modules facts={{title}}",)
    return (f"# rank {exported.rank} is more than vLLM serves; `patchkit export --rank {VLLM_RANKS[-1]}` cuts it",)


@exporter(
    "peft",
    files=("adapter_model.safetensors", "adapter_config.json"),
    library="peft",
    commands=vllm,
    python=LOADING,
    takes=("rank", "all_layers"),
)
def peft(job: Job, into: Path) -> Exported:
    """A LoRA adapter for PEFT, vLLM and TGI."""
    factors = lora_factors(job, all_layers=job.options.all_layers)
    exported = job.exported("peft", factors.rank, factors.weights, factors.zeros)
    tensors = {}
    for module, a, b in factors.padded():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    for each in factors.stacks.values():
        a, b = _of_experts(job, each, factors.rank)
        tensors[f"base_model.model.{each.place.module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{each.place.module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, into / "adapter_model.safetensors", {"format": "pt"})
    write_config(into / "adapter_config.json", _config(job, exported))
    return exported


def _of_experts(job: Job, stack: Stack, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A (E·r, in), expert by expert, and lora_B (out, r·E), the experts of each rank beside one another, as PEFT's
    ParamWrapper has them. It takes a weight for (E, out, in) unless the module says that it lies transposed."""
    a, b = stack.padded(rank)  # (E, r, d_in), (E, d_out, r)
    if stack.place.transposed and not getattr(job.tree.get_submodule(stack.place.module), "is_transposed", False):
        a, b = b.mT, a.mT
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _config(job: Job, exported: Exported) -> Mapping[str, Any]:
    # Full module names: with suffixes, PEFT and vLLM would look for adapters in layers that have none.
    linear = [*job.modules.values(), *exported.zero_layers]
    # Beside experts a linear layer is a parameter, too: PEFT takes its name for the experts' in models that had them in
    # modules of their own before transformers 5.
    stacks = sorted({place.stack for place in job.experts.values()})
    parameters = [*stacks, *(f"{module}.weight" for module in linear)] if stacks else None
    config = LoraConfig(
        target_parameters=parameters,
        task_type="CAUSAL_LM",
        r=exported.rank,
        lora_alpha=exported.rank,
        lora_dropout=0.0,
        target_modules=[] if stacks else linear,
        fan_in_fan_out=any(is_transposed(job.tree.get_submodule(module)) for module in job.modules.values()),
        bias="none",
        inference_mode=True,
        base_model_name_or_path=job.base,
        revision=job.commit,
    )
    fields: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    return fields


def write_config(file: Path, fields: Mapping[str, Any]) -> None:
    """Write adapter_config.json, the same bytes at every run: PEFT keeps names in sets, which have no order."""
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    file.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")
