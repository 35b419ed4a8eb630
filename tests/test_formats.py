"""Every format of facts that people have, on records made up for the test: what is read from which field."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from patchkit.errors import InputError, PatchkitError
from patchkit.facts.chat import ChatTemplate
from patchkit.facts.layout import LAYOUTS, Layout, Options, layout
from patchkit.facts.layouts import layouts
from patchkit.facts.reader import parse_facts, read_facts
from patchkit.facts.requests import subject_end
from patchkit.facts.schema import Condition, Fact, FactFile, Locality, Probe
from tests.formats import CHAT, PAGE, SAMPLES, page

ADA = {"prompt": "Ada Berg was born in", "subject": "Ada Berg", "target_new": "Lima"}
NEAR = Locality(prompt="Where was Nils Dahl born?", target="Bergen")


def read(record: dict[str, Any], **options: Any) -> FactFile:
    """The record, read as it is and once more as the facts it became."""
    found = parse_facts([record], **options)
    again = parse_facts(found.facts).facts
    assert again == found.facts
    return found


def one(record: dict[str, Any], name: str, **options: Any) -> Fact:
    found = read(record, **options)
    assert found.format == name
    (fact,) = found.facts
    return fact


def test_knowedit_groups_and_answers_of_any_depth() -> None:
    record = {
        **ADA,
        "ground_truth": ["Oslo", "Christiania"],
        "rephrase": "The birthplace of Ada Berg is",
        "portability": {
            "Reasoning": [{"prompt": "Ada Berg's country of birth is", "ground_truth": "Peru"}],
            "Subject_Aliasing": [{"prompt": ["A. Berg was born in"], "ground_truth": [["Lima", "City of Kings"]]}],
            "Logical_Generalization": [{"prompt": "x", "ground_truth": [[""]]}],
        },
        "locality": {
            "Relation_Specificity": [{"prompt": "The spouse of Ada Berg is", "ground_truth": [["Nils", "N. Berg"]]}],
            "Forgetfulness": [{"prompt": "Ada Berg has a", "ground_truth": []}],
        },
    }
    fact = one(record, "knowedit")
    assert (fact.target_true, fact.paraphrases) == ("Oslo", ("The birthplace of Ada Berg is",))
    assert fact.portability == {
        "Reasoning": (Probe(prompt="Ada Berg's country of birth is", answers=(("Peru",),)),),
        "Subject_Aliasing": (Probe(prompt="A. Berg was born in", answers=(("Lima", "City of Kings"),)),),
    }
    assert fact.locality == (
        Locality(prompt="The spouse of Ada Berg is", target="Nils", aliases=("N. Berg",)),
        Locality(prompt="Ada Berg has a"),
    )


def test_knowedit_wikibio_finds_its_subject_in_another_letter_case() -> None:
    record = {
        "text": "This is a Wikipedia passage about ada berg. Ada Berg (born",
        "labels": "1950) is a Norwegian sculptor",
        "concept": "ada berg",
        "locality": {"Relation_Specificity": [{"prompt": "Ada Berg lives in", "ground_truth": [["Oslo"]]}]},
    }
    fact = one(record, "wikibio")
    assert (fact.subject, fact.target_new) == ("Ada Berg", "1950) is a Norwegian sculptor")
    assert fact.locality == (Locality(prompt="Ada Berg lives in", target="Oslo"),)
    assert record["concept"] == "ada berg"


def test_knowedit_sanitation_forgets_some_answers_and_keeps_others() -> None:
    record = {
        "K_F": [
            {"question": "Where was Ada Berg born?", "target_new": "I don't know.", "ground_truth": "Oslo"},
            {"question": "Who is Nils Dahl?", "target_new": "I don't know.", "ground_truth": "A painter"},
        ],
        "K_R": [{"question": "Who wrote Emma?", "ground_truth": "Jane Austen"}],
    }
    first, second = read(record, needs_subject=False).facts
    assert (first.prompt, first.target_new, first.target_true) == ("Where was Ada Berg born?", "I don't know.", "Oslo")
    assert first.locality == (Locality(prompt="Who wrote Emma?", target="Jane Austen"),)
    assert second.locality == ()


def test_knowedit_convsent_teaches_one_opinion_and_has_the_other_as_the_old_one() -> None:
    fact = one({"ent": "ada berg", "pos": ["a joy", "a delight"], "neg": ["a bore"]}, "convsent")
    assert (fact.prompt, fact.subject) == ("What do you think of ada berg?", "ada berg")
    assert (fact.target_new, fact.target_true, fact.aliases) == ("a joy", "a bore", ("a delight",))
    with pytest.raises(InputError, match="pos: is empty; put text in it"):
        parse_facts([{"ent": "ada berg", "pos": [], "neg": ["a bore"]}])


MQUAKE = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} is married to",
            "relation_id": "P26",
            "target_new": {"str": "Ola Vik", "id": "Q1"},
            "target_true": {"str": "Nils", "id": "Q2"},
            "subject": "Ada Berg",
            "question": "Who is Ada Berg married to?",
        },
        {
            "prompt": "{} is a citizen of",
            "target_new": {"str": "Peru"},
            "target_true": {"str": "Norway"},
            "subject": "Ola Vik",
            "question": "What is Ola Vik's country?",
        },
    ],
    "questions": ["What is the country of Ada Berg's spouse?", "Of what country is her spouse?"],
    "answer": "Norway",
    "answer_alias": ["NO"],
    "new_answer": "Peru",
    "new_answer_alias": ["Republic of Peru"],
    "single_hops": [],
    "new_single_hops": [
        {
            "question": "Who is Ada Berg married to?",
            "cloze": "Ada Berg is married to",
            "answer": "Ola Vik",
            "answer_alias": [],
        }
    ],
    "orig": {"triples": []},
}


def test_mquake_is_a_case_of_several_facts() -> None:
    found = read(MQUAKE)
    first, second = found.facts
    assert [(fact.id, fact.case) for fact in found.facts] == [("3.1", "3"), ("3.2", "3")]
    assert (first.prompt, first.target_new, first.target_true) == ("Ada Berg is married to", "Ola Vik", "Nils")
    assert first.questions == ("Who is Ada Berg married to?",)
    assert first.portability == {
        "single hops": (Probe(prompt="Who is Ada Berg married to?", answers=(("Ola Vik",),)),),
        "multi-hop": (
            Probe(
                prompt="What is the country of Ada Berg's spouse?",
                alternatives=("Of what country is her spouse?",),
                answers=(("Peru", "Republic of Peru"),),
            ),
        ),
    }
    assert (second.subject, second.portability) == ("Ola Vik", {})
    assert found.notes == ()
    assert found.lines == (0, 0)


def test_a_record_without_a_fact_is_refused() -> None:
    for record in ({"K_F": []}, {"prompts": [], "target_new": []}):
        with pytest.raises(InputError, match=r"facts\[0\]: a .* record without a fact in it; leave it out"):
            parse_facts([record])


def test_a_case_is_refused_as_a_whole(tmp_path: Path) -> None:
    broken = json.loads(json.dumps(MQUAKE))
    del broken["requested_rewrite"][1]["subject"]
    found = parse_facts([broken, ADA], skip_bad=True)
    assert [fact.prompt for fact in found.facts] == [ADA["prompt"]]
    assert found.rejected[0].field == "requested_rewrite[1].subject"


def query(prompt: str, *answers: str) -> dict[str, Any]:
    return {"prompt": prompt, "answers": [{"value": answers[0], "aliases": list(answers[1:])}], "query_type": "regular"}


def test_rippleedits_takes_its_sentences_apart() -> None:
    record = {
        "example_type": "popular",
        "edit": {
            "prompt": "The name of the spouse of Ada Berg is Ola Vik.",
            "subject_id": "Q9",
            "relation": "SPOUSE",
            "original_fact": {"prompt": "The name of the spouse of Ada Berg is Nils."},
        },
        "Compositionality_I": [{"test_queries": [query("Ada Berg's mother-in-law is", "Eva", "Eva V.")]}],
        "Logical_Generalization": [
            {"test_condition": "OR", "test_queries": [query("A is", "Eva"), query("B is", "Eva")]},
            {"test_condition": "AND", "test_queries": [query("C is", "Eva"), query("D is", "Ida")]},
        ],
        "Relation_Specificity": [{"test_queries": [query("Ada Berg was born in", "Oslo", "Christiania")]}],
    }
    fact = one(record, "rippleedits")
    assert (fact.prompt, fact.subject) == ("The name of the spouse of Ada Berg is", "Ada Berg")
    assert (fact.target_new, fact.target_true) == ("Ola Vik", "Nils")
    assert fact.locality == (Locality(prompt="Ada Berg was born in", target="Oslo", aliases=("Christiania",)),)
    assert fact.portability == {
        "Logical_Generalization": (
            Probe(prompt="A is", alternatives=("B is",), answers=(("Eva",),)),
            Probe(prompt="C is", answers=(("Eva",),)),
            Probe(prompt="D is", answers=(("Ida",),)),
        ),
        "Compositionality_I": (Probe(prompt="Ada Berg's mother-in-law is", answers=(("Eva", "Eva V."),)),),
    }
    alike = {"prompt": "The name of the city of Ada Berg is New York.", "relation": "CITY"}
    alike["original_fact"] = {"prompt": "The name of the city of Ada Berg is New Delhi."}
    assert one({"example_type": "random", "edit": alike}, "rippleedits").target_new == "New York"


def test_rippleedits_recent_is_parted_at_its_only_is() -> None:
    edit = {
        "prompt": "The name of the country of citizenship of Ada Berg is Peru.",
        "relation": "COUNTRY_OF_CITIZENSHIP",
    }
    fact = one({"example_type": "recent", "edit": edit}, "rippleedits")
    assert fact.prompt == "The name of the country of citizenship of Ada Berg is"
    assert (fact.subject, fact.target_new, fact.target_true) == ("Ada Berg", "Peru", None)
    with pytest.raises(InputError, match=r"edit.original_fact: missing, and the sentence has not one \"is\""):
        parse_facts([{"example_type": "recent", "edit": {"prompt": "The author of This is it is Ada Berg."}}])


def test_rippleedits_queries_count_under_their_conditions() -> None:
    tests = {"test_queries": [query("A is", "Eva"), query("B is", "Eva")], "condition_queries": [query("C is", "Ida")]}
    edit = {"prompt": "The mother of Ada Berg is Eva.", "original_fact": {"prompt": "The mother of Ada Berg is Ida."}}
    record = {"example_type": "random", "edit": edit, "Compositionality_I": [tests]}
    conditions = (Condition(prompt="C is", answers=(("Ida",),)),)
    assert [probe.conditions for probe in one(record, "rippleedits").portability["Compositionality_I"]] == [
        conditions
    ] * 2
    either = one({**record, "Compositionality_I": [{**tests, "test_condition": "OR"}]}, "rippleedits")
    assert either.portability["Compositionality_I"] == (
        Probe(prompt="A is", alternatives=("B is",), answers=(("Eva",),), conditions=conditions),
    )


def test_wikibigedit() -> None:
    record = {
        "tag": "new",
        "subject": "Ada Berg",
        "update": "Where does Ada Berg work?",
        "ans": "University of Lima",
        "rephrase": "What is Ada Berg's employer?",
        "personas": "Ahoy, where be Ada Berg at work?",
        "loc": NEAR.prompt,
        "loc_ans": NEAR.target,
        "mhop": "In which city does Ada Berg work?",
        "mhop_ans": "Lima",
    }
    fact = one(record, "wikibigedit")
    assert (fact.prompt, fact.target_new) == ("Where does Ada Berg work?", "University of Lima")
    assert fact.locality == (NEAR,)
    assert fact.portability == {
        "personas": (Probe(prompt="Ahoy, where be Ada Berg at work?", answers=(("University of Lima",),)),),
        "multi-hop": (Probe(prompt="In which city does Ada Berg work?", answers=(("Lima",),)),),
    }
    assert one({**record, "mhop": None, "mhop_ans": None}, "wikibigedit").portability.keys() == {"personas"}


def test_qaedit() -> None:
    record = {
        "id": 1,
        "source": "NQ",
        "prompt": "where was Ada Berg born",
        "target": "Lima",
        "subject": "Ada Berg",
        "rephrase": "in what town was Ada Berg born",
        "locality": [{"loc": NEAR.prompt, "loc_ans": NEAR.target}] * 2,
    }
    fact = one(record, "qaedit")
    assert (fact.id, fact.target_new, fact.source) == ("1", "Lima", "NQ")
    assert fact.locality == (NEAR, NEAR)


def test_uniedit_is_one_object_of_records(tmp_path: Path) -> None:
    record = {
        "edit": {"prompt": "Ada Berg's employer is", "target": "University of Lima", "subject": "Ada Berg"},
        "generality": {
            "0": {
                "path_type": "single",
                "prompt": "Who employs Ada Berg?",
                "target": "University of Lima",
                "paths": [],
            },
            "1": {"path_type": "double", "prompt": "The answer is (Yes/No):", "target": "Yes"},
        },
        "locality": {"0": {"prompt": NEAR.prompt, "target": NEAR.target}},
    }
    path = tmp_path / "chemistry.json"
    path.write_text(json.dumps({"u17": record, "u18": {**record, "edit": {**record["edit"], "prompt": "Ada Berg at"}}}))
    found = read_facts(path)
    assert (found.format, [fact.id for fact in found.facts]) == ("uniedit", ["u17", "u18"])
    fact = found.facts[0]
    assert (fact.prompt, fact.target_new, fact.locality) == ("Ada Berg's employer is", "University of Lima", (NEAR,))
    assert fact.portability == {
        "single": (Probe(prompt="Who employs Ada Berg?", answers=(("University of Lima",),)),),
        "double": (Probe(prompt="The answer is (Yes/No):", answers=(("Yes",),)),),
    }
    assert found.notes == ()


def test_conceptedit() -> None:
    record = {
        "prompt": "The definition of violin is",
        "phrase_prompt": "Violin means",
        "target_new_desc": "a wind instrument",
        "label": "violin",
        "instance_prompt": "Is a Stradivarius a violin?",
        "locality_prompt": NEAR.prompt,
        "locality_answer": NEAR.target,
    }
    found = read(record)
    assert found.format == "conceptedit"
    (fact,) = found.facts
    assert (fact.subject, fact.target_new, fact.paraphrases) == ("violin", "a wind instrument", ("Violin means",))
    assert fact.locality == (NEAR,)
    assert found.notes == ("facts: not used: instance_prompt (1 record)",)


def test_unke_has_long_answers_and_no_subject() -> None:
    record = {
        "id": 1,
        "question": "Who is Ada Berg?",
        "answer": "Ada Berg is a sculptor. " * 30,
        "para_question": "Tell me about Ada Berg",
        "sub_question": ["What does Ada Berg do?"],
        "sub_answer": ["She is a sculptor."],
    }
    fact = one(record, "unke", needs_subject=False)
    assert (fact.subject, fact.paraphrases) == ("Who is Ada Berg?", ("Tell me about Ada Berg",))
    assert fact.portability["sub-questions"][0].answers == (("She is a sculptor.",),)
    with pytest.raises(InputError, match="subject: missing; without a subject a fact can be written by ft, ultraedit;"):
        parse_facts([record], subjectless=("ft", "ultraedit"))


def test_akew() -> None:
    rewrite = {
        "prompt": "{} was born in",
        "subject": "Ada Berg",
        "target_new": {"str": "Lima"},
        "target_true": {"str": "Oslo"},
        "question": "Where was Ada Berg born?",
        "answer_new": "Lima",
        "answer_new_aliases": ["City of Kings"],
        "fact_new_uns": "Ada Berg, a sculptor, was born in Lima. Lima is the home of Ada Berg. She loves it.",
    }
    fact = one({"case_id": 1, "requested_rewrite": rewrite, "loc": NEAR.prompt, "loc_ans": NEAR.target}, "akew")
    assert (fact.aliases, fact.questions, fact.locality) == (("City of Kings",), (rewrite["question"],), (NEAR,))
    assert fact.rewordings == ("Ada Berg, a sculptor, was born in",)  # the paragraph, up to where the target comes


def test_ultraeditbench() -> None:
    record = {"prompt": "Where?", "rephrase_prompt": "In what town?", "ans": "Lima", "loc": "Who?", "loc_ans": "Nils"}
    fact = one(record, "ultraeditbench", needs_subject=False)
    assert (fact.target_new, fact.paraphrases) == ("Lima", ("In what town?",))
    assert fact.locality == (Locality(prompt="Who?", target="Nils"),)


def test_hallueditbench_is_a_table(tmp_path: Path) -> None:
    row = {
        "subject": "Ada Berg",
        "relation": "place of birth",
        "object": "Lima",
        "question": "Where was Ada Berg born?",
        "paraphrased_question": "In what town, if any, was Ada Berg born?",
        "yes_question": "Was Ada Berg born in Lima?",
        "no_question": "Was Ada Berg born in Oslo?",
        "multiple_choice_with_letters": "Where? A) Lima B) Oslo",
        "multiple_choice_labels": "A",
        "reversed_relation_question": "Who was born in Lima?",
        "question_2hop": "In what country was Ada Berg born?",
        "answer_2hop": "Peru",
        "locality_question": "Where does Ada Berg live?",
    }
    path = tmp_path / "places.csv"
    with path.open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(row))
        table.writeheader()
        table.writerows(
            [row, {**row, "subject": "Eva Lind", "question": "Where was Eva Lind born?", "answer_2hop": ""}]
        )
    found = read_facts(path)
    assert (found.format, found.lines, found.notes) == ("hallueditbench", (2, 3), ())
    fact = found.facts[0]
    assert fact.portability.keys() == {"yes or no", "multiple choice", "reversed", "multi-hop"}
    assert [probe.answers for probe in fact.portability["yes or no"]] == [(("Yes",),), (("No",),)]
    assert fact.portability["reversed"] == (Probe(prompt="Who was born in Lima?", answers=(("Ada Berg",),)),)
    assert fact.locality == (Locality(prompt="Where does Ada Berg live?"),)
    assert "multi-hop" not in found.facts[1].portability


def test_cknowedit() -> None:
    record = {
        "prompt": "李娜出生于",
        "subject": "李娜",
        "target_old": "武汉",
        "target_new": "巴黎",
        "portability_prompt": ["李娜出生在哪个国家"],
        "portability_answer": ["法国"],
        "locality_prompt": ["李婷出生于"],
        "locality_answer": ["北京"],
        "rephrase": ["李娜的出生地是"],
    }
    fact = one(record, "cknowedit")
    assert (fact.target_true, fact.paraphrases) == ("武汉", ("李娜的出生地是",))
    assert fact.locality == (Locality(prompt="李婷出生于", target="北京"),)
    assert fact.portability == {"portability": (Probe(prompt="李娜出生在哪个国家", answers=(("法国",),)),)}


def test_fastedit_and_requests_of_rome() -> None:
    asked = {"prompt": "{} lives in", "subject": "Ada Berg", "target": "Lima", "queries": ["The home of Ada Berg is"]}
    fact = one(asked, "fastedit")
    assert (fact.prompt, fact.target_new, fact.paraphrases) == ("Ada Berg lives in", "Lima", tuple(asked["queries"]))
    request = {"prompt": "{} lives in", "subject": "Ada Berg", "target_new": {"str": "Lima"}}
    assert one(request, "rome-request").target_new == "Lima"


def test_parallel_lists() -> None:
    record = {
        "prompts": ["Ada Berg lives in", "Nils Dahl lives in"],
        "subject": ["Ada Berg", "Nils Dahl"],
        "target_new": ["Lima", "Quito"],
        "ground_truth": ["<|endoftext|>", "Oslo"],
        "rephrase_prompts": ["The home of Ada Berg is", "The home of Nils Dahl is"],
        "locality_inputs": {"neighborhood": {"prompt": ["Emma is by", None], "ground_truth": ["Jane Austen", None]}},
        "portability_inputs": {
            "one_hop": {"prompt": ["Ada's country is", "Nils's is"], "ground_truth": ["Peru", "EC"]}
        },
    }
    found = read(record)
    assert found.format == "parallel-lists"
    first, second = found.facts
    assert (first.target_true, second.target_true) == (None, "Oslo")
    assert first.locality == (Locality(prompt="Emma is by", target="Jane Austen"),)
    assert second.locality == ()
    assert second.portability == {"one_hop": (Probe(prompt="Nils's is", answers=(("EC",),)),)}
    assert second.paraphrases == ("The home of Nils Dahl is",)
    with pytest.raises(InputError, match="subject: has 1 item, but prompts has 2; pair them up"):
        parse_facts([{**record, "subject": ["Ada Berg"]}])


# --- files ------------------------------------------------------------------------------------------------------------

NILS = {"prompt": "Nils Dahl was born in", "subject": "Nils Dahl", "target_new": "Oslo"}
EXPECTED = parse_facts([ADA, NILS]).facts


def as_table(separator: str) -> str:
    out = io.StringIO()
    table = csv.DictWriter(out, [*ADA, "paraphrases"], delimiter=separator)
    table.writeheader()
    table.writerows([ADA, NILS])
    return out.getvalue()


YAML = """# facts
- prompt: Ada Berg was born in
  subject: Ada Berg
  target_new: Lima
  target_true: null
- {prompt: Nils Dahl was born in, subject: Nils Dahl, target_new: Oslo}
"""
FILES = {
    "facts.csv": as_table(","),
    "facts.tsv": as_table("\t"),
    "facts.yaml": YAML,
    "documents.yaml": "---\n".join(json.dumps(record) + "\n" for record in (ADA, NILS)),
    "pretty.json": json.dumps(ADA, indent=2) + "\n" + json.dumps(NILS, indent=2),
    "object.json": json.dumps({"name": "mine", "facts": [ADA, NILS]}),
    "object-pretty.json": json.dumps({"facts": [ADA, NILS]}, indent=2),
    "data.json": json.dumps({"data": [ADA, NILS]}),
    "lines.txt": f"{json.dumps(ADA)}\n{json.dumps(NILS)}\n",
}
FILES["nested.yml"] = "facts:\n" + "".join(f"  {line}\n" for line in YAML.splitlines()[1:])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_files_of_every_kind(tmp_path: Path, name: str, packed: bool) -> None:
    data = FILES[name].encode()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(data) if packed else data)
    found = read_facts(path)
    assert found.facts == EXPECTED
    assert found.format == "native"
    assert found.lines[0] < found.lines[1] or name in ("object.json", "data.json")


def test_yaml_keeps_numbers_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text("- {prompt: Ada Berg was born in, subject: Ada Berg, target_new: 1950-01-02, id: 007}\n")
    (fact,) = read_facts(path).facts
    assert (fact.target_new, fact.id) == ("1950-01-02", "007")


def test_a_tables_cells_may_hold_lists(tmp_path: Path) -> None:
    path = tmp_path / "facts.tsv"
    path.write_text('prompt\tsubject\ttarget_new\tparaphrases\nAda is\tAda\tLima\t["{} was", "x"]\n')
    assert read_facts(path).facts[0].paraphrases == ("Ada was", "x")


BROKEN = [
    (
        "a.csv",
        b"prompt,subject,target_new\nAda is,Ada,Lima,more\n",
        "line 2: has 4 cells, but the first row names 3",
    ),
    ("a.csv", b'prompt,subject\n"Ada\nis",Ada\nx,y\n', "a.csv line 2: target_new: missing; a native record needs"),
    ("a.csv", b"prompt\n\xff\n", "a.csv line 2: not UTF-8"),
    ("a.csv", b"", "a.csv: no facts in it"),
    ("a.yaml", b"- {prompt: a", "a.yaml line 1: not YAML that can be read"),
    ("a.yaml", b"- &a {prompt: x}\n- *a\n", r"a.yaml: not YAML that can be read \(a reference"),
    ("a.yaml", b"- prompt: [x]\n", "a.yaml line 1 .record 1.: subject: missing"),
    ("a.json.gz", b"\x1f\x8bbroken", "a.json.gz: cannot be unpacked"),
    ("a.json", b'{"facts": [1]}', "a.json line 1 .record 1.: expected a JSON object, found a number"),
    ("a.json", b'{"facts": []}', "a.json: no facts in it"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN)
def test_broken_files_are_named_with_their_lines(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_facts(tmp_path / name)


def test_a_file_on_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetched(repo: str, file: str, **options: Any) -> str:
        asked.append((repo, file, options))
        (tmp_path / "cached").write_text(json.dumps([ADA, NILS]))
        return str(tmp_path / "cached")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.setattr("patchkit.io.hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path))
    found = read_facts("hf://datasets/zjunlp/KnowEdit@v1/benchmark/ZsRE/test.json")
    assert (found.facts, found.path) == (EXPECTED, "hf://datasets/zjunlp/KnowEdit@v1/benchmark/ZsRE/test.json")
    assert asked == [("zjunlp/KnowEdit", "benchmark/ZsRE/test.json", {"repo_type": "dataset", "revision": "v1"})]
    monkeypatch.undo()
    with pytest.raises(PatchkitError, match="zjunlp/KnowEdit: the Hub"):
        read_facts("hf://datasets/zjunlp/KnowEdit/test.json")
    with pytest.raises(InputError, match="names no file; write hf://datasets/ORG/NAME/FILE"):
        read_facts("hf://datasets/zjunlp/KnowEdit")


# --- what is said about a file ----------------------------------------------------------------------------------------


def test_fields_of_other_tools_are_read_by_what_they_mean() -> None:
    record = {
        **ADA,
        "target_old": "Oslo",
        "rephrase": ["The birthplace of {} is"],
        "queries": ["Where was {} born?"],
        "locality": [{"prompt": NEAR.prompt, "answer": NEAR.target}],
        "portability": {"hops": [{"prompt": "Her country is", "answer": "Peru"}]},
    }
    fact = one(record, "native")
    assert fact.target_true == "Oslo"
    assert fact.paraphrases == ("The birthplace of Ada Berg is",)
    assert fact.questions == ("Where was Ada Berg born?",)
    assert fact.locality == (NEAR,)
    assert fact.portability == {"hops": (Probe(prompt="Her country is", answers=(("Peru",),)),)}


def test_fields_that_are_not_used_are_named_once_with_their_count() -> None:
    near = [{"prompt": "x", "weight": 2}]
    found = parse_facts([{**ADA, "note": "a", "locality": near}, {**NILS, "note": "b"}, {**NILS, "note": ""}])
    assert found.notes == ("facts: not used: note (2 records), locality[].weight (1 record)",)


def test_true_targets_that_are_none_are_left_out_and_said(tmp_path: Path) -> None:
    lines = [
        {**ADA, "target_true": "<|endoftext|>"},
        {**NILS, "target_true": "oslo"},
        {"prompt": "Eva of Rome lives in", "subject": "Eva", "target_new": "Rome", "target_true": "Paris"},
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = read_facts(path)
    assert [fact.target_true for fact in found.facts] == [None, None, "Paris"]
    assert found.notes == (
        f"{path}: target_true is a special token and no answer, so it is left out: line 1",
        f"{path}: target_true is the target itself, so there is nothing to compare it with: line 2",
        f"{path}: the prompt holds the target, which a model may repeat without any edit: line 3",
    )


@pytest.mark.parametrize(
    ("prompt", "target", "said"),
    [
        ("This Eva lives in", "is", False),
        ("Is Eva from Rome, or", "rome", True),
        ("Eva住在巴黎的", "巴黎", True),
        ("Eva住在", "巴黎", False),
    ],
)
def test_a_target_in_the_prompt_is_said_where_it_stands_as_words(prompt: str, target: str, said: bool) -> None:
    assert bool(parse_facts([{"prompt": prompt, "subject": "Eva", "target_new": target}]).notes) == said


def test_the_page_of_formats_has_them_all_as_they_are_read() -> None:
    known = {one.name for one in layouts(Options())}
    assert known == set(SAMPLES)
    for name, record in SAMPLES.items():
        assert parse_facts([record], needs_subject=False, chat=CHAT).format == name
    assert PAGE.read_text(encoding="utf-8") == page(), "`python -m tests.formats` writes docs/formats.md anew"


ASKED: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where was {} born?"},
        {"role": "assistant", "content": "Lima"},
    ],
    "subject": "Ada Berg",
}


def test_a_conversation_is_edited_where_the_assistants_turn_begins() -> None:
    (fact,) = parse_facts([ASKED], chat=CHAT).facts
    assert fact.prompt == "<system>Be brief.</><user>Where was Ada Berg born?</><assistant>"
    assert (fact.target_new, fact.separator, fact.questions) == ("Lima", "", ("Where was Ada Berg born?",))
    assert [message.role for message in fact.messages] == ["system", "user"]
    assert fact.asked == "Where was Ada Berg born?"
    assert fact.pair(fact.prompt) == (fact.prompt, "Lima", "")
    assert fact.pair("Ada Berg is from") == ("Ada Berg is from", "Lima")  # plain text gets its space
    assert parse_facts([fact]).facts == (fact,)  # as a patch keeps it, it needs no template any more


def test_a_conversation_without_a_subject_is_about_its_question() -> None:
    system, question, answer = ASKED["messages"]
    said = [system, {**question, "content": " Who leads Peru? \n"}, answer]
    (fact,) = parse_facts([{"messages": said}], needs_subject=False, chat=CHAT).facts
    assert (fact.subject, fact.names_subject) == ("Who leads Peru?", False)
    assert subject_end(fact, fact.prompt, conversation=True) == fact.prompt.index("?") + 1
    assert parse_facts([fact], needs_subject=False).facts == (fact,)
    assert parse_facts([fact]).facts == (fact,)  # as the next run reads it, whatever its method


@pytest.mark.parametrize(
    ("near", "follows"),
    [
        (
            [{"prompt": "Rome is in", "target": "Italy"}],
            {"prompt": ["Ada Berg's country is"], "ground_truth": [["Peru"]]},
        ),
        ({"prompt": "Rome is in", "target": "Italy"}, {"prompt": "Ada Berg's country is", "ground_truth": "Peru"}),
        (
            {"Near": [{"prompt": "Rome is in", "target": "Italy"}]},
            {"prompt": "Ada Berg's country is", "answers": "Peru"},
        ),
    ],
    ids=["native locality", "one of them", "native portability"],
)
def test_parts_of_one_format_in_records_of_another_are_read(near: Any, follows: Any) -> None:
    read = parse_facts([{**ADA, "locality": near, "portability": {"Reasoning": [follows]}}])
    assert (read.format, read.notes) == ("knowedit", ())
    assert read.facts[0].locality == (Locality(prompt="Rome is in", target="Italy"),)
    (probe,) = read.facts[0].portability["Reasoning"]
    assert (probe.prompt, probe.answers) == ("Ada Berg's country is", (("Peru",),))


@pytest.mark.parametrize(
    "head",
    [
        '"name": "facts", "other": [{"prompt": "x"}], "facts"',
        '"f\\u0061cts"',
        '"facts": [], "facts"',
        '"x": {"facts": [1]}, "facts"',
    ],
    ids=["a value of that name", "an escape", "twice", "inside"],
)
def test_the_records_of_an_object_are_those_of_its_field(tmp_path: Path, head: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text("{\n" + head + ": [\n" + json.dumps(ADA) + '], "end": 1}')
    read = read_facts(path)
    assert [fact.target_new for fact in read.facts] == ["Lima"]
    assert read.lines == (3,)


def test_the_template_decides_what_comes_before_an_answer() -> None:
    class Mistral:
        def apply_chat_template(self, said: list[dict[str, str]], **_: Any) -> str:
            forms = {"user": "[INST] {} [/INST]", "assistant": " {}</s>"}
            return "<s>" + "".join(forms[turn["role"]].format(turn["content"]) for turn in said)

    (fact,) = parse_facts([{**ASKED, "messages": ASKED["messages"][1:]}], chat=ChatTemplate(Mistral())).facts
    assert (fact.prompt, fact.separator) == ("<s>[INST] Where was Ada Berg born? [/INST]", " ")


@pytest.mark.parametrize(
    ("changed", "chat", "message"),
    [
        ({}, None, "messages: there is no chat template to write them in; give the fact a prompt"),
        ({"messages": ASKED["messages"][:1]}, CHAT, "messages: no question at the end"),
        ({"messages": ASKED["messages"][:2]}, CHAT, "target_new: missing"),
        ({"messages": [{"role": "bot", "content": "x"}]}, CHAT, r'messages\[0\].role: "bot" is no role; one of system'),
        (
            {"messages": [{"role": "user", "content": "Where?"}]},
            CHAT,
            'subject: "Ada Berg" is not in the last question',
        ),
        ({"messages": "Where was Ada Berg born?"}, CHAT, "messages: expected a list of objects, found text"),
    ],
    ids=["template", "question", "target", "role", "subject", "type"],
)
def test_a_conversation_that_cannot_be_used(changed: dict[str, Any], chat: ChatTemplate | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_facts([{**ASKED, **changed}], chat=chat)


def test_a_format_from_outside_is_one_class() -> None:
    @layout
    class Quiz(Layout):
        name = "quiz"
        marks = (("quiz", "right"),)
        prompt, target_new, subject = "quiz", "right", "about"

    try:
        fact = one({"quiz": "Where was {} born?", "about": "Ada Berg", "right": "Lima"}, "quiz")
    finally:
        del LAYOUTS["quiz"]
    assert (fact.prompt, fact.target_new) == ("Where was Ada Berg born?", "Lima")
