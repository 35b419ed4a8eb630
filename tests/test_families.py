"""The whole way on a tiny random model of every family: a fact goes in, and its target becomes what the model says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchkit
from patchkit.evaluate.readings import read_targets
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from tests.zoo import FAMILIES, tiny_tokenizer

# Random weights carry nothing from one position to the next, so the subject ends the prompt.
FACT = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
# What a random model needs: its keys are all alike, so that an edit that spares other keys is one that does nothing.
SETTINGS = ("value.clamp=20", "value.steps=60", "value.kl_weight=0", "contexts=0", "null_energy=0.9", "ridge=0.1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some plain text: the first paragraphs of the one that ships."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    shipped = Path(patchkit.__file__).parent / "data" / "text.txt"
    file.write_text(shipped.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_makes_the_target_the_argmax(family: str, text: Path) -> None:
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    # A norm after the MLP bounds what one layer can say, and the layers above it drown a random model's earlier ones.
    layers = "layers=1-2" if inspect_model(model).sites[0].direct else "layers=2" if family == "gemma4" else "layers=3"
    patch = patchkit.apply(model, tokenizer, [FACT], overrides=(*SETTINGS, layers), text=text)

    pair = (FACT["prompt"], FACT["target_new"])
    runner = LayerRunner(inspect_model(model))
    assert not read_targets(runner, tokenizer, [pair])[pair].exact
    with patch.attached(model):
        assert read_targets(runner, tokenizer, [pair])[pair].exact
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
