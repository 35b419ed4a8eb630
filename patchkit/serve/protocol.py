"""The part of OpenAI's HTTP interface that is served: requests in, chunks and whole answers out.

What a request asks for and is not here is refused, never left out without a word.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

from patchkit import seeds
from patchkit.errors import InputError
from patchkit.evaluate.answers import Ask
from patchkit.serve.talker import Length, Reply

_NOTHING: tuple[Any, ...] = (None, False, 0, [], {}, "", "none", "auto", {"type": "text"})
"""Values by which a client says that it does not ask for something; and that it wants one answer, by n = 1."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-seeds.MOST, le=seeds.MOST)
    stream: bool = False
    stream_options: Mapping[str, Any] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _nothing_else(self) -> _Request:
        more = {name: value for name, value in (self.model_extra or {}).items() if (name, value) != ("n", 1)}
        asked = [name for name, value in more.items() if value not in _NOTHING]
        if asked:
            raise ValueError(f"{', '.join(asked)}: not served here; leave it out")
        return self

    @property
    def length(self) -> Length:
        """How long the answer may be, and how it is sampled."""
        return Length(self.max_tokens, self.temperature, self.top_p, self.seed)


class Message(BaseModel):
    """One message of a conversation, of text only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def length(self) -> Length:
        """As of any request; this one has two names for the number of tokens."""
        usual = super().length
        return Length(self.max_completion_tokens or usual.tokens, usual.temperature, usual.top_p, usual.seed)

    @property
    def ask(self) -> Ask:
        """The conversation: a system message, turns of user and assistant, and the user's last words.

        Raises:
            InputError: the messages have another order.
        """
        system, said = "", list(self.messages)
        if said[0].role in ("system", "developer"):
            system = said.pop(0).content
        users, assistants = said[0::2], said[1::2]
        roles = {message.role for message in users}, {message.role for message in assistants}
        if len(said) % 2 == 0 or roles[0] != {"user"} or not roles[1] <= {"assistant"}:
            raise InputError("messages: give a system message or none, then user and assistant in turn, the user last")
        turns = tuple((one.content, other.content) for one, other in zip(users[:-1], assistants, strict=True))
        return Ask(users[-1].content, True, system, turns)


class TextRequest(_Request):
    """POST /v1/completions."""

    prompt: str

    @property
    def ask(self) -> Ask:
        """A text to go on with."""
        return Ask(self.prompt, message=False)


class LoadRequest(BaseModel):
    """POST /v1/load_lora_adapter, with vLLM's names: a patch's folder or repository."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class Form:
    """How one answer is written down, whole or in chunks."""

    def __init__(self, model: str, chat: bool) -> None:
        kind = "chat.completion" if chat else "text_completion"
        self._chat = chat
        self._head = {"id": f"{kind}-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def whole(self, text: str, reply: Reply) -> dict[str, Any]:
        """The answer in one piece."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {**self._head, **_choice(said, reply.finish_reason), "usage": usage(reply)}

    def chunk(self, piece: str, finish: str | None = None) -> dict[str, Any]:
        """One piece of it."""
        delta = {"content": piece} if piece else {}
        said = {"delta": delta} if self._chat else {"text": piece}
        head = {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head
        return {**head, **_choice(said, finish)}

    def last(self, reply: Reply) -> dict[str, Any]:
        """What it took, after the last piece."""
        return {**self.chunk(""), "choices": [], "usage": usage(reply)}


def _choice(said: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]}


def usage(reply: Reply) -> dict[str, int]:
    """How many tokens were read and made."""
    given = len(reply.ids)
    return {"prompt_tokens": given, "completion_tokens": reply.made, "total_tokens": given + reply.made}
