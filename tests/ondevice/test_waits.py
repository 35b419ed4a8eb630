"""How often the host waits for the device: per optimizer step, per bucket, per batch. Each wait leaves a GPU idle.

Counts are differences between two edits that differ in nothing else, so that what a run costs once is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from patchkit import methods
from patchkit.editing.editor import edit
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.methods import Beside
from patchkit.methods.mend import fresh
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.tuning import ROOM
from tests.ondevice import fakegpu
from tests.ondevice.conftest import FACTS, Place
from tests.zoo import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BY_VALUES = [name for name, method in methods.available().items() if method.targets == "values"]
CONTEXTS = ("", "The city. ")


OFTEN = {"alphaedit", "mose-right", "oedit+", "ultraedit", "ft", "wilke"}
"""Methods whose batches differ most in kind; the others are slow tests."""


def each(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in names]


@cache
def _seen(model: PreTrainedModel, method: str, facts: int, settings: tuple[str, ...]) -> fakegpu.Seen:
    runner, chosen = LayerRunner(inspect_model(model)), methods.get(method)
    pinned = ("prompts=contexts", "layers=1-2", "contexts=1", "batch_size=2", "value.steps=3", "value.stop_loss=0")
    config = load_recipe(method, None, [*pinned, *settings])
    sites, draw = plan(runner.arch, config).sites, torch.Generator().manual_seed(0)
    keys = torch.randn(sites[0].d_in, 400, generator=draw, dtype=torch.float64)
    text = Covariance(keys @ keys.T / 400, 400)
    directions = torch.linalg.qr(torch.randn(sites[0].d_out, 8, generator=draw, dtype=torch.float64))[0]
    known = {site.layer: text for site in sites} if chosen.needs_statistics else {}
    network = fresh(sites[0].d_in, sites[0].d_out, rank=8, seed=0) if chosen.needs_network else None
    needed = chosen.needs_gradients or chosen.needs_network
    beside = {site.layer: Beside(directions, network=network) for site in sites} if needed else {}
    edited = [Fact(**FACTS[i]) for i in range(facts)]
    with fakegpu.counting() as seen:
        edit(runner, TOKENIZER, edited, config, known, beside=beside, contexts=CONTEXTS)
    return seen


def seen_in_edit(placed: Place, method: str, facts: int, *settings: str) -> fakegpu.Seen:
    """What an edit of two facts a batch does on one device, contexts and statistics given."""
    return _seen(placed("one"), method, facts, settings)


def more(longer: fakegpu.Seen, shorter: fakegpu.Seen, without: str = " ") -> Counter[str]:
    """Where the longer one waited over and above the shorter one, lines with `without` left out."""
    return Counter({place: n for place, n in (longer.where - shorter.where).items() if without not in place})


@pytest.mark.parametrize("method", each(BY_VALUES))
def test_an_optimizer_step_waits_once(method: str, placed: Place) -> None:
    few, many = (seen_in_edit(placed, method, 2, *steps) for steps in ((), ("value.steps=8",)))
    kind = methods.get(method)
    by_fact, by_layer = (2 if kind.one_by_one else 1), (2 if kind.ends_only or method == "wilke" else 1)
    # How long the algebra of a rotation goes on is decided by its numbers.
    waits = more(many, few, "maths/rotations")
    assert sum(waits.values()) == 5 * by_fact * by_layer, waits


def test_steps_of_the_whole_second_moment_wait_once(placed: Place) -> None:
    full = "value.second_moment=full"
    few, many = (seen_in_edit(placed, "alphaedit", 2, full, f"value.steps={steps}") for steps in (3, 8))
    assert many.waits - few.waits == 5, more(many, few)


def test_steps_of_rows_that_take_turns_wait_once(placed: Place) -> None:
    few, many = (seen_in_edit(placed, "alphaedit", 2, "prompts=in-use", f"value.steps={steps}") for steps in (4, 10))
    assert many.waits - few.waits == 6, more(many, few)


def test_a_step_of_fine_tuning_waits_once_beside_a_forward_pass(placed: Place) -> None:
    """transformers itself looks at the mask of a padded batch."""
    few, many = (seen_in_edit(placed, "ft", 2, f"steps={steps}", "stop_loss=0") for steps in (3, 8))
    waits = more(many, few, "model/forward.py")
    assert sum(waits.values()) == 5, waits


@pytest.mark.parametrize("method", ["alphaedit", pytest.param("mose-right", marks=pytest.mark.slow)])
def test_buckets_wait_when_they_are_made_and_never_again(
    method: str, placed: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps_in_buckets_of(tokens: int) -> tuple[fakegpu.Seen, fakegpu.Seen]:
        monkeypatch.setitem(ROOM, "cuda", replace(ROOM["cuda"], tokens=tokens))
        return seen_in_edit(placed, method, 2, f"seed={tokens}"), seen_in_edit(
            placed, method, 2, f"seed={tokens}", "value.steps=8"
        )

    (whole, _), (split, longer) = steps_in_buckets_of(1024), steps_in_buckets_of(1)
    assert split.kernels > 1.5 * whole.kernels
    assert sum(more(longer, split, "maths/rotations").values()) == 5
    made = more(split, whole, "maths/rotations")  # eight buckets of a row each, where there were two or three
    assert sum(made.values()) <= 8 * 3, made


MOST = {"values": 50, "gradients": 30, "none": 120}
"""Waits in one more batch at two sites, its optimizer steps included, by what a method's residuals are made of."""


@pytest.mark.parametrize("method", each(methods.available()))
def test_a_batch_waits_a_few_times(method: str, placed: Place) -> None:
    one, two = (seen_in_edit(placed, method, facts) for facts in (2, 4))
    waits = more(two, one, "maths/rotations")
    calls = 2 if methods.get(method).one_by_one else 1
    assert sum(waits.values()) <= calls * MOST[methods.get(method).targets], waits.most_common(20)


@pytest.mark.parametrize("method", each(methods.available()))
def test_nothing_of_the_size_of_a_weight_crosses_the_bus_in_a_batch(method: str, placed: Place) -> None:
    one, two = (seen_in_edit(placed, method, facts) for facts in (2, 4))
    site, copied = inspect_model(placed("one")).sites[0], (two.copied - one.copied).most_common(8)
    assert two.uploaded - one.uploaded < 4 * site.d_in * site.d_in, copied
    assert two.downloaded - one.downloaded < 4 * site.d_in * site.d_in, copied
