"""Facts typed on the command line."""

from __future__ import annotations

from collections.abc import Iterable

from patchkit.errors import InputError

FORM = "prompt | subject | target"


def typed_facts(texts: Iterable[str]) -> list[dict[str, str]]:
    """Records of facts in the form "prompt | subject | target"; the prompt may have `{}` for the subject, which may be
    left out.

    Raises:
        InputError: a text is not of this form.
    """
    return [_typed(text) for text in texts]


def _typed(text: str) -> dict[str, str]:
    parts = [part.strip() for part in text.split("|")]
    if len(parts) not in (2, 3):
        raise InputError(f'--fact "{text}": has {len(parts)} parts, not 3; write it as "{FORM}"')
    prompt, *subject, target = parts
    return {"prompt": prompt, **({"subject": subject[0]} if subject and subject[0] else {}), "target_new": target}
