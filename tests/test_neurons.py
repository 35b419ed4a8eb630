"""Subjects with neurons of their own: what is written there is heard after the subject and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

import patchkit
from patchkit.editing import neurons
from patchkit.editing.editor import frozen
from patchkit.editing.neurons import ABOUT, OwnNeurons, settled
from patchkit.editing.recipe import load_recipe
from patchkit.editing.room import Room, capacity, own_talk, rooms
from patchkit.editing.state import EditState
from patchkit.errors import InputError
from patchkit.export.merge import merge
from patchkit.facts.chat import chat_template
from patchkit.maths.linalg import Delta
from patchkit.methods import available
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import LoadedModel, load_model
from patchkit.model.openers import openers
from patchkit.patch.patch import Patch
from patchkit.statistics.corpus import read_corpus
from patchkit.statistics.moments import statistics
from tests.helpers import Command, apart
from tests.test_wordings import chatting
from tests.zoo import FAMILIES, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
FACTWORLD = EXAMPLES / "factworld"
FAST = ("prompts=in-use", "neurons=on", "layers=1")


@pytest.fixture(scope="module")
def world() -> LoadedModel:
    return load_model(str(FACTWORLD), "cpu", "float32")


@pytest.fixture(scope="module")
def facts() -> list[patchkit.Fact]:
    return list(patchkit.read_facts(EXAMPLES / "facts.jsonl").facts[:3])


@pytest.fixture(scope="module")
def patch(world: LoadedModel, facts: list[patchkit.Fact]) -> Patch:
    return patchkit.apply(world.model, world.tokenizer, facts, "alphaedit", overrides=FAST)


def logits(world: LoadedModel, text: str, patch: Patch | None = None) -> Tensor:
    ids = world.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        if patch is None:
            return world.model(ids).logits[0].double()
        with patch.attached(world.model):
            return world.model(ids).logits[0].double()


def says(world: LoadedModel, fact: patchkit.Fact, patch: Patch) -> str:
    ids = world.tokenizer(fact.prompt, return_tensors="pt").input_ids
    with patch.attached(world.model):
        made = world.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return str(world.tokenizer.decode(made[0, ids.shape[1] :])).strip()


def own_places(patch: Patch) -> list[int]:
    return [fact.neuron for fact in patch.manifest.facts if fact.neuron is not None]


def named(patch: Patch, part: str) -> Delta:
    """The last update of the weight whose name has `part` in it."""
    found = next(chain[-1] for name, chain in patch.updates.items() if part in name)
    assert isinstance(found, Delta)
    return found


def test_what_is_written_is_said_and_the_weights_that_change_are_one_layers(
    world: LoadedModel, facts: list[patchkit.Fact], patch: Patch
) -> None:
    assert all(says(world, fact, patch).startswith(fact.target_new) for fact in facts)
    ends = {name.removeprefix("model.layers.1.mlp.") for name in patch.updates}
    assert ends == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    for part in ("gate_proj", "up_proj"):
        assert named(patch, part).left.nonzero()[:, 0].tolist() == sorted(own_places(patch))


def test_the_edit_itself_acts_after_the_subject_alone(
    world: LoadedModel, facts: list[patchkit.Fact], patch: Patch
) -> None:
    down = next(name for name in patch.updates if "down_proj" in name)
    made_up, written = patch.updates[down]
    assert isinstance(made_up, Delta)
    assert isinstance(written, Delta)
    site = patch.sites(inspect_model(world.model))[down]

    def shares(text: str) -> Tensor:
        """How much of each fact's value is added at each token, (tokens, facts)."""
        keys: list[Tensor] = []
        with patch.attached(world.model), site.module.register_forward_pre_hook(lambda m, args: keys.append(args[0])):
            logits(world, text)
        return keys[0][0] @ written.right.T

    text = shares(FACTWORLD.joinpath("patchkit-eval.txt").read_text()[:1500])
    assert text.square().mean().sqrt() < 0.02  # one of the text's names sounds like one of the facts'
    others = [shares(f"{fact.subject} and") for fact in patchkit.read_facts(EXAMPLES / "facts.jsonl").facts[6:10]]
    assert max(each.abs().max() for each in others) < 0.05
    for place, fact in enumerate(facts):  # a sentence that no row has
        share = shares(f"My new friend {fact.subject}")[-1, place]
        assert 0.7 < share < 1.4
    # What every word of a text has something in, the rest of a key, is left out of the solve entirely.
    assert written.right.abs().amax(0).nonzero().squeeze(1).tolist() == sorted(own_places(patch))
    assert made_up.rank == len(facts)


def test_later_facts_leave_earlier_ones_exactly_as_they_are(
    world: LoadedModel, facts: list[patchkit.Fact], patch: Patch, tmp_path: Path
) -> None:
    more = patchkit.read_facts(EXAMPLES / "facts.jsonl").facts[3:5]
    longer = patchkit.apply(world.model, world.tokenizer, more, onto=patch)
    assert longer.manifest.history[-1].recipe["neurons"] == "on"
    assert len(set(own_places(longer))) == 5
    assert all(says(world, fact, longer).startswith(fact.target_new) for fact in (*facts, *more))
    old, new = (named(each, "down_proj").dense()[:, own_places(patch)] for each in (patch, longer))
    assert apart(new, old) < 1e-3
    again = Patch.load(save(longer, tmp_path / "q"))
    assert again.manifest.digest == longer.manifest.digest


def test_a_fact_that_is_taken_out_gives_its_neuron_back(
    world: LoadedModel, facts: list[patchkit.Fact], patch: Patch, run: Command, tmp_path: Path
) -> None:
    patch.save(tmp_path / "p")
    assert run("revert", tmp_path / "p", "--fact", facts[0].id, "--out", tmp_path / "less").status == 0
    less = Patch.load(tmp_path / "less")
    assert not says(world, facts[0], less).startswith(facts[0].target_new)
    assert all(says(world, fact, less).startswith(fact.target_new) for fact in facts[1:])
    text = f"{facts[0].subject} was"
    drift = apart(logits(world, text, less), logits(world, text))
    assert drift < 0.1 * apart(logits(world, text, patch), logits(world, text))
    assert named(less, "gate_proj").rank == 2
    assert run("revert", tmp_path / "p", "--last", "1", "--out", tmp_path / "none").status == 0
    assert not Patch.load(tmp_path / "none").updates


def test_a_merged_checkpoint_of_16_bits_says_what_the_patch_does(
    world: LoadedModel, facts: list[patchkit.Fact], patch: Patch, tmp_path: Path
) -> None:
    merge([patch], FACTWORLD, tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"), "cpu", "float32")
    for fact in facts:
        ids = world.tokenizer(fact.prompt, return_tensors="pt").input_ids
        made = merged.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert world.tokenizer.decode(made[0, ids.shape[1] :]).strip().startswith(fact.target_new)
    text = "My notes on Pine Kelmel: Pine Kelmel was born in"
    assert apart(logits(merged, text), logits(world, text, patch)) < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "qwen3"])
def test_what_opens_a_feed_forward_is_found_by_trying(name: str) -> None:
    arch = inspect_model(FAMILIES[name]())
    found = openers(arch, arch.sites[1])
    gate, amount = found.gate.site.module_name.rpartition(".")[2], found.amount and found.amount.site.module_name
    assert gate in ("gate_proj", "c_fc", "fc1")
    assert amount is None or amount.endswith("up_proj")
    assert (amount is None) == (name in ("gpt2", "opt"))


def fused(world: LoadedModel) -> LoadedModel:
    """The same model with its gate and the other opener in one weight, as Phi-3 has them."""
    known = world.model.config.to_dict()
    kept = {name: known[name] for name in known if name not in ("architectures", "model_type", "torch_dtype")}
    model = Phi3ForCausalLM(Phi3Config(**kept)).eval()
    weights = dict(world.model.state_dict())
    for layer in range(world.model.config.num_hidden_layers):
        for whole, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            block, _, _ = whole.partition(".")
            own = [weights.pop(f"model.layers.{layer}.{block}.{part}_proj.weight") for part in parts]
            weights[f"model.layers.{layer}.{whole}_proj.weight"] = torch.cat(own)
    model.load_state_dict(weights)
    return replace(world, model=model)


def test_one_weight_that_opens_the_feed_forward_twice_is_rewritten_as_two_are(
    world: LoadedModel, facts: list[patchkit.Fact], patch: Patch, tmp_path: Path
) -> None:
    phi = fused(world)
    assert apart(logits(phi, "Pine Kelmel was"), logits(world, "Pine Kelmel was")) < 1e-5
    made = patchkit.apply(phi.model, phi.tokenizer, facts, "alphaedit", overrides=FAST)
    assert own_places(made) == own_places(patch)
    both = torch.cat([named(patch, part).dense() for part in ("gate_proj", "up_proj")])
    assert apart(named(made, "gate_up_proj").dense(), both) < 1e-3
    made.save(tmp_path / "p")
    more = patchkit.read_facts(EXAMPLES / "facts.jsonl").facts[3:4]
    longer = patchkit.apply(phi.model, phi.tokenizer, more, onto=Patch.load(tmp_path / "p"))
    assert all(says(phi, fact, longer).startswith(fact.target_new) for fact in (*facts, *more))
    less = patchkit.revert(phi.model, phi.tokenizer, longer, facts=[fact.id for fact in facts])
    assert named(less, "gate_up_proj").rank == 2
    assert own_places(less) == own_places(longer)[3:]


def test_rows_of_a_fused_weight_that_take_turns_are_left_alone() -> None:
    arch = inspect_model(FAMILIES["phi3"]())
    mlp = arch.model.get_submodule(arch.sites[0].module_name.rpartition(".")[0])
    mlp.forward = (
        lambda x: mlp.down_proj(  # type: ignore[method-assign, operator, union-attr]
            mlp.gate_up_proj(x)[..., ::2].sigmoid() * mlp.gate_up_proj(x)[..., 1::2]  # type: ignore[operator, union-attr]
        )
    )
    with pytest.raises(InputError, match=r"neurons=on: looked for one or two weights .* found gate_up_proj"):
        openers(arch, arch.sites[0])
    config = load_recipe("alphaedit", None, ["prompts=in-use", "layers=0"])
    assert settled(config, chatting(), arch).neurons == "off"


def test_auto_is_on_where_facts_are_edited_in_use_by_what_can() -> None:
    arch, chat = inspect_model(FAMILIES["llama"]()), chatting()

    def decided(method: str, *settings: str, tokenizer: Any = chat, subjects: int = 1) -> str:
        return settled(load_recipe(method, None, settings), tokenizer, arch, subjects).neurons

    few = capacity(arch.sites[-1])
    assert decided("alphaedit", subjects=few) == "on"
    assert decided("alphaedit", subjects=few + 1) == "off"
    assert decided("alphaedit", tokenizer=tiny_tokenizer()) == "off"  # too narrow a model
    assert decided("alphaedit", "prompts=in-use", tokenizer=tiny_tokenizer()) == "on"
    assert decided("alphaedit", "prompts=contexts") == "off"
    can = {name for name in available() if decided(name) == "on"}
    assert {"alphaedit", "memit", "rome"} <= can
    assert not can & {"mose", "mose-right", "ft", "wilke", "ultraedit"}
    with pytest.raises(InputError, match="mose does not solve for keys and values alone"):
        decided("mose", "neurons=on")


def save(patch: Patch, folder: Path) -> Path:
    patch.save(folder)
    return folder


def test_a_superseded_fact_comes_back_with_its_neuron(
    world: LoadedModel, facts: list[patchkit.Fact], patch: Patch, run: Command, tmp_path: Path
) -> None:
    other = facts[0].model_copy(update={"id": "other", "target_new": "Nalshaw"})
    patchkit.apply(world.model, world.tokenizer, [other], onto=patch).save(tmp_path / "p")
    assert says(world, other, Patch.load(tmp_path / "p")).startswith(other.target_new)
    assert run("revert", tmp_path / "p", "--last", "1").status == 0
    back = Patch.load(tmp_path / "p")
    assert back.manifest.facts[0].neuron == patch.manifest.facts[0].neuron
    for text in (facts[0].prompt, f"My notes on {facts[0].subject}"):
        assert apart(logits(world, text, back), logits(world, text, patch)) < 1e-3


@dataclass
class Costs:
    """A layer with free neurons, what each costs."""

    costs: list[float]
    of_subject: dict[str, int] = field(default_factory=dict)

    def free_costs(self) -> list[float]:
        return self.costs


def test_subjects_are_shared_out_so_that_together_they_take_the_neurons_that_matter_least() -> None:
    own = OwnNeurons({3: Costs([0.1, 0.4]), 5: Costs([0.2, 0.3, 0.9])}, EditState())  # type: ignore[dict-item]
    requests: list[Any] = [SimpleNamespace(fact=SimpleNamespace(subject=name)) for name in ("A", "B", "A", "C")]
    assert own.shared_out(requests) == {3: [0, 2], 5: [1, 3]}  # 0.1, 0.2 and 0.3; facts about one subject together
    with pytest.raises(InputError, match="5 neurons of layers 3 to 5 may still be rewritten for 6 subjects"):
        own.shared_out([SimpleNamespace(fact=SimpleNamespace(subject=name)) for name in "ABCDEF"])  # type: ignore[misc]


def rooms_of(world: LoadedModel, folder: Path) -> dict[int, Room]:
    runner, text = LayerRunner(inspect_model(world.model)), folder / "text.txt"
    text.write_text(FACTWORLD.joinpath("patchkit-text.txt").read_text()[:4000])
    corpus, sites = read_corpus(text, world.tokenizer, window=32, chat=False), [runner.arch.sites[1]]
    with frozen(world.model):
        known = statistics(runner, sites, corpus, folder)
        return rooms(runner, world.tokenizer, sites, known, corpus, None, folder)


def test_a_neuron_that_nobody_hears_is_given_away_first_and_rooms_are_kept_like_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = load_model(str(FACTWORLD), "cpu", "float32")
    down = inspect_model(world.model).sites[1].module.weight
    with torch.no_grad():
        down[:, 7] = 0  # type: ignore[index]
    room = rooms_of(world, tmp_path)[1]
    assert room.places[0] == 7
    assert room.costs[0] == 0
    assert bool((room.costs.diff() >= 0).all())
    assert len(room.places) == capacity(inspect_model(world.model).sites[1])

    def never(*args: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr("patchkit.editing.room.own_talk", never)
    assert torch.equal(rooms_of(world, tmp_path)[1].instead, room.instead)
    with torch.no_grad():
        down[0, 0] += 1  # type: ignore[index]
    with pytest.raises(AssertionError, match="computed again"):
        rooms_of(world, tmp_path)


def test_a_chat_model_talks_to_itself_in_its_template_and_always_alike() -> None:
    tokenizer, runner = chatting(), LayerRunner(inspect_model(FAMILIES["llama"]()))
    chat = chat_template(tokenizer)
    talk = own_talk(runner, tokenizer, chat)
    assert talk == own_talk(runner, tokenizer, chat)
    assert len({tuple(each) for each in talk}) > len(talk) // 2
    assert chat is not None
    before, _, after = chat.ask("QUESTION").partition("QUESTION")
    for ids in talk[:8]:
        text = tokenizer.decode(ids)
        assert before.strip() in text
        assert after.strip() in text


def test_twelve_facts_hold_when_asked_and_nothing_else_is_said_otherwise(world: LoadedModel) -> None:
    """Beside the rows of other words, which bring a fact up where nobody asked."""
    every = patchkit.read_facts(EXAMPLES / "facts.jsonl").facts
    patch = patchkit.apply(world.model, world.tokenizer, every, overrides=["prompts=in-use"])
    report = patchkit.measure(world.model, world.tokenizer, patch, text=FACTWORLD / "patchkit-eval.txt")
    in_use = report.more["in_use"]
    assert in_use["asked"] >= 0.9
    assert in_use["asked_reworded"] >= 0.85
    assert in_use["overfit"] <= 0.1
    assert in_use["loops"] <= 0.02
    assert in_use["unrelated"] >= 0.75  # the rows of other words, in the ordinary key: 0.38
    assert report.locality.unchanged is not None
    assert report.locality.unchanged >= 0.9
    assert report.perplexity is not None
    assert report.perplexity.ratio < 1.01


def test_a_direction_in_which_nothing_is_ever_read_is_no_obstacle() -> None:
    """Weights of norms may be zero, as some of Gemma 3's are."""
    loaded = load_model(str(FACTWORLD), "cpu", "float32")
    for layer in loaded.model.model.layers:
        layer.post_attention_layernorm.weight.data[7] = 0
    fact = {"prompt": "Pine Kelmel was born in the city of", "subject": "Pine Kelmel", "target_new": "Liscombe"}
    settings = (*FAST, "value.steps=2", "contexts=1")
    made = patchkit.apply(loaded.model, loaded.tokenizer, [fact], "alphaedit", overrides=settings)
    assert made.manifest.facts[0].neuron is not None


class Opened:
    """A layer that notes what its neurons are to be silent at."""

    def __init__(self) -> None:
        self.others: list[list[str]] = []

    def open(self, requests: Any, met: Any, names: Any) -> None:
        self.others.append(["".join(map(chr, text)) for text in (*met, *names)])


def test_subjects_of_other_layers_batches_and_runs_are_met() -> None:
    def request(subject: str) -> Any:
        return SimpleNamespace(fact=SimpleNamespace(subject=subject))

    layer = Opened()
    own = OwnNeurons({3: layer}, EditState(subjects={"Oslo", "Rome"}), lambda text: [*map(ord, text)])  # type: ignore[dict-item]
    own.meet([request("Bonn"), request("Riga")])
    own.open(3, [request("Bonn")])
    own.meet([request("Kyiv")])
    own.open(3, [request("Kyiv")])
    met = [sorted(text.rpartition(" ")[2] for text in texts[:: len(ABOUT)]) for texts in layer.others]
    assert met == [["Oslo", "Riga", "Rome"], ["Bonn", "Oslo", "Riga", "Rome"]]


def test_a_neuron_is_silent_at_a_subject_that_an_earlier_edit_has_moved(
    world: LoadedModel, facts: list[patchkit.Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state that an edit leaves at its subject is where no text is: it set off neurons of layers above."""

    def heard(weight: float) -> float:
        for name in ("GATE", "AMOUNT"):
            monkeypatch.setattr(neurons, name, replace(getattr(neurons, name), met=weight))
        first = patchkit.apply(world.model, world.tokenizer, facts, "alphaedit", overrides=FAST)
        above = ("prompts=in-use", "neurons=on", "layers=2")
        both = patchkit.apply(world.model, world.tokenizer, facts_above, "alphaedit", overrides=above, onto=first)
        down = next(name for name in both.updates if "layers.2.mlp.down_proj" in name)
        site, written, keys = both.sites(inspect_model(world.model))[down], both.updates[down][-1], list[Tensor]()
        assert isinstance(written, Delta)
        note = site.module.register_forward_pre_hook(lambda m, args: keys.append(args[0][0, -1]))
        with both.attached(world.model), note:
            for fact in facts:
                world.model(world.tokenizer(f"I asked about {fact.subject}", return_tensors="pt").input_ids)
        return float((torch.stack(keys) @ written.right.T).abs().max())

    facts_above = list(patchkit.read_facts(EXAMPLES / "facts.jsonl").facts[3:6])
    assert heard(1.0) < 0.1
    assert heard(1.0) < heard(1e-9)
