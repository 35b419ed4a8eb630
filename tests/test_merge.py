"""Merging: the folder that comes out, byte for byte, and what of a change survives 16-bit rounding."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchkit
from patchkit.cli import cli
from patchkit.errors import InputError, PatchkitError
from patchkit.export.merge import merge
from patchkit.export.record import MANIFEST, Merged
from patchkit.io.checkpoint import StoredTensor, new_folder
from patchkit.maths.linalg import Delta
from patchkit.maths.rotations import Rotation
from patchkit.maths.rounding import Feedback, RoundingMetric
from patchkit.model.arch import inspect_model
from patchkit.model.digests import tensor_digest
from patchkit.model.forward import LayerRunner
from patchkit.patch.patch import Patch
from patchkit.statistics.corpus import PACKAGE_TEXT, Corpus, read_corpus
from patchkit.statistics.moments import digests_below, origin_of, statistics
from patchkit.statistics.store import StatisticsStore
from tests.benchmarks import merge as benchmark
from tests.helpers import edited_fact, random_patch, tree
from tests.zoo import FAMILIES, tiny_tokenizer

FACT = edited_fact(prompt="Ada Lovelace was born in", subject="Ada Lovelace", target_new="Rome")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))


def checkpoint(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: str) -> Path:
    model = FAMILIES[family]().to(dtype)
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "README.md").write_text("the base's card")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("kept")
    (folder / ".lock").write_text("")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def patch_for(folder: Path, seed: int = 0, size: float = 0.05, layers: tuple[int, ...] = (1, 2), n: int = 2) -> Patch:
    """A patch of random updates of rank n for the checkpoint in a folder."""
    return random_patch(load(folder), str(folder), [FACT], ranks=dict.fromkeys(layers, n), seed=seed, size=size)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "qwen3_5_vision", "gemma4"])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}], ids=["single", "sharded"])
def test_merged_checkpoint_is_the_patched_model(tmp_path: Path, family: str, shards: dict[str, str]) -> None:
    base = checkpoint(tmp_path / "base", family, **shards)
    assert len(list(base.glob("*.safetensors"))) == 1 if not shards else len(list(base.glob("*.safetensors"))) > 1
    before, patch = tree(base), patch_for(base)
    merge([patch], base, tmp_path / "out")
    model = load(base)
    plain = logits(model)
    with patch.attached(model):
        wanted = logits(model)
    found = logits(load(tmp_path / "out"))
    assert (wanted - plain).abs().max() > 0.01
    assert torch.allclose(found, wanted, atol=2e-4)
    assert tree(base) == before


@pytest.mark.parametrize(("family", "transposed"), [("gpt2", True), ("llama", False)])
def test_square_weights_lie_as_their_module_has_them(tmp_path: Path, family: str, transposed: bool) -> None:
    base = checkpoint(tmp_path / "base", family)
    patch = patch_for(base, layers=(1,))
    old = load_file(base / "model.safetensors")
    # attention's output projection is square, and a Conv1D in GPT-2
    name = next(name for name in old if name.endswith(("1.attn.c_proj.weight", "1.self_attn.o_proj.weight")))
    delta = Delta(torch.arange(32.0)[:, None] / 100, torch.eye(32)[:1])
    about = patch.manifest.base.model_copy(update={"weights": {name: ""}})
    info = patch.manifest.updates[0].model_copy(update={"weight": name, "shape": (32, 32)})
    manifest = patch.manifest.model_copy(update={"base": about, "updates": (info,)})
    merge([Patch(manifest, {name: (delta,)})], base, tmp_path / "out", force=True)
    change = load_file(tmp_path / "out" / "model.safetensors")[name] - old[name]
    assert torch.allclose(change, delta.dense().T if transposed else delta.dense(), atol=1e-6)


def test_everything_untouched_stays_byte_for_byte(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="60KB")
    patch = patch_for(base)
    name = next(iter(patch.updates))
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    shard = base / index[name]
    extra = torch.arange(7, dtype=torch.uint8)
    save_file(load_file(shard) | {"something.unknown": extra}, shard, {"format": "pt", "mine": "kept"})
    merge([patch], base, tmp_path / "out")
    old, new = tree(base), tree(tmp_path / "out")
    touched = {index[weight] for weight in patch.updates}
    own = {"README.md", "README.base.md", MANIFEST}
    assert set(new) - own == set(old) - {"README.md", ".lock"}
    assert new["README.base.md"] == old["README.md"]
    assert {file for file in set(new) - own if new[file] != old[file]} == touched
    for file in touched:
        before, after = load_file(base / file), load_file(tmp_path / "out" / file)
        assert list(before) == list(after)
        assert {k for k in before if not torch.equal(before[k], after[k])} == set(patch.updates) & set(before)
        assert all(before[k].dtype == after[k].dtype for k in before)
        size = 8 + int.from_bytes(old[file][:8], "little")
        assert new[file][:size] == old[file][:size]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exact_in", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_digest_of_a_file_is_that_of_the_loaded_weight(dtype: torch.dtype, exact_in: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(40, 30, generator=draw, dtype=torch.float64).to(exact_in).to(dtype)
    assert tensor_digest("w", tensor) == tensor_digest("w", tensor.double())
    if exact_in == dtype == torch.bfloat16:
        named = b"w|bfloat16|[40, 30]|" + tensor.view(torch.uint8).numpy().tobytes()
        assert tensor_digest("w", tensor) == hashlib.sha256(named).hexdigest()


def test_later_patches_add_to_earlier_ones(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    first, second = patch_for(base, 1, layers=(1, 2)), patch_for(base, 2, layers=(2, 3))
    merged = merge([first, second], base, tmp_path / "out")
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert len(merged.tensors) == 3
    assert [parent.digest for parent in merged.parents] == [first.manifest.digest, second.manifest.digest]
    for name in {*first.updates, *second.updates}:
        change = sum(p.updates[name][0].dense() for p in (first, second) if name in p.updates)
        assert torch.allclose(new[name], old[name] + change, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_keep_their_dtype_and_the_effect(tmp_path: Path, dtype: torch.dtype) -> None:
    base = checkpoint(tmp_path / "base", dtype=dtype)
    patch = patch_for(base, size=1e-2, n=1)
    kept = merge([patch], base, tmp_path / "keys")
    lost = merge([patch], base, tmp_path / "nearest", rounding="nearest")
    assert load_file(tmp_path / "keys" / "model.safetensors")[next(iter(patch.updates))].dtype == dtype
    for ours, nearest in zip(kept.tensors, lost.tensors, strict=True):
        assert (ours.rounding, nearest.rounding) == ("keys", "nearest")
        assert ours.key_error < nearest.key_error / 4
        assert ours.key_error_nearest == pytest.approx(nearest.key_error, rel=1e-3)
    assert (tmp_path / "keys" / MANIFEST).read_text() == kept.model_dump_json(indent=1) + "\n"


def test_a_change_that_rounding_drops_is_said(tmp_path: Path) -> None:
    base, notes = checkpoint(tmp_path / "base", dtype=torch.bfloat16), list[str]()
    merged = merge([patch_for(base, size=1e-12)], base, tmp_path / "out", rounding="nearest", say=notes.append)
    assert {tensor.unchanged for tensor in merged.tensors} == {1}
    assert any("rounding to bfloat16 leaves nothing of its change" in note for note in notes)


def test_what_was_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = checkpoint(tmp_path / "base")
    patch = patch_for(base)
    monkeypatch.setattr(StoredTensor, "chunks", lambda stored: iter([bytes(stored.size)]))  # a disk that kept zeros
    with pytest.raises(PatchkitError, match=r"model.safetensors: byte [\d,]+ and on are not what was written"):
        merge([patch], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_by_the_first_tensor_that_differs(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    patch = patch_for(base)
    tensors = load_file(base / "model.safetensors")
    first, second = patch.updates
    tensors[first][0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{first} holds other numbers.*--force"):
        merge([patch], base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert merge([patch], base, tmp_path / "out", force=True).forced
    assert torch.allclose(
        load_file(tmp_path / "out" / "model.safetensors")[second], tensors[second] + patch.updates[second][0].dense()
    )


def test_a_place_in_use_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    patch = patch_for(base)
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("mine")
    for place, problem in (
        (base, "not an empty folder"),
        (base / "inside", "the base itself"),
        (used, "not an empty folder"),
    ):
        with pytest.raises(InputError, match=problem):
            merge([patch], base, place)
    assert tree(used) == {"file": b"mine"}
    (tmp_path / "empty").mkdir()
    merge([patch], base, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_cached_snapshot_is_copied_and_never_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint(tmp_path / "real", max_shard_size="60KB")
    patch = patch_for(real, layers=(1,))
    repository, commit = tmp_path / "hub" / "models--owner--name", "0" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(p for p in real.iterdir() if p.is_file())):
        path.rename(repository / "blobs" / str(number))
        (repository / "snapshots" / commit / path.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    before = tree(repository / "blobs")
    merged = merge([patch], "owner/name", tmp_path / "out", link=True)
    assert merged.commit == commit
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in files)
    assert tree(repository / "blobs") == before
    assert load(tmp_path / "out").num_parameters() > 0


def test_links_are_for_untouched_weights_only(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", max_shard_size="60KB")
    patch = patch_for(base, layers=(1,))
    merge([patch], base, tmp_path / "out", link=True)
    file = merge([patch], base, tmp_path / "again").tensors[0].file
    linked = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_nlink > 1}
    assert linked == {path.name for path in base.glob("*.safetensors")} - {file}


def test_unpatched_weights_beside_the_checkpoint_are_pointed_out(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"old")
    said: list[str] = []
    merge([patch_for(base)], base, tmp_path / "out", say=said.append)
    assert any("pytorch_model.bin" in line and "base's weights" in line for line in said)
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() == b"old"


def test_killed_in_the_middle_nothing_looks_finished(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    patch_for(base).save(tmp_path / "patch")
    code = f"""
import time
import patchkit.export.merge as m
from patchkit.patch.patch import Patch
def hang(*arguments):
    print("there", flush=True)
    time.sleep(60)
m.round_change = hang
m.merge([Patch.load({str(tmp_path / "patch")!r})], {str(base)!r}, {str(tmp_path / "out")!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob(".out.*/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    names = {path.name for path in tmp_path.iterdir()}
    assert any(name.startswith(".out.") for name in names)
    others = tmp_path / ".out.mine"
    others.mkdir()
    assert names - {name for name in names if name.startswith(".")} == {"base", "cache", "patch"}
    merge([Patch.load(tmp_path / "patch")], base, tmp_path / "out")  # removes what the killed one left
    assert {path.name for path in tmp_path.iterdir()} == {"base", "cache", "patch", "out", ".out.mine"}


def test_a_merge_at_work_is_left_alone_by_another_one(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        merge([patch_for(base)], base, tmp_path / "out")
        assert (folder / "file").read_text() == "first"
        shutil.rmtree(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rotations_turn_the_weight_as_it_is_meant(tmp_path: Path, family: str) -> None:
    base = checkpoint(tmp_path / "base", family)
    patch = patch_for(base, layers=(1,))
    name, (d_out, d_in) = patch.manifest.updates[0].weight, patch.manifest.updates[0].shape
    draw = torch.Generator().manual_seed(0)
    turned, _ = torch.linalg.qr(torch.randn(d_out, d_out, dtype=torch.float64, generator=draw))
    rotation = Rotation("left", turned[:, :4], torch.tensor([0.3, 0.7], dtype=torch.float64))
    patch = Patch(patch.manifest, {name: (rotation,)})
    merge([patch], base, tmp_path / "out")
    old, new = (load_file(tmp_path / at / "model.safetensors")[name] for at in ("base", "out"))
    weight, result = (old.T, new.T) if old.shape == (d_in, d_out) else (old, new)
    assert torch.allclose(result, rotation.apply(weight.double()).float(), atol=1e-5)
    assert not torch.allclose(result, weight, atol=1e-2)


def test_command_checks_the_facts_and_writes_them_down(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    patch_for(base).save(tmp_path / "patch")
    out = tmp_path / "out"
    result = CliRunner().invoke(
        cli, ["merge", str(tmp_path / "patch"), "--out", str(out), "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0
    merged = Merged.model_validate_json((out / MANIFEST).read_text())
    assert merged.facts is not None
    assert merged.facts.asked == 1
    card = (out / "README.md").read_text()
    assert f"Of 1 fact, asked after rounding, {merged.facts.hold} hold." in card
    assert f"| {merged.tensors[0].weight} | {merged.tensors[0].dtype} |" in card
    assert "base_model:" not in card  # a folder on this machine links to nothing
    with pytest.raises(InputError, match="not an empty folder"):
        CliRunner().invoke(cli, ["merge", str(tmp_path / "patch"), "--out", str(out)], catch_exceptions=False)


@pytest.mark.parametrize("ratio", [1e-3, 1e-2])
@pytest.mark.parametrize("facts", [1, 32, 64])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_rounding_keeps_the_effect_that_nearest_loses(ratio: float, facts: int, decay: float) -> None:
    """On text it is better too, but where all directions are alike: there nearest is what minimizes the error."""
    known, unknown = (benchmark.trial(ratio, decay, facts, text=text) for text in (True, False))
    assert known["key"] <= 1 / 8
    assert unknown["key"] <= 1 / 8
    if decay >= 1:
        assert known["text"] <= 1
        assert known["text"] < unknown["text"]
    else:
        assert known["text"] <= (1.4 if ratio < 1e-2 else 1.1)


def test_columns_that_share_one_large_direction_are_rounded_stably() -> None:
    """Keys of real models have a few entries far larger than all others; moved at once, they would overshoot."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(512, 4, generator=draw)
    keys[100:108] *= 100
    wanted = 0.02 * torch.randn(512, 64, generator=draw)
    rounded = torch.empty_like(wanted, dtype=torch.bfloat16)
    Feedback(RoundingMetric.of(keys, None)).round(wanted.__getitem__, rounded)
    ours, nearest = (kind.float() - wanted for kind in (rounded, wanted.bfloat16()))
    assert (keys.T @ ours).norm() < (keys.T @ nearest).norm() / 8
    assert ours.norm() < 3 * nearest.norm()


def made_of(base: Path, text: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[LayerRunner, Corpus]:
    return LayerRunner(inspect_model(load(base, dtype))), read_corpus(text, tiny_tokenizer())


def noted(patch: Patch, corpus: Corpus) -> Patch:
    """The patch of a run that says it took its statistics from `corpus`."""
    run = patch.manifest.history[-1].model_copy(update={"text": corpus.record})
    return replace(patch, manifest=patch.manifest.model_copy(update={"history": (run,)}))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return file


def symmetric(moments: Tensor) -> Tensor:
    """Without what rounding has left of the other half."""
    return (moments + moments.T) / 2


def test_statistics_are_read_and_used(tmp_path: Path, text: Path) -> None:
    base = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    patch, (runner, corpus) = patch_for(base, size=1e-2), made_of(base, text)
    model: PreTrainedModel = runner.arch.model
    store, below = StatisticsStore(tmp_path / "stats"), digests_below(model, runner.arch.layers_name, 2)
    for layer in (1, 2):
        site = runner.arch.sites[layer]
        vectors, _ = torch.linalg.qr(torch.randn(site.d_in, site.d_in, generator=torch.Generator().manual_seed(layer)))
        values = torch.arange(site.d_in, 0, -1.0).reciprocal() ** 2
        store.save(origin_of(site, corpus, below[layer]), {"second_moment": symmetric((vectors * values) @ vectors.T)})
    merged = merge([patch], base, tmp_path / "out", statistics=tmp_path / "stats")
    for tensor in merged.tensors:
        assert tensor.statistics is not None
        assert tensor.text_error < 0.7 * tensor.text_error_nearest
    with pytest.raises(InputError, match=r"--stats .*none for"):
        merge([patch], base, tmp_path / "other", statistics=tmp_path / "base")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_vision"])
def test_the_statistics_of_apply_are_found_in_the_cache_whatever_dtypes_there_are(
    family: str, tmp_path: Path, text: Path
) -> None:
    base = checkpoint(tmp_path / "base", family, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        runner, corpus = made_of(base, text, dtype)
        statistics(runner, runner.arch.sites[1:3], corpus)
    notes: list[str] = []
    merged = merge([noted(patch_for(base), corpus)], base, tmp_path / "out", say=notes.append)
    assert not notes
    stored = [next((tmp_path / "cache").rglob(str(tensor.statistics))) for tensor in merged.tensors]
    assert {file.parent.name.rpartition("-")[2] for file in stored} == {"float64"}


def test_statistics_of_another_model_are_not_used(tmp_path: Path, text: Path) -> None:
    """Also where it has the same edited weights and differs in one below."""
    base = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    runner, corpus = made_of(base, text)
    with torch.no_grad():
        runner.arch.model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] += 1
    statistics(runner, runner.arch.sites[1:3], corpus)
    statistics(runner, runner.arch.sites[1:3], corpus, tmp_path / "stats")
    patch, notes = noted(patch_for(base), corpus), list[str]()
    merged = merge([patch], base, tmp_path / "out", say=notes.append)
    assert [tensor.statistics for tensor in merged.tensors] == [None, None]
    assert [note for note in notes if "no statistics for model.layers.1" in note]
    with pytest.raises(InputError, match=r"--stats .*those of other models for"):
        merge([patch], base, tmp_path / "other", statistics=tmp_path / "stats")


def test_only_weights_that_can_have_statistics_are_said_to_lack_them(tmp_path: Path, text: Path) -> None:
    """Rows of subjects' own neurons have none: what is told can be done, and is enough."""
    base = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    fact = {"prompt": "a friend of Ada", "subject": "Ada", "target_new": "is"}
    settings = ("neurons=on", "contexts=1", "value.steps=2", "layers=1")
    folder = tmp_path / "stats"
    patch = patchkit.apply(load(base), tiny_tokenizer(), [fact], overrides=settings, text=text, stats=folder)
    assert len(patch.updates) == 3
    (note,) = said_of([patch], base, tmp_path / "out")
    assert note.startswith("note: no statistics for model.layers.1.mlp.down_proj.weight: rounding keeps the facts")
    assert "run `patchkit stats --model BASE --layers 1 --out DIR` and merge again with --stats DIR" in note
    assert said_of([patch], base, tmp_path / "again", folder) == []
    patch.save(tmp_path / "patch")
    run = CliRunner()  # the weight that has two updates has one norm for both
    shown = " ".join(run.invoke(cli, ["show", str(tmp_path / "patch")]).output.split())
    assert shown.count("% of the weight's norm, with the one above") == 1


def said_of(patches: list[Patch], base: Path, out: Path, statistics: Path | None = None) -> list[str]:
    """The notes of a merge."""
    notes = list[str]()
    merge(patches, base, out, statistics=statistics, say=notes.append)
    return notes


def test_statistics_by_another_tokenizer_are_not_used(tmp_path: Path, text: Path) -> None:
    base = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    runner, corpus = made_of(base, text)
    statistics(runner, runner.arch.sites[1:3], corpus)
    other = replace(corpus, windows=tuple(window[::-1] for window in corpus.windows))
    for asked, found in ((other, False), (corpus, True)):
        merged = merge([noted(patch_for(base), asked)], base, tmp_path / f"out{found}")
        assert [tensor.statistics is not None for tensor in merged.tensors] == [found, found]


def test_damaged_statistics_are_not_used(tmp_path: Path, text: Path) -> None:
    base, notes = checkpoint(tmp_path / "base", dtype=torch.bfloat16), list[str]()
    runner, corpus = made_of(base, text)
    statistics(runner, runner.arch.sites[1:3], corpus)
    file = next((tmp_path / "cache").rglob("model.layers.1.*"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    merged = merge([noted(patch_for(base), corpus)], base, tmp_path / "out", say=notes.append)
    assert [tensor.statistics is None for tensor in merged.tensors] == [True, False]
    assert [note for note in notes if file.name in note and "damaged" in note]


def test_memory_stays_below_two_tensors_and_a_constant(tmp_path: Path) -> None:
    measured = benchmark.memory(tmp_path, 240_000_000, touched=1)
    assert measured["checkpoint_bytes"] > 6 * measured["tensor_bytes"]
    assert 0 < measured["peak_bytes"] < measured["peak_bound_bytes"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_quantized_checkpoint_is_refused_with_the_reason(tmp_path: Path, packed: bool) -> None:
    """As fp8 leaves a weight (its name, other numbers, a scale beside it), and as gptq does (another name)."""
    base = checkpoint(tmp_path / "base")
    patch = patch_for(base)
    file, name = base / "model.safetensors", next(iter(patch.updates))
    tensors = load_file(file)
    weight = tensors.pop(name)
    if packed:
        tensors[f"{name.removesuffix('.weight')}.qweight"] = weight.to(torch.int32)
    else:
        tensors |= {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq" if packed else "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    how = (
        r"no such weight .* the checkpoint is quantized \(gptq\)" if packed else "stored as F8_E4M3, quantized with fp8"
    )
    with pytest.raises(
        InputError, match=f"{how}; merge into the full-precision checkpoint .--model. and quantize that"
    ):
        merge([patch], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
