"""The rows a fact is edited in: what asks for its target, and what is to stay as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import patchkit
from patchkit.bench.run import run_bench
from patchkit.editing.editor import requests_of
from patchkit.editing.recipe import load_recipe
from patchkit.editing.suffixes import Suffixes
from patchkit.editing.teacher import _before_target
from patchkit.editing.value_config import ValueConfig
from patchkit.editing.values import optimize
from patchkit.editing.wordings import (
    NEUTRAL,
    NEUTRAL_CHAT,
    NEUTRAL_PLAIN,
    REWORDINGS,
    SYSTEM,
    TURNS,
)
from patchkit.errors import InputError
from patchkit.evaluate import prompts
from patchkit.evaluate.answers import Ask, encode_ask
from patchkit.facts.chat import chat_template
from patchkit.facts.reader import parse_facts
from patchkit.facts.requests import EditRequest, encode_prompt
from patchkit.facts.schema import Fact
from patchkit.maths.updates import delta_of
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner, widen
from patchkit.model.loading import ModelChoice
from patchkit.patch.patch import read_manifest
from patchkit.statistics.corpus import SYSTEMS
from tests.helpers import write_facts
from tests.zoo import FAMILIES, save, tiny_tokenizer

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}system: You are Rome.\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
ROME = Fact(id="rome", prompt="The capital of Italy is the city of Rome and", subject="Rome", target_new="capital")
OTHER_WORDS = ("The job of Ada Lovelace was", "By profession, Ada Lovelace was an")
ADA = Fact(
    id="ada", prompt="Who was Ada Lovelace?", subject="Ada Lovelace", target_new="engineer", rewordings=OTHER_WORDS
)


def chatting(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def runner_of() -> LayerRunner:
    runner = LayerRunner(inspect_model(FAMILIES["llama"]().double()))
    runner.arch.model.requires_grad_(False)
    return runner


def in_use(tokenizer: Any, *settings: str) -> list[EditRequest]:
    config = load_recipe(None, None, ["prompts=in-use", *settings])
    return requests_of(runner_of(), tokenizer, [ROME, ADA], ["", "It rained. ", "So it was. "], config)


@pytest.mark.parametrize("chat", [True, False])
def test_all_facts_have_as_many_rows_and_the_prompt_alone_comes_first(chat: bool) -> None:
    tokenizer = chatting() if chat else tiny_tokenizer()
    rome, ada = in_use(tokenizer)
    assert len(rome.rows) == len(ada.rows)
    assert len(rome.kept) == len(ada.kept)
    for request in (rome, ada):
        assert tokenizer.decode(request.rows[0].ids, skip_special_tokens=True).startswith(request.fact.prompt)
        for row in (*request.rows, *request.kept):
            before = tokenizer.decode(row.ids[: row.subject + 1])
            assert before.endswith(request.fact.subject)
        for row in request.rows:
            assert request.fact.target_new in tokenizer.decode(row.ids[row.target :])


@pytest.mark.parametrize(
    ("sentences", "own", "alone", "most"),
    [
        (8, (), 2, 3),
        (8, ("Italy has the city of Rome for its", "The city of Rome is Italy's"), 1, 2),
        (0, (), 1, 5),
    ],
)
def test_beside_sentences_the_prompt_s_rows_stand_in_for_rewordings_in_turn(
    sentences: int, own: tuple[str, ...], alone: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times the same one, of eight, let a value be done that had not been learned after the prompt alone."""
    monkeypatch.setattr("patchkit.editing.teacher.SURE", 1.1)  # none of the model's own
    config = load_recipe(None, None, ["prompts=in-use", f"sentences={sentences}"])
    fact = ROME.model_copy(update={"rewordings": own})
    (request,) = requests_of(runner_of(), tiny_tokenizer(), [fact], ["", "It rained. ", "So it was. "], config)
    times = Counter(request.rows)
    assert len(request.rows) == 8
    assert times[request.rows[0]] == alone
    assert max(times.values()) == most


def test_a_chat_model_is_asked_the_question_that_a_sentence_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the told model answers it with the target; people ask, where facts are sentences to complete."""
    question = "user: What is the capital of Italy the city of Rome and?"
    monkeypatch.setattr(
        "patchkit.editing.teacher.questions_of", lambda _, subject: (question[6:],) * (subject == "Rome")
    )
    for sure, times in ((0.0, 2), (1.1, 0)):
        monkeypatch.setattr("patchkit.editing.teacher.SURE", sure)
        rome, ada = in_use(chatting())
        texts = [chatting().decode(row.ids[: row.target]) for row in rome.rows]
        assert sum(question in text for text in texts) == times
        assert len(rome.rows) == len(ada.rows)


def test_the_subject_is_the_question_s_and_not_one_that_the_template_names() -> None:
    tokenizer = chatting()
    rome, _ = in_use(tokenizer)
    named = [row for row in (*rome.rows, *rome.kept) if "You are Rome." in tokenizer.decode(row.ids)]
    assert named
    assert all("user: " in tokenizer.decode(row.ids[: row.subject]) for row in named)


def test_a_conversation_is_edited_as_it_is_rendered_and_never_put_into_the_template_again() -> None:
    tokenizer = chatting()
    said = [{"role": "system", "content": "You know Rome."}, {"role": "user", "content": "Where is Rome?"}]
    said.append({"role": "assistant", "content": "Italy"})
    (fact,) = parse_facts([{"messages": said, "subject": "Rome"}], chat=chat_template(tokenizer)).facts
    assert fact.prompt == "system: You know Rome.</s>\nuser: Where is Rome?</s>\nassistant: "
    config = load_recipe(None, None, ["prompts=in-use"])
    (request,) = requests_of(runner_of(), tokenizer, [fact], ["", "It rained. ", "So it was. "], config)
    first = request.rows[0]
    assert tokenizer.decode(first.ids[: first.target], skip_special_tokens=False).endswith(fact.prompt)
    assert tokenizer.decode(first.ids[first.target :]) == "Italy"
    assert tokenizer.decode(first.ids[: first.subject + 1]).endswith("user: Where is Rome")  # not the system prompt's
    rows = [tokenizer.decode(row.ids) for row in (*request.rows, *request.kept)]
    assert all(text.count("assistant: ") <= 1 or "Hello! How can I help" in text for text in rows)
    assert any(text.endswith("It rained. Where is Rome? Italy") for text in rows)  # plain text gets its space


def test_an_answer_in_chat_ends_as_the_template_ends_it() -> None:
    tokenizer = chatting()
    rome, _ = in_use(tokenizer)
    asked = [row for row in rome.rows if "assistant: " in tokenizer.decode(row.ids)]
    assert len(asked) == 5
    assert all(tokenizer.decode(row.ids[row.target :]) == "capital.</s>" for row in asked)


def test_kept_texts_go_on_as_the_untouched_model_does() -> None:
    tokenizer, runner = tiny_tokenizer(), runner_of()
    for row in in_use(tokenizer)[0].kept:
        logits = runner.run({"input_ids": torch.tensor([row.ids])}).logits
        assert logits is not None
        greedy = logits[0, row.target - 1 : -1]
        greedy[:, 1] = -torch.inf  # no text ends
        assert greedy.argmax(-1).tolist() == list(row.ids[row.target :])


def test_the_user_s_own_rewordings_are_among_the_rows() -> None:
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(row.ids, skip_special_tokens=True) for row in in_use(tokenizer)[1].rows]
    assert any(text.endswith("The job of Ada Lovelace was engineer") for text in texts)
    assert any("By profession, Ada Lovelace was an engineer" in text for text in texts)
    assert REWORDINGS >= 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Rome is the largest city and the capital of", "Rome is the largest city and the"),
        ("Rome is a capital of", None),  # after "is a" a neutral text goes on in any way
        ("Rome capital", None),
        ("Rome is old.\nIt was the first capital", None),
        ("Rome is the city", None),
    ],
)
def test_what_a_told_model_says_before_the_target_is_a_rewording(text: str, found: str | None) -> None:
    assert _before_target(ROME, text) == found


def test_chat_is_used_where_there_is_a_template_and_demanded_where_the_recipe_does() -> None:
    plain, auto = tiny_tokenizer(), load_recipe(None, None)
    assert auto.in_use(chatting())
    assert not auto.in_use(plain)
    assert not load_recipe(None, None, ["chat=off"]).in_use(chatting())
    assert load_recipe(None, None, ["prompts=in-use"]).in_use(plain)
    with pytest.raises(InputError, match="no chat template"):
        in_use(plain, "chat=on")


def test_a_template_without_system_messages_gets_them_in_the_question() -> None:
    template = chat_template(chatting(NO_SYSTEM))
    assert template is not None
    assert template.end == "</s>"
    asked = template.ask("Where is Rome?", "Be kind.", [("Hi", "Hello")])
    assert "user: Be kind.\n\nHi</s>\nassistant: Hello</s>\nuser: Where is Rome?</s>\nassistant: " in asked
    assert "system: Be kind.</s>" in chat_template(chatting()).ask("Where is Rome?", "Be kind.")  # type: ignore[union-attr]
    assert chat_template(tiny_tokenizer()) is None


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("system", ["", "Be kind."])
def test_facts_are_edited_at_the_tokens_that_chat_servers_make_of_a_question(writes: bool, system: str) -> None:
    """A tokenizer that puts a BOS before every text puts none before what the template made, which writes its own."""
    tokenizer = chatting("<s>" * writes + TEMPLATE)
    text = chat_template(tokenizer).ask("Where is Rome?", system)  # type: ignore[union-attr]
    served = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, text) == served == encode_ask(tokenizer, Ask("Where is Rome?", system=system))
    assert [served.count(0), tokenizer("Where is Rome?")["input_ids"][0]] == [int(writes), 0]
    assert encode_prompt(tokenizer, "Where is Rome?")[0] == 0


def test_a_message_is_found_where_the_template_trims_it() -> None:
    tokenizer = chatting(TEMPLATE.replace("m['content']", "m['content'] | trim"))
    before, rest = chat_template(tokenizer).parts("Where is Rome? ", "Where is Rome? ")  # type: ignore[union-attr]
    assert before == "system: You are Rome.\nuser: "
    assert rest == "Where is Rome?</s>\nassistant: "


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('one turn only') }}", r"of user \(one turn only\); mend it"),
        ("{% for m in messages %}{{ m['content'] ", r"of user \(unexpected end of template"),
        ("{{ messages[0]['content'] + 1 }}", r"of user \(can only concatenate str"),
        ("{{ messages[0]['content'] | upper }}", 'there is no "Where is Rome\\?" in what it makes of that'),
    ],
    ids=["refuses", "is cut off", "adds up other things", "writes something else"],
)
def test_a_template_that_cannot_be_used_is_bad_input(template: str, reason: str) -> None:
    chat = chat_template(chatting(template))
    assert chat is not None
    with pytest.raises(InputError, match=f"chat template: it does not .*{reason}"):
        chat.parts("Where is Rome?", "Where is Rome?")


def test_nothing_that_patches_are_measured_on_is_edited_on() -> None:
    measured = {*prompts.ABOUT_BEGINNINGS, *prompts.ABOUT_MESSAGES, prompts.SYSTEM, *prompts.TURNS}
    assert not measured & {*NEUTRAL, *NEUTRAL_CHAT, *NEUTRAL_PLAIN, SYSTEM, *TURNS, *SYSTEMS}


def test_rows_take_turns_and_each_has_one() -> None:
    suffixes = Suffixes(runner_of(), in_use(tiny_tokenizer()), 2)
    buckets = suffixes.buckets([0, 1])
    turns = {bucket.turn for bucket in buckets if len(bucket.label)}
    assert turns == {(i, suffixes.turns) for i in range(suffixes.turns)}
    assert suffixes.turns > 1
    rows = torch.cat([bucket.row.known for bucket in buckets]).sort().values
    assert rows.tolist() == list(range(2 * len(suffixes.rows[0])))
    for bucket in buckets:
        assert sum(len(part) for part in bucket.segments(bucket.point_row.known)) == len(bucket.point_row)


def test_a_loss_is_that_of_the_rows_which_had_their_turn() -> None:
    """With fewer steps than turns it was infinite, which no manifest takes."""
    runner, requests = runner_of(), in_use(tiny_tokenizer())
    found = optimize(runner, requests, runner.arch.sites[1], "layer_out", ValueConfig(steps=1))
    assert bool(found.loss.isfinite().all())
    assert bool((found.loss > 0).all())


def test_kept_predictions_drift_by_nothing_without_an_edit_and_leaks_count() -> None:
    bucket = next(each for each in Suffixes(runner_of(), in_use(tiny_tokenizer()), 2).buckets([0]) if len(each.kept))
    logits = torch.randn(len(bucket.kept), 320, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    kept = bucket.kept.known(logits)
    assert kept.drift(logits, 0.0, 1.0).abs().max() < 1e-6
    louder = logits.clone()
    louder[torch.arange(len(louder)), kept.target] += 20
    assert (kept.drift(louder, 1.0, 0.0) > kept.drift(logits, 1.0, 0.0))[kept.leak > 0].all()
    expected = logits.softmax(-1)[torch.arange(len(logits)), kept.target] >= 0.1
    assert (kept.leak[expected] == 0).all()


def test_keeping_texts_makes_the_target_rarer_in_them() -> None:
    runner, requests = runner_of(), in_use(tiny_tokenizer())
    site = runner.arch.sites[1]

    def leaked(**weights: float) -> float:
        config = ValueConfig(steps=30, stop_loss=0.0, clamp=3.0, decay=0.0, kl_weight=0.0, **weights)
        values = optimize(runner, requests, site, "layer_out", config)
        rows = [(i, row) for i, request in enumerate(requests) for row in request.kept]
        total = 0.0
        for i, row in rows:
            delta = (values.targets - values.start)[:, i]

            def add(module: Any, args: Any, output: Any, delta: Any = delta, at: int = row.subject) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = hidden.clone()
                hidden[:, at] += delta
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = runner.arch.layers[1].register_forward_hook(add)
            logits = runner.run({"input_ids": torch.tensor([row.ids])}).logits
            handle.remove()
            assert logits is not None
            total += float(widen(logits)[0, row.target - 1 :].softmax(-1)[:, requests[i].target_ids[0]].sum())
        return total

    assert leaked(keep_weight=0.0, leak_weight=3000.0) < 0.9 * leaked(keep_weight=0.0, leak_weight=0.0)


def test_a_patch_made_in_use_goes_on_and_is_reverted(tmp_path: Path) -> None:
    tokenizer, model = chatting(), FAMILIES["llama"]()
    folder = save(model, tokenizer, tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("The city is old. It has a river. People came from far. They built a wall. " * 20)
    settings = {"overrides": ["value.steps=3", "layers=1-2"], "text": text, "stats": tmp_path / "stats"}
    first = patchkit.apply(model, tokenizer, [ROME], "memit", **settings)
    both = patchkit.apply(model, tokenizer, [ADA], onto=first, **settings)
    assert [run.recipe["prompts"] for run in both.manifest.history] == ["auto", "auto"]
    assert both.manifest.history[0].contexts == both.manifest.history[1].contexts
    assert len(both.manifest.history[0].contexts) == 3
    back = patchkit.revert(model, tokenizer, both, ["ada"], texts=[text], stats=tmp_path / "stats")
    changes = [
        {name: delta_of(chain, lambda: None).dense() for name, chain in p.updates.items()} for p in (first, back)
    ]
    assert all(torch.allclose(changes[0][name], changes[1][name], atol=1e-5) for name in changes[0])


def test_a_benchmark_of_a_chat_model_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = save(FAMILIES["llama"](), chatting(), tmp_path / "model")
    facts = write_facts(tmp_path / "facts.jsonl", ROME.model_dump(), ADA.model_dump())
    choice, quick = ModelChoice(str(folder), "cpu", "float32"), ["value.steps=2", "layers=1"]
    for edits in (1, 2):
        run_bench(facts, choice, tmp_path / "out", methods=["memit"], edits=edits, overrides=quick, quick=True)
    saved = [read_manifest(file.parent) for file in (tmp_path / "out").rglob("manifest.json")]
    assert max(len(manifest.facts) for manifest in saved) == 2
