"""Thousands of damaged and forged patches, and of recipes and manifests made up at random; tests/test_damage.py and
tests/test_fuzz_facts.py have a few of each. Seeds are fixed, and counts are printed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchkit import InputError
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.editing.value_config import ValueConfig
from patchkit.patch.card import model_card
from patchkit.patch.provenance import provenance
from patchkit.patch.stored import parsed, with_digest
from tests.reliability.damage import Place, change
from tests.test_damage import damage_often, flip_bits, forge_often

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200), pytest.mark.filterwarnings("ignore")]
USUAL = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
KEYS = [*EditConfig.model_fields, *ValueConfig.model_fields, "preserve", "damping", "ridge", "null_energy", "x", ""]
NAMES = ["memit", "alphaedit", "rome", "ft", "mose", "memit+nas", "oedit+", "nobody", "+", "memit" + "+nas" * 500]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**30)
    | st.floats()
    | st.dates().map(str)
    | st.sampled_from([*NAMES, "4-8", "14%-27%", "0-9999999999", "9" * 5000, "auto", "on", ".inf", "1:2:3", "0x", "="])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)
RECIPES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("damage"))


def test_a_thousand_bits_of_every_file(place: Place, tmp_path: Path) -> None:
    flip_bits(place, tmp_path / "p", 1000)


def test_seven_thousand_damaged_folders(place: Place, tmp_path: Path) -> None:
    print(f"\ndamaged: {dict(damage_often(place, tmp_path / 'p', 7000))}")


@pytest.mark.parametrize("seed", range(5))
def test_five_times_a_thousand_forged_folders(seed: int, place: Place, tmp_path: Path) -> None:
    print(f"\nforged: {dict(forge_often(place, tmp_path / 'p', 1000, seed))}")


def tried_recipe(folder: Path, data: bytes, overrides: list[str]) -> str:
    """What comes of a recipe of these bytes: its digest, or why it is refused."""
    file = folder / "r.yaml"
    file.write_bytes(data)
    try:
        return load_recipe(None, str(file), overrides).digest()
    except InputError as error:
        return str(error)


@given(
    recipe=RECIPES,
    method=st.sampled_from(NAMES) | VALUES,
    broken=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=2),
    override=st.tuples(st.sampled_from(KEYS), VALUES).map(lambda pair: f"{pair[0]}={json.dumps(pair[1], default=str)}"),
)
@settings(USUAL, max_examples=50_000)
def test_fifty_thousand_recipes(
    tmp_path_factory: pytest.TempPathFactory, recipe: Any, method: Any, broken: Any, override: str
) -> None:
    data = bytearray(yaml.safe_dump({"method": method, **recipe}).encode("utf-8", "replace"))
    for at, new in broken:
        data[at : at + len(new)] = new
    assert 0 < len(tried_recipe(tmp_path_factory.getbasetemp(), bytes(data), [override])) < 20_000


def test_fifty_thousand_manifests(place: Place) -> None:
    text, draw, found = (place.original / "manifest.json").read_text(encoding="utf-8"), Random(23), Counter[str]()
    for _ in range(50_000):
        fields = json.loads(text)
        fields.pop("sha256")
        change(draw, fields)
        data = bytearray(with_digest(fields).encode())
        if draw.random() < 0.3:
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 9)] = draw.randbytes(draw.randint(0, 9))
        try:
            stored = parsed(bytes(data), "manifest.json")
        except InputError:
            found["refused"] += 1
            continue
        assert model_card(stored.manifest, "title")
        assert provenance(stored.manifest, stored.files)
        found["read"] += 1
    print(f"\nmanifests: {dict(found)}")
    assert found["read"] > 1000
