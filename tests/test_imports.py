"""LoRA adapters and edited checkpoints as patches: imported, used as any patch, and exported again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchkit import InputError, Patch
from patchkit.export.formats import export
from patchkit.export.merge import merge
from patchkit.imports.adapter import import_lora
from patchkit.imports.difference import Kept, import_difference, low_rank_within
from tests import zoo
from tests.helpers import Command, write_facts

ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
MLP = {"llama": ["down_proj", "up_proj"], "gpt2": ["mlp.c_proj", "c_fc"]}


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], str]:
    def make(family: str = "llama") -> str:
        folder = tmp_path / family
        return str(folder if folder.is_dir() else zoo.save(zoo.FAMILIES[family](), zoo.tiny_tokenizer(), folder))

    return make


def load(folder: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(3, 15)[None]).logits
    return found


def trained(base: str, out: Path, **options: Any) -> Tensor:
    """Write a LoRA with random numbers for the base, as PEFT does after training; returns the logits with it."""
    family = Path(base).name
    usual = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION[family] + MLP[family], "task_type": "CAUSAL_LM"}
    model = get_peft_model(load(base), LoraConfig(**{**usual, "fan_in_fan_out": family == "gpt2", **options}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    return logits(model.eval())


def apart(patch: Patch, base: str, wanted: Tensor) -> float:
    model = load(base)
    assert (logits(model) - wanted).abs().max() > 0.05
    with patch.attached(model):
        return float((logits(model) - wanted).abs().max())


OPTIONS = {
    "alpha": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.mlp.down_proj": 2, "q_proj": 3}, "alpha_pattern": {"v_proj": 1}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_lora_imported_and_exported_again_gives_the_same_logits(base, tmp_path: Path, options: Any) -> None:
    wanted = trained(base(), tmp_path / "lora", **options)
    patch = import_lora(tmp_path / "lora")
    assert apart(patch, base(), wanted) < 1e-4
    export(patch, tmp_path / "again")
    assert (logits(PeftModel.from_pretrained(load(base()), tmp_path / "again")) - wanted).abs().max() < 1e-4


def test_a_lora_of_conv1d_layers(base, tmp_path: Path) -> None:
    wanted = trained(base("gpt2"), tmp_path / "lora")
    assert apart(import_lora(tmp_path / "lora"), base("gpt2"), wanted) < 1e-4


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA also scales the weight's columns"),
    "bias": ({"bias": "all"}, "it changes biases"),
    "modules": ({"modules_to_save": ["lm_head"]}, "it replaces whole modules"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embed_tokens.* not a pair of lora_A.weight and lora_B.weight"),
}


@pytest.mark.parametrize(("options", "why"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_do_more_than_add_to_linear_layers_are_refused(base, tmp_path: Path, options, why: str) -> None:
    trained(base(), tmp_path / "lora", **options)
    with pytest.raises(InputError, match=f"{why}.*import the --diff"):
        import_lora(tmp_path / "lora")


def test_what_is_no_adapter_or_another_models_is_refused(base, tmp_path: Path) -> None:
    trained(base(), tmp_path / "lora")
    with pytest.raises(InputError, match=r"no adapter_config.json in it that can be read"):
        import_lora(tmp_path)
    with pytest.raises(InputError, match="no such weight in"):
        import_lora(tmp_path / "lora", base("gpt2"))
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 5}))
    with pytest.raises(InputError, match=r"rank 5 in adapter_config.json, 4 in adapter_model.safetensors"):
        import_lora(tmp_path / "lora")
    config.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(InputError, match="an adapter of kind IA3, not LORA"):
        import_lora(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base()}))
    with pytest.raises(InputError, match=r"adapter_model.bin: a pickle, which may run code"):
        import_lora(tmp_path / "lora")


def test_an_adapter_trained_on_a_quantized_base_asks_for_the_full_one(base, tmp_path: Path) -> None:
    """As the config of a QLoRA does, which names the 4-bit checkpoint."""
    wanted = trained(base(), tmp_path / "lora", target_modules=["down_proj"])
    file = zoo.save(load(base()), zoo.tiny_tokenizer(), tmp_path / "bnb") / "model.safetensors"
    packed = {name: each.to(torch.uint8) if "down_proj" in name else each for name, each in load_file(file).items()}
    save_file(packed, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"stored as U8 in .*bnb, which is quantized; .* with --model"):
        import_lora(tmp_path / "lora", str(tmp_path / "bnb"))
    assert apart(import_lora(tmp_path / "lora", base()), base(), wanted) < 1e-4


# --- differences ------------------------------------------------------------------------------------------------------


def edited(base: str, out: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Merge a random LoRA into a copy of the base, as fine-tuning leaves it; returns the copy's logits."""
    trained(base, out.parent / "merged-lora")
    model = PeftModel.from_pretrained(load(base), out.parent / "merged-lora").merge_and_unload().to(dtype)
    model.save_pretrained(out)
    return logits(load(out))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_checkpoint_imported_and_exported_again_gives_the_same_logits(base, tmp_path: Path, family) -> None:
    wanted = edited(base(family), tmp_path / "edited")
    patch = import_difference(base(family), str(tmp_path / "edited"))
    assert {(info.kind, info.rank) for info in patch.manifest.updates} == {("delta", 4)}
    assert apart(patch, base(family), wanted) < 1e-4
    export(patch, tmp_path / "again")
    assert (logits(PeftModel.from_pretrained(load(base(family)), tmp_path / "again")) - wanted).abs().max() < 1e-4
    merge([patch], base(family), tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - wanted).abs().max() < 1e-4


def test_few_changed_rows_are_kept_exactly_and_sparsely(base, tmp_path: Path) -> None:
    model = load(base())
    weight = model.model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        weight[3, ::2] += 0.7
        model.model.layers[1].mlp.down_proj.weight[:, 5] -= 0.4
    model.save_pretrained(tmp_path / "edited")
    patch = import_difference(base(), str(tmp_path / "edited"))
    assert [(info.weight, info.kind, info.rank) for info in patch.manifest.updates] == [
        ("model.layers.1.mlp.down_proj.weight", "sparse", 1),
        ("model.layers.2.self_attn.o_proj.weight", "sparse", 1),
    ]
    assert patch.manifest.history[0].source.error < 1e-7
    assert apart(patch, base(), logits(load(tmp_path / "edited"))) < 1e-5


def test_what_is_not_low_rank_is_kept_whole_unless_an_energy_is_asked_for(base, tmp_path: Path) -> None:
    half = str(tmp_path / "half" / "llama")  # rounding to 16 bits after merging leaves no low rank
    load(base()).to(torch.bfloat16).save_pretrained(half)
    wanted = edited(half, tmp_path / "edited", torch.bfloat16)
    whole = import_difference(half, str(tmp_path / "edited"))
    assert {info.kind for info in whole.manifest.updates} == {"full"}
    assert apart(whole, half, wanted) < 1e-4
    most = import_difference(half, str(tmp_path / "edited"), Kept(energy=0.99))
    assert {info.kind for info in most.manifest.updates} == {"delta"}
    assert 0 < most.manifest.history[0].source.error <= 0.1
    assert apart(most, half, wanted) < 0.5
    two = import_difference(half, str(tmp_path / "edited"), Kept(rank=2))
    assert {info.rank for info in two.manifest.updates} == {2}


def test_the_lowest_rank_within_a_tolerance_is_found() -> None:
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(90, 60).double()).Q, torch.linalg.qr(torch.randn(120, 60).double()).Q
    values = torch.tensor([2.0**-k for k in range(60)], dtype=torch.float64)
    change = (u * values) @ v.T
    for rank in (1, 5, 20):
        delta = low_rank_within(change, float(values[rank:].norm()) * 1.001)
        assert delta is not None
        assert delta.rank == rank
        assert (delta.to(torch.float64).dense() - change).norm() <= float(values[rank:].norm()) * 1.01
    assert low_rank_within(torch.randn(60, 60).double(), 1e-6) is None


def test_what_is_no_patch_is_refused_and_named(base, tmp_path: Path) -> None:
    model = load(base())
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(tmp_path / "norm")
    with pytest.raises(InputError, match=r"model.norm.weight: differs, and is no linear layer's weight"):
        import_difference(base(), str(tmp_path / "norm"))
    with pytest.raises(InputError, match="the two checkpoints are of different models"):
        import_difference(base(), base("gpt2"))
    with pytest.raises(InputError, match="there is nothing to import"):
        import_difference(base(), base())
    file = tmp_path / "norm" / "model.safetensors"
    save_file({name: tensor[:8] for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"\(320, 32\) in .* \(8, 32\) in .*; not one model"):
        import_difference(base(), str(tmp_path / "norm"))


# --- the life of an imported patch ------------------------------------------------------------------------------------


def test_an_imported_patch_is_a_patch_in_every_command(base, tmp_path: Path, run: Command) -> None:
    trained(base(), tmp_path / "lora")
    out = tmp_path / "patch"
    assert "16 updates" in run("import", "--lora", tmp_path / "lora", "--out", out).out
    assert "source  ./lora" in (log := run("log", out).out)
    assert "unknown facts, method, text that it was trained on" in log
    assert "run 1: import\n" in log
    assert run("show", out).out.count("delta") == 4 * zoo.LAYERS
    card = (out / "README.md").read_text()
    assert f"A patchkit patch: a change imported into `{Path(base()).name}` by patchkit." in card
    assert "import of `lora` (lora), which does not say: facts, method" in card
    answers = run("generate", "--patch", out, "--compare", "--json", "The capital").json()["answers"]
    assert answers[0]["base"] != answers[0]["patched"]
    facts = write_facts(
        tmp_path / "facts.jsonl",
        {"prompt": "The capital of France is", "subject": "France", "target_new": "Rome", "id": "rome"},
    )
    verified = run("verify", out, "--facts", facts, "--quick", "--json")
    assert verified.status == 0, verified.err
    assert verified.json()["facts"] == 1
    assert run("verify", out, "--quick", "--json").json()["facts"] == 0
    assert run("merge", out, "--out", tmp_path / "merged").status == 0
    ended = run("apply", facts, "--onto", out, "--out", tmp_path / "more")
    assert ended.status == 2
    assert "was imported from" in ended.err
    assert "goes only as a whole; --last 1 takes it out" in run("revert", out, "--fact", "x").err
    assert run("revert", out, "--last", 1, "--out", tmp_path / "empty").status == 0
    empty = Patch.load(tmp_path / "empty")
    assert not empty.updates
    assert [each.action for each in empty.manifest.history] == ["import", "revert"]
    assert run("log", tmp_path / "empty").status == 0


def test_imports_stack_with_other_patches(base, tmp_path: Path) -> None:
    """Two LoRAs imported and stacked are what one model with both merged is."""
    trained(base(), tmp_path / "first", target_modules=["down_proj"])
    trained(base(), tmp_path / "second", target_modules=["down_proj", "q_proj"], use_rslora=True)
    first, second = import_lora(tmp_path / "first"), import_lora(tmp_path / "second")
    merge([first, second], base(), tmp_path / "both")
    model = load(base())
    with first.attached(model), second.attached(model):
        assert (logits(model) - logits(load(tmp_path / "both"))).abs().max() < 1e-4


def test_choices_that_do_not_go_together(base, tmp_path: Path, run: Command) -> None:
    for arguments, why in (
        ([], "give either --lora DIR or --diff BASE EDITED"),
        (["--lora", "x", "--rank", 2], "--energy and --rank are for --diff"),
        (["--diff", "x", "y", "--model", "z"], "--model: --diff names the base already"),
    ):
        ended = run("import", *arguments, "--out", tmp_path / "out")
        assert ended.status == 2
        assert why in ended.err
    assert not (tmp_path / "out").exists()
