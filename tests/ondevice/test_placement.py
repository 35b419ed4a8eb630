"""Every method and every command on one device, on two, and with layers offloaded: what the CPU computes, they do.

A tensor that meets one from another device, and an operator that no GPU has, raise here as they do there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchkit
from patchkit.editing import sampling
from patchkit.evaluate.generation import Sampling, answers
from patchkit.model.arch import inspect_model
from patchkit.model.devices import has_float64
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import load_model
from patchkit.patch.patch import Patch
from tests.helpers import Command
from tests.ondevice import fakegpu
from tests.ondevice.conftest import FACTS, PLACES, QUICK, Place
from tests.zoo import FAMILIES, save, tiny_tokenizer

OFTEN = {"adaedit", "ft", "mose-right", "oedit", "ultraedit", "wilke", "memit+rect"}
"""Methods that differ most in what they do on a device; the others are slow tests."""
METHODS = (
    *("adaedit", "alphaedit", "emmet", "ft", "memit", "mose", "mose-right", "oedit", "oedit+", "r-rome", "rome"),
    *("ultraedit", "wilke", "memit+nas", "memit+nullspace", "memit+prune", "memit+rect", "alphaedit+sphere"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER = tiny_tokenizer()


def applied(model: PreTrainedModel, method: str, facts: Any = FACTS[:2], onto: Patch | None = None) -> Patch:
    quick = QUICK if "ft" not in method else (*QUICK, "steps=3")
    return patchkit.apply(model, TOKENIZER, facts, method, onto=onto, overrides=quick, say=lambda note: None)


def norms(patch: Patch) -> list[float]:
    return [update.norm for update in patch.manifest.updates]


def same(found: Patch, expected: Patch, tolerance: float = 2e-3) -> bool:
    """Whether two patches hold the same change; sums are added up in another order where layers are elsewhere."""
    pairs = zip(norms(found), norms(expected), strict=True)
    return all(math.isclose(a, b, rel_tol=tolerance) for a, b in pairs) and found.shapes == expected.shapes


def through_everything(model: PreTrainedModel, method: str, folder: Path, quick: bool = False) -> dict[str, Any]:
    """Apply, measure, go on, revert, generate, and back from the file; what came of it. `quick` is `measure`'s."""
    patch = applied(model, method)
    report = patchkit.measure(model, TOKENIZER, patch, quick=quick)
    more = applied(model, method, FACTS[2:3], onto=patch)
    less = patchkit.revert(model, TOKENIZER, more, ["f0"]) if method != "ft" else more
    less.save(folder)
    again = Patch.load(folder)
    said = answers(model, TOKENIZER, lambda: again.attached(model), [FACTS[1]["prompt"]], Sampling(6), compare=True)
    return {
        "norms": [norms(each) for each in (patch, more, less)],
        "summary": report.summary(),
        "said": [(each.patched, each.base) for each in said],
    }


def alike(found: Any, expected: Any) -> bool:
    """Equal, numbers but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=2e-2, abs_tol=1e-3)
    return bool(found == expected)


@pytest.mark.parametrize(
    "method", [pytest.param(each, marks=() if each in OFTEN else pytest.mark.slow) for each in METHODS]
)
def test_every_method_on_two_devices(method: str, placed: Place) -> None:
    assert same(applied(placed("two"), method), applied(placed("cpu"), method))


@pytest.mark.parametrize(("place", "quick"), [("two", False), ("offload", True)])
def test_everything_that_is_done_with_a_patch(place: str, quick: bool, placed: Place, tmp_path: Path) -> None:
    found = through_everything(placed(place), "alphaedit", tmp_path / place, quick)
    assert alike(found, through_everything(placed("cpu"), "alphaedit", tmp_path / "cpu", quick))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_everywhere(method: str, dtype: str, placed: Place, tmp_path: Path) -> None:
    expected = through_everything(placed("cpu", DTYPES[dtype]), method, tmp_path / "cpu", quick=True)
    for place in ("one", "two", "offload"):
        found = through_everything(placed(place, DTYPES[dtype]), method, tmp_path / place, quick=True)
        compared = found.keys() - ({"said"} if dtype == "bfloat16" else set())  # two tokens may be as likely there
        assert all(alike(found[key], expected[key]) for key in compared), place


@pytest.mark.parametrize("place", ["one", pytest.param("offload", marks=pytest.mark.slow)])
def test_half_precision(place: str, placed: Place) -> None:
    found = applied(placed(place, torch.bfloat16), "memit")
    assert same(found, applied(placed("cpu", torch.bfloat16), "memit"), 2e-2)


def test_edits_in_use_on_two_devices(placed: Place) -> None:
    """Rows that take turns, kept texts and rewordings."""
    quick = ("prompts=in-use", "layers=1-2", "value.steps=6")
    patches = [
        patchkit.apply(placed(place), TOKENIZER, FACTS[:2], overrides=quick, say=lambda note: None)
        for place in ("two", "cpu")
    ]
    assert same(*patches)


@pytest.mark.parametrize("prompts", ["contexts", "in-use"])
@pytest.mark.parametrize("family", ["qwen3_5", "granite_hybrid"])
def test_states_of_other_kinds_are_where_their_layers_are(family: str, prompts: str, tmp_path: Path) -> None:
    folder, patches = save(FAMILIES[family](), TOKENIZER, tmp_path / "hybrid"), list[Patch]()
    quick = (*QUICK[1:], f"prompts={prompts}")
    for how in ({}, {"device_map": PLACES["two"]}):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
        patches.append(patchkit.apply(model, TOKENIZER, FACTS[:2], overrides=quick, say=lambda note: None))
    assert same(*patches)


def test_texts_that_are_over_leave_a_batch_on_two_devices(placed: Place) -> None:
    def drawn(place: str) -> list[list[int]]:
        runner = LayerRunner(inspect_model(placed(place)))
        openings = ["The capital of", "Rome is", "Alan Turing"]
        return sampling.sample(
            runner, TOKENIZER, openings, sampling.Sampling(4), is_over=lambda text, ids: len(ids) > text
        )

    assert drawn("two") == drawn("cpu")


# --- float64 where there is none --------------------------------------------------------------------------------------


@pytest.fixture
def without_float64() -> Iterator[None]:
    has_float64.cache_clear()
    with fakegpu.no_float64():
        yield
    has_float64.cache_clear()


@pytest.mark.parametrize("method", ["mose-right", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS)])
@pytest.mark.usefixtures("without_float64")
def test_no_float64_comes_to_a_device_that_has_none(method: str, placed: Place, tmp_path: Path) -> None:
    found = through_everything(placed("one"), method, tmp_path / "one", quick=True)
    assert alike(found, through_everything(placed("cpu"), method, tmp_path / "cpu", quick=True))


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_where_it_will_be(checkpoint: Path) -> None:
    with fakegpu.counting() as seen:
        loaded = load_model(str(checkpoint), "cuda:1", "float32")
    assert {str(parameter.device) for parameter in loaded.model.parameters()} == {"cuda:1"}
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert weights <= seen.uploaded < 1.5 * weights
    assert {str(p.device) for p in load_model(str(checkpoint)).model.parameters()} == {"cuda:0"}


@pytest.mark.parametrize(
    "where", [("--device-map", "auto"), pytest.param(("--device", "cuda:1"), marks=pytest.mark.slow)]
)
def test_commands(where: tuple[str, str], checkpoint: Path, facts: Path, tmp_path: Path, run: Command) -> None:
    out, quick = tmp_path / "patch", [part for setting in QUICK for part in ("--set", setting)]
    model = ["--model", str(checkpoint), *where]
    merged = ["--merge", str(tmp_path / "merged"), "--min-efficacy", "0", "--min-locality", "0"]
    done = run("apply", facts, *model, *quick, "--quick", "--out", out, "--json")
    assert done.status == 0, done.err
    assert run("verify", out, *model, "--quick", "--json").status == 0
    assert run("generate", "Alan Turing was born in", "--patch", out, *model).status == 0
    assert run("revert", out, "--fact", "f1", *model, "--json").status == 0
    assert run("merge", out, "--out", merged[1]).status == 0
    assert json.loads((out / "manifest.json").read_text())["history"][0]["versions"]["device"].startswith("c")


def test_where_a_model_goes_is_said_once(checkpoint: Path, facts: Path, run: Command) -> None:
    ended = run("apply", facts, "--model", checkpoint, "--device", "cuda:1", "--device-map", "auto")
    assert ended.status == 2
    assert "--device-map says already where the model goes" in ended.err
    assert "choose one of: auto, balanced" in run("apply", facts, "--model", checkpoint, "--device-map", "x").err
    assert "--device mps: not usable here" in run("apply", facts, "--model", checkpoint, "--device", "mps").err
