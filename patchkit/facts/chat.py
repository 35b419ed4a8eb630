"""A tokenizer's chat template: what a question looks like to a chat model, and how its answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

Turn = tuple[str, str]
"""What a user said, and what the assistant answered."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations as text, special tokens included, as chat servers do."""

    tokenizer: Any

    def ask(self, question: str, system: str | None = None, turns: Sequence[Turn] = ()) -> str:
        """The conversation up to where the assistant's answer begins.

        A template that takes no system message gets that text at the beginning of the user's first words.
        """
        said = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        said.append(("user", question))
        try:
            return self._render([("system", system), *said] if system else said)
        except TemplateError:
            if not system:
                raise
            (role, first), *others = said
            return self._render([(role, f"{system}\n\n{first}"), *others])

    def parts(self, message: str, end: str, system: str | None = None, turns: Sequence[Turn] = ()) -> tuple[str, str]:
        """`ask`, cut before the `end` of the message, so that nothing is looked for in what the template says."""
        whole = self.ask(message, system, turns)
        start = max(0, whole.rfind(end))
        return whole[:start], whole[start:]

    def conversation(self, said: Sequence[tuple[str, str]], answer: bool = True) -> str:
        """Roles and what each says, and then, with `answer`, what comes before the assistant's.

        Raises:
            TemplateError: the template does not take such a conversation.
        """
        return self._render(said, answer)

    @cached_property
    def end(self) -> str:
        """What the template writes after an answer, such as "<|im_end|>"."""
        answered = self._render([("user", "Hello"), ("assistant", "Patchkit")], answer=False)
        return answered.rpartition("Patchkit")[2].rstrip("\n")

    def _render(self, said: Sequence[tuple[str, str]], answer: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in said],
            tokenize=False,
            add_generation_prompt=answer,
            enable_thinking=False,  # answers are wanted, not the thoughts before them; most templates ignore it
        )
        return text


def chat_template(tokenizer: Any) -> ChatTemplate | None:
    """The tokenizer's chat template; None where it has none."""
    return ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
