"""Patches merged into GGUF files: what is stored afterward, and that nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
import transformers as hf
from gguf import quants
from torch import Tensor

from patchkit.maths.updates import delta_of
from patchkit.model.arch import inspect_model
from patchkit.model.weights import read_weight
from tests import zoo
from tests.gguf_model import write_gguf
from tests.helpers import Command, patch_of_kind

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
EDITED = ("blk.1.ffn_down.weight", "blk.2.ffn_down.weight")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama whose rows are whole blocks of 256."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=zoo.VOCAB, num_hidden_layers=zoo.LAYERS, max_position_embeddings=256, **SHAPE)
    return zoo.save(hf.LlamaForCausalLM(config).float(), zoo.tiny_tokenizer(), tmp_path / "base")


def tensors(file: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and numbers of every tensor."""
    found = gguf.GGUFReader(file).tensors
    return {
        t.name: (t.tensor_type.name, torch.from_numpy(quants.dequantize(t.data, t.tensor_type).copy())) for t in found
    }


@pytest.mark.parametrize("kind", ["delta", "rotation"])
@pytest.mark.parametrize(("stored", "most"), [("F32", 1e-5), ("F16", 3e-3), ("Q8_0", 0.05), ("Q4_1", 0.5)])
def test_touched_tensors_are_changed_in_their_type_and_no_others(
    base: Path, tmp_path: Path, run: Command, stored: str, most: float, kind: str
) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    patch = patch_of_kind(model, str(base), kind)
    patch.save(tmp_path / "patch")
    file = write_gguf(model, tmp_path / "base.gguf", stored)
    out = tmp_path / "merged.gguf"
    merged = run("merge", tmp_path / "patch", "--format", "gguf", "--model", file, "--out", out, "--json").json()
    before, after = tensors(file), tensors(out)
    changed = {name for name in before if not torch.equal(before[name][1], after[name][1])}
    assert changed == set(EDITED)
    sites = inspect_model(model).sites
    for told, layer, chain in zip(merged["tensors"], (1, 2), patch.updates.values(), strict=True):
        weight = before[told["tensor"]][1]
        change = delta_of(chain, lambda w=weight: w).dense()  # type: ignore[misc]
        error = float((after[told["tensor"]][1] - weight - change).norm() / change.norm())
        assert told["kind"] == stored == after[told["tensor"]][0]
        assert error < most
        assert told["error"] == pytest.approx(error, rel=0.05, abs=1e-6)
        assert read_weight(sites[layer]).shape == weight.shape
    assert json.loads((tmp_path / "merged.gguf.patchkit.json").read_text())["format"] == "gguf"


def test_what_rounding_loses_is_said(base: Path, tmp_path: Path, run: Command) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    patch_of_kind(model, str(base), "delta").save(tmp_path / "patch")
    file = write_gguf(model, tmp_path / "base.gguf", "Q4_1")
    ended = run("merge", tmp_path / "patch", "--format", "gguf", "--model", file, "--out", tmp_path / "out.gguf")
    assert "`patchkit export --format gguf` keeps all of it" in ended.err
    assert "which facts hold there was not asked" in ended.out


def test_files_that_cannot_be_merged_into_are_refused(base: Path, tmp_path: Path, run: Command) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    patch_of_kind(model, str(base), "delta").save(tmp_path / "patch")
    other = zoo.FAMILIES["llama"]()  # of other shapes
    for file, why in (
        (write_gguf(other, tmp_path / "other.gguf"), r"ffn_down.weight is (32, 80), the patch is for (64, 256)"),
        (write_gguf(model, tmp_path / "k.gguf", "Q4_K"), "is stored as Q4_K, which is only read here, not written"),
        (tmp_path / "nothing.gguf", "cannot be read as GGUF"),
    ):
        ended = run("merge", tmp_path / "patch", "--format", "gguf", "--model", file, "--out", tmp_path / "out.gguf")
        assert ended.status == 2
        assert why in ended.err
    good = write_gguf(model, tmp_path / "base.gguf")
    ended = run("merge", tmp_path / "patch", "--format", "gguf", "--model", good, "--out", good)
    assert "exists; choose another name" in ended.err
    ended = run("merge", tmp_path / "patch", "--format", "gguf", "--out", tmp_path / "out.gguf")
    assert "give --model BASE.gguf" in ended.err
    assert not (tmp_path / "out.gguf").exists()
