"""What a fact is, whatever file it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from patchkit.words import in_short

Pair = tuple[str, str] | tuple[str, str, str]
"""A prompt and what should follow it, and what comes between where that is not left to `patchkit.facts.text`."""


class Locality(BaseModel):
    """A prompt whose continuation an edit should leave alone, and what it is expected to say (None: not known).

    `aliases` are other forms of that answer.

    Raises:
        pydantic.ValidationError: a field is missing, unknown, or of another type.

    Examples:
        >>> patchkit.Locality(prompt="The Louvre is in the city of", target="Paris").aliases
        ()
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    target: str | None = None
    aliases: tuple[str, ...] = ()


Answers = tuple[tuple[str, ...], ...]
"""What an answer has to hold: every item, in any of its forms."""


class Condition(BaseModel):
    """Something that a model has to know, with the answer, before anything can follow from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    answers: Answers


class Probe(BaseModel):
    """A prompt whose answer follows from a fact: each of `answers` is to be in it, in any of its forms.

    Where there are `alternatives` to the prompt, it is enough if one of them all is answered. It counts only where the
    base answers all `conditions`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    alternatives: tuple[str, ...] = ()
    answers: Answers
    conditions: tuple[Condition, ...] = ()


class Message(BaseModel):
    """One turn of a conversation, as chat templates take it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Fact(BaseModel):
    """One fact to write: after `prompt`, which holds `subject` verbatim, the model should say `target_new`.

    Editing reads, and scoring never does: `rewordings`, further prompts with the subject verbatim.

    Scoring reads, and editing never does: `paraphrases`, prompts with the same target; `questions`, asked in the chat
    template; `about`, neutral texts about the subject, which should not bring up the target; `locality`; and
    `portability`, what follows from the fact, in groups such as Reasoning (KnowEdit). Where an answer is judged, any of
    `aliases` stands for the target.

    `separator` is what comes between a prompt and its target; None leaves it to `patchkit.facts.text.continuation`.
    Facts with the same `case` are edited together. Of a fact that was written as a conversation, `messages` is that
    conversation up to the assistant's turn, and `prompt` what the chat template makes of it.

    Facts cannot be changed. Whether the subject stands in the prompt, and whatever else makes a fact unusable, is
    checked where facts are read: by `patchkit.read_facts`, and by `patchkit.apply`, which takes mappings as well.

    Raises:
        pydantic.ValidationError: a field is missing, unknown, or of another type.

    Examples:
        >>> fact = patchkit.Fact(
        ...     id="eiffel",
        ...     prompt="The Eiffel Tower is located in the city of",
        ...     subject="The Eiffel Tower",
        ...     target_new="Rome",
        ...     paraphrases=("To see the Eiffel Tower you travel to",),
        ... )
        >>> fact.pair(fact.prompt)
        ('The Eiffel Tower is located in the city of', 'Rome')
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    aliases: tuple[str, ...] = ()
    rewordings: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    locality: tuple[Locality, ...] = ()
    portability: dict[str, tuple[Probe, ...]] = {}
    separator: str | None = None
    case: str | None = None
    source: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def asked(self) -> str:
        """What a user says to ask for it: the prompt, or the last message of a conversation."""
        return self.messages[-1].content if self.messages else self.prompt

    @property
    def names_subject(self) -> bool:
        """Whether it has a subject of its own: where it has none, its whole prompt or question stands in that place."""
        return self.subject not in (self.prompt.strip(), self.asked.strip())

    @property
    def in_short(self) -> str:
        """Its id, with what it says."""
        return in_short(self.id, self.subject, self.target_new)

    def __hash__(self) -> int:
        return hash((self.id, self.prompt, self.target_new))  # not every field is hashable; equal facts agree in these

    def pair(self, prompt: str, target: str | None = None) -> Pair:
        """One of the fact's prompts with `target`, or with `target_new`, joined as the fact says."""
        target = self.target_new if target is None else target
        separator = self.joint(prompt)
        return (prompt, target) if separator is None else (prompt, target, separator)

    def joint(self, prompt: str) -> str | None:
        """What comes between one of the fact's prompts and its target; None leaves it to `patchkit.facts.text`.

        `separator` says it, but of a conversation for its own rendering alone: its other prompts are plain text.
        """
        return None if self.messages and prompt != self.prompt else self.separator


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

    `lines` has the line of each fact, counted as in `Rejected`; `notes` has, a sentence each, what else a user should
    know, such as fields that are not used. `digest` is the sha256 of a file's bytes.
    """

    facts: tuple[Fact, ...]
    rejected: tuple[Rejected, ...]
    path: str
    format: str
    lines: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str | None = None


def fact_schema() -> dict[str, Any]:
    """The JSON schema of a native record. `id` may be left out, and fields it does not name are ignored."""
    schema = Fact.model_json_schema()
    schema["required"].remove("id")
    del schema["additionalProperties"]
    return schema
