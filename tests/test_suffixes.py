"""What the value optimizer shares, buckets and halves changes nothing but time and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from patchkit.editing import stems, suffixes
from patchkit.editing.suffixes import Suffixes
from patchkit.editing.value_config import ValueConfig
from patchkit.editing.values import optimize
from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest, build_request, pad
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.prefix import Prefix
from patchkit.model.tuning import ROOM
from tests.helpers import assert_kept_alike
from tests.test_oracle import CONTEXTS, FACTS
from tests.zoo import FAMILIES, KEEPS_OTHER_STATES, tiny_tokenizer

STOPPING = ValueConfig(steps=15, stop_loss=6.4)  # some of the five facts stop early, some never do


def runner_of(family: str = "llama") -> LayerRunner:
    runner = LayerRunner(inspect_model(FAMILIES[family]().double()))
    runner.arch.model.requires_grad_(False)
    return runner


def requests() -> list[EditRequest]:
    return [build_request(fact, tiny_tokenizer(), CONTEXTS) for fact in FACTS]


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_waiting_facts_take_the_place_of_finished_ones(parallel: int) -> None:
    runner, finished = runner_of(), list[int]()
    site = runner.arch.sites[1]
    together = optimize(runner, requests(), site, "layer_out", STOPPING)
    config = STOPPING.model_copy(update={"parallel": parallel})
    found = optimize(runner, requests(), site, "layer_out", config, finished.append)
    assert found.steps.tolist() == together.steps.tolist()
    assert len(set(found.steps.tolist())) > 1
    assert torch.allclose(found.targets, together.targets, rtol=1e-8)
    assert torch.allclose(found.loss, together.loss, rtol=1e-8)
    assert sum(finished) == len(FACTS)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon_sequential", *KEEPS_OTHER_STATES])
def test_a_prefix_read_in_two_pieces_is_the_same(family: str) -> None:
    """Also where a sliding window is shorter than the text, and where positions are told by the mask."""
    runner = runner_of(family)
    texts = [tuple(range(5, 5 + length)) for length in (21, 12, 3)]
    whole = Prefix.read(runner, *pad(texts, runner.device))
    starts = Prefix.read(runner, *pad([text[: 4 * i] for i, text in enumerate(texts)], runner.device, width=1))
    pieces = Prefix.read(runner, *pad([t[4 * i :] for i, t in enumerate(texts)], runner.device), before=starts)
    assert_kept_alike(pieces, whole)


def test_little_of_a_bucket_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROOM, "cpu", replace(ROOM["cpu"], a_pass=0))
    buckets = Suffixes(runner_of(), requests(), 2).buckets(range(len(FACTS)))
    assert sum(len(bucket.row) for bucket in buckets) == len(FACTS) * (len(CONTEXTS) + 1)
    assert len(buckets) < len(FACTS) * (len(CONTEXTS) + 1) / 2
    for bucket in buckets:
        assert 1 - bucket.mask.double().mean() <= stems.PADDING


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_too_much_for_the_memory_is_halved(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of()
    expected = optimize(runner, requests(), runner.arch.sites[1], "layer_out", STOPPING)
    refused = limited(monkeypatch, 3, error)
    found = optimize(runner, requests(), runner.arch.sites[1], "layer_out", STOPPING)
    assert refused
    assert torch.allclose(found.targets, expected.targets, rtol=1e-8)
    assert found.steps.tolist() == expected.steps.tolist()


def test_what_cannot_be_halved_any_more_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    runner = runner_of()
    with pytest.raises(InputError, match="not enough memory"):
        optimize(runner, requests(), runner.arch.sites[1], "layer_out", STOPPING)


def test_another_error_is_not_taken_for_one_of_memory() -> None:
    def work(_: object) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        suffixes.in_parts(work, [1, 2], lambda item: [item, item])


def limited(monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError) -> list[int]:
    """Passes over more than `most` rows after a prefix run out of memory; returns the numbers of rows refused."""
    run, refused = LayerRunner.run, list[int]()

    def short(self: LayerRunner, inputs: dict[str, Any], **options: Any) -> Any:
        rows = len(inputs["input_ids"])
        after = "past_key_values" in inputs and inputs["past_key_values"].get_seq_length() > 0
        if after and rows > most:
            refused.append(rows)
            raise error
        return run(self, inputs, **options)

    monkeypatch.setattr(LayerRunner, "run", short)
    return refused


@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2"])
def test_values_at_several_layers_are_found_in_the_same_passes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, layers = runner_of(family), [0, 1, 0, 1, 1][: len(FACTS)]
    expected, passes, run = dict[int, Any](), list[int](), LayerRunner.run
    for layer in (0, 1):
        some = [request for request, at in zip(requests(), layers, strict=True) if at == layer]
        expected[layer] = optimize(runner, some, runner.arch.sites[layer], "layer_out", STOPPING)

    def noted(self: LayerRunner, inputs: dict[str, Any], **options: Any) -> Any:
        passes.append(options.get("start", 0))
        return run(self, inputs, **options)

    monkeypatch.setattr(LayerRunner, "run", noted)
    found = optimize(runner, requests(), runner.arch.sites[0], "layer_out", STOPPING, layers=layers)
    assert 2 not in passes
    for layer, values in expected.items():
        ours = found.of([place for place, at in enumerate(layers) if at == layer])
        assert torch.allclose(ours.start, values.start, rtol=1e-8)
        assert torch.allclose(ours.targets, values.targets, rtol=1e-8)
        assert ours.steps.tolist() == values.steps.tolist()
