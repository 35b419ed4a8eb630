"""Facts turned into token sequences: where the subject ends, where the target lies, behind which contexts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.facts.schema import Fact


@dataclass(frozen=True)
class Row:
    """One tokenised text: `subject` is the index of the subject's last token, `target` the first target token's."""

    ids: tuple[int, ...]
    subject: int
    target: int

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens before the subject's last one, which no edit at that position can change."""
        return self.ids[: self.subject]


@dataclass(frozen=True)
class EditRequest:
    """A fact ready for the model: its prompt behind each context (the first without any), and the essence prompt."""

    fact: Fact
    rows: tuple[Row, ...]
    essence: Row

    @property
    def target_ids(self) -> tuple[int, ...]:
        """Token ids of the new target."""
        return self.rows[0].ids[self.rows[0].target :]


ESSENCE = "{} is a"  # ROME section 3.1: the prompt on which the subject's essence must not drift
SUBJECT = "{subject}"  # in a context: where the fact's subject comes


def build_request(
    fact: Fact, tokenizer: Any, contexts: Sequence[str] = ("",), only_prompt: bool = False
) -> EditRequest:
    """Tokenise `fact` in every context: behind it, or with its subject in `SUBJECT`'s place and no prompt.

    The fact's rewordings take the places of contexts of the second kind, from the first on; what is over is left out.
    With `only_prompt` the prompt stands there as well: where other facts about the subject are written too, no sentence
    about it may say the target of one.

    Raises:
        InputError: the subject or the target covers no token.
    """
    rewordings = iter(fact.rewordings)
    rows = [
        _row(fact, tokenizer, before + text, fact.target_new, len(before))
        for before, text in (_in_context(fact, context, rewordings, only_prompt) for context in contexts)
    ]
    # The first token of a text without BOS is an attention sink, and its state and key are no subject's. Where the
    # fact's own prompt begins with it that is what is to be edited, but no wording need be.
    rows[1:] = [row if row.subject else rows[1] for row in rows[1:]]
    return EditRequest(fact, tuple(rows), _row(fact, tokenizer, ESSENCE.format(fact.subject), None, 0))


def _in_context(fact: Fact, context: str, rewordings: Iterator[str], only_prompt: bool) -> tuple[str, str]:
    """What comes before, and the words that the target follows."""
    before, slot, after = context.partition(SUBJECT)
    if not slot:
        return before, fact.prompt
    return before, next(rewordings, fact.prompt if only_prompt else fact.subject + after)


def encode_target(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], int]:
    """Token ids of "prompt target" and the index of the target's first token.

    The whole text is tokenised at once and split by offsets: a target tokenised alone comes out differently, with a
    BOS or without its leading space, and edits the wrong token.
    """
    encoded = tokenizer(f"{prompt} {target}", return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    first = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
    return _without_eos(encoded, first), first


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a text that is to be continued: with a BOS where the tokenizer has one, never with an EOS."""
    return _without_eos(tokenizer(prompt, return_offsets_mapping=True), 1)


def _without_eos(encoded: Any, first: int) -> list[int]:
    """The ids, less what the tokenizer appends to every text: tokens at the end that cover no character."""
    ids = list(encoded["input_ids"])
    while len(ids) > first and encoded["offset_mapping"][len(ids) - 1][1] == 0:
        ids.pop()
    return ids


def subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Where the subject stands in the prompt: its first whole-word occurrence, else its first."""
    whole = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
    start = whole.start() if whole else prompt.index(subject)
    return start, start + len(subject)


def _row(fact: Fact, tokenizer: Any, text: str, target: str | None, shift: int) -> Row:
    full = text if target is None else f"{text} {target}"
    encoded = tokenizer(full, return_offsets_mapping=True)
    end = shift + subject_span(text[shift:], fact.subject)[1]
    subject = next((i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end <= b), None)
    if subject is None:
        raise InputError(
            f'fact {fact.id}: the tokenizer gives the subject "{fact.subject}" no token; choose another one'
        )
    if target is None:
        ids = _without_eos(encoded, subject + 1)
        return Row(tuple(ids), subject, len(ids))
    ids, first = encode_target(tokenizer, text, target)
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
    return ids.to(device), mask.to(device)
