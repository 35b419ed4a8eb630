"""What texts have in common is read once, and they come out as if each had been read by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from patchkit.editing import stems
from patchkit.facts.requests import pad
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.prefix import Prefix
from patchkit.model.tuning import ROOM
from tests.helpers import assert_kept_alike
from tests.zoo import FAMILIES, KEEPS_OTHER_STATES

SYSTEM, ASKED, TOLD = tuple(range(5, 15)), tuple(range(20, 24)), tuple(range(30, 33))
TEXTS = [
    *((*SYSTEM, *ASKED, n, 50) for n in (1, 2, 3)),
    *((*SYSTEM, *TOLD, n) for n in (1, 2)),
    (60, 61, 62),
    (63,),
]


def runner_of(family: str = "llama") -> LayerRunner:
    return LayerRunner(inspect_model(FAMILIES[family]().double()))


def test_the_stems_are_those_that_save_the_most() -> None:
    """One for all five would save 40 tokens; one each for the three and the two saves 2 · 14 + 13."""
    assert stems.stem_lengths(TEXTS) == [14, 14, 14, 13, 13, 0, 0]
    assert stems.stem_lengths(TEXTS[1:4]) == [10] * 3
    many = [(*SYSTEM, n, n + 1, 9) for n in range(20, 60, 2)]
    assert stems.stem_lengths([*TEXTS[:2], *many]) == [10] * 22


def test_a_texts_last_token_is_of_no_stem() -> None:
    assert stems.stem_lengths([SYSTEM, SYSTEM, (*SYSTEM, 1)]) == [9, 9, 9]
    assert stems.stem_lengths([(1,), (1,)]) == [0, 0]


def test_texts_that_each_extend_the_one_before_have_stems_however_many() -> None:
    assert max(stems.stem_lengths([tuple(range(1 + n)) for n in range(1500)])) == 750


def test_texts_that_end_where_a_longer_stem_goes_on_share_what_they_have() -> None:
    assert stems.stem_lengths([(0, 5), (0, 6), (0, 0, 2, 1), (0, 0, 3, 1)]) == [1, 1, 2, 2]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon_sequential", *KEEPS_OTHER_STATES])
def test_texts_with_stems_are_read_as_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a sliding window is shorter than the text, and where positions are told by the mask."""
    monkeypatch.setitem(ROOM, "cpu", replace(ROOM["cpu"], a_pass=0))
    runner, ran = runner_of(family), list[int]()
    expected = Prefix.read(runner, *pad(TEXTS, runner.device))
    counting(monkeypatch, ran)
    found = stems.read(runner, TEXTS)
    assert sum(ran) == stems.tokens_read(TEXTS, 0) < 0.6 * sum(map(len, TEXTS))
    assert_kept_alike(found, expected)
    lower = stems.read(runner, TEXTS, stop=1)
    assert_kept_alike(Prefix(lower.layers[:1], lower.mask), Prefix(found.layers[:1], found.mask))
    assert all(part.shape[2] == found.mask.shape[1] for layer in lower.layers[1:] for part in layer.attention or ())


@pytest.mark.parametrize("family", ["llama", "gpt2", *KEEPS_OTHER_STATES])
def test_what_comes_after_stems_predicts_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROOM, "cpu", replace(ROOM["cpu"], a_pass=0))
    runner = runner_of(family)
    places = list[int]()
    for rest in stems.rests(runner, TEXTS):
        logits = runner.run(rest.inputs()).logits
        assert logits is not None
        for row, place in enumerate(rest.places):
            alone = runner.run({"input_ids": torch.tensor([TEXTS[place]]), "use_cache": False}).logits
            assert alone is not None
            ours = logits[row, int(rest.mask[row].sum()) - 1]
            assert torch.allclose(ours, alone[0, -1], atol=1e-4 if runner.runs_on else 1e-9)  # recurrences in float32
        places += rest.places
    assert sorted(places) == list(range(len(TEXTS)))


def test_the_states_of_no_more_stems_are_held_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of ten thousand facts asks hundreds of thousands of texts, whose stems would fill the memory."""
    monkeypatch.setitem(ROOM, "cpu", replace(ROOM["cpu"], a_pass=0))
    runner, texts = runner_of(), [(*SYSTEM, n, n + 1, m) for n in range(20, 80) for m in (1, 2)]
    whole = stems.read(runner, texts)
    monkeypatch.setattr(stems, "HELD", 130)
    parts = list(stems.rests(runner, texts))
    assert all(part.before is not None and part.before.mask.numel() <= 130 for part in parts)
    assert sorted(place for part in parts for place in part.places) == list(range(len(texts)))
    found = stems.read(runner, texts)
    assert_kept_alike(found, whole)


def counting(monkeypatch: pytest.MonkeyPatch, ran: list[int]) -> None:
    """Note how many tokens, without padding, each pass runs."""
    run = LayerRunner.run

    def noted(self: LayerRunner, inputs: dict[str, Any], **options: Any) -> Any:
        ids = inputs["input_ids"]
        ran.append(int(inputs["attention_mask"][:, -ids.shape[1] :].sum()))
        return run(self, inputs, **options)

    monkeypatch.setattr(LayerRunner, "run", noted)
