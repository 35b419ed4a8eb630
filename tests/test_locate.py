"""`patchkit locate` finds the layer in which a fact was planted, and its numbers are the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import patchkit
from patchkit.editing.recipe import load_recipe, resolve_layers
from patchkit.errors import InputError
from patchkit.facts.schema import Fact
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import load_model
from patchkit.patch.patch import Patch
from patchkit.runs.locate import Layer, locate, recommended
from patchkit.runs.tracing import trace
from tests import zoo
from tests.helpers import Command, command_line
from tests.test_report import Elements

FACTWORLD = Path(__file__).parents[1] / "examples" / "factworld"
FACTS = patchkit.read_facts(str(FACTWORLD.parent / "facts.jsonl"), limit=3).facts


def runner_of(model: Any) -> LayerRunner:
    return LayerRunner(inspect_model(model))


def deep_llama() -> LlamaForCausalLM:
    """A random model of five layers."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.1, **shape)).float().eval()


def planted(model: LlamaForCausalLM, layer: int, ids: Tensor, target: int) -> None:
    """Make a layer's feed-forward write `target`'s direction of the head for the key at the end of a text."""
    module, seen = model.model.layers[layer].mlp.down_proj, list[Tensor]()
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        stream = model(ids, output_hidden_states=True).hidden_states[-2][0, -1]
        handle.remove()
        model.lm_head.weight *= 3  # so that a direction of the head is a sure answer
        direction = torch.nn.functional.normalize(model.lm_head.weight[target], dim=0)
        module.weight += torch.outer(4 * stream.norm() * direction, seen[0]) / seen[0].square().sum()


def test_layers_that_read_the_keys_and_values_of_a_lower_one_are_traced_and_not_recommended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of Gemma 4's, which are run from the lower one on."""
    model, tokenizer = zoo.FAMILIES["gemma4"](), zoo.tiny_tokenizer()
    fact = Fact(id="f", prompt="the friend of Ada Lovelace", subject="Ada Lovelace", target_new="Rome")
    found = trace(runner_of(model), tokenizer, fact)
    layer = model.model.layers[3]
    with torch.no_grad():
        out = model(**tokenizer(fact.prompt, return_tensors="pt"), output_hidden_states=True).hidden_states[-2]
        added = list[Tensor]()
        hook = layer.post_feedforward_layernorm.register_forward_hook(lambda _, args, output: added.append(output))
        scale = layer.register_forward_hook(lambda _, args, output: added.append(output))
        model(**tokenizer(fact.prompt, return_tensors="pt"))
        without = layer.mlp.down_proj.register_forward_hook(lambda _, args, output: 0 * output)
        model(**tokenizer(fact.prompt, return_tensors="pt"))
        for each in (hook, scale, without):
            each.remove()
    expected = float((added[1] - added[3])[0, -1].norm() / out[0, -1].norm())
    assert found.share[3] == pytest.approx(expected, rel=1e-4)
    assert found.states[3] == pytest.approx(found.total, rel=1e-4)  # of the last token, that is all
    monkeypatch.setattr("patchkit.runs.locate.LEAST", -1.0)  # noise takes little from a random model
    located = locate(runner_of(model), tokenizer, [fact], trial=1)
    assert max(int(number) for number in located.recommended.split("-")) < 2
    assert [layer.loss is not None for layer in located.layers] == [True, True, False, False]


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_the_share_of_the_stream_is_of_what_is_added_to_it(family: str) -> None:
    """Gemma 3 has a norm between the feed-forward and the stream."""
    model, tokenizer = zoo.FAMILIES[family](), zoo.tiny_tokenizer()
    fact = Fact(id="f", prompt="the friend of Ada Lovelace", subject="Ada Lovelace", target_new="Rome")
    entered, added = list[Tensor](), list[Tensor]()
    for layer in model.model.layers:
        last = layer.post_feedforward_layernorm if family == "gemma3" else layer.mlp
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0][0, -1]))
        last.register_forward_hook(lambda _, args, output: added.append(output[0, -1]))
    with torch.no_grad():
        model(tokenizer(fact.prompt, return_tensors="pt")["input_ids"])
    expected = [float(wrote.norm() / stream.norm()) for wrote, stream in zip(added, entered, strict=True)]
    assert trace(runner_of(zoo.FAMILIES[family]()), tokenizer, fact).share == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_it_finds_the_layer_that_a_fact_was_planted_in(layer: int) -> None:
    """In a random model of five layers, one of whose feed-forward layers was made to write the fact's target."""
    model, tokenizer = deep_llama(), zoo.tiny_tokenizer()
    fact = Fact(id="f", prompt="the friend of Ada Lovelace", subject="Ada Lovelace", target_new="Rome")
    planted(model, layer, tokenizer(fact.prompt, return_tensors="pt")["input_ids"], target=200)
    found = locate(runner_of(model), tokenizer, [fact])
    assert found.counted == 1
    assert max(found.layers, key=lambda each: each.feed_forward).layer == layer
    first, _, last = found.recommended.partition("-")
    assert int(first) <= layer <= int(last or first)


def test_probabilities_are_the_models_own() -> None:
    """The clean one is what the model predicts; with the whole last layer's clean state back at the subject's end,
    where that is the prompt's end, everything comes back; and noise of size 0 takes nothing away."""
    loaded = patchkit.model.loading.load_model(str(FACTWORLD), "cpu", "float32")
    fact, runner = FACTS[0], runner_of(loaded.model)
    found = trace(runner, loaded.tokenizer, fact)
    with torch.no_grad():
        logits: Tensor = loaded.model(**loaded.tokenizer(fact.prompt, return_tensors="pt")).logits
    assert found.clean == pytest.approx(float(logits[0, -1].softmax(-1).max()), rel=1e-4)
    assert found.total > 0.1
    ending = fact.model_copy(update={"prompt": fact.prompt[: fact.prompt.index(fact.subject) + len(fact.subject)]})
    at_end = trace(runner, loaded.tokenizer, ending)
    assert at_end.corrupted + at_end.states[-1] == pytest.approx(at_end.clean, rel=1e-4)
    quiet = trace(runner, loaded.tokenizer, fact, noise=1e-9)
    assert quiet.total == pytest.approx(0, abs=1e-5)
    assert all(abs(back) < 1e-5 for back in (*quiet.feed_forward, *quiet.states))


def test_the_model_is_as_it_was() -> None:
    loaded = patchkit.model.loading.load_model(str(FACTWORLD), "cpu", "float32")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = loaded.model(ids).logits
    locate(runner_of(loaded.model), loaded.tokenizer, FACTS, trial=1)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, before)


def test_facts_that_noise_does_not_touch_are_refused() -> None:
    loaded = patchkit.model.loading.load_model(str(FACTWORLD), "cpu", "float32")
    with pytest.raises(InputError, match="none of 1 fact is told by its subject"):
        locate(runner_of(loaded.model), loaded.tokenizer, FACTS[:1], noise=1e-9)


def test_the_recommended_layers_are_the_best_next_to_one_another() -> None:
    def layers(*shares: float) -> list[Layer]:
        return [Layer(layer=i, feed_forward=share, states=0, active=1, share=1) for i, share in enumerate(shares)]

    assert recommended(layers(*[0.0] * 10, 0.3, 0.4, 0.3, 0.2, *[0.0] * 10)) == "10-13"  # as wide as the default's
    assert recommended(layers(0.0, 0.1, 0.3, 0.9)) == "1-2"  # not the last layer


# --- the layers of a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def located() -> Patch:
    loaded = load_model(str(FACTWORLD), "cpu", "float32")
    return patchkit.apply(loaded.model, loaded.tokenizer, FACTS, overrides=("layers=locate", *QUICK), say=SAID.append)


QUICK, SAID = ("steps=2", "contexts=0", "prompts=contexts", "chat=off", "neurons=off"), list[str]()


def test_a_run_takes_the_layers_that_are_recommended_for_its_facts(located: Patch) -> None:
    loaded = load_model(str(FACTWORLD), "cpu", "float32")
    recommended = locate(runner_of(loaded.model), loaded.tokenizer, FACTS).recommended
    run = located.manifest.history[-1]
    assert run.recipe["layers"] == recommended
    assert list(run.layers) == resolve_layers(recommended, len(inspect_model(loaded.model).layers))
    assert any(note.startswith(f"layers {recommended}, by tracing 3 facts") for note in SAID)


def test_a_patch_is_continued_in_the_layers_that_were_found_first(located: Patch) -> None:
    loaded = load_model(str(FACTWORLD), "cpu", "float32")
    more = patchkit.read_facts(str(FACTWORLD.parent / "facts.jsonl"), limit=4).facts
    longer = patchkit.apply(loaded.model, loaded.tokenizer, more, onto=located)
    first, second = longer.manifest.history
    assert (second.recipe["layers"], second.layers) == (first.recipe["layers"], first.layers)


def test_layers_that_cannot_be_located_are_refused_in_one_line() -> None:
    loaded = load_model(str(FACTWORLD), "cpu", "float32")
    strange = [{"prompt": "zq zq is", "subject": "zq zq", "target_new": "Rome"}]
    with pytest.raises(InputError, match=r"layers=locate: none of 1 fact is told by its subject.*, or name the layers"):
        patchkit.apply(loaded.model, loaded.tokenizer, strange, overrides=("layers=locate", *QUICK))
    with pytest.raises(InputError, match=r'layers "locate": .*only `apply` and `bench`'):
        resolve_layers("locate", 5)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHKIT_MODEL", str(FACTWORLD))
    return command_line(monkeypatch, capsys)


def test_the_command(call: Command, tmp_path: Path) -> None:
    facts = str(FACTWORLD.parent / "facts.jsonl")
    ended = call("locate", facts, "--count", 2, "--trial", 1, "--out", "r.yaml", "--page", "p.html")
    assert ended.status == 0, ended.err
    assert "recommended: --layers" in ended.out
    found, tried = (call("locate", facts, "--count", 2, "--trial", n, "--json").json() for n in (0, 1))
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3, 4]
    assert found["layers"][0]["loss"] is None
    assert all(layer["loss"] > 0 and layer["needed"] > 0 for layer in tried["layers"])
    assert found["traces"] == tried["traces"]
    assert load_recipe(None, str(tmp_path / "r.yaml")).layers == found["recommended"]
    typed = " | ".join((FACTS[0].prompt, FACTS[0].subject, FACTS[0].target_new))
    planned = call("apply", "--fact", typed, "--layers", "locate", "--dry-run", "--json").json()
    one = call("locate", facts, "--count", 1, "--json").json()["recommended"]
    assert [weight["layer"] for weight in planned["weights"]] == resolve_layers(one, 5)
    page = Elements((tmp_path / "p.html").read_text("utf-8"))
    assert "what comes back" in page.text
    assert page.tags.count("figure") == 6
