"""Facts as conversations, in the form that chat templates and training data have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, get_args

from patchkit.facts.chat import NotTaken
from patchkit.facts.layout import layout
from patchkit.facts.layouts.native import Native
from patchkit.facts.record import MISSING, Record, Refused, quote
from patchkit.facts.schema import Fact, Message

_ROLES = get_args(Message.model_fields["role"].annotation)


@layout
class Messages(Native):
    """Native fields with `messages` in place of the prompt.

    The assistant's last turn is the target, unless there is `target_new`. What the chat template makes of the turns
    before it is the prompt, to which the target is added as the template adds an answer. The last question, which has
    to hold the subject, is also asked as `questions` are, where the record has none.
    """

    name = "messages"
    optional = ("messages", *Native.optional)

    @classmethod
    def fit(cls, record: Record) -> int:
        """By its turns."""
        return 5 if record.value.get("messages") else 0

    def split(self, record: Record) -> Iterable[Record]:
        """The record with the prompt that the template makes of its turns; a prompt that is there is kept."""
        said = _turns(record)
        made: dict[str, Any] = dict(record.value)
        if said[-1][0] == "assistant":
            made.setdefault("target_new", said.pop()[1])
        if not said or said[-1][0] != "user":
            raise Refused(record.named("messages"), "no question at the end; write a user's turn, and then its answer")
        subject = record.get("subject")
        if subject in (None, MISSING) and (instead := self._without_subject(said[-1][1])) is not None:
            subject = made["subject"] = instead
        said = [(role, self.filled(text, subject) if isinstance(subject, str) else text) for role, text in said]
        if isinstance(subject, str) and subject not in said[-1][1]:
            message = f"{quote(subject)} is not in the last question {quote(said[-1][1])}; put it there verbatim"
            raise Refused(record.named("subject"), message)
        if "prompt" not in made:
            prompt, between = self._rendered(record, said, str(made.get("target_new") or "").strip())
            made |= {"prompt": prompt, "separator": between}
        made.setdefault("questions", [said[-1][1]])
        made["messages"] = [{"role": role, "content": text} for role, text in said]
        return (replace(record, value=made).known_as(self.synonyms),)

    def _without_subject(self, question: str) -> str | None:
        """What stands for a subject that the record leaves out: the whole question where the method needs none, else
        the proposed one, if subjects are proposed."""
        if not self.options.needs_subject:
            return question.strip()
        return self.options.find_subject(question) or "" if self.options.find_subject else None

    def read(self, record: Record) -> Fact:
        """The fact, with its conversation."""
        turns = tuple(Message(role=role, content=text) for role, text in _turns(record))
        return super().read(record).model_copy(update={"messages": turns})

    def _rendered(self, record: Record, said: list[tuple[str, str]], target: str) -> tuple[str, str]:
        """What the template makes of the turns, and what it writes between that and the answer."""
        if self.options.chat is None:
            advice = "give the fact a prompt, or use an instruction-tuned model"
            raise Refused(record.named("messages"), f"there is no chat template to write them in; {advice}")
        try:
            prompt = self.options.chat.conversation(said)
            whole = self.options.chat.conversation([*said, ("assistant", target)], answer=False)
        except NotTaken as error:
            raise Refused(record.named("messages"), f"the chat template does not take them ({error.reason})") from None
        between = whole.removeprefix(prompt).partition(target)[0] if target and whole.startswith(prompt) else ""
        return prompt, between if between.isspace() else ""


def _turns(record: Record) -> list[tuple[str, str]]:
    found = []
    for turn in record.objects("messages"):
        role, text = turn.text("role"), turn.text("content")
        if role not in _ROLES:
            raise Refused(turn.named("role"), f"{quote(role)} is no role; one of {', '.join(_ROLES)}")
        found.append((role, text))
    return found
