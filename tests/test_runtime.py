"""Patches on a live model: they act as if merged, in every way a model may be loaded, and go without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchkit
from patchkit import InputError, Patch
from patchkit.model.arch import inspect_model
from patchkit.model.weights import read_weight
from patchkit.patch.stack import PatchStack
from tests import zoo
from tests.benchmarks.attach_overhead import random_patch

TOKENS = torch.arange(4, 24)[None]  # (1, 20)


def tiny(family: str = "llama") -> PreTrainedModel:
    return zoo.FAMILIES[family]()


def patch_for(model: PreTrainedModel, seed: int = 0, layers: tuple[int, ...] = (1, 2), rank: int = 3) -> Patch:
    return random_patch(model, layers, rank, seed, size=0.5)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def with_weights_changed(model: PreTrainedModel, *patches: Patch) -> Tensor:
    """Logits of a copy whose weights have the patches' deltas added."""
    changed = copy.deepcopy(model)
    sites = {site.weight_name: site for site in inspect_model(changed).sites}
    for patch in patches:
        for name, (delta,) in patch.updates.items():
            weight = read_weight(sites[name])
            weight.add_(delta.dense().to(weight.dtype))
    return logits(changed)


def trace(model: nn.Module) -> dict[str, object]:
    """Everything a patch could leave behind."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    hooks = {
        name: (list(module._forward_hooks), list(module._forward_pre_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    }
    return {"hooks": hooks, "tensors": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}}


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


# --- the life of a patch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_patch_acts_like_changed_weights_and_goes_without_a_trace(family: str, merged: bool) -> None:
    model = tiny(family)
    patch, before, base = patch_for(model), trace(model), logits(model)
    wanted = with_weights_changed(model, patch)
    stack = patchkit.load(model, patch, merged=merged)
    assert close(logits(model), wanted)
    assert not close(base, wanted)
    assert stack.unload() is model
    assert trace(model) == before
    assert torch.equal(logits(model), base)


def test_patches_stack_with_one_hook_for_each_module() -> None:
    model = tiny()
    first, second = patch_for(model), patch_for(model, seed=1, layers=(2, 3))
    patchkit.load(model, first, "first")
    stack = patchkit.load(model, second, "second")
    assert stack.active == ("first", "second")
    assert model.patchkit is stack
    assert close(logits(model), with_weights_changed(tiny(), first, second))
    assert [len(site.module._forward_hooks) for site in inspect_model(model).sites] == [0, 1, 1, 1]


@pytest.mark.parametrize("merged", [False, True])
def test_switching_patches(merged: bool) -> None:
    model = tiny()
    before, base = trace(model), logits(model)
    first, second = patch_for(model), patch_for(model, seed=1, layers=(2, 3))
    stack = patchkit.load(model, first, "first", merged=merged)
    stack.load(second, "second")
    both = logits(model)
    with stack.disable(), stack.disable():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)
    stack.set_active(["second"])
    assert close(logits(model), with_weights_changed(tiny(), second))
    stack.set_active([])
    assert torch.equal(logits(model), base)
    stack.set_active("first")
    stack.delete("second")
    assert list(stack.manifests) == ["first"]
    assert close(logits(model), with_weights_changed(tiny(), first))
    stack.delete("first")
    assert trace(model) == before


def test_disable_ends_with_an_error_inside() -> None:
    model = tiny()
    stack = patchkit.load(model, patch_for(model))
    patched = logits(model)
    with pytest.raises(KeyError), stack.disable():
        raise KeyError
    assert torch.equal(logits(model), patched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_keeps_the_originals_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    weight = read_weight(inspect_model(model).sites[1])
    weight[0, :3] = torch.tensor([-0.0, 6e-8, 1e-30])
    patch, original = patch_for(model), weight.clone()
    stack = patchkit.load(model, patch)
    stack.merge()
    wide = original.double() + patch.updates["model.layers.1.mlp.down_proj.weight"][0].dense().double()
    assert (weight.double() - wide).abs().max() <= torch.finfo(dtype).eps * wide.abs().max()
    assert not torch.equal(weight, original)
    stack.unmerge()
    assert torch.equal(weight.view(torch.uint8), original.view(torch.uint8))
    assert not stack.merged


def test_merge_and_unload_leaves_the_change_and_no_hook() -> None:
    model = tiny()
    hooks, patch = trace(model)["hooks"], patch_for(model)
    patchkit.load(model, patch).merge_and_unload()
    assert trace(model)["hooks"] == hooks
    assert close(logits(model), with_weights_changed(tiny(), patch))


def test_a_second_patch_is_checked_against_the_originals_of_a_merged_one() -> None:
    model = tiny()
    first, second = patch_for(model), patch_for(model, seed=1)
    patchkit.load(model, first, "first", merged=True)
    patchkit.load(model, second, "second")
    assert close(logits(model), with_weights_changed(tiny(), first, second))


def test_more_ranks_than_the_matrix_has_work_too() -> None:
    model = tiny()
    patch = patch_for(model, rank=60)  # 60 * (32 + 80) > 32 * 80
    patchkit.load(model, patch)
    assert close(logits(model), with_weights_changed(tiny(), patch))


# --- what is refused --------------------------------------------------------------------------------------------------


def other_base(model: PreTrainedModel) -> None:
    read_weight(inspect_model(model).sites[2])[0, 0] += 1


@pytest.mark.parametrize("merged", [False, True])
def test_a_patch_for_another_base_is_refused_and_can_be_forced(merged: bool) -> None:
    patch, model = patch_for(tiny()), tiny()
    other_base(model)
    before = trace(model)
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.down_proj\.weight: other numbers"):
        patchkit.load(model, patch, merged=merged)
    assert trace(model) == before
    patchkit.load(model, patch, merged=merged, force=True)
    assert trace(model) != before


def test_a_patch_for_another_architecture_is_refused() -> None:
    with pytest.raises(InputError, match="no such weight in GPT2LMHeadModel"):
        patchkit.load(tiny("gpt2"), patch_for(tiny()), force=True)
    smaller = tiny()
    smaller.model.layers[1].mlp.down_proj = nn.Linear(40, zoo.HIDDEN, bias=False)
    with pytest.raises(InputError, match="32 x 40 here, another shape in the patch"):
        patchkit.load(smaller, patch_for(tiny()), force=True)


def test_a_patch_acts_only_once() -> None:
    """Whatever it is called, and whether it is loaded or attached for a block."""
    model = tiny()
    patch, wanted = patch_for(model), with_weights_changed(model, patch_for(model))
    with patch.attached(model):
        for again in (lambda: patchkit.load(model, patch, "again"), lambda: patch.attached(model).__enter__()):
            with pytest.raises(InputError, match=r"the model has it already, as .*; it can act only once"):
                again()
        assert close(logits(model), wanted)
    stack = patchkit.load(model, patch, "capitals")
    for again in (lambda: stack.load(patch, "again"), lambda: patch.attached(model).__enter__()):
        with pytest.raises(InputError, match=r'the model has it already, as "capitals"'):
            again()
    assert close(logits(model), wanted)
    with stack.disable(), pytest.raises(InputError, match="patches are disabled"):
        patch_for(model, seed=1).attached(model).__enter__()


def test_attached_for_a_block_acts_on_top_of_what_is_loaded() -> None:
    model, first, second = tiny(), patch_for(tiny()), patch_for(tiny(), seed=1, layers=(2, 3))
    stack = patchkit.load(model, first, "first")
    alone, before = logits(model), trace(model)["tensors"]
    with second.attached(model):
        assert close(logits(model), with_weights_changed(tiny(), first, second))
        assert [len(site.module._forward_hooks) for site in inspect_model(model).sites] == [0, 1, 1, 1]
    assert torch.equal(logits(model), alone)
    assert stack.active == ("first",)
    with second.attached(model):
        stack.unload()
    assert trace(model)["tensors"] == before
    assert not hasattr(model, "patchkit")


def test_names() -> None:
    model = tiny()
    stack = patchkit.load(model, patch_for(model), "capitals")
    with pytest.raises(InputError, match="the model has one of that name"):
        patchkit.load(model, patch_for(model, seed=1), "capitals")
    with pytest.raises(InputError, match='"kings": not on this model; it has capitals'):
        stack.set_active(["kings"])
    with pytest.raises(InputError, match='"kings": not on this model'):
        stack.delete("kings")
    with pytest.raises(InputError, match="named twice"):
        stack.set_active(["capitals", "capitals"])
    assert stack.active == ("capitals",)
    stack.unload()
    patchkit.load(model, patch_for(model), "capitals")


# --- models loaded in other ways --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models(in_place: bool) -> None:
    """Compiled code does not look whether hooks have come or gone since."""
    model = tiny()
    patch = patch_for(model)
    wanted = with_weights_changed(model, patch)
    if in_place:
        model.compile(backend="eager")
    compiled: Any = model if in_place else torch.compile(model, backend="eager")
    base, before = logits(compiled), trace(model)
    stack = patchkit.load(compiled, patch)
    assert close(logits(compiled), wanted)
    assert compiled.patchkit is stack
    with stack.disable():
        assert torch.equal(logits(compiled), base)
    assert close(logits(compiled), wanted)
    stack.merge()
    assert close(logits(compiled), wanted)
    stack.unload()
    assert torch.equal(logits(compiled), base)
    assert trace(model) == before
    torch.compiler.reset()


def offloaded(how: str, folder: Path) -> PreTrainedModel:
    model = tiny()
    if how == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), torch.device("cpu"))
    else:
        layers = {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(zoo.LAYERS)}
        rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(model, layers | rest, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return model


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatched"])
def test_offloaded_models(how: str, tmp_path: Path) -> None:
    model, patch = offloaded(how, tmp_path), patch_for(tiny())
    assert any(weight.is_meta for weight in model.parameters())
    before, base = trace(model), logits(model)
    stack = patchkit.load(model, patch)
    assert close(logits(model), with_weights_changed(tiny(), patch))
    with pytest.raises(InputError, match=r"layers\.\d\.mlp\.down_proj\.weight: offloaded"):
        stack.merge()
    assert not stack.merged
    stack.unload()
    assert torch.equal(logits(model), base)
    assert trace(model) == before
    with patch.attached(model):
        assert close(logits(model), with_weights_changed(tiny(), patch))
    assert trace(model) == before

    other = tiny()
    other_base(other)
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.down_proj\.weight: other numbers"):
        patchkit.load(model, patch_for(other))
    assert trace(model) == before


class Packed(nn.Module):
    """A linear layer quantized to 8 bits, with no float weight, the way the usual quantizers lay it out."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale)


class PackedParameter(nn.Linear):
    """One that keeps its numbers in a flat parameter `weight` of bytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        packed = Packed(linear)
        self.register_buffer("scale", packed.scale)
        self.weight = nn.Parameter(packed.qweight.view(torch.uint8).reshape(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.view(torch.int8).reshape(self.out_features, self.in_features)
        return nn.functional.linear(x, rows.to(x.dtype) * self.scale)


@pytest.mark.parametrize("kind", [Packed, PackedParameter])
def test_quantized_models(kind: type[nn.Module]) -> None:
    model, dequantized, patch = tiny(), tiny(), patch_for(tiny())
    for quantized, dense in zip(model.model.layers, dequantized.model.layers, strict=True):
        packed = Packed(dense.mlp.down_proj)
        quantized.mlp.down_proj = kind(quantized.mlp.down_proj)
        dense.mlp.down_proj.weight.data = packed.qweight.float() * packed.scale
    before = trace(model)
    with pytest.warns(UserWarning, match="2 of 2 touched weights are quantized") as said:
        stack = patchkit.load(model, patch)
    assert said[0].filename == __file__
    assert close(logits(model), with_weights_changed(dequantized, patch))
    with pytest.raises(InputError, match="quantized, so that nothing can be merged"):
        stack.merge()
    stack.unload()
    assert trace(model) == before
    with pytest.warns(UserWarning, match="2 of 2 touched weights are quantized") as said, patch.attached(model):
        assert close(logits(model), with_weights_changed(dequantized, patch))
    assert said[0].filename == __file__
    assert trace(model) == before
    model.model.layers[1].mlp.down_proj.in_features = 40
    with pytest.raises(InputError, match="another shape in the patch"):
        patchkit.load(model, patch)


def test_the_patch_follows_the_models_dtype() -> None:
    model = tiny()
    patch = patch_for(model)
    patchkit.load(model, patch)
    wanted = logits(model)
    assert torch.allclose(logits(model.double()).float(), wanted, atol=1e-4)
    coarse = logits(model.to(torch.bfloat16)).float()
    assert (coarse - wanted).norm() < 0.1 * wanted.norm()
    assert torch.allclose(logits(model.float()), coarse, atol=0.3 * float(wanted.abs().max()))


def test_autocast() -> None:
    model = tiny()
    patchkit.load(model, patch_for(model))
    wanted = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model).float() - wanted).norm() < 0.1 * wanted.norm()


def test_gradients_flow_after_inference_mode() -> None:
    model = tiny()
    patchkit.load(model, patch_for(model))
    with torch.inference_mode():
        model(input_ids=TOKENS)
    model(input_ids=TOKENS).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.any()


def test_a_copy_of_a_patched_model_is_its_own() -> None:
    model = tiny()
    base = logits(model)
    stack = patchkit.load(model, patch_for(model))
    patched, other = logits(model), copy.deepcopy(model)
    stack.unload()
    assert torch.equal(logits(other), patched)
    other.patchkit.unload()
    assert torch.equal(logits(other), base)
    assert not any(module._forward_hooks for module in other.modules())


def test_generation_says_what_the_merged_model_says() -> None:
    model = tiny()
    stack = patchkit.load(model, patch_for(model))
    ask = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 12, "do_sample": False}
    attached = model.generate(**ask)
    with stack.disable():
        assert not torch.equal(model.generate(**ask), attached)
    stack.merge()
    assert torch.equal(model.generate(**ask), attached)


# --- from files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a tiny model and of a patch for it."""
    folder = zoo.save(tiny(), zoo.tiny_tokenizer(), tmp_path / "base")
    fact = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
    quick = ("contexts=0", "value.steps=2", "layers=1")
    model = AutoModelForCausalLM.from_pretrained(folder)
    patchkit.apply(model, zoo.tiny_tokenizer(), [fact], "rome", overrides=quick).save(tmp_path / "rome")
    return folder, tmp_path / "rome"


def test_load_takes_a_folder_and_names_the_patch_after_it(saved: tuple[Path, Path]) -> None:
    model, patch = tiny(), Patch.load(saved[1])
    stack = patchkit.load(model, str(saved[1]))
    assert stack.active == ("rome",)
    assert stack.manifests["rome"] == patch.manifest
    assert repr(stack) == "PatchStack(rome; active: rome; attached)"
    with pytest.raises(InputError, match="nowhere"):
        patchkit.load(model, saved[1].parent / "nowhere" / "at" / "all")


def test_from_pretrained_loads_base_and_patch(saved: tuple[Path, Path]) -> None:
    base, patch = saved
    model, tokenizer = patchkit.from_pretrained(patch)
    assert isinstance(model.patchkit, PatchStack)
    assert tokenizer("Rome")["input_ids"] == zoo.tiny_tokenizer()("Rome")["input_ids"]
    assert close(logits(model), with_weights_changed(tiny(), Patch.load(patch)))
    model, _ = patchkit.from_pretrained(patch, dtype=torch.float64, merged=True, name="r")
    assert (model.dtype, model.patchkit.merged, model.patchkit.active) == (torch.float64, True, ("r",))

    moved = base.rename(base.parent / "moved")
    with pytest.raises(
        InputError, match=r"from a folder called base, which is not known here; name its base with base="
    ):
        patchkit.from_pretrained(patch)
    model, _ = patchkit.from_pretrained(patch, base=moved)
    assert model.patchkit.active == ("rome",)
    with pytest.raises(InputError, match=r"other numbers.*in the dtype of its files"):
        patchkit.from_pretrained(patch, base=moved, dtype=torch.bfloat16)
