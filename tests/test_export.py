"""Adapters written from patches, loaded with the real PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchkit import InputError, Patch
from patchkit.cli import cli
from patchkit.export.formats import export
from patchkit.export.formats.peft import vllm_rank
from patchkit.export.job import Options
from patchkit.export.lora import low_rank
from patchkit.maths.linalg import Delta
from tests import zoo
from tests.helpers import edited_fact, random_patch

RANKS = {1: 3, 2: 5}  # by layer: other ranks, and layers 0 and 3 untouched
METRICS = {
    "facts": 1,
    "efficacy": {"success": 1.0, "exact": 0.75, "generated": None},
    "generalization": {"success": 0.5, "exact": 0.5, "generated": None},
    "locality": {"success": None, "unchanged": 0.875},
    "perplexity": {"before": 10.0, "after": 10.1, "ratio": 1.01},
}


def make_patch(model: PreTrainedModel, name: str, seed: int = 0, facts: int = 2) -> Patch:
    """A measured patch of random updates for a loaded model."""
    told = [edited_fact(id=str(n), prompt=f"The {n}th | of", subject=f"{n}th", target_new="<b>") for n in range(facts)]
    return replace(random_patch(model, name, told, ranks=RANKS, seed=seed, metrics=METRICS), state={})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], tuple[PreTrainedModel, str]]:
    def make(family: str) -> tuple[PreTrainedModel, str]:
        folder = zoo.save(zoo.FAMILIES[family](), zoo.tiny_tokenizer(), tmp_path / family)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), str(folder)

    return make


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


def off_by(model: PreTrainedModel, patch: Patch, adapter: Path) -> float:
    """The largest difference between the logits with the adapter and with the patch, which must change them."""
    before = logits(model)
    with patch.attached(model):
        wanted = logits(model)
    assert (wanted - before).abs().max() > 0.1
    return float((logits(PeftModel.from_pretrained(model, adapter)) - wanted).abs().max())


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma3_vision", "opt", "falcon_old", "gpt_neox", "phi3", "qwen3_5_vision"]
)
def test_peft_gives_the_patched_logits(checkpoint, tmp_path: Path, family: str) -> None:
    model, name = checkpoint(family)
    patch = make_patch(model, name)
    exported = export(patch, tmp_path / "adapter")
    assert exported.rank == 5
    assert max(weight.error for weight in exported.weights) < 1e-6
    assert off_by(model, patch, tmp_path / "adapter") < 1e-4


def test_names_on_disk_that_are_not_those_of_the_tree(checkpoint, tmp_path: Path) -> None:
    _, name = checkpoint("gpt2")
    file = Path(name) / "model.safetensors"
    save_file({key.removeprefix("transformer."): t for key, t in load_file(file).items()}, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    patch = make_patch(model, name)
    assert "h.1.mlp.c_proj.weight" in patch.updates
    export(patch, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    assert config["target_modules"] == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    assert off_by(model, patch, tmp_path / "adapter") < 1e-4


def test_the_same_patch_gives_the_same_bytes(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    patch = make_patch(model, name)
    for out in ("a", "b"):
        export(patch, tmp_path / out, options=Options(all_layers=True))
    for file in ("adapter_config.json", "adapter_model.safetensors", "patchkit-manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_servers_find_one_rank_scaling_one_and_balanced_factors(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    exported = export(make_patch(model, name), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert (config["bias"], config["use_rslora"], config["use_dora"]) == ("none", False, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert vllm_rank(exported.rank) == 8
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{x}.weight"] for x in "AB")
    assert a.shape == (5, zoo.INNER)
    assert b.shape == (zoo.HIDDEN, 5)
    assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-4)


def test_all_layers_are_there_and_change_nothing(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("gemma3_vision")
    patch = make_patch(model, name)
    export(patch, tmp_path / "adapter", options=Options(all_layers=True))
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * zoo.LAYERS
    assert off_by(model, patch, tmp_path / "adapter") < 1e-4


def test_truncation_is_the_best_there_is(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    patch = make_patch(model, name)
    exported = export(patch, tmp_path / "adapter", options=Options(rank=2))
    assert exported.rank == 2
    for weight in exported.weights:
        values = torch.linalg.svdvals(patch.updates[weight.weight][0].dense().double())
        assert weight.error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-5)


def test_rank_that_is_not_there_is_not_kept() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(20, 3), torch.randn(3, 30)
    delta = Delta(torch.cat([left, left], 1), torch.cat([right, right], 0))
    found = low_rank(delta)
    assert found.rank == 3
    torch.testing.assert_close(found.dense(), delta.to(torch.float64).dense())
    assert low_rank(Delta(torch.randn(4, 9), torch.randn(9, 6))).rank == 4
    for rank in (0, 2):
        assert low_rank(Delta(torch.zeros(4, rank), torch.zeros(rank, 6))).rank == 0


def test_refusals(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    patch = make_patch(model, name)
    patch.save(tmp_path / "patch")
    with pytest.raises(InputError, match="it exists and holds no export to peft"):
        export(patch, tmp_path / "patch")
    assert Patch.load(tmp_path / "patch").manifest == patch.manifest
    with pytest.raises(InputError, match=r"its config.json is needed .* name the base with --model"):
        export(patch, tmp_path / "out", base=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no such weight in GPT2LMHeadModel"):
        export(patch, tmp_path / "out", base=checkpoint("gpt2")[1])
    with pytest.raises(InputError, match="--dtype float8: peft has no such numbers; choose one of"):
        export(patch, tmp_path / "out", options=Options(dtype="float8"))
    assert not (tmp_path / "out").exists()


def test_command_says_what_a_server_needs(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    make_patch(model, name).save(tmp_path / "patch")
    arguments = ["export", str(tmp_path / "patch"), "--out", str(tmp_path / "out"), "--rank", "1"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "--max-lora-rank 1" in result.output
    assert "model.layers.1.mlp.down_proj.weight: rank 1, off by 0." in result.output
    (tmp_path / "out" / ".git").mkdir()
    for mine in (".git/HEAD", "notes.md"):
        (tmp_path / "out" / mine).write_text("mine")
    printed = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert (tmp_path / "out" / ".git" / "HEAD").read_text() == (tmp_path / "out" / "notes.md").read_text() == "mine"
    assert json.loads(printed.stdout)["commands"][0].startswith("vllm serve ")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "--max-lora-rank 1 " in card
