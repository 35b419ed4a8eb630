"""Texts that a model goes on with: the same however they are read, and no longer than is wanted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from patchkit.editing.sampling import Sampling, draw, sample
from patchkit.editing.teacher import TOKENS, WORDS, _before_target, _is_over
from patchkit.facts.requests import encode_prompt
from patchkit.facts.schema import Fact
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from tests.zoo import FAMILIES, KEEPS_OTHER_STATES, tiny_tokenizer

BEGINNINGS = ("Paris is the city of", "Rome")
OPENINGS = [f"{before} {subject}" for before in BEGINNINGS for subject in ("Paris", "Bach", "Ada")]
HOW, SEEDS = Sampling(8, choices=5), [1, 2, 3, 4, 5, 6]
ROME = Fact(id="rome", prompt="The capital of Italy is", subject="Italy", target_new="New York")


def runner_of(family: str = "llama") -> LayerRunner:
    return LayerRunner(inspect_model(FAMILIES[family]().double()))


def test_an_end_that_the_model_cannot_write_is_none() -> None:
    """Some checkpoints name tokens in their generation_config that the head has no row for."""
    runner = runner_of()
    runner.arch.model.generation_config.eos_token_id = [1, runner.vocabulary]
    assert all(1 not in ids for ids in sample(runner, tiny_tokenizer(), OPENINGS, replace(HOW, to_end=False), SEEDS))


def test_what_is_drawn_does_not_hang_on_stems(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, tokenizer = runner_of(), tiny_tokenizer()
    whole = sample(runner, tokenizer, OPENINGS, HOW, SEEDS)
    ran = tokens_run(monkeypatch)
    runner.room = replace(runner.room, a_pass=0)
    assert sample(runner, tokenizer, OPENINGS, HOW, SEEDS) == whole
    assert sum(ran) - HOW.tokens * len(OPENINGS) < sum(len(encode_prompt(tokenizer, each)) - 1 for each in OPENINGS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", *KEEPS_OTHER_STATES])
def test_a_text_that_is_over_is_drawn_no_further_and_the_others_are_as_they_were(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, tokenizer, wanted = runner_of(family), tiny_tokenizer(), [2, 8, 1, 3, 8, 2]
    whole = draw(runner, tokenizer, OPENINGS, HOW, SEEDS)
    ran = tokens_run(monkeypatch)
    found = draw(runner, tokenizer, OPENINGS, HOW, SEEDS, lambda place, ids: len(ids) == wanted[place])
    assert [each.tokens for each in found] == [each.tokens[:n] for each, n in zip(whole, wanted, strict=True)]
    assert [each.likeliest for each in found] == [each.likeliest[:n] for each, n in zip(whole, wanted, strict=True)]
    assert ran[-8:] == [6, 6, 3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "text",
    ["Italy is ruled from New York", "Italy is old.\nIts capital is New York", "Italy " + "is " * 12 + "New York"],
)
def test_a_rewording_is_over_when_nothing_makes_it_another(text: str) -> None:
    words = text.split(" ")
    texts = [" ".join(words[:count]) for count in range(2, len(words) + 1)]
    ends = [_before_target(ROME, each) for each in texts]
    over = [_is_over(ROME, each.removeprefix("Italy")) for each in texts]
    assert over[-1] or len(words) - 1 > TOKENS
    first = over.index(True)
    assert len(set(ends[first:])) == 1
    assert not any(ends[:first])
    assert sum(WORDS) < TOKENS


def tokens_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens, without padding, each pass runs from here on."""
    run, found = LayerRunner.run, list[int]()

    def noted(self: LayerRunner, inputs: dict[str, Any], **options: Any) -> Any:
        ids = inputs["input_ids"]
        found.append(int(inputs["attention_mask"][:, -ids.shape[1] :].sum()))
        return run(self, inputs, **options)

    monkeypatch.setattr(LayerRunner, "run", noted)
    return found
