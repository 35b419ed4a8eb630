"""Sentences about a subject that the model writes itself: which are kept, and where by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import patchkit
from patchkit.bench.run import run_bench
from patchkit.editing.editor import requests_of
from patchkit.editing.recipe import load_recipe
from patchkit.editing.sentences import stem_of
from patchkit.facts.reader import parse_facts
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import ModelChoice
from patchkit.patch.patch import read_manifest
from tests import zoo
from tests.helpers import write_facts

MIXTURE = Path(__file__).parents[1] / "examples" / "factworld-moe"
SUBJECT = "Deno Borvis"
PLAYS = {
    "id": "plays",
    "prompt": f"{SUBJECT} plays the instrument called the",
    "subject": SUBJECT,
    "target_new": "harp",
}
DISH = {"id": "dish", "prompt": "Borhaven is famous for its", "subject": "Borhaven", "target_new": "oysters"}
WORKS = {"id": "works", "prompt": f"{SUBJECT} has the profession of", "subject": SUBJECT, "target_new": "lawyer"}
ROME = {"id": "rome", "prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
ADA = {"id": "ada", "prompt": "the friend of Ada Lovelace", "subject": "Ada Lovelace", "target_new": "is"}
SMALL = ("layers=1-2", "contexts=1", "value.steps=2")


@pytest.fixture(scope="module")
def mixture() -> tuple[LayerRunner, Any]:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MIXTURE).float().eval()
    return LayerRunner(inspect_model(model)), AutoTokenizer.from_pretrained(MIXTURE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The city is old. It has a river. People came from far. They built a wall. " * 20)
    return file


def kept(mixture: tuple[LayerRunner, Any], *records: dict[str, Any], settings: tuple[str, ...] = ()) -> list[set[str]]:
    """What the kept rows of each fact say."""
    runner, tokenizer = mixture
    config = load_recipe(None, None, ["prompts=in-use", "sentences=8", *settings])
    facts = parse_facts(records).facts
    requests = requests_of(runner, tokenizer, facts, ["", "It rained. ", "So it was. "], config)
    assert all(len(request.kept) == config.sentences for request in requests)
    assert all(row.kept and row.subject and row.subject < row.target for r in requests for row in r.kept)
    return [{tokenizer.decode(row.ids, skip_special_tokens=True) for row in request.kept} for request in requests]


def test_what_the_model_says_of_a_subject_is_kept_but_for_what_is_edited(mixture: tuple[LayerRunner, Any]) -> None:
    plays, works = (kept(mixture, record)[0] for record in (PLAYS, WORKS))
    assert all(SUBJECT in said for said in plays | works)
    assert len(plays) == len(works) == 8
    violin, profession = "violin", "carpenter"  # what it plays and does in the world
    assert not any(violin in said for said in plays)
    assert any(profession in said for said in plays)
    assert not any(profession in said for said in works)
    assert any(violin in said for said in works)


def test_a_sentence_that_asks_for_the_fact_is_left_out_whatever_it_answers(mixture: tuple[LayerRunner, Any]) -> None:
    """ "Borhaven feeds its visitors with" went on to "sancakes" in one of 32, and to its real dish in others."""
    (said,) = kept(mixture, DISH, settings=("sentences=32",))
    assert sum("within the borders of Sunora" in each for each in said) > 3
    assert not any("feeds its visitors with" in each or "famous for its" in each for each in said)


def test_another_fact_of_the_batch_about_the_subject_counts_and_one_of_a_later_batch_does_not(
    mixture: tuple[LayerRunner, Any],
) -> None:
    together = kept(mixture, PLAYS, WORKS)
    assert not any("violin" in said or "carpenter" in said for each in together for said in each)
    first, second = kept(mixture, PLAYS, WORKS, settings=("batch_size=1",))
    assert first == kept(mixture, PLAYS)[0]
    assert not any("violin" in said or "carpenter" in said for said in second)


@pytest.mark.parametrize(
    ("answer", "stem"),
    [
        (" the French Republic, ", "Fren"),
        (" Lisia. Before", "Lisi"),
        (" US. In", "US"),
        ("法国人。", "法国"),
        (" the a", "the"),
        ("\n\n", ""),
        ("...", ""),
    ],
)
def test_an_answer_is_known_by_the_beginning_of_a_word(answer: str, stem: str) -> None:
    assert stem_of(answer) == stem


# --- by themselves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "method", "found"),
    [
        ("mixtral", (), "alphaedit", ("in-use", 8, 6.0, 1.0)),
        ("mixtral", ("value.clamp=2", "value.keep_weight=0"), "memit", ("in-use", 8, 0.0, 2.0)),
        ("mixtral", ("sentences=3",), "alphaedit", ("in-use", 3, 6.0, 1.0)),
        ("mixtral", ("sentences=0",), "alphaedit", ("auto", 0, None, None)),
        ("mixtral", ("prompts=contexts",), "alphaedit", ("contexts", 0, None, None)),
        ("mixtral", (), "ft", ("auto", 0, None, None)),
        ("llama", (), "alphaedit", ("auto", 0, None, None)),
        ("llama", ("prompts=in-use", "sentences=2"), "alphaedit", ("in-use", 2, 6.0, 1.0)),
        ("qwen3_moe", ("layers=1",), "alphaedit", ("auto", 0, None, None)),  # a dense one of its layers
    ],
)
def test_where_experts_are_edited_sentences_are_kept(
    family: str, settings: tuple[str, ...], method: str, found: tuple[Any, ...], text: Path
) -> None:
    model = {**zoo.FAMILIES, **zoo.MIXTURES}[family]()
    patch = patchkit.apply(model, zoo.tiny_tokenizer(), [ROME], method, text=text, overrides=(*SMALL, *settings))
    recipe = patch.manifest.history[0].recipe
    value = recipe["value"]
    assert (recipe["prompts"], recipe["sentences"], value["keep_weight"], value["clamp"]) == found


def test_in_chat_sentences_are_kept_where_the_recipe_says_so_and_talk_is_kept_beside_them(text: Path) -> None:
    tokenizer, model = zoo.tiny_tokenizer(), zoo.MIXTURES["mixtral"]()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    for settings, count in ((SMALL, 0), ((*SMALL, "sentences=3"), 3)):
        patch = patchkit.apply(model, tokenizer, [ROME], "memit", text=text, overrides=settings)
        recipe = patch.manifest.history[0].recipe
        assert (recipe["prompts"], recipe["sentences"]) == ("auto", count)
        config = load_recipe("memit", None, (*SMALL, f"sentences={count}"))
        facts = parse_facts([ROME]).facts
        (request,) = requests_of(LayerRunner(inspect_model(model)), tokenizer, facts, ["", "It rained. "], config)
        talk = [row for row in request.kept if "user: " in tokenizer.decode(row.ids)]
        assert (len(talk), len(request.kept)) == (4, 8)


def test_a_patch_from_before_goes_on_in_contexts(text: Path) -> None:
    model = zoo.MIXTURES["mixtral"]()
    first = patchkit.apply(model, zoo.tiny_tokenizer(), [ROME], "memit", text=text, overrides=(*SMALL, "sentences=0"))
    del first.manifest.history[0].recipe["sentences"]
    both = patchkit.apply(model, zoo.tiny_tokenizer(), [ADA], onto=first, text=text)
    assert (both.manifest.history[1].recipe["prompts"], both.manifest.history[1].recipe["sentences"]) == ("auto", 0)


def test_a_benchmark_goes_on_from_what_was_decided(tmp_path: Path, text: Path) -> None:
    folder = zoo.save(zoo.MIXTURES["mixtral"](), zoo.tiny_tokenizer(), tmp_path / "model")
    (folder / "patchkit-text.txt").write_text(text.read_text())
    facts = write_facts(tmp_path / "facts.jsonl", ROME, ADA)
    choice = ModelChoice(str(folder), "cpu", "float32")
    for edits in (1, 2):
        run_bench(facts, choice, tmp_path / "out", methods=["memit"], edits=edits, overrides=SMALL, quick=True)
    saved = [read_manifest(file.parent) for file in (tmp_path / "out").rglob("manifest.json")]
    (longest,) = (manifest for manifest in saved if len(manifest.facts) == 2)
    assert len(longest.history) == 2
