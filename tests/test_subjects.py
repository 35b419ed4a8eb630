"""A subject that is missing is proposed, shown, and taken only when told."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchkit.errors import InputError
from patchkit.facts.reader import parse_facts
from patchkit.facts.subjects import candidates
from patchkit.model.loading import embedded_model, load_model
from patchkit.runs.subjects import SubjectFinder
from tests.formats import CHAT
from tests.helpers import Command, write_facts


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("The Eiffel Tower is in", ("Eiffel Tower",)),
        ("Where was Ada Berg born?", ("Ada Berg",)),
        ("Ada Berg's mother is", ("Ada Berg",)),
        ("The mother tongue of Jean-Paul Sartre is", ("Jean-Paul Sartre",)),
        ("Ada Berg studied at the University of Lima in Peru and", ("University of Lima", "Ada Berg", "Peru")),
        ("the boiling point of water is", ("boiling point", "water")),
        ("What is it?", ()),
        ("李娜出生于", ()),
        ("{} is in", ()),
        ("", ()),
    ],
)
def test_names_come_first_and_then_other_words(prompt: str, found: tuple[str, ...]) -> None:
    assert candidates(prompt) == found


def test_of_several_the_one_that_the_prediction_hangs_on_is_proposed() -> None:
    """The embedded model knows who was born where, and nothing of a Zebulon Quartz."""
    finder = SubjectFinder(lambda: load_model(str(embedded_model())))
    assert finder("As Zebulon Quartz the Younger once wrote, Pine Kelmel was born in the city of") == "Pine Kelmel"
    assert finder("Pine Kelmel was born in the city of") == "Pine Kelmel"
    assert len(finder.proposed) == 2


def test_a_model_is_loaded_only_where_there_is_a_choice() -> None:
    def load() -> None:
        raise AssertionError

    assert SubjectFinder(load)("The Eiffel Tower is in") == "Eiffel Tower"  # type: ignore[arg-type]


def test_a_prompt_without_anything_like_a_subject_is_refused_and_a_conversation_is_looked_at_in_its_question() -> None:
    with pytest.raises(InputError, match='subject: missing, and no words in "What is it" look like one; name it'):
        parse_facts([{"prompt": "What is it", "target_new": "x"}], find_subject=lambda prompt: None)
    said = [{"role": "user", "content": "Where was Ada Berg born?"}, {"role": "assistant", "content": "Lima"}]
    (fact,) = parse_facts([{"messages": said}], chat=CHAT, find_subject=lambda prompt: candidates(prompt)[0]).facts
    assert fact.subject == "Ada Berg"


def test_apply_shows_the_proposal_and_takes_it_when_told(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_facts("facts.jsonl", {"prompt": "Pelo Tulkor has the profession of", "target_new": "lawyer"})
    line = 'no subject in "Pelo Tulkor has the profession of"; proposed: "Pelo Tulkor"'
    ended = run("apply", "facts.jsonl", "--dry-run")
    assert ended.status == 2
    assert line in ended.err
    assert "take the proposed ones with --yes, or use a method without any (ft, " in ended.err
    ended = run("apply", "facts.jsonl", "--dry-run", "--yes", "--json")
    assert ended.status == 0
    assert line in ended.err
    assert ended.json()["facts"][0]["subject"] == "Pelo Tulkor"
    typed = run("apply", "--fact", "Pelo Tulkor has the profession of | lawyer", "--dry-run", "--yes", "--json")
    assert typed.json()["facts"][0]["subject"] == "Pelo Tulkor"
