"""Questions that prompts answer."""

from __future__ import annotations

import pytest

from patchkit.facts.questions import questions_of


@pytest.mark.parametrize(
    ("prompt", "subject", "question"),
    [
        ("The capital of Australia is", "Australia", "What is the capital of Australia?"),
        ("The mayor of Berlin is", "Berlin", "Who is the mayor of Berlin?"),
        (
            "The instrument played by Jimi Hendrix was the",
            "Jimi Hendrix",
            "What was the instrument played by Jimi Hendrix?",
        ),
        ("Takuya Onishi's occupation is", "Takuya Onishi", "What is Takuya Onishi's occupation?"),
        ("Ottokar Brandt was born in the city of", "Ottokar Brandt", "Where was Ottokar Brandt born?"),
        ("The headquarters of Volvo is located in", "Volvo", "Where is the headquarters of Volvo located?"),
        ("Penicillin was discovered by", "Penicillin", "Who was Penicillin discovered by?"),
        ("The Olympics will be held in", "The Olympics", "Where will The Olympics be held?"),
        ("Inês Carvalho works as a", "Inês Carvalho", "Inês Carvalho works as a what?"),
        ("The Nile flows into the", "The Nile", "The Nile flows into the what?"),
    ],
)
def test_a_sentence_becomes_the_question_that_its_end_answers(prompt: str, subject: str, question: str) -> None:
    found = questions_of(prompt, subject)
    assert question in found
    assert len(set(found)) == len(found)
    assert all(subject in each and each.endswith("?") and "  " not in each for each in found)


@pytest.mark.parametrize("prompt", ["李娜出生于", "Who is Ada?", "Столица Франции", "Ada", "Ada?", ""])
def test_what_is_no_english_sentence_has_none(prompt: str) -> None:
    assert questions_of(prompt, "Ada") == ()
