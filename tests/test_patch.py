"""A patch comes and goes without a trace, says which base it is for, and is the same bytes for the same input."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import patchkit
from patchkit import InputError, Patch
from patchkit.model.arch import inspect_model
from patchkit.model.digests import weight_digest
from patchkit.model.weights import read_weight
from patchkit.statistics.corpus import PACKAGE_TEXT
from tests import zoo
from tests.helpers import edit_manifest

FACTS = [
    {"prompt": f"the {thing} of {name}", "subject": name, "target_new": target}
    for thing, name, target in (
        ("city", "Rome", "capital"),
        ("friend", "Ada Lovelace", "is"),
        ("language", "Marie Curie", "Polish"),
        ("mother", "Alan Turing", "the engineer"),
    )
]
METRICS = {
    "facts": 2,
    "efficacy": {"success": None, "exact": 1.0, "generated": 0.5},
    "generalization": {"success": None, "exact": None, "generated": None},
    "locality": {"success": None, "unchanged": None},
    "perplexity": {"before": 10.0, "after": 12.5, "ratio": 1.25},
}
QUICK = ("contexts=1", "value.steps=4", "layers=1-2")
TOKENS = torch.arange(4, 24)[None]  # (1, 20)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return file


Make = Callable[..., Patch]


@pytest.fixture
def make(text: Path) -> Make:
    def patch_of(model: PreTrainedModel, facts: int = 2, *settings: str) -> Patch:
        return patchkit.apply(model, zoo.tiny_tokenizer(), FACTS[:facts], overrides=(*QUICK, *settings), text=text)

    return patch_of


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def merged(model: PreTrainedModel, *patches: Patch) -> Tensor:
    """Logits with the patches added to the weights themselves, which are put back."""
    arch = inspect_model(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for patch in patches:
        for layer, delta in patch.on(arch, force=True).items():
            read_weight(arch.sites[layer]).add_(delta.dense().to(read_weight(arch.sites[layer]).dtype))
    result = logits(model)
    model.load_state_dict(before)
    return result


# --- making one -------------------------------------------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, object]:
    return {
        name: (
            module.training,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            sorted(vars(module)),
            {key: (p.data_ptr(), p.requires_grad, p.grad) for key, p in module.named_parameters(recurse=False)},
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_apply_leaves_the_model_as_it_was(family: str, make: Make) -> None:
    """Also one that is being trained, with a frozen part in evaluation mode and a hook of its owner's."""
    model = zoo.FAMILIES[family]().train()
    parts = list(inspect_model(model).layers)
    parts[0].eval().requires_grad_(False)
    parts[1].register_forward_hook(lambda *_: None)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, random = state_of(model), torch.get_rng_state()
    make(model)
    assert state_of(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_in_training_mode_gets_the_same_patch(make: Make) -> None:
    """GPT-2 has dropout, which would blur statistics, values and keys."""
    assert make(zoo.FAMILIES["gpt2"]().train()).manifest.digest == make(zoo.FAMILIES["gpt2"]()).manifest.digest


def test_an_error_in_the_middle_leaves_the_model_as_it_was(make: Make) -> None:
    model = zoo.FAMILIES["llama"]().train()
    before = state_of(model)
    with pytest.raises(InputError, match="layers 0 to 3"):
        make(model, 1, "layers=7")
    assert state_of(model) == before


def test_the_same_facts_and_seed_make_the_same_bytes(make: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(zoo.FAMILIES["llama"]()).save(tmp_path / name)
    for file in ("patch.safetensors", "state.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = make(zoo.FAMILIES["llama"](), 2, "seed=1")
    assert other.manifest.digest != Patch.load(tmp_path / "a").manifest.digest


def wide_llama() -> PreTrainedModel:
    config = LlamaConfig(**{**zoo._COMMON, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 900})
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_a_patch_grows_with_its_facts_and_hardly_with_the_model(make: Make, tmp_path: Path) -> None:
    sizes = {}
    for name, model, facts in (
        ("two", zoo.FAMILIES["llama"](), 2),
        ("four", zoo.FAMILIES["llama"](), 4),
        ("wide", wide_llama(), 2),
    ):
        patch = make(model, facts)
        assert {update.rank for update in patch.manifest.updates} == {facts}
        patch.save(tmp_path / name)
        sizes[name] = sum(factor.nbytes for (delta,) in patch.updates.values() for factor in (delta.left, delta.right))
        assert (tmp_path / name / "patch.safetensors").stat().st_size < sizes[name] + 1000
    assert sizes["four"] == 2 * sizes["two"]
    assert sizes["wide"] == 2 * sizes["two"]  # four times the weights


# --- saved and loaded -------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same_patch(make: Make, tmp_path: Path) -> None:
    patch = make(zoo.FAMILIES["llama"]()).with_metrics(METRICS)
    patch.save(tmp_path / "p")
    loaded = Patch.load(tmp_path / "p")
    assert loaded.manifest == patch.manifest
    assert loaded.state.keys() == patch.state.keys()
    assert all(torch.equal(loaded.state[name], patch.state[name]) for name in patch.state)
    for name, (delta,) in patch.updates.items():
        assert torch.equal(loaded.updates[name][0].left, delta.left)
        assert torch.equal(loaded.updates[name][0].right, delta.right)
    assert loaded.manifest.history[-1].metrics == METRICS


def test_state_has_a_column_for_every_fact(make: Make) -> None:
    patch = make(zoo.FAMILIES["llama"](), 3, "batch_size=2")
    assert patch.manifest.history[0].batches == (2, 1)
    assert [fact.batch for fact in patch.manifest.facts] == [0, 0, 1]
    for name, tensor in patch.state.items():
        rows = zoo.INNER if name.endswith(".keys") else zoo.HIDDEN
        assert tensor.shape == (rows, 3), name
    for name, (delta,) in patch.updates.items():
        assert torch.equal(delta.left, patch.state[f"{name}.residuals"])


def test_a_failed_save_keeps_the_old_patch(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = make(zoo.FAMILIES["llama"]())
    patch.save(tmp_path / "p")

    def fail(*args: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("patchkit.patch.patch.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        patch.with_metrics(METRICS).save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").manifest == patch.manifest
    assert [file.name for file in tmp_path.iterdir()] == ["p"]


NOT_PATCHKITS = {".git/HEAD": "ref: main", "notes.md": "why", "plots/a.txt": "a", ".hidden": "b"}


def add_other_files(folder: Path) -> None:
    for name, text in NOT_PATCHKITS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def other_files(folder: Path) -> dict[str, str]:
    own = {"patch.safetensors", "state.safetensors", "manifest.json", "README.md", "provenance.json"}
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_text() for name, file in files.items() if name not in own}


def test_saving_leaves_files_that_are_not_patchkits(make: Make, tmp_path: Path) -> None:
    patch, real = make(zoo.FAMILIES["llama"]()), tmp_path / "real"
    patch.save(real)
    add_other_files(real)
    (real / "rejected.jsonl").write_text("of the earlier run")
    (tmp_path / "link").symlink_to(real)
    replace(patch.with_metrics(METRICS), state={}).save(tmp_path / "link")
    assert Patch.load(real).manifest.history[-1].metrics == METRICS
    assert not (real / "state.safetensors").exists()
    assert other_files(real) == NOT_PATCHKITS
    assert (tmp_path / "link").is_symlink()
    (real / "README.md").unlink()
    (real / "README.md").mkdir()
    with pytest.raises(InputError, match=r"README.md: a folder, where a file is to be written; move it away"):
        patch.save(real)
    assert Patch.load(real).manifest.history[-1].metrics == METRICS


def save_killed(patch: Patch, folder: Path, event: int) -> bool:
    """Save in a process that is killed before its `event`-th step on the file system; whether it came that far."""
    steps = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
    child = os.fork()
    if child == 0:
        seen = iter(range(event))

        def step(name: str, _: object) -> None:
            if name in steps and next(seen, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(step)
        try:
            patch.save(folder)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_save_killed_at_any_step_leaves_the_old_patch_or_the_new_one(make: Make, tmp_path: Path) -> None:
    old, new = make(zoo.FAMILIES["llama"](), 2), make(zoo.FAMILIES["llama"](), 3)
    folder, template = tmp_path / "work" / "p", tmp_path / "template"
    old.save(template)
    add_other_files(template)
    found, event = [], 0
    while True:
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(template, folder)
        if not save_killed(new, folder, event):
            break
        loaded = Patch.load(folder)
        expected = new if loaded.manifest == new.manifest else old
        assert loaded.manifest == expected.manifest
        assert loaded.state.keys() == expected.state.keys()
        assert all(torch.equal(loaded.state[name], expected.state[name]) for name in expected.state)
        found.append(expected is new)
        new.save(folder)
        assert Patch.load(folder).manifest == new.manifest
        assert other_files(folder) == NOT_PATCHKITS
        assert [file.name for file in folder.parent.iterdir()] == ["p"]
        event += 1
    assert found == sorted(found)  # old before some step, new after it
    assert len(found) > 20
    assert {False, True} == set(found)


def test_a_write_that_was_cut_off_is_refused_where_it_cannot_be_finished(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, folder = make(zoo.FAMILIES["llama"]()), tmp_path / "p"
    patch.save(folder)

    def fail(*args: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="writing it was cut off, and cannot be finished: read-only"):
        patch.with_metrics(METRICS).save(folder)
    with pytest.raises(InputError, match="run this where it can be written to"):
        Patch.load(folder)
    monkeypatch.undo()
    assert Patch.load(folder).manifest.history[-1].metrics == METRICS


@pytest.mark.parametrize("lost", ["left", "right"])
def test_a_patch_without_one_of_its_tensors_is_refused(make: Make, tmp_path: Path, lost: str) -> None:
    make(zoo.FAMILIES["llama"]()).save(tmp_path / "p")
    file = tmp_path / "p" / "patch.safetensors"
    save_file(
        {name: t for name, t in load_file(file).items() if not name.endswith(f"1.mlp.down_proj.weight.0.{lost}")}, file
    )
    with pytest.raises(InputError, match=r"patch.safetensors is not the one in manifest.json"):
        Patch.load(tmp_path / "p")


def test_a_manifest_with_an_unknown_field_is_refused(make: Make, tmp_path: Path) -> None:
    make(zoo.FAMILIES["llama"]()).save(tmp_path / "p")
    edit_manifest(tmp_path / "p", lambda fields: fields.update(color="red"))
    with pytest.raises(InputError, match=r"manifest.json: color: .*made by another version"):
        Patch.load(tmp_path / "p")


# --- on a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_attached_is_what_merging_gives_and_gone_afterward(family: str, make: Make) -> None:
    model = zoo.FAMILIES[family]()
    patch, before, state = make(model), logits(model), state_of(model)
    with patch.attached(model) as live:
        assert live is model
        inside = logits(model)
    torch.testing.assert_close(inside, merged(model, patch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(logits(model), before)
    assert state_of(model) == state


def test_attached_patches_add_up_and_leave_in_any_order(make: Make) -> None:
    model = zoo.FAMILIES["llama"]()
    one, two = make(model, 1), make(model, 3, "layers=2-3")
    before = logits(model)
    with one.attached(model):
        alone = logits(model)
        with two.attached(model):
            torch.testing.assert_close(logits(model), merged_inside(model, one, two), rtol=1e-3, atol=1e-3)
        assert torch.equal(logits(model), alone)
    assert torch.equal(logits(model), before)
    first, second = one.attached(model), two.attached(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with_two = logits(model)
    second.__exit__(None, None, None)
    with two.attached(model):
        assert torch.equal(logits(model), with_two)
    assert torch.equal(logits(model), before)


def merged_inside(model: PreTrainedModel, *patches: Patch) -> Tensor:
    """`merged` of a model's fresh copy, since hooks are on this one."""
    copy = zoo.FAMILIES["llama"]()
    copy.load_state_dict(model.state_dict())
    return merged(copy, *patches)


def test_an_exception_inside_takes_the_patch_off(make: Make) -> None:
    model = zoo.FAMILIES["llama"]()
    patch, before, state = make(model), logits(model), state_of(model)
    with pytest.raises(ZeroDivisionError), patch.attached(model):
        _ = 1 / 0
    assert torch.equal(logits(model), before)
    assert state_of(model) == state


def test_gradients_flow_through_an_attached_patch(make: Make) -> None:
    model = zoo.FAMILIES["llama"]()
    with make(model).attached(model):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert model.get_parameter("model.embed_tokens.weight").grad is not None


# --- the right base ---------------------------------------------------------------------------------------------------


def test_another_base_is_refused_and_the_tensor_named(make: Make) -> None:
    model = zoo.FAMILIES["llama"]()
    patch, name = make(model), "model.layers.2.mlp.down_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5] += 1e-3
    with pytest.raises(InputError, match=f"{name}: other numbers"), patch.attached(model):
        pass
    assert patch.on(inspect_model(model), force=True).keys() == {1, 2}


def test_another_shape_is_refused_even_by_force(make: Make) -> None:
    patch, wide = make(zoo.FAMILIES["llama"]()), inspect_model(wide_llama())
    for force in (False, True):
        with pytest.raises(InputError, match="64 x 160 here, another shape in the patch"):
            patch.on(wide, force)


def test_weights_the_patch_does_not_touch_may_differ(make: Make) -> None:
    """A model fine-tuned elsewhere, or with a new head, still takes it."""
    model = zoo.FAMILIES["llama"]()
    patch = make(model)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").add_(1)
    with patch.attached(model):
        pass


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_is_the_same_base_in_whatever_dtype_it_is_loaded(
    family: str, stored: torch.dtype, make: Make, tmp_path: Path
) -> None:
    folder = zoo.save(zoo.FAMILIES[family]().to(stored), zoo.tiny_tokenizer(), tmp_path / "m")
    wider = [d for d in (stored, torch.float32, torch.float64) if torch.finfo(d).bits >= torch.finfo(stored).bits]
    digests = set()
    for dtype in wider:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        digests.add(tuple(weight_digest(site, site.weight_name) for site in inspect_model(model).sites))
    assert len(digests) == 1
    patch = make(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    with patch.attached(AutoModelForCausalLM.from_pretrained(folder, dtype=stored)):
        pass


def test_loaded_in_a_coarser_dtype_it_is_another_base(make: Make) -> None:
    patch = make(zoo.FAMILIES["llama"]())
    with pytest.raises(InputError, match="other numbers"), patch.attached(zoo.FAMILIES["llama"]().bfloat16()):
        pass
