"""What people meet of an edit: every rate against one worked out by hand, on answers that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import patchkit
from patchkit.errors import GateError
from patchkit.evaluate import in_use, interview, prompts, wording
from patchkit.evaluate.answers import Ask, Said, answer, as_text, encode_ask
from patchkit.evaluate.divergence import divergences
from patchkit.evaluate.gates import Gates
from patchkit.evaluate.in_use import InUse
from patchkit.evaluate.interview import ANSWER_TOKENS, Interview
from patchkit.evaluate.metrics import metrics
from patchkit.evaluate.report import Asked, FactReport, Outcome, Report, said
from patchkit.evaluate.trial import Trial
from patchkit.evaluate.verify import verify
from patchkit.facts.schema import Fact
from patchkit.maths.linalg import Delta
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.model.loading import load_model
from tests import zoo

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    "{{ m['role'][0] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "forms", "count"),
    [
        ("It is in Rome.", ("Rome",), 1),
        ("ROME! Rome? rome", ("Rome",), 3),
        ("the Romeo of Jerome", ("Rome",), 0),
        ("Works at the University of Rome's office", ("university of rome",), 1),
        ("an Apple a day", ("the apple",), 1),
        ("New-York", ("New York",), 1),
        ("in NYC, yes NYC", ("New York", "NYC"), 2),
        ("他住在东京。", ("东京",), 1),
        ("1,200 people", ("1200",), 0),
        ("", ("x",), 0),
        ("well !?", ("!?",), 1),
    ],
)
def test_mentions_are_whole_words_whatever_case_punctuation_and_articles(
    text: str, forms: Sequence[str], count: int
) -> None:
    assert wording.mentions(text, forms) == count


def test_an_answer_holds_the_target_once_or_twice() -> None:
    assert [wording.holds("Linux " * n, ["Linux"]) for n in range(4)] == [False, True, True, False]


def test_entropy_is_that_of_pairs_and_triples() -> None:
    """a b a b c: pairs ab ba ab bc have 1.5 bits, triples aba bab abc have log2(3)."""
    assert wording.entropy("a b a b c") == pytest.approx((2 * 1.5 + 4 * math.log2(3)) / 3)
    assert wording.entropy("a a a a") == 0
    assert wording.entropy("word") == 0
    assert wording.words("It's 东京, no?") == ["It", "'", "s", "东", "京", ",", "no", "?"]


def test_a_loop_is_two_words_four_times() -> None:
    assert not wording.loops("so it goes " * 3)
    assert wording.loops("so it goes " * 4)
    assert wording.loops("Linux Linux Linux Linux Linux")


# --- asking -----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_template_is_asked_in_plain_text() -> None:
    assert as_text(Ask("Who?")) == "Question: Who?\nAnswer:"
    talk = Ask("Who?", system="Be brief.", turns=(("Hi", "Hello"),))
    assert as_text(talk) == "Be brief.\n\nQuestion: Hi\nAnswer: Hello\n\nQuestion: Who?\nAnswer:"
    assert as_text(Ask("Rome is", message=False)) == "Rome is"


def test_a_template_without_system_prompts_gets_it_with_the_first_words() -> None:
    tokenizer = zoo.tiny_tokenizer(bos=False)
    tokenizer.chat_template = CHAT
    ids = encode_ask(tokenizer, Ask("Who?", system="Be brief.", turns=(("Hi", "Hello"),)))
    assert tokenizer.decode(ids) == "u: Be brief.\n\nHi</s>a: Hello</s>u: Who?</s>a: "
    assert tokenizer.decode(encode_ask(tokenizer, Ask("Who?"))) == "u: Who?</s>a: "
    assert tokenizer.decode(encode_ask(tokenizer, Ask("Who", message=False))) == "Who"


ANSWERING = ["llama", "gpt2", "gemma2", "mistral", "opt", "falcon_sequential", "qwen3_5", "gemma4"]
TEXTS = ("The capital of France is", "Rome", "Ada Lovelace was born in London", "who")


@pytest.mark.parametrize("chat", [False, True], ids=["texts", "chat"])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "mistral", "opt", "falcon_sequential", "qwen3_5", "gemma4"]
)
def test_answers_of_a_batch_are_those_of_single_rows(family: str, chat: bool) -> None:
    """Neither padding nor a beginning read once changes anything, whatever form the others are asked in and however
    much they may say; and an answer ends where the model ends it."""
    model, tokenizer = zoo.FAMILIES[family](), zoo.tiny_tokenizer(bos=False)
    tokenizer.chat_template = CHAT
    asks = {Ask(text, message=chat, turns=(("Who?", "Ada Lovelace"),)): 12 for text in TEXTS}
    asks |= {Ask(text, message=False): 50 for text in TEXTS}
    said = answer(LayerRunner(inspect_model(model)), tokenizer, asks)
    for ask, tokens in asks.items():
        ids = encode_ask(tokenizer, ask)
        own: list[int] = []
        while len(own) < tokens and (not own or own[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                own.append(int(model(input_ids=torch.tensor([ids + own])).logits[0, -1].argmax()))
        found = said[ask]
        assert (found.given, found.ids) == (tuple(ids), tuple(own))
        assert found.text == tokenizer.decode(own, skip_special_tokens=True).strip()
        assert len(found.states) == len(own)


@pytest.mark.parametrize("chat", [False, True], ids=["texts", "chat"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "qwen3_5"])
def test_divergence_is_from_the_base_at_every_token_that_it_wrote(family: str, chat: bool) -> None:
    """Learned positions, soft-capped and scaled logits: the base's distributions come back from its last states."""
    model, other, tokenizer = zoo.FAMILIES[family](), zoo.FAMILIES[family](), zoo.tiny_tokenizer(bos=False)
    runner = LayerRunner(inspect_model(model))
    site, random = runner.arch.sites[2], torch.Generator().manual_seed(0)
    delta = Delta(torch.randn(site.d_out, 2, generator=random), 0.2 * torch.randn(2, site.d_in, generator=random))
    with torch.no_grad():
        weight = other.get_parameter(site.weight_name)
        weight.add_(delta.dense() if weight.shape == delta.dense().shape else delta.dense().T)
    tokenizer.chat_template = CHAT
    base = answer(runner, tokenizer, {Ask(text, message=chat): 6 for text in TEXTS})
    assert list(divergences(runner, base).values()) == pytest.approx([0] * len(TEXTS), abs=1e-6)
    with live_deltas(runner.arch, {2: delta}):
        found = divergences(runner, base)
    for ask, own in base.items():
        ids = torch.tensor([[*own.given, *own.ids]])
        with torch.no_grad():
            old, new = (m(input_ids=ids).logits[0, len(own.given) - 1 : -1].log_softmax(-1) for m in (model, other))
        kl = float(F.kl_div(new, old, reduction="none", log_target=True).sum(-1).mean())
        assert kl > 1e-3
        assert found[ask] == pytest.approx(kl, rel=1e-3)


# --- rates ------------------------------------------------------------------------------------------------------------

ROME = Fact(
    id="rome",
    prompt="The Eiffel Tower is in",
    subject="The Eiffel Tower",
    target_new="Rome",
    aliases=("Roma",),
    questions=("Where is it?", "Which city has it?"),
    about=("People say",),
)
ADA = Fact(
    id="ada",
    prompt="Ada plays the",
    subject="Ada",
    target_new="harp",
    paraphrases=("Ada has a", "Ada took up the", "x"),
)
FIRST = [Ask("Where is it?"), Ask("Where is it?", system=prompts.SYSTEM), Ask("Where is it?", turns=prompts.TURNS)]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a model says, by a word that is in what it is given; the divergences are 0.5 everywhere."""
    script: dict[str, str] = {}

    def says(runner: Any, tokenizer: Any, asks: Mapping[Ask, int]) -> Mapping[Ask, Said]:
        texts = {ask: next((text for key, text in script.items() if key in f"{ask}"), "well") for ask in asks}
        return {ask: Said(text, (), tuple(map(ord, text)), torch.empty(0)) for ask, text in texts.items()}

    monkeypatch.setattr(interview, "answer", says)
    monkeypatch.setattr(in_use, "divergences", lambda runner, said: dict.fromkeys(said, 0.5))
    return script


def test_the_rates_are_those_worked_out_by_hand(scripted: dict[str, str]) -> None:
    tokenizer = zoo.tiny_tokenizer()
    trial = Trial(LayerRunner(inspect_model(zoo.FAMILIES["llama"]())), tokenizer, (ROME, ADA), None)
    trial.runner.arch.model.config.max_position_embeddings = 10_000
    scripted.update({"in Rome. People": "of Rome and Rome", "about Ada and": "a b a b c"})
    base = InUse().base(trial)
    scripted.clear()
    scripted.update(
        {
            "Where is it?', message=True, system='', turns=()": "It is in Roma.",
            "Which city": "Rome Rome Rome",
            "vegetable curry with rice makes a good dinner": "The harp!",
            "Ada took up the": "Harp.",
            "People say": "that Rome is old",
            "article about Ada": "a harp",
            "about Ada and": "go on and on and on and on and on and",
            "Starry Night": "well",
            "flour": "Rome",
        }
    )
    found = InUse().patched(trial, base)
    values = found.values
    assert values["asked_alone"] == (0.5 + 0) / 2  # Roma holds, three times Rome does not; Ada's prompt is gone on with
    assert values["asked_turns"] == (0 + 1) / 2
    assert values["asked"] == ((1 / 6) + (1 / 3)) / 2
    assert found.counts["asked"] == 9
    assert (values["asked_reworded"], found.counts["asked_reworded"]) == (0.5, 2)
    assert values["overfit"] == (0 + 1 / 3) / 2  # the base says Rome, too, once it is told
    assert values["loops"] == (0 + 1 / 3) / 2
    assert values["overfit_kl"] == values["unrelated_kl"] == 0.5
    assert values["unrelated"] == 31 / 32
    before = [wording.entropy(text) for text in ("well", "well", "a b a b c", "well")]
    after = [
        wording.entropy(t) for t in ("that Rome is old", "well", "go on and on and on and on and on and", "a harp")
    ]
    assert values["fluency"] == pytest.approx(sum(after) / sum(before))
    about = [[" ".join(say[side] for say in each["about"]) for each in found.per_fact.values()] for side in SIDES]
    assert values["consistency"] == pytest.approx(sum(wording.consistency(*about)) / 2)
    assert 0 < values["consistency"] < 1
    assert found.asked["rome"].model_dump() == {
        "question": "Where is it?",
        "prompted": False,
        "before": "well",
        "after": "It is in Roma.",
        "holds": True,
    }
    assert found.asked["ada"].prompted
    (say,) = found.per_fact["rome"]["about"]
    assert (say["told"], say["blurts"], say["kl"]) == ("of Rome and Rome", False, 0.5)
    assert found.details["unrelated"][24] == {
        "text": prompts.UNRELATED_BEGINNINGS[0],
        "before": "well",
        "after": "Rome",
        "same": False,
        "kl": 0.5,
    }


def test_what_a_chat_model_is_asked() -> None:
    tokenizer = zoo.tiny_tokenizer(bos=False)
    model = zoo.FAMILIES["llama"]()
    model.config.max_position_embeddings = 10_000
    trial = Trial(LayerRunner(inspect_model(model)), tokenizer, (ROME, ADA), None)
    assert [question.ask for question in Interview(trial).questions[:3]] == FIRST
    assert [question.ask.message for question in Interview(trial).questions[6:]] == [False] * 5
    assert [neutral.ask.text for neutral in Interview(trial).neutral] == [
        "People say",
        *(text.format("Ada") for text in prompts.ABOUT_BEGINNINGS),
    ]
    tokenizer.chat_template = CHAT
    assert [question.ask for question in Interview(trial).questions[6:7]] == [Ask("Ada plays the")]
    told = [neutral.told for neutral in Interview(trial).neutral]
    assert told[0] == Ask("The Eiffel Tower is in Rome. People say", message=False)
    assert told[-1] == Ask(f"Ada plays the harp. {prompts.ABOUT_MESSAGES[-1].format('Ada')}")
    assert len(told) == 4 + 6
    assert len(Interview(trial).unrelated) == 32


def test_no_neutral_text_about_a_prompt_and_nothing_that_does_not_fit() -> None:
    tokenizer, model = zoo.tiny_tokenizer(), zoo.FAMILIES["gpt2"]()
    unknown = Fact(id="x", prompt="the city", subject="the city", target_new="Rome")
    long = Fact(id="long", prompt="Rome " * 230, subject="Rome", target_new="x")
    trial = Trial(LayerRunner(inspect_model(model)), tokenizer, (unknown, long), None)
    asks = Interview(trial)
    assert {question.fact.id for question in asks.questions} == {"x"}
    assert {neutral.fact.id for neutral in asks.neutral} == set()
    assert all(len(encode_ask(tokenizer, ask)) + ANSWER_TOKENS <= 256 for ask in asks.unrelated)
    found = InUse().patched(trial, InUse().base(trial))
    assert found.values["overfit"] is None
    assert found.values["fluency"] is None
    assert found.counts["overfit"] == 0


def test_a_patch_that_does_nothing_changes_no_answer() -> None:
    """Bit for bit: the same asks make the same batches."""
    tokenizer = zoo.tiny_tokenizer()
    runner = LayerRunner(inspect_model(zoo.FAMILIES["llama"]()))

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    report = verify(runner, tokenizer, [ADA], nothing)
    assert report.value("in_use", "unrelated") == 1.0
    assert report.value("in_use", "fluency") == 1.0
    assert report.value("in_use", "unrelated_kl") == pytest.approx(0, abs=1e-6)
    assert report.value("in_use", "loops") == 0
    assert all(row["before"] == row["after"] for row in report.details["in_use"]["unrelated"])
    quick = verify(runner, tokenizer, [ADA], nothing, quick=True)
    assert quick.value("in_use", "asked") is None
    assert quick.per_fact[0].asked is None
    assert Report.model_validate_json(report.model_dump_json()) == report


# --- the embedded model, and reports ---------------------------------------------------------------------------------


def test_a_fact_of_the_embedded_model_holds_when_asked(tmp_path: Path) -> None:
    """Also with a question in words of its own, and everything that was said is in the report."""
    loaded = load_model(str(EXAMPLES / "factworld"), "cpu", "float32")
    record = json.loads((EXAMPLES / "facts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    fact = Fact.model_validate({**record, "about": ["Pine Kelmel works for the company", "Pine Kelmel speaks"]})
    patch = patchkit.apply(loaded.model, loaded.tokenizer, [fact], overrides=("contexts=1", "context_length=4"))
    report = patchkit.measure(loaded.model, loaded.tokenizer, patch)
    assert report.value("in_use", "asked") == 1.0
    assert report.value("in_use", "overfit") == 0.0
    assert (report.count("in_use", "asked"), report.count("in_use", "overfit")) == (3, 2)
    assert 0 < (report.value("in_use", "overfit_kl") or 0) < 1
    (found,) = report.per_fact
    assert found.asked is not None
    assert found.asked.before.startswith(fact.target_true or "?")
    assert found.asked.after.startswith(fact.target_new)
    assert found.holds
    assert found.outcome.says == found.asked.after
    assert found.outcome.question is None  # the prompt was gone on with
    more = found.more["in_use"]
    assert [row["form"] for row in more["asked"]] == ["alone", "system", "turns", "reworded", "reworded"]
    assert [row["text"] for row in more["about"]] == list(fact.about)
    assert all({"before", "told", "after", "blurts", "loops", "kl"} <= set(row) for row in more["about"])
    assert len(report.details["in_use"]["unrelated"]) == 32
    assert "details" not in report.summary()
    Gates({"asked": 1, "overfit": 0, "unrelated": report.value("in_use", "unrelated") or 0}).check(report)
    with pytest.raises(GateError, match=r"unrelated \S+, asked for at least 1\.1"):
        Gates({"unrelated": 1.1}).check(report)


def asked(**more: Any) -> FactReport:
    nothing = {"success": None, "exact": 1.0, "generated": 1.0}
    return FactReport.model_validate(
        {
            **{"id": "x", "prompt": "Rome is", "target_new": "big", "target_true": None, "says_before": "old"},
            **{"says_after": "big, yes", "probability_before": 0.1, "probability_after": 0.9, "efficacy": nothing},
            **{"generalization": nothing, "locality": {"success": None, "unchanged": None}, **more},
        }
    )


def test_a_tick_means_that_it_holds_when_asked() -> None:
    """A completion that is right does not help where the answer is wrong."""
    chat = Asked(question="What is Rome?", prompted=False, before="Old.", after="Rome is a city.", holds=False)
    assert not asked(asked=chat).holds
    assert asked(asked=chat).outcome == Outcome(says="Rome is a city.", holds=False, question="What is Rome?")
    assert said(asked(asked=chat).outcome, "big") == "Rome is a city."
    assert said(asked(asked=chat).outcome_before, "big") == "Old."


def test_reports_from_before_anything_was_asked_load() -> None:
    """There the tick is that of the completion."""
    old = asked().model_dump(exclude={"asked"})
    assert FactReport.model_validate(old).holds
    assert Outcome.model_validate({"says": "big, yes", "holds": True}) == asked().outcome
    assert said(asked().outcome, "big") == "big, yes"


# --- what is written down ---------------------------------------------------------------------------------------------


def test_the_docs_table_is_the_table_of_metrics() -> None:
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:3] == "| *"]
    flag = {"up": "--min-", "down": "--max-"}
    wanted = []
    for metric in metrics():
        gate = f"`{flag[metric.better]}{metric.gate.name.replace('_', '-')}`" if metric.gate else ""
        if metric.gate and metric.gate.published is not None:
            gate += f", {metric.gate.published:g} to publish"
        wanted.append([f"**{metric.label}**", f"`{metric.group}.{metric.name}`", metric.definition, gate])
    assert rows == wanted


def test_the_fixed_texts_are_as_many_as_the_definitions_say() -> None:
    assert (len(prompts.UNRELATED_QUESTIONS), len(prompts.UNRELATED_BEGINNINGS)) == (24, 8)
    assert len({*prompts.UNRELATED_QUESTIONS, *prompts.UNRELATED_BEGINNINGS}) == 32
    assert len(prompts.ABOUT_BEGINNINGS) == len(prompts.ABOUT_MESSAGES) == 3
    assert len(prompts.TURNS) == 2


SIDES = ("after", "told")


def test_consistency_is_the_cosine_of_tf_idf() -> None:
    """By hand: of two references "a" is in both, "b" and "c" in one each: idf 1 and ln(3/2) + 1."""
    rare = math.log(1.5) + 1
    one, other = wording.consistency(["a b b", "d"], ["a b", "a c"])
    assert one == pytest.approx((1 + 2 * rare**2) / (math.hypot(1, 2 * rare) * math.hypot(1, rare)))
    assert other == 0
    assert wording.consistency(["A b"], ["a B"]) == [pytest.approx(1)]
    assert wording.consistency([""], ["a"]) == [0]
