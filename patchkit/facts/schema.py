"""What a fact is, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict


class Locality(BaseModel):
    """A prompt whose continuation an edit should leave alone, and what it is expected to say (None: not known)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    target: str | None = None


class Fact(BaseModel):
    """One fact to write: after `prompt`, which holds `subject` verbatim, the model should say `target_new`.

    `rewordings` are further prompts with the subject verbatim, used for editing and never for scoring; `paraphrases`
    are used for scoring and never for editing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    rewordings: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Locality, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used. `line` counts from 1 in a file; from `parse_facts` it is the index, from 0."""

    line: int
    field: str | None
    message: str
    raw: str


@dataclass(frozen=True)
class FactFile:
    """What one file held. `format` is the name of a layout, such as native or counterfact, or mixed when they differ.

    `lines` has the line of each fact, counted as in `Rejected`.
    """

    facts: tuple[Fact, ...]
    rejected: tuple[Rejected, ...]
    path: str
    format: str
    lines: tuple[int, ...] = ()


def fact_schema() -> dict[str, Any]:
    """The JSON schema of a native record. `id` may be left out, and fields it does not name are ignored."""
    schema = Fact.model_json_schema()
    schema["required"].remove("id")
    del schema["additionalProperties"]
    return schema
