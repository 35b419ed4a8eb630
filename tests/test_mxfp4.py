"""gpt-oss as it is published, its experts packed in MXFP4: edited where the loader unpacks them, refused otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GptOssForCausalLM

import patchkit
from patchkit import Patch
from patchkit.errors import InputError
from patchkit.export.merge import merge
from patchkit.model.arch import inspect_model
from patchkit.model.loading import ModelChoice
from tests import zoo

ROME = {"id": "rome", "prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
UNPACKED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def packed(folder: Path) -> Path:
    """A tiny checkpoint with the tensors of the published ones: blocks of 32 numbers in 16 bytes, and scales."""
    config = zoo.MIXTURES["gpt_oss"]().config
    config.intermediate_size = 64
    zoo.save(GptOssForCausalLM(config), zoo.tiny_tokenizer(), folder)
    weights, draws = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = weights.pop(name).shape
        shape = (experts, out, width // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draws)
        weights[f"{name}_scales"] = torch.full(shape, 122, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": UNPACKED}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_experts_that_the_loader_unpacks_are_edited_and_cannot_be_merged_into_packed_files(tmp_path: Path) -> None:
    folder = packed(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("The city is old. It has a river. People came from far. They built a wall. " * 20)
    loaded = ModelChoice(str(folder), "cpu", "float32").load()
    assert {site.blocks for site in inspect_model(loaded.model).sites} == {4}
    settings = ("prompts=contexts", "layers=1-2", "contexts=1", "value.steps=3")
    made = patchkit.apply(loaded.model, loaded.tokenizer, [ROME], text=text, overrides=settings)
    made.save(tmp_path / "patch")
    patch, ids = Patch.load(tmp_path / "patch"), torch.arange(4, 16).view(1, 12)
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
        stack = patchkit.load(loaded.model, patch)
        assert not torch.equal(loaded.model(input_ids=ids).logits, before)
        stack.unload()
        assert torch.equal(loaded.model(input_ids=ids).logits, before)
    with pytest.raises(InputError, match="quantized with mxfp4; merge into the full-precision checkpoint"):
        merge([patch], folder, tmp_path / "merged")


def test_experts_that_stay_packed_are_refused() -> None:
    model = zoo.MIXTURES["gpt_oss"]()
    experts = model.model.layers[1].mlp.experts  # type: ignore[union-attr, index]
    del experts.down_proj
    blocks = torch.zeros(4, 32, 2, 16, dtype=torch.uint8)
    experts.down_proj_blocks = nn.Parameter(blocks, requires_grad=False)
    with pytest.raises(InputError, match=r"down_proj_blocks in torch\.uint8.*the weights are quantized"):
        inspect_model(model)
