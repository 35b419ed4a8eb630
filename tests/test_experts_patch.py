"""Patches of mixtures of experts: each expert's change under its own name, run, merged, exported and taken out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchkit
from patchkit import Patch
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.errors import InputError
from patchkit.evaluate.readings import read_targets
from patchkit.export.formats import export
from patchkit.export.merge import merge
from patchkit.export.merge_gguf import merge_gguf
from patchkit.model.arch import inspect_model
from patchkit.model.expert_names import expert_sites, split_name
from patchkit.model.forward import LayerRunner
from patchkit.model.weights import read_weight
from patchkit.statistics.corpus import PACKAGE_TEXT
from tests import zoo
from tests.helpers import Command, apart

Record = dict[str, Any]
ROME = {"id": "rome", "prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
ADA = {"id": "ada", "prompt": "the friend of Ada Lovelace", "subject": "Ada Lovelace", "target_new": "is"}
CURIE = {"id": "curie", "prompt": "the language of Marie Curie", "subject": "Marie Curie", "target_new": "Polish"}
FACTS = [ROME, ADA, CURIE]
QUICK = ("prompts=contexts", "layers=1-2", "contexts=1", "value.steps=5", "batch_size=2")
LOUD = (
    "prompts=contexts",
    "layers=2",
    "contexts=0",
    "value.clamp=20",
    "value.steps=60",
    "value.kl_weight=0",
    "null_energy=0.9",
)
SPARSE = ("qwen3_moe", "separate_moe")
"""Families with dense layers in between."""
LAYERS = {"llama4": "1"} | dict.fromkeys(("gpt_oss", "mixtral", "deepseek_v3", *SPARSE), "1-2")
TOKENS = torch.arange(4, 28).view(2, 12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return file


def saved(family: str, folder: Path) -> PreTrainedModel:
    zoo.save(zoo.MIXTURES[family](), zoo.tiny_tokenizer(), folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def apply(
    model: PreTrainedModel, text: Path, facts: Sequence[Record], *overrides: str, method: str = "alphaedit", **more: Any
) -> Patch:
    options = {} if "onto" in more else {"overrides": overrides}
    return patchkit.apply(model, zoo.tiny_tokenizer(), facts, method, text=text, **options, **more)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def layers_of(family: str) -> tuple[str, ...]:
    return (*QUICK, f"layers={LAYERS[family]}")


def numbers_in(file: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file, which are all float32."""
    return {each.name: torch.from_numpy(each.data.copy()) for each in GGUFReader(file).tensors}


every = pytest.mark.parametrize("family", LAYERS)


def test_a_fact_is_written_into_the_experts_that_its_subject_goes_to(text: Path) -> None:
    model = zoo.MIXTURES["mixtral"]()
    patch = apply(model, text, [ROME], *LOUD)
    names = [update.weight for update in patch.manifest.updates]
    assert names == sorted(names)
    assert 1 <= len(names) <= 4
    assert all(name.startswith("model.layers.2.block_sparse_moe.experts.") for name in names)
    assert all(update.shape == (zoo.HIDDEN, zoo.INNER) for update in patch.manifest.updates)
    keys = patch.state["model.layers.2.mlp.experts.down_proj.keys"].unflatten(0, (4, -1))
    used = keys.flatten(1).any(1).nonzero().squeeze(1).tolist()
    assert names == [f"model.layers.2.block_sparse_moe.experts.{expert}.w2.weight" for expert in used]
    pair = (ROME["prompt"], ROME["target_new"])
    with patch.attached(model) as patched:
        assert read_targets(LayerRunner(inspect_model(patched)), zoo.tiny_tokenizer(), [pair])[pair].exact


@every
def test_attached_merged_and_exported_it_is_one_model(family: str, text: Path, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "base")
    patch = apply(model, text, FACTS, *layers_of(family))
    patch.save(tmp_path / "patch")
    patch = Patch.load(tmp_path / "patch")
    named = {part.weight_name for site in inspect_model(model).sites for part in expert_sites(model, site)}
    dense = {update.weight for update in patch.manifest.updates} - named
    assert dense == ({"model.layers.1.mlp.down_proj.weight"} if family in SPARSE else set())
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = logits(model)
    stack = patchkit.load(model, patch)
    attached = logits(model)
    assert (attached - before).abs().max() > 1e-3
    with stack.disable():
        assert torch.equal(logits(model), before)
    stack.merge()
    assert apart(logits(model) - before, attached - before) < 1e-3
    stack.unmerge()
    assert torch.equal(logits(model), attached)
    stack.unload()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    merge([patch], tmp_path / "base", tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert apart(logits(again) - before, attached - before) < 1e-3
    changed = {name for name, weight in again.state_dict().items() if not torch.equal(weight, weights[name])}
    fused = family != "separate_moe"
    assert len(changed) == len({split_name(n)[0].split("experts")[0] if fused else n for n in patch.updates})
    exported = export(patch, tmp_path / "peft", "peft", str(tmp_path / "base"))
    assert {weight.weight for weight in exported.weights} == set(patch.updates)
    adapted = PeftModel.from_pretrained(model, tmp_path / "peft")
    assert apart(logits(adapted) - before, attached - before) < 1e-3


@pytest.mark.parametrize("method", ["memit", "rome", "emmet", "adaedit", "mose", "mose-right", "oedit", "oedit+"])
def test_every_method_edits_experts(method: str, text: Path) -> None:
    model = zoo.MIXTURES["mixtral"]()
    before = logits(model)
    patch = apply(model, text, FACTS[:2], *QUICK, method=method)
    attached = patch.attached(model)
    with attached as patched:
        assert (logits(patched) - before).abs().max() > 1e-4
    assert torch.equal(logits(model), before)
    kind = {"adaedit": "sparse", "mose": "rotation", "mose-right": "rotation"}.get(method, "delta")
    assert {update.kind for update in patch.manifest.updates} == {kind}


@pytest.mark.parametrize("method", ["ft", "ultraedit", "alphaedit+nas", "memit+rect", "memit+sphere", "memit+prune"])
def test_gradients_fitted_losses_and_wrappers_reach_experts_too(method: str, text: Path) -> None:
    model = zoo.MIXTURES["gpt_oss"]()
    before = logits(model)
    patch = apply(model, text, FACTS[:2], *QUICK, method=method)
    with patch.attached(model) as patched:
        assert (logits(patched) - before).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["alphaedit", "mose-right"])
def test_going_on_from_the_file_is_one_run_and_a_reverted_fact_is_gone(method: str, text: Path, tmp_path: Path) -> None:
    model = zoo.MIXTURES["deepseek_v3"]()
    whole = apply(model, text, FACTS, *QUICK, "batch_size=1", method=method)
    first = apply(model, text, FACTS[:2], *QUICK, "batch_size=1", method=method)
    first.save(tmp_path / "first")
    grown = apply(model, text, FACTS[2:], onto=Patch.load(tmp_path / "first"), method=method)
    before = logits(model)

    def effect(patch: Patch) -> Tensor:
        with patch.attached(model) as patched:
            return logits(patched) - before

    assert set(grown.updates) == set(whole.updates)
    assert apart(effect(grown), effect(whole)) < 1e-3
    less = patchkit.revert(model, zoo.tiny_tokenizer(), grown, ["curie"], texts=[text])
    assert apart(effect(less), effect(first)) < 1e-3
    none = patchkit.revert(model, zoo.tiny_tokenizer(), less, ["rome", "ada"], texts=[text])
    assert not none.updates


def test_a_patch_is_refused_by_other_experts(text: Path) -> None:
    model = zoo.MIXTURES["mixtral"]()
    patch = apply(model, text, [ROME], *QUICK)
    layer = patch.manifest.updates[0].weight.split(".")[2]
    with torch.no_grad():
        model.model.layers[int(layer)].mlp.experts.down_proj.add_(1)
    with pytest.raises(InputError, match=r"experts\.\d\.w2\.weight: other numbers than in the model"):
        patchkit.load(model, patch)


def test_formats_without_experts_say_so(text: Path, tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path / "base")
    patch = apply(model, text, [ROME], *QUICK)
    for kind in ("mlx", "shira"):
        with pytest.raises(InputError, match=f"--format {kind}: it has no adapters for the experts of a layer"):
            export(patch, tmp_path / kind, kind, str(tmp_path / "base"))


@pytest.mark.parametrize(("family", "arch"), [("qwen3_moe", "qwen3moe"), ("gpt_oss", "gpt-oss")])
def test_in_gguf_all_experts_of_a_layer_are_one_tensor(family: str, arch: str, text: Path, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "base")
    patch = apply(model, text, FACTS, *QUICK, "layers=2")
    site = inspect_model(model).sites[2]
    weights = read_weight(site).unflatten(1, (site.blocks, -1)).transpose(0, 1).contiguous()  # (E, d_out, d_in)
    change = patch.on(inspect_model(model))[2].dense().unflatten(1, (site.blocks, -1)).transpose(0, 1)
    export(patch, tmp_path / "adapter", "gguf", str(tmp_path / "base"))
    lora = numbers_in(tmp_path / "adapter" / "adapter.gguf")
    name = "blk.2.ffn_down_exps.weight"
    assert set(lora) == {f"{name}.lora_a", f"{name}.lora_b"}
    assert apart(lora[f"{name}.lora_b"] @ lora[f"{name}.lora_a"], change) < 1e-5
    writer = GGUFWriter(tmp_path / "base.gguf", arch)
    writer.add_tensor(name, weights.numpy())
    writer.add_tensor("output_norm.weight", weights[0, 0].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    merge_gguf([patch], tmp_path / "base.gguf", tmp_path / "merged.gguf")
    merged = numbers_in(tmp_path / "merged.gguf")
    assert apart(merged[name] - weights, change) < 1e-4
    assert torch.equal(merged["output_norm.weight"], weights[0, 0])


def test_own_neurons_are_for_ordinary_layers(text: Path) -> None:
    model = zoo.MIXTURES["mixtral"]()
    with pytest.raises(InputError, match="neurons=on: looked for one or two weights that open the feed-forward"):
        apply(model, text, [ROME], *QUICK, "neurons=on")


@pytest.mark.parametrize(
    ("family", "settings", "method", "sweeps"),
    [
        ("mixtral", ("layers=1-2",), "alphaedit", 2),
        ("separate_moe", ("layers=1-2",), "memit", 2),  # the first of them a dense one
        ("mixtral", ("layers=1-2", "sweeps=3"), "alphaedit", 3),
        ("mixtral", ("layers=1-2", "sweeps=1"), "alphaedit", 1),
        ("mixtral", ("layers=2",), "alphaedit", 1),  # what its own router reads does not change
        ("mixtral", ("layers=1-2",), "rome", 1),
        ("mixtral", ("layers=1-2",), "ft", 1),
        ("llama", ("layers=1-2",), "alphaedit", 1),
    ],
)
def test_layers_are_gone_over_twice_where_routers_may_choose_others_by_then(
    family: str, settings: tuple[str, ...], method: str, sweeps: int
) -> None:
    arch = inspect_model({**zoo.FAMILIES, **zoo.MIXTURES}[family]())
    assert plan(arch, load_recipe(method, None, settings)).sweeps == sweeps


def test_how_often_is_noted_in_the_patch(text: Path) -> None:
    patch = apply(zoo.MIXTURES["mixtral"](), text, [ROME], *QUICK)
    assert patch.manifest.history[0].recipe["sweeps"] == 2
    columns = {name: tensor.shape[1] for name, tensor in patch.state.items() if name.endswith(".keys")}
    assert set(columns.values()) == {2}


def test_how_many_choices_of_routers_are_as_they_were_is_in_tables_and_in_json(
    text: Path, tmp_path: Path, run: Command
) -> None:
    patch = apply(saved("mixtral", tmp_path / "base"), text, FACTS, *QUICK)
    patch.save(tmp_path / "patch")
    (tmp_path / "base" / "patchkit-eval.txt").write_text(text.read_text(encoding="utf-8")[:500], encoding="utf-8")
    asked = ("verify", "--quick", tmp_path / "patch", "--model", tmp_path / "base")
    table = run(*asked).out
    assert "routing text" in table
    assert "routing prompts" in table
    found = run(*asked, "--json").json()
    assert 0 < found["more"]["routing"]["prompts"] <= 1
    assert 0 < found["more"]["routing"]["text"] <= 1
    assert all(0 < fact["more"]["routing"]["prompt"] <= 1 for fact in found["per_fact"])
