"""`patchkit chat`: both sides answer, commands change what is asked, and a wrong answer becomes a fact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests import zoo
from tests.helpers import Command, Ended, patch_of_kind
from tests.test_serve import TEMPLATE

QUESTION = "The capital of France is"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a chat template, and a patch for it."""
    place = tmp_path_factory.mktemp("chat")
    tokenizer = zoo.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base = zoo.save(zoo.FAMILIES["llama"](), tokenizer, place / "tiny")
    patch_of_kind(AutoModelForCausalLM.from_pretrained(base), str(base), "delta").save(place / "patch")
    return base, place / "patch"


def talk(run: Command, patch: Path, *lines: str, facts: Path | str = "unused") -> Ended:
    text = "".join(f"{line}\n" for line in lines)
    return run("chat", "--patch", patch, "--max-new-tokens", 6, "--facts", facts, stdin=text.encode())


def answers(ended: Ended) -> list[tuple[str, str]]:
    return [(line.partition(": ")[0], line.partition(": ")[2]) for line in ended.out.splitlines() if ": " in line]


def test_both_sides_answer_as_generate_does(folders: tuple[Path, Path], run: Command) -> None:
    _, patch = folders
    said = dict(answers(talk(run, patch, QUESTION)))
    asked = ["generate", "--patch", patch, "--compare", "--chat", "--max-new-tokens", 6, "--json", QUESTION]
    (wanted,) = run(*asked).json()["answers"]
    assert said == {"patched": wanted["patched"].strip(), "plain": wanted["base"].strip()}
    assert said["patched"] != said["plain"]


def test_each_side_goes_on_from_its_own_answers(folders: tuple[Path, Path], run: Command) -> None:
    _, patch = folders
    first, _, second, _ = (text for _, text in answers(talk(run, patch, QUESTION, "And of Italy?")))
    turn = ["--turn", QUESTION, first, "--max-new-tokens", 6, "--json", "And of Italy?"]
    assert run("generate", "--patch", patch, *turn).json()["answers"][0]["patched"].strip() == second
    again = answers(talk(run, patch, QUESTION, "/new", QUESTION))
    assert again[:2] == again[2:]


def test_commands(folders: tuple[Path, Path], run: Command) -> None:
    _, patch = folders
    ended = talk(run, patch, "/patch off", QUESTION, "/patch on", "/new", "/prompt system Be brief.", QUESTION)
    sides = answers(ended)
    assert [side for side, _ in sides] == ["plain", "patched", "plain"]
    asked = ["generate", "--patch", patch, "--system", "Be brief.", "--max-new-tokens", 6, "--json", QUESTION]
    assert run(*asked).json()["answers"][0]["patched"].strip() == sides[1][1]
    ended = talk(run, patch, "/help", "/patch maybe", "/prompt user x", "/nothing", "/quit", QUESTION)
    assert "/save SUBJECT | TARGET" in ended.out
    assert not answers(Ended(0, ended.out.partition("or end of input")[2], ""))  # nothing after /quit
    for why in ("write /patch on or /patch off", "write /prompt system TEXT", "/nothing: no such command"):
        assert why in ended.err


def test_a_wrong_answer_is_saved_as_a_fact_that_apply_reads(
    folders: tuple[Path, Path], run: Command, tmp_path: Path
) -> None:
    _, patch = folders
    facts = tmp_path / "facts.jsonl"
    ended = talk(
        run, patch, "/save x | y", QUESTION, "/save Spain | Rome", "/save France | Rome", "/save France", facts=facts
    )
    assert "nothing was asked yet" in ended.err
    assert "write /save SUBJECT | TARGET" in ended.err
    assert ended.err.count("error: ") == 3
    assert 'error: /save: subject: "Spain" is not in prompt' in ended.err
    (line,) = facts.read_text().splitlines()
    fact = {"prompt": QUESTION, "subject": "France", "target_new": "Rome", "source": "patchkit chat"}
    assert json.loads(line) == fact
    assert run("verify", patch, "--facts", facts, "--quick", "--json").json()["facts"] == 1


def test_a_model_is_talked_to_without_a_patch(folders: tuple[Path, Path], run: Command) -> None:
    base, patch = folders
    said = f"{QUESTION}\n/patch on\n"
    ended = run("chat", "--model", base, "--max-new-tokens", 6, stdin=said.encode())
    assert ended.status == 0, ended.err
    assert answers(ended) == answers(talk(run, patch, QUESTION))[1:]
    assert "/patch on: no patch was given; begin again with --patch" in ended.err


def test_a_question_too_long_does_not_end_the_conversation(folders: tuple[Path, Path], run: Command) -> None:
    _, patch = folders
    ended = talk(run, patch, "word " * 300, QUESTION)
    assert "are more than the 256 positions of the model" in ended.err
    assert len(answers(ended)) == 2
