"""Quantized bases: edited through the whole numbers that their packed weights multiply with; the packed model takes the
patch, and the full-precision checkpoint the merge.

A layer class made up here stands for those that transformers cannot unpack, such as GPTQ's and AWQ's; theirs, and those
of bitsandbytes, are tested where their packages are installed (`make test-gptq`, `make test-bitsandbytes`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from patchkit.errors import InputError
from patchkit.export.edits import quantized_with
from patchkit.model.dequantized import unpack
from patchkit.model.loading import load_model
from patchkit.patch.patch import Patch
from tests import zoo
from tests.helpers import Command, apart, write_facts
from tests.quantizers import GROUP, with_bitsandbytes, with_gptqmodel

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL = ("--layers", 1, "--set", "contexts=0", "--set", "value.steps=3", "--set", "value.clamp=5", "--quick")
FACT = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
IDS = torch.arange(3, 15)[None]
BANNER = "a line on standard output, as gptqmodel prints some"


class Packed(nn.Module):
    """As AutoGPTQ's and its kin: no `weight` at all, numbers the other way round, a kernel in float16 alone that has no
    gradient."""

    works = True

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("qweight", torch.zeros(d_in, d_out, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(1, d_out, dtype=torch.float16))

    def take(self, weight: Tensor) -> None:
        self.scales = (weight.abs().amax(1) / 127).half()[None]
        self.qweight = (weight.T / self.scales.float()).round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float16 or not self.works:
            raise RuntimeError("no kernel for these numbers here")
        with torch.no_grad():
            return (x.float() @ (self.qweight.float() * self.scales.float())).half()


def packed_linears(model: nn.Module, fill: bool) -> None:
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            owner, _, own = name.rpartition(".")
            packed = Packed(linear.in_features, linear.out_features)
            if fill:
                packed.take(linear.weight.detach())
            setattr(model.get_submodule(owner), own, packed)


@register_quantization_config("made-up")
class _Config(QuantizationConfigMixin):
    def __init__(self, **more: Any) -> None:
        self.quant_method = "made-up"


@register_quantizer("made-up")
class _Quantizer(HfQuantizer):
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **more: Any) -> None:
        print(BANNER)
        packed_linears(model, fill=False)

    def is_serializable(self, *args: Any, **more: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The full-precision checkpoint, and facts beside it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=zoo.VOCAB, num_hidden_layers=zoo.LAYERS, max_position_embeddings=256, **SHAPE)
    write_facts("facts.jsonl", FACT)
    return zoo.save(hf.LlamaForCausalLM(config).half(), zoo.tiny_tokenizer(), tmp_path / "full")


def save(model: Any, full: Path, name: str) -> Path:
    folder = full.with_name(name)
    model.save_pretrained(folder)
    for file in full.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture
def packed(full: Path) -> Path:
    """As a GPTQ checkpoint: names and numbers of its own."""
    return as_packed(hf.AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32), full, "packed")


def as_packed(model: Any, full: Path, name: str) -> Path:
    packed_linears(model, fill=True)
    model.half()
    folder = save(model, full, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "made-up"}}))
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits[0].float()


def test_a_quantized_base_is_edited_and_its_full_checkpoint_merged_into(run: Command, packed: Path, full: Path) -> None:
    assert quantized_with(packed) == "made-up"
    made = run("apply", "facts.jsonl", "--model", packed, *SMALL, "--out", "p", "--json")
    assert made.status == 0, made.err
    patch = Patch.load("p")
    assert patch.manifest.base.quantized == "made-up"
    assert made.json()["facts"]
    assert run("verify", "p", "--quick", "--json").json()["facts"] == 1
    assert run("export", "p", "--out", "adapter").status == 0

    itself = run("merge", "p", "--out", "m")
    assert itself.status == 2
    assert "the checkpoint is quantized (made-up); merge into the full-precision checkpoint (--model)" in itself.err
    merged = run("merge", "p", "--model", full, "--out", "m", "--json")
    assert merged.status == 0, merged.err
    assert f"made for weights quantized with made-up: {full} is taken for what they were made of" in merged.err

    plain = load_model(str(full)).model
    before = logits(plain)
    (delta,) = [chain[0].dense() for name, chain in patch.updates.items() if "down_proj" in name]
    plain.model.layers[1].mlp.down_proj.weight.data += delta.float()
    wanted, found = logits(plain), logits(load_model("m").model)
    assert (found - wanted).norm() < 0.02 * (wanted - before).norm()


@pytest.fixture
def folded(full: Path) -> Path:
    """As an AWQ checkpoint: before the numbers were rounded, columns were multiplied, and the rows of what is before
    them divided, so that keys are others and the model is the same."""
    model = hf.AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        heard, kept = (torch.exp(torch.randn(size, generator=draw) * 0.5) for size in (64, 256))
        layer.post_attention_layernorm.weight.data /= heard
        for opener in (layer.mlp.gate_proj, layer.mlp.up_proj):
            opener.weight.data *= heard
        layer.mlp.up_proj.weight.data /= kept[:, None]
        layer.mlp.down_proj.weight.data *= kept
    return as_packed(model, full, "folded")


def test_scales_that_were_folded_in_are_taken_out_of_what_goes_elsewhere(
    run: Command, folded: Path, full: Path
) -> None:
    assert run("apply", "facts.jsonl", "--model", folded, *SMALL, "--out", "p").status == 0
    whole, plain, patch = load_model(str(folded)).model, load_model(str(full)).model, Patch.load("p")
    before, unpatched = logits(plain), logits(whole)
    assert apart(unpatched, before) < 0.02
    with patch.attached(whole):
        wanted = logits(whole) - unpatched
    assert run("merge", "p", "--model", full, "--out", "m").status == 0
    assert apart(logits(load_model("m").model) - before, wanted) < 0.1
    with pytest.warns(UserWarning, match="by name and shape"), patch.attached(plain):
        assert apart(logits(plain) - before, wanted) < 0.1
    assert run("export", "p", "--model", full, "--out", "adapter").status == 0
    assert apart(logits(PeftModel.from_pretrained(plain, "adapter")) - before, wanted) < 0.1


def test_awqs_scales_are_never_left_in_for_want_of_what_tells_them(run: Command, folded: Path, full: Path) -> None:
    """A merge that went on without them did nothing to the model, and said so nowhere."""
    assert run("apply", "facts.jsonl", "--model", folded, *SMALL, "--out", "p").status == 0
    patch = Patch.load("p")
    base = patch.manifest.base.model_copy(update={"quantized": "awq"})
    without = replace(patch, manifest=patch.manifest.model_copy(update={"base": base}), state={})
    without.save("without")
    for command in (("merge", "--out", "m"), ("export", "--out", "adapter")):
        ended = run(command[0], "without", "--model", full, *command[1:])
        assert ended.status == 2
        assert "AWQ has scaled" in ended.err
        assert not Path(command[-1]).exists()
    plain, whole = load_model(str(full)).model, load_model(str(folded)).model
    with (
        pytest.warns(UserWarning, match="by name and shape"),
        pytest.raises(InputError, match="AWQ has scaled"),
        without.attached(plain),
    ):
        pass
    with without.attached(whole):  # what it was made for takes it as it is
        pass


def test_what_is_edited_is_what_the_packed_weights_multiply_with(packed: Path, full: Path) -> None:
    whole = load_model(str(packed)).model
    stored = load_model(str(packed), dtype="float16", packed=True).model
    assert isinstance(stored.model.layers[0].mlp.down_proj, Packed)
    for layer, theirs in zip(whole.model.layers, stored.model.layers, strict=True):
        linear, numbers = layer.mlp.down_proj, theirs.mlp.down_proj
        assert type(linear) is nn.Linear
        assert linear.weight.dtype == torch.float32
        wanted = (numbers.qweight.float() * numbers.scales.float()).T
        assert torch.allclose(linear.weight, wanted, rtol=2**-10, atol=0)  # its kernel rounds to float16
    assert not torch.equal(logits(whole), logits(load_model(str(full)).model))
    assert (logits(whole) - logits(stored)).abs().max() < 1e-2


def test_the_packed_model_takes_the_patch(run: Command, packed: Path) -> None:
    assert run("apply", "facts.jsonl", "--model", packed, *SMALL, "--out", "p").status == 0
    with pytest.warns(UserWarning, match="1 of 1 touched weights is quantized"):
        said = run("generate", "--patch", "p", "--dtype", "float16", "the city of Rome", "--max-new-tokens", 2)
    assert said.status == 0, said.err
    whole, stored = load_model(str(packed)).model, load_model(str(packed), dtype="float16", packed=True).model
    before, patch = logits(stored), Patch.load("p")
    with pytest.warns(UserWarning, match="by name and shape"), patch.attached(stored):
        after = logits(stored)
    with patch.attached(whole):
        wanted = logits(whole)
    assert (after - wanted).norm() < 0.1 * (after - before).norm()


def test_a_rotation_is_exported_by_what_it_turned(run: Command, packed: Path, full: Path) -> None:
    made = run("apply", "facts.jsonl", "--model", packed, *SMALL, "--method", "mose", "--out", "p")
    assert made.status == 0, made.err
    exported = run("export", "p", "--out", "adapter")
    assert exported.status == 0, exported.err
    whole = load_model(str(packed)).model
    with Patch.load("p").attached(whole):
        wanted = logits(whole)
    adapted = PeftModel.from_pretrained(load_model(str(packed)).model, "adapter")
    assert (logits(adapted) - wanted).abs().max() < 1e-4
    assert run("export", "p", "--model", full, "--out", "for-full").status == 0


def test_whole_numbers_of_another_machine_are_not_compared(run: Command, packed: Path) -> None:
    """Kernels differ in last bits, and dtypes in more."""
    assert run("apply", "facts.jsonl", "--model", packed, *SMALL, "--out", "p").status == 0
    half = load_model(str(packed), dtype="bfloat16").model
    with pytest.warns(UserWarning, match="1 of 1 touched weights is quantized"), Patch.load("p").attached(half):
        pass


def test_what_cannot_be_unpacked_is_refused(run: Command, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patching:
        patching.setattr(Packed, "works", False)
        refused = run("apply", "facts.jsonl", "--model", packed, *SMALL, "--out", "p")
    banner, told = refused.err.splitlines()
    assert (refused.status, banner) == (2, BANNER)
    assert "q_proj: quantized (made-up), and its Packed cannot be run here: no kernel" in told
    monkeypatch.setattr(
        Packed, "forward", lambda self, x: x.new_ones(*x.shape[:-1], self.out_features) + x[..., :1] ** 2
    )
    with pytest.raises(InputError, match="its Packed does not multiply with a matrix; edit the full-precision"):
        load_model(str(packed))


def test_stacks_of_packed_experts_are_refused(full: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(full)
    packed = nn.Parameter(torch.zeros(2, 4, 4, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.register_parameter("experts", packed)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts: quantized \(made-up\), and its LlamaMLP is no linear"):
        unpack(model, "made-up", torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(run: Command, full: Path, bits: int) -> None:
    check_real(run, with_bitsandbytes(full, full.with_name("bnb"), bits), full)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptqmodel(run: Command, full: Path, method: str) -> None:
    base = with_gptqmodel(full, full.with_name(method), method, passages=8)
    found = load_model(str(base)).model.get_parameter(f"{DOWN}.weight")
    assert apart(found, in_file(base, method)) < 0.005  # the kernel for CPUs has scales in bfloat16
    check_real(run, base, full)


DOWN = "model.layers.1.mlp.down_proj"


def in_file(base: Path, method: str) -> Tensor:
    """A weight (d_out, d_in) as a checkpoint of 4 bits in groups has it: scale times (number - zero), eight numbers in
    one: for GPTQ of a column, and its zeros less by one; for AWQ of a row, in an order of its own."""
    stored = load_file(base / "model.safetensors")
    numbers, zeros, scales = (stored[f"{DOWN}.{name}"] for name in ("qweight", "qzeros", "scales"))
    places = 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7] if method == "awq" else range(8))

    def in_rows(packed: Tensor) -> Tensor:
        return ((packed[..., None] >> places) & 15).flatten(1)

    if method == "awq":
        whole, zero, group = in_rows(numbers), in_rows(zeros), torch.arange(len(numbers)) // GROUP
    else:
        whole, zero, group = in_rows(numbers.T).T, in_rows(zeros) + 1, stored[f"{DOWN}.g_idx"].long()
    return ((whole - zero[group]) * scales.float()[group]).T


def test_compressed_tensors(run: Command, full: Path) -> None:
    check_real(run, compressed(full), full)


def compressed(full: Path) -> Path:
    """The checkpoint in 4 bits in groups of 32, as llm-compressor leaves AWQ's and GPTQ's results."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization as ct
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    model = hf.AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
    scheme = ct.preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = 32
    groups = ct.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized")
    ct.apply_quantization_config(model, groups)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            parts = module.weight.detach().unflatten(1, (-1, 32))
            scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.quantization_status = ct.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    folder = save(model, full, "compressed")
    compressor.update_config(folder)
    return folder


def check_real(run: Command, base: Path, full: Path) -> None:
    """Edited, attached to the packed model, and merged into the full-precision checkpoint."""
    made = run("apply", "facts.jsonl", "--model", base, *SMALL, "--out", "p", "--json")
    assert made.status == 0, made.err
    whole, packed = load_model(str(base)).model, load_model(str(base), packed=True).model
    exact, plain = logits(whole), logits(load_model(str(full)).model)
    assert not torch.equal(exact, plain)
    assert (logits(packed) - exact).norm() < 0.02 * exact.norm()
    assert run("generate", "--patch", "p", "the city of Rome", "--max-new-tokens", 2).status == 0
    assert run("merge", "p", "--out", "m").status == 2
    assert run("merge", "p", "--model", full, "--out", "m").status == 0
