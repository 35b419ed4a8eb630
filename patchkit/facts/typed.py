"""Facts typed on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from patchkit.errors import InputError
from patchkit.facts.containers import Entry
from patchkit.words import counted

FORM = "prompt | subject | target"


def typed_entries(texts: Sequence[str], name: str) -> Iterator[Entry]:
    """Facts in the form "prompt | subject | target"; several are counted from 1, as lines are.

    Raises:
        InputError: a text is not of this form.
    """
    for number, text in enumerate(texts, 1):
        yield Entry(name if len(texts) == 1 else f"{name} {number}", number, text, typed_fact(text, name))


def typed_fact(text: str, name: str = "--fact") -> dict[str, str]:
    """The record of one text; the prompt may have `{}` for the subject, which may be left out.

    Raises:
        InputError: the text is not of this form.
    """
    parts = [part.strip() for part in text.split("|")]
    if len(parts) not in (2, 3):
        raise InputError(f'{name} "{text}": has {counted(len(parts), "part")}, not 3; write it as "{FORM}"')
    prompt, *subject, target = parts
    return {"prompt": prompt, **({"subject": subject[0]} if subject and subject[0] else {}), "target_new": target}
