"""Patches in the formats of other runtimes: what their loaders find in the files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchkit
from patchkit import InputError, Patch
from patchkit.export import formats
from patchkit.export.formats import export
from patchkit.export.gguf_names import in_gguf_order
from patchkit.export.job import Options
from patchkit.export.publish import pack
from patchkit.facts.requests import encode_target
from patchkit.maths.updates import delta_of
from patchkit.model.arch import inspect_model
from patchkit.model.loading import embedded_model, load_model
from patchkit.model.weights import read_weight
from tests import zoo
from tests.conftest import ROOT
from tests.gguf_model import write_gguf
from tests.helpers import Command, patch_of_kind
from tests.runtimes import KINDS, LLAMA, RUNTIMES, ask_llama, attach_mlx, measure, table

Made = tuple[PreTrainedModel, str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Made]:
    def make(family: str) -> Made:
        folder = zoo.save(zoo.FAMILIES[family](), zoo.tiny_tokenizer(), tmp_path / family)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), str(folder)

    return make


def changes(model: PreTrainedModel, patch: Patch) -> dict[int, Tensor]:
    """W' - W (d_out, d_in) by layer."""
    sites = {site.layer: site for site in inspect_model(model).sites}
    chains = {int(next(part for part in name.split(".") if part.isdigit())): c for name, c in patch.updates.items()}
    return {layer: delta_of(c, lambda at=sites[layer]: read_weight(at)).dense().float() for layer, c in chains.items()}  # type: ignore[misc]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(3, 15)[None]).logits
    return found


def patched_logits(model: PreTrainedModel, patch: Patch) -> Tensor:
    with patch.attached(model):
        return logits(model)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def read_adapter(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a GGUF adapter, and by tensor s B A (d_out, d_in) with s = alpha / r, as llama.cpp adds it."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
    found = {}
    for name in {name.rsplit(".", 1)[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[name] = fields["adapter.lora.alpha"] / len(a) * b @ a
    return fields, found


@pytest.mark.parametrize("family", [family for family in zoo.FAMILIES if family != "opt"])
def test_gguf_names_and_numbers_of_every_family(checkpoint, tmp_path: Path, family: str) -> None:
    model, name = checkpoint(family)
    patch = patch_of_kind(model, name, "delta")
    export(patch, tmp_path / "out", "gguf")
    fields, found = read_adapter(tmp_path / "out" / "adapter.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] in gguf.MODEL_ARCH_NAMES.values()
    wanted = {f"blk.{layer}.ffn_down.weight": change for layer, change in changes(model, patch).items()}
    assert found.keys() == wanted.keys()
    for tensor, change in wanted.items():
        torch.testing.assert_close(found[tensor], change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sparse", "full", "rotation"])
def test_gguf_of_every_kind_of_update(checkpoint, tmp_path: Path, kind: str) -> None:
    model, name = checkpoint("llama")
    patch = patch_of_kind(model, name, kind)
    export(patch, tmp_path / "out", "gguf")
    _, found = read_adapter(tmp_path / "out" / "adapter.gguf")
    for layer, change in changes(model, patch).items():
        torch.testing.assert_close(found[f"blk.{layer}.ffn_down.weight"], change, rtol=1e-4, atol=1e-5)


def test_an_architecture_that_llama_cpp_does_not_have_is_refused(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("opt")
    with pytest.raises(InputError, match=r"opt: llama.cpp has no such architecture; export it to peft, or merge it"):
        export(patch_of_kind(model, name, "delta"), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_rows_of_llamas_queries_and_keys_move_as_llama_cpp_rotates_them(checkpoint) -> None:
    """transformers rotates row i of a head with row i + d/2, llama.cpp row 2i with row 2i + 1."""
    config = checkpoint("llama")[0].config  # four heads of queries, two of keys, eight rows each
    moved = in_gguf_order("llama", "blk.0.attn_k.weight", torch.arange(16)[:, None], config)
    assert moved.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert in_gguf_order("qwen2", "blk.0.attn_k.weight", torch.arange(16)[:, None], config).flatten()[1] == 1
    with pytest.raises(InputError, match="stores it in another order"):
        in_gguf_order("gptneox", "blk.0.attn_qkv.weight", torch.arange(16)[:, None], config)


def write_base(file: Path, arch: str, shapes: Mapping[str, tuple[int, int]]) -> Path:
    writer = gguf.GGUFWriter(file, arch)
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.zeros(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_adapter_is_checked_against_the_bases_gguf(checkpoint, tmp_path: Path, run: Command) -> None:
    model, name = checkpoint("llama")
    patch_of_kind(model, name, "delta").save(tmp_path / "patch")
    fits = {f"blk.{layer}.ffn_down.weight": (zoo.HIDDEN, zoo.INNER) for layer in range(zoo.LAYERS)}
    base = write_base(tmp_path / "base.gguf", "llama", fits)
    arguments = ["export", tmp_path / "patch", "--format", "gguf", "--out", tmp_path / "out", "--gguf-base"]
    ended = run(*arguments, base)
    assert f"llama-server -m {base} --lora {tmp_path / 'out'}/adapter.gguf\n" in ended.out
    assert f"ollama create NAME -f {tmp_path / 'out'}/Modelfile" in ended.out
    assert (tmp_path / "out" / "Modelfile").read_text().splitlines()[1:] == [f"FROM {base}", "ADAPTER ./adapter.gguf"]
    any_base = run(*arguments[:4], "--out", tmp_path / "a name").out
    assert f"llama-server -m BASE.gguf --lora '{tmp_path}/a name'/adapter.gguf  # BASE.gguf: {name} as GGUF" in any_base
    for bad, why in (
        (write_base(tmp_path / "arch.gguf", "qwen2", fits), "holds qwen2, the patch is for llama"),
        (
            write_base(tmp_path / "shape.gguf", "llama", dict.fromkeys(fits, (8, 8))),
            r"ffn_down.weight is \(8, 8\), not",
        ),
        (tmp_path / "none.gguf", "cannot be read"),
    ):
        ended = run(*arguments, bad)
        assert ended.status == 2
        assert re.search(why, ended.err)


# --- MLX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "list_of_layers", "name_in_mlx"),
    [
        ("llama", "model.layers", "model.layers"),
        ("gemma3_vision", "model.language_model.layers", "language_model.model.layers"),
        ("gpt2", "transformer.h", "model.h"),
        ("gpt_neox", "gpt_neox.layers", "model.h"),
    ],
)
def test_mlx_loads_the_adapter_by_its_rules(
    checkpoint, tmp_path: Path, family: str, list_of_layers: str, name_in_mlx: str
) -> None:
    model, name = checkpoint(family)
    patch = patch_of_kind(model, name, "delta")
    wanted = patched_logits(model, patch)
    export(patch, tmp_path / "out", "mlx")
    layers = model.get_submodule(list_of_layers)
    assert attach_mlx(model, layers, tmp_path / "out", name_in_mlx) == zoo.LAYERS
    assert (logits(model) - wanted).abs().max() < 1e-4


def test_a_family_that_mlx_lm_does_not_have_is_refused(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("opt")
    with pytest.raises(InputError, match="opt: mlx_lm has no such model"):
        export(patch_of_kind(model, name, "delta"), tmp_path / "out", "mlx")


# --- SHiRA ------------------------------------------------------------------------------------------------------------


def test_shira_holds_the_entries_that_change_and_no_others(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    patch = patch_of_kind(model, name, "sparse")
    wanted, change = patched_logits(model, patch), changes(model, patch)[1]
    exported = export(patch, tmp_path / "out", "shira")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.1.mlp.down_proj.shira"
    made = torch.zeros_like(change)
    made[tuple(tensors[f"{module}_indices"].long())] = tensors[f"{module}_weight"]
    assert torch.equal(made, change)
    assert [weight.error for weight in exported.weights] == [0, 0]
    assert (logits(PeftModel.from_pretrained(model, tmp_path / "out")) - wanted).abs().max() < 1e-4


def test_shira_refuses_what_is_not_sparse(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    with pytest.raises(InputError, match="100% of its entries change, too many for SHiRA; export it to peft"):
        export(patch_of_kind(model, name, "full"), tmp_path / "out", "shira")
    model, name = checkpoint("gpt2")
    with pytest.raises(InputError, match="PEFT's SHiRA takes no Conv1D"):
        export(patch_of_kind(model, name, "sparse"), tmp_path / "out", "shira")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if LLAMA or not name.startswith("llama.cpp")])
def test_every_runtime_gives_the_patched_logits_as_the_page_says(tmp_path: Path, runtime: str, kind: str) -> None:
    """`python -m tests.runtimes` writes the table anew; a cell is the next power of ten."""
    found, cell = measure(runtime, kind, tmp_path), table()[runtime][kind]
    if isinstance(found, str):
        assert found == cell
    else:
        assert found <= min(3 * float(cell), 1e-4)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LLAMA, reason="no llama-cpp-python: make test-llama")
def test_edits_of_the_embedded_model_hold_in_llama_cpp(tmp_path: Path) -> None:
    loaded = load_model(str(embedded_model()))
    model, tokenizer = loaded.model, loaded.tokenizer
    patch = patchkit.apply(model, tokenizer, patchkit.read_facts(ROOT / "examples" / "facts.jsonl", limit=4).facts)
    export(patch, tmp_path / "out", "gguf")
    base, adapter = write_gguf(model, tmp_path / "base.gguf"), tmp_path / "out" / "adapter.gguf"
    held = before = after = 0
    for fact in patch.manifest.facts:
        ids, first = encode_target(tokenizer, fact.prompt, fact.target_new)
        asked, target = ids[:first], ids[first]
        with patch.attached(model), torch.no_grad():
            if int(model(torch.tensor([asked])).logits[0, -1].argmax()) != target:
                continue
        held += 1
        before += int(ask_llama(base, None, asked)[-1].argmax()) == target
        after += int(ask_llama(base, adapter, asked)[-1].argmax()) == target
    assert held >= 3
    assert after >= 0.9 * held
    assert before == 0


def test_options_that_a_format_does_not_take_are_refused(checkpoint, tmp_path: Path, run: Command) -> None:
    model, name = checkpoint("llama")
    patch = patch_of_kind(model, name, "delta")
    for kind, options, why in (
        ("gguf", Options(all_layers=True), "--all-layers: gguf does not take it; leave it out"),
        ("gguf", Options(dtype="bfloat16"), "--dtype bfloat16: gguf has no such numbers; .* float32, float16"),
        ("shira", Options(rank=2), "--rank: shira does not take it"),
        ("peft", Options(gguf_base="x"), "--gguf-base: peft does not take it"),
        ("onnx", None, "--format onnx: no such format; choose one of: gguf, mlx, peft, shira"),
    ):
        with pytest.raises(InputError, match=why):
            export(patch, tmp_path / "out", kind, options=options)
    listed = run("export", "--formats").out
    assert all(kind in listed for kind in ("gguf", "mlx", "peft", "shira"))


def test_an_export_is_replaced_and_another_format_is_not(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    patch = patch_of_kind(model, name, "delta")
    for kind in ("gguf", "peft"):
        for _ in range(2):
            export(patch, tmp_path / kind, kind)
        with pytest.raises(InputError, match="it exists and holds no export to mlx"):
            export(patch, tmp_path / kind, "mlx")


def test_a_gguf_adapter_is_published_with_the_hub_name_of_its_base(checkpoint, tmp_path: Path) -> None:
    model, name = checkpoint("llama")
    export(patch_of_kind(model, name, "delta"), tmp_path / "out", "gguf")
    package = pack(tmp_path / "out", "ada/facts", base="org/tiny")
    assert set(package.files) == {"Modelfile", "README.md", "adapter.gguf", "patchkit-manifest.json"}
    assert "library_name: llama.cpp" in package.card
    assert "llama-server -m BASE.gguf --lora ada/facts/adapter.gguf" in package.card
    texts = [content for content in package.files.values() if isinstance(content, bytes)]
    assert not any(name.encode() in text for text in texts)


OUTSIDE = '''
"""An exporter that is no part of patchkit."""
from patchkit.export.formats import exporter

@exporter("norms", files=("norms.txt",), library="none", commands=lambda exported: ("cat {title}/norms.txt",), takes=())
def norms(job, into):
    """The norm of every change, as text."""
    text = "".join(f"{name} {job.delta(name).norm():.3f}\\n" for name in job.modules)
    (into / "norms.txt").write_text(text)
    return job.exported("norms", 0, (), ())
'''


def test_a_package_adds_an_exporter_and_the_command_has_it(
    checkpoint, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, name = checkpoint("llama")
    patch_of_kind(model, name, "delta").save(tmp_path / "patch")
    installed = tmp_path / "site"
    (installed / "norms-1.0.dist-info").mkdir(parents=True)
    (installed / "norms_exporter.py").write_text(OUTSIDE)
    (installed / "norms-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: norms\nVersion: 1.0\n")
    (installed / "norms-1.0.dist-info" / "entry_points.txt").write_text(
        "[patchkit.exporters]\nnorms = norms_exporter\n"
    )
    monkeypatch.setattr(formats, "_EXPORTERS", dict(formats.available()))
    monkeypatch.syspath_prepend(str(installed))
    ended = run("export", tmp_path / "patch", "--format", "norms", "--out", tmp_path / "out")
    assert f"cat {tmp_path / 'out'}/norms.txt" in ended.out
    assert len((tmp_path / "out" / "norms.txt").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "out" / "patchkit-manifest.json").read_text())["format"] == "norms"
    assert "norms.txt" in run("export", "--formats").out
