"""A GGUF file as the base: edited through what it multiplies with, and the patch merged back into it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf

from patchkit.model.loading import load_config, load_model
from patchkit.patch.patch import Patch
from tests import zoo
from tests.gguf_model import write_gguf
from tests.helpers import Command, write_facts

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = ("--layers", 1, "--set", "contexts=0", "--set", "value.steps=3", "--set", "value.clamp=5", "--quick")
FACT = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file with a tokenizer beside it, since writing a vocabulary into one is the converter's business."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=zoo.VOCAB, num_hidden_layers=zoo.LAYERS, max_position_embeddings=256, **SHAPE)
    model = hf.LlamaForCausalLM(config).float()
    folder = zoo.save(model, zoo.tiny_tokenizer(), tmp_path / "whole")
    (tmp_path / "gguf").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "gguf" / name)
    write_facts("facts.jsonl", FACT)
    return write_gguf(model, tmp_path / "gguf" / "base.gguf", "Q8_0")


@torch.no_grad()
def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(3, 15)[None]).logits[0]


def test_a_gguf_file_is_edited_and_merged_into(run: Command, base: Path) -> None:
    made = run("apply", "facts.jsonl", "--model", base, *SMALL, "--out", "p", "--json")
    assert made.status == 0, made.err
    assert run("verify", "p", "--quick", "--json").json()["facts"] == 1  # the file is known by its weights
    assert run("generate", "--patch", "p", "the city of Rome", "--max-new-tokens", 2).status == 0
    merged = run("merge", "p", "--format", "gguf", "--out", "gguf/merged.gguf", "--json")
    assert merged.status == 0, merged.err
    (tensor,) = merged.json()["tensors"]
    assert (tensor["tensor"], tensor["kind"]) == ("blk.1.ffn_down.weight", "Q8_0")
    plain, again = load_model(str(base)).model, load_model("gguf/merged.gguf").model
    before = logits(plain)
    with Patch.load("p").attached(plain):
        patched = logits(plain)
    change = (patched - before).norm()
    assert change > 0
    assert (logits(again) - patched).norm() < 0.05 * change + 1e-3 * before.norm()  # Q8_0 rounds
    assert run("export", "p", "--out", "adapter").status == 0
    full = run("merge", "p", "--model", "whole", "--out", "full")
    assert full.status == 0, full.err
    assert "made for weights quantized with gguf: whole is taken for what they were made of" in full.err


def test_a_file_is_read_once_for_its_configuration_and_once_for_its_weights(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header holds the vocabulary: reading that of a small model takes seconds."""
    read, reader = list[str](), gguf.GGUFReader

    def count(file: Any, *more: Any) -> Any:
        read.append(str(file))
        return reader(file, *more)

    monkeypatch.setattr(gguf, "GGUFReader", count)
    for _ in range(2):
        assert load_config(str(base)).hidden_size == SHAPE["hidden_size"]
    load_model(str(base))
    assert read == [str(base)] * 2


def test_what_a_gguf_base_is_not(run: Command, base: Path, tmp_path: Path) -> None:
    run("apply", "facts.jsonl", "--model", base, *SMALL, "--out", "p")
    refused = run("merge", "p", "--out", "folder")
    assert refused.status == 2
    assert "base.gguf: a file, and no folder with safetensors files; merge into it with --format gguf" in refused.err
    typo = run("apply", "facts.jsonl", "--model", base.with_name("bose.gguf"), *SMALL, "--out", "q")
    assert f'no such folder; is it "{base}"?' in typo.err
    base.write_bytes(base.read_bytes()[:100])
    damaged = run("apply", "facts.jsonl", "--model", base, *SMALL, "--out", "q")
    assert (damaged.status, len(damaged.err.splitlines())) == (2, 1)
