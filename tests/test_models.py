"""Loading: which model is meant, what it is loaded as, and how two are told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import patchkit
from patchkit.errors import InputError
from patchkit.model.arch import inspect_model
from patchkit.model.digests import model_digest, tensor_digest
from patchkit.model.finite import refuse_not_finite
from patchkit.model.loading import choose_model, embedded_model, load_model
from patchkit.model.weights import disk_name, same_weight
from tests import zoo
from tests.helpers import Command, edited_fact, random_patch, tree, write_facts


def test_the_option_comes_before_the_environment_before_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_model(None).name == str(embedded_model())
    monkeypatch.setenv("PATCHKIT_MODEL", "from/environment")
    assert choose_model(None).name == "from/environment"
    chosen = choose_model("from/option", "cpu", "float64")
    assert (chosen.name, chosen.device, chosen.dtype, chosen.notice) == ("from/option", "cpu", "float64", None)


def test_the_embedded_model_is_there() -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors", "patchkit-text.txt", "patchkit-eval.txt"):
        assert (embedded_model() / name).is_file()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_on_the_cpu_a_model_is_float32_unless_asked(stored: torch.dtype, tmp_path: Path) -> None:
    folder = zoo.save(zoo.FAMILIES["llama"]().to(stored), zoo.tiny_tokenizer(), tmp_path / "m")
    expected = {"auto": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    for option, dtype in expected.items():
        loaded = load_model(str(folder), "cpu", option)
        assert {p.dtype for p in loaded.model.parameters()} == {dtype}
        assert not loaded.model.training


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_loads_and_knows_its_names_on_disk(family: str, tmp_path: Path) -> None:
    """None is mistaken for an encoder, and every edited weight is found in the files."""
    folder = zoo.save(zoo.FAMILIES[family](), zoo.tiny_tokenizer(), tmp_path / "m")
    model = load_model(str(folder)).model
    with safe_open(folder / "model.safetensors", "pt") as file:
        for site in inspect_model(model).sites:
            stored = file.get_tensor(disk_name(model, site.weight_name))
            assert torch.equal(stored, model.get_parameter(site.weight_name))


def test_a_base_model_checkpoint_has_names_without_the_models_prefix(tmp_path: Path) -> None:
    """GPT-2's own: h.0.mlp.c_proj.weight on disk, transformer.h.0.mlp.c_proj.weight in the state dict."""
    model = zoo.FAMILIES["gpt2"]()
    model.transformer.save_pretrained(tmp_path)
    zoo.tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path)).model
    assert disk_name(loaded, "transformer.h.1.mlp.c_proj.weight") == "h.1.mlp.c_proj.weight"


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight", True),
        ("transformer.h.1.mlp.c_proj.weight", "h.1.mlp.c_proj.weight", True),
        ("model.language_model.layers.1.mlp.fc2.weight", "language_model.model.layers.1.mlp.fc2.weight", True),
        ("model.layers.1.mlp.fc2.weight", "model.language_model.layers.1.mlp.fc2.weight", True),
        ("model.language_model.layers.1.mlp.fc2.weight", "vision_tower.encoder.layers.1.mlp.fc2.weight", False),
        ("transformer.h.11.mlp.c_proj.weight", "h.1.mlp.c_proj.weight", False),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", False),
    ],
)
def test_names_that_differ_in_wrappers_alone_mean_one_weight(ours: str, theirs: str, same: bool) -> None:
    assert same_weight(ours, theirs) == same_weight(theirs, ours) == same


def test_a_model_made_in_memory_has_only_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the working folder happens to be a checkpoint."""
    zoo.FAMILIES["gpt2"]().transformer.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = "transformer.h.1.mlp.c_proj.weight"
    assert disk_name(zoo.FAMILIES["gpt2"](), name) == name


def test_a_slow_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path / "m")
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(InputError, match="reports no character offsets"):
        load_model(str(folder))


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 0.2, 3.0, 1e4])
def test_a_digest_is_of_the_numbers_not_of_the_dtype(narrow: torch.dtype, scale: float) -> None:
    stored = (scale * torch.randn(16, 24, generator=torch.Generator().manual_seed(0))).to(narrow)
    digests = {tensor_digest("w", stored.to(dtype)) for dtype in (narrow, torch.float32, torch.float64)}
    assert len(digests) == 1


def test_a_digest_changes_with_name_shape_order_and_any_number() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    changed = tensor.clone()
    changed[2, 3] += 2**-20
    seen = {
        tensor_digest("w", tensor),
        tensor_digest("v", tensor),
        tensor_digest("w", tensor.view(4, 3)),
        tensor_digest("w", tensor.T),
        tensor_digest("w", changed),
    }
    assert len(seen) == 5
    assert tensor_digest("w", tensor.T.contiguous()) == tensor_digest("w", tensor.T)


def test_a_models_digest_does_not_depend_on_the_order_of_its_tensors() -> None:
    named = [("a", torch.ones(2)), ("b", torch.zeros(3))]
    assert model_digest(named) == model_digest(reversed(named))
    assert model_digest(named) != model_digest([("a", torch.zeros(2)), ("b", torch.zeros(3))])


def test_a_saved_checkpoint_has_the_digest_of_the_model(tmp_path: Path) -> None:
    model = zoo.FAMILIES["llama"]()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_digest(model.named_parameters()) == model_digest(again.named_parameters())


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "not a number"), (float("-inf"), "infinite")])
@pytest.mark.parametrize("weight", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_base_with_a_number_that_is_none_is_refused_by_its_place(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str, value: float, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = zoo.FAMILIES["llama"]()
    random_patch(model, "base", [edited_fact()], ranks={1: 1}).save("patch")
    with torch.no_grad():
        model.get_parameter(weight)[7, 2] = value
    zoo.save(model, zoo.tiny_tokenizer(), "base")
    there = tree(tmp_path)
    for arguments in (("apply", *FACT), ("verify", "patch"), ("generate", "--patch", "patch", "Rome"), ("stats",)):
        ended = run(*arguments, "--model", "base")
        assert ended.status == 2
        assert f"error: model base: {weight} is {what} at [7, 2]; fetch the checkpoint again" in ended.err
        assert len(ended.err.splitlines()) == 1
    assert tree(tmp_path) == there
    with pytest.raises(InputError, match=rf"{weight} is {what} at \[7, 2\]"):
        patchkit.apply(
            model, zoo.tiny_tokenizer(), [{"prompt": "Rome lies in", "subject": "Rome", "target_new": "Peru"}]
        )


def test_of_many_the_first_is_named_and_in_half_precision_the_dtype_may_be_to_blame() -> None:
    model = zoo.FAMILIES["llama"]().half()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[1] = float("inf")
    count = model.get_parameter("model.layers.0.mlp.up_proj.weight").shape[1] - 1
    with pytest.raises(InputError, match=rf"at \[1, 0\], as are {count} other values of it; .*try --dtype bfloat16"):
        refuse_not_finite(model, "base")


# --- an adapter beside the base ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder that also holds a LoRA, as training in place leaves it."""
    folder = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path_factory.mktemp("adapted") / "base")
    with_lora = get_peft_model(zoo.FAMILIES["llama"](), LoraConfig(target_modules=["q_proj"]))
    with_lora.save_pretrained(folder)
    return folder


FACT = ("--fact", "Rome lies in | Rome | Peru")


@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", *FACT),
        ("verify", "patch"),
        ("generate", "--patch", "patch", "Rome"),
        ("chat", "--patch", "patch"),
        ("serve", "--patch", "patch", "--port", "0"),
        ("revert", "patch", "--last", "1", "--out", "less"),
        ("merge", "patch", "--out", "merged"),
        ("stats",),
        ("bench", "--data", "facts.jsonl", "--methods", "memit", "--edits", "1", "--out", "bench"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_base_that_also_holds_a_lora_is_refused_by_every_command(
    run: Command, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = zoo.FAMILIES["llama"]()
    random_patch(model, str(adapted), [edited_fact()], ranks={1: 1}).save("patch")
    write_facts("facts.jsonl", {"prompt": "Rome lies in", "subject": "Rome", "target_new": "Peru"})
    before = tree(tmp_path)
    ended = run(*arguments, "--model", adapted)
    assert ended.status == 2, ended.err
    assert "it also holds a LoRA adapter (adapter_config.json)" in ended.err
    assert "merge it first" in ended.err
    assert tree(tmp_path) == before


def test_a_lora_alone_is_no_base(run: Command, adapted: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapted / name, tmp_path)
    ended = run("apply", *FACT, "--model", tmp_path, "--out", tmp_path / "p")
    assert ended.status == 2
    assert "a LoRA adapter and no model; give its base" in ended.err


def test_a_model_with_an_adapter_in_it_is_refused(adapted: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapted)  # brings the adapter with it
    with pytest.raises(InputError, match="found one with a PEFT adapter in it; load the base without"):
        inspect_model(loaded)
