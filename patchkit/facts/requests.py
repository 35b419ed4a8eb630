"""Facts turned into token sequences: where the subject ends, where the target begins, after which contexts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.facts.chat import is_rendered
from patchkit.facts.schema import Fact
from patchkit.facts.text import continuation
from patchkit.model.devices import sent


@dataclass(frozen=True)
class Row:
    """One tokenized text: `subject` is the index of the subject's last token, `target` the first target token's.

    Of a row with `kept`, the tokens from `target` on are the untouched model's own, and what it predicts there, and
    after the last of them, is to stay as it is.
    """

    ids: tuple[int, ...]
    subject: int
    target: int
    kept: bool = False

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens before the subject's last one, which no edit at that position can change."""
        return self.ids[: self.subject]


@dataclass(frozen=True)
class EditRequest:
    """A fact ready for the model.

    Attributes:
        rows: texts after which the target is to be predicted, the first being the prompt alone.
        essence: the prompt on which the subject's essence must not drift.
        kept: texts about the subject that are to go on as they would without the edit.
    """

    fact: Fact
    rows: tuple[Row, ...]
    essence: Row
    kept: tuple[Row, ...] = ()

    @property
    def target_ids(self) -> tuple[int, ...]:
        """Token ids of the new target."""
        return self.rows[0].ids[self.rows[0].target :]


def ended(request: EditRequest, end: int) -> EditRequest:
    """The request with the token that ends a text after the target in each row where it does not stand already."""
    rows = (row if end in row.ids[row.target :] else replace(row, ids=(*row.ids, end)) for row in request.rows)
    return replace(request, rows=tuple(rows))


ESSENCE = "{} is a"  # ROME section 3.1: the prompt on which the subject's essence must not drift
SUBJECT = "{subject}"  # in a context: where the fact's subject comes


def build_request(
    fact: Fact, tokenizer: Any, contexts: Sequence[str] = ("",), only_prompt: bool = False
) -> EditRequest:
    """Tokenize `fact` in every context: after it, or with its subject in `SUBJECT`'s place and no prompt.

    The fact's rewordings take the places of contexts of the second kind, from the first on; what is over is left out.
    With `only_prompt` the prompt stands there as well: where other facts about the subject are written too, no sentence
    about it may say the target of one.

    Raises:
        InputError: the subject or the target covers no token.
    """
    rewordings = iter(fact.rewordings)
    rows = [
        _row(fact, tokenizer, *_in_context(fact, context, rewordings, only_prompt), fact.target_new)
        for context in contexts
    ]
    # The first token of a text without BOS is an attention sink, and its state and key are no subject's. Where the
    # fact's own prompt begins with it that is what is to be edited, but no wording need be.
    rows[1:] = [row if row.subject else rows[1] for row in rows[1:]]
    return EditRequest(fact, tuple(rows), essence_row(fact, tokenizer))


def essence_row(fact: Fact, tokenizer: Any) -> Row:
    """The prompt "{subject} is a"."""
    return _row(fact, tokenizer, "", ESSENCE.format(fact.subject), None)


def wording_row(fact: Fact, tokenizer: Any, before: str, text: str, ending: str = "") -> Row:
    """`text` after `before`, then the target and `ending`. The subject is the first one in `text`.

    Raises:
        InputError: the subject or the target covers no token.
    """
    return _row(fact, tokenizer, before, text, fact.target_new, ending)


def kept_row(fact: Fact, tokenizer: Any, before: str, text: str, following: Sequence[int]) -> Row:
    """`text` after `before`, then tokens that the untouched model predicts there. The subject is the first in `text`.

    Raises:
        InputError: the subject covers no token.
    """
    row = _row(fact, tokenizer, before, text, None)
    return Row((*row.ids, *following), row.subject, len(row.ids), kept=True)


def _in_context(fact: Fact, context: str, rewordings: Iterator[str], only_prompt: bool) -> tuple[str, str]:
    """What comes before, and the words that the target follows."""
    before, slot, after = context.partition(SUBJECT)
    if not slot:
        return before, fact.prompt
    return before, next(rewordings, fact.prompt if only_prompt else fact.subject + after)


@dataclass(frozen=True)
class Encoded:
    """Token ids, and from which character to which each token covers the text."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def last_token(self, end: int) -> int | None:
        """The token that completes the text up to the character before `end`; None where no token covers that one.

        Tokens and characters are not one-to-one. Byte-level tokenizers give every token of a character that character's
        whole span, and byte-fallback ones give all but its last token an empty one.
        """
        return max((i for i, (first, after) in enumerate(self.spans) if first < end <= after), default=None)


def encode(tokenizer: Any, text: str) -> Encoded:
    """A text that is to be continued: with a BOS where the tokenizer adds one, once, and never with an EOS. A chat
    template's has a BOS only if it writes one, as chat servers have it."""
    found = tokenizer(text, return_offsets_mapping=True)
    ids, spans = list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
    while len(ids) > 1 and spans[-1][1] == 0:  # what the tokenizer appends to every text covers no character
        del ids[-1], spans[-1]
    added = len(ids) > 1 and ids[0] == tokenizer.bos_token_id and spans[0] == (0, 0)
    if added and (ids[1] == ids[0] or is_rendered(tokenizer, text)):
        del ids[0], spans[0]
    return Encoded(tuple(ids), tuple(spans))


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a text that is to be continued, as `encode` has them."""
    return list(encode(tokenizer, prompt).ids)


def encode_target(tokenizer: Any, prompt: str, target: str, separator: str | None = None) -> tuple[list[int], int]:
    """Token ids of the prompt with the target after it, and the index of the target's first token.

    The prompt has the tokens it has when a user types it, and the target those it has at this place: tokenized alone
    it would come out differently, with a BOS or without its leading space.

    Args:
        separator: what comes between; None leaves that to `patchkit.facts.text.continuation`.
    """
    ids = encode_prompt(tokenizer, prompt)
    return [*ids, *_following(tokenizer, prompt, ids, continuation(prompt, target, separator))], len(ids)


def _following(tokenizer: Any, prompt: str, ids: list[int], text: str) -> list[int]:
    """Token ids of `text` after `prompt`, whose own are `ids`."""
    whole = encode_prompt(tokenizer, prompt + text)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    # One token would hold the prompt's end and the text's beginning; a model that is given the prompt cannot predict
    # it. No tokenizer joins a line break to a letter, so what comes after one is tokenized as a continuation.
    line = encode(tokenizer, f"\n{text}")
    if any(first < 1 < after for first, after in line.spans):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [token for token, (first, _) in zip(line.ids, line.spans, strict=True) if first >= 1]


def subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Where the subject stands in the prompt: its first whole-word occurrence, else its first."""
    whole = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
    start = whole.start() if whole else prompt.index(subject)
    return start, start + len(subject)


def subject_end(fact: Fact, text: str, conversation: bool = False) -> int:
    """After which character the subject ends: of a conversation's rendering the one in its last question, not one that
    a system prompt or an earlier turn names."""
    start = max(0, text.rfind(fact.asked.strip())) if conversation else 0
    return start + subject_span(text[start:], fact.subject)[1]


def _row(fact: Fact, tokenizer: Any, before: str, text: str, target: str | None, ending: str = "") -> Row:
    """The text after `before`, and the target and the ending after that; without a target, the text alone."""
    bos, separator = tokenizer.bos_token, "" if ending else fact.joint(text)
    conversation = bool(fact.messages) and text == fact.prompt
    if before and bos and list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)  # it comes before the context then, as in every text
    prompt = before + text
    encoded = encode(tokenizer, prompt)
    subject = encoded.last_token(len(before) + subject_end(fact, text, conversation))
    if subject is None:
        raise InputError(
            f'fact {fact.id}: the tokenizer gives the subject "{fact.subject}" no token; choose another one'
        )
    if target is None:
        return Row(encoded.ids, subject, len(encoded.ids))
    ids, first = encode_target(tokenizer, prompt, target + ending, separator)
    if first >= len(ids):
        raise InputError(f'fact {fact.id}: the target "{target}" has no tokens; give it a text the tokenizer knows')
    return Row(tuple(ids), subject, first)


def pad(
    sequences: Sequence[Sequence[int]], device: torch.device, width: int = 0, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Padded ids and mask, (rows, max(longest, width)) each. Padding is id 0: masked, so any id would do."""
    width = max(width, *(len(s) for s in sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        start = width - len(sequence) if left else 0
        ids[i, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[i, start : start + len(sequence)] = 1
    return sent(ids, device), sent(mask, device)
