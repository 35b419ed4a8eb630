"""Recipes and overrides: the layers they mean, the keys they may have, and a digest that tells two apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchkit.editing.recipe import layers_of, load_recipe, resolve_layers
from patchkit.editing.value_config import ValueConfig
from patchkit.errors import InputError


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("3", 12, [3]),
        ("4-8", 12, [4, 5, 6, 7, 8]),
        ("8, 4", 12, [4, 8]),
        ("0-1,1-2", 12, [0, 1, 2]),
        ("25%-50%", 12, [3, 4, 5, 6]),
        ("14%-27%", 48, [6, 7, 8, 9, 10, 11, 12]),  # around GPT-J's and GPT-2 XL's published ones
        ("50%", 4, [2]),
        ("0%-99%", 4, [0, 1, 2, 3]),
    ],
)
def test_layers(layers: str, depth: int, expected: list[int]) -> None:
    assert resolve_layers(layers, depth) == expected


@pytest.mark.parametrize("layers", ["", "a", "1-", "-1", "1..3", "5-4", "12", "11-12", "100%", "1,,2"])
def test_layers_that_make_no_sense_are_refused_in_the_users_words(layers: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_layers(layers, 12)
    assert str(caught.value).startswith(f'layers "{layers}": ')


def test_an_override_finds_its_section_by_itself() -> None:
    short = load_recipe("memit", None, ["preserve=7", "steps=3", "seed=5", "layers=8"])
    long = load_recipe("memit", None, ["settings.preserve=7", "value.steps=3", "seed=5", 'layers="8"'])
    assert short == long
    assert (short.settings["preserve"], short.value.steps, short.seed, short.layers) == (7.0, 3, 5, "8")


@pytest.mark.parametrize(
    ("method", "old", "new", "value"),
    [("mose-right", "still", "identity_weight", 0.5), ("oedit+", "aimed", "constrain_values", False)],
)
def test_a_setting_keeps_its_old_name_as_an_alias(method: str, old: str, new: str, value: object) -> None:
    for override in (f"{old}={value}", f"settings.{old}={value}", f"{new}={value}"):
        assert load_recipe(method, None, [override]).settings[new] == value
    stored = load_recipe(method).model_dump()
    stored["settings"][old] = stored["settings"].pop(new)  # as in the manifest of an earlier patch
    assert load_recipe(None, None, (), stored) == load_recipe(method)
    assert load_recipe(None, None, [f"{new}={value}"], stored).settings[new] == value
    assert (
        load_recipe(f"{method}+nas" if method == "oedit+" else method, None, [f"{old}={value}"]).settings[new] == value
    )


def test_of_two_overrides_the_later_one_counts() -> None:
    assert load_recipe("rome", None, ["steps=3", "value.steps=4"]).value.steps == 4


def test_what_a_recipe_leaves_out_is_at_its_default_and_written_out(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: alphaedit\nlayers: 5\nvalue: {clamp: 1.5}\n")
    config = load_recipe(None, str(tmp_path / "r.yaml"))
    assert config.layers == "5"
    assert config.value == ValueConfig(clamp=1.5)
    assert set(config.settings) == {"null_energy", "ridge"}


@pytest.mark.parametrize(
    "override",
    [
        "value.steps=0",
        "value.clamp=-1",
        "value.learning_rate=.nan",
        "batch_size=0",
        "contexts=-1",
        "sweeps=0",
        "seed=half",
        "null_energy=1",
        "preserve=3",  # another method's
        "value=3",
        "value.steps.more=3",
        "method=rom",
        "=3",
        "steps",
    ],
)
def test_a_setting_out_of_its_range_is_refused(override: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("alphaedit", None, [override])
    assert "\n" not in str(caught.value)


def test_the_digest_tells_settings_apart_and_not_how_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: memit\nseed: 4\n")
    digest = load_recipe("memit", None, ["seed=4"]).digest()
    assert load_recipe(None, str(tmp_path / "r.yaml")).digest() == digest
    assert load_recipe("memit", None, ["seed=5"]).digest() != digest
    assert load_recipe("rome", None, ["seed=4"]).digest() != digest
    assert load_recipe("memit", None, ["seed=4", "damping=0.5"]).digest() != digest


def test_a_patch_from_before_edits_in_use_goes_on_as_it_began() -> None:
    earlier = {"method": "memit", "contexts": 3, "value": {"steps": 7}}
    old, new = load_recipe(None, None, [], earlier), load_recipe(None, None, [], {**earlier, "prompts": "in-use"})
    assert (old.prompts, old.chat, old.value.steps) == ("contexts", "off", 7)
    assert new.prompts == "in-use"
    assert load_recipe("memit").prompts == "auto"


@pytest.mark.parametrize(("depth", "layers"), [(30, [16, 17, 18, 19]), (5, [2]), (12, [6, 7]), (32, [17, 18, 19, 20])])
def test_a_third_of_the_layers_come_after_a_neuron_of_its_own(depth: int, layers: list[int]) -> None:
    config = load_recipe("alphaedit", None, ["neurons=on"])
    assert layers_of(config, depth) == layers
    assert layers_of(load_recipe("alphaedit", None, ["neurons=on", "layers=80%"]), 30) == [24]
    assert layers_of(load_recipe("alphaedit", None, ["neurons=off"]), 30) == [4, 5, 6, 7, 8]
