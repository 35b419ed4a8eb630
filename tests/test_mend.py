"""MEND's network: what it makes of a gradient, that edits hold once it is trained, that training goes on exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchkit
from patchkit.editing.recipe import load_recipe
from patchkit.errors import InputError
from patchkit.facts.reader import parse_facts
from patchkit.methods.mend import SHARED, fresh, stepped
from patchkit.patch.patch import Patch
from patchkit.runs.train import TrainConfig, Trained, train
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import PACKAGE_TEXT
from tests import zoo
from tests.helpers import Command, apart, command_line

D_OUT, D_IN = 6, 10
FACTS = [
    {"prompt": f"the city of {name}", "subject": name, "target_new": target, "paraphrases": [f"{name} is the city of"]}
    for name, target in (("Rome", "capital"), ("Florence", "friend"), ("Ada Lovelace", "is"), ("Marie Curie", "the"))
]
HOW = TrainConfig(steps=6, rank=4, learning_rate=1e-2, edit_weight=1.0)
LAYERS = "1-2"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the network ------------------------------------------------------------------------------------------------------


def test_a_network_that_has_learned_nothing_is_a_step_against_the_gradient() -> None:
    keys, gradients = random(D_IN, 3), random(D_OUT, 3, seed=1)
    left, right = stepped(fresh(D_IN, D_OUT, 4, seed=0) | {"rate": torch.tensor(0.5).log()}, keys, gradients)
    assert apart(right, keys.T) < 1e-6
    assert apart(left / left.norm(dim=0), -gradients / gradients.norm(dim=0)) < 1e-6
    length = gradients.norm(dim=0)
    assert apart(left.norm(dim=0), 0.5 * (1 + length.log1p())) < 1e-6


def test_the_network_is_equation_3() -> None:
    network = {
        name: random(*each.shape, seed=place) for place, (name, each) in enumerate(fresh(D_IN, D_OUT, 4, 0).items())
    }
    network["deviation"] = network["deviation"].abs() + 1
    keys, gradients = random(D_IN, 2, seed=20), random(D_OUT, 2, seed=21)
    left, right = stepped(network, keys, gradients)
    for token in range(2):
        delta = gradients[:, token]
        z = torch.cat([keys[:, token], delta / delta.norm() * (1 + (1 + delta.norm()).log())])
        z = (z - network["mean"]) / network["deviation"]
        inner = network["up1"] @ (network["down1"] @ z) + network["bias"]
        h = z + torch.clamp(network["scale1"] * inner + network["offset1"], min=0)
        g = h + torch.clamp(network["scale2"] * (network["up2"] @ (network["down2"] @ h)) + network["offset2"], min=0)
        assert apart(right[token], g[:D_IN]) < 1e-12
        assert apart(left[:, token], -network["rate"].exp() * g[D_IN:]) < 1e-12


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return file


def trained(folder: Path, text: Path, how: TrainConfig = HOW, facts: Any = FACTS, **more: Any) -> Trained:
    model, tokenizer = zoo.FAMILIES["llama"](), zoo.tiny_tokenizer()
    workspace = Workspace.of(model, tokenizer, (text,), folder, more.pop("progress", lambda *at: None))
    config = load_recipe("mend", None, [f"layers={LAYERS}"])
    return train(workspace, parse_facts(facts).facts, config, how, more.pop("say", pytest.fail))


def network_in(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    (file,) = [each for each in (folder / "networks").glob("*.safetensors") if "partial" not in each.name]
    return load_file(file)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path, text: Path) -> None:
    def cut(phase: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    seen: list[int] = []
    trained(tmp_path / "whole", text)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", text, progress=cut)
    trained(tmp_path / "cut", text, progress=lambda phase, done, total: seen.append(done))
    assert seen == [4, 5, 6]
    assert same(network_in(tmp_path / "cut"), network_in(tmp_path / "whole"))


def test_a_longer_training_goes_on_from_a_shorter_one(tmp_path: Path, text: Path) -> None:
    seen: list[int] = []
    trained(tmp_path / "whole", text)
    trained(tmp_path / "s", text, replace(HOW, steps=3))
    trained(tmp_path / "s", text, progress=lambda phase, done, total: seen.append(done))
    assert seen == [3, 4, 5, 6]
    assert same(network_in(tmp_path / "s"), network_in(tmp_path / "whole"))
    assert trained(tmp_path / "s", text).edit_loss is None  # nothing left to do


def test_a_training_on_other_facts_begins_anew_and_says_so(tmp_path: Path, text: Path) -> None:
    said: list[str] = []
    trained(tmp_path, text)
    first = network_in(tmp_path)
    trained(tmp_path, text, facts=FACTS[:2], say=said.append)
    assert said == ["a network that was trained on something else is replaced"]
    assert not same(network_in(tmp_path), first)
    trained(tmp_path / "alone", text, facts=FACTS[:2])
    assert same(network_in(tmp_path), network_in(tmp_path / "alone"))


LONG = replace(HOW, steps=120)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Trained]:
    folder = tmp_path_factory.mktemp("mend")
    text = folder / "text.txt"
    text.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return folder, text, trained(folder, text, LONG)


def edited(folder: Path, text: Path, facts: Any, *settings: str, **more: Any) -> Patch:
    model, overrides = zoo.FAMILIES["llama"](), (f"layers={LAYERS}", *settings)
    return patchkit.apply(
        model, zoo.tiny_tokenizer(), facts, "mend", overrides=overrides, text=text, stats=folder, **more
    )


def held(patch: Patch, facts: Any) -> list[bool]:
    model, tokenizer = zoo.FAMILIES["llama"](), zoo.tiny_tokenizer()
    report = patchkit.measure(model, tokenizer, patch, parse_facts(facts).facts, quick=True)
    return [fact.holds for fact in report.per_fact]


def test_edits_hold_once_the_network_is_trained(long: tuple[Path, Path, Trained], tmp_path: Path) -> None:
    folder, text, done = long
    assert done.layers == (1, 2)
    for fact in FACTS:
        patch = edited(folder, text, [fact])
        assert held(patch, [fact]) == [True], fact
        assert {update.kind for update in patch.manifest.updates} == {"delta"}
        assert len(patch.manifest.updates) == 2
    untrained = tmp_path / "untrained"
    trained(untrained, text, replace(HOW, steps=1))
    assert not all(held(edited(untrained, text, [fact]), [fact])[0] for fact in FACTS)


def test_a_patch_knows_its_network_and_takes_no_other(long: tuple[Path, Path, Trained], tmp_path: Path) -> None:
    folder, text, _ = long
    first = edited(folder, text, FACTS[:1])
    assert len(first.manifest.history[0].recipe["settings"]["network"]) == 64
    edited(folder, text, FACTS[1:2], onto=first)
    trained(tmp_path / "other", text)
    with pytest.raises(InputError, match=r"the patch was made with another network \(digest .*--set network=''"):
        edited(tmp_path / "other", text, FACTS[1:2], onto=first)


def test_a_fact_is_taken_out_with_the_network_again(long: tuple[Path, Path, Trained]) -> None:
    folder, text, _ = long
    both, alone = edited(folder, text, FACTS[:2]), edited(folder, text, FACTS[:1])
    model = zoo.FAMILIES["llama"]()
    gone = both.manifest.facts[1].id
    less = patchkit.revert(model, zoo.tiny_tokenizer(), both, [gone], texts=(text,), stats=folder)
    for name, chain in alone.updates.items():
        assert apart(less.updates[name][0].dense(), chain[0].dense()) < 1e-5  # type: ignore[union-attr]


def test_without_a_network_the_way_to_one_is_said(tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match=r"no network has been trained for layers 1,2 .*`patchkit train FACTS"):
        edited(tmp_path / "none", text, FACTS[:1])
    workspace = Workspace.of(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), (text,), tmp_path)
    with pytest.raises(InputError, match=r"memit has no network to train; methods that have: mend"):
        train(workspace, parse_facts(FACTS).facts, load_recipe("memit"), HOW, pytest.fail)


def test_all_sites_share_a_network_and_have_scales_of_their_own(long: tuple[Path, Path, Trained]) -> None:
    found = network_in(long[0])
    for name in SHARED:
        assert torch.equal(found[f"1.{name}"], found[f"2.{name}"])
    assert not torch.equal(found["1.scale1"], found["2.scale1"])


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return command_line(monkeypatch, capsys)


def test_the_commands(call: Command, tmp_path: Path) -> None:
    base = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path / "base")
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)), encoding="utf-8")
    options = ("--model", base, "--layers", LAYERS, "--stats", "s")
    made = call("train", "facts.jsonl", *options, "--steps", 4, "--rank", 4)
    assert made.status == 0, made.err
    assert "by the end an edit left" in made.out
    again = call("train", "facts.jsonl", *options, "--steps", 5, "--rank", 4, "--json").json()
    assert (again["layers"], again["steps"]) == ([1, 2], 5)
    ended = call("apply", "facts.jsonl", "--method", "mend", *options, "--quick", "--no-guard", "--json")
    assert ended.status == 0, ended.err
    refused = call(
        "apply", "facts.jsonl", "--method", "mend", "--model", base, "--layers", "0", "--stats", "s", "--out", "q"
    )
    assert refused.status == 2
    assert "patchkit train" in refused.err, refused.err
