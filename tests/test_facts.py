"""Reading fact files: every layout, every refusal with its file, line and field."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from patchkit.errors import InputError
from patchkit.facts.batches import batches
from patchkit.facts.reader import parse_facts, read_facts, write_rejected
from patchkit.facts.schema import Condition, Fact, Locality, Probe, fact_schema
from patchkit.patch.manifest import EditedFact

SHARED = Path(__file__).parents[2] / "shared" / "data"

TOWER = {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target_new": "Rome"}
ADA = {"prompt": "Ada Lovelace was born in", "subject": "Ada Lovelace", "target_new": "Lisbon"}
COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is ", "The native language of Montesquieu is"],
}
FLAT: dict[str, Any] = {
    "case_id": 5,
    "prompt": "Apple A5 was created by",
    "subject": "Apple A5",
    "target_new": "Google",
    "ground_truth": "Apple",
    "rephrase_prompt": "Apple A5 is a product of",
    "locality_prompt": "Calendar Server was created by",
    "locality_ground_truth": "Apple",
}
ZSRE: dict[str, Any] = {
    "subject": "Zapata rail",
    "src": "What status is Zapata rail?",
    "pred": "critically endangered",
    "rephrase": "What is the status of the Zapata railway?",
    "alt": "endangered species",
    "answers": ["vulnerable", "rare"],
    "loc": "nq question: who gave the statue of liberty to the usa",
    "loc_ans": "the people of France",
}


def write(tmp_path: Path, *records: Any, name: str = "facts.jsonl") -> Path:
    """One record a line; a str or bytes record is written as it is."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_facts(path, **options)
    return str(caught.value)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_native_record_keeps_every_field(tmp_path: Path) -> None:
    record = {
        **TOWER,
        "id": "eiffel",
        "target_true": "Paris",
        "rewordings": ["{} was built in ", "", "You see the Eiffel Tower in"],
        "paraphrases": ["Where is the Eiffel Tower? In "],
        "aliases": ["Roma", " "],
        "questions": ["Where is the {}?"],
        "about": ["The {} is known for"],
        "locality": [
            {"prompt": "The Louvre is in ", "target": " Paris", "aliases": ["Paris, France"]},
            ["Big Ben is in", "London"],
            {"prompt": "x"},
        ],
        "portability": {
            "Reasoning": [
                {"prompt": "The Eiffel Tower's country is", "answers": [["Italy", "Italia"], ["Europe"]]},
                {
                    "prompt": "Its river is",
                    "answers": "Tiber",
                    "conditions": [{"prompt": "Rome is on", "answer": "Tiber"}],
                },
            ],
            "Logical": [{"prompt": "Near it is", "answers": ["Colosseum", "the Colosseum"]}],
        },
        "separator": "",
        "case": 3,
        "source": "wiki",
        "note": "extras are ignored",
    }
    read = read_facts(write(tmp_path, record))
    expected = Fact(
        **TOWER,
        id="eiffel",
        target_true="Paris",
        aliases=("Roma",),
        rewordings=("Eiffel Tower was built in ", "You see the Eiffel Tower in"),
        paraphrases=("Where is the Eiffel Tower? In ",),
        questions=("Where is the Eiffel Tower?",),
        about=("The Eiffel Tower is known for",),
        locality=(
            Locality(prompt="The Louvre is in ", target="Paris", aliases=("Paris, France",)),
            Locality(prompt="Big Ben is in", target="London"),
            Locality(prompt="x"),
        ),
        portability={
            "Reasoning": (
                Probe(prompt="The Eiffel Tower's country is", answers=(("Italy", "Italia"), ("Europe",))),
                Probe(
                    prompt="Its river is",
                    answers=(("Tiber",),),
                    conditions=(Condition(prompt="Rome is on", answers=(("Tiber",),)),),
                ),
            ),
            "Logical": (Probe(prompt="Near it is", answers=(("Colosseum", "the Colosseum"),)),),
        },
        separator="",
        case="3",
        source="wiki",
    )
    assert read.facts == (expected,)
    assert parse_facts(read.facts).facts == read.facts
    assert read.format == "native"
    assert read.rejected == ()


def test_single_locality_object_and_single_paraphrase(tmp_path: Path) -> None:
    record = {**TOWER, "paraphrases": "Find the Eiffel Tower in", "locality": {"prompt": "Big Ben is in"}, "id": 12}
    (fact,) = read_facts(write(tmp_path, record)).facts
    assert fact.paraphrases == ("Find the Eiffel Tower in",)
    assert fact.locality == (Locality(prompt="Big Ben is in"),)
    assert fact.id == "12"


def test_null_and_blank_optional_fields_are_absent(tmp_path: Path) -> None:
    record = {**TOWER, "id": None, "target_true": " ", "paraphrases": [""], "locality": None, "source": ""}
    (fact,) = read_facts(write(tmp_path, record)).facts
    assert fact == Fact(**TOWER, id=fact.id)


def test_a_prompt_is_kept_as_written_and_whitespace_around_subject_and_target_is_dropped(tmp_path: Path) -> None:
    record = {"prompt": "Where is the Eiffel Tower?\n", "subject": " Eiffel Tower ", "target_new": " Rome\n"}
    (fact,) = read_facts(write(tmp_path, record)).facts
    assert (fact.prompt, fact.subject, fact.target_new) == ("Where is the Eiffel Tower?\n", "Eiffel Tower", "Rome")


def test_prompts_that_differ_in_whitespace_alone_are_one(tmp_path: Path) -> None:
    path = write(tmp_path, TOWER, {**TOWER, "prompt": "The Eiffel Tower is in ", "target_new": "Oslo"})
    assert 'line 2: target_new: "Oslo" contradicts line 1' in refusal(path)


def test_published_prompts_lose_the_space_that_their_convention_puts_before_the_target(tmp_path: Path) -> None:
    names = ("prompt", "rephrase_prompt", "locality_prompt")
    spaced = {**FLAT, **{name: f"{FLAT[name]} " for name in names}}
    assert read_facts(write(tmp_path, spaced)).facts == read_facts(write(tmp_path, FLAT)).facts


@pytest.mark.parametrize(
    ("prompt", "subject", "stored"),
    [
        ("{} is in", "Eiffel Tower", "Eiffel Tower is in"),
        ("{} has a palace in", "Ha", "Ha has a palace in"),  # "Ha" inside "has" is no occurrence
        ("In Python, {} is a", "Python", "In Python, {} is a"),
    ],
)
def test_placeholder_is_filled_unless_the_subject_stands_there(
    tmp_path: Path, prompt: str, subject: str, stored: str
) -> None:
    record = {"prompt": prompt, "subject": subject, "target_new": "dict"}
    assert read_facts(write(tmp_path, record)).facts[0].prompt == stored


def test_counterfact(tmp_path: Path) -> None:
    read = read_facts(write(tmp_path, COUNTERFACT))
    assert read.format == "counterfact"
    assert read.facts[0] == Fact(
        id="7",
        prompt="The mother tongue of Danielle Darrieux is",
        subject="Danielle Darrieux",
        target_new="English",
        target_true="French",
        paraphrases=("Danielle Darrieux, a native",),
        locality=(
            Locality(prompt="The mother tongue of Léon Blum is", target="French"),
            Locality(prompt="The native language of Montesquieu is", target="French"),
        ),
    )


@pytest.mark.parametrize("listed", [False, True])
def test_counterfact_flat_with_texts_or_lists(tmp_path: Path, listed: bool) -> None:
    names = ("rephrase_prompt", "locality_prompt", "locality_ground_truth")
    read = read_facts(write(tmp_path, {**FLAT, **{name: [FLAT[name]] if listed else FLAT[name] for name in names}}))
    assert read.format == "counterfact-flat"
    assert read.facts[0] == Fact(
        id="5",
        prompt="Apple A5 was created by",
        subject="Apple A5",
        target_new="Google",
        target_true="Apple",
        paraphrases=("Apple A5 is a product of",),
        locality=(Locality(prompt="Calendar Server was created by", target="Apple"),),
    )


def test_zsre_teaches_the_alternative_or_the_answer(tmp_path: Path) -> None:
    path = write(tmp_path, ZSRE)
    (alt,) = read_facts(path).facts
    (answer,) = read_facts(path, zsre_target="answers").facts
    assert (alt.prompt, alt.target_new, alt.target_true) == (ZSRE["src"], "endangered species", "critically endangered")
    assert (answer.target_new, answer.target_true) == ("vulnerable", None)
    assert alt.paraphrases == (ZSRE["rephrase"],)
    assert alt.locality == (Locality(prompt=ZSRE["loc"], target="the people of France"),)
    assert alt.id != answer.id


@pytest.mark.parametrize("pred", ["", "endangered species", None])
def test_zsre_prediction_counts_only_when_it_differs(tmp_path: Path, pred: str | None) -> None:
    assert read_facts(write(tmp_path, {**ZSRE, "pred": pred})).facts[0].target_true is None


def test_layouts_are_told_apart_record_by_record(tmp_path: Path) -> None:
    read = read_facts(write(tmp_path, TOWER, COUNTERFACT, FLAT, ZSRE, {**ADA, "src": "a diary"}))
    assert [fact.target_new for fact in read.facts] == ["Rome", "English", "Google", "endangered species", "Lisbon"]
    assert read.format == "mixed"


@pytest.mark.parametrize(("name", "facts", "bad"), [("counterfact", 4979, 21), ("zsre", 499, 1)])
def test_published_data_reads(name: str, facts: int, bad: int) -> None:
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("shared data is not here")
    read = read_facts(path, skip_bad=True)
    # CounterFact's twin-city prompts come with several targets; one ZsRE record has an empty alternative.
    assert (len(read.facts), len(read.rejected)) == (facts, bad)
    assert all(fact.subject in fact.prompt for fact in read.facts)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + json.dumps(TOWER).encode() + b"\n\n" + json.dumps(ADA).encode(),
        b"\r\n" + json.dumps(TOWER).encode() + b"\r\n  \r\n" + json.dumps(ADA).encode() + b"\r\n",
        b"\xef\xbb\xbf\n " + json.dumps([TOWER, ADA], indent=2).replace("\n", "\r\n").encode(),
    ],
    ids=["bom", "crlf", "array"],
)
@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
def test_bom_crlf_blank_lines_and_arrays(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert [fact.target_new for fact in read_facts(tmp_path / name).facts] == ["Rome", "Lisbon"]


def test_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    line = json.dumps({**TOWER, "source": "a\u2028b"}, ensure_ascii=False)
    assert read_facts(write(tmp_path, line)).facts[0].source == "a\u2028b"


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{json.dumps(TOWER)}\n[]\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    read = read_facts("-", skip_bad=True)
    assert (read.path, len(read.facts)) == ("<stdin>", 1)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert "<stdin> line 2: expected a JSON object, found a list" in refusal("-")


def test_array_mistakes_name_record_and_line(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps([TOWER, {**ADA, "target_new": 4}], indent=1))
    assert "facts.json line 7 (record 2): target_new: expected text in quotes, found a number" in refusal(
        tmp_path / "facts.json"
    )


def test_broken_array_is_refused_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path, "[", json.dumps(TOWER), json.dumps(ADA), "]")
    assert "facts.jsonl line 3: not JSON (Expecting ',' delimiter at column 1)" in refusal(path, skip_bad=True)


# --- refusals ---------------------------------------------------------------------------------------------------------

ONE_BAD_RECORD = [
    ('{"prompt": "a"', r"line 2: not JSON \(.* at column 15\); a line must be one whole JSON object"),
    ("[" * 100_000, r"line 2: not JSON \(nested too deeply\)"),
    ("7", "line 2: expected a JSON object, found a number"),
    (b'{"prompt": "caf\xe9"}', r"line 2: not UTF-8 \(byte 0xe9 at 16\); save the file as UTF-8"),
    (
        {"prompt": "Ada Lovelace was", "subject": "Ada Lovelace", "target": "x"},
        r'line 2: target_new: missing \(is it "target"\?\); a native record needs prompt, subject, target_new and may '
        "have id, target_true, aliases, rewordings, paraphrases, questions, about, locality, portability, separator, "
        "case, source",
    ),
    ({"question": "q"}, r"line 2: prompt: missing \(and subject, target_new\); a native record needs prompt"),
    (
        {**COUNTERFACT, "requested_rewrite": {"prompt": "{} is", "subject": "a"}},
        "line 2: requested_rewrite.target_new.str: missing; a counterfact record needs",
    ),
    (
        {**COUNTERFACT, "requested_rewrite": {"prompt": "{} is", "subject": "a", "target_new": "b"}},
        "line 2: requested_rewrite.target_new: expected an object, found text",
    ),
    ({"src": "Who?", "subject": "Who"}, "line 2: alt: missing; a zsre record needs src, subject, alt"),
    ({**ADA, "target_new": 3}, "line 2: target_new: expected text in quotes, found a number"),
    ({**ADA, "prompt": None}, "line 2: prompt: expected text in quotes, found null"),
    ({**ADA, "subject": ["Ada"]}, "line 2: subject: expected text in quotes, found a list"),
    ({**ADA, "target_true": True}, "line 2: target_true: expected text in quotes, found a boolean"),
    ({**ADA, "id": True}, "line 2: id: expected text in quotes, found a boolean"),
    ({**ADA, "paraphrases": {"a": "b"}}, "line 2: paraphrases: expected a list of texts, found an object"),
    ({**ADA, "paraphrases": ["a", 2]}, r"line 2: paraphrases\[1\]: expected text in quotes, found a number"),
    ({**ADA, "rewordings": ["Ada Lovelace wrote", 2]}, r"line 2: rewordings\[1\]: expected text in quotes, found a nu"),
    (
        {**ADA, "rewordings": ["Ada Lovelace wrote", "Who wrote it?"]},
        r'line 2: rewordings\[1\]: "Ada Lovelace" is not in rewording "Who wrote it\?"; put the subject verbatim',
    ),
    ({**ADA, "rewording": ["x"]}, 'line 2: rewording: unknown field, probably meant as "rewordings"; rename it'),
    ({**FLAT, "rewordings": ["a"]}, 'line 2: rewordings: is a native field, but "ground_truth" makes this'),
    ({**ADA, "portability": []}, "line 2: portability: expected an object of groups"),
    ({**ADA, "portability": {"a": "x"}}, "line 2: portability.a: expected a list of objects with prompt and answers"),
    ({**ADA, "portability": {"a": [{"prompt": "x"}]}}, r"line 2: portability.a\[0\].answers: has no answer"),
    (
        {**ADA, "portability": {"a": [{"prompt": "x", "answers": [["y", 2]]}]}},
        r"line 2: portability.a\[0\].answers\[0\]\[1\]: expected text in quotes, found a number",
    ),
    ({**ADA, "separator": 1}, "line 2: separator: expected text in quotes, found a number"),
    ({**ADA, "locality": "x"}, "line 2: locality: expected a list of objects with prompt and target, found text"),
    ({**ADA, "locality": ["x", "y"]}, r"line 2: locality\[0\]: expected an object .* or a pair .*, found text"),
    ({**ADA, "locality": [{"target": "y"}]}, r"line 2: locality\[0\].prompt: missing"),
    ({**ADA, "locality": [{"prompt": "x", "traget": "y"}]}, r'line 2: locality\[0\].traget: unknown .* "target"'),
    (
        {**FLAT, "locality_prompt": ["a", "b"]},
        "line 2: locality_ground_truth: has 1 item, but locality_prompt has 2; pair them up",
    ),
    ({**FLAT, "paraphrases": ["a"]}, 'line 2: paraphrases: is a native field, but "ground_truth" makes this'),
    ({**ADA, "target_new": ""}, "line 2: target_new: is empty"),
    ({**ADA, "target_new": " \n"}, "line 2: target_new: is blank"),
    ({**ZSRE, "alt": ""}, "line 2: alt: is empty"),
    (
        {**ADA, "prompt": "Who wrote it?"},
        'line 2: subject: "Ada Lovelace" is not in prompt "Who wrote it\\?"; put the subject verbatim in the prompt',
    ),
    (
        {**ADA, "prompt": "ada lovelace was"},
        'line 2: subject: "Ada Lovelace" is not in prompt "ada lovelace was" in this letter case; put',
    ),
    (
        {**ADA, "prompt": "Ada\u00a0Lovelace was"},
        'line 2: subject: "Ada Lovelace" is not in prompt "Ada\u00a0Lovelace was" in the same Unicode characters; put',
    ),
    ('{"prompt": "a \\ud83d", "subject": "a", "target_new": "b"}', "line 2: prompt: holds half a surrogate pair"),
    (
        {**TOWER, "target_new": "Oslo"},
        'line 2: target_new: "Oslo" contradicts line 1, where the target of the same prompt "The Eiffel Tower is in" '
        'is "Rome"; keep one',
    ),
    ({**TOWER, "source": "x"}, "line 2: prompt: repeats the prompt and target of line 1 with other details"),
    ({**ADA, "id": "tower"}, 'line 2: id: "tower" is taken by line 1; give each fact its own id'),
    ({**ADA, "paraphrase": ["x"]}, 'line 2: paraphrase: unknown field, probably meant as "paraphrases"; rename it'),
    ({**ADA, "target_ture": "x"}, 'line 2: target_ture: unknown field, probably meant as "target_true"'),
    ({**ADA, "Target-True": "x"}, 'line 2: Target-True: unknown field, probably meant as "target_true"'),
]


@pytest.mark.parametrize(("record", "message"), ONE_BAD_RECORD)
def test_each_mistake_names_file_line_and_field(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path, {**TOWER, "id": "tower"}, record)
    head, problem, advice = refusal(path).split("\n")
    assert head == f"{path}: 1 of 2 facts cannot be used"
    assert re.match(f"{re.escape(str(path))} {message}", problem), problem
    assert advice == "correct it, or leave it out with --skip-bad"


def test_unrelated_extras_are_no_typos(tmp_path: Path) -> None:
    extras = {"uid": 1, "source_url": "x", "relation": "P19", "prompt_id": 3, "comment": "y"}
    assert len(read_facts(write(tmp_path, {**TOWER, **extras})).facts) == 1


def test_target_that_becomes_no_token(tmp_path: Path) -> None:
    path = write(tmp_path, TOWER, {**ADA, "target_new": "\u200b"})
    seen: list[str] = []

    def count(text: str) -> int:
        seen.append(text)
        return len(text.strip(" \u200b"))

    assert 'line 2: target_new: "\u200b" becomes no token' in refusal(path, token_count=count)
    assert seen == [" Rome", " \u200b"]


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "{", TOWER, "", {**ADA, "target_new": ""}, ADA, {**ADA, "target_new": "Rome"})
    lines = refusal(path).split("\n")
    assert lines[0] == f"{path}: 3 of 5 facts cannot be used"
    assert [line.removeprefix(f"{path} ").split(":")[0] for line in lines[1:-1]] == ["line 1", "line 4", "line 6"]
    assert "--skip-bad" in lines[-1]


def test_long_lists_and_long_values_are_cut(tmp_path: Path) -> None:
    record = {**ADA, "prompt": "line\nbreak " * 50}
    lines = refusal(write(tmp_path, TOWER, *[record] * 25)).split("\n")
    assert len(lines) == 1 + 20 + 1 + 1
    assert lines[-2] == "and 5 more"
    assert '"line\\nbreak line' in lines[1]
    assert len(lines[1]) < len(str(tmp_path)) + 220


@pytest.mark.parametrize("text", ["", "\n \r\n", "[]", "\ufeff", " [ ] "])
def test_empty_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(text, encoding="utf-8")
    assert refusal(path, skip_bad=True).startswith(f"{path}: no facts in it; a fact is one JSON object a line")


def test_missing_file_directory_and_utf16(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.jsonl").startswith(f"{tmp_path / 'no.jsonl'}: no such file")
    assert refusal(tmp_path).startswith(f"{tmp_path}: is a directory")
    (tmp_path / "wide.jsonl").write_text(json.dumps(TOWER), encoding="utf-16")
    assert "wide.jsonl: is UTF-16, not UTF-8" in refusal(tmp_path / "wide.jsonl")
    (tmp_path / "latin.json").write_bytes(b'[\n{"prompt": "caf\xe9"}]')
    assert "latin.json line 2: not UTF-8 (byte 0xe9)" in refusal(tmp_path / "latin.json")


# --- skipping, limits, ids --------------------------------------------------------------------------------------------


def test_skip_bad_keeps_the_good_and_returns_the_rest(tmp_path: Path) -> None:
    bad = {**ADA, "prompt": "Who?"}
    read = read_facts(write(tmp_path, "{oops", TOWER, bad), skip_bad=True)
    assert [fact.target_new for fact in read.facts] == ["Rome"]
    assert [(item.line, item.field) for item in read.rejected] == [(1, None), (3, "subject")]
    assert read.rejected[0].raw == "{oops"
    out = tmp_path / "rejected.jsonl"
    write_rejected(out, read.rejected)
    first, second = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert first["record"] == "{oops"
    assert second == {"line": 3, "field": "subject", "error": read.rejected[1].message, "record": bad}
    assert sorted(os.listdir(tmp_path)) == ["facts.jsonl", "rejected.jsonl"]


def test_skip_bad_with_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "{", "7")
    assert refusal(path, skip_bad=True).split("\n")[0] == f"{path}: 2 of 2 facts cannot be used"
    assert "--skip-bad would leave no fact" in refusal(path)


def test_rejected_records_survive_any_text(tmp_path: Path) -> None:
    line = '{"prompt": "caf\u00e9 \\ud83d", "subject": "a", "target_new": "b"}'
    read = read_facts(write(tmp_path, TOWER, line), skip_bad=True)
    write_rejected(tmp_path / "out.jsonl", read.rejected)
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert "caf\u00e9" in text
    assert json.loads(text)["record"] == json.loads(line)
    with pytest.raises(InputError, match="cannot be written"):
        write_rejected(tmp_path / "nowhere" / "out.jsonl", read.rejected)


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path, TOWER, ADA, "{broken")
    assert len(read_facts(path, limit=2).facts) == 2
    assert len(read_facts(path, limit=1).facts) == 1
    assert "limit: expected at least 1, found 0" in refusal(path, limit=0)


def test_ids_depend_on_content_alone(tmp_path: Path) -> None:
    forth = {fact.prompt: fact.id for fact in read_facts(write(tmp_path, TOWER, ADA)).facts}
    back = {fact.prompt: fact.id for fact in read_facts(write(tmp_path, ADA, "", {**TOWER, "source": "s"})).facts}
    assert forth == back
    digest = hashlib.sha256(b'["The Eiffel Tower is in", "Rome"]').hexdigest()
    assert forth[TOWER["prompt"]] == digest[:10]


def test_identical_records_are_kept_once(tmp_path: Path) -> None:
    read = read_facts(write(tmp_path, TOWER, ADA, TOWER))
    assert [fact.target_new for fact in read.facts] == ["Rome", "Lisbon"]


# --- Python API -------------------------------------------------------------------------------------------------------


def test_parse_facts_takes_mappings_and_facts() -> None:
    ready = Fact(id="a", prompt="{} was born in ", subject="Ada", target_new=" Rome")
    read = parse_facts([TOWER, ready, COUNTERFACT])
    assert read.facts[1] == Fact(id="a", prompt="Ada was born in ", subject="Ada", target_new="Rome")
    assert parse_facts(read.facts).facts == read.facts


def test_parse_facts_names_the_index() -> None:
    with pytest.raises(InputError, match=r"^facts: 1 of 2 facts cannot be used\nfacts\[1\]: subject: ") as caught:
        parse_facts([TOWER, {**ADA, "prompt": "Who?"}])
    assert "skip_bad=True" in str(caught.value)
    (rejected,) = parse_facts([TOWER, {**ADA, "prompt": "Who?"}], skip_bad=True).rejected
    assert (rejected.line, json.loads(rejected.raw)["prompt"]) == (1, "Who?")


@pytest.mark.parametrize("records", [TOWER, json.dumps(TOWER), Fact(**TOWER, id="a")])
def test_parse_facts_wants_a_list(records: Any) -> None:
    with pytest.raises(InputError, match="expected a list of facts, found a single value"):
        parse_facts(records)


def test_unknown_zsre_target() -> None:
    with pytest.raises(InputError, match='zsre_target: expected "alt" or "answers", found "pred"'):
        parse_facts([ZSRE], zsre_target="pred")  # type: ignore[arg-type]


def test_schema_describes_a_native_record() -> None:
    schema = fact_schema()
    assert schema["required"] == ["prompt", "subject", "target_new"]
    assert set(schema["properties"]) == set(Fact.model_fields)
    assert "additionalProperties" not in schema


def test_facts_of_older_manifests_load() -> None:
    older = {"id": "a", "prompt": "Ada is", "subject": "Ada", "target_new": "x", "target_true": None, "source": None}
    older |= {"paraphrases": ["y"], "locality": [{"prompt": "z", "target": None}], "run": 0, "batch": 0}
    fact = EditedFact.model_validate({**older, "target_loss": 0.1, "steps": 3})
    assert (fact.questions, fact.portability, fact.locality[0].aliases) == ((), {}, ())


def test_a_case_is_never_parted_by_a_batch() -> None:
    def facts(*cases: str | None) -> list[Fact]:
        return [Fact(**ADA, id=str(i), case=case) for i, case in enumerate(cases)]

    def sizes(found: list[Fact], size: int) -> list[int]:
        return [len(batch) for batch in batches(found, size)]

    assert sizes(facts(*[None] * 7), 3) == [3, 3, 1]
    assert sizes(facts(None, "a", "a", "b", "b", None), 3) == [3, 3]
    assert sizes(facts(None, None, "a", "a", None), 3) == [2, 3]
    assert sizes(facts(None, *["a"] * 5, None), 3) == [1, 5, 1]
    assert sizes(facts("a", "a", "a"), 1) == [1, 1, 1]
    assert sizes([], 3) == []
    assert [list(batch) for batch in batches(facts(None, None, None), 2)] == [[0, 1], [2]]
