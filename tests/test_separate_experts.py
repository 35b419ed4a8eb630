"""Experts in modules of their own are found by looking, and are edited as the fused ones with the same numbers are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchkit
from patchkit import Patch
from patchkit.errors import InputError
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.inputs import SiteInput, watching_site
from patchkit.model.separate_experts import SeparateExperts
from patchkit.model.weights import read_weight
from patchkit.statistics.corpus import PACKAGE_TEXT
from tests import zoo
from tests.helpers import apart
from tests.separate_moe import Block, separated
from tests.test_experts_patch import FACTS, QUICK, apply, logits, saved

TOKENS = torch.arange(4, 28).view(2, 12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return file


def seen_at(model: PreTrainedModel, layer: int) -> tuple[SiteInput, Tensor]:
    """Keys x (tokens, E·width) at a layer's experts, and what came out there."""
    seen: list[tuple[SiteInput, Tensor]] = []
    arch = inspect_model(model)
    rows, positions = torch.arange(2).repeat_interleave(12), torch.arange(12).repeat(2)

    def note(inputs: SiteInput, output: Tensor) -> None:
        seen.append((inputs, inputs.at(rows, positions)))

    with torch.no_grad(), watching_site(arch.sites[layer], 2, note):
        LayerRunner(arch).run({"input_ids": TOKENS, "use_cache": False}, stop=layer + 1)
    return seen[0]


@pytest.mark.parametrize("called", [False, True], ids=["looped over", "called"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "qwen2_moe"])
def test_keys_and_gates_are_those_of_the_fused_experts(family: str, called: bool) -> None:
    if family in ("deepseek_v3", "qwen2_moe") and not called:
        pytest.skip("its blocks have more than experts in them")
    fused, apartment = zoo.MIXTURES[family](), separated(zoo.MIXTURES[family](), called)
    assert apart(logits(apartment), logits(fused)) < 1e-5
    for layer in (2, 3):
        (ours, keys), (theirs, wanted) = seen_at(apartment, layer), seen_at(fused, layer)
        assert apart(keys, wanted) < 1e-5
        assert torch.equal(keys != 0, wanted != 0)
        weight = torch.randn(zoo.HIDDEN, ours.d_in, generator=torch.Generator().manual_seed(0))
        assert apart(ours.through(weight), theirs.through(weight)) < 1e-5
        weights = [read_weight(inspect_model(model).sites[layer]) for model in (apartment, fused)]
        assert torch.equal(*weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_are_read_in_16_bits(dtype: torch.dtype) -> None:
    fused, apartment = zoo.MIXTURES["qwen2_moe"]().to(dtype), separated(zoo.MIXTURES["qwen2_moe"]().to(dtype), True)
    (_, keys), (_, wanted) = seen_at(apartment, 1), seen_at(fused, 1)
    assert apart(keys.float(), wanted.float()) < 4 * torch.finfo(dtype).eps
    assert torch.equal(keys != 0, wanted != 0)


def both(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The fused model and the one with a module for each expert, of one checkpoint's numbers."""
    fused = saved("qwen3_moe", folder / "fused")
    zoo.save(fused, zoo.tiny_tokenizer(), folder / "separate")
    config = json.loads((folder / "separate" / "config.json").read_text())
    config |= {"model_type": "separate_moe", "architectures": ["SeparateMoeForCausalLM"]}
    (folder / "separate" / "config.json").write_text(json.dumps(config))
    apartment = AutoModelForCausalLM.from_pretrained(folder / "separate", dtype=torch.float32).eval()
    assert all(isinstance(site.experts, SeparateExperts) for site in inspect_model(apartment).sites if site.layer != 1)
    return fused, apartment


@pytest.mark.parametrize("method", ["alphaedit", "mose-right"])
def test_a_patch_of_them_is_that_of_the_fused_ones(method: str, text: Path, tmp_path: Path) -> None:
    fused, apartment = both(tmp_path)
    before = logits(fused)
    patches = [apply(model, text, FACTS, *QUICK, method=method) for model in (fused, apartment)]
    wanted, patch = patches
    assert set(patch.updates) == set(wanted.updates)
    assert patch.manifest.base.weights == wanted.manifest.base.weights
    assert patch.manifest.base.stacks == wanted.manifest.base.stacks
    effects = []
    for model in (fused, apartment):
        for each in patches:
            with each.attached(model):
                effects.append(logits(model) - before)
    assert effects[0].abs().max() > 1e-3
    assert all(apart(effect, effects[0]) < 1e-2 for effect in effects)


def test_a_run_goes_on_where_the_other_left_off(text: Path, tmp_path: Path) -> None:
    fused, apartment = both(tmp_path)
    before = logits(fused)
    whole = apply(fused, text, FACTS, *QUICK, "batch_size=1")
    first = apply(fused, text, FACTS[:2], *QUICK, "batch_size=1")
    grown = apply(apartment, text, FACTS[2:], onto=first)
    less = patchkit.revert(apartment, zoo.tiny_tokenizer(), grown, ["curie"], texts=[text])

    def effect(patch: Patch) -> Tensor:
        with patch.attached(apartment):
            return logits(apartment) - before

    assert apart(effect(grown), effect(whole)) < 1e-2
    assert apart(effect(less), effect(first)) < 1e-2


def test_a_state_under_another_name_is_not_dropped(text: Path) -> None:
    """Experts called otherwise, as in code whose list or projection has another name."""
    model = zoo.MIXTURES["mixtral"]()
    patch = apply(model, text, FACTS[:2], *QUICK)
    base = patch.manifest.base
    stacks = {name.replace("down_proj", "w2"): count for name, count in base.stacks.items()}
    other = replace(
        patch,
        manifest=patch.manifest.model_copy(update={"base": base.model_copy(update={"stacks": stacks})}),
        state={name.replace("experts.down_proj", "experts.w2"): tensor for name, tensor in patch.state.items()},
    )
    with pytest.raises(InputError, match=r"experts\.w2: the patch's state is of experts that the model keeps in other"):
        apply(model, text, FACTS[2:], onto=other)


class _Uneven(Block):
    """Whose experts read something else than the block."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.tanh())


class _Choosy(Block):
    """Whose experts' outputs are squashed once more."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).tanh()


@pytest.mark.parametrize("kind", [_Uneven, _Choosy])
def test_what_is_no_gated_sum_is_refused(kind: type[Block]) -> None:
    model = zoo.MIXTURES["mixtral"]()
    for layer in model.model.layers:
        layer.mlp = kind(layer.mlp)
    with pytest.raises(InputError, match=f"{kind.__name__}, whose output is not the gated sum of its experts'"):
        inspect_model(model)


class _Beside(Block):
    """Hands on what the router said beside its output."""

    def forward(self, hidden_states: Tensor) -> Any:  # the layer is made for a tensor
        return super().forward(hidden_states), self.gate(hidden_states.flatten(0, 1))[0]


def test_an_output_may_have_something_beside_it() -> None:
    plain = separated(zoo.MIXTURES["mixtral"]())
    site, block = inspect_model(plain).sites[1], _Beside(zoo.MIXTURES["mixtral"]().model.layers[1].mlp)
    assert isinstance(site.experts, SeparateExperts)
    hidden = torch.randn(2, 12, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    experts = SeparateExperts(**{**site.experts.__dict__, "module": block})
    output = block.forward(hidden)
    assert torch.equal(experts.summed(((hidden,), {}), output), output[0].flatten(0, 1))
    change = torch.ones(24, zoo.HIDDEN)
    assert torch.equal(experts.plus(((hidden,), {}), output, change)[0], output[0] + 1)
    assert experts.plus(((hidden,), {}), output, change)[1] is output[1]
    assert torch.equal(experts.gates(((hidden,), {})) != 0, site.experts.gates(((hidden,), {})) != 0)


class _Mixed(nn.Module):
    """A mixture with given gates (tokens, E)."""

    def __init__(self, gates: Tensor, width: int) -> None:
        super().__init__()
        self.gates = gates
        members = [nn.Sequential(nn.Linear(width, 6), nn.Linear(6, width)) for _ in range(gates.shape[1])]
        self.experts = nn.ModuleList(members)

    def forward(self, hidden: Tensor) -> Tensor:
        put_out = torch.stack([expert(hidden) for expert in self.experts], 1)  # (tokens, E, width)
        return (self.gates.unsqueeze(2) * put_out).sum(1)


def test_experts_may_be_more_than_entries_of_an_output() -> None:
    """Gates are then read in several passes."""
    gates = torch.rand(5, 11, generator=torch.Generator().manual_seed(0))
    members = tuple(f"experts.{number}" for number in range(11))
    experts = SeparateExperts("block", _Mixed(gates, 4), 11, 6, 4, members, "1")
    assert apart(experts.gates(((torch.randn(5, 4),), {})), gates) < 1e-6
