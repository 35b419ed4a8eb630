"""A tokenizer's chat template: what a question looks like to a chat model, and how its answer ends."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from patchkit.errors import InputError

Turn = tuple[str, str]
"""What a user said, and what the assistant answered."""


class NotTaken(InputError):
    """A conversation that the chat template does not take.

    Attributes:
        reason: what the template says of it.
    """

    def __init__(self, roles: Sequence[str], reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"chat template: it does not take a conversation of {', '.join(roles)} ({reason}); mend it in the "
            "tokenizer's files, or take it out there to do without chat"
        )


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations as text, special tokens included, as chat servers do."""

    tokenizer: Any

    def ask(self, question: str, system: str | None = None, turns: Sequence[Turn] = ()) -> str:
        """The conversation up to where the assistant's answer begins.

        A template that takes no system message gets that text at the beginning of the user's first words.

        Raises:
            NotTaken: the template takes it in neither form.
        """
        said = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        said.append(("user", question))
        try:
            return self._render([("system", system), *said] if system else said)
        except NotTaken:
            if not system:
                raise
            (role, first), *others = said
            return self._render([(role, f"{system}\n\n{first}"), *others])

    def parts(self, message: str, end: str, system: str | None = None, turns: Sequence[Turn] = ()) -> tuple[str, str]:
        """`ask`, cut before the `end` of the message, so that nothing is looked for in what the template says.

        Raises:
            InputError: the template does not write the message as it is.
        """
        whole = self.ask(message, system, turns)
        start = whole.rfind(end if end in whole else end.strip())  # many templates write no space around a message
        if start < 0:
            raise InputError(
                f'chat template: it does not write what a user says as it is: there is no "{end}" in what it makes of '
                "that; mend it in the tokenizer's files, or take it out there to do without chat"
            )
        return whole[:start], whole[start:]

    def conversation(self, said: Sequence[tuple[str, str]], answer: bool = True) -> str:
        """Roles and what each says, and then, with `answer`, what comes before the assistant's.

        Raises:
            NotTaken: the template does not take such a conversation.
        """
        return self._render(said, answer)

    @cached_property
    def beginnings(self) -> tuple[str, ...]:
        """What it writes before the first message, without a system message and with one; none where that is nothing,
        or where the template takes neither."""
        found = []
        for system in (None, "Patchkit's system message"):
            with suppress(NotTaken):
                whole = self.ask("Patchkit's question", system)
                found.append(whole.partition(system or "Patchkit's question")[0])
        return tuple(text for text in found if text.strip())

    @cached_property
    def end(self) -> str:
        """What the template writes after an answer, such as "<|im_end|>"."""
        answered = self._render([("user", "Hello"), ("assistant", "Patchkit")], answer=False)
        return answered.rpartition("Patchkit")[2].rstrip("\n")

    def _render(self, said: Sequence[tuple[str, str]], answer: bool = True) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in said],
                tokenize=False,
                add_generation_prompt=answer,
                enable_thinking=False,  # answers are wanted, not the thoughts before them; most templates ignore it
            )
        except Exception as error:  # a template is a program, which can raise anything
            raise NotTaken([role for role, _ in said], str(error) or type(error).__name__) from None
        return text


def chat_template(tokenizer: Any) -> ChatTemplate | None:
    """The tokenizer's chat template; None where it has none."""
    return ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None


def is_rendered(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer's chat template made the text, or its beginning."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return False
    known = _BEGINNINGS.get(tokenizer)
    if known is None or known[0] != template:
        known = _BEGINNINGS[tokenizer] = (template, ChatTemplate(tokenizer).beginnings)
    return text.startswith(known[1])


_BEGINNINGS: MutableMapping[Any, tuple[Any, tuple[str, ...]]] = WeakKeyDictionary()
"""By tokenizer its template and what that begins with, as texts are encoded by the thousand."""
