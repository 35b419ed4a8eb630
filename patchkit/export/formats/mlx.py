"""A LoRA adapter as mlx_lm loads it (`--adapter-path`): PEFT's factors transposed.

my-adapter/
  adapters.safetensors  <module>.lora_a (d_in, r) and .lora_b (r, d_out)
  adapter_config.json   rank, scale, how many layers counted from the last, and the modules' names in a layer

mlx_lm puts a LoRA of the same rank on every module named so in those layers, and then loads the tensors that it finds:
all layers are written, with zeros where the patch changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from patchkit.errors import InputError
from patchkit.export.formats import exporter
from patchkit.export.job import Exported, Job
from patchkit.export.lora import around_layer, lora_factors

_LAYERS = {
    "model.layers": "model.layers",
    "model.language_model.layers": "language_model.model.layers",
    "transformer.h": "model.h",
    "gpt_neox.layers": "model.h",
}
"""What mlx_lm calls the list of layers that transformers calls so; in a layer, names are the same."""


@exporter(
    "mlx",
    files=("adapters.safetensors", "adapter_config.json"),
    library="mlx",
    commands=lambda exported: ("mlx_lm.generate --model {base} --adapter-path {title} --prompt PROMPT",),
    dtypes=("float32", "float16", "bfloat16"),
)
def mlx(job: Job, into: Path) -> Exported:
    """A LoRA adapter for MLX on Apple silicon."""
    job.refuse_experts("mlx")
    factors = lora_factors(job, all_layers=True)
    tensors, keys, depth = {}, set[str](), 0
    for module, a, b in factors.padded():
        layers, depth, key = around_layer(job.tree, module)
        if layers not in _LAYERS or job.tree.config.model_type in ("gptj", "falcon"):
            raise InputError(f"{job.tree.config.model_type}: mlx_lm has no such model; export it to peft or gguf")
        name = module.replace(layers, _LAYERS[layers], 1)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a.T.contiguous(), b.T.contiguous()
        keys.add(key)
    save_file(tensors, into / "adapters.safetensors", {"format": "mlx"})
    config = {
        "fine_tune_type": "lora",
        "num_layers": depth,
        "lora_parameters": {"rank": factors.rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    text = json.dumps({"model": job.base, **config}, indent=2, sort_keys=True) + "\n"
    (into / "adapter_config.json").write_text(text, encoding="utf-8")
    return job.exported("mlx", factors.rank, factors.weights, factors.zeros)
