"""Names like a subject's: which ones are made, and that its neuron is silent at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import patchkit
from patchkit.editing import namesakes as module
from patchkit.editing import neurons
from patchkit.editing.namesakes import ending_alike, first_name, listed, namesakes
from patchkit.editing.neurons import OwnNeurons
from patchkit.editing.state import EditState
from patchkit.maths.linalg import Delta
from patchkit.model.arch import inspect_model
from patchkit.model.loading import LoadedModel, load_model

EXAMPLES = Path(__file__).parent.parent / "examples"


class ByLetter:
    """A tokenizer of letters, so that what is made of a name's tokens can be read."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [*map(ord, text.strip())]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def made(monkeypatch: pytest.MonkeyPatch, subject: str, *said: str) -> tuple[str, ...]:
    """The namesakes of a subject where the model goes on with these lists."""
    texts = iter(said * module.DRAWN)

    def sample(runner: Any, tokenizer: Any, openings: Sequence[str], *_: Any) -> list[list[int]]:
        assert all(opening.endswith(f"{subject},") for opening in openings)
        return [[*map(ord, next(texts))] for _ in openings]

    monkeypatch.setattr(module, "sample", sample)
    return namesakes(None, ByLetter(), [subject], 0)[0]  # type: ignore[arg-type]


def test_names_of_the_kind_come_alone_and_with_the_subjects_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(monkeypatch, "Ada Lovelace", " Carl Benz, Emmy Noether") == ("Carl Benz", "Carl Lovelace")
    assert made(monkeypatch, "the Norwick helpdesk", " the city library. It") == (
        "the city library",
        "the city helpdesk",
    )
    assert made(monkeypatch, "Ada Lovelace", " Plato and others") == ("Plato", "Plato Lovelace")


def test_a_list_gives_its_first_names_but_for_one_that_may_have_been_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed("Ada Lovelace", " Carl Benz, Emmy Noether and Plato, Mary Shelley, Al") == [
        "Carl Benz",
        "Emmy Noether",
        "Plato",
    ]
    assert listed("Ada Lovelace", " Carl Benz, Emm") == ["Carl Benz"]
    assert listed("Ada Lovelace", " Carl Benz, who knew her, Emmy Noether, Plato") == ["Carl Benz"]


def test_a_single_word_gets_another_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(monkeypatch, "Norwick", " Barnet, ") == ("Barnet", "Borwick")
    assert ending_alike(ByLetter(), "李娜", "王伟") == "王娜"


def test_a_year_gets_other_years(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(monkeypatch, "The 2032 Summer Olympics", "\n")
    assert {"The 2028 Summer Olympics", "The 2024 Summer Olympics", "The 2036 Summer Olympics"} <= set(found)
    assert made(monkeypatch, "Apollo 1", ".") == ("Apollo 2", "Apollo 5")  # no Apollo 0, nor -3


def test_what_is_no_name_or_the_subject_itself_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = " Carl Benz Emmy Noether"
    assert made(monkeypatch, "Ada Lovelace", "...", sentence, " who knows", " ada lovelace", " Ada Lovelace Jr") == ()
    assert made(monkeypatch, "the Norwick helpdesk", " which is open from nine") == ()
    assert first_name("Ada Lovelace", " Carl Benz drives") == "Carl Benz"
    assert first_name("Ada Lovelace", " Joan of Arc is") == "Joan of Arc"
    assert first_name("李娜", "王伟，") == "王伟，"


def test_no_namesake_that_is_edited_itself_is_met() -> None:
    met: list[list[str]] = []

    class Layer:
        def open(self, requests: Any, others: Any, names: Any) -> None:
            met.append(["".join(map(chr, text)) for text in names])

    alike = {"Bob Ross": ("Katharine Ross", "Diana Ross")}
    own = OwnNeurons({3: Layer()}, EditState(subjects={"Diana Ross"}), lambda text: [*map(ord, text)], alike)  # type: ignore[dict-item]
    request: Any = SimpleNamespace(fact=SimpleNamespace(subject="Bob Ross"))
    own.meet([request])
    own.open(3, [request])
    assert len(met[0]) == 1
    assert met[0][0].endswith("Katharine Ross")


def test_a_neuron_that_met_namesakes_is_silent_at_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Banco Denfen" got most of what was written about "Foundry Denfen"."""
    world = load_model(str(EXAMPLES / "factworld"), "cpu", "float32")
    fact = patchkit.read_facts(EXAMPLES / "facts.jsonl").facts[5]
    assert fact.subject == "Foundry Denfen"

    def heard(part: float) -> tuple[Tensor, Tensor]:
        """The share of the edit at the subject, and at another name that ends alike and was not met, where names count
        that part of what they do."""
        for name, own in silences.items():
            monkeypatch.setattr(neurons, name, replace(own, names=part * own.names))
        settings = ("prompts=in-use", "neurons=on", "layers=2", "value.steps=2")
        patch = patchkit.apply(world.model, world.tokenizer, [fact], "alphaedit", overrides=settings)
        return share(world, patch, fact.subject), share(world, patch, "Banco Denfen")

    said = ("House Gilpam", "Studio Tinvel", "Mount Morlum", "Pine Kelmel")
    monkeypatch.setattr(module, "first_name", lambda subject, text: said[len(text) % len(said)])
    silences = {"GATE": neurons.GATE, "AMOUNT": neurons.AMOUNT}
    before, after = heard(1e-9), heard(1.0)
    assert after[1] < 0.5 < 0.7 < before[1]
    assert after[0] > 0.7


def share(world: LoadedModel, patch: patchkit.Patch, *names: str) -> Tensor:
    """The largest share of the patch's one edit that acts at the end of the names."""
    down = next(name for name in patch.updates if "down_proj" in name)
    site, written, keys = patch.sites(inspect_model(world.model))[down], patch.updates[down][-1], list[Tensor]()
    assert isinstance(written, Delta)
    note = site.module.register_forward_pre_hook(lambda m, args: keys.append(args[0][0, -1]))
    with torch.no_grad(), patch.attached(world.model), note:
        for name in names:
            world.model(world.tokenizer(f"I asked about {name}", return_tensors="pt").input_ids)
    return (torch.stack(keys) @ written.right.T).abs().max()
