"""What a fact is looked at for beyond its form: what no rate can hold, and what a tokenizer or a model cannot take."""

from __future__ import annotations

import re
from collections.abc import Callable

from patchkit.facts.record import Refused, quote
from patchkit.facts.schema import Fact
from patchkit.facts.text import is_unspaced

Check = Callable[[Fact], None]
"""Raises Refused, with the name of the fact's field, for a fact that cannot be used."""

# "<|endoftext|>" is what EasyEdit writes where there is no true answer.
_SPECIAL = re.compile(r"<\|?/?[A-Za-z_ ]+\|?>|\[(?:PAD|UNK|CLS|SEP|MASK|EOS|BOS)\]")


def tidied(fact: Fact) -> tuple[Fact, list[str]]:
    """The fact without a true target that is none, and what to say about it."""
    remarks, true = [], fact.target_true
    if true is not None and _SPECIAL.fullmatch(true):
        remarks, true = ["target_true is a special token and no answer, so it is left out"], None
    elif true is not None and _bare(true) == _bare(fact.target_new):
        remarks, true = ["target_true is the target itself, so there is nothing to compare it with"], None
    if _holds(fact.prompt, fact.target_new):
        remarks.append("the prompt holds the target, which a model may repeat without any edit")
    return (fact if true == fact.target_true else fact.model_copy(update={"target_true": true})), remarks


def _holds(text: str, part: str) -> bool:
    """Whether the part stands in the text as words of its own; as characters in a script without spaces."""
    text, part = _bare(text), _bare(part)
    return part in text if is_unspaced(part[:1]) else f" {part} " in f" {text} "


def _bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def visible(token_count: Callable[[str], int]) -> Check:
    """Refuses a target that the tokenizer turns into no token."""

    def check(fact: Fact) -> None:
        if token_count(f" {fact.target_new}") == 0:
            raise Refused("target_new", f"{quote(fact.target_new)} becomes no token; put visible text in it")

    return check
