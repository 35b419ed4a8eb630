"""Damaged patches are refused, forged ones are refused or can be used: a few here, thousands in tests/reliability."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchkit import InputError, Patch, methods
from patchkit.editing.recipe import load_recipe, resolve_layers
from patchkit.editing.session import problem_at, solve_at
from patchkit.evaluate.readings import WORST, perplexity
from patchkit.evaluate.texts import Perplexity
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.patch.stored import digests_of, read_stored
from patchkit.statistics.corpus import read_corpus
from tests import zoo
from tests.helpers import edit_manifest
from tests.reliability.damage import FILES, Place, damage, flipped, forge, fresh, same

BITS, DAMAGED, FORGED = 40, 120, 120


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("damage"))


def flip_bits(place: Place, folder: Path, count: int) -> None:
    """Bits of every file, one at a time: no such patch opens."""
    draw = Random(20)
    fresh(place, folder)
    for name in FILES:
        whole = (folder / name).read_bytes()
        for bit in draw.sample(range(8 * len(whole)), min(count, 8 * len(whole))):
            flipped(folder / name, bit)
            with pytest.raises(InputError):
                Patch.load(folder)
            (folder / name).write_bytes(whole)
    assert Patch.load(folder).manifest.facts


def damage_often(place: Place, folder: Path, count: int) -> Counter[str]:
    """What comes of damage: refused, or opened with what it had, or with less of what may be left out."""
    draw, original, found = Random(21), Patch.load(place.original), Counter[str]()
    for _ in range(count):
        kind = damage(draw, fresh(place, folder), place.other)
        try:
            patch = Patch.load(folder)
        except InputError:
            found["refused"] += 1
        else:
            assert same(patch, original), kind
            found["opened as it was"] += 1
    return found


def forge_often(place: Place, folder: Path, count: int, seed: int = 22) -> Counter[str]:
    """What comes of forgery: refused in one line, or used for everything without an error of ours."""
    draw, found = Random(seed), Counter[str]()
    for number in range(count):
        forge(draw, fresh(place, folder))
        found["refused" if place.use(folder, number % 20 == 0) is None else "used"] += 1
    return found


def test_flipped_bits_are_refused(place: Place, tmp_path: Path) -> None:
    flip_bits(place, tmp_path / "p", BITS)


def test_damaged_folders_are_refused_or_are_what_they_were(place: Place, tmp_path: Path) -> None:
    found = damage_often(place, tmp_path / "p", DAMAGED)
    assert found["refused"] > DAMAGED / 2


@pytest.mark.filterwarnings("ignore")
def test_forged_folders_are_refused_or_can_be_used(place: Place, tmp_path: Path) -> None:
    assert set(forge_often(place, tmp_path / "p", FORGED)) == {"refused", "used"}
    assert place.use(place.original) is not None


def test_a_refusal_does_not_print_all_of_what_it_refuses(place: Place, tmp_path: Path) -> None:
    """What was wrong, and what to do, are both still there."""
    folder = fresh(place, tmp_path / "p")
    edit_manifest(folder, lambda fields: fields["history"][1].update(when="x" * 100_000))
    with pytest.raises(InputError) as refused:
        Patch.load(folder)
    told = str(refused.value)
    assert "history.1.when: Invalid isoformat string" in told
    assert told.endswith("damaged, or made by another version")
    assert len(told) < 1100


def test_the_state_of_another_patch_is_refused_whatever_its_shapes(place: Place, tmp_path: Path) -> None:
    folder = fresh(place, tmp_path / "p")
    (folder / "state.safetensors").write_bytes((place.other / "state.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"state.safetensors is not the one in manifest.json; get the patch again"):
        Patch.load(folder)


def test_the_digest_is_of_everything_and_show_prints_it(place: Place, tmp_path: Path) -> None:
    folder = fresh(place, tmp_path / "p")
    digest = read_stored(folder).digest
    for change in (
        lambda fields: fields["history"][0]["recipe"].update(seed=1),
        lambda fields: fields["facts"][0].update(source="elsewhere"),
        lambda fields: fields["files"].update({"state.safetensors": "0" * 64}),
    ):
        fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        change(fields)
        (folder / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")
        with pytest.raises(InputError, match="not what its digest says"):
            read_stored(folder)
        edit_manifest(fresh(place, folder), change)
        assert read_stored(folder).digest != digest
        fresh(place, folder)
    (folder / "manifest.json").write_text(
        json.dumps(json.loads((folder / "manifest.json").read_text(encoding="utf-8")), sort_keys=True), encoding="utf-8"
    )
    assert read_stored(folder).digest == digest  # what a text editor does to spaces is no damage


def of_format_1(folder: Path) -> None:
    fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del fields["files"], fields["sha256"]
    (folder / "manifest.json").write_text(json.dumps({**fields, "format_version": 1}), encoding="utf-8")
    (folder / "provenance.json").unlink()


def test_a_patch_of_format_1_opens_with_a_line_and_is_written_as_format_2(place: Place, tmp_path: Path) -> None:
    folder = fresh(place, tmp_path / "p")
    of_format_1(folder)
    with pytest.warns(UserWarning, match="p: format 1, without digests of its state and its manifest"):
        patch = Patch.load(folder)
    patch.save(folder)
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["format_version"] == 2
    assert read_stored(folder).digest


BAD = {
    "history": lambda m: m.update(history=[]),
    "run": lambda m: m["facts"][0].update(run=7),
    "batch": lambda m: m["facts"][0].update(batch=7),
    "twice": lambda m: m["facts"].append(m["facts"][-1]),
    "when": lambda m: m["history"][0].update(when="yesterday"),
    "time zone": lambda m: m["history"][0].update(when="2026-01-01T00:00:00"),
    "sweeps": lambda m: m["history"][0]["recipe"].update(sweeps=10**9),
    "nested": lambda m: m["history"][0].update(recipe=nested(100)),
    "rank": lambda m: m["updates"][0].update(rank=9),
    "shape": lambda m: m["updates"][0].update(shape=[80, 32]),
    "place": lambda m: m["updates"][0].update(place=1),
    "side": lambda m: m["updates"][0].update(side="left"),
    "weight": lambda m: m["base"].update(weights={}),
    "norm": lambda m: m["updates"][0].update(norm=-1),
    "huge": lambda m: m["updates"][0].update(numbers=10**400),
    "outcomes": lambda m: m.update(outcomes={"nobody": {"says": "", "holds": True}}),
    "metrics": lambda m: m["history"][0].update(metrics={"facts": 1}),
    "superseded": lambda m: m["history"][1].update(superseded={"rome": "nobody"}),
    "commit": lambda m: m["base"].update(commit='"); evil("'),
}


def nested(depth: int) -> object:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("kind", BAD)
def test_a_manifest_that_contradicts_itself_is_refused_at_the_door(kind: str, place: Place, tmp_path: Path) -> None:
    folder = fresh(place, tmp_path / "p")
    edit_manifest(folder, BAD[kind])
    with pytest.raises(InputError, match=r"(p/manifest.json: .*; damaged, or made by|not the one in manifest.json)"):
        Patch.load(folder)


def test_a_weight_of_zeros_is_told_and_no_error(place: Place, tmp_path: Path) -> None:
    folder = fresh(place, tmp_path / "p")
    edit_manifest(folder, lambda fields: fields["updates"][0].update(weight_norm=0.0))
    patch = place.use(folder)
    assert patch is not None
    assert patch.manifest.updates[0].share is None


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
def test_settings_that_are_no_numbers_are_refused(value: str) -> None:
    for key in ("value.clamp", "value.learning_rate", "value.decay", "preserve"):
        with pytest.raises(InputError, match=key.rpartition(".")[2]):
            load_recipe("memit", None, [f"{key}={value}"])


BADLY = (
    "[" * 5000,
    "{a: " * 3000,
    "2026-13-45",
    "!!int 9e",
    "9" * 5000,
    "&a [*a]",
    "? [a]\n: b",
    "!!python/name:os",
    "\0",
)


@pytest.mark.parametrize("text", BADLY, ids=range(len(BADLY)))
def test_yaml_that_is_meant_badly_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"method: memit\nseed: {text}\n", encoding="utf-8")
    with pytest.raises(InputError) as refused:
        load_recipe(None, str(tmp_path / "r.yaml"))
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError):
        load_recipe("memit", None, [f"seed={text}"])


def test_layers_beyond_the_model_take_no_memory() -> None:
    with pytest.raises(InputError, match="the model has layers 0 to 3"):
        resolve_layers("0-999999999", 4)
    with pytest.raises(InputError, match="cannot read"):
        resolve_layers("0-" + "9" * 5000, 4)


def test_a_perplexity_beyond_all_numbers_can_be_written_down(tmp_path: Path) -> None:
    model, text = zoo.FAMILIES["llama"](), tmp_path / "text.txt"
    text.write_text("Ada Lovelace was born in London. " * 20, encoding="utf-8")
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("inf"))
    found = perplexity(LayerRunner(inspect_model(model)), read_corpus(text, zoo.tiny_tokenizer()))
    assert json.loads(Perplexity(before=1.0, after=found, ratio=found).model_dump_json())["after"] == WORST


@pytest.mark.parametrize("kind", ["keys", "residuals"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_a_state_that_nothing_can_be_solved_with_is_refused_or_solved(
    kind: str, size: float, place: Place, tmp_path: Path
) -> None:
    folder = fresh(place, tmp_path / "p")
    state = load_file(folder / "state.safetensors")
    changed = {name: tensor * size if name.endswith(kind) else tensor for name, tensor in state.items()}
    save_file(changed, folder / "state.safetensors", {"format": "pt"})
    edit_manifest(folder, lambda fields: fields.update(files=digests_of(folder)))
    place.use(folder, go_on=False)  # which fails for any other error than a refusal


def test_equations_that_cannot_be_solved_are_refused_in_one_line() -> None:
    def unsolvable(problem: Any, settings: Any) -> Any:
        return torch.linalg.cholesky(torch.zeros(2, 2))

    method, site = replace(methods.get("memit"), solve=unsolvable), inspect_model(zoo.FAMILIES["llama"]()).sites[1]
    nothing = torch.zeros(0, dtype=torch.float64)
    problem = problem_at(site, nothing.view(site.d_in, 0), nothing.view(site.d_out, 0), None, None, None)
    with pytest.raises(InputError, match=r"down_proj.weight: memit cannot be solved for these keys and settings"):
        solve_at(method, method.config(), site, problem)
