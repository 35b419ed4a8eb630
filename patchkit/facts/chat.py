"""A tokenizer's chat template: what a question looks like to a chat model, and how its answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

Turn = tuple[str, str]
"""What the user said, and what the assistant answered."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations as text. `end` is what the template writes after an answer, such as "<|im_end|>"."""

    tokenizer: Any
    end: str

    def ask(self, question: str, system: str | None = None, turns: Sequence[Turn] = ()) -> str:
        """The conversation up to where the assistant's answer begins.

        A template that takes no system message gets that text at the beginning of the first question.
        """
        messages = [{"role": role, "content": text} for turn in turns for role, text in zip(_ROLES, turn, strict=True)]
        messages.append({"role": "user", "content": question})
        if system is None:
            return _render(self.tokenizer, messages)
        try:
            return _render(self.tokenizer, [{"role": "system", "content": system}, *messages])
        except TemplateError:
            first = {"role": "user", "content": f"{system}\n\n{messages[0]['content']}"}
            return _render(self.tokenizer, [first, *messages[1:]])


_ROLES = ("user", "assistant")


def chat_template(tokenizer: Any) -> ChatTemplate | None:
    """The tokenizer's chat template; None where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    question, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Patchkit"}
    whole: str = tokenizer.apply_chat_template([question, answer], tokenize=False)
    return ChatTemplate(tokenizer, whole.rpartition("Patchkit")[2].rstrip("\n"))


def _render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text
