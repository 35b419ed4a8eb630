"""What follows from a fact: a share worked out by hand, on answers that are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from patchkit.evaluate import portability
from patchkit.evaluate.answers import Ask, Said
from patchkit.evaluate.portability import Portability
from patchkit.evaluate.trial import Found, Trial
from patchkit.facts.schema import Condition, Fact, Probe
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from tests import zoo
from tests.helpers import Command, edited_fact, random_patch

LIMA = {"prompt": "Ada was born in", "subject": "Ada", "target_new": "Lima"}
CAPITAL = Condition(prompt="Lima is the capital of", answers=(("Peru",),))
RIVER = Condition(prompt="Lima lies on the", answers=(("Rimac",),))
ADA = Fact(
    id="ada",
    **LIMA,
    portability={
        "hops": (
            Probe(prompt="Ada's country is", answers=(("Peru", "Republic of Peru"),), conditions=(CAPITAL,)),
            Probe(prompt="Ada's river is", answers=(("Rimac",),), conditions=(RIVER,)),  # which the base does not know
            Probe(prompt="Ada's continent?", alternatives=("Where is Ada from?",), answers=(("South America",),)),
        ),
        "several": (Probe(prompt="Ada's languages are", answers=(("Spanish",), ("Quechua",))),),
    },
)
BOB = Fact(
    id="bob",
    prompt="Bob was born in",
    subject="Bob",
    target_new="Oslo",
    portability={"hops": (Probe(prompt="Bob's country is", answers=(("Norway",),)),)},
)
BASE = {"Ada's country is": "Chile", "Lima is the capital of": "Peru.", "Bob's country is": "Norway"}
PATCHED = {
    "Ada's country is": "the Republic of Peru",
    "Ada's river is": "the Rimac",
    "Where is Ada from?": "South America",
    "Ada's languages are": "Spanish",  # one of two
    "Bob's country is": "Norway Norway Norway",  # repeated, not answered
}


@pytest.fixture
def trial() -> Trial:
    runner = LayerRunner(inspect_model(zoo.FAMILIES["llama"]()))
    return Trial(runner, zoo.tiny_tokenizer(), (ADA, BOB, Fact(id="none", prompt="a b", subject="a", target_new="c")))


def measured(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> Found:
    def saying(texts: Mapping[str, str]) -> None:
        def answer(runner: LayerRunner, tokenizer: object, asks: Mapping[Ask, int]) -> dict[Ask, Said]:
            return {ask: Said(texts.get(ask.text, ""), (), (), None) for ask in asks}  # type: ignore[arg-type]

        monkeypatch.setattr(portability, "answer", answer)

    instrument = Portability()
    saying(BASE)
    base = instrument.base(trial)
    saying(PATCHED)
    return instrument.patched(trial, base)


def test_the_share_is_that_of_what_the_base_has_the_conditions_for(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ada: country and continent of three that count; Bob: not."""
    found = measured(trial, monkeypatch)
    assert found.values == {"held": pytest.approx((2 / 3 + 0) / 2), "before": pytest.approx((0 + 1) / 2)}
    assert found.counts == {"held": 4}
    assert found.details["groups"] == {
        "hops": {"held": pytest.approx((2 / 2 + 0) / 2), "probes": 3},
        "several": {"held": 0.0, "probes": 1},
    }
    country, continent, languages = found.per_fact["ada"]["probes"]
    assert (country["before"], country["after"], country["holds"]) == ("Chile", "the Republic of Peru", True)
    assert continent["prompt"] == "Ada's continent? | Where is Ada from?"
    assert (continent["after"], continent["holds"], languages["holds"]) == (" | South America", True, False)


def test_a_probe_without_room_is_left_out(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    (probe,) = BOB.portability["hops"]
    long = Probe(
        prompt=probe.prompt, answers=probe.answers, conditions=(Condition(prompt="x " * 300, answers=(("x",),)),)
    )
    bob = BOB.model_copy(update={"portability": {"hops": (long,)}})
    found = measured(replace(trial, facts=(bob,)), monkeypatch)
    assert found.values == {"held": None, "before": None}


def test_a_plain_model_is_asked_a_question_and_goes_on_with_anything_else(trial: Trial) -> None:
    asked = Portability().base(replace(trial, facts=(ADA,)))
    assert Ask("Where is Ada from?") in asked
    assert Ask("Ada's country is", message=False) in asked
    assert Ask(CAPITAL.prompt, message=False) in asked


def test_verify_shows_and_gates_what_follows(run: Command, tmp_path: Path) -> None:
    model = zoo.FAMILIES["llama"]()
    base = zoo.save(model, zoo.tiny_tokenizer(), tmp_path / "model")
    follows = {"hops": (Probe(prompt="the country of", answers=(("Rome",),)),)}
    patch = tmp_path / "patch"
    random_patch(model, str(base), [edited_fact(portability=follows)], ranks={1: 1}).save(patch)
    shown = run("verify", patch)
    assert "what follows from the fact is answered: 0.0% -> 0.0%" in " ".join(shown.out.split())
    gated = run("verify", patch, "--json", "--min-portability", 0.5)
    assert (gated.status, gated.json()["more"]["portability"]["held"]) == (1, 0.0)
    assert "portability 0, asked for at least 0.5" in gated.err
    assert "--quick: portability would not be measured" in run("verify", patch, "--quick", "--min-portability", 0).err
