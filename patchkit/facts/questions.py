"""Questions that English prompts answer: "The capital of Australia is" becomes "What is the capital of Australia?".

People ask where files of facts have sentences to complete, and models of all sizes tell the two apart. A few rules are
enough, as what they make is tried on the model before it is used (`patchkit.editing.teacher`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ENGLISH = re.compile(r"\b(the|is|was|are|were|will|of|by|with|from|works|has)\b")
_NAMED = re.compile(r"(?P<what>.+) (?P<be>is|was|are|were)(?: the| a| an)?")
_STATED = re.compile(r"(?P<what>.+?) (?P<be>is|was|are|were|will be) (?P<rest>.+)")
_OPEN_END = re.compile(r"(?:^| )(?P<by>in|at|on|by|as|of|to|into|from|for|with)(?: the| a| an)?(?: \w+ (?:of|in))?$")


def questions_of(prompt: str, subject: str) -> tuple[str, ...]:
    """Questions about `subject` that the end of `prompt` would answer, plain ones before the one that repeats it; none
    where the prompt is a question or not in English."""
    prompt = prompt.strip()
    if prompt.endswith("?") or not _ENGLISH.search(prompt):
        return ()
    found = [*_asked(prompt, subject), f"{prompt} what?"]
    return tuple(question for question in dict.fromkeys(found) if subject in question)


def _asked(prompt: str, subject: str) -> Iterator[str]:
    if named := _NAMED.fullmatch(prompt):
        yield from (
            f"{word} {named['be']} {_inside(named['what'], subject)}?" for word in ("What", "Who", "Where", "When")
        )
    elif stated := _STATED.fullmatch(prompt):
        be, _, more = stated["be"].partition(" ")  # "will be": "will ... be"
        asked, end = f"{be} {_inside(stated['what'], subject)} {more}".rstrip(), stated["rest"]
        if at := _OPEN_END.search(end):
            yield from (f"{word} {asked} {end[: at.start()]}".rstrip() + "?" for word in ("Where", "When"))
            if at["by"] == at[0].strip():
                yield from (f"{word} {asked} {end}?" for word in ("Who", "What"))


def _inside(words: str, subject: str) -> str:
    """Words that began a sentence, in the middle of one."""
    if words.startswith(subject) or not words.startswith(("The ", "A ", "An ")):
        return words
    return words[0].lower() + words[1:]
