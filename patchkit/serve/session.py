"""A conversation with the patched model and with its base at once, and facts saved from wrong answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from patchkit.errors import InputError
from patchkit.evaluate.answers import Ask
from patchkit.facts.chat import Turn
from patchkit.facts.reader import read_typed
from patchkit.facts.typed import typed_fact
from patchkit.serve.talker import Length, Talker

PATCHED, PLAIN = "patched", "plain"


@dataclass
class Session:
    """What was said so far, each side with its own answers.

    Attributes:
        patches: names of those that the patched side has, in order.
        patched: whether the patched side answers; the plain one always does.
        system: the system prompt; empty leaves it to the chat template.
    """

    talker: Talker
    patches: Sequence[str]
    length: Length
    patched: bool = True
    system: str = ""
    _turns: dict[str, list[Turn]] = field(default_factory=lambda: {PATCHED: [], PLAIN: []})

    @property
    def sides(self) -> tuple[str, ...]:
        """Who answers, in order."""
        return (PATCHED, PLAIN) if self.patched else (PLAIN,)

    @property
    def last_question(self) -> str | None:
        """What was asked last."""
        turns = self._turns[self.sides[0]]
        return turns[-1][0] if turns else None

    def ask(self, question: str) -> Iterator[tuple[str, str]]:
        """Who says what: pieces of each side's answer, one side after the other.

        Raises:
            InputError: the conversation is longer than the model's context.
        """
        for side in self.sides:
            ask = Ask(question, True, self.system, tuple(self._turns[side]))
            pieces = []
            for piece in self.talker.reply(ask, self.patches if side == PATCHED else (), self.length):
                pieces.append(piece)
                yield side, piece
            self._turns[side].append((question, "".join(pieces).strip()))

    def forget(self) -> None:
        """Begin a new conversation."""
        for turns in self._turns.values():
            turns.clear()

    def save(self, subject: str, target: str, file: Path) -> None:
        """Append the last question with the answer that it should have to a file of facts.

        Raises:
            InputError: nothing was asked yet, or it is no fact: the subject has to be in the question.
        """
        if self.last_question is None:
            raise InputError("/save: nothing was asked yet")
        text = f"{self.last_question.replace('|', ' ')} | {subject} | {target}"
        read_typed([text], name="/save")
        record = typed_fact(text, "/save")
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({**record, "source": "patchkit chat"}, ensure_ascii=False) + "\n")
