"""Plain text as windows of tokens, and the record of it that patches and stored statistics keep."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InputError
from patchkit.facts.chat import ChatTemplate, chat_template
from patchkit.facts.requests import encode_prompt
from patchkit.io.places import shipped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens a window holds. Short, since most of what an edited model is asked is short, and the keys at the beginning of a
# text are unlike those in the middle of one: what is counted here is what edits leave alone (docs/statistics.md).
WINDOW = 32
PACKAGE_TEXT = shipped("data/text.txt")
SYSTEMS = (None, None, "You are a teacher.", "Answer in one sentence.")  # system messages of conversations, in turn


class TextRecord(BaseModel):
    """Which text a run or its statistics were made of, and how it was read.

    sha256 is that of the text, token_ids that of its tokens in their windows: another tokenizer gives another one. It
    is None in patches made before it was recorded; `window` is what was in use before that was recorded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: str = ""
    sha256: str = ""
    tokens: int = Field(0, ge=0, lt=2**48)
    window: int = Field(256, ge=1, lt=2**31)
    token_ids: str | None = None

    def same_reading(self, other: TextRecord) -> bool:
        """Whether both are of one text in windows of one length, and tokenized alike as far as is known."""
        if None not in (self.token_ids, other.token_ids):
            return self.token_ids == other.token_ids
        return (self.sha256, self.window) == (other.sha256, other.window)


@dataclass(frozen=True)
class Corpus:
    """Tokenized plain text in windows of at most `window` tokens, with the digest of the text it came from.

    bos: what each window begins with, (), or one token id.
    chats: how many of the windows, the last ones, hold the text as conversations in the chat template.
    """

    windows: tuple[tuple[int, ...], ...]
    digest: str
    source: str
    bos: tuple[int, ...] = ()
    chats: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return sum(len(w) for w in self.windows)

    @property
    def window(self) -> int:
        """Number of tokens in each window of plain text but the last."""
        return len(self.windows[0])

    def in_windows(self, window: int) -> Corpus:
        """The plain text in windows of another length, without conversations."""
        plain = self.windows[: len(self.windows) - self.chats]
        ids = [token for each in plain for token in each[len(self.bos) :]]
        return replace(self, windows=_windows(ids, self.bos, window), chats=0)

    @property
    def record(self) -> TextRecord:
        """What a manifest keeps of it."""
        ids = hashlib.sha256("|".join(",".join(map(str, window)) for window in self.windows).encode())
        return TextRecord(
            source=Path(self.source).name,
            sha256=self.digest,
            tokens=self.tokens,
            window=self.window,
            token_ids=ids.hexdigest(),
        )


def default_text(model_name: str, kind: str = "text") -> Path:
    """The text to use when the user names none: `patchkit-<kind>.txt` in the model's folder, else the package's."""
    beside = Path(model_name) / f"patchkit-{kind}.txt"
    return beside if beside.is_file() else PACKAGE_TEXT.with_name(f"{kind}.txt")


def read_corpus(
    path: str | Path, tokenizer: Any, tokens: int = 100_000, window: int = WINDOW, chat: bool = False
) -> Corpus:
    """Tokenize at most `tokens` tokens of a UTF-8 text file into windows; each begins with BOS where the model has it.

    Args:
        chat: read as many tokens of it once more, as conversations, where the tokenizer has a chat template. What a
            template writes around questions and answers has keys like nothing in plain text, and an edit that was
            never told to leave them alone changes every answer (docs/in_use.md).

    Raises:
        InputError: the file cannot be read or holds no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path}: cannot be read: {error}; give a UTF-8 text file") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    if len(ids) < 2 or not text.strip():
        raise InputError(f"text {path}: no text in it; give a file with some thousand words")
    start = tokenizer("a")["input_ids"][:1]
    bos = tuple(start) if start == [tokenizer.bos_token_id] else ()
    windows, template = _windows(ids, bos, window), chat_template(tokenizer) if chat else None
    chats = _conversations(text, template, len(ids), 3 * window) if template else ()
    return Corpus((*windows, *chats), hashlib.sha256(text.encode()).hexdigest(), str(path), bos, len(chats))


def _conversations(text: str, template: ChatTemplate, tokens: int, window: int) -> tuple[tuple[int, ...], ...]:
    """About `tokens` tokens of the text's sentences as questions and answers, cut to windows of one length."""
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]
    found = list[tuple[int, ...]]()
    for i in range(0, len(sentences) - 1, 2):
        asked = template.ask(sentences[i], SYSTEMS[i // 2 % len(SYSTEMS)])
        ids = encode_prompt(template.tokenizer, asked + sentences[i + 1] + template.end)
        found += [tuple(ids[:window])] if len(ids) >= window // 2 else []
        if len(found) * window >= tokens:
            break
    return tuple(found)


def _windows(ids: Sequence[int], bos: tuple[int, ...], window: int) -> tuple[tuple[int, ...], ...]:
    room = window - len(bos)
    return tuple((*bos, *ids[i : i + room]) for i in range(0, len(ids), room))


def window_of(model: PreTrainedModel, window: int = WINDOW) -> int:
    """`window`, or the number of positions the model has where it is smaller: learned ones end there."""
    return min(window, getattr(model.config.get_text_config(), "max_position_embeddings", None) or window)
